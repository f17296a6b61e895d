"""The layers for JAX's libraries under test: one row each, as pure functions of arrays.

Features are last in x. A mask has one element a row: the shape of x without its last axis.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import batchnorm.equinox
import batchnorm.flax.linen
import batchnorm.flax.nn
import batchnorm.flax.nnx
import batchnorm.keras

EPS, MOMENTUM = 1e-5, 0.75


@dataclass(frozen=True)
class Layer:
    """
    Attributes
    ----------
    call : (training, x, scale, bias, mean, var, mask, axis_name, **of_ours) -> y, mean, var
    has_devices : whether there is an axis_name, and state that may be made on a device
    takes_masks : whether there is a mask, which the old flax.nn has not
    """

    name: str
    call: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    has_devices: bool = True
    takes_masks: bool = True

    def train(self, x, scale, bias, mean=None, var=None, mask=None, axis_name=None, **of_ours):
        """y, and the averages moved; they begin with 0 and 1."""
        mean = jnp.zeros(x.shape[-1]) if mean is None else mean
        var = jnp.ones(x.shape[-1]) if var is None else var
        return self.call(True, x, scale, bias, mean, var, mask, axis_name, **of_ours)

    def evaluate(self, x, scale, bias, mean, var, **of_ours):
        y, *same = self.call(False, x, scale, bias, mean, var, None, None, **of_ours)
        return y, *same


def _flax_nn(training, x, scale, bias, mean, var, mask, axis_name):
    nn = batchnorm.flax.nn
    state = nn.Collection({"/": {"mean": mean, "var": var}})
    with nn.stateful(state) as moved:
        y = nn.BatchNorm.call(
            {"scale": scale, "bias": bias},
            x,
            use_running_average=not training,
            momentum=MOMENTUM,
            epsilon=EPS,
            axis_name=axis_name,
            dtype=x.dtype,
        )
    return y, moved["/"]["mean"], moved["/"]["var"]


def _linen(training, x, scale, bias, mean, var, mask, axis_name, activation=None, residual=None):
    layer = batchnorm.flax.linen.BatchNorm(
        not training,
        momentum=MOMENTUM,
        epsilon=EPS,
        axis_name=axis_name,
        dtype=x.dtype,
        activation=activation,
    )
    y, moved = layer.apply(
        {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}},
        x,
        mask=None if mask is None else mask[..., None],
        residual=residual,
        mutable=["batch_stats"],
    )
    return y, moved["batch_stats"]["mean"], moved["batch_stats"]["var"]


def _nnx(training, x, scale, bias, mean, var, mask, axis_name, activation=None, residual=None):
    layer = batchnorm.flax.nnx.BatchNorm(
        x.shape[-1],
        use_running_average=not training,
        momentum=MOMENTUM,
        epsilon=EPS,
        axis_name=axis_name,
        dtype=x.dtype,
        activation=activation,
        rngs=nnx.Rngs(0),
    )
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
    layer.mean, layer.var = nnx.BatchStat(mean), nnx.BatchStat(var)
    y = layer(x, mask=None if mask is None else mask[..., None], residual=residual)
    return y, layer.mean[...], layer.var[...]


def _equinox(training, x, scale, bias, mean, var, mask, axis_name, activation=None, residual=None):
    layer, state = eqx.nn.make_with_state(batchnorm.equinox.BatchNorm)(
        x.shape[-1],
        "example",
        momentum=MOMENTUM,
        eps=EPS,
        inference=not training,
        mode="batch" if training else "ema",  # in which inference takes averages as they are
        activation=activation,
    )
    layer = eqx.tree_at(lambda each: (each.weight, each.bias), layer, (scale, bias))
    index = layer.batch_state_index if training else layer.ema_state_index
    state = state.set(index, (mean, var))

    def one(x, mask, residual):
        mask = None if mask is None else mask[None]
        residual = None if residual is None else jnp.moveaxis(residual, -1, 0)
        y, moved = layer(jnp.moveaxis(x, -1, 0), state, mask=mask, residual=residual)
        return jnp.moveaxis(y, 0, -1).astype(x.dtype), moved.get(index)

    mapped = jax.vmap(one, out_axes=(0, None), axis_name="example")
    y, (mean, var) = mapped(x, mask, residual)
    return y, mean, var


def _keras(training, x, scale, bias, mean, var, mask, axis_name, activation=None, residual=None):
    policy = f"mixed_{x.dtype}" if x.dtype.itemsize < 4 else None
    layer = batchnorm.keras.BatchNormalization(
        momentum=MOMENTUM, epsilon=EPS, dtype=policy, activation=activation
    )
    layer.build(x.shape)
    y, (mean, var) = layer.stateless_call(
        [scale, bias], [mean, var], x, training=training, mask=mask, residual=residual
    )
    return y, mean, var


LAYERS = [
    Layer("flax.nn", _flax_nn, takes_masks=False),
    Layer("flax.linen", _linen),
    Layer("flax.nnx", _nnx),
    Layer("equinox", _equinox, has_devices=False),
    Layer("keras", _keras, has_devices=False),
]
