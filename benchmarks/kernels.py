"""Time the native kernels, through the NumPy door, as a ratio to a threaded copy of x.

The work is the 53 batch normalizations of ResNet-50 at batch 32: each shape once, its times counted
as often as the network has it. The unit is the faster of an ordinary copy and one past the cache,
on as many threads. Everything runs interleaved in one process, with outputs written to beforehand;
medians of the rounds are printed.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import batchnorm
from batchnorm.native import _cpu
from batchnorm.numpy import _address, _addresses, _Call, batch_norm

# (height and width, channels): how many of the 53
RESNET50 = {
    (112, 64): 1,
    (56, 64): 6,
    (56, 256): 4,
    (56, 128): 1,
    (28, 128): 7,
    (28, 512): 5,
    (28, 256): 1,
    (14, 256): 11,
    (14, 1024): 7,
    (14, 512): 1,
    (7, 512): 5,
    (7, 2048): 4,
}
OTHERS = {"(8192, 1024)": (8192, 1024), "(32, 4096, 128)": (32, 4096, 128), "(16, 32)": (16, 32)}
LARGE = {"1.6 GB NHWC": (512, 56, 56, 256)}
STAGES = ["statistics", "normalize", "forward", "gradient_sums", "input_gradient", "backward"]
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Copy = Callable[[np.ndarray, np.ndarray, int, bool], None]


def compiled_copy() -> Copy:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/copy.so"
        sources = [here / "copy.cc", here.parent / "csrc/parallel.cc"]
        options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        include = f"-I{here.parent / 'csrc'}"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *options, include, *sources, "-o", library], check=True)
        function = ctypes.CDLL(library).copy
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_int, ctypes.c_int]

    def copy(to: np.ndarray, source: np.ndarray, threads: int, streaming: bool) -> None:
        function(_address(to), _address(source), source.nbytes, threads, streaming)

    return copy


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


def functions_of(
    shape: tuple[int, ...], axis: int, copy: Copy, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """The copies and each kernel, as functions without arguments that allocate nothing like x."""
    random, dtype = np.random.default_rng(0), DTYPES[options.dtype]

    def normal() -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(dtype)

    x, dy, y, dx = normal(), normal(), normal(), normal()
    residual = normal() if options.residual else None
    mask = None
    if options.mask:
        one = [1 if i == axis % len(shape) else size for i, size in enumerate(shape)]
        mask = random.random(one) < 0.8
    channels = shape[axis]
    scale, bias = np.ones(channels), np.zeros(channels)
    call = _Call(x, scale, bias, axis, 1e-5, mask, residual, options.activation)
    moments, _ = call.new_statistics()
    problem, addresses = call.native_arguments(), _addresses(moments)
    sums = np.empty((2, channels))
    dresidual = _address(normal()) if options.residual else 0
    to_y, to_dx, from_dy, to_sums = _address(y), _address(dx), _address(dy), _addresses(sums)
    keep = (x, dy, y, dx, residual, mask, call, moments, sums)
    backward = (*problem, *addresses)
    return {
        "copy": lambda: copy(y, x, options.threads, False),
        "copy past the cache": lambda: copy(y, x, options.threads, True),
        "statistics": lambda: (_cpu.statistics(*problem, *addresses), keep),
        "normalize": lambda: _cpu.normalize(*problem, *addresses[1:], to_y),
        "forward": lambda: _cpu.batch_norm(*problem, *addresses, to_y),
        "gradient_sums": lambda: _cpu.gradient_sums(*problem, *addresses[1:], from_dy, *to_sums),
        "input_gradient": lambda: _cpu.input_gradient(
            *backward, *to_sums, from_dy, to_dx, dresidual
        ),
        "backward": lambda: _cpu.batch_norm_gradients(
            *backward, from_dy, *to_sums, to_dx, dresidual
        ),
    }


def times_of(functions: dict[str, Callable[[], object]], limit: float) -> dict[str, float]:
    """Medians over interleaved rounds, about `limit` seconds of them, at least five."""
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < 6 or time.perf_counter() - start < limit:
        rounds.append({name: seconds(function) for name, function in functions.items()})
    times = {name: statistics.median(each[name] for each in rounds[1:]) for name in functions}
    times["copy"] = min(times["copy"], times["copy past the cache"])
    return times


def work(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Label, shape, axis and count of each tensor; 0 of those outside the network."""
    layouts = ["NHWC", "NCHW"] if options.layout == "both" else [options.layout]
    for layout in layouts:
        for (size, channels), count in RESNET50.items():
            if layout == "NHWC":
                shape, axis = (32, size, size, channels), -1
            else:
                shape, axis = (32, channels, size, size), 1
            yield f"{layout} {size} x {size} x {channels}", shape, axis, count
    if not options.quick:
        for label, shape in (OTHERS | (LARGE if options.large else {})).items():
            yield label, shape, -1, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each shape (default: 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=["NHWC", "NCHW", "both"], default="both")
    parser.add_argument("--activation", choices=["relu", "silu"])
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--mask", action="store_true")
    parser.add_argument("--quick", action="store_true", help="little time, only the network's")
    parser.add_argument("--large", action="store_true", help="a tensor of 1.6 GB, too")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.2

    batchnorm.set_num_threads(options.threads)
    copy = compiled_copy()
    columns = ("tensor", "count", "MB", "copy, ms", *STAGES, "KiB more")
    table = Table(
        title=f"{options.dtype}: ratio of times to a copy of x, {options.threads} threads"
    )
    for column in columns:
        table.add_column(column, justify="right")
    totals: dict[str, dict[str, float]] = {}
    for label, shape, axis, count in work(options):
        functions = functions_of(shape, axis, copy, options)
        extra = growth_of_memory(lambda f=functions: [function() for function in f.values()])
        times = times_of(functions, options.seconds)
        ratios = [f"{times[name] / times['copy']:.2f}" for name in STAGES]
        megabytes = f"{np.prod(shape) * DTYPES[options.dtype].itemsize / 1e6:.1f}"
        table.add_row(
            label, str(count), megabytes, f"{1e3 * times['copy']:.3f}", *ratios, str(extra)
        )
        if count:
            total = totals.setdefault(label.split()[0], dict.fromkeys(times, 0.0))
            for name in times:
                total[name] += count * times[name]
    for layout, total in totals.items():
        ratios = [f"{total[name] / total['copy']:.2f}" for name in STAGES]
        table.add_row(f"{layout}: all", "53", "", f"{1e3 * total['copy']:.1f}", *ratios, "")

    console = Console(width=160)
    console.print(batchnorm.native_status())
    console.print(table)
    x, scale = np.ones((16, 32), np.float32), np.ones(32, np.float32)
    calls = [
        seconds(lambda: [batch_norm(x, scale, scale) for _ in range(1000)]) * 1e3 for _ in range(9)
    ]
    console.print(f"batch_norm on (16, 32) float32: {statistics.median(calls):.1f} µs a call")


if __name__ == "__main__":
    main()
