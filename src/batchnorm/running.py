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
    wide: Callable[[Any], Any],
    *,
    rate: float | Array,
    correction: int,
) -> tuple[Array, Array]:
    """The running mean and variance, moved: in what `wide` makes of their dtypes.

    In less than float32, a small step would be rounded away, and the average stop. The door has
    looked at the rate.
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
    cast = namespace(mean).astype
    mean, var = cast(mean, wide(mean.dtype)), cast(var, wide(var.dtype))
    new = definition.update_running(mean, var, statistics, rate=rate, correction=correction)
    return cast(new[0], mean.dtype), cast(new[1], var.dtype)
