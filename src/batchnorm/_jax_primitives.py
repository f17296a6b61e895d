"""How a stage of batch normalization becomes a primitive of JAX.

A function in jnp defines it: that is what runs on other platforms, and what JAX differentiates where
a stage has no rule of its own. On the CPU a native stage is lowered to its handler in
csrc/faces/xla.cc, if it works on whole arrays of one device.
"""

import functools
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

from .definition import Axes
from .native import kernels, register_report

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


class Stage:
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
            and inputs.x.dtype.name in kernels.DTYPES
            and kernels.layout(inputs.x.shape, problem.features) is not None
            and all(each is not None for each in linear)
            and _is_local(ctx.module_context)
        )
        lower = mlir.lower_fun(self.in_native if servable else self.in_jnp, multiple_results=True)
        return lower(ctx, *operands, problem=problem, tree=tree)

    def in_native(self, *operands: Array, problem: Problem, tree: Any) -> list[Array]:
        inputs, linear = tree.unflatten(operands)
        x, weights = inputs.x, inputs.weights
        if weights is not None and any(weights.shape[axis] != 1 for axis in problem.features):
            weights = jnp.broadcast_to(weights, x.shape)
        moments = [None] * 5 if inputs.moments is None else inputs.moments
        common = (x, inputs.scale, inputs.bias, inputs.residual, weights, *moments)
        # What is absent has no elements.
        absent = jnp.zeros(0, jnp.float32)
        types = self.types(*map(jax.typeof, operands), problem=problem, tree=tree)
        results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in types]
        results += [jax.ShapeDtypeStruct((0,), x.dtype)] * (len(self.results) - len(types))
        call = jax.ffi.ffi_call(_targets()[self.name], results)
        values = call(
            *(absent if each is None else each for each in (*common, *linear)),
            features=np.array(problem.features, np.int64),
            activation=problem.activation or "",
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
    handlers = {} if kernels is None else kernels.xla_handlers()
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


def _report() -> str:
    if kernels is not None and not kernels.xla_handlers():
        return "not served, since the kernels were built without the headers of jaxlib"
    return "served on the CPU" if _targets() else "not served, since this jaxlib does not take them"


register_report("JAX", _report)
