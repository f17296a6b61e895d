"""Time batch normalization in JAX, jitted: batchnorm.jax and batchnorm.flax.nn beside flax.linen.

A call is one step of a layer: parameters and running statistics go in, and the output and the new
statistics come out; backward, the gradients too. All run in turn in one process; the ratio theirs /
ours is formed in each round, and its median is printed with the median times. A fresh array of many
megabytes costs page faults, more of them or fewer by what was freed before: the program starts
itself again with an allocator that keeps what is freed, for all alike. --default-allocator measures
without that.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import batchnorm
import batchnorm.jax
from batchnorm.flax import nn

SHAPES = [((16, 32), -1), ((32, 56, 56, 64), -1), ((32, 64, 56, 56), 1)]
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "500000000",
}

Layer = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


def layers(channels: int, axis: int) -> dict[str, tuple[Layer, Any]]:
    """Functions (parameters, state, x) -> (y, new state) with a first state, ours first."""
    zeros, ones = jnp.zeros(channels), jnp.ones(channels)

    def functional(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, batch = batchnorm.jax.batch_norm(x, **parameters, axis=axis)
        return y, batchnorm.jax.update_running(*state, batch, rate=0.01)

    def module(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        with nn.stateful(state) as new_state:
            y = nn.BatchNorm.call(parameters, x, axis=axis)
        return y, new_state

    def linen(**keywords: Any) -> Layer:
        layer = flax.linen.BatchNorm(False, axis=axis, **keywords)

        def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            variables = {"params": parameters, "batch_stats": state}
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return y, new["batch_stats"]

        return call

    named = {"mean": zeros, "var": ones}
    return {
        "batchnorm.jax": (functional, (zeros, ones)),
        "batchnorm.flax.nn": (module, nn.Collection({"/": named})),
        "linen": (linen(), named),
        "linen, use_fast_variance=False": (linen(use_fast_variance=False), named),
    }


def calls(shape: tuple[int, ...], axis: int) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed, by the name of the call and of the layer."""
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
    channels = shape[axis]
    parameters = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}

    def step(layer: Layer) -> Callable[..., object]:
        def call(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> object:
            def function(parameters: Any, x: jax.Array) -> tuple[jax.Array, Any]:
                return layer(parameters, state, x)

            y, backward, new_state = jax.vjp(function, parameters, x, has_aux=True)
            return y, new_state, backward(dy)

        return call

    both: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward + backward": {}}
    for name, (layer, state) in layers(channels, axis).items():
        forward, training = jax.jit(layer), jax.jit(step(layer))
        both["forward"][name] = lambda f=forward, s=state: f(parameters, s, x)
        both["forward + backward"][name] = lambda f=training, s=state: f(parameters, s, x, dy)
    return both


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """The median time of each, and the median of its ratio to the first."""
    times = []
    for warm in range(-3, rounds):
        each = {name: seconds(call) for name, call in timed.items()}
        if warm >= 0:
            times.append(each)
    ours = next(iter(timed))
    return {
        name: (
            statistics.median(each[name] for each in times),
            statistics.median(each[name] / each[ours] for each in times),
        )
        for name in timed
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--default-allocator", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_allocator and ALLOCATOR.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    gc.disable()
    table = Table(
        title=f"JAX {jax.__version__} on {jax.default_backend()}, float32, jitted. "
        + batchnorm.native_status()
    )
    for column in ("x", "call", "layer", "ms", "× batchnorm.jax"):
        text = column in ("x", "call", "layer")
        table.add_column(column, justify="left" if text else "right")
    for shape, axis in SHAPES:
        rounds = arguments.rounds * (30 if np.prod(shape) < 2**20 else 1)
        for call, timed in calls(shape, axis).items():
            for name, (median, ratio) in measure(timed, rounds).items():
                table.add_row(str(shape), call, name, f"{median * 1e3:.3f}", f"{ratio:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
