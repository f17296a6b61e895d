"""The stages of batch normalization as primitives of JAX, native on the CPU.

Four of them go forward and six are linear, in three pairs of transposes:

    statistics      x             ->  the moments
    normalize       x             ->  y
    normalized      x             ->  y:  by moments that are those of x, in the derivative, too
    batch_norm      x             ->  the moments, y:  both, where there are no weights; over a
                                      jax.vmap's axis, the moments of the whole batch
    tangent_sums    ẋ, ṙ          ->  p, t₀, t₁
    output_tangent  p, s₀, s₁     ->  ẏ
    gradient_sums   dy            ->  Σ g, Σ g·x̂
    input_gradient  dy, s₀, s₁    ->  dx, dr
    tangent         s₀, s₁, ẋ, ṙ  ->  ẏ:  tangent_sums and output_tangent, s₀ and s₁ added between
    gradients       dy            ->  Σ g, Σ g·x̂, dx, dr:  gradient_sums and input_gradient

`batchnorm.definition` has the formulas. The derivative of a batch norm is tangent_sums, a sum over
the devices, and output_tangent; s₀ and s₁ are these times the scale, and what bias and scale have a
part in them. Transposed, in reverse order, these are gradient_sums, a sum over the devices, and
input_gradient: the two passes over memory that reverse mode needs, with the sum put between them by
JAX itself. What p carries from the one to the other is in reverse mode dy, which costs nothing. On
one device nothing comes between two stages, and batch_norm and the last pair do both at once.

Forward and in reverse mode, a stage is native on the CPU if it works on whole arrays of one device:
it is lowered to its handler in csrc/faces/xla.cc. Otherwise it is lowered to the definition.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import definition, native
from ..definition import Inputs, Problem
from ..layout import Axes, weights_shape
from ..moments import Moments
from ..sums import AddUp, one_by_one
from . import _compat as compat
from ._sync import ALONE, Devices

Array = Any


def wide(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are computed; by no promotion, which may be strict."""
    is_wide = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype if is_wide else jnp.float32)


# For whoever can't look into a primitive.
BY_DEFINITION: dict[Any, Callable[..., list[Array]]] = {}


class Stage:
    """A stage as a primitive; call it with a problem, inputs, moments and its linear operands.

    `function` is its definition, in the dtype to compute in. `linear` and `results` have a letter
    for each linear operand and each result: x, r: of the shape and dtype of x, r only if there is a
    residual; f: of the feature shape, in the dtype to compute in, as scale, bias, weights and
    moments are. With `has_kernel`, the kernel of the same name serves on the CPU.

    Over `devices`, the results f are added up, or pooled, right after the call; where jax.vmap maps
    their axis, the stage itself may go over it. `over_devices` is the definition of a stage whose
    results are pooled, while an axis of jax.vmap is there; which is gone before lowering.
    `is_made_of` is for a stage that is another one: what it is lowered to. `in_one_pass` is the
    definition with less passes over memory, by what has no derivative, and for which XLA would
    gather what is split.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        linear: str,
        results: str,
        *,
        has_kernel: bool = False,
        is_made_of: Callable[..., list[Array]] | None = None,
        over_devices: Callable[..., list[Array]] | None = None,
        in_one_pass: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.function, self.linear, self.results = name, function, linear, results
        self.primitive = compat.primitive(f"batch_norm_{name}", self.types, self.evaluate)
        BY_DEFINITION[self.primitive] = self.by_definition
        self.is_made_of, self.in_one_pass = is_made_of, in_one_pass
        self.over_devices = over_devices
        compat.set_lowering(self.primitive, self.lower)
        if has_kernel:
            compat.set_lowering(self.primitive, self.lower_on_cpu, "cpu")

    def __call__(
        self,
        problem: Problem,
        inputs: Inputs,
        moments: Moments | None = None,
        *linear: Array | None,
        devices: Devices = ALONE,
    ) -> list[Array]:
        operands, tree = jax.tree.flatten((inputs, moments, linear))
        return self.bind(
            *compat.varying_alike(operands), problem=problem, tree=tree, devices=devices
        )

    def bind(self, *operands: Array, **parameters: Any) -> list[Array]:
        return self.primitive.bind(*operands, **parameters)

    def evaluate(self, *operands: Array, **parameters: Any) -> list[Array]:
        """At once, as a compiled computation of its own."""
        with jax.disable_jit(False):
            return _jitted(self, *operands, **parameters)

    def types(
        self, *operands: Any, problem: Problem, tree: Any, devices: Devices = ALONE
    ) -> list[Any]:
        x, residual = operands[0], tree.unflatten(operands)[0].residual
        of_features = problem.features, wide(x.dtype)
        return [
            compat.type_like(x, *of_features) if each == "f" else compat.type_like(x)
            for each in self.results
            if each != "r" or residual is not None
        ]

    def lower(self, context: Any, *operands: Any, **parameters: Any) -> Sequence[Any]:
        function = self.is_made_of or self.by_definition
        if self.in_one_pass is not None and compat.is_for_one_device(context):
            function = functools.partial(self.by_definition, function=self.in_one_pass)
        return compat.lowering(function)(context, *operands, **parameters)

    def lower_on_cpu(self, context: Any, *operands: Any, **parameters: Any) -> Sequence[Any]:
        problem, tree = parameters["problem"], parameters["tree"]
        inputs, _, linear = tree.unflatten(compat.operand_types(context))
        if (
            compat.is_here(context)
            and native.kernels is not None
            and inputs.x.dtype.name in native.kernels.DTYPES
            and native.kernels.layout(inputs.x.shape, problem.features) is not None
            and inputs.x.size > 0
            and None not in linear
            and (self.over_devices is None or parameters["devices"] == ALONE)
            and self.name in _targets()
        ):
            return compat.lowering(self.by_kernel)(context, *operands, **parameters)
        return self.lower(context, *operands, **parameters)

    def by_definition(
        self,
        *operands: Array,
        problem: Problem,
        tree: Any,
        devices: Devices = ALONE,
        function: Callable[..., Any] | None = None,
    ) -> list[Array]:
        if self.over_devices is not None and devices != ALONE:
            return self.over_devices(*operands, problem=problem, tree=tree, devices=devices)
        dtype = operands[0].dtype
        inputs, moments, linear = tree.unflatten([each.astype(wide(dtype)) for each in operands])
        given = (inputs, *linear) if moments is None else (inputs, moments, *linear)
        results = jax.tree.leaves((function or self.function)(problem, *given))
        types = self.types(*map(jax.typeof, operands), problem=problem, tree=tree)
        return [result.astype(kind.dtype) for kind, result in zip(types, results, strict=False)]

    def by_kernel(
        self, *operands: Array, problem: Problem, tree: Any, devices: Devices
    ) -> list[Array]:
        inputs, moments, linear = tree.unflatten(operands)
        x, weights = inputs.x, inputs.weights
        if weights is not None:
            shape = weights_shape(problem.features, weights.shape, x.shape)
            inputs = inputs._replace(weights=jnp.broadcast_to(weights, shape))
        moments = moments or [None] * len(Moments._fields)
        types = self.types(*map(jax.typeof, operands), problem=problem, tree=tree)
        results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in types]
        results += [jax.ShapeDtypeStruct((0,), x.dtype)] * (len(self.results) - len(types))
        call = jax.ffi.ffi_call(_targets()[self.name], results)
        absent = jnp.zeros(0, jnp.float32)  # what is absent has no elements
        values = call(
            *(absent if each is None else each for each in (*inputs, *moments, *linear)),
            features=np.array(problem.features, np.int64),
            activation=problem.activation or "",
            eps=np.float64(problem.eps),
        )
        return list(values[: len(types)])


@functools.partial(jax.jit, static_argnums=0, static_argnames=("problem", "tree", "devices"))
def _jitted(stage: Stage, *operands: Array, **parameters: Any) -> list[Array]:
    if not isinstance(operands[0], jax.core.Tracer):
        # As jax_debug_nans runs it again, to see which operation makes the first one.
        return stage.by_definition(*operands, **parameters)
    return stage.bind(*operands, **parameters)


# ---- the handlers


def _targets() -> dict[str, str]:
    """The names under which XLA knows the handlers; none if it does not take them."""
    targets, refusal = _registered()
    if refusal is not None:
        _warn(refusal)
    return targets


@functools.cache
def _registered() -> tuple[dict[str, str], str | None]:
    """The names, and why XLA refused them, if it did."""
    handlers = native.kernels.xla_handlers()
    built_for, here = native.kernels.xla_api_version(), compat.xla_api_version()
    if built_for is not None and here is not None and here < built_for:
        # Told of them before it has started a backend, such a jaxlib would fail to start any.
        return {}, f"they are built for version {built_for} of its interface, and it has {here}"
    targets = {name: f"batchnorm_{name}_{version('batchnorm')}" for name in handlers}
    try:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(targets[name], handler, platform="cpu")
    except Exception as error:
        return {}, str(error)
    return targets, None


@functools.cache
def _warn(refusal: str) -> None:
    warnings.warn(
        f"This jaxlib does not take batchnorm's native kernels, so jnp serves instead: {refusal}",
        RuntimeWarning,
        stacklevel=2,
    )


def _report() -> str:
    targets, refusal = _registered()
    if refusal is not None:
        return f"not served, since this jaxlib does not take the kernels: {refusal}"
    return "served" if targets else "not served, since they were built without jaxlib's headers"


native.register_report("JAX", _report)
if native.kernels is not None:
    _registered()  # for compiled programs that are loaded before one is made here


# ---- the stages


def _added_up_in_one_pass(arrays: Sequence[Array], axes: Axes) -> Sequence[Array]:
    zeros = tuple(np.zeros((), array.dtype) for array in arrays)

    def add(one: Sequence[Array], other: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(map(jax.lax.add, one, other))

    sums = jax.lax.reduce(tuple(arrays), zeros, add, axes)
    return [jnp.expand_dims(each, axes) for each in sums]


def _moments(problem: Problem, inputs: Inputs, add_up: AddUp = one_by_one) -> Moments:
    return definition.moments(problem, inputs, jax.lax.stop_gradient, add_up)


def _batch_norm(
    problem: Problem, inputs: Inputs, add_up: AddUp = one_by_one
) -> tuple[Moments, Array]:
    assert inputs.weights is None, "its derivative does not know of them"
    y, moments = definition.batch_norm(problem, inputs, jax.lax.stop_gradient, add_up)
    return moments, y


def batch_norm_over_devices(
    *operands: Array, problem: Problem, tree: Any, devices: Devices
) -> list[Array]:
    """What `batch_norm` is there: the moments are those of all devices together."""
    inputs, *_ = tree.unflatten(operands)
    own = Moments(*statistics(problem, Inputs(inputs.x), devices=devices))
    moments = devices.pooled(own)
    return [*moments, *normalized(problem, inputs, moments, None, devices=devices)]


def _normalized(problem: Problem, inputs: Inputs, moments: Moments, eps: Array | None) -> Array:
    return definition.normalize(problem, inputs, moments.with_eps(eps))


def by_normalize(*operands: Array, problem: Problem, tree: Any, devices: Devices) -> list[Array]:
    """What `normalized` is, but for its derivative."""
    inputs, moments, (eps,) = tree.unflatten(operands)
    return normalize(problem, inputs, moments.with_eps(eps))


def _tangent(
    problem: Problem,
    inputs: Inputs,
    moments: Moments,
    s0: Array,
    s1: Array,
    x_dot: Array,
    residual_dot: Array | None,
) -> Array:
    p, *own = definition.tangent_sums(problem, inputs, moments, x_dot, residual_dot)
    if inputs.scale is not None:
        own = [inputs.scale * each for each in own]
    return definition.output_tangent(problem, inputs, moments, p, s0 + own[0], s1 + own[1])


def _gradients(problem: Problem, inputs: Inputs, moments: Moments, dy: Array) -> Any:
    sums = definition.gradient_sums(problem, inputs, moments, dy)
    return sums, definition.input_gradient(problem, inputs, moments, dy, *sums)


def _in_one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(function, add_up=_added_up_in_one_pass)


_input_gradient = functools.partial(definition.input_gradient, are_scaled=True)

statistics = Stage(
    "statistics", _moments, "", "fffff", has_kernel=True, in_one_pass=_in_one_pass(_moments)
)
normalize = Stage("normalize", definition.normalize, "", "x", has_kernel=True)
normalized = Stage("normalized", _normalized, "f", "x", is_made_of=by_normalize)
batch_norm = Stage(
    "batch_norm",
    _batch_norm,
    "",
    "fffffx",
    has_kernel=True,
    over_devices=batch_norm_over_devices,
    in_one_pass=_in_one_pass(_batch_norm),
)
tangent_sums = Stage("tangent_sums", definition.tangent_sums, "xr", "xff")
output_tangent = Stage("output_tangent", definition.output_tangent, "xff", "x")
gradient_sums = Stage("gradient_sums", definition.gradient_sums, "x", "ff", has_kernel=True)
input_gradient = Stage("input_gradient", _input_gradient, "xff", "xr", has_kernel=True)
tangent = Stage("tangent", _tangent, "ffxr", "x")
gradients = Stage("gradients", _gradients, "x", "ffxr", has_kernel=True)
