"""The arguments as the stages want them, or an error that says what is wrong with one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..definition import Inputs, Problem
from ..layout import feature_shape, values_per_feature
from ._compat import check_dense, is_watched
from ._operations import OF_FUNCTIONS, Call
from ._sync import Group, processes_of

Axis = int | Sequence[int]
Number = float | Tensor  # a tensor without axes
fraction = {name: partial(checks.fraction, name) for name in ("momentum", "rate")}


def number(value: Any, check: Callable[[Any], float]) -> Any:
    """A number that is in order; a tensor without axes stands for the one that it holds.

    It stays a tensor where that one can't be looked at, as in a program, or has a derivative.
    """
    if type(value) is float or not isinstance(value, Tensor) or value.ndim > 0:
        return check(value)
    if value.is_complex() or value.dtype == torch.bool:
        return check(value)
    return value if is_watched(value) or value.requires_grad else check(value.item())


def checked(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    axis: Axis,
    eps: Number,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    sync: Group | bool | None = None,
    names: dict[str, str] = OF_FUNCTIONS,
) -> tuple[Call, Inputs]:
    check_floating("x", x)
    features = checks.feature_axes(axis, x.shape)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            check_parameter(name, value, x, features)
    processes = processes_of(sync, lambda: "batch_norm")
    eps = number(eps, checks.positive_eps)
    problem = Problem(features, eps, checks.activation(activation))
    inputs = Inputs(x, scale, bias, residual_like(x, residual), weights_of(x, mask))
    return Call(problem, processes, is_watched(x) or isinstance(eps, Tensor), names), inputs


def residual_like(x: Tensor, residual: Tensor | None, x_name: str = "x") -> Tensor | None:
    if residual is None:
        return None
    check_floating("residual", residual)
    check_device("residual", residual, x, x_name)
    checks.broadcasts("residual", residual.shape, x.shape, x_name)
    # Its gradient is added up in the wider of the two dtypes.
    wider = torch.promote_types(residual.dtype, x.dtype)
    return residual.to(wider).expand(x.shape).to(x.dtype)


def weights_of(x: Tensor, mask: Tensor | None, x_name: str = "x") -> Tensor | None:
    """The mask as it came, of the rank of x."""
    if mask is None:
        return None
    check_real("mask", mask)
    check_device("mask", mask, x, x_name)
    checks.broadcasts("mask", mask.shape, x.shape, x_name)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + tuple(mask.shape))


def values_of(call: Call, inputs: Inputs) -> int:
    """How many elements each feature has."""
    values: int = values_per_feature(call.problem.features, inputs.x.shape)
    return values


def check_settings(eps: Any, momentum: Any, **switches: Any) -> None:
    """Of a layer."""
    number(eps, checks.positive_eps)
    if momentum is not None:
        number(momentum, fraction["momentum"])
    for name, value in switches.items():
        checks.boolean(name, value)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be an instance of torch.Tensor, but got {type(value).__name__}. "
            "torch.as_tensor makes one of an array or a list."
        )


def check_floating(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    check_dense(name, value)
    checks.floating(name, value.dtype, value.dtype.is_floating_point)


def check_real(name: str, value: object) -> None:
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    check_dense(name, value)
    checks.floating(name, value.dtype, not value.dtype.is_complex)


def check_parameter(
    name: str, value: Tensor, x: Tensor, features: tuple[int, ...], x_name: str = "x"
) -> None:
    check_floating(name, value)
    check_device(name, value, x, x_name)
    checks.feature_shape(name, value.shape, feature_shape(features, x.shape), x.shape, x_name)


def check_device(name: str, value: Tensor, x: Tensor, x_name: str = "x") -> None:
    if value.device != x.device:
        raise ValueError(
            f"{name} must be on the device {x.device} of {x_name}, but it is on {value.device}. "
            "Move one of them."
        )


def check_running(mean: Tensor | None, var: Tensor | None) -> None:
    """As torch.nn says it."""
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")


def check_values(values: int, shape: Sequence[int], where: str = "") -> None:
    """As torch.nn says it."""
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}{where}"
        )
