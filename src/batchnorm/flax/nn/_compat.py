"""What flax.nn uses of JAX that JAX does not promise; tests/flax_nn/test_compat.py watches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.api_util import debug_info
from jax.extend.linear_util import wrap_init
from jax.interpreters.partial_eval import PartialVal, trace_to_jaxpr_nounits

# `set_current_trace` is a with statement in which another transformation traces. Should it go,
# parameters that are made inside of a jax.lax.scan, under a jax.jit around `init`, were refused.
try:
    from jax.extend.core import set_current_trace, take_current_trace
except ImportError:  # their place before JAX 0.8.2
    from jax.core import (  # type: ignore[attr-defined, no-redef]
        set_current_trace,
        take_current_trace,
    )

__all__ = ["belongs_to", "current_trace", "partial_results", "set_current_trace"]


def current_trace() -> Any:
    """Return the innermost transformation that is being traced.

    Without it, what outlives its transformation would be met later, as a leaked tracer of JAX.
    """
    with take_current_trace() as trace:
        return trace


def belongs_to(value: Any, trace: Any) -> bool:
    """Whether every tracer in `value` is one of `trace` or of a transformation around it.

    Others mean nothing after the end of theirs. Should `parent_trace` go, those of a transformation
    around it were refused, too; should `_trace`, an AttributeError says so.
    """
    outer = set()
    while trace is not None:
        outer.add(id(trace))
        trace = getattr(trace, "parent_trace", None)
    leaves = jax.tree.leaves(value)
    return all(id(leaf._trace) in outer for leaf in leaves if isinstance(leaf, jax.core.Tracer))


def partial_results(
    traced: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct], called: Callable[..., Any]
) -> list[Any]:
    """Run `traced`, which traces `called`; return what is known without the inputs, else its shape.

    `jax.eval_shape` does not tell the two apart. Should this go, `init_by_shape` fails.
    """
    unknown = [PartialVal.unknown(jax.core.ShapedArray(s.shape, s.dtype)) for s in inputs]
    about = debug_info("init_by_shape", called, inputs, {})
    _, results, _ = trace_to_jaxpr_nounits(wrap_init(traced, debug_info=about), unknown)
    return [each.get_known() if each.is_known() else _shape_of(each) for each in results]


def _shape_of(value: PartialVal) -> jax.ShapeDtypeStruct:
    aval: Any = value.get_aval()
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)  # type: ignore[no-untyped-call]
