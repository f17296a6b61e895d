"""The random keys from which parameters are made."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fold_in(rng: Any, name: str) -> Any:
    """Derive the key of a submodule or a parameter from that of its module."""
    if not isinstance(name, str):
        raise ValueError(f"Name must be a string. Got {name!r}, a {type(name).__name__}.")
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).digest()
    return jax.random.fold_in(rng, int.from_bytes(digest[:4], "big"))


def split(rng: Any) -> tuple[Any, Any]:
    """Make two keys of one."""
    first, second = jax.random.split(rng)
    return first, second


def check_key(rng: Any) -> None:
    """Refuse what is no random key, such as an input in its place."""
    dtype = getattr(rng, "dtype", None)
    if dtype is None or not (dtype == np.uint32 or jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(
            "rng must be a JAX random key, such as jax.random.PRNGKey(0), and come first, got "
            f"{type(rng).__name__ if dtype is None else dtype}."
        )
