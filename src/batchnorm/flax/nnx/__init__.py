"""`flax.nnx.BatchNorm`, computed by `batchnorm.jax`."""

from ...installation import missing

try:
    from flax import nnx as _nnx  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("batchnorm.flax.nnx", "Flax", "flax") from error

from .conversion import convert, revert
from .folding import fold
from .inspection import inspect
from .layers import BatchNorm
from .recalibration import recalibrate

__all__ = ["BatchNorm", "convert", "fold", "inspect", "recalibrate", "revert"]

__dir__ = __all__.copy  # public names alone
