"""The layer in the place of `flax.linen.BatchNorm`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ... import checks, layers
from ... import jax as door
from ...conventions import CONVENTIONS
from ...layout import feature_shape
from ...ndarrays import converted

_CONVENTION = CONVENTIONS["flax"]


class BatchNorm(nn.BatchNorm):
    """Batch normalization in the place of `flax.linen.BatchNorm`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, or, with `use_running_average`,
    the running averages. In training these move, if the collection "batch_stats" is mutable:
    ``average = momentum * average + (1 - momentum) * new``. Names, order, shapes and dtypes of the
    variables are those of Linen's layer, as are the random keys of their initializers: checkpoints
    of the one are those of the other.

    Parameters
    ----------
    use_running_average : bool, optional
        Here, or in the call.
    axis : int or tuple of ints
        The feature axis or axes, over which there is no average.
    momentum : float within [0, 1]
        The weight of the old value in the running averages. It and epsilon may also be arrays
        without axes, traced or not; out of range, they count as NaN.
    epsilon : float
        Added to the variance, inside the root; within [1e-37, 1e30].
    dtype
        The dtype of the result; None for the one to which x, scale and bias promote.
    param_dtype
        That of scale and bias.
    use_bias, use_scale : bool
        Whether there are such parameters.
    bias_init, scale_init
        Their initializers.
    axis_name : hashable or tuple of hashables, optional
        The mapped axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` over whose devices the
        statistics are taken, exactly, except during initialization.
    axis_index_groups
        Groups of indices along that axis, each of which has statistics of its own.
    use_fast_variance : bool
        Without effect: the variance is always exact.
    force_float32_reductions : bool
        Whether the averages are float32, and not param_dtype. They are computed in float32 in any
        case.
    activation : None, "relu" or "silu"

    Notes
    -----
    Complex x is refused. What differs in numbers is where Linen's are not exact: a large mean, and
    devices with masks of different size. A feature whose mask is nowhere true leaves its averages
    as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import BatchNorm
    >>> layer = BatchNorm(use_running_average=False, momentum=0.5)
    >>> x = jnp.array([[1.0, 20.0], [3.0, 60.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(updates["batch_stats"]["mean"])
    [ 1. 20.]
    """

    activation: str | None = None

    @nn.compact
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
            Here, or as an attribute.
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
            If `use_running_average` is given twice or never, or an argument is out of range or has
            the wrong shape.
        NameError
            If there is no axis `axis_name` here.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = converted("x", x, jnp.asarray)
        features = checks.feature_axes(self.axis, x.shape)
        devices = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=features,
            dtype=self.dtype,
            activation=self.activation,
            devices={} if self.is_initializing() else devices,
        )
        shape = feature_shape(features, x.shape)
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)

        if use_running_average:
            return layers.normalize(settings, x, mean.value, var.value, scale, bias, residual)
        y, statistics = layers.batch_norm(settings, x, scale, bias, residual, mask)
        if not self.is_initializing():
            mean.value, var.value = layers.update_running(
                settings,
                mean.value,
                var.value,
                statistics,
                keeps_dtype=not self.force_float32_reductions,  # which may be a narrow one
            )
        return y
