"""The stages on MLX's own operations: in which dtype, by which formulas, and over which devices.

Results are in the dtype of computation.
"""

import mlx.core as mx

from .. import definition
from ..definition import Inputs, Problem
from ..layout import along, is_empty, reduced_axes, values_per_feature
from ..moments import Moments, Statistics, pooled
from ._compat import is_traced_for_any_size
from ._sync import adding_up

# Up to this size, the number of operations decides how long they take; then, the size does.
SMALL = 2**15


def batch_norm(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> tuple[mx.array, Statistics]:
    y, moments = _batch_norm(_as_traced(problem, inputs), inputs, group)
    if isinstance(moments.count, int):
        moments = moments._replace(count=mx.full_like(moments.pivot, moments.count))
    return y, moments.statistics()


def training_step(
    problem: Problem,
    inputs: Inputs,
    mean: mx.array,
    var: mx.array,
    *,
    rate: float | mx.array,
    correction: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """y, and the running mean and variance moved by the statistics of x."""
    problem = _as_traced(problem, inputs)
    y, moments = _batch_norm(problem, inputs, None)
    statistics = moments.statistics()
    if isinstance(statistics.count, mx.array) and inputs.weights is None and not problem.any_size:
        count = values_per_feature(problem.features, inputs.x.shape)
        statistics = statistics._replace(count=count)  # a number takes fewer operations
    new = definition.update_running(mean, var, statistics, rate=rate, correction=correction)
    return y, *new


def normalize(problem: Problem, inputs: Inputs, mean: mx.array, var: mx.array) -> mx.array:
    """As in evaluation, where weights say only what takes no part in a gradient."""
    dtype = _dtype(inputs.x)
    given = Moments.given(mean.astype(dtype), var.astype(dtype))
    inputs, order = _cast(inputs, dtype), None
    if not _has_features_last(problem, inputs):
        problem, inputs, order = _features_last(_as_traced(problem, inputs), inputs)
    return _in_order(definition.normalize(problem, inputs, given), order)


def statistics(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> Statistics:
    problem = _as_traced(problem, inputs)
    if problem.any_size:
        return _of_any_size(problem, inputs, group)[1].statistics()
    if group is not None:
        return _pooled(problem, _cast(_not_empty(inputs)), group).statistics()
    return definition.moments(problem, _cast(inputs), mx.stop_gradient).statistics()


def _as_traced(problem: Problem, inputs: Inputs) -> Problem:
    reduced = len(problem.features) < inputs.x.ndim
    return problem._replace(any_size=True) if reduced and is_traced_for_any_size() else problem


def _batch_norm(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None
) -> tuple[mx.array, Moments]:
    if problem.any_size:
        return _of_any_size(problem, inputs, group)
    if group is not None:
        return _over_devices(problem, inputs, group)
    if _is_small(inputs):
        return _plainly(problem, inputs)
    return definition.batch_norm(problem, _cast(inputs), mx.stop_gradient)


def _dtype(x: mx.array) -> mx.Dtype:
    """In which to compute."""
    return mx.float64 if x.dtype == mx.float64 else mx.float32


def _cast(inputs: Inputs, dtype: mx.Dtype | None = None) -> Inputs:
    dtype = dtype or _dtype(inputs.x)
    return Inputs(*[None if each is None else each.astype(dtype) for each in inputs])


def _is_small(inputs: Inputs) -> bool:
    return 0 < inputs.x.size <= SMALL and _suits_plain_formulas(inputs)


def _suits_plain_formulas(inputs: Inputs) -> bool:
    """Whether x is of the same weight everywhere, and narrower than what the device has."""
    return inputs.weights is None and inputs.x.dtype != mx.float64 and _has_float64()


def _has_float64() -> bool:
    return bool(mx.default_device().type == mx.cpu)


def _plainly(problem: Problem, inputs: Inputs) -> tuple[mx.array, Moments]:
    """The fewest operations: in float64 the plain formulas neither overflow nor cancel.

    What takes time in a small array is the number of operations, not their width. The count is a
    number where the sizes are known.
    """
    x, features = inputs.x.astype(mx.float64), problem.features
    axes, count = reduced_axes(features, x.ndim), values_per_feature(features, x.shape)
    if problem.any_size:
        count = mx.sum(mx.broadcast_arrays(mx.array(1, mx.int64), x)[0], axes)
    mean = mx.sum(x, axes) / count  # and not times 1 / count: exact if all are equal
    centered = x - along(features, mean, x)
    var = mx.sum(mx.square(centered), axes) / count
    y = definition.output(problem, inputs, Moments.given(mean, var), centered)  # wide as centered
    mean, var = mean.astype(mx.float32), var.astype(mx.float32)
    return y, Moments(count, mean, None, None, var)


def _of_any_size(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None
) -> tuple[mx.array, Moments]:
    """By operations that use no size of a reduced axis: how many elements there are is a sum.

    It and others may be running sums of any length, and so are in float64 where the device has it.
    """
    x = inputs.x
    if group is not None:
        raise ValueError(
            "group must be None in a program for any size (shapeless=True), where MLX knows no "
            "functions with derivatives of their own. Compile for each size."
        )
    if values_per_feature(problem.features, x.shape) < 2:
        raise ValueError(
            "x must have more than one value of each feature where a program for any size "
            f"(shapeless=True) is traced, since MLX leaves out a sum of one, but x is of shape "
            f"{tuple(x.shape)}. Trace with a larger x."
        )
    problem, inputs, order = _features_last(problem, inputs)
    if _suits_plain_formulas(inputs):
        y, moments = _plainly(problem, inputs)
    else:
        inputs = _cast(inputs, mx.float64 if _has_float64() else _dtype(x))
        weights = mx.array(1, inputs.x.dtype) if inputs.weights is None else inputs.weights
        inputs = inputs._replace(weights=mx.broadcast_arrays(weights, inputs.x)[0])
        y, moments = definition.batch_norm(problem, inputs, mx.stop_gradient)
    count, mean, var = [each.astype(_dtype(x)) for each in moments.statistics()]
    return _in_order(y, order), Moments(count, mean, None, None, var)


def _has_features_last(problem: Problem, inputs: Inputs) -> bool:
    return bool(problem.features[0] == inputs.x.ndim - len(problem.features))


def _features_last(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs, list[int] | None]:
    """The same with the features' axes at the end, if sizes may change; and the order it came from.

    There MLX's derivatives are right if a reduced axis has length 1 in the trace; see `along`.
    """
    if not problem.any_size or _has_features_last(problem, inputs):
        return problem, inputs, None
    ndim, features = inputs.x.ndim, problem.features
    last = tuple(range(ndim - len(features), ndim))
    order = [*reduced_axes(features, ndim), *features]
    x, scale, bias, *along_x = inputs
    along_x = [None if each is None else mx.broadcast_arrays(each, x)[0] for each in along_x]
    x, *along_x = [None if each is None else mx.transpose(each, order) for each in (x, *along_x)]
    return problem._replace(features=last), Inputs(x, scale, bias, *along_x), order


def _in_order(y: mx.array, order: list[int] | None) -> mx.array:
    """y with its axes where they were."""
    if order is None:
        return y
    return mx.transpose(y, [order.index(axis) for axis in range(len(order))])


def _over_devices(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group
) -> tuple[mx.array, Moments]:
    shape, inputs = inputs.x.shape, _cast(_not_empty(inputs))
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
