"""Batch normalization of MLX arrays: `BatchNorm` in the place of `mlx.nn.BatchNorm`, and functions.

Everything is built from MLX's own operations by `batchnorm.definition`: nothing is evaluated early,
and every transformation of MLX applies; but a batch norm that is compiled with `shapeless=True`
knows one size of batch alone. Computation is in float32; in float64 of float64 arrays, and in the
batch norm of a small array on the CPU.
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
