"""What Opacus is told of our layers, where a program has imported it.

It knows by their exact types which layers mix the examples of a batch, and takes any other for one
that does not: a model would be trained without the privacy that it reports.
"""

import sys
from typing import Any

import torch

from ._activations import apart

_THEIRS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def tell_opacus(kind: type[torch.nn.Module]) -> None:
    """Let it refuse, and replace, layers of this class as it does those of torch.nn."""
    validator: Any = getattr(sys.modules.get("opacus.validators"), "ModuleValidator", None)
    if validator is None or kind in validator.VALIDATORS:
        return
    base = next(each for each in _THEIRS if issubclass(kind, each))

    def fix(layer: Any, **options: Any) -> torch.nn.Module:
        replaced: torch.nn.Module = validator.FIXERS[base](layer, **options)
        # Those of timm have their activation as a module.
        after = list(layer.children())
        if after:
            return torch.nn.Sequential(replaced, *after)
        return apart(replaced, layer.activation)

    validator.VALIDATORS[kind] = validator.VALIDATORS[base]
    validator.FIXERS[kind] = fix
