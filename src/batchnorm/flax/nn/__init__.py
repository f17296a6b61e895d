"""The module API of Flax before Linen, `flax.nn`, on today's JAX; `Module` shows how to begin."""

from typing import TYPE_CHECKING, NoReturn

from ...absent import no_attribute
from ...installation import missing

try:
    from . import initializers
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

# What the old flax.nn had besides: in jax.nn, in examples/old_flax_nn.py as well, or in neither.
_FUNCTIONS = {
    *("celu", "elu", "gelu", "glu", "leaky_relu", "log_sigmoid", "log_softmax", "relu", "sigmoid"),
    *("silu", "soft_sign", "softmax", "softplus", "swish", "tanh"),
}
_IN_THE_EXAMPLE = {
    *("Conv", "ConvTranspose", "Dense", "DenseGeneral", "Embed", "GRUCell", "GroupNorm"),
    *("LSTMCell", "LayerNorm", "OptimizedLSTMCell", "avg_pool", "dropout", "is_stochastic"),
    *("make_rng", "max_pool", "stochastic"),
}
_SUBMODULES = {"activation", "base", "linear", "pooling", "recurrent"}
_IN_NEITHER = {
    *("ConvLSTM", "MultiHeadDotProductAttention", "SelfAttention", "attention"),
    "dot_product_attention",
}


def _advice(name: str) -> str | None:
    if name in _FUNCTIONS:
        advice = f"use jax.{'numpy' if name == 'tanh' else 'nn'}.{name}, or"
    elif name in _IN_THE_EXAMPLE:
        advice = "with its old arguments and parameters it is in"
    elif name in _SUBMODULES:
        advice = f"its names stand, without {name} between, in"
    elif name in _IN_NEITHER:
        advice = "use a Module of yours, like those in"
    else:
        return None
    return (
        f"{name} is not in batchnorm.flax.nn, which of the layers has BatchNorm alone: {advice}"
        " examples/old_flax_nn.py of a checkout of batchnorm, a file for the place of flax.nn."
        " See docs/coming-from-flax.md there."
    )


if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> NoReturn:
        raise no_attribute(__name__, name, _advice(name))
