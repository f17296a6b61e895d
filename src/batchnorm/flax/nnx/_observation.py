"""What comes to the normalizations of a model while it is called; tools/observation.py says how."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ... import checks, layers
from ... import jax as door
from ...conventions import CONVENTIONS
from ...tools.observation import NormalizeBy, See, is_positive, plain, put, random_numbers_kept

_CONVENTION = CONVENTIONS["flax"]


def normalizations(model: Any) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path)) or "the model", module)
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.BatchNorm)
    ]


@contextmanager
def observed(model: Any, see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py, outside of JAX's and nnx's transformations."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    with ExitStack() as undo:
        undo.enter_context(random_numbers_kept())
        for each in nodes:
            if isinstance(each, nnx.RngState):
                undo.callback(each.__setitem__, ..., each[...])
            elif isinstance(each, nnx.Module) and "deterministic" in vars(each):
                put(undo, vars(each), deterministic=True)
        for path, layer in normalizations(model):
            undo.callback(become, layer, type(layer))
            become(layer, _observed(path, type(layer), see, normalize_by == "running"))
            put(undo, vars(layer), axis_name=None, axis_index_groups=None)
        yield


def become(layer: Any, kind: type) -> None:
    object.__setattr__(layer, "__class__", kind)  # no attribute of nnx's


def _observed(path: str, kind: Any, see: See, by_running: bool) -> type:
    """Such a layer, whose calls are seen."""

    def call(layer: Any, x: Any, *given: Any, **keywords: Any) -> Any:
        x = jnp.asarray(x)
        features = checks.feature_axes(layer.axis, x.shape)
        mask = keywords.get("mask")
        settings = layers.Settings(
            door, _CONVENTION, layer.epsilon, layer.momentum, features, layer.dtype
        )
        statistics = plain(path, layers.batch_statistics(settings, x, mask))
        if given or "use_running_average" in keywords:  # which some subclasses do not take
            keywords["use_running_average"] = by_running
        with ExitStack() as undo:
            put(undo, vars(layer), use_running_average=by_running)
            if not by_running:  # into Variables that are thrown away
                put(undo, vars(layer), mean=layer.mean.copy(), var=layer.var.copy())
            y = kind.__call__(layer, x, **keywords)
        positive = None
        if getattr(layer, "activation", None) == "relu":
            positive = np.array(is_positive(y, features, mask)).ravel()
        see(path, statistics, positive)
        return y

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
