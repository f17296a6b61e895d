"""What every function and the layer take, checked; arrays stay as they came."""

import math
from collections.abc import Sequence

import mlx.core as mx

from .. import checks
from ..definition import Inputs, Problem
from ..layout import feature_shape

Axis = int | Sequence[int]
Number = float | mx.array  # an array without axes


def checked(
    x: mx.array,
    scale: mx.array | None,
    bias: mx.array | None,
    axis: Axis,
    eps: Number,
    mask: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
    name_of_scale: str = "scale",
) -> tuple[Problem, Inputs]:
    check_floating("x", x)
    features = checks.feature_axes(axis, x.shape)
    if scale is not None:
        check_parameters(x, features, **{name_of_scale: scale})
    if bias is not None:
        check_parameters(x, features, bias=bias)
    inputs = Inputs(x, scale, bias, _residual(residual, x), _weights(mask, x))
    return Problem(features, _eps(eps, x), checks.activation(activation)), inputs


def are_plain(x: mx.array, *parameters: mx.array | None) -> bool:
    """Whether there is nothing to check or to cast before a call over the last axis of x.

    All are float32, and of a parameter that is there is one value for each feature.
    """
    if type(x) is not mx.array or x.dtype != mx.float32:
        return False
    features = x.shape[-1:]
    for each in parameters:
        if each is None:
            continue
        if type(each) is not mx.array or each.dtype != mx.float32 or each.shape != features:
            return False
    return True


def _eps(eps: Number, x: mx.array) -> Number:
    if not isinstance(eps, mx.array):
        return checks.positive_eps(eps)
    kept = _within("eps", eps, checks.SMALLEST_EPS, checks.LARGEST_EPS)
    return kept if x.dtype == mx.float64 else kept.astype(mx.float32)


def fraction(name: str, value: Number) -> Number:
    """A momentum or a rate."""
    if not isinstance(value, mx.array):
        return checks.fraction(name, value)
    return _within(name, value, 0, 1)


def _within(name: str, value: mx.array, smallest: float, largest: float) -> mx.array:
    """The number that an array holds, which is not looked at; NaN if it is out of range."""
    check_number(name, value)
    wide = value.astype(mx.float64 if value.dtype == mx.float64 else mx.float32)
    return mx.where(mx.logical_and(wide >= smallest, wide <= largest), wide, math.nan)


def check_number(name: str, value: mx.array) -> None:
    real = value.dtype != mx.bool_ and not mx.issubdtype(value.dtype, mx.complexfloating)
    if value.ndim > 0 or not real:
        raise TypeError(
            f"{name} must be a number, or an array without axes that holds a real one, "
            f"but got an array of shape {value.shape} and dtype {value.dtype}."
        )


def check_parameters(x: mx.array, features: tuple[int, ...], **named: mx.array) -> None:
    shape = x.shape
    expected = feature_shape(features, shape)
    for name, value in named.items():
        check_floating(name, value)
        checks.feature_shape(name, value.shape, expected, shape)


def _weights(mask: mx.array | None, x: mx.array) -> mx.array | None:
    """The mask, NaN where it is negative."""
    if mask is None:
        return None
    check_real("mask", mask)
    checks.broadcasts("mask", mask.shape, x.shape)
    if not mx.issubdtype(mask.dtype, mx.floating):  # through which MLX would differentiate
        mask = mx.stop_gradient(mask)
    return mask if mask.dtype == mx.bool_ else mx.where(mask < 0, math.nan, mask)


def group_of_several(group: mx.distributed.Group | None) -> mx.distributed.Group | None:
    if group is None:
        return None
    checks.instance("group", group, mx.distributed.Group)
    return group if group.size() > 1 else None


_FLOATING = (mx.float32, mx.float16, mx.bfloat16, mx.float64)


def check_floating(name: str, value: mx.array) -> None:
    if not isinstance(value, mx.array) or value.dtype not in _FLOATING:
        checks.instance(name, value, mx.array)
        checks.floating(name, value.dtype, False)


def check_real(name: str, value: mx.array) -> None:
    checks.instance(name, value, mx.array)
    checks.floating(name, value.dtype, not mx.issubdtype(value.dtype, mx.complexfloating))


def _residual(residual: mx.array | None, x: mx.array) -> mx.array | None:
    if residual is None:
        return None
    check_floating("residual", residual)
    checks.broadcasts("residual", residual.shape, x.shape)
    return residual
