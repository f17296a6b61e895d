"""Whether the kernels that are found for a call are those that Triton would find for it.

    cd tests; python -m gpu_code.cached

A program of its own, as Triton looks for compiled kernels only where it does not interpret. Shapes
follow each other that differ in what Triton compiles anew for: 1, multiples of 16, alignment.
"""

from importlib import import_module
from unittest.mock import patch

import torch
from gpu_code.absent_gpu import absent_gpu

import batchnorm.torch

SHAPES = [
    *((4096, 448), (4096, 64, 7), (4096, 64, 16), (4096, 7), (4096, 1)),
    *((64, 1008), (64, 1001), (64, 1), (8, 5, 3), (8, 5, 16)),
]


def main() -> None:
    launching = import_module("batchnorm.torch._gpu.launching")

    looked_at = 0
    find = launching._kernel

    def find_as_triton_does(device, launch):
        nonlocal looked_at
        programs, tensors, numbers = launch
        wanted = programs.kernel.run(
            *(*tensors, *numbers, *programs.numbers, *programs.constants),
            grid=(programs.number, 1, 1),
            warmup=True,
            num_warps=max(1, programs.threads // 32),
            enable_fp_fusion=False,
        )
        found = find(device, launch)
        assert found is wanted, f"{programs.kernel.fn.__name__}: another's kernel"
        looked_at += 1
        return found

    with absent_gpu("sm_90"), patch.object(launching, "_kernel", find_as_triton_does):
        for skip_nonfinite in (False, True):
            for shape in SHAPES:
                for offset in (0, 1):
                    memory = torch.empty(offset + torch.Size(shape).numel())
                    x = memory[offset:].view(shape).requires_grad_()
                    layer = batchnorm.torch.BatchNorm1d(shape[1], skip_nonfinite=skip_nonfinite)
                    layer(x).backward(torch.empty(shape))
    assert looked_at > 100
    print("All are Triton's own.")


if __name__ == "__main__":
    main()
