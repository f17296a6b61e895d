"""BatchNorm, as a module with parameters and state over `batchnorm.jax`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from ... import checks, layers
from ... import jax as door
from ...conventions import CONVENTIONS
from ...ndarrays import converted
from .collection import Collection
from .module import Initializer, Module
from .state import ModuleState

_CONVENTION = CONVENTIONS["flax"]


class BatchNorm(Module):
    """Batch normalization; `apply` says more."""

    def apply(
        self,
        x: Any,
        batch_stats: Collection | None = None,
        use_running_average: bool = False,
        axis: int | Sequence[int] = -1,
        momentum: float | jax.Array = _CONVENTION.momentum,
        epsilon: float | jax.Array = _CONVENTION.eps,
        dtype: Any = jnp.float32,
        bias: bool = True,
        scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
    ) -> jax.Array:
        """Normalize x by the statistics of the batch, or by their running averages.

        ``y = (x - mean) / sqrt(var + epsilon) * scale + bias``, with the population variance. Under
        `stateful`, or with `batch_stats`, a call that is no initialization moves the averages:
        ``average = momentum * average + (1 - momentum) * new``. They begin with 0 and 1.

        Parameters
        ----------
        x
            The input, of any number of dimensions. It is computed in float32, or in float64 if it
            is that.
        batch_stats
            A Collection for the running averages, in the place of the one of `stateful`.
        use_running_average
            Whether to normalize by the running averages, as in evaluation.
        axis
            The feature axis or axes, over which there is no average. The parameters and the
            averages have the shape of x along them, in the order of its dimensions.
        momentum
            The weight of the old value in the running averages, within [0, 1].
        epsilon
            Added to the variance, inside the root.
        dtype
            The dtype of the output.
        bias, scale
            Whether there are such parameters.
        bias_init, scale_init
            Their initializers.
        axis_name
            The mapped axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` over whose devices the
            statistics are taken, exactly, except during initialization.
        axis_index_groups
            Groups of indices along that axis, each of which has statistics of its own.

        Returns
        -------
        jax.Array
            Of the shape of x.

        Raises
        ------
        TypeError
            An argument is of the wrong type.
        ValueError
            There are no running averages to use, or an argument is out of range; x is complex.

        Examples
        --------
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.flax import nn
        >>> x = jnp.array([[1.0, 20.0], [3.0, 60.0]])
        >>> with nn.stateful() as state:
        ...     y, params = nn.BatchNorm.init(jax.random.PRNGKey(0), x)
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> with nn.stateful(state) as state:
        ...     y = nn.BatchNorm.call(params, x, momentum=0.5)
        >>> print(state["/"]["mean"])
        [ 1. 20.]
        """
        x = converted("x", x, jnp.asarray)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            # flax.nn.BatchNorm drops the imaginary part; its other errors are ValueErrors, too.
            raise ValueError(f"x must hold real numbers, but its dtype is {x.dtype}.")
        features = checks.feature_axes(axis, x.shape)
        shape = tuple(x.shape[each] for each in features)

        averages: tuple[ModuleState, ...] = ()
        if self.is_stateful() or batch_stats is not None:
            averages = (
                self.state("mean", shape, initializers.zeros, collection=batch_stats),
                self.state("var", shape, initializers.ones, collection=batch_stats),
            )
        parameters = (
            self.param("scale", shape, scale_init) if scale else None,
            self.param("bias", shape, bias_init) if bias else None,
        )
        devices = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=epsilon,
            momentum=momentum,
            axis=features,
            dtype=dtype,
            devices={} if self.is_initializing() else devices,
        )
        if use_running_average:
            if not averages:
                raise ValueError(
                    "when use_running_averages is True either use a stateful context or provide "
                    "batch_stats"
                )
            mean, var = averages
            return layers.normalize(settings, x, mean.value, var.value, *parameters)

        y, statistics = layers.batch_norm(settings, x, *parameters)
        if averages and not self.is_initializing():
            mean, var = averages
            moved = layers.update_running(settings, mean.value, var.value, statistics)
            mean.value, var.value = moved
        return y
