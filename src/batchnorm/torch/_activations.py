"""The activations that a layer applies itself, as modules and functions of torch.nn."""

import torch
import torch.nn.functional as F

from ._compat import is_as_its_class

MODULES = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU}
FUNCTIONS = {"relu": F.relu, "silu": F.silu}
_NAMES = {module: name for name, module in MODULES.items()}


def name_of(module: torch.nn.Module) -> str | None:
    """Which of them the module is; None if it is another, or does more when it is called."""
    return _NAMES.get(type(module)) if is_as_its_class(module) else None


def apart(module: torch.nn.Module, activation: str | None) -> torch.nn.Module:
    """The module, and the activation as one of its own after it."""
    if activation is None:
        return module
    return torch.nn.Sequential(module, MODULES[activation]()).train(module.training)
