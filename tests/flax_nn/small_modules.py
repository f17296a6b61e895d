"""Small modules that several tests use."""

import jax.numpy as jnp

from batchnorm.flax import nn


class Bias(nn.Module):
    def apply(self, x):
        return x + self.param("bias", jnp.shape(x), nn.initializers.ones)


class Dense(nn.Module):
    def apply(self, x, features):
        kernel = self.param("kernel", (x.shape[-1], features), nn.initializers.lecun_normal())
        bias = self.param("bias", (features,), nn.initializers.normal(0.1))
        return x @ kernel + bias


class Sum(nn.Module):
    """Keeps the running sum of its inputs, but for those that it sees during `init`."""

    def apply(self, x, collection=None):
        total = self.state("total", jnp.shape(x), nn.initializers.zeros, collection=collection)
        if not self.is_initializing():
            total.value += x
        return total.value


class Store(nn.Module):
    """Stores its input, and returns what it found."""

    def apply(self, x, collection):
        found = collection.retrieve()
        collection.store(x)
        return found
