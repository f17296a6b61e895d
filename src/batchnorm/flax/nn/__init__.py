"""The module API of Flax before Linen, `flax.nn`, on today's JAX.

Examples
--------
>>> import jax, jax.numpy as jnp
>>> from batchnorm.flax import nn
>>> class Dense(nn.Module):
...     def apply(self, x, features):
...         shape = (x.shape[-1], features)
...         return x @ self.param("kernel", shape, nn.initializers.lecun_normal())
>>> y, params = Dense.init(jax.random.PRNGKey(0), jnp.ones((4, 2)), features=3)
>>> model = nn.Model(Dense.partial(features=3), params)
>>> jnp.array_equal(model(jnp.ones((4, 2))), y)
Array(True, dtype=bool)
"""

from jax.nn import initializers as initializers

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
