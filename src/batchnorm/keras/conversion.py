"""From Keras' layers to ours, and back."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from ._observation import layers_of
from .layers import BatchNormalization, tensor


def convert(model: keras.Model) -> keras.Model:
    """A copy of a model with a BatchNormalization of ours for each of `keras.layers`.

    It is cloned by `keras.models.clone_model`, and has the same weights; it is not compiled.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential, as `clone_model` asks for.

    Returns
    -------
    model : keras.Model

    Raises
    ------
    TypeError
        If there is a layer that can't be replaced: a subclass of `keras.layers.BatchNormalization`
        that is not ours, which may compute something else, or a layer within one of another class.

    Examples
    --------
    >>> import keras
    >>> from batchnorm.keras import convert
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> type(convert(model).layers[0]).__module__
    'batchnorm.keras.layers'
    """

    def converted(layer: keras.Layer) -> keras.Layer:
        if type(layer) is keras.layers.BatchNormalization:
            return _clone(BatchNormalization, layer)
        _refuse_within(
            layer,
            lambda each: (
                isinstance(each, keras.layers.BatchNormalization)
                and not isinstance(each, BatchNormalization)
            ),
            "batchnorm.keras.BatchNormalization",
        )
        return _clone(type(layer), layer)

    return _cloned(model, converted)


def revert(model: keras.Model) -> keras.Model:
    """A copy of a model with a layer of `keras.layers` for each BatchNormalization of ours.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential.

    Returns
    -------
    model : keras.Model

    Raises
    ------
    ValueError
        If a layer has an activation, is called with a residual or is synchronized, none of which
        Keras' layer can with these backends.
    TypeError
        If there is a layer of ours within one of another class.
    """

    def reverted(layer: keras.Layer) -> keras.Layer:
        if type(layer) is not BatchNormalization:
            _refuse_within(
                layer,
                lambda each: isinstance(each, BatchNormalization),
                "keras.layers.BatchNormalization",
            )
            return _clone(type(layer), layer)
        if layer.activation is not None:
            raise ValueError(
                f"{layer.name} has activation={layer.activation!r}, which "
                "keras.layers.BatchNormalization has not. Make the model without it, with a "
                f'keras.layers.Activation("{layer.activation}") after the layer.'
            )
        if layer.synchronized:
            raise ValueError(
                f"{layer.name} has synchronized=True, which keras.layers.BatchNormalization has "
                f"not with the backend {keras.backend.backend()}. Set it to False before."
            )
        return _clone(keras.layers.BatchNormalization, layer)

    def call(layer: keras.Layer, *arguments: Any, **keywords: Any) -> Any:
        is_reverted = type(layer) is keras.layers.BatchNormalization
        if is_reverted and keywords.get("residual") is not None:
            raise ValueError(
                f"{layer.name} is called with a residual, which keras.layers.BatchNormalization "
                "does not take. Make the model with a keras.layers.Add after the layer."
            )
        return layer(*arguments, **keywords)

    return _cloned(model, reverted, call)


def _refuse_within(layer: keras.Layer, is_meant: Callable[[Any], bool], wanted: str) -> None:
    """Refuse a layer that is, or holds, one that is meant to be another, but stays by cloning."""
    for each in filter(is_meant, layers_of(layer)):
        kind = f"{type(each).__module__}.{type(each).__name__}"
        where = "" if each is layer else f", within {layer.name} of {type(layer).__name__}"
        raise TypeError(
            f"{each.name} is of {kind}{where}, which can't be replaced by cloning. Make it a "
            f"{wanted}, or a subclass of that, where it is created."
        )


def _cloned(
    model: keras.Model,
    clone_function: Callable[[keras.Layer], keras.Layer],
    call_function: Callable[..., Any] | None = None,
) -> keras.Model:
    """By clone_model, and with what that leaves out: weights, and which layers are trained."""
    kinds = {each.__name__ for each in type(model).__mro__}  # Keras' Functional has no public name
    if not isinstance(model, keras.Sequential) and "Functional" not in kinds:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(
            f"model must be a Functional or Sequential one, but got {kind}, which can't be cloned. "
            "Change the import where its layers are created."
        )
    pairs = []

    def cloned_layer(layer: keras.Layer) -> keras.Layer:
        pairs.append((layer, clone_function(layer)))
        return pairs[-1][1]

    options: dict[str, Any] = {"clone_function": cloned_layer, "recursive": True}
    if call_function is not None and not isinstance(model, keras.Sequential):
        options["call_function"] = call_function
    compiled = [each for each in layers_of(model) if getattr(each, "compiled", False)]
    try:
        for each in compiled:  # else the clone is, too, as far as its configuration goes
            each.compiled = False
        cloned = keras.models.clone_model(model, **options)
    finally:
        for each in compiled:
            each.compiled = True
    for new, old in zip(cloned.weights, model.weights, strict=True):
        new.assign(ops.copy(tensor(old)))  # as training may give up the memory of one model's
    for old, new in pairs:
        own: dict[str, Any] = {}
        if isinstance(old, keras.Layer):  # and no operation
            old.save_own_variables(own)
        if own:  # of which a layer may make something more when it loads them
            new.load_own_variables(own)
    _copy_trainable(model, cloned)
    return cloned


def _copy_trainable(model: keras.Layer, cloned: keras.Layer) -> None:
    cloned.trainable = model.trainable  # of all that it holds, too, which have their own below
    if isinstance(model, keras.Model):
        for pair in zip(model.layers, cloned.layers, strict=True):
            _copy_trainable(*pair)


def _clone(kind: Any, layer: keras.Layer) -> keras.Layer:
    cloned: keras.Layer = kind.from_config(layer.get_config())
    return cloned
