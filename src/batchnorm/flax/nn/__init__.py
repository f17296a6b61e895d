"""The module API of Flax before Linen, `flax.nn`, on today's JAX; `Module` shows how to begin."""

from ...installation import missing

try:
    from jax.nn import initializers as initializers
except ModuleNotFoundError as error:
    raise missing("batchnorm.flax.nn", "JAX", "flax") from error

from . import serialization  # noqa: F401, it registers with Flax
from .collection import Collection
from .functions import module, module_method
from .module import Model, Module, TransparentModule
from .normalization import BatchNorm
from .outputs import capture_module_outputs
from .state import ModuleState, get_state, is_stateful, stateful

__all__ = [
    "BatchNorm",
    "Collection",
    "Model",
    "Module",
    "ModuleState",
    "TransparentModule",
    "capture_module_outputs",
    "get_state",
    "initializers",
    "is_stateful",
    "module",
    "module_method",
    "stateful",
]

__dir__ = __all__.copy  # public names alone
