"""What the benchmarks share: the work, the clock, and the form of the results.

A program times its sides in turn in one process, round after round, in another order each, and
keeps the median time of each and the median of its ratio to ours, formed in each round: other work
on the machine then slows all sides alike. A fresh array of many megabytes costs page faults, more
of them or fewer by what was freed before: a program starts itself again with an allocator that
keeps what is freed, for all sides alike.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from batchnorm.native import kernels

# One arena, since those of threads other than the first hold no array above 64 MB: it would have
# new memory at every call.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Those that the processor has, the widest first, but for what every x86-64 processor has.
INSTRUCTION_SETS = [each for each in kernels.instruction_sets() if each != "SSE2"] or ["SSE2"]
FIRST, LAST = "channels first", "channels last"
COPY, COPY_PAST_CACHE = "copy", "copy past the cache"


@dataclass(frozen=True)
class Work:
    """Batch normalizations of one shape, (N, C, ...): `times` of them in the set."""

    shape: tuple[int, ...]
    times: int = 0

    def shape_in(self, layout: str) -> tuple[int, ...]:
        n, c, *rest = self.shape
        return (n, c, *rest) if layout == FIRST else (n, *rest, c)


# He et al., "Deep Residual Learning for Image Recognition" (2015), table 1, with the stride in the
# 3 × 3 convolutions, on images of 224 × 224.
RESNET50 = [
    Work((32, channels, side, side), times)
    for channels, side, times in (
        (64, 112, 1),
        (64, 56, 6),
        (256, 56, 4),
        (128, 56, 1),
        (128, 28, 7),
        (512, 28, 5),
        (256, 28, 1),
        (256, 14, 11),
        (1024, 14, 7),
        (512, 14, 1),
        (512, 7, 5),
        (2048, 7, 4),
    )
]
OTHERS = [Work((8192, 1024)), Work((32, 128, 4096)), Work((16, 32))]
QUICK = [Work((32, 64, 56, 56)), Work((32, 256, 14, 14), 11), Work((16, 32))]

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Result:
    """A row of the record. `ratio` is this side's time over that of ours, in the same rounds."""

    framework: str
    layout: str
    shape: tuple[int, ...]
    times: int
    call: str
    side: str
    milliseconds: float
    ratio: float
    copies: float  # its time over that of copying x on as many threads


def options(description: str | None) -> argparse.Namespace:
    """The command line; and the program again, if it does not yet run with its allocator."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--default-allocator", action="store_true")
    sets = INSTRUCTION_SETS
    parser.add_argument(
        "--instruction-set", choices=sets, default=sets[0], help="of our kernels; the widest"
    )
    arguments = parser.parse_args()
    kernels.set_instruction_set(arguments.instruction_set)
    if not arguments.default_allocator and ALLOCATOR.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    gc.disable()
    return arguments


def work(quick: bool) -> Iterator[tuple[Work, str]]:
    for each in QUICK if quick else RESNET50 + OTHERS:
        for layout in (LAST, FIRST):
            if len(each.shape) > 2 or layout == LAST:
                yield each, layout


def library_path(name: str) -> Path:
    return Path(__file__).parent.parent / "build" / "benchmarks" / f"{name}.so"


@cache
def library(name: str, *sources: str, link: str | None = None) -> ctypes.CDLL | None:
    """C++ files of the project, compiled for this machine; None where that fails."""
    root, path = Path(__file__).parent.parent, library_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17", "-shared"]
    command += ["-fPIC", "-pthread", f"-I{root / 'csrc'}", *(str(root / each) for each in sources)]
    command += ["-o", str(path)] + [f"-l{link}"] * (link is not None)
    finished = subprocess.run(command, capture_output=True, text=True)
    return ctypes.CDLL(str(path)) if finished.returncode == 0 else None


def copies_of(x: np.ndarray, threads: int = THREADS, team: Any = None) -> Calls:
    """Two ways to copy x, into memory that has been written to: the faster is the unit.

    `team`: as the kernels take it.
    """
    compiled = library("copy", "benchmarks/copy.cc", "csrc/system/parallel.cc")
    assert compiled is not None, "benchmarks need a C++ compiler"
    bits = x.view(f"u{x.itemsize}")  # of bfloat16, too, which has no buffer
    y = np.ones_like(bits)
    to, source, size = y.ctypes.data, bits.ctypes.data, ctypes.c_int64(x.nbytes)
    pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
    start = None
    if team is not None:
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = (
            ctypes.c_void_p,
            [ctypes.py_object, ctypes.c_char_p],
        )
        start = ctypes.c_void_p(pointer_of(team, b"batchnorm.team"))

    def copy(past_the_cache: int) -> object:
        compiled.copy(*pointers, size, threads, past_the_cache, start)
        return x, y

    return {COPY: lambda: copy(0), COPY_PAST_CACHE: lambda: copy(1)}


def measure(calls: Calls, seconds: float) -> dict[str, list[float]]:
    """The times of each call, in as many rounds as fit into `seconds`: at least 5."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in [*calls.items()] * 2:
        times[name].append(_time(call))
    round_seconds = sum(min(each) for each in times.values())
    rounds = min(max(5, math.ceil(seconds / round_seconds)), 1000)
    times = {name: [] for name in calls}
    order, random = list(calls), Random(0)
    for _ in range(rounds):
        random.shuffle(order)  # what runs before leaves its data in the caches
        for name in order:
            times[name].append(_time(calls[name]))
    return times


def results(
    framework: str,
    each: Work,
    layout: str,
    call: str,
    calls: Calls,
    *,
    quick: bool,
    seconds: float = 0.5,
) -> list[Result]:
    """The results of one shape; the first call is ours, and those of `copies_of` the unit."""
    times = measure(calls, 0.2 if quick else seconds)
    copy = min((times.pop(COPY), times.pop(COPY_PAST_CACHE)), key=statistics.median)
    return results_of(framework, each, layout, call, {**times, "copy": copy})


def results_of(
    framework: str, each: Work, layout: str, call: str, times: dict[str, list[float]]
) -> list[Result]:
    """Of seconds in the same rounds, ours first; "copy", if it is there, is the unit."""
    ours = next(iter(times.values()))
    copy = times.get("copy")

    def ratio(side: list[float], unit: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(side, unit, strict=True))

    return [
        Result(
            framework,
            layout,
            each.shape,
            each.times,
            call,
            name,
            1e3 * statistics.median(side),
            ratio(side, ours),
            math.nan if copy is None else ratio(side, copy),
        )
        for name, side in times.items()
    ]


def show(found: list[Result], title: str, path: Path | None) -> None:
    table = Table(title=title)
    for column in ("shape", "layout", "call", "side"):
        table.add_column(column)
    for column in ("ms", "× ours", "× copy"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            str(each.shape),
            each.layout,
            each.call,
            each.side,
            f"{each.milliseconds:.3f}",
            f"{each.ratio:.2f}",
            f"{each.copies:.2f}",
        )
    Console(width=130).print(table)
    if path is not None:
        path.write_text(json.dumps({"title": title, "results": [asdict(each) for each in found]}))


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # not within the time: the next call's memory is this one's
    return seconds
