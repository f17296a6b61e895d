"""The functions of every door, for MLX arrays."""

import mlx.core as mx

from .. import checks
from ..documentation import documented
from ..layout import values_per_feature
from ..moments import Statistics, check_statistics
from ..running import moved
from . import _stages
from ._arguments import (
    Axis,
    Number,
    check_floating,
    check_parameters,
    check_real,
    checked,
    fraction,
    group_of_several,
)


@documented()
def batch_norm(
    x: mx.array,
    scale: mx.array | None = None,
    bias: mx.array | None = None,
    *,
    axis: Axis = -1,
    eps: Number = 1e-5,
    mask: mx.array | None = None,
    residual: mx.array | None = None,
    activation: str | None = None,
    allow_one_value: bool = False,
    group: mx.distributed.Group | None = None,
) -> tuple[mx.array, Statistics]:
    """...

    Parameters
    ----------
    group : mx.distributed.Group, optional
        Whose devices each hold a part of the batch, an empty one or not, of which the statistics
        are those of the whole. Gradients are those of the sum of the devices' losses. Every device
        must make the call, and in the same order: MLX pairs the sums of lazy devices by when they
        are computed, so where one's part is empty or masked and another's is not, evaluate calls
        that do not depend on each other one by one.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from batchnorm.mlx import batch_norm
    >>> y, statistics = batch_norm(mx.array([[1.0, 20.0], [3.0, 60.0]]))
    >>> print(y.round(3))
    array([[-1, -1],
           [1, 1]], dtype=float32)
    >>> print(statistics.mean)
    array([2, 40], dtype=float32)
    """
    group = group_of_several(group)
    problem, inputs = checked(x, scale, bias, axis, eps, mask, residual, activation)
    values = None if group else values_per_feature(problem.features, x.shape)
    checks.more_than_one_value(values, x.shape, allow_one_value)
    y, statistics = _stages.batch_norm(problem, inputs, group)
    return y.astype(x.dtype), statistics


@documented()
def normalize(
    x: mx.array,
    mean: mx.array,
    var: mx.array,
    scale: mx.array | None = None,
    bias: mx.array | None = None,
    *,
    axis: Axis = -1,
    eps: Number = 1e-5,
    residual: mx.array | None = None,
    activation: str | None = None,
) -> mx.array:
    """...

    Examples
    --------
    >>> import mlx.core as mx
    >>> from batchnorm.mlx import normalize
    >>> print(normalize(mx.array([[3.0], [5.0]]), mx.array([3.0]), mx.array([4.0])).round(3))
    array([[0],
           [1]], dtype=float32)
    """
    problem, inputs = checked(x, scale, bias, axis, eps, None, residual, activation)
    check_floating("mean", mean)
    check_floating("var", var)
    check_parameters(x, problem.features, mean=mean, var=var)
    return _stages.normalize(problem, inputs, mean, var).astype(x.dtype)


@documented()
def batch_statistics(
    x: mx.array,
    *,
    axis: Axis = -1,
    mask: mx.array | None = None,
    group: mx.distributed.Group | None = None,
) -> Statistics:
    """...

    Examples
    --------
    >>> import mlx.core as mx
    >>> from batchnorm.mlx import batch_statistics
    >>> x = mx.arange(20.0).reshape(10, 2)
    >>> print(batch_statistics(x[:4]).merge(batch_statistics(x[4:])).var)
    array([33, 33], dtype=float32)
    """
    problem, inputs = checked(x, None, None, axis, 1.0, mask, None, None)
    return _stages.statistics(problem, inputs, group_of_several(group))


@documented()
def update_running(
    mean: mx.array, var: mx.array, statistics: Statistics, *, rate: Number, correction: int = 0
) -> tuple[mx.array, mx.array]:
    """...

    Examples
    --------
    >>> import mlx.core as mx
    >>> from batchnorm.mlx import batch_statistics, update_running
    >>> statistics = batch_statistics(mx.array([[1.0], [3.0]]))
    >>> update_running(mx.zeros(1), mx.ones(1), statistics, rate=0.5, correction=1)
    (array([1], dtype=float32), array([1.5], dtype=float32))
    """
    check_floating("mean", mean)
    check_floating("var", var)
    check_statistics("statistics", statistics)
    for name, value in statistics._asdict().items():
        check_real(f"statistics.{name}", value)
    rate = fraction("rate", rate)
    return moved(mean, var, statistics, mx.result_type, rate=rate, correction=correction)
