"""What `convert` makes of torchvision's own batch normalization."""

from typing import Any

from torchvision.ops import FrozenBatchNorm2d as Frozen

from .layers import BatchNorm2d, Layer, NormalizeBy


class FrozenBatchNorm2d(BatchNorm2d, Frozen):  # type: ignore[misc]
    """A frozen layer, whose parameters are buffers."""

    stands_for = Frozen

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

    @classmethod
    def synchronized(cls) -> type[Layer]:
        return cls

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_features}, eps={vars(self)['eps']})"

    def reset_parameters(self) -> None:
        """Nothing, since there are none."""


KINDS = (FrozenBatchNorm2d,)
