"""How data differ from running statistics, and what of it is more than chance."""

from typing import Any, NamedTuple

import numpy as np

from ..moments import Statistics
from .thresholds import THRESHOLDS


class Drift(NamedTuple):
    """How data differ from running statistics, in each channel.

    Attributes
    ----------
    stds : how far the data's mean is from the running one, in the data's standard deviations
    ratio : the data's variance over the running one, eps added to both
    is_far, is_other : where the first, and the second, is more than chance and more than harmless
    """

    stds: np.ndarray
    ratio: np.ndarray
    is_far: np.ndarray
    is_other: np.ndarray

    @classmethod
    def of(cls, state: Any) -> "Drift":
        """It is enough if the data fit call by call, whatever the sizes of the calls.

        So running statistics average a layer that is called several times with a batch.
        """
        limits, batches = THRESHOLDS["drift"], state.seen.batches
        calls = state.seen.calls
        with np.errstate(all="ignore"):
            unit = np.maximum(batches.statistics.var, state.var) + state.eps
            is_usual = batches.statistics.var > state.eps
            errors = [
                limits["standard_errors"] * _standard_error(scatter, power, is_usual)
                for scatter, power in ((batches.batch_means, unit), (batches.batch_vars, unit**2))
            ]
            sides = []
            for mean, var in (
                (batches.statistics.mean, batches.statistics.var),
                (calls.batch_means.mean, calls.batch_vars.mean),
            ):
                std = np.sqrt(var + state.eps)
                stds = np.abs(state.mean - mean) / std
                ratio = (var + state.eps) / (state.var + state.eps)
                is_far = stds > np.maximum(limits["stds"], errors[0] / std)
                is_other = np.maximum(ratio, 1 / ratio) > limits["ratio"]
                is_other &= np.abs(state.var - var) > errors[1]
                sides.append(cls(stds, ratio, is_far, is_other))
        joined, apart = sides
        known = (batches.statistics.count > 0) & np.isfinite(joined.stds + joined.ratio)
        return joined._replace(
            is_far=known & joined.is_far & apart.is_far,
            is_other=known & joined.is_other & apart.is_other,
        )


def _standard_error(scatter: Statistics, unit: np.ndarray, is_usual: np.ndarray) -> np.ndarray:
    """Of the mean of what the batches have, each its own, and that scatters like this.

    That of a few batches is itself uncertain, and the worst of many channels decides: so no
    channel's is taken to be less than that of the layer's usual ones, in their units; and with n
    batches it is widened by 1 + 2/n.
    """
    relative = scatter.var / (scatter.count - 1) / unit
    usual = relative[np.isfinite(relative) & is_usual]
    if len(usual):
        relative = np.maximum(relative, usual.mean())
    widened: np.ndarray = (1 + 2 / scatter.count) * np.sqrt(relative * unit)
    return widened
