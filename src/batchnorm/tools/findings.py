"""Which layers are sick: every kind of finding.

m, v: running mean and variance; γ, β: scale and bias. A finding is "severe" where evaluation is
wrong, a "warning" where it may be, or training will suffer, and else "info".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .drift import Drift
from .states import State, path_of
from .thresholds import THRESHOLDS

SEVERITIES = ("severe", "warning", "info")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about one layer; or about several, of which it names the first.

    Attributes
    ----------
    layer, group : which layer of which model
    kind : a row of the table in docs/tools.md
    severity : "severe", "warning" or "info"
    channels : which, counted from 0; () where the layer as a whole is meant
    sentence : what was found, with figures
    advice : what to do
    """

    layer: str
    kind: str
    severity: str
    channels: tuple[int, ...]
    sentence: str
    advice: str
    group: str = ""

    @property
    def path(self) -> str:
        return path_of(self.group, self.layer)


Model = Sequence[State]  # the layers of one model, among which one is
Rule = Callable[[Model], Iterator[Finding]]


def findings_of(states: Sequence[State]) -> list[Finding]:
    """All of them, the severe ones first."""
    models: dict[str, list[State]] = {}
    for state in states:
        models.setdefault(state.group, []).append(state)
    found = [
        replace(each, kind=kind)
        for model in models.values()
        for kind, rule in _RULES.items()
        for each in rule(model)
    ]
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def _of(
    state: State, severity: str, sentence: str, advice: str, which: np.ndarray | None = None
) -> Finding:
    channels = () if which is None else tuple(np.flatnonzero(which).tolist())
    return Finding(
        layer=state.name,
        group=state.group,
        kind="",
        severity=severity,
        channels=channels,
        sentence=sentence[0].upper() + sentence[1:],
        advice=advice,
    )


def _of_all(states: Sequence[State], severity: str, sentence: str, advice: str) -> Finding:
    """What is said once of all of them: "{layers} {are} new"."""
    first, *rest = states
    layers, are = (f"{len(states)} layers", "are") if rest else ("the layer", "is")
    names = ", ".join(path_of("", each.name) for each in states[:4])
    more = f" ({names}{' and others' if len(states) > 4 else ''})" if rest else ""
    return _of(first, severity, sentence.format(layers=layers, are=are) + more + ".", advice)


def _listed(which: np.ndarray) -> str:
    """channels 1, 2 and 4; channels 1, 2, 4 and 13 more; all 16 channels"""
    found = np.flatnonzero(which).tolist()
    if len(found) == len(which):
        return "its one channel" if len(found) == 1 else f"all {len(found)} channels"
    if len(found) == 1:
        return f"channel {found[0]}"
    shown = found[:5] if len(found) > 6 else found[:-1]
    rest = f"{len(found) - 5} more" if len(found) > 6 else str(found[-1])
    return f"channels {', '.join(map(str, shown))} and {rest}"


def _is_most(which: np.ndarray, kind: str) -> bool:
    return bool(which.mean() > THRESHOLDS[kind]["share_of_channels"])


def _not_finite(model: Model) -> Iterator[Finding]:
    for state in model:
        names = ("running mean", "running variance", "scale", "bias")
        arrays = zip(names, (state.mean, state.var, state.scale, state.bias), strict=True)
        bad = {name: ~np.isfinite(each) for name, each in arrays if each is not None}
        bad = {name: each for name, each in bad.items() if each.any()}
        if bad:
            which = np.logical_or.reduce([*bad.values()])
            yield _of(
                state,
                "severe",
                f"there is NaN or infinity in the {' and '.join(bad)}, in {_listed(which)}.",
                "Recalibrate, if it is the statistics alone; else go back to an earlier "
                "checkpoint. In training, skip_nonfinite=True keeps such batches out.",
                which,
            )
    for state in _in_order(model):
        data = state.seen.batches.statistics
        which = ~np.isfinite(data.mean + data.var)
        if which.any():
            yield _of(
                state,
                "severe",
                f"NaN or infinity comes to it, in {_listed(which)}.",
                "Look at the data, and at what comes before this layer, which is the first so.",
                which,
            )
            break


def _negative_variance(model: Model) -> Iterator[Finding]:
    for state in model:
        which = state.var < 0
        if which.any():
            yield _of(
                state,
                "severe",
                f"The running variance is negative in {_listed(which)}, down to "
                f"{figure(np.nanmin(state.var))}.",
                "No batch has such a variance: a conversion or an average of checkpoints has made "
                "it, or sums that cancel. Recalibrate.",
                which,
            )


def _never_updated(model: Model) -> Iterator[Finding]:
    untouched = [each for each in model if (each.mean == 0).all() and (each.var == 1).all()]
    others_count = any(each.batches for each in model)
    initial = []
    what = "the running mean is 0 and the running variance 1 in every channel"
    for state in untouched:
        is_left_out = state.batches == 0 and others_count
        has_parameters = state.scale is not None or state.bias is not None
        if _is_initial(state) and (has_parameters or not is_left_out):
            initial.append(state)
        elif state.is_frozen or (state.framework == "torch" and state.batches is None):
            yield _of(
                state,
                "info",
                f"{what}, while scale and bias are not initial: as in a frozen layer, "
                "whose statistics were absorbed into them.",
                "Nothing, if so. If it was trained, its statistics were lost.",
            )
        else:
            counted = "it has counted no batch, as others have" if is_left_out else ""
            trained = "scale and bias are trained" if has_parameters else ""
            yield _of(
                state,
                "severe" if is_left_out and has_parameters else "warning",
                f"{what}, as in a new layer, but {' and '.join(filter(None, (trained, counted)))}.",
                "Recalibrate on training data; then see why training never moved them: a layer in "
                "evaluation mode, or an updated state that was not kept.",
            )
    if initial:
        yield _of_all(
            initial,
            "info",
            "{layers} {are} as in a new network: statistics, scale and bias",
            "Nothing, if this is an untrained network, or a new head.",
        )


def _is_initial(state: State) -> bool:
    """As scale and bias begin: constant, or, as in DCGAN, the scale scattered about 1 by 0.02.

    In training they do not stay the same in all channels.
    """
    limit = THRESHOLDS["never_updated"]["untrained_scale"]
    scale, bias = state.scale, state.bias
    if bias is not None and bias.any():
        return False
    if scale is None or len(scale) == 1:
        return scale is None or scale[0] in (0, 1)
    return bool((scale == scale[0]).all() or (np.abs(scale - 1) <= limit).all())


def _not_converged(model: Model) -> Iterator[Finding]:
    limit = THRESHOLDS["not_converged"]["share_of_initial"]
    for state in model:
        if not (state.is_of_model and state.batches and state.momentum is not None):
            continue
        rate = state.convention.rate(state.momentum)
        initial = (1 - rate) ** state.batches  # what is left of the 1 that a variance starts from
        with np.errstate(all="ignore"):
            share = initial / (state.var + state.eps)
        which = share > limit
        # Statistics that did not start from 1, pretrained ones for instance, may be below.
        if which.any() and not (state.var < initial * 0.999).any():
            yield _of(
                state,
                "warning",
                f"After {state.batches:,} batches, the initial value 1 still makes up to "
                f"{share[which].max():.0%} of the running variance, in {_listed(which)}.",
                "Train on, recalibrate, or give momentum=None, which counts every batch alike.",
                which,
            )


def _variance_below_eps(model: Model) -> Iterator[Finding]:
    for state in model:
        which = (state.var >= 0) & (state.var < state.eps)
        if which.any():
            yield _of(
                state,
                "warning" if _is_most(which, "variance_below_eps") else "info",
                f"The running variance is below eps = {state.eps:g} in {_listed(which)}, down to "
                f"{figure(state.var[which].min())}: eps, not the data, decides how they are "
                "scaled.",
                "Channels that are constant can be pruned; if all are this small, scale what "
                "comes before, or take a smaller eps in training.",
                which,
            )


def _dead_channels(model: Model) -> Iterator[Finding]:
    limit = THRESHOLDS["dead_channels"]["share_of_largest"]
    for state in model:
        which = np.zeros(len(state.mean), bool)
        reasons = []
        if state.scale is not None and np.isfinite(state.scale).all() and state.scale.any():
            of_scale = np.abs(state.scale) <= limit * np.abs(state.scale).max()
            if of_scale.any():
                which |= of_scale
                reasons.append(f"the scale is 0, or next to it, in {_listed(of_scale)}")
        if state.seen is not None and state.seen.is_positive is not None:
            of_data = ~state.seen.is_positive
            if of_data.any():
                which |= of_data
                reasons.append(
                    f"its relu lets no value through in {_listed(of_data)} over "
                    f"{state.seen.batches.batches} batches"
                )
        if reasons:
            yield _of(
                state,
                "warning" if _is_most(which, "dead_channels") else "info",
                f"{', and '.join(reasons)}.",
                "They can be pruned. If they are many, the learning rate or the weight decay of "
                "the scale was high.",
                which,
            )


def _momentum_convention(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["momentum_convention"]
    for state in model:
        if state.momentum is None or state.is_frozen:
            continue
        if state.convention.momentum_weighs_new:
            is_odd = limits["rate_from"] <= state.momentum < 1
            means, other = "the weight of the new value", "of the old value"
        else:
            is_odd = 0 < state.momentum <= limits["other_rate_to"]
            means, other = "the weight of the old value", "of the new value"
        if is_odd:
            yield _of(
                state,
                "warning",
                f"momentum is {state.momentum:g}, and is {means} here: the statistics are those "
                "of the last batches alone.",
                f"If it was meant as the weight {other}, as other frameworks have it, give "
                f"{1 - state.momentum:.4g}.",
            )


def _float32_cancellation(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["float32_cancellation"]
    for state in model:
        with np.errstate(all="ignore"):
            error = limits["rounding"] * state.shifts**2
        which = np.isfinite(error) & (error > limits["relative_error"])
        if state.one_pass is not None and which.any():
            digits = max(0, math.floor(-math.log10(error[which].max())))
            yield _of(
                state,
                "info",
                f"The mean is up to {figure(state.shifts[which].max())} standard deviations "
                f"from 0, in {_listed(which)}. In float32, {state.one_pass} subtracts squares "
                f"that are nearly equal: {digits or 'none'} of a batch variance's 7 digits "
                f"{'is' if digits == 1 else 'are'} left in training.",
                "Take batchnorm's layer, which loses none, or centre what comes before.",
                which,
            )


def _half_precision_statistics(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["half_precision_statistics"]
    harmless: dict[str, list[State]] = {}
    for state in model:
        if state.dtype == "float16":
            which = np.isinf(state.var) | (state.var < limits["smallest_float16"])
            why = "the variance has left the range of float16"
        elif state.dtype == "bfloat16":
            which = np.isinf(state.var) | (state.shifts > limits["stds_bfloat16"])
            why = "the rounded mean is off by a good part of a standard deviation"
        else:
            continue
        if not which.any():
            harmless.setdefault(state.dtype, []).append(state)
            continue
        yield _of(
            state,
            "warning",
            f"the running statistics are {state.dtype}, and in {_listed(which)} {why}.",
            "Keep running statistics in float32, in which small steps of training are not rounded "
            "away; recalibrate those that were lost.",
            which,
        )
    for dtype, states in harmless.items():
        yield _of_all(
            states,
            "info",
            f"the running statistics of {{layers}} are {dtype}",
            "Nothing for evaluation; for training keep them in float32.",
        )


def _drift(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["drift"]
    cause: str | None = None
    for state in _in_order(model):
        batches = state.seen.batches.batches
        if batches < limits["batches"]:
            continue
        drift = Drift.of(state)
        which = drift.is_far | drift.is_other
        if not which.any():
            continue
        parts, is_severe = [], False
        if drift.is_far.any():
            stds = drift.stds[drift.is_far].max()
            is_severe |= stds >= limits["severe_stds"]
            parts.append(
                f"the mean of the data is up to {figure(stds)} standard deviations from the "
                "running mean"
            )
        if drift.is_other.any():
            ratio = drift.ratio[drift.is_other]
            low, high = ratio.min(), ratio.max()
            is_severe |= max(high, 1 / low) >= limits["severe_ratio"]
            span = (
                figure(low) if figure(low) == figure(high) else f"{figure(low)} to {figure(high)}"
            )
            parts.append(f"the variance of the data is {span} times the running one")
        if state.is_frozen:
            severity, advice = "info", "Nothing, if it is frozen for that: it is meant to be."
        else:
            severity = "severe" if is_severe else "warning"
            advice = (
                f"Look first at {cause}, where this begins."
                if cause
                else "Recalibrate on data of this kind; but see first whether the batches are "
                "prepared as those of training were, and whether dropout comes right before it."
            )
            cause = cause or path_of("", state.name)
        yield _of(
            state,
            severity,
            f"in {_listed(which)}, {', and '.join(parts)} ({batches} batches).",
            advice,
            which,
        )


def _in_order(model: Model) -> list[Any]:
    """Those to which data came, in the order in which they came."""
    return sorted((each for each in model if each.seen), key=lambda each: each.seen.order)


def _noisy_batches(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["noisy_batches"]
    for state in _in_order(model):
        batches = state.seen.batches
        if state.is_frozen or batches.batches < limits["batches"]:
            continue
        means = batches.batch_means
        with np.errstate(all="ignore"):
            scatter = means.var * means.count / (means.count - 1)
            relative = scatter / (batches.statistics.var + state.eps)
        relative = relative[np.isfinite(relative)]
        spread = math.sqrt(relative.mean()) if len(relative) else 0.0
        if spread > limits["stds"]:
            values = batches.statistics.count.max() / batches.batches
            yield _of(
                state,
                "warning",
                f"the means of {batches.batches} batches, of {values:,.0f} value"
                f"{'s' * (round(values) != 1)} a channel each, scatter by {figure(spread)} "
                "standard deviations.",
                "If training's batches are made like these, it normalizes by such means: take "
                "larger batches, mix the examples, share the batch among processes (sync), or "
                "freeze the layer.",
            )


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


_RULES: dict[str, Rule] = {
    "not_finite": _not_finite,
    "negative_variance": _negative_variance,
    "never_updated": _never_updated,
    "not_converged": _not_converged,
    "variance_below_eps": _variance_below_eps,
    "dead_channels": _dead_channels,
    "momentum_convention": _momentum_convention,
    "float32_cancellation": _float32_cancellation,
    "half_precision_statistics": _half_precision_statistics,
    "drift": _drift,
    "noisy_batches": _noisy_batches,
}
KINDS = (*_RULES,)
