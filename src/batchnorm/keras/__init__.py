"""`keras.layers.BatchNormalization`, computed by `batchnorm.jax` or `batchnorm.torch`."""

from ..installation import missing

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "keras":  # but its backend, which KERAS_BACKEND names
        raise
    raise missing("batchnorm.keras", "Keras", "keras") from error

from .conversion import convert, revert
from .inspection import inspect
from .layers import BatchNormalization
from .recalibration import recalibrate

__all__ = ["BatchNormalization", "convert", "inspect", "recalibrate", "revert"]

__dir__ = __all__.copy  # public names alone
