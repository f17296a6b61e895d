"""`equinox.nn.BatchNorm`, computed by `batchnorm.jax`."""

import dataclasses
from typing import Any, Literal, TypeVar

from .installation import missing

try:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
except ModuleNotFoundError as error:
    raise missing("batchnorm.equinox", "Equinox", "equinox") from error

from . import checks, layers
from . import jax as door
from .conventions import CONVENTIONS
from .ndarrays import converted

__all__ = ["BatchNorm", "convert", "revert"]

__dir__ = __all__.copy  # public names alone

_CONVENTION = CONVENTIONS["equinox"]
Model = TypeVar("Model")


class BatchNorm(eqx.nn.BatchNorm):
    """Batch normalization in the place of `equinox.nn.BatchNorm`, and one itself.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` of one example,
    within `jax.vmap` or `jax.pmap`, where mean and population variance are those of the whole batch
    [1]_. The leaves of the layer and of its state are those of Equinox's layer.

    Parameters
    ----------
    input_size : int
        The number of channels, which are the first axis of an example.
    axis_name : hashable or sequence of hashables
        The mapped axis, or axes, of the batch.
    eps : float
        Added to the variance, inside the root; within [1e-37, 1e30].
    channelwise_affine : bool
        Whether there are parameters `weight` and `bias`.
    momentum : float within [0, 1]
        The weight of the old value in the running averages.
    inference : bool
        Whether to normalize by the running averages, which then stay.
    dtype
        Of the parameters and the running averages.
    mode : "batch", "ema" or "legacy"
        With "batch", training normalizes by the batch; with "ema", by the running averages, which
        begin with those of the first batch. "legacy" is "ema", with a warning.
    activation : None, "relu" or "silu"

    Notes
    -----
    With mode="batch", the running mean begins with 0 and the running variance with 1. Of both,
    inference takes out what is left of these beginnings, ``momentum ** steps``: after the first
    step they are those of its batch, but for rounding: while the 1 is still there, the variance is
    known to 3e-8 / (1 - momentum), of averages in float32. Equinox divides both by
    ``1 - momentum ** steps``, which is right for the mean, but makes the variance
    ``momentum ** steps / (1 - momentum ** steps)`` too large: 99 after one step, 0.6 after a
    hundred. `revert` gives its layer, with the same leaves.

    Complex x is refused. A feature whose mask is nowhere true leaves its averages as they were; a
    batch in which no feature counts is not counted either. One counter serves all features: what
    is masked in some of them alone is counted for all.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import equinox as eqx
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.equinox import BatchNorm
    >>> layer, state = eqx.nn.make_with_state(BatchNorm)(2, axis_name="batch", mode="batch")
    >>> x = jnp.array([[1.0, 20.0], [3.0, 60.0]])
    >>> batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    >>> y, state = batched(x, state)
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> layer = eqx.nn.inference_mode(layer)
    >>> print(layer(x[0], state)[0].round(3))
    [-1. -1.]
    """

    activation: str | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Any,
        eps: float = _CONVENTION.eps,
        channelwise_affine: bool = True,
        momentum: float = _CONVENTION.momentum,
        inference: bool = False,
        dtype: Any = None,
        mode: Literal["ema", "batch", "legacy"] = "legacy",
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype, mode
        )
        self.activation = checks.activation(activation)

    @jax.named_scope("batchnorm.equinox.BatchNorm")
    def __call__(
        self,
        x: jax.Array,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | None = None,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalize one example of a batch and, in training, move the running averages.

        Parameters
        ----------
        x : array of shape (input_size, dim_1, ..., dim_N)
        state : equinox.nn.State
        key : ignored
        inference : bool, optional
            In the place of the attribute.
        mask : array that broadcasts to x, optional
            Which elements count in the statistics: bools, or weights >= 0.
        residual : array that broadcasts to x, optional
            Added before the activation.

        Returns
        -------
        y : array of the shape of x
        state : equinox.nn.State

        Raises
        ------
        TypeError
            If an argument is of the wrong type; if x is complex.
        ValueError
            If an argument is out of range or has the wrong shape.
        NameError
            If, in training, there is no axis `axis_name` here.
        """
        del key
        x = converted("x", x, jnp.asarray)
        checks.feature_axes(0, x.shape)
        checks.number_of_channels(x.shape[0], self.input_size, x.shape, name="input_size")
        inference = self.inference if inference is None else inference
        index: Any = self.batch_state_index if self.mode == "batch" else self.ema_state_index
        counter: Any = self.batch_counter if self.mode == "batch" else self.ema_first_time_index
        mean, var = state.get(index)
        parameters, dtype = (self.weight, self.bias), None
        if inference or self.mode == "ema":
            # As what Equinox normalizes by then has the averages' dtype.
            given = [each for each in (x, mean, *parameters) if each is not None]
            dtype = jnp.result_type(*given)
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=self.eps,
            momentum=self.momentum,
            axis=0,
            dtype=dtype,
            activation=self.activation,
            devices={"axis_name": self.axis_name},
        )
        if inference:
            if self.mode == "batch":
                mean, var = self._without_beginnings(mean, var, state.get(counter))
            return layers.normalize(settings, x, mean, var, *parameters, residual), state

        if self.mode == "batch":
            y, statistics = layers.batch_norm(settings, x, *parameters, residual, mask)
        else:
            statistics = layers.batch_statistics(settings, x, mask)
        # A batch is counted, or known to be the first, only if something in it counts.
        count, is_counted = state.get(counter), jnp.any(statistics.count > 0)
        new = layers.update_running(settings, mean, var, statistics)
        if self.mode == "batch":
            new_count = jnp.where(is_counted, count + 1, count)
        else:
            first = statistics.mean, statistics.var
            new = jnp.where(count, first[0], new[0]), jnp.where(count, first[1], new[1])
            y = layers.normalize(settings, x, *new, *parameters, residual)
            new_count = jnp.logical_and(count, ~is_counted)
        state = state.set(counter, new_count)
        return y, state.set(index, (new[0].astype(mean.dtype), new[1].astype(var.dtype)))

    def _without_beginnings(
        self, mean: jax.Array, var: jax.Array, steps: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Averages that began with 0 and 1, as if they had begun with the first batch."""
        momentum = jnp.asarray(self.momentum, jnp.promote_types(var.dtype, jnp.float32))
        left = momentum**steps  # a power of what is rounded further would be far off
        left = jnp.where(left < 1, left, 0)  # as they are, where there is nothing else yet
        return mean / (1 - left), jnp.maximum(var - left, 0) / (1 - left)


def convert(model: Model) -> Model:
    """A model with every `equinox.nn.BatchNorm` made one of ours.

    Leaves, and the state that belongs to the model, are the same.

    Parameters
    ----------
    model : PyTree

    Returns
    -------
    model : PyTree

    Raises
    ------
    TypeError
        If there is a subclass of `equinox.nn.BatchNorm` that is not ours, which may compute
        something else.

    Examples
    --------
    >>> import equinox as eqx
    >>> from batchnorm.equinox import convert
    >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    >>> type(convert(layer)).__module__
    'batchnorm.equinox'
    """

    def ours(path: Any, layer: Any) -> Any:
        if not isinstance(layer, eqx.nn.BatchNorm) or isinstance(layer, BatchNorm):
            return layer
        if type(layer) is not eqx.nn.BatchNorm:
            layers.refuse_subclass(
                _name(path), layer, "equinox.nn.BatchNorm", "batchnorm.equinox.BatchNorm"
            )
        return _of_class(BatchNorm, layer, activation=None)

    return _mapped(ours, model)


def revert(model: Model) -> Model:
    """A model with every BatchNorm of ours made an `equinox.nn.BatchNorm` again.

    Parameters
    ----------
    model : PyTree

    Returns
    -------
    model : PyTree

    Raises
    ------
    TypeError
        If there is a subclass of ours.
    ValueError
        If a layer has an activation, which Equinox's has not.
    """

    def reverted(path: Any, layer: Any) -> Any:
        if not isinstance(layer, BatchNorm):
            return layer
        if type(layer) is not BatchNorm:
            layers.refuse_subclass(
                _name(path), layer, "batchnorm.equinox.BatchNorm", "equinox.nn.BatchNorm"
            )
        if layer.activation is not None:
            raise ValueError(
                f"{_name(path)} has activation={layer.activation!r}, which equinox.nn.BatchNorm "
                f"has not. Make the layer without it, and call jax.nn.{layer.activation} after it."
            )
        return _of_class(eqx.nn.BatchNorm, layer)

    return _mapped(reverted, model)


def _mapped(function: Any, model: Model) -> Model:
    def is_layer(node: Any) -> bool:
        return isinstance(node, eqx.nn.BatchNorm)

    mapped: Model = jax.tree_util.tree_map_with_path(function, model, is_leaf=is_layer)
    return mapped


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the model"


def _of_class(kind: type, layer: Any, **others: Any) -> Any:
    """A layer of another class with the same fields, made as a module is when it is unflattened."""
    made: Any = object.__new__(kind)
    for field in dataclasses.fields(eqx.nn.BatchNorm):
        object.__setattr__(made, field.name, getattr(layer, field.name))
    for name, value in others.items():
        object.__setattr__(made, name, value)
    return made
