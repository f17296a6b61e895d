"""The stages by kernels on GPUs: written in Triton, which comes with PyTorch's builds for these.

    stages.py      the stages of one call, and when operations serve instead
    operands.py    the inputs as kernels take them, and what is launched for each stage
    plans.py       what kernels are given that is no tensor: constants, sizes, numbers of programs
    launching.py   compiled kernels, and how they are launched
    layout.py      how a tensor lies in memory
    tiles.py       what each program is given, from the shape alone
    kernels/       the kernels

Nothing imports Triton before a tensor on such a device asks for it.
"""

import importlib.util
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...definition import Inputs
from .._operations import Call, Operations

# In PyTorch's words AMD's GPUs are "cuda", too. Those of Intel nobody has tried.
DEVICES = {"cuda"}
_HALVES = {torch.float16, torch.bfloat16}
_DTYPES = {*_HALVES, torch.float32, torch.float64}


class _Trouble:
    """Why operations serve on GPUs; None while kernels do."""

    reason: str | None = None


def serves(x: Tensor) -> bool:
    return (
        x.device.type in DEVICES
        and x.dtype in _DTYPES
        and x.numel() > 0
        and _Trouble.reason is None
        and _stages() is not None
    )


def fit(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether they surely go with the channels, axis 1, as kernels take them."""
    if x.device.type not in DEVICES:
        return False
    device, shape = x.device, x.shape[1:2]
    dtypes = (x.dtype, torch.float32) if x.dtype in _HALVES else (x.dtype,)
    try:
        for each in parameters:
            if each is not None and not (
                each.device == device and each.dtype in dtypes and each.shape == shape
            ):
                return False
    except RuntimeError:  # of a nested tensor, which has no shape
        return False
    return True


def stages_by_kernels(call: Call, inputs: Inputs) -> Operations | None:
    """None where kernels can't take x, however it were copied."""
    found: Operations | None = _stages().stages_by_kernels(call, inputs)
    return found


@cache
def _stages() -> Any:
    """The module; None where Triton can't be imported."""
    try:
        return import_module(".stages", __package__)  # seen by no tool that follows imports
    except Exception as error:  # whatever a broken installation raises
        give_up(f"Triton can't be imported ({type(error).__name__}: {error})")
        return None


def give_up(reason: str) -> None:
    """Let operations serve from now on, and say so once."""
    if _Trouble.reason is None:
        _Trouble.reason = reason
        warn(reason)


@cache
def warn(reason: str) -> None:
    """Once for each reason."""
    warnings.warn(
        f"batchnorm's kernels for GPUs can't serve: {reason}. Plain operations of PyTorch do, with "
        "the same results, more slowly.",
        RuntimeWarning,
        stacklevel=2,
    )


def _report() -> str:
    """What serves on each kind of device."""
    if _Trouble.reason is not None:
        return f"served by operations, as {_Trouble.reason}"
    if importlib.util.find_spec("triton") is None:
        return "served by operations, as Triton is not installed: it comes with builds for GPUs"
    return "CUDA and ROCm served by kernels in Triton; MPS, XPU and others by operations"


native.register_report("PyTorch on GPUs", _report, of_kernels=False)
