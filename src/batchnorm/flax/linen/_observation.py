"""What comes to the normalizations of a model as it is applied; tools/observation.py says how."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ... import checks, layers
from ... import jax as door
from ...conventions import CONVENTIONS
from ...tools.observation import NormalizeBy, See, is_positive, plain, random_numbers_kept

_CONVENTION = CONVENTIONS["flax"]


@contextmanager
def observed(see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py, outside of JAX's transformations.

    It is around whichever models are applied in it. Their other layers do as they are told there.
    """
    is_own_call = False

    def interceptor(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        nonlocal is_own_call
        layer, path = context.module, "/".join(context.module.path)
        if is_own_call or not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return call(*arguments, **keywords)
        own: Any = {"axis_name": None, "axis_index_groups": None}
        alone = layer.clone(parent=None, use_running_average=normalize_by == "running", **own)
        keywords = {key: each for key, each in keywords.items() if key != "use_running_average"}
        x = jnp.asarray(arguments[0] if arguments else keywords.pop("x"))
        features = checks.feature_axes(layer.axis, x.shape)
        mask = keywords.get("mask")
        settings = layers.Settings(
            door, _CONVENTION, layer.epsilon, layer.momentum, features, layer.dtype
        )
        statistics = plain(path, layers.batch_statistics(settings, x, mask))
        is_own_call = True
        try:
            y, _ = alone.apply(layer.variables, x, **keywords, mutable=["batch_stats"])
        finally:
            is_own_call = False
        positive = None
        if getattr(layer, "activation", None) == "relu":
            positive = np.array(is_positive(y, features, mask)).ravel()
        see(path, statistics, positive)
        return y

    with random_numbers_kept(), nn.intercept_methods(interceptor):
        yield
