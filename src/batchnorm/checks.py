"""The checks of arguments that doors share, and their messages.

A message names the argument, says what came and what was expected, and what to do where that is
not plain. Wrong kinds of value are TypeErrors, wrong values ValueErrors. Checks look at shapes,
dtypes and Python numbers alone, so that they cost nothing in a traced or lazy framework.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

from .activations import ACTIVATIONS, CHOICES

Shape = Sequence[int]


def is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_real(value: Any) -> bool:
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def floating(name: str, dtype: object, is_real_floating: bool) -> None:
    """Arrays of integers, complex numbers, objects or strings have no batch normalization."""
    if not is_real_floating:
        raise TypeError(
            f"{name} must be an array of real floating-point numbers, but its dtype is {dtype}. "
            "Convert it first, to float32 for instance."
        )


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be an instance of {kind.__module__}.{kind.__name__}, "
            f"but got {type(value).__name__}."
        )


def feature_axes(axis: Any, shape: Shape) -> tuple[int, ...]:
    """`axis`, an int or a sequence of them, as a sorted tuple of non-negative feature axes."""
    ndim = len(shape)
    if type(axis) is int and -ndim <= axis < ndim:  # nearly always
        return (axis % ndim,)
    if ndim == 0:
        raise ValueError("x must have at least one axis, but its shape is ().")
    features = []
    for each in axis if isinstance(axis, (tuple, list)) else (axis,):
        if not is_integer(each):
            raise TypeError(f"axis must be an integer or a tuple of integers, but got {axis!r}.")
        if not -ndim <= each < ndim:
            raise ValueError(
                f"axis must be within [{-ndim}, {ndim - 1}] for x of shape {tuple(shape)}, "
                f"but got {axis!r}."
            )
        features.append(int(each) % ndim)
    if len(set(features)) < len(features):
        raise ValueError(
            f"axis must not name an axis of x twice, but got {axis!r} for rank {ndim}."
        )
    if not features:
        raise ValueError(f"axis must name at least one feature axis of x, but got {axis!r}.")
    return tuple(sorted(features))


# With which neither a variance of float32 plus eps nor the inverse of its root overflows.
SMALLEST_EPS, LARGEST_EPS = 1e-37, 1e30


def positive_eps(eps: Any, name: str = "eps") -> float:
    if not is_real(eps):
        raise TypeError(f"{name} must be a positive number, but got {eps!r}.")
    if not 0 < eps < math.inf:
        raise ValueError(f"{name} must be positive and finite, but got {eps}.")
    if not SMALLEST_EPS <= eps <= LARGEST_EPS:
        raise ValueError(
            f"{name} must be within [{SMALLEST_EPS}, {LARGEST_EPS}], but got {eps!r}. In "
            "float32, where a variance is added, a smaller one vanishes, a larger one overflows."
        )
    return float(eps)


def fraction(name: str, value: Any) -> float:
    """A momentum or a rate: a number within [0, 1]."""
    if not is_real(value):
        raise TypeError(f"{name} must be a number within [0, 1], but got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be within [0, 1], but got {value}.")
    return float(value)


def correction(value: Any) -> int:
    if not is_integer(value):
        raise TypeError(f"correction must be 0 or 1, but got {value!r}.")
    if value not in (0, 1):
        raise ValueError(
            "correction must be 0 (running variance divided by the count) or 1 (by the count - 1), "
            f"but got {value!r}."
        )
    return int(value)


def scalar(name: str, shape: Shape, dtype: Any, is_real: bool) -> None:
    """An array in the place of a number."""
    if not is_real:
        raise TypeError(f"{name} must be a real number, but it is an array of dtype {dtype}.")
    if tuple(shape):
        raise ValueError(
            f"{name} must be a number or an array without axes, but its shape is {tuple(shape)}."
        )


def activation(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in ACTIVATIONS):
        return value
    raise ValueError(f"activation must be {CHOICES}, but got {value!r}.")


def feature_shape(
    name: str, shape: Shape, expected: Shape, x_shape: Shape, x_name: str = "x"
) -> None:
    if shape != expected and tuple(shape) != tuple(expected):
        raise ValueError(
            f"{name} must have the feature shape {tuple(expected)} of {x_name}, whose shape is "
            f"{tuple(x_shape)}, but its shape is {tuple(shape)}."
        )


def broadcasts(name: str, shape: Shape, x_shape: Shape, x_name: str = "x") -> None:
    aligned = zip(reversed(tuple(shape)), reversed(tuple(x_shape)), strict=False)
    if len(shape) > len(x_shape) or any(size != 1 and size != of_x for size, of_x in aligned):
        raise ValueError(
            f"{name} must broadcast to the shape {tuple(x_shape)} of {x_name}, "
            f"but its shape is {tuple(shape)}."
        )


def number_of_channels(
    channels: int, number: int, shape: Shape, x_name: str = "x", name: str = "num_features"
) -> None:
    if channels != number:
        raise ValueError(
            f"{x_name} must have {name}={number} channels, "
            f"but it has {channels}: its shape is {tuple(shape)}."
        )


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {value!r}.")
    return value


def positive_integer(name: str, value: Any) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be a positive integer, but got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, but got {value}.")
    return int(value)


def more_than_one_value(values: Any, x_shape: Shape, allow_one_value: Any) -> None:
    """Of each feature of x; what several devices hold together may not be known, and None."""
    if not boolean("allow_one_value", allow_one_value) and values == 1 and 0 not in x_shape:
        refuse_one_value(f"x of shape {tuple(x_shape)} has one")


def refuse_one_value(what_has_it: str) -> NoReturn:
    raise ValueError(
        f"batch_norm needs more than one value of each feature, but {what_has_it}. Use normalize "
        "with running statistics; or, where bias alone is a right output, allow_one_value=True."
    )
