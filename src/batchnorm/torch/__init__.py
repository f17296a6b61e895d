"""Batch normalization of PyTorch tensors: torch.nn's layers, and the functions of every door.

Dense float32, float64, float16 and bfloat16 tensors are normalized, and their gradients computed,
by kernels: on the CPU by native ones, on CUDA and ROCm by those in Triton. On other devices, under
torch.compile and torch.export, in the transformations of torch.func and in derivatives of second
order, the same formulas are ATen operations.
"""

from ..installation import missing

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("batchnorm.torch", "PyTorch", "torch") from error

from ..moments import Statistics
from . import functional
from ._changes import Change, changes
from .conversion import convert, revert
from .folding import fold
from .functions import batch_norm, batch_statistics, normalize, update_running
from .fusion import fuse
from .inspection import inspect
from .layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from .recalibration import recalibrate

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Change",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Statistics",
    "SyncBatchNorm",
    "batch_norm",
    "batch_statistics",
    "changes",
    "convert",
    "fold",
    "functional",
    "fuse",
    "inspect",
    "normalize",
    "recalibrate",
    "revert",
    "update_running",
]

__dir__ = __all__.copy  # public names alone
