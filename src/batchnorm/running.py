"""What `update_running` does behind every door, once a door has looked at its arrays."""

from typing import Any

from . import definition
from .arrays import Array, namespace
from .moments import Statistics


def moved(
    mean: Array,
    var: Array,
    statistics: Statistics,
    dtype: Any,
    *,
    rate: float | Array,
    correction: int,
) -> tuple[Array, Array]:
    """The running mean and variance, moved: computed in `dtype`, and in the dtypes that came.

    The door has looked at the rate.
    """
    if correction not in (0, 1):
        raise ValueError(
            "correction must be 0 (running variance divided by the count) or 1 (by the count - 1), "
            f"but got {correction!r}."
        )
    expected = tuple(statistics.mean.shape)
    for name, array in (("mean", mean), ("var", var)):
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{name} must have the shape {expected} of the batch's statistics, "
                f"but its shape is {tuple(array.shape)}."
            )
    cast = namespace(mean).astype
    new_mean, new_var = definition.update_running(
        cast(mean, dtype), cast(var, dtype), statistics, rate=rate, correction=int(correction)
    )
    return cast(new_mean, mean.dtype), cast(new_var, var.dtype)
