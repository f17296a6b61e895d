"""Which layers are sick: every kind of finding, and its thresholds.

m, v: running mean and variance; γ, β: scale and bias. A finding is "severe" where evaluation is
wrong, a "warning" where it may be, or training will suffer, and else "info".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .states import State, path_of

SEVERITIES = ("severe", "warning", "info")

# What each kind compares with; docs/tools.md says how these were chosen.
THRESHOLDS: dict[str, dict[str, float]] = {
    "not_finite": {},
    "negative_variance": {},
    "never_updated": {},
    "not_converged": {"share_of_initial": 0.05},
    "variance_below_eps": {"share_of_channels": 0.5},
    "dead_channels": {"share_of_largest": 1e-6, "share_of_channels": 0.5},
    "momentum_convention": {"rate_from": 0.9, "other_rate_to": 0.1},
    "float32_cancellation": {"rounding": 6e-8, "relative_error": 1e-2},
    "half_precision_statistics": {"smallest_float16": 6e-5, "stds_bfloat16": 50},
    "drift": {
        "batches": 2,
        "stds": 0.5,
        "standard_errors": 4,
        "ratio": 2,
        "severe_stds": 3,
        "severe_ratio": 10,
    },
    "noisy_batches": {"batches": 8, "stds": 0.5},
}


@dataclass(frozen=True)
class Finding:
    """One thing about one layer; or about several, of which it names the first.

    Attributes
    ----------
    layer, group : which layer of which model
    kind : a key of THRESHOLDS
    severity : "severe", "warning" or "info"
    channels : which, counted from 0; () for all
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


def findings_of(states: Sequence[State]) -> list[Finding]:
    """All of them, the severe ones first."""
    models: dict[str, list[State]] = {}
    for state in states:
        models.setdefault(state.group, []).append(state)
    found = [each for model in models.values() for rule in _RULES for each in rule(model)]
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def _of(
    state: State,
    kind: str,
    severity: str,
    sentence: str,
    advice: str,
    which: np.ndarray | None = None,
) -> Finding:
    channels = () if which is None else tuple(np.flatnonzero(which).tolist())
    return Finding(state.name, kind, severity, channels, sentence, advice, state.group)


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
                "not_finite",
                "severe",
                f"{' and '.join(bad)} hold NaN or infinity in {_listed(which)}.",
                "Recalibrate, if it is the statistics alone; else go back to an earlier "
                "checkpoint. In training, skip_nonfinite=True keeps such batches out.",
                which,
            )


def _negative_variance(model: Model) -> Iterator[Finding]:
    for state in model:
        which = state.var < 0
        if which.any():
            yield _of(
                state,
                "negative_variance",
                "severe",
                f"The running variance is negative in {_listed(which)}, down to "
                f"{_figure(np.nanmin(state.var))}.",
                "No batch has such a variance: a conversion or an average of checkpoints has made "
                "it, or sums that cancel. Recalibrate.",
                which,
            )


def _never_updated(model: Model) -> Iterator[Finding]:
    untouched = [each for each in model if (each.mean == 0).all() and (each.var == 1).all()]
    others_count = any(each.batches for each in model)
    initial = []
    for state in untouched:
        is_left_out = state.batches == 0 and others_count
        if _is_initial(state) and not (is_left_out and state.scale is state.bias is None):
            initial.append(state)
            continue
        what = "The running mean is 0 and the running variance 1 in every channel"
        if _is_initial(state):
            severity, more = "warning", "the layer has counted no batch, others of the model have"
        elif state.is_frozen or (state.framework == "torch" and state.batches is None):
            yield _of(
                state,
                "never_updated",
                "info",
                f"{what}, while scale and bias are not initial: as in a frozen layer, "
                "whose statistics were absorbed into them.",
                "Nothing, if so. If it was trained, its statistics were lost.",
            )
            continue
        elif is_left_out:
            severity = "severe"
            more = "scale and bias are trained, and it has counted no batch, as others have"
        else:
            severity, more = "warning", "scale and bias are trained"
        yield _of(
            state,
            "never_updated",
            severity,
            f"{what}, as in a new layer, but {more}.",
            "Recalibrate on training data; then see why training never moved them: a layer in "
            "evaluation mode, or an updated state that was not kept.",
        )
    if initial:
        first, *rest = initial
        several = f"{len(initial)} layers" if rest else "This layer"
        more = f": {', '.join(each.name for each in initial[:4])}" if rest else ""
        more += " and others" if len(initial) > 4 else ""
        yield _of(
            first,
            "never_updated",
            "info",
            f"{several} {'are' if rest else 'is'} as initialized, statistics, scale and "
            f"bias{more}.",
            "Nothing, if this is an untrained network, or a new head.",
        )


def _is_initial(state: State) -> bool:
    """Scale and bias, which in training never stay the same in all channels."""
    scale, bias = state.scale, state.bias
    is_scale = scale is None or bool((scale == scale[0]).all() and len(scale) > 1)
    if scale is not None and len(scale) == 1:
        is_scale = scale[0] in (0, 1)
    return is_scale and (bias is None or not bias.any())


def _not_converged(model: Model) -> Iterator[Finding]:
    limit = THRESHOLDS["not_converged"]["share_of_initial"]
    for state in model:
        if not (state.is_of_model and state.batches and state.momentum is not None):
            continue
        rate = state.convention.rate(state.momentum)
        initial = (1 - rate) ** state.batches  # what is left of the 1 that a variance starts from
        with np.errstate(all="ignore"):
            share = initial / state.var
        which = share > limit
        # Statistics that did not start from 1, pretrained ones for instance, may be below.
        if which.any() and not (share > 1.001).any():
            yield _of(
                state,
                "not_converged",
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
                "variance_below_eps",
                "warning" if _is_most(which, "variance_below_eps") else "info",
                f"The running variance is below eps = {state.eps:g} in {_listed(which)}, down to "
                f"{_figure(state.var[which].min())}: eps, not the data, decides how they are "
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
                    f"{state.seen.pooled.batches} batches"
                )
        if reasons:
            said = ", and ".join(reasons)
            yield _of(
                state,
                "dead_channels",
                "warning" if _is_most(which, "dead_channels") else "info",
                f"{said[0].upper()}{said[1:]}.",
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
                "momentum_convention",
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
                "float32_cancellation",
                "info",
                f"The mean is up to {_figure(state.shifts[which].max())} standard deviations "
                f"from 0, in {_listed(which)}. In float32, {state.one_pass} subtracts squares "
                f"that are nearly equal: {digits or 'none'} of a batch variance's 7 digits "
                f"{'is' if digits == 1 else 'are'} left in training.",
                "Take batchnorm's layer, which loses none, or centre what comes before.",
                which,
            )


def _half_precision_statistics(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["half_precision_statistics"]
    for state in model:
        if state.dtype not in ("float16", "bfloat16"):
            continue
        if state.dtype == "float16":
            which = np.isinf(state.var) | (state.var < limits["smallest_float16"])
            why = "the variance has left the range of float16"
        else:
            which = np.isinf(state.var) | (state.shifts > limits["stds_bfloat16"])
            why = "the rounded mean is off by a good part of a standard deviation"
        is_bad = bool(which.any())
        more = f", and in {_listed(which)} {why}" if is_bad else ""
        yield _of(
            state,
            "half_precision_statistics",
            "warning" if is_bad else "info",
            f"The running statistics are {state.dtype}{more}.",
            "Keep running statistics in float32, in which small steps of training are not rounded "
            "away; recalibrate those that were lost."
            if is_bad
            else "Nothing for evaluation; for training keep them in float32.",
            which if is_bad else None,
        )


def _drift(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["drift"]
    seen = [each for each in model if each.seen is not None]
    cause: str | None = None
    for state in sorted(seen, key=lambda each: each.seen.order if each.seen else 0):
        assert state.seen is not None
        pooled = state.seen.pooled
        if pooled.batches < limits["batches"]:
            continue
        stds, ratio, which = drift_of(state)
        if not which.any():
            continue
        stds, ratio = stds[which], ratio[which]
        worst = max(ratio.max(), 1 / ratio.min())
        is_severe = stds.max() >= limits["severe_stds"] or worst >= limits["severe_ratio"]
        if state.is_frozen:
            severity, advice = "info", "Nothing, if it is frozen for that: it is meant to be."
        else:
            severity = "severe" if is_severe else "warning"
            advice = (
                f"Look first at {cause}, where this begins."
                if cause
                else "Recalibrate on data of this kind; but see first whether the batches are "
                "prepared as those of training were."
            )
        yield _of(
            state,
            "drift",
            severity,
            f"In {_listed(which)}, the mean of the data is up to {_figure(stds.max())} standard "
            f"deviations from the running mean, and their variance {_figure(ratio.min())} to "
            f"{_figure(ratio.max())} times the running one ({pooled.batches} batches).",
            advice,
            which,
        )
        cause = cause or state.name


def drift_of(state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far the data's mean is from the running one, in the data's standard deviations; their
    variance over the running one, eps added to both; and where one of the two is too far."""
    assert state.seen is not None
    limits, pooled = THRESHOLDS["drift"], state.seen.pooled
    data = pooled.statistics
    with np.errstate(all="ignore"):
        std = np.sqrt(data.var + state.eps)
        stds = np.abs(state.mean - data.mean) / std
        ratio = (data.var + state.eps) / (state.var + state.eps)
        errors = limits["standard_errors"] * np.sqrt(
            [each.var / (each.count - 1) for each in (pooled.batch_means, pooled.batch_vars)]
        )
        is_far = stds > np.maximum(limits["stds"], errors[0] / std)
        is_other = np.maximum(ratio, 1 / ratio) > limits["ratio"]
        is_other &= np.abs(state.var - data.var) > errors[1]
    return stds, ratio, (data.count > 0) & np.isfinite(stds + ratio) & (is_far | is_other)


def _noisy_batches(model: Model) -> Iterator[Finding]:
    limits = THRESHOLDS["noisy_batches"]
    for state in model:
        if state.seen is None or state.is_frozen:
            continue
        pooled = state.seen.pooled
        if pooled.batches < limits["batches"]:
            continue
        means = pooled.batch_means
        with np.errstate(all="ignore"):
            spread = np.sqrt(means.var * means.count / (means.count - 1))
            spread = spread / np.sqrt(pooled.statistics.var + state.eps)
        which = spread > limits["stds"]
        if which.any():
            elements = pooled.statistics.count.max() / pooled.batches
            yield _of(
                state,
                "noisy_batches",
                "warning",
                f"The means of {pooled.batches} batches, of {elements:,.0f} values each, lie up to "
                f"{_figure(spread[which].max())} standard deviations apart, in {_listed(which)}.",
                "Training normalizes by such means: take larger batches, mix the examples, share "
                "the batch among processes (sync), or freeze the layer.",
                which,
            )


def _figure(value: float) -> str:
    return f"{value:.3g}"


_RULES: tuple[Callable[[Model], Iterator[Finding]], ...] = (
    _not_finite,
    _negative_variance,
    _never_updated,
    _not_converged,
    _variance_below_eps,
    _dead_channels,
    _momentum_convention,
    _float32_cancellation,
    _half_precision_statistics,
    _drift,
    _noisy_batches,
)
