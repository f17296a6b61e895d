"""One batch normalization for Python's array frameworks.

Import the module of your framework: `batchnorm.numpy`, `batchnorm.mlx`, `batchnorm.jax`,
`batchnorm.flax` or `batchnorm.torch`. This package by itself imports none of them.
"""

from importlib.metadata import version

from .native import native_status, set_num_threads

__version__ = version("batchnorm")
__all__ = ["__version__", "native_status", "set_num_threads"]
