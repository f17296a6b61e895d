"""Time the native kernels, through the NumPy door, as a ratio to a threaded copy of x.

Everything runs interleaved in one process, with outputs allocated beforehand; the ratio of each
round is formed from times of that round, and the median of the rounds is printed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import batchnorm
from batchnorm.native import _cpu
from batchnorm.numpy import _address, _addresses, _Call, batch_norm

LAYOUTS = {"NHWC": ((32, 56, 56, 64), -1), "NCHW": ((32, 64, 56, 56), 1)}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def growth_of_memory(function: Callable[[], object]) -> int:
    """KiB by which the resident memory grows while the function runs, at the most (Linux)."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def stages(x: np.ndarray, axis: int, threads: int, pool: ThreadPoolExecutor) -> dict[str, Callable]:
    """The copy and each kernel, as functions without arguments that allocate nothing like x."""
    random = np.random.default_rng(1)
    y, dx = np.zeros_like(x) + 1, np.zeros_like(x) + 1  # written to: no page is new to a kernel
    dy = random.normal(size=x.shape).astype(x.dtype)
    call = _Call(x, np.ones(x.shape[axis]), np.zeros(x.shape[axis]), axis, 1e-5, None, None, None)
    moments, _ = call.new_statistics()
    sums = np.empty((2, x.shape[axis]))
    parts = list(zip(np.array_split(x, threads), np.array_split(y, threads), strict=True))

    def copy() -> None:
        list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

    return {
        "copy": copy,
        "statistics": lambda: _cpu.statistics(*call.native_arguments(), *_addresses(moments)),
        "normalize": lambda: _cpu.normalize(
            *call.native_arguments(), *_addresses(moments[1:]), _address(y)
        ),
        "forward": lambda: _cpu.batch_norm(
            *call.native_arguments(), *_addresses(moments), _address(y)
        ),
        "backward": lambda: _cpu.batch_norm_gradients(
            *call.native_arguments(),
            *_addresses(moments),
            _address(dy),
            *_addresses(sums),
            _address(dx),
            0,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds (default: 31)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    batchnorm.set_num_threads(options.threads)
    table = Table(
        title="(32, 56, 56, 64) float32: ratio of times to a copy of x "
        f"on {options.threads} threads, medians"
    )
    names = ["statistics", "normalize", "forward", "backward"]
    for column in ("layout", "copy, ms", *names, "KiB more"):
        table.add_column(column, justify="right")
    with ThreadPoolExecutor(options.threads) as pool:
        for label, (shape, axis) in LAYOUTS.items():
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            functions = stages(x, axis, options.threads, pool)
            extra = growth_of_memory(lambda functions=functions: [f() for f in functions.values()])
            rounds = [
                {name: seconds(function) for name, function in functions.items()}
                for _ in range(options.rounds)
            ]
            copy = statistics.median(each["copy"] for each in rounds)
            ratios = [statistics.median(r[name] / r["copy"] for r in rounds) for name in names]
            table.add_row(
                label, f"{1e3 * copy:.2f}", *(f"{ratio:.2f}" for ratio in ratios), str(extra)
            )

    console = Console()
    console.print(batchnorm.native_status())
    console.print(table)
    x, scale = np.ones((16, 32), np.float32), np.ones(32, np.float32)
    calls = [
        seconds(lambda: [batch_norm(x, scale, scale) for _ in range(1000)]) * 1e3
        for _ in range(options.rounds)
    ]
    console.print(f"batch_norm on (16, 32) float32: {statistics.median(calls):.1f} µs a call")


if __name__ == "__main__":
    main()
