"""Which JAX transformation a value belongs to."""

from __future__ import annotations

from typing import Any

import jax

try:
    from jax.extend.core import take_current_trace
except ImportError:  # its place before JAX 0.8.2
    from jax.core import take_current_trace  # type: ignore[attr-defined, no-redef]


def current_trace() -> Any:
    """Return the innermost transformation that is being traced."""
    with take_current_trace() as trace:
        return trace


def belongs_to(value: Any, trace: Any) -> bool:
    """Whether every tracer in `value` is one of `trace` or of a transformation around it.

    Others belong to a transformation inside `trace` and mean nothing after its end.
    """
    outer = set()
    while trace is not None:
        outer.add(id(trace))
        trace = getattr(trace, "parent_trace", None)
    leaves = jax.tree.leaves(value)
    return all(id(leaf._trace) in outer for leaf in leaves if isinstance(leaf, jax.core.Tracer))
