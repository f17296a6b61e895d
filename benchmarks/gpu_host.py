"""Time what a layer for GPUs costs the host, without a GPU: kernels are launched that do nothing.

    python benchmarks/gpu_host.py

Beside it, on the same machine, torch.nn's layer in whole, on the CPU: at (16, 32) its arithmetic
costs next to nothing, and its way through Python, the dispatcher and autograd is the same on a GPU.
What a launch costs below Python, in the driver, is not in our times. Needs triton.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate

import batchnorm.torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from gpu_code.absent_gpu import absent_gpu

SHAPES = {"one kernel": (16, 32), "three kernels": (16_384, 32)}
TARGETS = {"forward": 2.0, "forward + backward": 1.3}
ROUNDS, CALLS = 40, 100


def forward(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def both(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    inputs = [x, layer.weight, layer.bias]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def times(*calls: Callable[[], object]) -> list[list[float]]:
    """Those of each round, in which the calls take turns."""
    for call in calls:
        microseconds(call)
    return [[microseconds(call) for call in calls] for _ in range(ROUNDS)]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with absent_gpu("sm_90"):
        small = torch.randn(SHAPES["one kernel"])
        for name, make in (("forward", forward), ("forward + backward", both)):
            theirs = make(torch.nn.BatchNorm1d(32), small.requires_grad_(), torch.ones_like(small))
            for kernels, shape in SHAPES.items():
                x = torch.randn(shape, requires_grad=True)
                ours = make(batchnorm.torch.BatchNorm1d(32), x, torch.ones_like(x))
                found = times(theirs, ours)
                least = [min(each) for each in zip(*found, strict=True)]
                ratio = median(our / their for their, our in found)
                target = TARGETS[name] if kernels == "one kernel" else ""
                rows.append([name, kernels, *least, ratio, target])
    headers = ["", "ours is", "torch.nn, µs", "ours, µs", "ratio", "at most"]
    print(tabulate(rows, headers, floatfmt=("", "", ".0f", ".0f", ".2f", ".1f")))


if __name__ == "__main__":
    main()
