"""What a layer keeps, as NumPy's arrays, whichever framework it is of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..conventions import CONVENTIONS, Convention
from .pooling import Pooled

COUNTER = "num_batches_tracked"
# By which way of computing a framework's own layer squares before it subtracts.
ONE_PASS = {
    "torch": "torch.nn on a CPU, for inputs of shape (N, C) or with channels last",
    "mlx": "mlx.nn",
    "flax": "Flax's layers with use_fast_variance=True, which is their default",
    "keras": "Keras' layer with the backends torch and numpy",
}


@dataclass
class Seen:
    """What came to a layer in the batches that were looked at.

    Attributes
    ----------
    batches : all calls with a batch as one
    calls : each of its own, which is the same but for a layer that a model calls several times
    order : its number in the order in which layers were called first
    is_positive : whether a channel's output was, anywhere; None where it need not be
    """

    batches: Pooled
    calls: Pooled
    order: int = 0
    is_positive: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """What one layer keeps: arrays in float64, of one axis.

    Attributes
    ----------
    name : its path in its model
    framework : whose names and conventions it has, a key of CONVENTIONS
    group : the model within the file, where there are several
    dtype : that of the running statistics as they were kept
    batches : how many it has counted; None if it counts none
    momentum : None where it is not known, or counts every batch alike
    is_frozen : whether no batch moves its statistics
    is_of_model : and not of a file
    one_pass : by which way it would square before it subtracts; None for no way
    """

    name: str
    framework: str
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float
    group: str = ""
    dtype: str = "float32"
    batches: int | None = None
    momentum: float | None = None
    is_frozen: bool = False
    is_of_model: bool = False
    one_pass: str | None = None
    seen: Seen | None = None

    @property
    def convention(self) -> Convention:
        return CONVENTIONS[self.framework]

    @property
    def path(self) -> str:
        return path_of(self.group, self.name)

    @property
    def shifts(self) -> np.ndarray:
        """How far the mean lies from 0, in standard deviations."""
        with np.errstate(all="ignore"):
            shifts: np.ndarray = np.abs(self.mean) / np.sqrt(self.var + self.eps)
        return shifts


def path_of(group: str, name: str) -> str:
    name = name or "the layer itself"
    return f"{group}: {name}" if group else name


def state(
    name: str,
    framework: str,
    get: Callable[[str], Any],
    *,
    eps: Any = None,
    momentum: Any = None,
    is_exact: bool = False,
    **more: Any,
) -> State:
    """The state of a layer that gives its arrays, or None, by the framework's names for them.

    One that is exact does not square before it subtracts.
    """
    names = CONVENTIONS[framework]
    mean, var, scale, bias = (
        get(each) for each in (names.mean, names.var, names.scale, names.bias)
    )
    kept = values(mean)
    batches = _finite(values(get(COUNTER)))
    return State(
        name=name,
        framework=framework,
        mean=kept,
        var=values(var),
        scale=_if_of(kept, values(scale)),
        bias=_if_of(kept, values(bias)),
        dtype=name_of(var.dtype),
        batches=batches,
        eps=names.eps if eps is None else float(eps),
        momentum=None if momentum is None else float(momentum),
        one_pass=None if is_exact else ONE_PASS[framework],
        **more,
    )


def _finite(counter: np.ndarray | None) -> int | None:
    """A counter that was cast with all else may have become infinite."""
    if counter is None or len(counter) != 1 or not np.isfinite(counter[0]):
        return None
    return int(counter[0])


def _if_of(mean: np.ndarray, parameter: np.ndarray | None) -> np.ndarray | None:
    """What has another name in another layer: the weight of a convolution, beside statistics."""
    return parameter if parameter is None or parameter.shape == mean.shape else None


def values(array: Any) -> Any:
    """Any framework's, or one that is still in a file, as float64 of one axis; None of none."""
    if array is None:
        return None
    kept = array.read() if hasattr(array, "read") else array.tolist()
    return np.asarray(kept, np.float64).ravel()


def name_of(dtype: Any) -> str:
    """As NumPy calls it, whichever framework's it is."""
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]
