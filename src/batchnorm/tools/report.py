"""What `inspect` returns: as text, as a table in a terminal, as JSON and as a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..installation import missing
from .drift import Drift
from .findings import SEVERITIES, Finding, figure, findings_of
from .states import State
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"severe": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Report:
    """What was found out about a model's normalizations.

    Print it, or `rich.print` it for a table.

    Attributes
    ----------
    layers : sequence of State
        Every layer that was found, with its running statistics and parameters in float64.
    findings : sequence of Finding
        What is odd: `layer`, `kind`, `severity`, `channels`, a `sentence` with figures, and
        `advice`; the severe ones first.
    """

    layers: Sequence[State]
    findings: Sequence[Finding] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", findings_of(self.layers))

    @property
    def is_severe(self) -> bool:
        """Whether evaluation is wrong somewhere."""
        return any(each.severity == "severe" for each in self.findings)

    @property
    def summary(self) -> str:
        """How many layers there are, and in how many something is how bad."""
        worst = [self.worst(each) for each in self.layers]
        said = [f"{each} in {worst.count(each)}" for each in SEVERITIES if each in worst]
        what = f"{len(worst)} normalization{'s' * (len(worst) != 1)}"
        batches = [0 if each.seen is None else each.seen.batches.batches for each in self.layers]
        least = THRESHOLDS["drift"]["batches"]
        few = sum(each < least for each in batches) if any(each.seen for each in self.layers) else 0
        unseen = f" To {few} came fewer than {least} batches, too few to see drift." if few else ""
        return f"{what}: {', '.join(said) if said else 'nothing odd'}.{unseen}"

    def worst(self, state: State) -> str:
        """The worst severity of what was found about a layer; "" for nothing."""
        return next((each.severity for each in self._about(state)), "")

    def to_dict(self) -> dict[str, Any]:
        """All of it but for the values of each channel, as JSON can hold it."""
        return {
            "summary": self.summary,
            "is_severe": self.is_severe,
            "layers": [_row(each) for each in self.layers],
            "findings": [asdict(each) for each in self.findings],
        }

    def figure(self) -> "Figure":
        """Draw on one page each layer's running mean, variance and, where data were seen, drift.

        Raises
        ------
        ImportError
            Without matplotlib, which the extra `tools` brings.
        """
        from .picture import draw

        return draw(self)

    def __str__(self) -> str:
        lines = []
        for kind, severity, advice, findings in self._by_advice():
            lines.append(f"{severity}: {kind}")
            lines += [f"  {each.path}: {each.sentence}" for each in findings]
            lines += [f"  → {advice}", ""]
        return "\n".join([*lines, self.summary])

    def __rich__(self) -> Any:
        try:
            from rich import box
            from rich.console import Group
            from rich.padding import Padding
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError as error:
            raise missing("The table of a report", "rich", "tools") from error
        is_seen = any(each.seen for each in self.layers)
        is_counted = any(each.batches is not None for each in self.layers)
        longest = max(len(each.path) for each in self.layers)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("Layer", overflow="fold", min_width=min(longest, 24))
        for heading in ("Channels", *["Batches"] * is_counted, "|Mean|/std", "Variance"):
            table.add_column(heading, justify="right")
        if is_seen:
            table.add_column("Drift", justify="right")
        table.add_column("Findings")
        order = [*SEVERITIES, ""]
        for state in sorted(self.layers, key=lambda each: order.index(self.worst(each))):
            row = _row(state)
            cells = [str(row["channels"])]
            if is_counted:
                cells.append("" if state.batches is None else f"{state.batches:,}")
            cells.append(figure(row["largest_shift"]))
            cells.append(f"{figure(row['smallest_variance'])} … {figure(row['largest_variance'])}")
            if is_seen:
                cells.append(figure(row["drift"]["mean_off_by_stds"]) if row["drift"] else "")
            found = Text(", ").join(
                Text(each.kind, _COLORS[each.severity]) for each in self._about(state)
            )
            table.add_row(Text(state.path), *cells, found)
        parts: list[Any] = [table]
        for kind, severity, advice, findings in self._by_advice():
            parts.append(Text.assemble((severity, _COLORS[severity]), f": {kind}"))
            said = [Text(f"{each.path}: {each.sentence}") for each in findings]
            parts += [Padding(each, (0, 0, 0, 2)) for each in (*said, Text(f"→ {advice}"))]
            parts.append("")
        return Group(*parts, Text(self.summary, "bold"))

    def _about(self, state: State) -> list[Finding]:
        return [each for each in self.findings if each.path == state.path]

    def _by_advice(self) -> Iterator[tuple[str, str, str, list[Finding]]]:
        """What is said of several layers is said once."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for each in self.findings:
            groups.setdefault((each.kind, each.severity, each.advice), []).append(each)
        for key, findings in groups.items():
            yield *key, findings


def _row(state: State) -> dict[str, Any]:
    """One layer in figures; None where a number is not finite, which JSON can't hold."""
    drift = None
    if state.seen is not None:
        found = Drift.of(state)
        drift = {
            "batches": state.seen.batches.batches,
            "mean_off_by_stds": _largest(found.stds),
            "smallest_variance_ratio": _smallest(found.ratio),
            "largest_variance_ratio": _largest(found.ratio),
        }
    return {
        "name": state.name,
        "group": state.group,
        "names_of": state.framework,
        "channels": len(state.mean),
        "dtype": state.dtype,
        "batches": state.batches,
        "eps": state.eps,
        "momentum": state.momentum,
        "is_frozen": state.is_frozen,
        "largest_shift": _largest(state.shifts),
        "smallest_variance": _smallest(state.var),
        "largest_variance": _largest(state.var),
        "drift": drift,
    }


def _largest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _smallest(values: np.ndarray) -> float | None:
    largest = _largest(-values)
    return None if largest is None else -largest
