"""A report as one page."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..installation import missing
from .drift import Drift
from .states import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import Report

_COLORS = {"severe": "#c0392b", "warning": "#e69f00", "info": "#0072b2", "": "#777777"}
_MOST_NAMES = 60  # that can be read one below the other


def draw(report: "Report") -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ModuleNotFoundError as error:
        raise missing("The picture of a report", "matplotlib", "tools") from error
    states, count = report.layers, len(report.layers)
    panels = {
        "Running mean / std": [
            each.mean / np.sqrt(_positive(each.var + each.eps)) for each in states
        ],
        "Running variance": [_positive(each.var) for each in states],
    }
    if any(each.seen for each in states):
        panels["Data's mean is off by (std)"] = [_off(each) for each in states]
    worst = [report.worst(each) for each in states]
    colors = [_COLORS[each] for each in worst]
    rows = np.arange(count)
    height = max(3.0, min(2 + 0.22 * count, 16))
    figure = Figure(figsize=(3.5 + 3.2 * len(panels), height), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for each, (title, values) in zip(axes, panels.items(), strict=True):
        spans = np.array([_span(channels) for channels in values]).T
        each.hlines(rows, spans[0], spans[2], colors=colors, linewidth=max(1, min(4, 160 / count)))
        each.scatter(spans[1], rows, s=16, color="white", edgecolors=colors, zorder=3)
        each.set_title(title, fontsize=11)
        each.set_xlabel("channels: smallest, median, largest", fontsize=9)
        each.grid(axis="x", alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    if np.nanmax(np.abs(np.concatenate(panels["Running mean / std"])), initial=0) > 10:
        axes[0].set_xscale("symlog", linthresh=1)
    variances = np.concatenate(panels["Running variance"])
    if np.isfinite(variances).any():  # in whole decades
        logarithms = np.log10(variances[np.isfinite(variances)])
        axes[1].set_xscale("log")
        axes[1].xaxis.set_minor_formatter(NullFormatter())
        axes[1].set_xlim(
            10.0 ** (math.ceil(logarithms.min()) - 1), 10.0 ** (math.floor(logarithms.max()) + 1)
        )
    # The sick ones have names in any case; of the others, every so many.
    step = -(-count // _MOST_NAMES)
    named = [row for row in range(count) if row % step == 0 or worst[row] in ("severe", "warning")]
    axes[0].set_yticks(named, [_short(states[row].path) for row in named], fontsize=8)
    for label, row in zip(axes[0].get_yticklabels(), named, strict=True):
        label.set_parse_math(False)  # a name may have what looks like a formula
        label.set_color(colors[row] if worst[row] in ("severe", "warning") else "black")
    axes[0].set_ylim(count - 0.5, -0.5)
    there = [each for each in _COLORS if each in worst]
    handles = [axes[0].plot([], [], color=_COLORS[each], linewidth=4)[0] for each in there]
    labels = [each or "nothing odd" for each in there]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(there), frameon=False)
    figure.suptitle(report.summary)
    return figure


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _off(state: State) -> np.ndarray:
    return np.full(1, np.nan) if state.seen is None else Drift.of(state).stds


def _span(values: np.ndarray) -> tuple[float, float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan, np.nan
    return finite.min(), float(np.median(finite)), finite.max()


def _short(name: str, longest: int = 40) -> str:
    """Without its middle: layers differ at the end, and models at the beginning."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 3]}…{name[1 - longest + longest // 3 :]}"
