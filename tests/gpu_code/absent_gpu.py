"""A GPU that is not here: Triton compiles for it, with its own compilers, and launches nothing.

Tensors of the CPU stand for its memory. To be used in a process that does not interpret.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

import batchnorm.native
import batchnorm.torch._gpu

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Launcher:
    def __init__(self, source, metadata) -> None:
        pass

    def __call__(self, *arguments) -> None:
        pass


class _Utilities:
    def load_binary(self, name, binary, shared, device):
        """Module, function, registers, spills, and how many threads a program may have."""
        return 1, 1, 32, 0, 1024

    def unload_module(self, module) -> None:
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 65536, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    utils, launcher_cls = _Utilities(), _Launcher

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def absent_gpu(name: str):
    """Let kernels for that GPU serve tensors of the CPU, whose values then mean nothing."""
    assert not triton.knobs.runtime.interpret
    triton.runtime.driver.set_active(_Driver(TARGETS[name]))
    with (
        patch.object(batchnorm.native, "kernels", None),
        patch.object(batchnorm.torch._gpu, "DEVICES", {"cpu"}),
    ):
        yield
