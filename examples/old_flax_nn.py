"""The old flax.nn, for programs from before Linen: a file to import in its place, and to change.

    import old_flax_nn as nn  # was: from flax import nn

The module system and BatchNorm are those of batchnorm.flax.nn. Layers and functions have the names,
arguments, parameters and initial values of the old ones. Attention and ConvLSTM are not there.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import (  # noqa: F401
    celu,
    elu,
    gelu,
    glu,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    relu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    swish,
)
from jax.numpy import tanh

from batchnorm.flax.nn import *  # noqa: F403
from batchnorm.flax.nn import (
    Module,
    __getattr__,  # noqa: F401, it says what to use in the place of what is not there
    initializers,
    module_method,
)

zeros, ones = initializers.zeros, initializers.ones
lecun_normal = initializers.lecun_normal()
orthogonal = initializers.orthogonal()
embedding_normal = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


# Linear layers


class Dense(Module):
    def apply(
        self,
        inputs,
        features,
        bias=True,
        dtype=jnp.float32,
        precision=None,
        kernel_init=lecun_normal,
        bias_init=zeros,
    ):
        inputs = jnp.asarray(inputs, dtype)
        kernel = self.param("kernel", (inputs.shape[-1], features), kernel_init)
        y = jnp.matmul(inputs, kernel.astype(dtype), precision=precision)
        return y + self.param("bias", (features,), bias_init).astype(dtype) if bias else y


class DenseGeneral(Module):
    """Dense along several axes, with parameters of their own for each element of batch_dims."""

    def apply(
        self,
        inputs,
        features,
        axis=-1,
        batch_dims=(),
        bias=True,
        dtype=jnp.float32,
        kernel_init=lecun_normal,
        bias_init=zeros,
        precision=None,
    ):
        inputs = jnp.asarray(inputs, dtype)
        features = as_tuple(features)
        axis = tuple(each % inputs.ndim for each in as_tuple(axis))
        batch_dims = tuple(each % inputs.ndim for each in as_tuple(batch_dims))
        count = len(batch_dims)
        if {*batch_dims} != {*range(count)}:
            raise ValueError(f"batch_dims must be the first dimensions, got {batch_dims}.")
        batch = tuple(inputs.shape[each] for each in batch_dims)
        contracted = tuple(inputs.shape[each] for each in axis)
        size = math.prod(features)

        def flat(initializer, *flat_shape):
            def initialize(rng, shape):
                each = [initializer(rng, flat_shape, jnp.float32) for _ in range(math.prod(batch))]
                return jnp.array(each).reshape(shape)

            return initialize

        kernel_init = flat(kernel_init, math.prod(contracted), size)
        kernel = self.param("kernel", (*batch, *contracted, *features), kernel_init)
        y = lax.dot_general(
            inputs,
            kernel.astype(dtype),
            ((axis, tuple(range(count, count + len(axis)))), (batch_dims, tuple(range(count)))),
            precision=precision,
        )
        if not bias:
            return y
        bias = self.param("bias", (*batch, *features), flat(bias_init, size)).astype(dtype)
        return y + bias.reshape(*batch, *(1,) * (y.ndim - bias.ndim), *features)


class Conv(Module):
    def apply(
        self,
        inputs,
        features,
        kernel_size,
        strides=None,
        padding="SAME",
        input_dilation=None,
        kernel_dilation=None,
        feature_group_count=1,
        bias=True,
        dtype=jnp.float32,
        precision=None,
        kernel_init=lecun_normal,
        bias_init=zeros,
    ):
        inputs, kernel_size = jnp.asarray(inputs, dtype), as_tuple(kernel_size)
        shape = (*kernel_size, inputs.shape[-1] // feature_group_count, features)
        convolution = functools.partial(
            lax.conv_general_dilated,
            rhs=self.param("kernel", shape, kernel_init).astype(dtype),
            window_strides=strides or (1,) * len(kernel_size),
            padding=padding,
            lhs_dilation=input_dilation,
            rhs_dilation=kernel_dilation,
            dimension_numbers=features_last(len(kernel_size)),
            feature_group_count=feature_group_count,
            precision=precision,
        )
        y = of_batch_or_one(convolution, inputs, len(kernel_size))
        return y + self.param("bias", (features,), bias_init).astype(dtype) if bias else y


class ConvTranspose(Module):
    def apply(
        self,
        inputs,
        features,
        kernel_size,
        strides=None,
        padding="SAME",
        kernel_dilation=None,
        bias=True,
        dtype=jnp.float32,
        precision=None,
        kernel_init=lecun_normal,
        bias_init=zeros,
    ):
        inputs, kernel_size = jnp.asarray(inputs, dtype), as_tuple(kernel_size)
        shape = (*kernel_size, inputs.shape[-1], features)
        convolution = functools.partial(
            lax.conv_transpose,
            rhs=self.param("kernel", shape, kernel_init).astype(dtype),
            strides=strides or (1,) * len(kernel_size),
            padding=padding,
            rhs_dilation=kernel_dilation,
            dimension_numbers=features_last(len(kernel_size)),
            precision=precision,
        )
        y = of_batch_or_one(convolution, inputs, len(kernel_size))
        return y + self.param("bias", (features,), bias_init).astype(dtype) if bias else y


class Embed(Module):
    def apply(self, inputs, num_embeddings, features, embedding_init=embedding_normal):
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs must be integers, but their dtype is {inputs.dtype}.")
        return self.param("embedding", (num_embeddings, features), embedding_init)[inputs]

    @module_method
    def attend(self, query, **_):
        return query @ self.get_param("embedding").T


def as_tuple(numbers):
    return tuple(numbers) if np.iterable(numbers) else (numbers,)


def features_last(rank):
    spatial = string.digits[:rank]
    return (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")


def of_batch_or_one(convolution, inputs, rank):
    return convolution(inputs) if inputs.ndim > rank + 1 else convolution(inputs[None])[0]


# Normalization


class LayerNorm(Module):
    def apply(
        self,
        x,
        epsilon=1e-6,
        dtype=jnp.float32,
        bias=True,
        scale=True,
        bias_init=zeros,
        scale_init=ones,
    ):
        y = normalized(jnp.asarray(x, jnp.float32), -1, epsilon)
        y = y * self.param("scale", y.shape[-1:], scale_init) if scale else y
        y = y + self.param("bias", y.shape[-1:], bias_init) if bias else y
        return y.astype(dtype)


class GroupNorm(Module):
    def apply(
        self,
        x,
        num_groups=32,
        group_size=None,
        epsilon=1e-6,
        dtype=jnp.float32,
        bias=True,
        scale=True,
        bias_init=zeros,
        scale_init=ones,
    ):
        if (num_groups is None) == (group_size is None):
            raise ValueError(f"give num_groups or group_size, got {num_groups} and {group_size}.")
        channels = x.shape[-1]
        name, number = "num_groups", num_groups
        if num_groups is None:
            name, number = "group_size", group_size
        if number < 1 or channels % number:
            raise ValueError(f"{name} must divide the {channels} channels of x, got {number}.")
        groups = number if group_size is None else channels // number
        grouped = jnp.asarray(x, jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
        y = normalized(grouped, (*range(1, x.ndim - 1), -1), epsilon).reshape(x.shape)
        shape = (*(1,) * (x.ndim - 1), channels)
        y = y * self.param("scale", shape, scale_init) if scale else y
        y = y + self.param("bias", shape, bias_init) if bias else y
        return y.astype(dtype)


def normalized(x, axis, epsilon):
    mean, var = jnp.mean(x, axis, keepdims=True), jnp.var(x, axis, keepdims=True)
    return (x - mean) * lax.rsqrt(var + epsilon)


# Recurrent cells, for jax.lax.scan


class LSTMCell(Module):
    def apply(
        self,
        carry,
        inputs,
        gate_fn=sigmoid,
        activation_fn=tanh,
        kernel_init=lecun_normal,
        recurrent_kernel_init=orthogonal,
        bias_init=zeros,
    ):
        c, h = carry
        dense = Dense.partial(features=h.shape[-1], bias_init=bias_init)
        of_inputs = dense.partial(inputs=inputs, bias=False, kernel_init=kernel_init)
        of_h = dense.partial(inputs=h, kernel_init=recurrent_kernel_init)
        i, f, g, o = (of_inputs(name=f"i{gate}") + of_h(name=f"h{gate}") for gate in "ifgo")
        c = gate_fn(f) * c + gate_fn(i) * activation_fn(g)
        h = gate_fn(o) * activation_fn(c)
        return (c, h), h

    @staticmethod
    def initialize_carry(rng, batch_dims, size, init_fn=zeros):
        c, h = (init_fn(key, (*batch_dims, size)) for key in jax.random.split(rng))
        return c, h


class OptimizedLSTMCell(LSTMCell):
    """The same by its old name."""


class GRUCell(Module):
    def apply(
        self,
        carry,
        inputs,
        gate_fn=sigmoid,
        activation_fn=tanh,
        kernel_init=lecun_normal,
        recurrent_kernel_init=orthogonal,
        bias_init=zeros,
    ):
        h = carry
        dense = Dense.partial(features=h.shape[-1], bias_init=bias_init)
        of_inputs = dense.partial(inputs=inputs, kernel_init=kernel_init)
        of_h = dense.partial(inputs=h, bias=False, kernel_init=recurrent_kernel_init)
        r = gate_fn(of_inputs(name="ir") + of_h(name="hr"))
        z = gate_fn(of_inputs(name="iz") + of_h(name="hz"))
        n = activation_fn(of_inputs(name="in") + r * of_h(name="hn", bias=True))
        h = (1 - z) * n + z * h
        return h, h

    @staticmethod
    def initialize_carry(rng, batch_dims, size, init_fn=zeros):
        return init_fn(rng, (*batch_dims, size))


# Pooling


def max_pool(inputs, window_shape, strides=None, padding="VALID"):
    return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)


def avg_pool(inputs, window_shape, strides=None, padding="VALID"):
    # Zeros of the padding count, as they always did.
    return pool(inputs, 0.0, lax.add, window_shape, strides, padding) / math.prod(window_shape)


def pool(inputs, init, reduce_fn, window_shape, strides, padding):
    window, strides = (1, *window_shape, 1), (1, *(strides or (1,) * len(window_shape)), 1)
    if not isinstance(padding, str):
        padding = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(inputs, init, reduce_fn, window, strides, padding)


# Randomness

random_keys = contextvars.ContextVar("random_keys", default=None)


@contextlib.contextmanager
def stochastic(rng):
    """Make the keys of make_rng from rng. Enter it inside of what JAX transforms, not around it."""
    traced = isinstance(jax.random.fold_in(rng, 0), jax.core.Tracer)
    entered = random_keys.set((rng, itertools.count(1), traced))
    try:
        yield
    finally:
        random_keys.reset(entered)


def is_stochastic():
    return random_keys.get() is not None


def make_rng():
    if not is_stochastic():
        raise ValueError("make_rng and dropout without rng belong inside of nn.stochastic(rng).")
    rng, count, traced = random_keys.get()
    key = jax.random.fold_in(rng, next(count))
    if isinstance(key, jax.core.Tracer) and not traced:
        raise ValueError("Enter nn.stochastic(rng) inside of the function that JAX transforms.")
    return key


def dropout(inputs, rate, deterministic=False, rng=None):
    if rate == 0 or deterministic:
        return inputs
    kept = jax.random.bernoulli(make_rng() if rng is None else rng, 1 - rate, inputs.shape)
    return jnp.where(kept, inputs / (1 - rate), 0)
