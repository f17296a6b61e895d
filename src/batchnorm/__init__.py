"""One batch normalization for Python's array frameworks.

Import the module of your framework: `batchnorm.numpy`, `batchnorm.mlx`, `batchnorm.jax` or
`batchnorm.torch`, or of a library over those: `batchnorm.flax.linen`, `batchnorm.flax.nnx`,
`batchnorm.flax.nn`, `batchnorm.equinox` or `batchnorm.keras`. This package by itself imports none
of them.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, NoReturn

from .native import native_status, set_num_threads

__version__ = version("batchnorm")
__all__ = ["__version__", "native_status", "set_num_threads"]

__dir__ = __all__.copy  # public names alone

_LAYERS = {
    "batchnorm.mlx": {"BatchNorm"},
    "batchnorm.flax.linen": {"BatchNorm"},
    "batchnorm.flax.nnx": {"BatchNorm"},
    "batchnorm.flax.nn": {"BatchNorm"},
    "batchnorm.equinox": {"BatchNorm"},
    "batchnorm.keras": {"BatchNormalization"},
    "batchnorm.torch": {
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        *("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
    },
}

if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> NoReturn:
        from .absent import no_attribute  # an import of batchnorm imports no more than it needs

        imports = [f"from {door} import {name}" for door in _LAYERS if name in _LAYERS[door]]
        advice = None
        if imports:
            advice = (
                f"{name} is the layer of a framework: {' or '.join(imports)}."
                f" batchnorm itself has {', '.join(__all__)}."
            )
        raise no_attribute(__name__, name, advice)
