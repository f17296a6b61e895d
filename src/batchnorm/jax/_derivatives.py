"""How JAX differentiates, transposes and batches the stages.

Derivatives of second and higher order are those of the functions in jnp that define the stages.
None stands for a tangent or a cotangent that is zero.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import definition
from ..definition import Inputs, Problem
from ..layout import Axes, per_feature, reduced_axes, values_per_feature
from ..moments import Moments
from ..sums import total
from . import _compat as compat
from ._stages import (
    Array,
    Stage,
    batch_norm,
    batch_norm_over_devices,
    by_normalize,
    gradient_sums,
    gradients,
    input_gradient,
    normalize,
    normalized,
    output_tangent,
    statistics,
    tangent,
    tangent_sums,
)
from ._sync import ALONE, Devices


def _or_zeros(array: Array | None, like: Array) -> Array:
    if array is not None:
        return array
    return compat.varying_alike([jnp.zeros_like(like), like])[0]


# ---- tangents


def _jvp_of(
    function: Callable[..., list[Array]], primals: Sequence[Array], tangents: Sequence[Any]
) -> tuple[list[Array], list[Any]]:
    """By the operands that move alone: zeros for the others would be worked on as any tangent."""
    moving = [i for i in range(len(primals)) if tangents[i] is not None]

    def of_moving(*values: Array) -> list[Array]:
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return function(*operands)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


def _jvp(
    stage: Stage, primals: Sequence[Array], tangents: Sequence[Any], *, tree: Any, **parameters: Any
) -> tuple[list[Array], list[Any]]:
    """A stage is linear in its last operands; in the others it is as its definition is."""
    bind = functools.partial(stage.bind, tree=tree, **parameters)
    fixed = len(primals) - sum(each is not None for each in tree.unflatten(primals)[2])
    parts = []
    if any(each is not None for each in tangents[fixed:]):
        pairs = zip(tangents[fixed:], primals[fixed:], strict=True)
        parts.append(bind(*primals[:fixed], *(_or_zeros(*pair) for pair in pairs)))
    if any(each is not None for each in tangents[:fixed]):
        by_definition = functools.partial(stage.by_definition, tree=tree, **parameters)
        still = [None] * (len(primals) - fixed)
        parts.append(_jvp_of(by_definition, primals, [*tangents[:fixed], *still])[1])
    dots = [functools.reduce(jnp.add, each) for each in zip(*parts, strict=True)]
    return bind(*primals), dots


def _statistics_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> tuple[list[Array], list[Any]]:
    """Those of what is here, which a stage that went over a mapped axis would not know."""
    (inputs, *_), (dots, *_) = tree.unflatten(primals), tree.unflatten(tangents)
    results = statistics(problem, inputs)
    return results, _moments_tangent(problem, inputs, Moments(*results), dots)


def _batch_norm_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> tuple[list[Array], list[Any]]:
    if devices != ALONE:
        by_stages = functools.partial(
            batch_norm_over_devices, problem=problem, tree=tree, devices=devices
        )
        return _jvp_of(by_stages, primals, tangents)
    (inputs, *_), (dots, *_) = tree.unflatten(primals), tree.unflatten(tangents)
    results = batch_norm(problem, inputs)
    moments = Moments(*results[:-1])
    of_moments = _moments_tangent(problem, inputs, moments, dots)
    return results, [*of_moments, _own_output_tangent(problem, inputs, moments, dots)]


def _moments_tangent(
    problem: Problem, inputs: Inputs, moments: Moments, dots: Inputs
) -> list[Array | None]:
    """That of count, offset and var, in the coordinate of `moments`; pivot and unit have none."""
    of_count = of_offset = of_var = None
    if dots.x is not None:
        # Of variance 1, x̂ is u − offset, and slope 1 / unit.
        plain, alone = Problem(problem.features, eps=0.0), Inputs(inputs.x, weights=inputs.weights)
        standard = moments._replace(var=jnp.ones_like(moments.var))
        _, s0, s1 = tangent_sums(plain, alone, standard, dots.x, None)
        of_offset, of_var = -s0, -2 * s1
    if dots.weights is not None:
        of_count, first, second = definition.weight_tangent(
            problem, inputs._replace(x=inputs.x.astype(moments.var.dtype)), moments, dots.weights
        )
        of_offset = first if of_offset is None else first + of_offset
        of_var = second if of_var is None else second + of_var
    return [of_count, None, None, of_offset, of_var]


def _own_output_tangent(problem: Problem, inputs: Inputs, moments: Moments, dots: Inputs) -> Array:
    """That of y, normalized by its own moments, where no sum over devices is needed.

    The tangent of the weights has no part in it.
    """
    s0, s1 = (_or_zeros(each, moments.var) for each in (dots.bias, dots.scale))
    if dots.x is None and dots.residual is None:
        return output_tangent(problem, inputs, moments, None, s0, s1)[0]
    x_dot = _or_zeros(dots.x, inputs.x)
    return tangent(problem, inputs, moments, s0, s1, x_dot, dots.residual)[0]


def _normalized_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> tuple[list[Array], list[Any]]:
    inputs, moments, (eps,) = tree.unflatten(primals)
    dots, _, (eps_dot,) = tree.unflatten(tangents)
    has_own_eps = eps is not None and devices.axis_name is not None
    if dots.weights is not None or has_own_eps:
        # By way of the moments, whose derivatives know of the weights; and which each device may
        # have another eps for, and with that another root.
        by_moments = functools.partial(by_normalize, problem=problem, tree=tree, devices=devices)
        return _jvp_of(by_moments, primals, tangents)
    moments = moments.with_eps(eps)
    if eps_dot is not None:  # changes x̂ as another scale would
        of_scale = -0.5 * eps_dot / moments.unit / moments.unit / moments.var
        of_scale = of_scale if inputs.scale is None else of_scale * inputs.scale
        dots = dots._replace(scale=of_scale if dots.scale is None else dots.scale + of_scale)
    y = normalize(problem, inputs, moments)
    if devices.axis_name is None or (dots.x is None and dots.residual is None):
        return y, [_own_output_tangent(problem, inputs, moments, dots)]
    x_dot = _or_zeros(dots.x, inputs.x)
    p, *own_sums = tangent_sums(problem, inputs, moments, x_dot, dots.residual, devices=devices)
    sums = devices.sum(*own_sums, like=inputs.x)
    if inputs.scale is not None:
        sums = [inputs.scale * each for each in sums]
    s0, s1 = (
        of_all if dot is None else dot + of_all
        for dot, of_all in zip((dots.bias, dots.scale), sums, strict=True)
    )
    return y, output_tangent(problem, inputs, moments, p, s0, s1)


# ---- transposes


def _transposed(
    stage: Stage,
    transpose: Callable[..., Sequence[Array | None]],
    zeros: str,
    cotangents: Sequence[Array | None],
    *operands: Any,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> list[Array | None]:
    """transpose(problem, inputs, moments, *cotangents) gives those of the linear operands.

    Of which results (see Stage) it takes a cotangent that is zero as zeros, not None, is `zeros`.
    """
    inputs, moments, linear = tree.unflatten(operands)
    like = {"f": moments.var, "x": inputs.x}
    dots = [
        jnp.zeros_like(like[kind]) if cotangent is None and kind in zeros else cotangent
        for kind, cotangent in itertools.zip_longest(stage.results, cotangents)
    ]
    results = transpose(problem, inputs, moments, *dots)
    used = [result for operand, result in zip(linear, results, strict=False) if operand is not None]
    return [None] * (len(operands) - len(used)) + used


def _output_tangent_transpose(
    problem: Problem, inputs: Inputs, moments: Moments, dy: Array
) -> Sequence[Array]:
    return [dy, *gradient_sums(problem, inputs, moments, dy)]


def _gradient_sums_transpose(
    problem: Problem, inputs: Inputs, moments: Moments, s0: Array, s1: Array
) -> Sequence[Array]:
    return output_tangent(problem, inputs, moments, None, s0, s1)


# ---- batches


def _batched(
    stage: Stage,
    axis: Any,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> tuple[list[Array], list[int | None]]:
    """Of a mapped axis, where it lies, a reduced one: no parameter is repeated, no array copied.

    Where its elements have parameters or sums of their own, one more feature axis, the first.
    """
    bind = functools.partial(stage.bind, tree=tree, devices=devices.without(axis.name))
    kinds = _kinds(stage, tree)
    mapped = {kind for kind, dim in zip(kinds, dims, strict=True) if dim is not None}
    if not mapped:
        results = bind(*operands, problem=problem)
        return results, [None] * len(results)
    is_reduced = mapped == {"x"} and (stage in _WITHOUT_SUMS or axis.name in devices.mapped)
    place = next(dim for dim in dims if dim is not None) if is_reduced else problem.features[0]
    features = _moved(problem.features, place)

    def folded(operand: Array, dim: int | None, kind: str) -> Array:
        if is_reduced and kind == "f":
            return operand
        if dim is None:
            operand, dim = jnp.broadcast_to(operand, (axis.size, *operand.shape)), 0
        return jnp.moveaxis(operand, dim, place if kind == "x" else 0)

    results = bind(
        *map(folded, operands, dims, kinds),
        problem=problem._replace(features=features if is_reduced else (place, *features)),
    )
    places = {"f": None if is_reduced else 0}
    return results, [places.get(kind, place) for kind in stage.results[: len(results)]]


def _moved(features: Axes, place: int) -> Axes:
    """Feature axes where one more axis is put in at `place`."""
    return tuple([each + (each >= place) for each in features])


_WITHOUT_SUMS = {normalize, output_tangent, input_gradient}


def _kinds(stage: Stage, tree: Any) -> list[str]:
    """Of each operand: "f", of the feature shape, or "x", of that of x or broadcast to it."""
    inputs, moments, linear = tree.unflatten(range(tree.num_leaves))
    pairs = [*zip(inputs, "xffxx", strict=True), *zip(moments or (), "fffff", strict=False)]
    pairs += zip(linear, stage.linear.replace("r", "x"), strict=False)
    return [kind for operand, kind in pairs if operand is not None]


def _statistics_batched(
    axis: Any, operands: Sequence[Array], dims: Sequence[int | None], **parameters: Any
) -> tuple[list[Array], list[int | None]]:
    """Where the mapped axis shares statistics, each of its elements has all of them; but a count of
    its own, since counts are added up.
    """
    results, dims_of_results = _batched(statistics, axis, operands, dims, **parameters)
    if dims_of_results[0] is not None or all(dim is None for dim in dims):
        return results, dims_of_results
    features, shape = parameters["problem"].features, results[0].shape
    if len(operands) == 1:
        one = [size for dim, size in enumerate(operands[0].shape) if dim != dims[0]]
        values = values_per_feature(features, one)
        return [jnp.full(shape, values, results[0].dtype), *results[1:]], dims_of_results

    def count(weights: Array) -> Array:
        summed = total(weights, reduced_axes(features, weights.ndim))
        return jnp.broadcast_to(per_feature(features, summed), shape)

    weights, dim = operands[1], dims[1]
    if dim is None:
        return [count(weights), *results[1:]], dims_of_results
    return [jax.vmap(count, dim)(weights), *results[1:]], [0, *dims_of_results[1:]]


def _tangent_sums_batched(
    axis: Any, operands: Sequence[Array], dims: Sequence[int | None], **parameters: Any
) -> tuple[list[Array], list[int | None]]:
    """Where the mapped axis shares its sums, each of its elements has as large a part of them."""
    (p, *sums), dims_of_results = _batched(tangent_sums, axis, operands, dims, **parameters)
    if dims_of_results[-1] is None and any(dim is not None for dim in dims):
        sums = [each / axis.size for each in sums]
    return [p, *sums], dims_of_results


def _normalized_batched(
    axis: Any,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    tree: Any,
    devices: Devices,
    **parameters: Any,
) -> tuple[list[Array], list[int | None]]:
    """Without the devices of a mapped axis, the derivative knows them by the moments alone."""
    parameters |= {"tree": tree, "devices": devices}
    kinds = zip(dims, _kinds(normalized, tree), strict=True)
    mapped = {kind for dim, kind in kinds if dim is not None}
    if mapped == {"x"} or axis.name not in devices.mapped:
        return _batched(normalized, axis, operands, dims, **parameters)
    by_moments = functools.partial(by_normalize, **parameters)
    if not mapped:
        return by_moments(*operands), [None]
    return jax.vmap(by_moments, dims)(*operands), [0]


def _batch_norm_batched(
    axis: Any,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    problem: Problem,
    tree: Any,
    devices: Devices,
) -> tuple[list[Array], list[int | None]]:
    """Moments are not batched where x is not, nor where the mapped axis shares them."""
    kinds = zip(dims, _kinds(batch_norm, tree), strict=True)
    mapped = {kind for dim, kind in kinds if dim is not None}
    is_shared = axis.name in devices.mapped
    if dims[0] is not None and (mapped == {"x"} or not is_shared):
        parameters = {"problem": problem, "tree": tree, "devices": devices}
        return _batched(batch_norm, axis, operands, dims, **parameters)
    whole = problem
    if dims[0] is not None:
        whole = problem._replace(features=_moved(problem.features, dims[0]))
    inputs, *_ = tree.unflatten(operands)
    others = devices.without(axis.name)
    moments = others.pooled(Moments(*statistics(whole, Inputs(inputs.x), devices=others)))
    if dims[0] is None and is_shared:  # the same x, so many times
        moments = moments._replace(count=moments.count * axis.size)
    flat, tree = jax.tree.flatten((inputs, moments, (None,)))
    dims = [*dims, *[None] * len(moments)]
    y, dim_of_y = _normalized_batched(axis, flat, dims, problem=problem, tree=tree, devices=devices)
    return [*moments, *y], [*[None] * len(moments), *dim_of_y]


# ---- the rules of each stage


def _rules(
    stage: Stage,
    transpose: Callable[..., Sequence[Array | None]] | None = None,
    *,
    zeros: str = "xf",
    jvp: Callable[..., Any] | None = None,
    batched: Callable[..., Any] | None = None,
) -> None:
    compat.set_jvp(stage.primitive, jvp or functools.partial(_jvp, stage))
    compat.set_batcher(stage.primitive, batched or functools.partial(_batched, stage))
    compat.set_jet(stage.primitive, stage.by_definition)
    compat.set_checks(stage.primitive)
    if transpose is not None:
        rule = functools.partial(_transposed, stage, transpose, zeros)
        compat.set_transpose(stage.primitive, rule)


_rules(statistics, jvp=_statistics_jvp, batched=_statistics_batched)
_rules(normalize)
_rules(normalized, jvp=_normalized_jvp, batched=_normalized_batched)
_rules(batch_norm, jvp=_batch_norm_jvp, batched=_batch_norm_batched)
_rules(
    tangent_sums, input_gradient, zeros="f", batched=_tangent_sums_batched
)  # which without dy reads x alone
_rules(input_gradient, tangent_sums)
_rules(output_tangent, _output_tangent_transpose)
_rules(gradient_sums, _gradient_sums_transpose)
_rules(tangent, gradients)
_rules(gradients, tangent)
