"""What `convert` makes of the batch normalizations of timm and torchvision.

They are known by name, so that no library is imported here; and their classes of ours derive from
them as well, so that programs which look for them find them.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import checks
from ._activations import name_of
from ._compat import BatchNormBase, is_as_its_class
from ._layer import Layer, NormalizeBy
from .layers import BatchNorm2d, SyncBatchNorm


class _OfLibrary(Layer):
    """A layer of a class that is made for one of a library: copied and pickled by the latter."""

    bases: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return _new, (type(self).stands_for, self.bases), *state


class Act(_OfLibrary):
    """Normalization, then drop, then act; all in one where these are no more than an activation.

    They stay modules of the layer and are looked at in each call: programs hook and replace them.
    """

    @property
    def activation(self) -> str | None:  # type: ignore[override]
        drop, act = after_normalization(self)
        return name_of(act) if type(drop) is torch.nn.Identity and is_as_its_class(drop) else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        y = super().forward(x, residual, mask, activation=activation)
        if self.activation is None and not isinstance(y, Proxy):  # which stands for all of it
            for module in after_normalization(self):
                y = module(y)
        return y


class Frozen(_OfLibrary, BatchNorm2d):
    """A frozen layer, whose parameters are buffers."""

    weight: Any
    bias: Any
    normalize_by: NormalizeBy | None = "running"
    update_running: bool | None = False
    # What torch.nn's layers have, and torchvision's has not.
    num_batches_tracked = None
    momentum = 0.1
    affine = track_running_stats = True

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return len(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        return super().forward(x, residual, mask, activation=activation)

    @staticmethod
    def usable_eps(eps: Any) -> Any:
        return eps or checks.SMALLEST_EPS  # torchvision's own models have 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_features}, eps={vars(self)['eps']})"

    def reset_parameters(self) -> None:
        """Nothing, since there are none."""


_SYNC = (Act, SyncBatchNorm)
_BASES: dict[tuple[str, str], tuple[type, ...]] = {
    ("timm", "BatchNormAct2d"): (Act, BatchNorm2d),
    ("timm", "SyncBatchNormAct"): _SYNC,
    ("timm", "FrozenBatchNormAct2d"): (Act, Frozen),
    ("torchvision", "FrozenBatchNorm2d"): (Frozen,),
}


def after_normalization(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What a layer of timm's calls on its output, drop and act; nothing, in one of another kind."""
    # timm's own conversion makes layers that may lack them.
    found = dict(layer.named_children())
    return found.get("drop", torch.nn.Identity()), found.get("act", torch.nn.Identity())


def is_normalization(module: torch.nn.Module) -> bool:
    """Whether it is a batch normalization of torch.nn, timm, torchvision or ours."""
    return isinstance(module, BatchNormBase) or class_for(type(module)) is not None


def class_for(theirs: type) -> type[Layer] | None:
    """The class of ours for one of theirs; None if it is none that is known."""
    bases = _BASES.get((theirs.__module__.partition(".")[0], theirs.__name__))
    return None if bases is None else _class(theirs, bases)


def synchronized(kind: type[Layer]) -> type[Layer]:
    """The class of a layer of that class of ours which is to share its batch."""
    if issubclass(kind, SyncBatchNorm | Frozen):
        return kind
    theirs: Any = kind.stands_for
    return _class(theirs, _SYNC) if issubclass(kind, Act) else SyncBatchNorm


@functools.cache
def _class(theirs: Any, bases: tuple[type, ...]) -> type[Layer]:
    name = theirs.__name__
    if SyncBatchNorm in bases and not name.startswith("Sync"):
        name = f"Sync{name}"
    # No torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU.
    all_bases = bases if issubclass(theirs, torch.nn.SyncBatchNorm) else (*bases, theirs)
    contents = {"stands_for": theirs, "bases": bases, "__module__": __name__}
    return type(name, all_bases, contents)


def _new(theirs: type, bases: tuple[type, ...]) -> Layer:
    kind = _class(theirs, bases)
    return kind.__new__(kind)
