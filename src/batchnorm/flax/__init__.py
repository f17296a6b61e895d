"""Batch normalization for Flax: `linen` and `nnx` have layers for the APIs of these names.

`nn` is the API of Flax before Linen.
"""

from typing import TYPE_CHECKING, NoReturn

from ..absent import no_attribute

__all__ = ["linen", "nn", "nnx"]  # noqa: F822, which `import` finds

__dir__ = __all__.copy  # public names alone

_OF_FLAX_ITSELF = (
    "core",
    "jax_utils",
    "metrics",
    "serialization",
    "struct",
    "training",
    "traverse_util",
)
_ADVICE = {
    name: f"{name} is still Flax's own: from flax import {name}."
    " batchnorm.flax has linen, nn and nnx."
    for name in _OF_FLAX_ITSELF
} | {
    "BatchNorm": "BatchNorm is in batchnorm.flax.linen, in batchnorm.flax.nnx and, for programs"
    " from before Linen, in batchnorm.flax.nn.",
    "optim": "optim is no longer in Flax, nor in batchnorm.flax: use Optax, which takes a"
    " Model as it is. docs/coming-from-flax.md shows how.",
}

if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> NoReturn:
        raise no_attribute(__name__, name, _ADVICE.get(name))
