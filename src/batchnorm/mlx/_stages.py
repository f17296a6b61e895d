"""The stages on MLX's operations: in which dtype, by which formulas, and over which devices.

Results are in the dtype of computation.
"""

import mlx.core as mx

from .. import definition
from ..definition import Inputs, Problem
from ..layout import is_empty, per_feature, reduced_axes, values_per_feature
from ..moments import Moments, Statistics, pooled
from ._sync import adding_up

# Up to this size, the number of operations decides how long they take; then, the size does.
SMALL = 2**15


def batch_norm(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> tuple[mx.array, Moments]:
    if group is not None:
        return _over_devices(problem, inputs, group)
    if _is_small(inputs):
        return _plainly(problem, inputs)
    return definition.batch_norm(problem, _cast(_of_this_size(inputs)), mx.stop_gradient)


def training_step(
    problem: Problem,
    inputs: Inputs,
    mean: mx.array,
    var: mx.array,
    *,
    rate: float,
    correction: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """y, and the running mean and variance moved by the statistics of x."""
    y, moments = batch_norm(problem, inputs)
    statistics = moments.statistics()
    if inputs.weights is None:  # a number, and fewer operations
        count = values_per_feature(problem.features, inputs.x.shape)
        statistics = statistics._replace(count=count)
    new = definition.update_running(mean, var, statistics, rate=rate, correction=correction)
    return y, *new


def normalize(problem: Problem, inputs: Inputs, mean: mx.array, var: mx.array) -> mx.array:
    """As in evaluation, where weights say only what takes no part in a gradient."""
    dtype = _dtype(inputs.x)
    given = Moments.given(mean.astype(dtype), var.astype(dtype))
    y: mx.array = definition.normalize(problem, _cast(inputs, dtype), given)
    return y


def statistics(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> Statistics:
    if group is not None:
        return _pooled(problem, _cast(_not_empty(_of_this_size(inputs))), group).statistics()
    return definition.moments(problem, _cast(_of_this_size(inputs)), mx.stop_gradient).statistics()


def _dtype(x: mx.array) -> mx.Dtype:
    """In which to compute."""
    return mx.float64 if x.dtype == mx.float64 else mx.float32


def _of_this_size(inputs: Inputs) -> Inputs:
    """Such that a program for any size (mx.compile, shapeless) refuses another, and is not wrong.

    The count is made of the size in the first call. Of what is traced, a reshape minds another. It
    would be a tenth of the time of `_plainly`, whose programs are wrong for another size.
    """
    x = inputs.x
    return inputs._replace(x=mx.reshape(mx.expand_dims(x, 0), x.shape))


def _cast(inputs: Inputs, dtype: mx.Dtype | None = None) -> Inputs:
    dtype = dtype or _dtype(inputs.x)
    return Inputs(*[None if each is None else each.astype(dtype) for each in inputs])


def _is_small(inputs: Inputs) -> bool:
    """Whether x is small, of the same weight everywhere, and on a device that has float64."""
    x = inputs.x
    small = inputs.weights is None and x.dtype != mx.float64 and 0 < x.size <= SMALL
    return bool(small and mx.default_device().type == mx.cpu)


def _plainly(problem: Problem, inputs: Inputs) -> tuple[mx.array, Moments]:
    """The fewest operations: in float64 the plain formulas neither overflow nor cancel.

    What takes time in a small array is the number of operations, not their width.
    """
    inputs = _cast(inputs, mx.float64)
    x, features = inputs.x, problem.features
    axes, count = reduced_axes(features, x.ndim), values_per_feature(features, x.shape)
    mean = mx.sum(x, axes, keepdims=True) / count  # and not times 1 / count: exact if all are equal
    centered = x - mean
    mean, var = per_feature(features, mean), mx.sum(mx.square(centered), axes) / count
    y = definition.output(problem, inputs, Moments.given(mean, var), centered)
    mean, var = mean.astype(mx.float32), var.astype(mx.float32)
    return y, Moments(mx.full_like(mean, count), mean, None, None, var)


def _over_devices(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group
) -> tuple[mx.array, Moments]:
    shape, inputs = inputs.x.shape, _cast(_not_empty(_of_this_size(inputs)))
    moments = _pooled(problem, inputs, group)
    y = definition.normalize(problem, inputs, moments)
    return y if y.shape == shape else y[tuple(slice(size) for size in shape)], moments


def _pooled(problem: Problem, inputs: Inputs, group: mx.distributed.Group) -> Moments:
    own = definition.moments(problem, inputs, mx.stop_gradient)
    return pooled(own, adding_up(group), mx.stop_gradient)


def _not_empty(inputs: Inputs) -> Inputs:
    """For an empty part of a batch: one element a feature, its weight 0, and no residual.

    The device takes part in every sum over the devices, forward and, x being in it, backward; and
    sums no empty array, in which MLX 0.32 can hang.
    """
    x = inputs.x
    if not is_empty(x):
        return inputs
    one = mx.pad(x, [(0, int(size == 0)) for size in x.shape])
    return inputs._replace(x=one, weights=mx.zeros([1] * x.ndim), residual=None)
