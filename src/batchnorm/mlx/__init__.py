"""Batch normalization of MLX arrays: `BatchNorm` in the place of `mlx.nn.BatchNorm`, and functions.

On the CPUs of Linux, arrays are served by the native kernels, as one operation of MLX's graph, if
it was built for the version of MLX that is installed; `batchnorm.native_status()` says whether. In
float64, with eps as an array, over a `group`, in `mx.export_function` and everywhere else,
everything is built from MLX's own operations by `batchnorm.definition`. Either way nothing is
evaluated early, and every transformation of MLX applies. eps, momentum and rate may be arrays of no
axes, of a schedule for instance; these are not looked at, and count as NaN where they are out of
range.

With MLX's operations, computation is in float32; in float64 of float64 arrays, and in the batch
norm of a small array on the CPU. By them a program for any size (`shapeless=True` of `mx.compile`
and `mx.export_function`) is right at any number of values of each feature from two on, whichever it
was traced with, as far as its other operations are: the gradient of `mlx.nn.Linear` in MLX 0.32 is
not. Of large arrays it takes about four times as long as one for each size: its sums are in float64
on the CPU. On one value of each feature, or none, such a program must not be called: there
reductions of MLX 0.32 itself end the process, those of a gradient of `normalize` included. It has
no `group`; and within it, `mx.vmap` and some forward derivatives are of one size in MLX itself.
"""

from ..installation import missing

try:
    import mlx.core as _mx  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("batchnorm.mlx", "MLX", "mlx") from error

from ..moments import Statistics
from .folding import fold
from .functions import batch_norm, batch_statistics, normalize, update_running
from .inspection import inspect
from .layers import BatchNorm
from .recalibration import recalibrate

__all__ = [
    "BatchNorm",
    "Statistics",
    "batch_norm",
    "batch_statistics",
    "fold",
    "inspect",
    "normalize",
    "recalibrate",
    "update_running",
]

__dir__ = __all__.copy  # public names alone
