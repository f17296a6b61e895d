"""The functions that every door has, on tensors."""

from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..documentation import documented
from ..moments import Statistics, check_statistics
from ..running import moved
from . import _derivatives
from ._arguments import (
    Axis,
    Number,
    check_device,
    check_floating,
    check_parameter,
    check_real,
    checked,
    fraction,
    number,
    values_of,
)
from ._operations import Given, wide
from ._recording import recorded, stand_in
from ._sync import Group, Processes


@documented(array="tensor", like="shape, dtype and memory format")
def batch_norm(
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: Axis = -1,
    eps: Number = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    allow_one_value: bool = False,
    sync: Group | bool | None = None,
) -> tuple[Tensor, Statistics]:
    """... Everything has derivatives of every order, the statistics too.

    Parameters
    ----------
    axis : int or tuple of ints
        The feature axis or axes, which are not reduced: 1 for the layouts of `torch.nn`.
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes whose batches, empty ones too, are normalized as one; True for all. Gradients
        are those of the sum of the processes' losses. All of them must call this, and differentiate
        it, alike: they wait for each other. Where torch.distributed is not initialized, a process
        is alone.

    Raises
    ------
    ValueError
        If an argument is out of range, has the wrong shape or is on another device than x; or if x
        has one element a feature, and no process to share with, unless allow_one_value.
    RuntimeError
        If a process of the group fails to take part, once the group's timeout is over.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_norm
    >>> y, statistics = batch_norm(torch.tensor([[1.0, 20.0], [3.0, 60.0]]))
    >>> print(y.round(decimals=3))
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> print(statistics.mean)
    tensor([ 2., 40.])
    """
    if stand_in(x, scale, bias, eps, mask, residual) is not None:
        settings = {"axis": axis, "eps": eps, "mask": mask, "residual": residual, "sync": sync}
        settings |= {"activation": activation, "allow_one_value": allow_one_value}
        recording: tuple[Tensor, Statistics] = recorded(batch_norm, x, scale, bias, **settings)
        return recording
    call, inputs = checked(x, scale, bias, axis, eps, mask, residual, activation, sync)
    checks.boolean("allow_one_value", allow_one_value)
    values = values_of(call, inputs) if x.numel() else 0
    if not isinstance(call.processes, Processes):
        checks.more_than_one_value(values, x.shape, allow_one_value)
    elif not allow_one_value:
        all_have_one = f"x of shape {tuple(x.shape)} and those of the other processes have one"
        call.processes.need_values(values, partial(checks.refuse_one_value, all_have_one))
    y, statistics = _derivatives.forward(call, inputs)
    return y, _statistics(x, statistics)


@documented(array="tensor", like="shape, dtype and memory format")
def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: Axis = -1,
    eps: Number = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import normalize
    >>> x, mean, var = torch.tensor([[3.0], [5.0]]), torch.tensor([3.0]), torch.tensor([4.0])
    >>> print(normalize(x, mean, var).round(decimals=3))
    tensor([[0.],
            [1.]])
    """
    if stand_in(x, mean, var, scale, bias, eps, residual) is not None:
        settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation}
        recording: Tensor = recorded(normalize, x, mean, var, scale, bias, **settings)
        return recording
    call, inputs = checked(x, scale, bias, axis, eps, None, residual, activation)
    for name, value in (("mean", mean), ("var", var)):
        check_parameter(name, value, x, call.problem.features)
    return _derivatives.normalize(call, inputs, Given(mean, var))


@documented(array="tensor")
def batch_statistics(
    x: Tensor,
    *,
    axis: Axis = -1,
    mask: Tensor | None = None,
    sync: Group | bool | None = None,
) -> Statistics:
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_statistics
    >>> x = torch.arange(20.0).reshape(10, 2)
    >>> print(batch_statistics(x[:4]).merge(batch_statistics(x[4:])).var)
    tensor([33., 33.])
    """
    if stand_in(x, mask) is not None:
        recording: Statistics = recorded(batch_statistics, x, axis=axis, mask=mask, sync=sync)
        return recording
    call, inputs = checked(x, None, None, axis, 1.0, mask, None, None, sync)
    return _statistics(x, _derivatives.batch_statistics(call, inputs))


@documented(array="tensor")
def update_running(
    mean: Tensor, var: Tensor, statistics: Statistics, *, rate: Number, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_statistics, update_running
    >>> statistics = batch_statistics(torch.tensor([[1.0], [3.0]]))
    >>> update_running(torch.zeros(1), torch.ones(1), statistics, rate=0.5, correction=1)
    (tensor([1.]), tensor([1.5000]))
    """
    if stand_in(mean, var, statistics, rate) is not None:
        settings = {"rate": rate, "correction": correction}
        recording: tuple[Tensor, Tensor] = recorded(
            update_running, mean, var, statistics, **settings
        )
        return recording
    check_statistics("statistics", statistics)
    for name, value in (("mean", mean), ("var", var)):
        check_floating(name, value)
    for name, value in statistics._asdict().items():
        check_real(f"statistics.{name}", value)
        check_device(f"statistics.{name}", value, mean, "mean")
    check_device("var", var, mean, "mean")
    rate = number(rate, fraction["rate"])
    return moved(mean, var, statistics, torch.promote_types, rate=rate, correction=correction)


def _statistics(x: Tensor, statistics: Tensor) -> Statistics:
    # A copy, so that what a backward pass keeps is not in the user's hands.
    return Statistics(*statistics.to(wide(x.dtype), copy=True).unbind(0))
