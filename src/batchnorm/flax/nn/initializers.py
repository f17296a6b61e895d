"""The initializers of jax.nn, a module here as they were in the old flax.nn."""

from jax.nn.initializers import *  # noqa: F403
