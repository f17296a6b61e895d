"""What is sick in a model of PyTorch."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from .. import checks
from ..documentation import documented
from ..tools import Report
from ..tools.inspection import inspect_model
from ..tools.observation import call_of
from ..tools.states import state
from ._layer import Layer
from ._observation import is_frozen, normalizations, observed


@documented(model="torch.nn.Module")
def inspect(
    model: torch.nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """...

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.9))
    >>> print(batchnorm.torch.inspect(model))
    warning: momentum_convention
      1: Momentum is 0.9, and is the weight of the new value here: the statistics are those of the \
last batches alone.
      → If it was meant as the weight of the old value, as other frameworks have it, give 0.1.
    <BLANKLINE>
    info: never_updated
      1: The layer is as in a new network: statistics, scale and bias.
      → Nothing, if this is an untrained network, or a new head.
    <BLANKLINE>
    1 normalization: warning in 1.
    """
    checks.instance("model", model, torch.nn.Module)

    states = [
        state(
            path,
            "torch",
            partial(_array, layer),
            eps=vars(layer)["eps"],
            momentum=getattr(layer, "momentum", None),
            is_exact=isinstance(layer, Layer),
            is_frozen=is_frozen(layer) or (_is_fixed(layer) and not _is_fixed(model)),
            is_of_model=True,
        )
        for path, layer in normalizations(model).items()
        if layer.running_mean is not None and layer.running_var is not None
    ]
    return inspect_model(states, batches, lambda see: observed(model, see), call_of(model, forward))


def _is_fixed(module: torch.nn.Module) -> bool:
    """Whether none of its parameters is trained: of a layer alone, it is frozen in this way."""
    parameters = [*module.parameters()]
    return bool(parameters) and not any(each.requires_grad for each in parameters)


def _array(layer: torch.nn.Module, name: str) -> Any:
    return getattr(layer, name, None)
