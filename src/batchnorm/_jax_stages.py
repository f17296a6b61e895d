"""The stages of batch normalization as JAX primitives, native on the CPU.

Three of them go forward and six are linear, in three pairs of transposes:

    statistics      x             ->  count, mean, var
    normalize       x             ->  y = act(z),  z = x̂·scale + bias + residual
    batch_norm      x             ->  count, mean, var,  y:  both, where there are no weights
    tangent_sums    ẋ, ṙ          ->  p = act′·(slope·ẋ + ṙ),  −slope/m·Σ w·ẋ,  −slope/m·Σ w·ẋ·x̂
    output_tangent  p, s₀, s₁     ->  ẏ = p + act′·(s₀ + s₁·x̂)
    gradient_sums   dy            ->  Σ g,  Σ g·x̂,  g = act′·dy
    input_gradient  dy, s₀, s₁    ->  dx = slope·(g − w/m·(s₀ + s₁·x̂)),  dr = g
    tangent         ẋ, ṙ, s₀, s₁  ->  ẏ:  tangent_sums and output_tangent, s₀ and s₁ added between
    gradients       dy            ->  Σ g,  Σ g·x̂,  dx,  dr:  gradient_sums and input_gradient

where slope = scale/√(var + eps) and r is the residual. The derivative of a batch norm is
tangent_sums, a sum over the devices, and output_tangent; bias and scale have a part in s₀ and s₁.
Transposed, in reverse order, these are gradient_sums, a sum over the devices, and input_gradient:
the two passes over memory that reverse mode needs, with the sum put between them by JAX itself.
What p carries from the one to the other is in reverse mode dy, which costs nothing. On one device
nothing comes between two stages, and batch_norm and the last pair do both at once.

On the CPU the forward ones and those of reverse mode are native; _jax_primitives.py says how.
Derivatives of second and higher order are those of the functions in jnp that define the stages.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from . import definition
from ._jax_primitives import Array, Inputs, Problem, Stage, wide
from .definition import Moments

# ---- the definitions


class _Standard(NamedTuple):
    """x̂, and what goes along with it; x̂ is 0 where an element takes no part."""

    x_hat: Array
    z: Array
    slope: Array  # scale / √(var + eps), of the rank of x
    share: Array  # w / m, the same
    valid: Array | None


def _standard(problem: Problem, inputs: Inputs) -> _Standard:
    x, moments = inputs.x.astype(wide(inputs.x.dtype)), inputs.moments
    count, pivot, unit, offset, var = (_along(problem, each, x) for each in moments)
    share = 1 / jnp.where(count == 0, 1, count)
    valid = None
    if inputs.weights is not None:
        share = jnp.where(inputs.weights > 0, inputs.weights, 0) * share
        valid = (inputs.weights > 0) | jnp.isfinite(x)
        x = jnp.where(valid, x, pivot)
    rstd = 1 / jnp.sqrt(var + (math.sqrt(problem.eps) / unit) ** 2)  # eps/unit² may underflow
    x_hat = ((x - pivot) * (1 / unit) - offset) * rstd
    z, slope = x_hat, rstd / unit
    if inputs.scale is not None:
        z = z * _along(problem, inputs.scale, x)
        slope = slope * _along(problem, inputs.scale, x)
    if inputs.bias is not None:
        z = z + _along(problem, inputs.bias, x)
    if inputs.residual is not None:
        z = z + inputs.residual.astype(z.dtype)
    if valid is not None:
        x_hat = jnp.where(valid, x_hat, 0)
    return _Standard(x_hat, z, slope, share, valid)


def _through_activation(problem: Problem, standard: _Standard, dy: Array) -> Array:
    """act′·dy, 0 where an element takes no part."""
    z, valid = standard.z, standard.valid
    g = definition._through_activation(dy.astype(z.dtype), z, problem.activation)
    return g if valid is None else jnp.where(valid, g, 0)


def _along(problem: Problem, parameter: Array, x: Array) -> Array:
    return definition._along(problem.features, parameter, x)


def _sums(problem: Problem, *arrays: Array) -> tuple[Array, ...]:
    axes = definition._reduced(problem.features, arrays[0])
    return tuple(jnp.squeeze(definition.total(each, axes), axes) for each in arrays)


def _statistics(problem: Problem, inputs: Inputs) -> Sequence[Array]:
    return definition.moments(
        inputs.x.astype(wide(inputs.x.dtype)),
        features=problem.features,
        weights=inputs.weights,
        constant=jax.lax.stop_gradient,
    )


def _normalize(problem: Problem, inputs: Inputs) -> Sequence[Array]:
    standard = _standard(problem, inputs)
    y = definition._activate(standard.z, problem.activation)
    return [y if standard.valid is None else jnp.where(standard.valid, y, math.nan)]


def _batch_norm(problem: Problem, inputs: Inputs) -> Sequence[Array]:
    assert inputs.weights is None, "its derivative does not know of them"
    moments = Moments(*_statistics(problem, inputs))
    return [*moments, *_normalize(problem, inputs._replace(moments=moments))]


def _tangent_sums(
    problem: Problem, inputs: Inputs, x_dot: Array, residual_dot: Array | None
) -> Sequence[Array]:
    standard = _standard(problem, inputs)
    x_dot = x_dot.astype(standard.z.dtype)
    partial = standard.slope * x_dot
    weighed = -(standard.share * partial)
    if residual_dot is not None:
        partial = partial + residual_dot.astype(partial.dtype)
    partial = _through_activation(problem, standard, partial)
    return [partial, *_sums(problem, weighed, weighed * standard.x_hat)]


def _output_tangent(
    problem: Problem, inputs: Inputs, partial: Array | None, shift: Array, slope: Array
) -> Sequence[Array]:
    standard = _standard(problem, inputs)
    z_dot = _along(problem, shift, inputs.x) + _along(problem, slope, inputs.x) * standard.x_hat
    y_dot = _through_activation(problem, standard, z_dot)
    return [y_dot if partial is None else y_dot + partial.astype(y_dot.dtype)]


def _gradient_sums(problem: Problem, inputs: Inputs, dy: Array) -> Sequence[Array]:
    standard = _standard(problem, inputs)
    g = _through_activation(problem, standard, dy)
    return _sums(problem, g, g * standard.x_hat)


def _input_gradient(
    problem: Problem, inputs: Inputs, dy: Array | None, sum_g: Array, sum_g_x_hat: Array
) -> Sequence[Array]:
    standard = _standard(problem, inputs)
    g = jnp.zeros_like(standard.z)
    if dy is not None:
        g = _through_activation(problem, standard, dy)
    sums = _along(problem, sum_g, g) + _along(problem, sum_g_x_hat, g) * standard.x_hat
    dx = standard.slope * (g - standard.share * sums)
    return [dx] if inputs.residual is None else [dx, g]


def _tangent(
    problem: Problem,
    inputs: Inputs,
    x_dot: Array,
    residual_dot: Array | None,
    shift: Array,
    slope: Array,
) -> Sequence[Array]:
    partial, *sums = _tangent_sums(problem, inputs, x_dot, residual_dot)
    return _output_tangent(problem, inputs, partial, shift + sums[0], slope + sums[1])


def _gradients(problem: Problem, inputs: Inputs, dy: Array) -> Sequence[Array]:
    sums = _gradient_sums(problem, inputs, dy)
    return [*sums, *_input_gradient(problem, inputs, dy, *sums)]


# ---- the stages

statistics = Stage("statistics", _statistics, "fffff", native=True)
normalize = Stage("normalize", _normalize, "x", native=True)
batch_norm = Stage("batch_norm", _batch_norm, "fffffx", native=True)
tangent_sums = Stage("tangent_sums", _tangent_sums, "xff")
output_tangent = Stage("output_tangent", _output_tangent, "x")
gradient_sums = Stage("gradient_sums", _gradient_sums, "ff", native=True)
input_gradient = Stage("input_gradient", _input_gradient, "xr", native=True)
tangent = Stage("tangent", _tangent, "x")
gradients = Stage("gradients", _gradients, "ffxr", native=True)


# ---- the rules of what has statistics as results


def _tangents_of_moments(problem: Problem, inputs: Inputs, dots: Inputs) -> list[Any]:
    """Those of count, offset and var, in the coordinate of the inputs' moments."""
    moments = inputs.moments
    tangents: list[Any] = [ad.Zero(jax.typeof(each).to_tangent_aval()) for each in moments]
    if type(dots.x) is not ad.Zero:
        of_x = Inputs(inputs.x, inputs.weights, moments=moments)
        plain = problem._replace(activation=None)
        _, mean_sum, x_hat_sum = tangent_sums(plain, of_x, dots.x, None)
        spread = moments.var + (math.sqrt(problem.eps) / moments.unit) ** 2
        tangents[3:] = [-jnp.sqrt(spread) * mean_sum, -2 * spread * x_hat_sum]
    if inputs.weights is not None and type(dots.weights) is not ad.Zero:
        of_weights = _statistics_by_weights(problem, inputs, inputs.weights, dots.weights)
        for index, tangent in zip((0, 3, 4), of_weights, strict=True):
            tangents[index] = ad.add_tangents(tangents[index], tangent)
    return tangents


def _statistics_by_weights(
    problem: Problem, inputs: Inputs, weights: Array, dot: Array
) -> Sequence[Array]:
    """Σ ẇ,  Σ ẇ·(u − offset) / m,  Σ ẇ·((u − offset)² − var) / m,  with u = (x − pivot) / unit."""
    x = inputs.x.astype(wide(inputs.x.dtype))
    count, pivot, unit, offset, var = (_along(problem, each, x) for each in inputs.moments)
    inside = weights > 0
    centered = (jnp.where(inside, x, pivot) - pivot) / unit - offset
    dot = jnp.broadcast_to(jnp.where(inside, dot, 0), x.shape)
    share = dot / jnp.where(count == 0, 1, count)
    return _sums(problem, dot, share * centered, share * (centered * centered - var))


def tangent_of_output(problem: Problem, inputs: Inputs, dots: Inputs) -> Array:
    """That of y, normalized by the batch's own moments, where no sum over devices is needed.

    None stands for zeros; the tangent of the weights has no part in it.
    """
    shift, slope = (_or_zeros(each, inputs.moments.var) for each in (dots.bias, dots.scale))
    if dots.x is None and dots.residual is None:
        return output_tangent(problem, inputs, None, shift, slope)[0]
    x_dot = _or_zeros(dots.x, inputs.x)
    return tangent(problem, inputs, x_dot, dots.residual, shift, slope)[0]


def _statistics_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, problem: Problem, tree: Any
) -> tuple[list[Array], list[Any]]:
    (inputs, _), (dots, _) = tree.unflatten(primals), tree.unflatten(tangents)
    results = statistics(problem, inputs)
    inputs = inputs._replace(moments=Moments(*results))
    return results, _tangents_of_moments(problem, inputs, dots)


def _batch_norm_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, problem: Problem, tree: Any
) -> tuple[list[Array], list[Any]]:
    (inputs, _), (dots, _) = tree.unflatten(primals), tree.unflatten(tangents)
    results = batch_norm(problem, inputs)
    inputs = inputs._replace(moments=Moments(*results[:5]))
    of_moments = _tangents_of_moments(problem, inputs, dots)
    given = Inputs(*(None if type(each) is ad.Zero else each for each in dots))
    return results, [*of_moments, tangent_of_output(problem, inputs, given)]


def _batch_norm_batched(
    operands: Sequence[Array], dims: Sequence[int | None], *, problem: Problem, tree: Any
) -> tuple[list[Array], Sequence[int | None]]:
    """Statistics are not batched where x is not."""
    if dims[0] is not None:
        return batch_norm.batched(operands, dims, problem=problem, tree=tree)
    inputs, _ = tree.unflatten(operands)
    moments = statistics(problem, Inputs(inputs.x))
    flat, tree = jax.tree.flatten((inputs._replace(moments=Moments(*moments)), ()))
    dims = [*dims, *[None] * len(moments)]
    y, dim_of_y = normalize.batched(flat, dims, problem=problem, tree=tree)
    return [*moments, *y], [*[None] * len(moments), *dim_of_y]


ad.primitive_jvps[statistics.primitive] = _statistics_jvp
ad.primitive_jvps[batch_norm.primitive] = _batch_norm_jvp
batching.primitive_batchers[batch_norm.primitive] = _batch_norm_batched


# ---- the transposes


def _linear_in(stage: Stage, transpose: Callable[..., Sequence[Array]]) -> None:
    """Let `transpose(problem, inputs, *cotangents)` give the cotangents of the linear operands."""

    def rule(
        cotangents: Sequence[Any], *operands: Any, problem: Problem, tree: Any
    ) -> list[Array | None]:
        inputs, linear = tree.unflatten(operands)
        given = [None if type(each) is ad.Zero else each for each in cotangents]
        results = transpose(problem, inputs, *given)
        used = [
            result if ad.is_undefined_primal(operand) else None
            for operand, result in zip(linear, results, strict=False)
            if operand is not None
        ]
        return [None] * (len(operands) - len(used)) + used

    ad.primitive_transposes[stage.primitive] = rule


def _or_zeros(array: Array | None, like: Array) -> Array:
    return jnp.zeros_like(like) if array is None else array


def _tangent_sums_transpose(
    problem: Problem, inputs: Inputs, dy: Array | None, *sums: Array | None
) -> Sequence[Array]:
    sums = tuple(_or_zeros(each, inputs.moments.var) for each in sums)
    return input_gradient(problem, inputs, dy, *sums)


def _output_tangent_transpose(problem: Problem, inputs: Inputs, dy: Array) -> Sequence[Array]:
    return [dy, *gradient_sums(problem, inputs, dy)]


def _gradient_sums_transpose(
    problem: Problem, inputs: Inputs, *cotangents: Array | None
) -> Sequence[Array]:
    cotangents = tuple(_or_zeros(each, inputs.moments.var) for each in cotangents)
    return output_tangent(problem, inputs, None, *cotangents)


def _input_gradient_transpose(
    problem: Problem, inputs: Inputs, x_dot: Array | None, residual_dot: Array | None = None
) -> Sequence[Array]:
    return tangent_sums(problem, inputs, _or_zeros(x_dot, inputs.x), residual_dot)


_linear_in(tangent_sums, _tangent_sums_transpose)
_linear_in(output_tangent, _output_tangent_transpose)
_linear_in(gradient_sums, _gradient_sums_transpose)
_linear_in(input_gradient, _input_gradient_transpose)


def _tangent_transpose(problem: Problem, inputs: Inputs, dy: Array) -> Sequence[Array | None]:
    sum_g, sum_g_x_hat, dx, *dresidual = gradients(problem, inputs, dy)
    return [dx, dresidual[0] if dresidual else None, sum_g, sum_g_x_hat]


def _gradients_transpose(
    problem: Problem,
    inputs: Inputs,
    shift: Array | None,
    slope: Array | None,
    x_dot: Array | None,
    residual_dot: Array | None = None,
) -> Sequence[Array]:
    shift, slope = (_or_zeros(each, inputs.moments.var) for each in (shift, slope))
    return tangent(problem, inputs, _or_zeros(x_dot, inputs.x), residual_dot, shift, slope)


_linear_in(tangent, _tangent_transpose)
_linear_in(gradients, _gradients_transpose)
