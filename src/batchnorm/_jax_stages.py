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

A primitive is defined by a function in jnp: that is what runs on other platforms, and what JAX
differentiates for the derivatives of second and higher order. On the CPU the forward ones and
those of reverse mode are lowered to the handlers in csrc/xla.cc.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from . import definition
from .definition import Axes, Moments
from .native import _cpu

Array = Any


class Problem(NamedTuple):
    """What a call does, apart from its arrays."""

    features: Axes
    eps: float = 1.0
    activation: str | None = None


class Inputs(NamedTuple):
    """The arrays that all stages have in common.

    residual has the shape of x, weights that shape or one with feature axes of length 1; the others
    have the feature shape and the wide dtype: float64 if x is, else float32.
    """

    x: Array
    weights: Array | None = None
    residual: Array | None = None
    scale: Array | None = None
    bias: Array | None = None
    moments: Any = None  # Moments, but for `statistics` and `batch_norm`


def wide(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are computed."""
    return jnp.promote_types(dtype, jnp.float32)


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


# ---- the primitives


class _Stage:
    """A stage as a primitive; call it with a problem, the inputs and the linear operands.

    `results` has a letter for each result: x, r: of the shape of x, r only if there is a residual;
    f: of the feature shape. With `native`, the kernel of the same name serves on the CPU.
    """

    def __init__(
        self,
        name: str,
        definition: Callable[..., Sequence[Array]],
        results: str,
        *,
        native: bool = False,
    ) -> None:
        self.name, self.definition, self.results = name, definition, results
        self.primitive = Primitive(f"batch_norm_{name}")
        self.primitive.multiple_results = True
        self.primitive.def_impl(functools.partial(_evaluate, self.primitive))
        self.primitive.def_abstract_eval(self.types)
        ad.primitive_jvps[self.primitive] = self.jvp
        batching.primitive_batchers[self.primitive] = self.batched
        in_jnp = mlir.lower_fun(self.in_jnp, multiple_results=True)
        mlir.register_lowering(self.primitive, in_jnp)
        if native:
            mlir.register_lowering(self.primitive, self.lower_on_cpu, platform="cpu")

    def __call__(self, problem: Problem, inputs: Inputs, *linear: Array | None) -> list[Array]:
        operands, tree = jax.tree.flatten((inputs, linear))
        return self.primitive.bind(*varying_alike(operands), problem=problem, tree=tree)

    def types(self, *operands: Any, problem: Problem, tree: Any) -> list[Any]:
        x, residual = operands[0], tree.unflatten(operands)[0].residual
        shape = [x.shape[axis] for axis in problem.features]
        feature = {
            "shape": tuple(shape),
            "dtype": wide(x.dtype),
            "sharding": NamedSharding(x.sharding.mesh, PartitionSpec(*[None] * len(shape))),
        }
        return [
            x.update(weak_type=False, **(feature if each == "f" else {}))
            for each in self.results
            if each != "r" or residual is not None
        ]

    def in_jnp(self, *operands: Array, problem: Problem, tree: Any) -> list[Array]:
        inputs, linear = tree.unflatten(operands)
        results = self.definition(problem, inputs, *linear)
        return [
            result.astype(wide(inputs.x.dtype) if each == "f" else inputs.x.dtype)
            for each, result in zip(self.results, results, strict=False)
        ]

    def jvp(
        self, primals: Sequence[Array], tangents: Sequence[Any], *, problem: Problem, tree: Any
    ) -> tuple[list[Array], list[Any]]:
        bind = functools.partial(self.primitive.bind, problem=problem, tree=tree)
        fixed = len(primals) - sum(each is not None for each in tree.unflatten(primals)[1])
        parts = []
        if any(type(each) is not ad.Zero for each in tangents[fixed:]):
            linear = [ad.instantiate_zeros(each) for each in tangents[fixed:]]
            parts.append(bind(*primals[:fixed], *linear))
        moving = [i for i in range(fixed) if type(tangents[i]) is not ad.Zero]
        if moving:

            def of_moving(*values: Array) -> list[Array]:
                operands = list(primals)
                for i, value in zip(moving, values, strict=True):
                    operands[i] = value
                return self.in_jnp(*operands, problem=problem, tree=tree)

            at = [primals[i] for i in moving]
            parts.append(jax.jvp(of_moving, at, [tangents[i] for i in moving])[1])
        dots = [functools.reduce(jnp.add, each) for each in zip(*parts, strict=True)]
        return bind(*primals), dots

    def batched(
        self, operands: Sequence[Array], dims: Sequence[int | None], *, problem: Problem, tree: Any
    ) -> tuple[list[Array], list[int]]:
        """The batch becomes one more feature axis, before the others."""
        first, rank = problem.features[0], len(problem.features)
        size = next(
            array.shape[dim] for array, dim in zip(operands, dims, strict=True) if dim is not None
        )

        def folded(array: Array, dim: int | None) -> Array:
            if dim is None:
                array, dim = jnp.broadcast_to(array, (size, *array.shape)), 0
            return jnp.moveaxis(array, dim, 0 if array.ndim == 1 + rank else first)

        operands = [folded(*each) for each in zip(operands, dims, strict=True)]
        features = (first, *(axis + 1 for axis in problem.features))
        inputs, linear = tree.unflatten(operands)
        results = self(problem._replace(features=features), inputs, *linear)
        return results, [first if each.ndim == inputs.x.ndim else 0 for each in results]

    def lower_on_cpu(self, ctx: Any, *operands: Any, problem: Problem, tree: Any) -> Sequence[Any]:
        inputs, linear = tree.unflatten(ctx.avals_in)
        servable = (
            self.name in _targets()
            and inputs.x.size > 0
            and inputs.x.dtype.name in _cpu.DTYPES
            and problem.features[-1] - problem.features[0] == len(problem.features) - 1
            and all(each is not None for each in linear)
            and _is_local(ctx.module_context)
        )
        lower = mlir.lower_fun(self.in_native if servable else self.in_jnp, multiple_results=True)
        return lower(ctx, *operands, problem=problem, tree=tree)

    def in_native(self, *operands: Array, problem: Problem, tree: Any) -> list[Array]:
        inputs, linear = tree.unflatten(operands)
        x, weights = inputs.x, inputs.weights
        first, last = problem.features[0], problem.features[-1]
        if weights is not None and any(weights.shape[axis] != 1 for axis in problem.features):
            weights = jnp.broadcast_to(weights, x.shape)
        moments = [None] * 5 if inputs.moments is None else inputs.moments
        common = (x, weights, inputs.residual, inputs.scale, inputs.bias, *moments)
        # What is absent has no elements.
        absent = jnp.zeros(0, jnp.float32)
        types = self.types(*map(jax.typeof, operands), problem=problem, tree=tree)
        results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in types]
        results += [jax.ShapeDtypeStruct((0,), x.dtype)] * (len(self.results) - len(types))
        call = jax.ffi.ffi_call(_targets()[self.name], results)
        values = call(
            *(absent if each is None else each for each in (*common, *linear)),
            outer=np.int64(math.prod(x.shape[:first])),
            channels=np.int64(math.prod(x.shape[first : last + 1])),
            inner=np.int64(math.prod(x.shape[last + 1 :])),
            activation=np.int64(_cpu.ACTIVATIONS[problem.activation]),
            eps=np.float64(problem.eps),
        )
        return list(values[: len(types)])


@functools.partial(jax.jit, static_argnums=0, static_argnames=("problem", "tree"))
def _jitted(primitive: Primitive, *operands: Array, problem: Problem, tree: Any) -> list[Array]:
    return primitive.bind(*operands, problem=problem, tree=tree)


def _evaluate(primitive: Primitive, *operands: Array, **parameters: Any) -> list[Array]:
    with jax.disable_jit(False):
        return _jitted(primitive, *operands, **parameters)


def varying_alike(arrays: Sequence[Array]) -> Sequence[Array]:
    """In shard_map with check_vma: as varying over all the axes over which any of them varies."""
    axes = [_varying_axes(array) for array in arrays]
    union = frozenset().union(*axes)

    def varying(array: Array, own: frozenset[Any]) -> Array:
        if own == union:
            return array
        missing = tuple(union - own)
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(array, missing, to="varying")
        return jax.lax.pvary(array, missing)  # type: ignore[attr-defined]  # before JAX 0.8

    return [varying(*each) for each in zip(arrays, axes, strict=True)]


def varies_as_x(inputs: Inputs) -> bool:
    """Whether no array varies over an axis of shard_map over which x, and its moments, do not."""
    own = _varying_axes(inputs.x)
    return all(_varying_axes(each) <= own for each in jax.tree.leaves(inputs))


def _varying_axes(array: Array) -> frozenset[Any]:
    aval = jax.typeof(array)
    # JAX 0.10 has gathered what it knows of manual axes in one attribute.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def _is_local(module: mlir.ModuleContext) -> bool:
    """Whether the lowered code runs on whole arrays on one device, here and now.

    XLA's partitioner would gather the operands of a custom call; it knows how to split jnp. An
    exported program must not depend on this package.
    """
    if module.lowering_parameters.for_export:
        return False
    context = module.axis_context
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    if isinstance(context, mlir.SPMDAxisContext):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return True


@functools.cache
def _targets() -> dict[str, str]:
    """The names under which XLA knows the handlers; none if they cannot serve."""
    handlers = {} if _cpu is None else _cpu.xla_handlers()
    targets = {name: f"batchnorm_{name}_{version('batchnorm')}" for name in handlers}
    try:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(targets[name], handler, platform="cpu")
    except Exception as error:
        warnings.warn(
            f"This jaxlib does not take batchnorm's native kernels, so jnp serves instead: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    return targets


statistics = _Stage("statistics", _statistics, "fffff", native=True)
normalize = _Stage("normalize", _normalize, "x", native=True)
batch_norm = _Stage("batch_norm", _batch_norm, "fffffx", native=True)
tangent_sums = _Stage("tangent_sums", _tangent_sums, "xff")
output_tangent = _Stage("output_tangent", _output_tangent, "x")
gradient_sums = _Stage("gradient_sums", _gradient_sums, "ff", native=True)
input_gradient = _Stage("input_gradient", _input_gradient, "xr", native=True)
tangent = _Stage("tangent", _tangent, "x")
gradients = _Stage("gradients", _gradients, "ffxr", native=True)


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


def _linear_in(stage: _Stage, transpose: Callable[..., Sequence[Array]]) -> None:
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
