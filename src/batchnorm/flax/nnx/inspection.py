"""What is sick in a model."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ...documentation import documented
from ...tools import Report
from ...tools.inspection import inspect_model
from ...tools.observation import call_of
from ...tools.states import state
from ._observation import normalizations, observed
from .layers import BatchNorm


@documented(model="nnx.Module, or what else holds some")
def inspect(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """...

    Examples
    --------
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import inspect
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    >>> model.layers[1].var[...] -= 2
    >>> [(each.layer, each.kind, each.severity) for each in inspect(model).findings]
    [('layers.1', 'negative_variance', 'severe')]
    """

    states = [
        state(
            path,
            "flax",
            partial(_value, layer),
            eps=layer.epsilon,
            momentum=layer.momentum,
            is_exact=isinstance(layer, BatchNorm) or not layer.use_fast_variance,
            is_of_model=True,
        )
        for path, layer in normalizations(model)
    ]
    return inspect_model(states, batches, lambda see: observed(model, see), call_of(model, forward))


def _value(layer: Any, name: str) -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else variable[...]
