"""Time `batchnorm.mlx.BatchNorm` beside `mlx.nn.BatchNorm`: forward, with gradients, in evaluation.

Both run in turn in one process; the ratio theirs / ours is formed in each round, and its median is
printed with the median times. A fresh array of many megabytes costs page faults, more of them or
fewer by what was freed before: the program starts itself again with an allocator that keeps what
is freed, for both sides alike. --default-allocator measures without that.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn
from rich.console import Console
from rich.table import Table

import batchnorm.mlx

SHAPES = [(16, 32), (128, 64), (64, 32, 16), (32, 16, 16, 32), (32, 56, 56, 64)]
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


Call = Callable[[mx.array], object]


def forward(layer: mlx.nn.Module) -> Call:
    return lambda x: layer(x)


def with_gradients(layer: mlx.nn.Module, dy: mx.array) -> Call:
    def call(x: mx.array) -> object:
        weight, bias = layer.weight, layer.bias

        def function(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
            layer.weight, layer.bias = weight, bias
            return [layer(x)]

        results = mx.vjp(function, [x, weight, bias], [dy])
        layer.weight, layer.bias = weight, bias
        return results

    return call


def calls(cls: type[mlx.nn.Module], x: mx.array, dy: mx.array) -> dict[str, Callable[[], object]]:
    """What is timed. Each call returns everything that a training step would evaluate."""
    functions = {
        "forward": (True, forward),
        "forward + backward": (True, partial(with_gradients, dy=dy)),
        "evaluation": (False, forward),
    }

    def timed(
        training: bool, function: Callable[..., Call], compiled: bool
    ) -> Callable[[], object]:
        layer = cls(x.shape[-1]).train(training)
        mx.eval(layer.parameters())
        call = function(layer)
        if compiled:
            call = mx.compile(call, inputs=layer.state, outputs=layer.state)
        return lambda: (call(x), layer.running_mean, layer.running_var)

    return {
        name + ", compiled" * compiled: timed(*each, compiled)
        for compiled in (False, True)
        for name, each in functions.items()
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Median times of theirs and ours, and the median ratio, of each call."""
    x, dy = mx.random.normal(shape), mx.random.normal(shape)
    mx.eval(x, dy)
    theirs, ours = (calls(cls, x, dy) for cls in (mlx.nn.BatchNorm, batchnorm.mlx.BatchNorm))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in theirs}
    for warm in range(-3, rounds):
        for name, pairs in times.items():
            pair = seconds(theirs[name]), seconds(ours[name])
            if warm >= 0:
                pairs.append(pair)
    return {
        name: (
            statistics.median(first for first, _ in pairs),
            statistics.median(second for _, second in pairs),
            statistics.median(first / second for first, second in pairs),
        )
        for name, pairs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--default-allocator", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_allocator and ALLOCATOR.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    gc.disable()
    table = Table(title=f"MLX {mx.__version__} on {mx.default_device()}, float32")
    for column in ("x", "call", "mlx.nn, ms", "ours, ms", "theirs / ours"):
        table.add_column(column, justify="left" if column in ("x", "call") else "right")
    for shape in SHAPES:
        small = mx.zeros(shape).size < 2**20
        results = measure(shape, arguments.rounds * (10 if small else 1))
        for name, (theirs, ours, ratio) in results.items():
            table.add_row(
                str(shape), name, f"{theirs * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{ratio:.2f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
