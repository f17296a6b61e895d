"""What is sick in a model."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import keras

from .. import checks
from ..documentation import documented
from ..tools import Report
from ..tools.inspection import inspect_model
from ..tools.observation import call_of
from ..tools.states import state
from ._observation import normalizations, observed
from .layers import BatchNormalization, tensor


@documented(model="keras.Layer")
def inspect(
    model: keras.Layer,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """... It is called with ``training=False``.

    Examples
    --------
    >>> import keras
    >>> from batchnorm.keras import inspect
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.1)])
    >>> [(each.kind, each.severity) for each in inspect(model).findings]
    [('momentum_convention', 'warning'), ('never_updated', 'info')]
    """
    checks.instance("model", model, keras.Layer)

    has_one_pass = keras.backend.backend() in ("numpy", "torch")
    states = [
        state(
            path,
            "keras",
            partial(_weight, layer),
            eps=layer.epsilon,
            momentum=layer.momentum,
            is_exact=isinstance(layer, BatchNormalization) or not has_one_pass,
            is_frozen=not layer.trainable,
            is_of_model=True,
        )
        for path, layer in normalizations(model).items()
        if layer.built
    ]
    return inspect_model(
        states, batches, lambda see: observed(model, see), call_of(model, forward, training=False)
    )


def _weight(layer: keras.Layer, name: str) -> Any:
    return tensor(getattr(layer, name, None))
