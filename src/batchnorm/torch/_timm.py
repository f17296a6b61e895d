"""What `convert` makes of timm's batch normalizations, which carry `drop` and `act`.

These stay modules of the layer, and are looked at in each call: programs hook or replace them.
"""

from typing import Any

import timm.layers as theirs
import torch
from torch import Tensor

from ._activations import MODULES
from ._compat import has_hooks
from ._torchvision import FrozenBatchNorm2d
from .layers import BatchNorm2d, Layer, SyncBatchNorm

_ACTIVATIONS = {module: name for name, module in MODULES.items()}


class _Act(Layer):
    """Normalization, then drop, then act; all in one where these are no more than an activation."""

    @property
    def activation(self) -> str | None:  # type: ignore[override]
        drop, act = self._after()
        if type(drop) is not torch.nn.Identity or has_hooks(drop) or has_hooks(act):
            return None
        return _ACTIVATIONS.get(type(act))

    def forward(self, input: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        y = super().forward(input, *arguments, **keywords)
        if self.activation is None:
            for module in self._after():
                y = module(y)
        return y

    def _after(self) -> list[torch.nn.Module]:
        # What timm's own conversion has made may lack them.
        return [self._modules.get(name) or torch.nn.Identity() for name in ("drop", "act")]


class BatchNormAct2d(_Act, BatchNorm2d, theirs.BatchNormAct2d):  # type: ignore[misc]
    stands_for = theirs.BatchNormAct2d

    @classmethod
    def synchronized(cls) -> type[Layer]:
        return SyncBatchNormAct


class SyncBatchNormAct(_Act, SyncBatchNorm, theirs.BatchNormAct2d):  # type: ignore[misc]
    stands_for = theirs.SyncBatchNormAct


class FrozenBatchNormAct2d(_Act, FrozenBatchNorm2d, theirs.FrozenBatchNormAct2d):  # type: ignore[misc]
    stands_for = theirs.FrozenBatchNormAct2d


KINDS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
