"""The layer in the place of `keras.layers.BatchNormalization`."""

import importlib
from typing import Any

import keras
from keras import ops

from .. import checks, layers
from ..arrays import namespace
from ..conventions import CONVENTIONS
from ..documentation import with_parameters_of

_CONVENTION = CONVENTIONS["keras"]
DOORS = ("jax", "torch")  # for Keras' backends of the same names


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization in the place of `keras.layers.BatchNormalization`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * gamma + beta + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, in training, which also moves
    the moving statistics, ``moving = momentum * moving + (1 - momentum) * new``; else the moving
    ones. Weights, their names and their order are those of Keras' layer.

    With the backends jax and torch, it is computed by `batchnorm`; with another, by Keras' own
    layer, and without activation and residual.

    Parameters
    ----------
    **keywords
        Those of `keras.layers.BatchNormalization`, which may also be given by position.
    synchronized : bool
        By keyword: with the backend torch, whether statistics are those of all processes of
        torch.distributed. With jax they are those of the whole batch in any case, however it is
        sharded.
    activation : None, "relu" or "silu"

    Notes
    -----
    A mask has one axis less than the inputs, and holds bools, or weights >= 0. What differs in
    numbers is where Keras' are not exact: a large mean, and masked batches. A feature whose mask is
    nowhere true leaves its moving statistics as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
    .. [2] Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
       Models", 2017, https://arxiv.org/abs/1702.03275: what `renorm` does.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.5)
    >>> x = np.array([[1.0, 20.0], [3.0, 60.0]], np.float32)
    >>> print(np.round(layer(x, training=True), 2))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.moving_mean.value)
    [ 1. 20.]
    """

    @with_parameters_of(keras.layers.BatchNormalization.__init__)
    def __init__(
        self,
        *arguments: Any,
        synchronized: bool = False,
        activation: str | None = None,
        **keywords: Any,
    ) -> None:
        if keras.backend.backend() in DOORS:
            super().__init__(*arguments, **keywords)
            # Which Keras refuses with these.
            self.synchronized = checks.boolean("synchronized", synchronized)
        else:
            super().__init__(*arguments, synchronized=synchronized, **keywords)
        self.activation = checks.activation(activation)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        residual: Any = None,
        inputs_mask: Any = None,
    ) -> Any:
        """Normalize the inputs and, in training, move the moving statistics.

        Parameters
        ----------
        inputs : tensor
        training : bool, optional
        mask : tensor of one axis less than the inputs, optional
            Which elements count in the statistics: bools, or weights >= 0.
        residual : tensor that broadcasts to the inputs, optional
            Added before the activation.
        inputs_mask : tensor, optional
            Where Keras puts the mask that the inputs carry if there is a residual.

        Returns
        -------
        outputs : tensor of the shape of the inputs, and the layer's compute_dtype

        Raises
        ------
        TypeError
            If an argument is of the wrong type; if the inputs are complex.
        ValueError
            If an argument is out of range or has the wrong shape.
        """
        mask = inputs_mask if mask is None else mask
        backend = keras.backend.backend()
        if backend not in DOORS:
            for name, value in (("activation", self.activation), ("residual", residual)):
                if value is not None:
                    raise ValueError(
                        f"{name} must be None with Keras' backend {backend!r}, for which Keras' "
                        f"own layer serves. The backends {' and '.join(DOORS)} take one."
                    )
            return super().call(inputs, training=training, mask=mask)
        if mask is not None:
            if len(mask.shape) != len(inputs.shape) - 1:
                return super().call(inputs, training=training, mask=mask)  # which says so
            checks.broadcasts(
                "mask", mask.shape, inputs.shape[:-1], "the inputs without their last axis"
            )
            mask = ops.expand_dims(mask, -1)
        if self.renorm:
            checks.fraction("renorm_momentum", self.renorm_momentum)
        inputs = ops.convert_to_tensor(inputs)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        checks.floating("inputs", dtype, not dtype.startswith("complex"))
        settings = layers.Settings(
            door_of(backend),
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=self.axis,
            dtype=getattr(namespace(inputs), self.compute_dtype),
            activation=self.activation,
            devices={"sync": True} if self.synchronized and backend == "torch" else {},
        )
        gamma, beta = map(tensor, (self.gamma, self.beta))
        if not (training and self.trainable):
            mean, var = map(tensor, (self.moving_mean, self.moving_variance))
            return layers.normalize(settings, inputs, mean, var, gamma, beta, residual)
        if not self.renorm:
            y, statistics = layers.batch_norm(settings, inputs, gamma, beta, residual, mask)
            _move(settings, self.moving_mean, self.moving_variance, statistics)
            return y

        # What corrects the normalization is known before it, and has no gradient.
        statistics = layers.batch_statistics(settings, ops.stop_gradient(inputs), mask)
        statistics = statistics._replace(var=ops.sqrt(statistics.var + self.epsilon))
        gamma, beta = self._corrected(gamma, beta, statistics.mean, statistics.var)
        y, _ = layers.batch_norm(settings, inputs, gamma, beta, residual, mask)
        _move(settings, self.moving_mean, self.moving_stddev, statistics)
        stddev, old = map(tensor, (self.moving_stddev, self.moving_variance))
        variance = ops.relu(ops.square(stddev) - self.epsilon)
        self.moving_variance.assign(ops.where(statistics.count > 0, variance, old))
        settings = settings._replace(momentum=self.renorm_momentum)
        _move(settings, self.renorm_mean, self.renorm_stddev, statistics)
        return y

    def _corrected(self, gamma: Any, beta: Any, mean: Any, stddev: Any) -> tuple[Any, Any]:
        """Scale and bias of (x̂·r + d)·gamma + beta, Batch Renormalization's Algorithm 1 [2]."""
        old_mean, old_stddev = map(tensor, (self.renorm_mean, self.renorm_stddev))
        old_stddev = ops.maximum(old_stddev, self.epsilon**0.5)
        r, d = stddev / old_stddev, (mean - old_mean) / old_stddev
        smallest, largest, farthest = map(self.renorm_clipping.get, ("rmin", "rmax", "dmax"))
        if smallest is not None:
            r = ops.maximum(r, smallest)
        if largest is not None:
            r = ops.minimum(r, largest)
        if farthest is not None:
            d = ops.clip(d, -farthest, farthest)
        if gamma is not None:
            r, d = r * gamma, d * gamma
        return r, d if beta is None else d + beta

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        if self.activation is not None:  # a key that Keras' layer does not know
            config["activation"] = self.activation
        return config


def _move(settings: layers.Settings, mean: Any, spread: Any, statistics: Any) -> None:
    """Move two variables, a mean and a variance or deviation, towards the batch's."""
    moved = layers.update_running(settings, tensor(mean), tensor(spread), statistics)
    mean.assign(moved[0])
    spread.assign(moved[1])


def door_of(backend: str) -> Any:
    return importlib.import_module(f"batchnorm.{backend}")


def tensor(variable: Any) -> Any:
    return None if variable is None else ops.convert_to_tensor(variable)
