"""How each framework names and weighs what batch normalization keeps.

The core speaks of `rate`, the weight of the new value in a running average, and of `correction`:
the running variance is divided by count − correction. Frameworks speak of `momentum`, which is the
rate in some and 1 − rate in others. Normalization itself always divides by the count, and eps is
always inside the root.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Convention:
    """One framework's names, in the order scale, bias, mean, var, and its defaults."""

    scale: str
    bias: str
    mean: str
    var: str
    momentum: float
    momentum_weighs_new: bool
    correction: int
    eps: float
    name_of_eps: str = "eps"

    def rate(self, momentum: Any) -> Any:
        """The weight of the new value, for this framework's momentum (and the other way round)."""
        return momentum if self.momentum_weighs_new else 1 - momentum


_TORCH = Convention("weight", "bias", "running_mean", "running_var", 0.1, True, 1, 1e-5)
_FLAX = Convention("scale", "bias", "mean", "var", 0.99, False, 0, 1e-5, "epsilon")
_KERAS = Convention(
    "gamma", "beta", "moving_mean", "moving_variance", 0.99, False, 0, 1e-3, "epsilon"
)

CONVENTIONS = {
    "mlx": _TORCH,
    "torch": _TORCH,
    "flax": _FLAX,
    "equinox": Convention("weight", "bias", "mean", "var", 0.99, False, 0, 1e-5),
    "keras": _KERAS,
    "onnx": Convention("scale", "B", "input_mean", "input_var", 0.9, False, 0, 1e-5, "epsilon"),
}
