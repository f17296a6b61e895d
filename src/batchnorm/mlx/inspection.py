"""What is sick in a model of MLX."""

from collections.abc import Callable, Iterable
from typing import Any

from mlx.nn.layers.base import Module

from .. import checks
from ..documentation import documented
from ..tools import Report
from ..tools.inspection import inspect_model
from ..tools.observation import call_of
from ..tools.states import state
from ._observation import normalizations, observed
from .layers import BatchNorm


@documented(model="mlx.nn.Module")
def inspect(
    model: Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """...

    Examples
    --------
    >>> import mlx.core as mx
    >>> import mlx.nn as nn
    >>> import batchnorm.mlx
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm(8))
    >>> report = batchnorm.mlx.inspect(model, [100 + mx.random.normal((64, 4)) for _ in range(3)])
    >>> [(each.layer, each.kind, each.severity) for each in report.findings]
    [('layers.1', 'drift', 'severe'), ('layers.1', 'never_updated', 'info')]
    """
    checks.instance("model", model, Module)

    states = [
        state(
            path,
            "mlx",
            layer.get,
            eps=layer["eps"] if "eps" in layer else vars(layer)["eps"],
            momentum=layer.momentum,
            is_exact=isinstance(layer, BatchNorm),
            is_of_model=True,
        )
        for path, layer in normalizations(model).items()
        if layer.get("running_mean") is not None and layer.get("running_var") is not None
    ]
    return inspect_model(states, batches, lambda see: observed(model, see), call_of(model, forward))
