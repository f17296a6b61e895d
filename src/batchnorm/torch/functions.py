"""The functions that every door has, on tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, definition
from ..definition import Statistics
from ._autograd import batch_norm as _batch_norm
from ._autograd import batch_statistics as _batch_statistics
from ._stages import Inputs, Problem, is_watched, wide
from ._sync import Group, Sync, group_of

Axis = int | Sequence[int]


def batch_norm(
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    sync: Group | bool | None = None,
) -> tuple[Tensor, Statistics]:
    """Normalize x by its own statistics, as in training.

    ``y = activation((x - mean) / sqrt(var + eps) * scale + bias + residual)``, with the mean and
    the population variance of each feature [1]_. Everything has derivatives of every order, the
    statistics too.

    Parameters
    ----------
    x : tensor of real floating-point numbers
    scale, bias : tensor of the feature shape, optional
        1 and 0 where there is none.
    axis : int or tuple of ints
        The feature axis or axes, which are not reduced: 1 for the layouts of `torch.nn`.
    eps : float
        Added to the variance, inside the root.
    mask : tensor that broadcasts to x, optional
        Which elements count in the statistics: bools, or weights >= 0. All elements are normalized.
        A negative weight or a NaN makes its feature NaN.
    residual : tensor that broadcasts to x, optional
    activation : None, "relu" or "silu"
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes whose batches, empty ones too, are normalized as one; True for all. Gradients
        are those of the sum of the processes' losses. All of them must call this, and differentiate
        it, alike: they wait for each other. Where torch.distributed is not initialized, a process
        is alone.

    Returns
    -------
    y : tensor, of the shape, dtype and memory format of x
    statistics : Statistics
        In float32, for float64 in float64, of the feature shape. Of an empty x: zeros.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, or x not of a real floating-point dtype.
    ValueError
        If an argument is out of range, has the wrong shape or is on another device than x; or if x
        has one element a feature, and no process to share with.
    RuntimeError
        If a process of the group fails to take part, once the group's timeout is over.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

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
    problem, inputs = checked(x, scale, bias, axis, eps, mask, residual, activation, sync)
    if problem.sync is None:
        checks.more_than_one_value(values_of(problem, inputs), x.shape)
    y, statistics = _batch_norm(problem, inputs)
    return y, _statistics(x, statistics)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalize x by a given mean and variance, as in evaluation.

    Parameters
    ----------
    x : tensor of real floating-point numbers
    mean, var : tensor of the feature shape
        Running statistics, or those of `batch_statistics`.
    scale, bias, axis, eps, residual, activation
        As in `batch_norm`.

    Returns
    -------
    y : tensor, of the shape, dtype and memory format of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import normalize
    >>> x, mean, var = torch.tensor([[3.0], [5.0]]), torch.tensor([3.0]), torch.tensor([4.0])
    >>> print(normalize(x, mean, var).round(decimals=3))
    tensor([[0.],
            [1.]])
    """
    problem, inputs = checked(x, scale, bias, axis, eps, None, residual, activation)
    for name, value in (("mean", mean), ("var", var)):
        check_parameter(name, value, x, problem.features)
    return _batch_norm(problem, inputs, (mean, var))[0]


def batch_statistics(
    x: Tensor,
    *,
    axis: Axis = -1,
    mask: Tensor | None = None,
    sync: Group | bool | None = None,
) -> Statistics:
    """Count, mean and population variance of each feature.

    Parameters
    ----------
    x, axis, mask, sync
        As in `batch_norm`.

    Returns
    -------
    Statistics
        In float32, for float64 in float64, of the feature shape. Of an empty x: zeros.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; but one element a feature will do.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_statistics
    >>> x = torch.arange(20.0).reshape(10, 2)
    >>> print(batch_statistics(x[:4]).merge(batch_statistics(x[4:])).var)
    tensor([33., 33.])
    """
    problem, inputs = checked(x, None, None, axis, 1.0, mask, None, None, sync)
    return _statistics(x, _batch_statistics(problem, inputs))


def update_running(
    mean: Tensor, var: Tensor, statistics: Statistics, *, rate: float, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """Move running statistics towards those of a batch.

    ``new = (1 - rate) * old + rate * batch``; the variance of the batch is first multiplied by
    ``count / (count - correction)``. A feature of which the batch has no more than `correction`
    elements stays as it was.

    Parameters
    ----------
    mean, var : tensor of the feature shape
    statistics : Statistics
    rate : float within [0, 1]
        The weight of the new value, which PyTorch calls momentum.
    correction : 0 or 1
        1 for the unbiased variance, as PyTorch keeps it; 0 for the population variance.

    Returns
    -------
    mean, var : tensor, of the dtypes that came

    Raises
    ------
    TypeError, ValueError
        If rate or correction is out of range, or an argument is no tensor of the right shape.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import batch_statistics, update_running
    >>> statistics = batch_statistics(torch.tensor([[1.0], [3.0]]))
    >>> update_running(torch.zeros(1), torch.ones(1), statistics, rate=0.5, correction=1)
    (tensor([1.]), tensor([1.5000]))
    """
    rate = checks.fraction("rate", rate)
    correction = checks.correction(correction)
    for name, value in (("mean", mean), ("var", var)):
        _check_floating(name, value)
        checks.statistics_shape(name, value.shape, statistics.mean.shape)
    dtype = statistics.mean.dtype
    new_mean, new_var = definition.update_running(
        mean.to(dtype), var.to(dtype), statistics, rate=rate, correction=correction
    )
    return new_mean.to(mean.dtype), new_var.to(var.dtype)


def checked(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    axis: Axis,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    sync: Group | bool | None = None,
) -> tuple[Problem, Inputs]:
    """The arguments as the stages want them, or an error that says what is wrong with one."""
    _check_floating("x", x)
    features = checks.feature_axes(axis, x.shape)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            check_parameter(name, value, x, features)
    group = group_of(sync)
    problem = Problem(
        features,
        checks.positive_eps(eps),
        is_watched(x),
        checks.activation(activation),
        None if group is None else Sync(group, lambda: "batch_norm"),
    )
    return problem, Inputs(x, scale, bias, residual_like(x, residual), weights_of(x, mask))


def residual_like(x: Tensor, residual: Tensor | None) -> Tensor | None:
    if residual is None:
        return None
    _check_floating("residual", residual)
    _check_device("residual", residual, x)
    checks.broadcasts("residual", residual.shape, x.shape)
    return residual.to(x.dtype).expand(x.shape)


def weights_of(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as weights, of the rank of x, NaN where they are negative."""
    if mask is None:
        return None
    checks.instance("mask", mask, Tensor)
    checks.floating("mask", mask.dtype, not mask.dtype.is_complex)
    _check_device("mask", mask, x)
    checks.broadcasts("mask", mask.shape, x.shape)
    weights = mask.to(wide(x.dtype))
    if mask.dtype != torch.bool:
        weights = torch.where(weights < 0, math.nan, weights)
    return weights.reshape((1,) * (x.ndim - mask.ndim) + tuple(mask.shape))


def values_of(problem: Problem, inputs: Inputs) -> int:
    """How many elements each feature has."""
    sizes = inputs.x.shape
    return math.prod([sizes[axis] for axis in range(len(sizes)) if axis not in problem.features])


def _statistics(x: Tensor, statistics: Tensor) -> Statistics:
    mean, var, count = statistics.to(wide(x.dtype)).unbind(0)
    return Statistics(count, mean, var)


def _check_floating(name: str, value: object) -> None:
    checks.instance(name, value, Tensor)
    assert isinstance(value, Tensor)
    checks.floating(name, value.dtype, value.dtype.is_floating_point)


def check_parameter(name: str, value: Tensor, x: Tensor, features: tuple[int, ...]) -> None:
    _check_floating(name, value)
    _check_device(name, value, x)
    checks.feature_shape(name, value.shape, [x.shape[each] for each in features], x.shape)


def _check_device(name: str, value: Tensor, x: Tensor) -> None:
    checks.same_device(name, value.device, x.device)
