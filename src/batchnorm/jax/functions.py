"""The functions of `batchnorm.jax`; each is one dispatch where it is not jitted already."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import checks
from ..definition import Inputs, Problem
from ..documentation import documented
from ..layout import reduced_axes, values_per_feature
from ..moments import Moments, Statistics
from ..running import moved
from . import _compat as compat
from . import _derivatives  # noqa: F401  (gives the stages their rules)
from . import _stages as stages
from ._arguments import (
    Axis,
    floating,
    fraction,
    nan_where,
    parameter,
    problem_and_inputs,
    statistics_of,
)
from ._sync import ALONE, AxisName, Devices, Groups, devices


@documented()
def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float | jax.Array = 1e-5,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    allow_one_value: bool = False,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> tuple[jax.Array, Statistics]:
    """... Everything has derivatives of every order, in forward and in reverse mode; so have the
    statistics.

    Parameters
    ----------
    eps : float or array without axes
        ... A number is a constant of the compiled function; an array, traced or not, one of its
        operands, which makes NaN where it is out of range.
    axis_name : hashable or tuple of hashables, optional
        The mapped axis, or axes, over whose devices the statistics are taken.
    axis_index_groups : sequence of sequences of ints, optional
        Groups of indices along axis_name, each of which has statistics of its own.

    Raises
    ------
    ValueError
        If an argument is out of range, has the wrong shape, or if x has one element a feature,
        unless allow_one_value; if axis_name is unknown, or axis_index_groups do not divide the axis
        into groups.

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
    problem, of_array, inputs = problem_and_inputs(
        x, scale, bias, axis=axis, eps=eps, mask=mask, residual=residual, activation=activation
    )
    shared = devices(axis_name, axis_index_groups)
    values = values_per_feature(problem.features, inputs.x.shape)
    checks.more_than_one_value(values * shared.number, inputs.x.shape, allow_one_value)
    return _batch_norm(problem, shared, inputs, of_array)


@documented()
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float | jax.Array = 1e-5,
    residual: ArrayLike | None = None,
    activation: str | None = None,
) -> jax.Array:
    """...

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import normalize
    >>> print(normalize(jnp.array([[3.0], [5.0]]), jnp.array([3.0]), jnp.array([4.0])).round(3))
    [[0.]
     [1.]]
    """
    problem, of_array, inputs = problem_and_inputs(
        x, scale, bias, axis=axis, eps=eps, residual=residual, activation=activation
    )
    mean = parameter("mean", mean, problem, inputs.x)
    var = parameter("var", var, problem, inputs.x)
    return _normalize(problem, inputs, Moments.given(mean, var), of_array)


@documented()
def batch_statistics(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> Statistics:
    """...

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import batch_statistics
    >>> x = jnp.arange(20.0).reshape(10, 2)
    >>> print(batch_statistics(x[:4]).merge(batch_statistics(x[4:])).var)
    [33. 33.]
    """
    problem, _, inputs = problem_and_inputs(x, axis=axis, mask=mask)
    return _batch_statistics(problem, devices(axis_name, axis_index_groups), inputs)


@documented()
def update_running(
    mean: ArrayLike,
    var: ArrayLike,
    statistics: Statistics,
    *,
    rate: float | jax.Array,
    correction: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """...

    Parameters
    ----------
    rate : float or array without axes
        ... An array, traced or not, makes NaN where it is out of range.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from batchnorm.jax import batch_statistics, update_running
    >>> statistics = batch_statistics(jnp.array([[1.0], [3.0]]))
    >>> mean, var = update_running(jnp.zeros(1), jnp.ones(1), statistics, rate=0.5, correction=1)
    >>> print(mean, var)
    [1.] [1.5]
    """
    mean, var = floating("mean", mean), floating("var", var)
    batch, rate = statistics_of(statistics), fraction("rate", rate)
    return moved(mean, var, batch, jnp.promote_types, rate=rate, correction=correction)


# ---- the computations


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _batch_norm(
    problem: Problem, devices: Devices, inputs: Inputs, eps: jax.Array | None
) -> tuple[jax.Array, Statistics]:
    is_plain = inputs.weights is None and eps is None and compat.varies_as(inputs.x, inputs)
    if is_plain and (devices == ALONE or compat.are_of_vmap(devices.mapped)):
        *found, y = stages.batch_norm(problem, inputs, devices=devices)
        return y, Moments(*found).statistics()
    moments = _moments(problem, devices, inputs)
    if eps is not None:
        eps = jnp.broadcast_to(eps, moments.var.shape)
    (y,) = stages.normalized(problem, inputs, moments, eps, devices=devices)
    return y, moments.statistics()


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _normalize(
    problem: Problem, inputs: Inputs, moments: Moments, eps: jax.Array | None
) -> jax.Array:
    return stages.normalize(problem, inputs, moments.with_eps(eps))[0]


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _batch_statistics(problem: Problem, devices: Devices, inputs: Inputs) -> Statistics:
    return _moments(problem, devices, inputs).statistics()


def _moments(problem: Problem, devices: Devices, inputs: Inputs) -> Moments:
    x, weights = inputs.x, inputs.weights
    inputs = Inputs(x, weights=weights)
    moments = Moments(*stages.statistics(problem, inputs, devices=devices))
    if weights is not None:
        wrong = jnp.any(~(weights >= 0), axis=reduced_axes(problem.features, x.ndim))
        moments = moments._replace(
            count=nan_where(wrong, moments.count), var=nan_where(wrong, moments.var)
        )
    return devices.pooled(moments)
