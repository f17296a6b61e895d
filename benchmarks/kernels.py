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

import numpy as np
from rich.console import Console
from rich.table import Table

import batchnorm
from batchnorm.native import _cpu
from batchnorm.numpy import _address, _addresses, _Call, batch_norm

SHAPES = {
    "NHWC (32, 56, 56, 64)": ((32, 56, 56, 64), -1),
    "NCHW (32, 64, 56, 56)": ((32, 64, 56, 56), 1),
}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def stages(x: np.ndarray, axis: int, threads: int, pool: ThreadPoolExecutor) -> dict[str, Callable]:
    """The copy and each kernel, as functions without arguments that allocate nothing like x."""
    random = np.random.default_rng(1)
    y, dx = np.empty_like(x), np.empty_like(x)
    dy = random.normal(size=x.shape).astype(x.dtype)
    call = _Call(x, np.ones(x.shape[axis]), np.zeros(x.shape[axis]), axis, 1e-5, None, None, None)
    _, addresses = call.new_statistics()
    sums = np.empty((2, x.shape[axis]))
    arguments = call.native_arguments()
    parts = list(zip(np.array_split(x, threads), np.array_split(y, threads), strict=True))

    def copy() -> None:
        list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

    def backward() -> None:
        _cpu.gradient_sums(*arguments, *addresses[1:], _address(dy), *_addresses(sums))
        _cpu.input_gradient(
            *arguments, *addresses, *_addresses(sums), _address(dy), _address(dx), 0
        )

    return {
        "copy": copy,
        "statistics": lambda: _cpu.statistics(*arguments, *addresses),
        "normalize": lambda: _cpu.normalize(*arguments, *addresses[1:], _address(y)),
        "forward": lambda: _cpu.batch_norm(*arguments, *addresses, _address(y)),
        "backward": backward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="timed rounds (default: 31)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    batchnorm.set_num_threads(options.threads)
    table = Table(title=f"float32, ratio to a copy of x on {options.threads} threads, median")
    names = ["statistics", "normalize", "forward", "backward"]
    for column in ("x", "copy, ms", *names):
        table.add_column(column, justify="left" if column == "x" else "right")
    with ThreadPoolExecutor(options.threads) as pool:
        for label, (shape, axis) in SHAPES.items():
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            functions = stages(x, axis, options.threads, pool)
            for function in functions.values():
                function()
            rounds = [
                {name: seconds(function) for name, function in functions.items()}
                for _ in range(options.rounds)
            ]
            copy = statistics.median(each["copy"] for each in rounds)
            ratios = [statistics.median(r[name] / r["copy"] for r in rounds) for name in names]
            table.add_row(label, f"{1e3 * copy:.2f}", *(f"{ratio:.2f}" for ratio in ratios))

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
