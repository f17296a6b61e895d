"""What every function and the layer take, checked; arrays stay as they came."""

import math
from collections.abc import Sequence

import mlx.core as mx

from .. import checks
from ..definition import Inputs, Problem
from ..layout import feature_shape
from ._compat import is_traced_for_any_size

Axis = int | Sequence[int]


def checked(
    x: mx.array,
    scale: mx.array | None,
    bias: mx.array | None,
    axis: Axis,
    eps: float,
    mask: mx.array | None,
    residual: mx.array | None,
    activation: str | None,
) -> tuple[Problem, Inputs]:
    check_floating("x", x)
    features = checks.feature_axes(axis, x.shape)
    check_parameters(x, features, scale=scale, bias=bias)
    inputs = Inputs(x, scale, bias, _residual(residual, x), _weights(mask, x))
    any_size = len(features) < x.ndim and is_traced_for_any_size()
    options = checks.positive_eps(eps), checks.activation(activation), any_size
    return Problem(features, *options), inputs


def check_parameters(x: mx.array, features: tuple[int, ...], **named: mx.array | None) -> None:
    shape = x.shape
    expected = feature_shape(features, shape)
    for name, value in named.items():
        if value is not None:
            check_floating(name, value)
            checks.feature_shape(name, value.shape, expected, shape)


def _weights(mask: mx.array | None, x: mx.array) -> mx.array | None:
    """The mask, NaN where it is negative."""
    if mask is None:
        return None
    check_real("mask", mask)
    checks.broadcasts("mask", mask.shape, x.shape)
    return mask if mask.dtype == mx.bool_ else mx.where(mask < 0, math.nan, mask)


def group_of_several(group: mx.distributed.Group | None) -> mx.distributed.Group | None:
    if group is None:
        return None
    checks.instance("group", group, mx.distributed.Group)
    return group if group.size() > 1 else None


def check_floating(name: str, value: mx.array) -> None:
    checks.instance(name, value, mx.array)
    checks.floating(name, value.dtype, mx.issubdtype(value.dtype, mx.floating))


def check_real(name: str, value: mx.array) -> None:
    checks.instance(name, value, mx.array)
    checks.floating(name, value.dtype, not mx.issubdtype(value.dtype, mx.complexfloating))


def _residual(residual: mx.array | None, x: mx.array) -> mx.array | None:
    if residual is None:
        return None
    check_floating("residual", residual)
    checks.broadcasts("residual", residual.shape, x.shape)
    return residual
