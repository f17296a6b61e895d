"""What comes to the normalizations of a model while it is called; tools/observation.py says how."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import keras
from keras import ops

from .. import checks, layers
from ..conventions import CONVENTIONS
from ..tools.observation import NormalizeBy, See, is_positive, plain, put, random_numbers_kept
from .layers import DOORS, door_of

_CONVENTION = CONVENTIONS["keras"]


def layers_of(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and all that it holds, however deep."""
    found: dict[int, keras.Layer] = {}
    left: list[Any] = [layer]
    while left:
        each = left.pop()
        if isinstance(each, keras.Layer) and id(each) not in found:
            found[id(each)] = each
            left += vars(each).values()
        elif isinstance(each, (list, tuple)):
            left += each
        elif isinstance(each, dict):
            left += each.values()
    return [*found.values()]


def normalizations(model: keras.Layer) -> dict[str, Any]:
    """By their paths: those of keras.layers and ours."""
    found: dict[str, Any] = {}
    for each in layers_of(model):
        if isinstance(each, keras.layers.BatchNormalization):
            path = each.path or each.name
            if not each.built:
                raise ValueError(
                    f"model must be built, but {path} is not. Call the model once before."
                )
            found[path if path not in found else f"{path} ({len(found)})"] = each
    return found


@contextmanager
def observed(model: Any, see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py. Other layers do as they are told: training=False, say.

    No variable changes in it. What Keras has compiled, as predict() does, passes it over.
    """
    backend = keras.backend.backend()
    if backend not in DOORS:
        raise ValueError(
            f"Keras' backend must be one of {' and '.join(DOORS)} to look at what comes to "
            f"BatchNormalization, but it is {backend!r}."
        )
    with ExitStack() as undo:
        undo.enter_context(random_numbers_kept())
        undo.enter_context(keras.StatelessScope())
        if backend == "torch":
            undo.enter_context(importlib.import_module("torch").no_grad())
        for path, layer in normalizations(model).items():
            put(undo, vars(layer), renorm=False, synchronized=False)
            put(undo, vars(layer), call=_observed(path, layer, layer.call, see, normalize_by))
        yield


def as_numpy(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):  # PyTorch's, for which Keras' own function warns
        tensor = tensor.detach().cpu()
        return (tensor if tensor.dtype.itemsize > 2 else tensor.float()).numpy()
    return ops.convert_to_numpy(tensor)


def _observed(
    path: str, layer: Any, call: Callable[..., Any], see: See, normalize_by: NormalizeBy
) -> Callable[..., Any]:
    parameters = signature(call)
    door = door_of(keras.backend.backend())

    def observed_call(*arguments: Any, **keywords: Any) -> Any:
        bound = parameters.bind(*arguments, **keywords)
        named = bound.arguments
        inputs = next(iter(named.values()))
        mask = named.get("mask", named.get("inputs_mask"))
        mask = None if mask is None else ops.expand_dims(mask, -1)
        settings = layers.Settings(door, _CONVENTION, layer.epsilon, layer.momentum, layer.axis)
        statistics = layers.batch_statistics(settings, inputs, mask)
        statistics = plain(path, statistics, as_numpy)
        named["training"] = normalize_by == "batch"
        y = call(*bound.args, **bound.kwargs)
        positive = None
        if getattr(layer, "activation", None) == "relu":
            features = checks.feature_axes(layer.axis, y.shape)
            positive = as_numpy(is_positive(y, features, mask))
        see(path, statistics, positive)
        return y

    return observed_call
