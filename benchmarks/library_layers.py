"""Time the layers for Linen, NNX, Equinox and Keras on JAX beside the libraries' own, all jitted.

A call is a step of training of one layer: parameters and running statistics go in, and the output,
the new statistics and the gradients come out. The functions of batchnorm.jax, which the layers are
over, are the measure. Equinox takes one example at a time, channels first, under jax.vmap.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import equinox
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import keras
import measure
import numpy as np
from measure import FIRST, LAST, Work

import batchnorm
import batchnorm.equinox
import batchnorm.flax.linen
import batchnorm.flax.nnx
import batchnorm.jax
import batchnorm.keras

Layer = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]  # (parameters, state, x)
Side = tuple[Layer, Any, Any]  # with its first parameters and state


def functions(shape: tuple[int, ...], axis: int) -> Side:
    def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, batch = batchnorm.jax.batch_norm(x, *parameters, axis=axis)
        return y, batchnorm.jax.update_running(*state, batch, rate=0.01)

    ones, zeros = jnp.ones(shape[axis]), jnp.zeros(shape[axis])
    return call, (ones, zeros), (zeros, ones)


def linen(module: Any, shape: tuple[int, ...], axis: int) -> Side:
    layer = module.BatchNorm(use_running_average=False, axis=axis)
    variables = layer.init(jax.random.key(0), jnp.ones(shape))

    def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        both = {"params": parameters, "batch_stats": state}
        y, new = layer.apply(both, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return call, variables["params"], variables["batch_stats"]


def nnx(module: Any, shape: tuple[int, ...], axis: int) -> Side:
    layer = module.BatchNorm(shape[axis], axis=axis, rngs=flax.nnx.Rngs(0))
    graph, parameters, state = flax.nnx.split(layer, flax.nnx.Param, ...)

    def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = flax.nnx.merge(graph, parameters, state, copy=True)
        y = layer(x)
        return y, flax.nnx.split(layer, flax.nnx.Param, ...)[2]

    return call, parameters, state


def by_examples(module: Any, shape: tuple[int, ...], axis: int) -> Side:
    made = equinox.nn.make_with_state(module.BatchNorm)
    layer, state = made(shape[axis], "batch", mode="batch")
    parameters, rest = equinox.partition(layer, equinox.is_inexact_array)

    def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = equinox.combine(parameters, rest)
        batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return batched(x, state)

    return call, parameters, state


def keras_layer(module: Any, shape: tuple[int, ...], axis: int) -> Side:
    layer = module.BatchNormalization(axis=axis, epsilon=1e-5)
    layer.build(shape)

    def call(parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return layer.stateless_call(parameters, state, x, training=True)

    parameters, state = layer.trainable_variables, layer.non_trainable_variables
    return call, [each.value for each in parameters], [each.value for each in state]


# Name, how a layer is called, our module, theirs, and in which layout.
LIBRARIES = [
    ("Linen", linen, batchnorm.flax.linen, flax.linen, LAST),
    ("NNX", nnx, batchnorm.flax.nnx, flax.nnx, LAST),
    ("Equinox", by_examples, batchnorm.equinox, equinox.nn, FIRST),
    ("Keras on JAX", keras_layer, batchnorm.keras, keras.layers, LAST),
]
WORK = [Work((32, 64, 56, 56)), Work((32, 256, 14, 14)), Work((16, 32))]


def calls(each: Work, layout: str, sides: dict[str, Side]) -> measure.Calls:
    random, shape = np.random.default_rng(0), each.shape_in(layout)
    x, dy = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2))

    def timed(layer: Layer, parameters: Any, state: Any) -> Callable[[], object]:
        @jax.jit
        def step(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> object:
            def function(parameters: Any, x: jax.Array) -> tuple[jax.Array, Any]:
                return layer(parameters, state, x)

            y, backward, new_state = jax.vjp(function, parameters, x, has_aux=True)
            return y, new_state, backward(dy)

        return lambda: jax.block_until_ready(step(parameters, state, x, dy))

    return {name: timed(*side) for name, side in sides.items()} | measure.copies_of(np.asarray(x))


def main() -> None:
    arguments = measure.options(__doc__)
    found = []
    for name, side_of, ours, theirs, layout in LIBRARIES:
        for each in WORK:
            axis = -1 if layout == LAST else 1
            shape = each.shape_in(layout)
            sides = {
                ours.__name__: side_of(ours, shape, axis),
                "batchnorm.jax": functions(shape, axis),
                theirs.__name__: side_of(theirs, shape, axis),
            }
            found += measure.results(
                "JAX libraries",
                each,
                layout,
                f"forward + backward, {name}",
                calls(each, layout, sides),
                quick=arguments.quick,
            )
            jax.clear_caches()
    title = (
        f"JAX {jax.__version__}, Flax {flax.__version__}, Equinox {equinox.__version__}, "
        f"Keras {keras.__version__}, jitted, float32. {batchnorm.native_status()}"
    )
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
