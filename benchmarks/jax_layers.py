"""Time batchnorm.jax and batchnorm.flax.nn beside flax.linen and flax.nnx, all jitted.

A call is one step of a layer: parameters and running statistics go in, and the output and the new
statistics come out; backward, the gradients too.
"""

from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import measure
import numpy as np
from measure import LAST, Work

import batchnorm
import batchnorm.jax
from batchnorm.flax import nn

Layer = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


def layers(channels: int, axis: int, evaluates: bool) -> dict[str, tuple[Layer, Any]]:
    """Functions (parameters, state, x) -> (y, new state) with a first state, ours first."""
    zeros, ones = jnp.zeros(channels), jnp.ones(channels)

    def functional(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        if evaluates:
            return batchnorm.jax.normalize(x, *state, **parameters, axis=axis), state
        y, batch = batchnorm.jax.batch_norm(x, **parameters, axis=axis)
        return y, batchnorm.jax.update_running(*state, batch, rate=0.01)

    def module(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        with nn.stateful(state, mutable=not evaluates) as new_state:
            y = nn.BatchNorm.call(parameters, x, use_running_average=evaluates, axis=axis)
        return y, new_state

    def linen(**keywords: Any) -> Layer:
        layer = flax.linen.BatchNorm(evaluates, axis=axis, **keywords)

        def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            variables = {"params": parameters, "batch_stats": state}
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return y, new["batch_stats"]

        return call

    def nnx(**keywords: Any) -> tuple[Layer, Any]:
        rngs = flax.nnx.Rngs(0)
        settings = {"axis": axis, "use_running_average": evaluates, **keywords}
        layer = flax.nnx.BatchNorm(channels, rngs=rngs, **settings)
        graph, parameters, state = flax.nnx.split(layer, flax.nnx.Param, ...)

        def call(given: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            own = flax.nnx.State({name: parameters[name].replace(given[name]) for name in given})
            layer = flax.nnx.merge(graph, own, state, copy=True)
            y = layer(x)
            return y, flax.nnx.split(layer, flax.nnx.Param, ...)[2]

        return call, state

    named = {"mean": zeros, "var": ones}
    sides = {
        "batchnorm.jax": (functional, (zeros, ones)),
        "batchnorm.flax.nn": (module, nn.Collection({"/": named})),
        "linen": (linen(), named),
        "nnx": nnx(),
    }
    if not evaluates:
        sides["linen, two passes"] = (linen(use_fast_variance=False), named)
        sides["nnx, two passes"] = nnx(use_fast_variance=False)
    return sides


def calls(each: Work, layout: str, call: str) -> measure.Calls:
    shape = each.shape_in(layout)
    axis = -1 if layout == LAST else 1
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2))
    parameters = {"scale": jnp.ones(shape[axis]), "bias": jnp.zeros(shape[axis])}

    def forward(layer: Layer) -> Callable[..., object]:
        return lambda parameters, state, x, dy: layer(parameters, state, x)

    def training(layer: Layer) -> Callable[..., object]:
        def step(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> object:
            def function(parameters: Any, x: jax.Array) -> tuple[jax.Array, Any]:
                return layer(parameters, state, x)

            y, backward, new_state = jax.vjp(function, parameters, x, has_aux=True)
            return y, new_state, backward(dy)

        return step

    def timed(layer: Layer, state: Any) -> Callable[[], object]:
        step = jax.jit((training if call == "forward + backward" else forward)(layer))
        return lambda: jax.block_until_ready(step(parameters, state, x, dy))

    evaluates = call == "evaluation"
    sides = {name: timed(*side) for name, side in layers(shape[axis], axis, evaluates).items()}
    return sides | measure.copies_of(np.asarray(x))


def main() -> None:
    arguments = measure.options(__doc__)
    found = []
    for each, layout in measure.work(arguments.quick):
        for call in ("forward", "forward + backward", "evaluation"):
            found += measure.results(
                "JAX", each, layout, call, calls(each, layout, call), quick=arguments.quick
            )
        jax.clear_caches()
    title = (
        f"JAX {jax.__version__}, Flax {flax.__version__}, jitted, float32. "
        + batchnorm.native_status()
    )
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
