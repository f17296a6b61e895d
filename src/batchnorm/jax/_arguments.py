"""The arguments of the functions: checked, and in the dtypes that the stages take."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import checks
from ..definition import Inputs, Problem
from ..layout import feature_shape, weights_shape
from ..moments import Statistics, check_statistics
from ..ndarrays import converted
from ._stages import wide

Axis = int | Sequence[int]


def problem_and_inputs(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis,
    eps: float | jax.Array = 1.0,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: str | None = None,
) -> tuple[Problem, jax.Array | None, Inputs]:
    """An eps that is an array is none of the problem, where eps then is 0."""
    x = floating("x", x)
    of_problem, of_array = 0.0, None
    if isinstance(eps, jax.Array):
        of_array = _within("eps", eps, checks.SMALLEST_EPS, checks.LARGEST_EPS)
        of_array = of_array.astype(wide(x.dtype))
    else:
        of_problem = checks.positive_eps(eps)
    features = checks.feature_axes(axis, x.shape)
    problem = Problem(features, of_problem, checks.activation(activation))
    return (
        problem,
        of_array,
        Inputs(
            x,
            None if scale is None else parameter("scale", scale, problem, x),
            None if bias is None else parameter("bias", bias, problem, x),
            None if residual is None else _residual(residual, x),
            None if mask is None else _weights(mask, problem, x),
        ),
    )


def array_of(name: str, value: ArrayLike) -> jax.Array:
    """An array of JAX; of another framework's, too, where JAX can make one of it."""
    return value if isinstance(value, jax.Array) else converted(name, value, jnp.asarray)


def floating(name: str, value: ArrayLike) -> jax.Array:
    array = array_of(name, value)
    is_floating = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize > 1
    checks.floating(name, array.dtype, is_floating)
    return array


def real(name: str, value: ArrayLike) -> jax.Array:
    array = array_of(name, value)
    is_real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.bool_, jnp.integer))
    return array if is_real else floating(name, array)


def statistics_of(value: Statistics) -> Statistics:
    check_statistics("statistics", value)
    return Statistics(*(real(f"statistics.{name}", each) for name, each in value._asdict().items()))


def parameter(name: str, value: ArrayLike, problem: Problem, x: jax.Array) -> jax.Array:
    """An array of the feature shape, in the dtype to compute in."""
    array = floating(name, value)
    checks.feature_shape(name, array.shape, feature_shape(problem.features, x.shape), x.shape)
    return array.astype(wide(x.dtype))


def fraction(name: str, value: float | jax.Array) -> float | jax.Array:
    """A momentum or a rate: a number within [0, 1]."""
    if isinstance(value, jax.Array):
        return _within(name, value, 0, 1)
    return checks.fraction(name, value)


def _within(name: str, value: jax.Array, smallest: float, largest: float) -> jax.Array:
    """An array without axes, NaN where it is out of range."""
    checks.scalar(
        name, value.shape, value.dtype, jnp.isdtype(value.dtype, ("real floating", "integral"))
    )
    array = value.astype(wide(value.dtype))
    return nan_where(~((array >= smallest) & (array <= largest)), array)


def nan_where(wrong: jax.Array, values: jax.Array) -> jax.Array:
    """No constant NaN, which jax_debug_nans would take for one that was computed."""
    return values * jnp.sqrt(jnp.where(wrong, -1.0, 1.0))


def _residual(residual: ArrayLike, x: jax.Array) -> jax.Array:
    array = floating("residual", residual)
    checks.broadcasts("residual", array.shape, x.shape)
    # Its gradient is added up in the wider of the two dtypes.
    wider = array.astype(jnp.promote_types(array.dtype, x.dtype))
    return jnp.broadcast_to(wider, x.shape).astype(x.dtype)


def _weights(mask: ArrayLike, problem: Problem, x: jax.Array) -> jax.Array:
    array = real("mask", mask)
    checks.broadcasts("mask", array.shape, x.shape)
    shape = weights_shape(problem.features, array.shape, x.shape)
    return jnp.broadcast_to(array.astype(wide(x.dtype)), shape)
