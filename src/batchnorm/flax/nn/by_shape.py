"""Running a function on inputs of which only the shape and the dtype are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import partial_results


def partly_evaluated(function: Callable[..., Any], input_specs: Iterable[Any]) -> Any:
    """Run `function`, computing what does not depend on its inputs.

    What does comes back as `jax.ShapeDtypeStruct`. Other than `jax.eval_shape` would, this
    knows the tracers of a `jax.jit` around it from those of the inputs.
    """
    specs = _parsed_specs(input_specs)
    leaves: list[Any] = []
    structure: Any = None

    def traced(*inputs: Any) -> list[Any]:
        nonlocal leaves, structure
        results, structure = jax.tree.flatten(function(*inputs))
        leaves = [_TRACER if isinstance(leaf, jax.core.Tracer) else leaf for leaf in results]
        return [leaf for leaf in results if isinstance(leaf, jax.core.Tracer)]

    results = iter(partial_results(traced, specs, function))
    return jax.tree.unflatten(
        structure, [next(results) if leaf is _TRACER else leaf for leaf in leaves]
    )


_TRACER = object()  # stands in a list where a tracer was


def _parsed_specs(input_specs: Iterable[Any]) -> list[jax.ShapeDtypeStruct]:
    try:
        return [_parsed_spec(spec) for spec in input_specs]
    except TypeError as error:
        raise TypeError(
            "input_specs must be a sequence with a (shape, dtype) pair or a shape for each input,"
            f" got {input_specs!r}. For one input of shape (8, 2) pass [(8, 2)]."
        ) from error


def _parsed_spec(spec: Any) -> jax.ShapeDtypeStruct:
    if hasattr(spec, "shape") and hasattr(spec, "dtype"):
        return _spec(spec.shape, spec.dtype)
    shape = tuple(spec)
    if len(shape) == 2 and np.iterable(shape[0]):
        return _spec(*shape)
    return _spec(shape, jnp.float32)


def _spec(shape: Iterable[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]
