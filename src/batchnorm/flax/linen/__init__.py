"""`flax.linen.BatchNorm`, computed by `batchnorm.jax`."""

from ...installation import missing

try:
    from flax import linen as _linen  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("batchnorm.flax.linen", "Flax", "flax") from error

from .inspection import inspect
from .layers import BatchNorm
from .recalibration import recalibrate

__all__ = ["BatchNorm", "inspect", "recalibrate"]

__dir__ = __all__.copy  # public names alone
