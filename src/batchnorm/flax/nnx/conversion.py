"""From nnx's layers to ours, and back."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ... import checks, layers
from ._observation import become, normalizations
from .layers import BatchNorm

Model = TypeVar("Model")


def convert(
    model: Model,
    *,
    axis_name: Any = ...,
    axis_index_groups: Any = ...,
    momentum: Any = ...,
) -> Model:
    """Make every `flax.nnx.BatchNorm` of a model one of ours, where it is.

    The layers stay the same objects, with the same Variables: what is shared, sharded or observed
    by an optimizer stays so. It is for models outside of nnx's transformations, to which the class
    of a layer is part of the program.

    Parameters
    ----------
    model : nnx.Module, or what else holds some
    axis_name, axis_index_groups, momentum
        To set in all of these layers, if given.

    Returns
    -------
    model : the same

    Raises
    ------
    TypeError
        If there is a subclass of `flax.nnx.BatchNorm` that is not ours, which may compute something
        else, or momentum is no number. No layer has been changed then.
    ValueError
        If momentum is out of range, or axis_index_groups are given to a layer without an
        axis_name. No layer has been changed then.

    Examples
    --------
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import convert
    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> type(convert(model).layers[0]).__module__
    'batchnorm.flax.nnx.layers'
    """
    found = normalizations(model)
    for path, layer in found:
        if type(layer) is not nnx.BatchNorm and not isinstance(layer, BatchNorm):
            layers.refuse_subclass(
                path, layer, "flax.nnx.BatchNorm", "batchnorm.flax.nnx.BatchNorm"
            )
        name = layer.axis_name if axis_name is ... else axis_name
        if axis_index_groups is not ... and axis_index_groups is not None and name is None:
            raise ValueError(f"axis_index_groups needs an axis_name, but {path} has none.")
    if momentum is not ...:
        is_fraction = partial(checks.fraction, "momentum")
        momentum = layers.number("momentum", momentum, jnp.zeros(()), is_fraction)
        if isinstance(momentum, jax.Array) and hasattr(nnx, "data"):  # Flax 0.11 has none
            momentum = nnx.data(momentum)
    changed = {
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "momentum": momentum,
    }
    for _, layer in found:
        if not isinstance(layer, BatchNorm):
            become(layer, BatchNorm)
            layer.activation = None
        for name, value in changed.items():
            if value is not ...:
                setattr(layer, name, value)
    return model


def revert(model: Model) -> Model:
    """Make every BatchNorm of ours in a model a `flax.nnx.BatchNorm` again, where it is.

    Parameters
    ----------
    model : nnx.Module, or what else holds some

    Returns
    -------
    model : the same

    Raises
    ------
    TypeError
        If there is a subclass of ours. No layer has been changed then.
    ValueError
        If a layer has an activation, which Flax's has not. No layer has been changed then.
    """
    found = [each for each in normalizations(model) if isinstance(each[1], BatchNorm)]
    for path, layer in found:
        if type(layer) is not BatchNorm:
            layers.refuse_subclass(
                path, layer, "batchnorm.flax.nnx.BatchNorm", "flax.nnx.BatchNorm"
            )
        if layer.activation is not None:
            raise ValueError(
                f"{path} has activation={layer.activation!r}, which flax.nnx.BatchNorm has not. "
                f"Set it to None, and call flax.nnx.{layer.activation} after the layer."
            )
    for _, layer in found:
        del layer.activation
        become(layer, nnx.BatchNorm)
    return model
