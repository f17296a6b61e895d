"""What JAX does not promise: each use in one place, with what it is for, what breaks it, what then.

tests/test_jax_compat.py has a test for each, of the same name. Here None stands for a tangent or a
cotangent that is known to be zero, in whatever way JAX says so.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import checkify, config
from jax.experimental import jet
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Array = Any


# ---- primitives and their rules
#
# For: a stage that is one operation to all of JAX's transformations, with derivatives that are
# stages again. Public ways do not go as far: custom_jvp is not linear and custom_vmap has no
# derivative. Breaks: where jax.extend.core or jax.interpreters change the signature of a rule.
# Then: adapt the rule here; all else knows the stages alone.


def primitive(name: str, types: Callable[..., Any], evaluate: Callable[..., Any]) -> Primitive:
    """An operation of several results: `types` of them from those of its operands; at once."""
    made = Primitive(name)
    made.multiple_results = True
    made.def_abstract_eval(types)
    made.def_impl(evaluate)
    return made


def set_jvp(primitive: Primitive, rule: Callable[..., tuple[list[Array], list[Any]]]) -> None:
    """rule(primals, tangents, **parameters) -> results, their tangents."""

    def jvp(
        primals: Sequence[Array], tangents: Sequence[Any], **parameters: Any
    ) -> tuple[list[Array], list[Any]]:
        results, dots = rule(primals, [*map(_or_none, tangents)], **parameters)
        return results, [
            ad.Zero(jax.typeof(result).to_tangent_aval()) if dot is None else dot
            for result, dot in zip(results, dots, strict=True)
        ]

    ad.primitive_jvps[primitive] = jvp


def set_transpose(primitive: Primitive, rule: Callable[..., Sequence[Any]]) -> None:
    """rule(cotangents, *operands, **parameters) -> one for each operand; not all are asked for."""

    def transpose(cotangents: Sequence[Any], *operands: Any, **parameters: Any) -> list[Any]:
        results = rule([*map(_or_none, cotangents)], *operands, **parameters)
        return [
            result if ad.is_undefined_primal(operand) else None
            for operand, result in zip(operands, results, strict=True)
        ]

    ad.primitive_transposes[primitive] = transpose


def _or_none(tangent: Any) -> Any:
    return None if type(tangent) is ad.Zero else tangent


def set_batcher(primitive: Primitive, rule: Callable[..., tuple[list[Array], list[Any]]]) -> None:
    """rule(axis, operands, dims, **parameters) -> results, their dims; None for what is not mapped.

    axis.name and axis.size are those of the mapped axis. A rule is also asked where no operand is
    mapped.
    """
    batching.fancy_primitive_batchers[primitive] = rule


def set_jet(primitive: Primitive, function: Callable[..., list[Array]]) -> None:
    """The series of a function that does the same, for jax.experimental.jet.

    Breaks: where jet renames the form of itself whose terms are as its rules have them, without
    factorials, which it had no name for before 0.10. Then: wrong terms beyond the first.
    """
    of_function = getattr(jet, "jet2", jet.jet)

    def rule(primals: Sequence[Array], series: Sequence[Any], **parameters: Any) -> Any:
        bound = functools.partial(function, **parameters)
        return of_function(bound, tuple(primals), tuple(series))

    jet.jet_rules[primitive] = rule  # type: ignore[assignment]


def set_checks(primitive: Primitive) -> None:
    """Let checkify look for NaN in the results.

    Breaks: where JAX moves its table of rules, which it does not export. Then: checkify sees no NaN
    that a batch norm makes.
    """
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


# ---- programs
#
# For: a program without our primitives, for those who read programs. Breaks: where a jaxpr or its
# equations can't be replaced in part. Then: adapt it here, or evaluate the equations one by one.


def program(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    """The jaxpr of a function at these arguments, and the structure of its results."""
    return jax.make_jaxpr(function, return_shape=True)(*arguments, **keywords)


def evaluated(jaxpr: ClosedJaxpr, leaves: Sequence[Array]) -> list[Array]:
    results: list[Array] = jaxpr_as_fun(jaxpr)(*leaves)
    return results


def with_functions(value: Any, functions: dict[Primitive, Callable[..., Any]]) -> Any:
    """A jaxpr, or whatever holds some, with calls of functions in the place of primitives."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=with_functions(value.jaxpr, functions))
    if isinstance(value, Jaxpr):
        return value.replace(eqns=[_with_function(each, functions) for each in value.eqns])
    if isinstance(value, (tuple, list)):
        parts = [with_functions(each, functions) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _with_function(equation: Any, functions: dict[Primitive, Callable[..., Any]]) -> Any:
    function = functions.get(equation.primitive)
    if function is None:
        parameters = {
            name: with_functions(each, functions) for name, each in equation.params.items()
        }
        return equation.replace(params=parameters)

    def in_place(*operands: Array) -> list[Array]:
        wanted = [_varying(result.aval) for result in equation.outvars]
        return list(map(_made_varying, function(*operands, **equation.params), wanted))

    types = [operand.aval for operand in equation.invars]
    is_checked = any(_varying(each) for each in types)
    axes = list(equation.ctx.cur_abstract_mesh.shape.items()) if is_checked else None
    with equation.ctx.manager, config._check_vma(is_checked):
        (call,) = jax.make_jaxpr(jax.jit(in_place), axis_env=axes)(*types).eqns
    # What a function stands for may be made of others that have one.
    inner = {name: with_functions(each, functions) for name, each in call.params.items()}
    call = call.replace(params=inner)
    return call.replace(invars=equation.invars, outvars=equation.outvars)


# ---- lowering
#
# For: the choice between native and jnp where the platform is known, and with it whether XLA will
# split the program. lax.platform_dependent, the public way, knows the platform alone, and it would
# export a call of our kernels. Breaks: where the contexts of a lowering change. Then: let
# is_here be False: all is served by jnp, right but slower.


def set_lowering(
    primitive: Primitive, lowering: Callable[..., Sequence[Any]], platform: str | None = None
) -> None:
    """lowering(context, *operands, **parameters); without a platform, for all the others."""
    mlir.register_lowering(primitive, lowering, platform=platform)


def lowering(function: Callable[..., list[Array]]) -> Callable[..., Sequence[Any]]:
    """That of a function in jnp."""
    return mlir.lower_fun(function, multiple_results=True)


def operand_types(context: mlir.LoweringRuleContext) -> Sequence[Any]:
    return context.avals_in


def is_here(context: mlir.LoweringRuleContext) -> bool:
    """Whether the lowered code runs on whole arrays on one device, in this process.

    XLA's partitioner would gather the operands of a custom call, but knows how to split jnp; and an
    exported program must not depend on this package.
    """
    if context.module_context.lowering_parameters.for_export:
        return False
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.ShardingContext):
        return axes.num_devices == 1
    if isinstance(axes, mlir.SPMDAxisContext):
        return set(axes.manual_axes) == set(axes.mesh.axis_names)
    return True


def xla_api_version() -> tuple[int, int] | None:
    """Of the interface for foreign functions of this jaxlib, (major, minor), by its own header.

    For: no kernels for a jaxlib that is older than they. Breaks: where jaxlib comes without its
    headers. Then: None, and JAX does not start with a jaxlib that refuses the kernels.
    """
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.is_file():
        return None
    defined = dict(re.findall(r"#define XLA_FFI_API_(\w+) (\d+)", header.read_text()))
    return int(defined["MAJOR"]), int(defined["MINOR"])


def is_for_one_device(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA splits nothing of the program, nor is it mapped over devices; for the same."""
    axes = context.module_context.axis_context
    return isinstance(axes, mlir.ShardingContext) and axes.num_devices == 1


# ---- types


def type_like(x: Any, axes: Sequence[int] | None = None, dtype: Any = None) -> Any:
    """The type x, or that of an array of some of its axes, which varies and is split as x is.

    For: the types of a primitive's results. Breaks: where jax.typeof(x) loses `update` or
    `sharding`. Then: make jax.core.ShapedArray(shape, dtype, ...) with whatever holds these.
    """
    if axes is None:
        return x.update(weak_type=False)
    shape, spec = ([each[axis] for axis in axes] for each in (x.shape, x.sharding.spec))
    sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*spec))
    return x.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def varying_axes(array: Array) -> frozenset[Any]:
    """Over which mapped axes of jax.shard_map the array varies.

    For: operands of one primitive, which must vary alike under check_vma. Breaks: where JAX names
    it anew, as 0.10 did. Then: without it, no operation of ours works under check_vma.
    """
    return _varying(jax.typeof(array))


def _varying(kind: Any) -> frozenset[Any]:
    found: frozenset[Any]
    found = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return found


def varies_as(x: Array, arrays: Any) -> bool:
    """Whether no array varies over an axis over which x does not; for the same."""
    own = varying_axes(x)
    return all(varying_axes(each) <= own for each in jax.tree.leaves(arrays))


def varying_alike(arrays: Sequence[Array]) -> Sequence[Array]:
    """The arrays, varying over all the axes over which any of them varies.

    For: the same. Breaks: where pcast is replaced, as it replaced pvary in 0.8. Then: as above.
    """
    union = frozenset().union(*map(varying_axes, arrays))
    return [_made_varying(array, union) for array in arrays]


def _made_varying(array: Array, axes: frozenset[Any]) -> Array:
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)  # type: ignore[attr-defined]


# ---- mapped axes


def axis_size(axis_name: Any) -> int | None:
    """The number of devices along a mapped axis, or axes; None where it is not mapped.

    For: an error by our name. Breaks: where JAX raises another error than NameError; ValueError for
    an integer, which JAX takes for an axis of an array. Then: that one is raised, which says the
    same less plainly.
    """
    try:
        size: int = jax.lax.psum(1, axis_name)
    except (NameError, ValueError):
        return None
    return size


def are_of_vmap(axis_names: Sequence[Any]) -> bool:
    """Whether there are such mapped axes, all jax.vmap's, which are gone when a program is lowered.

    For: a whole batch norm as one operation there. Breaks: where jax.pmap and jax.shard_map no
    longer make their axes manual, as before 0.8 pmap did not. Then: NameErrors in lowering.
    """
    if not axis_names or not getattr(jax.config, "jax_pmap_shmap_merge", True):
        return False
    return not {*jax.sharding.get_abstract_mesh().manual_axes} & {*axis_names}


def group_sum(array: Array, axis_name: Any, groups: list[list[int]]) -> Array:
    """The sum over the devices of each group.

    For: groups under check_vma, for which JAX has no psum. Breaks: where it raises another error.
    Then: that one is raised; drop the gathering where JAX has learned to sum.
    """
    try:
        return jax.lax.psum(array, axis_name, axis_index_groups=groups)
    except NotImplementedError:
        return jax.lax.all_gather(array, axis_name, axis_index_groups=groups).sum(0)
