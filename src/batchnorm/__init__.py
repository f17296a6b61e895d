"""One batch normalization for Python's array frameworks.

Import the module of your framework: `batchnorm.numpy`, `batchnorm.mlx`, `batchnorm.jax`,
`batchnorm.flax` or `batchnorm.torch`. This package by itself imports none of them.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, NoReturn

from .native import native_status, set_num_threads

__version__ = version("batchnorm")
__all__ = ["__version__", "native_status", "set_num_threads"]

__dir__ = __all__.copy  # public names alone

_LAYERS = {
    "batchnorm.mlx": {"BatchNorm"},
    "batchnorm.flax.nn": {"BatchNorm"},
    "batchnorm.torch": {
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        *("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
    },
}

if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> NoReturn:
        doors = [door for door, layers in _LAYERS.items() if name in layers]
        if doors:  # an ImportError, since `import` hides the text of an AttributeError
            raise ImportError(
                f"{name} is the layer of a framework: "
                + " or ".join(f"from {door} import {name}" for door in doors)
                + f". batchnorm itself has {', '.join(__all__)}.",
                name=__name__,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
