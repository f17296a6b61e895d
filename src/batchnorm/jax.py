"""Batch normalization of JAX arrays: pure functions, for every transformation of JAX.

On the CPU, float32, float64, float16 and bfloat16 arrays whose feature axes lie side by side are
normalized, and their gradients computed, by the native kernels; anything else by the same formulas
in `jax.numpy`. Which of the two is chosen when a computation is lowered for its platform. Programs
that are exported with `jax.export`, and those that XLA splits over devices by itself, are jnp.

With `axis_name`, the statistics are those of the batch over all devices along a mapped axis of
`jax.pmap`, `jax.shard_map` or `jax.vmap`, exactly, however many elements each of them has. A step
of training then has three collectives: two forward, of 3 floats of each feature, and one backward,
of 2; a forward derivative has one of 2 as well. They are sums, as large for any number of devices.
(Groups under `check_vma` are gathered instead: as many floats from each device of the group.)
Under `jax.jit`, the batch is the whole array, however it is sharded.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    from jax.custom_derivatives import SymbolicZero
    from jax.typing import ArrayLike
except ModuleNotFoundError as error:
    raise ImportError("batchnorm.jax needs JAX: pip install batchnorm[jax]") from error

from . import _jax_stages as stages
from . import checks, definition
from ._jax_primitives import Inputs, Problem, varies_as_x, varying_alike, wide
from .definition import Moments, Statistics

__all__ = ["Statistics", "batch_norm", "batch_statistics", "normalize", "update_running"]

Axis = int | Sequence[int]
AxisName = Any  # a hashable, or a tuple of them
Groups = Sequence[Sequence[int]]


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> tuple[jax.Array, Statistics]:
    """Normalize x by its own statistics, as in training.

    ``y = activation((x - mean) / sqrt(var + eps) * scale + bias + residual)``, with the mean and
    the population variance of each feature [1]_. Everything has derivatives of every order, in
    forward and in reverse mode, the statistics too.

    Parameters
    ----------
    x : array of real floating-point numbers
    scale, bias : array of the feature shape, optional
        1 and 0 where there is none.
    axis : int or tuple of ints
        The feature axis or axes, which are not reduced.
    eps : float
        Added to the variance, inside the root.
    mask : array that broadcasts to x, optional
        Which elements count in the statistics: bools, or weights >= 0. All elements are normalized.
        A negative weight or a NaN makes its feature NaN.
    residual : array that broadcasts to x, optional
    activation : None, "relu" or "silu"
    axis_name : hashable or tuple of hashables, optional
        The mapped axis, or axes, over whose devices the statistics are taken.
    axis_index_groups : sequence of sequences of ints, optional
        Groups of indices along axis_name, each of which has statistics of its own.

    Returns
    -------
    y : array, of the shape and dtype of x
    statistics : Statistics
        In float32, for float64 in float64, of the feature shape. Of an empty x: zeros.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, or x not of a real floating-point dtype.
    ValueError
        If an argument is out of range, has the wrong shape, or if x has one element a feature; if
        axis_name is unknown, or axis_index_groups do not divide the axis into groups.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import batch_norm
    >>> x = jnp.array([[1.0, 20.0], [3.0, 60.0]])
    >>> y, statistics = batch_norm(x)
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(statistics.mean)
    [ 2. 40.]
    """
    problem, inputs = _checked(x, scale, bias, axis, eps, mask, residual, activation)
    devices = _devices(axis_name, axis_index_groups)
    checks.more_than_one_value(_values(problem, inputs) * devices.number(), inputs.x.shape)
    return _batch_norm(problem, devices, inputs)


def _batch_norm_of_any_count(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    axis: Axis,
    eps: float,
    axis_name: AxisName | None,
    axis_index_groups: Groups | None,
) -> tuple[jax.Array, Statistics]:
    """`batch_norm` for modules, which may be initialized with one element a feature."""
    problem, inputs = _checked(x, scale, bias, axis, eps, None, None, None)
    return _batch_norm(problem, _devices(axis_name, axis_index_groups), inputs)


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: str | None = None,
) -> jax.Array:
    """Normalize x by a given mean and variance, as in evaluation.

    Parameters
    ----------
    x : array of real floating-point numbers
    mean, var : array of the feature shape
        Running statistics, or those of `batch_statistics`.
    scale, bias, axis, eps, residual, activation
        As in `batch_norm`.

    Returns
    -------
    y : array, of the shape and dtype of x

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import normalize
    >>> print(normalize(jnp.array([[3.0], [5.0]]), jnp.array([3.0]), jnp.array([4.0])).round(3))
    [[0.]
     [1.]]
    """
    problem, inputs = _checked(x, scale, bias, axis, eps, None, residual, activation)
    mean = _parameter("mean", mean, problem, inputs.x)
    var = _parameter("var", var, problem, inputs.x)
    return _normalize(problem, inputs, mean, var)


def batch_statistics(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> Statistics:
    """Count, mean and population variance of each feature.

    Parameters
    ----------
    x, axis, mask, axis_name, axis_index_groups
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
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import batch_statistics
    >>> x = jnp.arange(20.0).reshape(10, 2)
    >>> print(batch_statistics(x[:4]).merge(batch_statistics(x[4:])).var)
    [33. 33.]
    """
    problem, inputs = _checked(x, None, None, axis, 1.0, mask, None, None)
    return _batch_statistics(problem, _devices(axis_name, axis_index_groups), inputs)


def update_running(
    mean: ArrayLike,
    var: ArrayLike,
    statistics: Statistics,
    *,
    rate: float,
    correction: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Move running statistics towards those of a batch.

    ``new = (1 - rate) * old + rate * batch``; the variance of the batch is first multiplied by
    ``count / (count - correction)``. A feature of which the batch has no more than `correction`
    elements stays as it was.

    Parameters
    ----------
    mean, var : array of the feature shape
    statistics : Statistics
    rate : float within [0, 1]
        The weight of the new value. Flax calls ``1 - rate`` momentum.
    correction : 0 or 1
        0 for the population variance, as Flax keeps it; 1 for the unbiased variance.

    Returns
    -------
    mean, var : array, of the dtypes that came

    Raises
    ------
    TypeError, ValueError
        If rate or correction is out of range, or a shape differs from the statistics'.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import batch_statistics, update_running
    >>> statistics = batch_statistics(jnp.array([[1.0], [3.0]]))
    >>> mean, var = update_running(jnp.zeros(1), jnp.ones(1), statistics, rate=0.5, correction=1)
    >>> print(mean, var)
    [1.] [1.5]
    """
    rate = checks.fraction("rate", rate)
    correction = checks.correction(correction)
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    checks.statistics_shape("mean", mean.shape, statistics.mean.shape)
    checks.statistics_shape("var", var.shape, statistics.mean.shape)
    dtype = wide(statistics.mean.dtype)
    new_mean, new_var = definition.update_running(
        mean.astype(dtype), var.astype(dtype), statistics, rate=rate, correction=correction
    )
    return new_mean.astype(mean.dtype), new_var.astype(var.dtype)


# ---- the computations, each one dispatch where it is not jitted already


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _batch_norm(
    problem: Problem, devices: "_Devices", inputs: Inputs
) -> tuple[jax.Array, Statistics]:
    if devices.axis_name is None and inputs.weights is None and varies_as_x(inputs):
        *found, y = stages.batch_norm(problem, inputs)
        return y, _statistics(Moments(*found))
    moments = _moments(problem, devices, inputs)
    return _normalized(problem, devices, inputs, moments), _statistics(moments)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _normalize(problem: Problem, inputs: Inputs, mean: jax.Array, var: jax.Array) -> jax.Array:
    one, zero = jnp.ones_like(mean), jnp.zeros_like(mean)
    moments = Moments(count=one, pivot=mean, unit=one, offset=zero, var=var)
    return stages.normalize(problem, inputs._replace(moments=moments))[0]


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _batch_statistics(problem: Problem, devices: "_Devices", inputs: Inputs) -> Statistics:
    return _statistics(_moments(problem, devices, inputs))


def _moments(problem: Problem, devices: "_Devices", inputs: Inputs) -> Moments:
    x, weights = inputs.x, inputs.weights
    moments = Moments(*stages.statistics(problem, Inputs(x, weights)))
    if weights is not None:
        reduced = tuple(axis for axis in range(x.ndim) if axis not in problem.features)
        wrong = jnp.any(~(weights >= 0), axis=reduced)
        count, var = (jnp.where(wrong, math.nan, each) for each in (moments.count, moments.var))
        moments = moments._replace(count=count, var=var)
    return devices.pooled(moments, elements=_values(problem, inputs))


def _statistics(moments: Moments) -> Statistics:
    count, pivot, unit, offset, var = moments
    return Statistics(count, pivot + unit * offset, unit * unit * var)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalized(
    problem: Problem, devices: "_Devices", inputs: Inputs, moments: Moments
) -> jax.Array:
    """x normalized by `moments`, which are its own; the derivative is that of both together."""
    return stages.normalize(problem, inputs._replace(moments=moments))[0]


def _normalized_jvp(
    problem: Problem,
    devices: "_Devices",
    primals: tuple[Inputs, Moments],
    tangents: tuple[Inputs, Moments],
) -> tuple[jax.Array, jax.Array]:
    if not _is_zero(tangents[0].weights):
        # By way of the moments, whose derivatives know of the weights.
        def normalized(inputs: Inputs, moments: Moments) -> jax.Array:
            return stages.normalize(problem, inputs._replace(moments=moments))[0]

        def instantiated(primal: jax.Array, tangent: Any) -> jax.Array:
            return jnp.zeros_like(primal) if _is_zero(tangent) else tangent

        return jax.jvp(normalized, primals, jax.tree.map(instantiated, primals, tangents))

    moments = primals[1]
    inputs = primals[0]._replace(moments=moments)
    dots = Inputs(*(None if _is_zero(each) else each for each in tangents[0]))
    if devices.axis_name is None or (dots.x is None and dots.residual is None):
        y_dot = stages.tangent_of_output(problem, inputs, dots)
    else:
        x_dot = jnp.zeros_like(inputs.x) if dots.x is None else dots.x
        partial, *own_sums = stages.tangent_sums(problem, inputs, x_dot, dots.residual)
        sums = devices.sum(*own_sums, like=inputs.x)
        shift, slope = (
            total if dot is None else dot + total
            for dot, total in zip((dots.bias, dots.scale), sums, strict=True)
        )
        (y_dot,) = stages.output_tangent(problem, inputs, partial, shift, slope)
    return stages.normalize(problem, inputs)[0], y_dot


_normalized.defjvp(_normalized_jvp, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, SymbolicZero)


class _Devices(NamedTuple):
    """The devices that share statistics; with axis_name None, each has its own."""

    axis_name: AxisName | None
    groups: tuple[tuple[int, ...], ...] | None

    def number(self) -> int:
        if self.axis_name is None:
            return 1
        size: int = jax.lax.psum(1, self.axis_name) if self.groups is None else len(self.groups[0])
        return size

    def sum(self, *arrays: jax.Array, like: jax.Array | None = None) -> Sequence[jax.Array]:
        """The sum of each array over the devices, by one collective.

        It is as varying as `like`, so that its transpose, too, is one collective.
        """
        if self.axis_name is None:
            return arrays
        stacked = jnp.stack(arrays)
        if self.groups is None:
            total = jax.lax.psum(stacked, self.axis_name)
        else:
            groups = [list(group) for group in self.groups]
            try:
                total = jax.lax.psum(stacked, self.axis_name, axis_index_groups=groups)
            except NotImplementedError:  # in shard_map with check_vma
                gathered = jax.lax.all_gather(stacked, self.axis_name, axis_index_groups=groups)
                total = gathered.sum(0)
        if like is not None:
            total, _ = varying_alike([total, like])
        return list(total)

    def pooled(self, moments: Moments, elements: int) -> Moments:
        """The moments of all devices' elements, of which there are up to `elements` on each.

        First they agree on a pivot, the mean to within rounding, and on a unit, and then add up
        moments around it, which loses nothing: the formula of Chan, Golub & LeVeque (1979), for
        many sets at once.
        """
        if self.axis_name is None:
            return moments
        count, own_pivot, own_unit, offset, var = moments
        share = count / max(elements, 1)
        reach = jnp.where(count == 0, 0, own_unit + jnp.abs(own_pivot))
        share, mean, reach = self.sum(*jax.lax.stop_gradient([share, share * own_pivot, reach]))
        pivot, unit = mean / _or_one(share), jnp.maximum(reach, 1)
        offset = ((own_pivot - pivot) + own_unit * offset) / unit
        squares = var * (own_unit / unit) ** 2 + offset * offset
        count, first, second = self.sum(count, count * offset, count * squares)
        offset = first / _or_one(count)
        var = second / _or_one(count) - offset * offset
        return Moments(count, pivot, unit, offset, jnp.where(var < 0, 0, var))


def _or_one(count: jax.Array) -> jax.Array:
    return jnp.where(count == 0, 1, count)


# ---- the arguments


def _devices(axis_name: AxisName | None, groups: Groups | None) -> _Devices:
    size = 1
    if axis_name is not None:
        try:
            size = jax.lax.psum(1, axis_name)
        except NameError:
            size = 0
        checks.bound_axis_name(axis_name, size > 0)
    return _Devices(axis_name, checks.axis_index_groups(groups, axis_name, size))


def _checked(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    axis: Axis,
    eps: float,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    activation: str | None,
) -> tuple[Problem, Inputs]:
    x = _floating("x", x)
    problem = Problem(
        checks.feature_axes(axis, x.shape), checks.positive_eps(eps), checks.activation(activation)
    )
    return problem, Inputs(
        x,
        None if mask is None else _weights(mask, problem, x),
        None if residual is None else _residual(residual, x),
        None if scale is None else _parameter("scale", scale, problem, x),
        None if bias is None else _parameter("bias", bias, problem, x),
    )


def _values(problem: Problem, inputs: Inputs) -> int:
    """How many elements of each feature."""
    return math.prod(
        size for axis, size in enumerate(inputs.x.shape) if axis not in problem.features
    )


def _floating(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    checks.floating(name, array.dtype, jnp.issubdtype(array.dtype, jnp.floating))
    return array


def _real(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    checks.floating(name, array.dtype, not jnp.issubdtype(array.dtype, jnp.complexfloating))
    return array


def _parameter(name: str, value: ArrayLike, problem: Problem, x: jax.Array) -> jax.Array:
    array = _real(name, value)
    checks.feature_shape(name, array.shape, [x.shape[each] for each in problem.features], x.shape)
    return array.astype(wide(x.dtype))


def _weights(mask: ArrayLike, problem: Problem, x: jax.Array) -> jax.Array:
    """The mask as weights, of a feature axis of length 1 or of the shape of x."""
    array = _real("mask", mask)
    checks.broadcasts("mask", array.shape, x.shape)
    array = array.reshape((1,) * (x.ndim - array.ndim) + array.shape)
    of_each_feature = any(array.shape[each] != 1 for each in problem.features)
    shape = [
        1 if axis in problem.features and not of_each_feature else size
        for axis, size in enumerate(x.shape)
    ]
    return jnp.broadcast_to(array.astype(wide(x.dtype)), shape)


def _residual(residual: ArrayLike, x: jax.Array) -> jax.Array:
    array = _floating("residual", residual)
    checks.broadcasts("residual", array.shape, x.shape)
    return jnp.broadcast_to(array.astype(x.dtype), x.shape)
