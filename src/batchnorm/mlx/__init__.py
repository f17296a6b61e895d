"""Batch normalization of MLX arrays: `BatchNorm` in the place of `mlx.nn.BatchNorm`, and functions.

Everything is built from MLX's own operations by `batchnorm.definition`: nothing is evaluated early,
and every transformation of MLX applies; but a training step is for one size of batch, and no program
for `mx.compile(..., shapeless=True)`. Computation is in float32, and in float64 of float64 arrays
and, on the CPU, of small ones.
"""

try:
    import mlx.core as _mx  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("batchnorm.mlx needs MLX: pip install batchnorm[mlx]") from error

from ..moments import Statistics
from .functions import batch_norm, batch_statistics, normalize, update_running
from .layers import BatchNorm

__all__ = [
    "BatchNorm",
    "Statistics",
    "batch_norm",
    "batch_statistics",
    "normalize",
    "update_running",
]
