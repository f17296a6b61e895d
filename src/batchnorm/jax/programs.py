"""Functions without the primitives of batch normalization, for what reads programs."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from . import _compat as compat
from ._stages import BY_DEFINITION

Function = TypeVar("Function", bound=Callable[..., Any])


def in_plain_jax(function: Function) -> Function:
    """The same function, made of operations that every tool for JAX knows.

    To JAX, the stages of a batch norm are primitives of this package. What reads a program (a
    converter to another format, an analysis of its costs, an interpreter of jaxprs) does not know
    them. Here each is replaced by its definition in `jax.numpy`, wherever it stands in the program:
    in jit, scan, cond, shard_map and the like.

    Parameters
    ----------
    function : callable
        Of arrays and pytrees of arrays, as for `jax.jit`; a step of training, say. What is
        differentiated later should be so before: ``in_plain_jax(jax.grad(loss))``.

    Returns
    -------
    callable
        It computes what `function` does, up to rounding, but by no native kernel. Each call looks
        at the program anew: to be called often, it wants `jax.jit` around it.

    Raises
    ------
    TypeError
        If `function` is none.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.jax import batch_norm, in_plain_jax
    >>> def loss(x):
    ...     return (batch_norm(x)[0] ** 3).sum()
    >>> "batch_norm" in str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 3))))
    True
    >>> plain = in_plain_jax(jax.grad(loss))
    >>> "batch_norm" in str(jax.make_jaxpr(plain)(jnp.ones((4, 3))))
    False
    """

    if not callable(function):
        raise TypeError(
            f"function must be a function of arrays, but got {type(function).__name__}."
        )

    @functools.wraps(function)
    def plain(*arguments: Any, **keywords: Any) -> Any:
        jaxpr, results = compat.program(function, *arguments, **keywords)
        leaves = jax.tree.leaves((arguments, keywords))
        found = compat.evaluated(compat.with_functions(jaxpr, BY_DEFINITION), leaves)
        return jax.tree.unflatten(jax.tree.structure(results), found)

    return plain  # type: ignore[return-value]
