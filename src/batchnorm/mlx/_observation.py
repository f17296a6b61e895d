"""What comes to the normalizations of a model while it is called; tools/observation.py says how."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..tools.observation import NormalizeBy, See, is_positive, plain, put, random_numbers_kept
from ._compat import TheirLayer, random_state_kept
from .functions import batch_statistics
from .layers import BatchNorm


def normalizations(model: Any) -> dict[str, Any]:
    """By their paths: those of mlx.nn and ours, in the model's order, which MLX turns round."""
    modules = reversed(_modules(model))
    found = ((path, each) for path, each in modules if isinstance(each, TheirLayer))
    return dict({id(each): (path, each) for path, each in found}.values())


@contextmanager
def observed(model: Any, see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py. A function that mx.compile has made passes it over."""
    with ExitStack() as undo:
        undo.enter_context(random_state_kept())
        undo.enter_context(random_numbers_kept())
        for _, each in reversed(_modules(model)):  # a model's mode is set before those within it
            undo.callback(each.train, each.training)
        model.train(False)
        for path, layer in normalizations(model).items():
            undo.callback(_become, layer, type(layer))
            _become(layer, _observed(path, type(layer), see))
            if normalize_by == "batch":
                put(undo, vars(layer), track_running_stats=False)
        yield


def _modules(model: Any) -> list[tuple[str, Any]]:
    modules: list[tuple[str, Any]] = model.named_modules()
    return modules


def _become(layer: Any, kind: type) -> None:
    object.__setattr__(layer, "__class__", kind)  # no parameter of the module


def _observed(path: str, kind: Any, see: See) -> type:
    """Such a layer, whose calls are seen."""

    def call(layer: Any, x: mx.array, *others: Any, **keywords: Any) -> mx.array:
        mask = activation = None
        if isinstance(layer, BatchNorm):
            mask = others[1] if len(others) > 1 else keywords.get("mask")
            activation = layer.activation
        statistics = plain(path, batch_statistics(x, mask=mask))
        layer.train(False)  # whatever the model has set meanwhile
        y: mx.array = kind.__call__(layer, x, *others, **keywords)
        positive = None
        if activation == "relu":
            positive = np.array(is_positive(y, (y.ndim - 1,), mask))
        see(path, statistics, positive)
        return y

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
