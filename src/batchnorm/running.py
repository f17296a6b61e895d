"""What `update_running` does behind every door, once a door has looked at its arrays."""

from collections.abc import Callable
from typing import Any

from . import checks, definition
from .arrays import Array, namespace
from .moments import Statistics


def moved(
    mean: Array,
    var: Array,
    statistics: Statistics,
    promoted: Callable[[Any, Any], Any],
    *,
    rate: float | Array,
    correction: int,
) -> tuple[Array, Array]:
    """The running mean and variance, moved: in their dtypes, or float32 where those are narrower.

    In which a small step would be rounded away, and the average stop. `promoted` gives the dtype of
    both of two, as the framework promotes. The door has looked at the rate.
    """
    correction = checks.correction(correction)
    expected = tuple(statistics.mean.shape)
    for name, array in (("statistics.count", statistics.count), ("statistics.var", statistics.var)):
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{name} must have the shape {expected} of statistics.mean, "
                f"but its shape is {tuple(array.shape)}."
            )
    for name, array in (("mean", mean), ("var", var)):
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{name} must have the shape {expected} of the batch's statistics, "
                f"but its shape is {tuple(array.shape)}."
            )
    xp = namespace(mean)
    kept = [promoted(each.dtype, xp.float32) for each in (mean, var)]
    dtype = promoted(promoted(*kept), statistics.mean.dtype)
    mean, var = _cast(mean, dtype), _cast(var, dtype)
    new = definition.update_running(mean, var, statistics, rate=rate, correction=correction)
    new_mean, new_var = map(_cast, new, kept)
    return new_mean, new_var


def _cast(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else namespace(array).astype(array, dtype)
