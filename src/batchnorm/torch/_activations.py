"""The activations that a layer applies itself, as modules of torch.nn."""

import torch

MODULES = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU}


def apart(module: torch.nn.Module, activation: str | None) -> torch.nn.Module:
    """The module, and the activation as one of its own after it."""
    if activation is None:
        return module
    return torch.nn.Sequential(module, MODULES[activation]()).train(module.training)
