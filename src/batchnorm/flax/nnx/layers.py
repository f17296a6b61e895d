"""The layer in the place of `flax.nnx.BatchNorm`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ... import checks, layers
from ... import jax as door
from ...conventions import CONVENTIONS
from ...documentation import with_parameters_of
from ...layout import feature_shape
from ...ndarrays import converted

_CONVENTION = CONVENTIONS["flax"]


class BatchNorm(nnx.BatchNorm):
    """Batch normalization in the place of `flax.nnx.BatchNorm`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, which also moves the running
    averages, ``average = momentum * average + (1 - momentum) * new``; or, with
    `use_running_average`, the running averages. The paths and the kinds of its Variables are those
    of Flax's layer.

    Parameters
    ----------
    num_features : int
    activation : None, "relu" or "silu"
    **keywords
        Those of `flax.nnx.BatchNorm`: use_running_average, axis, momentum, epsilon, dtype,
        param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups,
        promote_dtype, rngs, bias_metadata, scale_metadata; and use_fast_variance, without effect,
        as the variance is always exact. momentum and epsilon may also be arrays without axes,
        traced or not; out of range, they count as NaN.

    Notes
    -----
    Complex x is refused. What differs in numbers is where Flax's are not exact: a large mean,
    devices with masks of different size, and the running averages, which stay as they are kept,
    whatever `promote_dtype` makes of them. A feature whose mask is nowhere true leaves its averages
    as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import BatchNorm
    >>> layer = BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0, 20.0], [3.0, 60.0]])).round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.mean[...])
    [ 1. 20.]
    """

    @with_parameters_of(nnx.BatchNorm.__init__)
    def __init__(
        self, num_features: int, *, activation: str | None = None, **keywords: Any
    ) -> None:
        super().__init__(num_features, **keywords)
        self.activation = checks.activation(activation)

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
    ) -> jax.Array:
        """Normalize x and, in training, move the running averages.

        Parameters
        ----------
        x : array
            Of any number of axes.
        use_running_average : bool, optional
            In the place of the attribute.
        mask : array that broadcasts to x, optional
            Which elements count in the statistics: bools, or weights >= 0.
        residual : array that broadcasts to x, optional
            Added before the activation.

        Returns
        -------
        y : array of the shape of x

        Raises
        ------
        TypeError
            If an argument is of the wrong type; if x is complex.
        ValueError
            If `use_running_average` is given nowhere, or an argument is out of range or has the
            wrong shape.
        NameError
            If there is no axis `axis_name` here.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            return super().__call__(x, mask=mask)  # which says where to give it
        x = converted("x", x, jnp.asarray)
        features = checks.feature_axes(self.axis, x.shape)
        channels = math.prod(feature_shape(features, x.shape))
        checks.number_of_channels(channels, self.num_features, x.shape)
        mean, var = self.mean[...], self.var[...]
        scale, bias = (None if each is None else each[...] for each in (self.scale, self.bias))
        promote = getattr(self, "promote_dtype", None)  # Flax 0.11 has none
        if promote is not None:
            x, _, _, scale, bias = promote((x, mean, var, scale, bias), dtype=self.dtype)
        devices = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=features,
            dtype=self.dtype,
            activation=self.activation,
            devices=devices,
        )
        if use_running_average:
            return layers.normalize(settings, x, mean, var, scale, bias, residual)
        y, statistics = layers.batch_norm(settings, x, scale, bias, residual, mask)
        moved = layers.update_running(settings, mean, var, statistics)
        self.mean[...], self.var[...] = map(jax.lax.stop_gradient, moved)
        return y
