"""The step that follows a training forward: running statistics move towards those of the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..definition import update_running
from ..moments import Statistics
from ._compat import check_dense, is_transformed


def rounded(statistics: Tensor) -> Tensor:
    """The three rows, of statistics that may have five (_operations.py)."""
    if len(statistics) == 3:
        return statistics
    count, mean, var, _, unit = statistics.unbind(0)
    return torch.stack((count, mean, var * unit * unit))


class Running(NamedTuple):
    """Running statistics, and how far a batch moves them; the variance has correction 1.

    `batches`, if any, counts the batches with at least one element. With `skipped`, which counts
    them, batches with NaN or infinity change nothing else. A batch that is not known to count
    `may_be_empty`. `owner` is the layer that an error speaks of.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    rate: float | Tensor
    may_be_empty: bool = True
    skipped: Tensor | None = None
    owner: str | None = None

    def operands(self) -> tuple[dict[str, Any], float] | None:
        """And the rate, for a kernel; None if it is a tensor, or memory is negated by a view."""
        tensors = {"running_mean": self.mean, "running_var": self.var, "batches": self.batches}
        if type(self.rate) is not float or any(
            each is not None and each.is_neg() for each in tensors.values()
        ):
            return None
        return tensors, self.rate

    def counted(self, statistics: Tensor) -> Tensor:
        """These, or others without a count, which change nothing, for a batch that is skipped."""
        if self.skipped is None:
            return statistics
        for name, tensor in self._tensors():
            check_dense(name, tensor)
        statistics = rounded(statistics).detach()
        is_finite = statistics.isfinite().all()
        with explained(self.owner):
            self.skipped.add_(~is_finite)
        return torch.where(is_finite, statistics, 0.0)

    def move(self, statistics: Tensor, *, watched: bool) -> None:
        """In place; `statistics` as in _operations.py."""
        statistics = self.counted(statistics)
        moving = None if watched or native.kernels is None else self.operands()
        if moving is not None and statistics.dtype == torch.float64:
            tensors, rate = moving
            operands = {"statistics": statistics, "rate": rate, "correction": 1, **tensors}
            if native.kernels.update_running(**operands) is None:
                return
        for name, tensor in self._tensors():
            check_dense(name, tensor)
        count, mean, var = rounded(statistics).detach().unbind(0)
        with explained(self.owner), torch.no_grad():
            batches = (count > 0).any() if self.may_be_empty else 1
            new_mean, new_var = update_running(
                self.mean.to(mean.dtype),
                self.var.to(mean.dtype),
                Statistics(count, mean, var),
                rate=self.rate,
                correction=1,
            )
            self.mean.copy_(new_mean)
            self.var.copy_(new_var)
            if self.batches is not None:
                self.batches.add_(batches)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        tensors = {
            "running_mean": self.mean,
            "running_var": self.var,
            "num_batches_tracked": self.batches,
            "num_batches_skipped": self.skipped,
        }
        return [(name, each) for name, each in tensors.items() if each is not None]


class Tracked(NamedTuple):
    """Of how many elements the running statistics are, and the values that this is true of.

    Whoever gives a layer other values (zeroed, copied, averaged or loaded ones) says nothing of
    their elements. What is left of such values is their number of batches.
    """

    elements: Tensor
    batches: Tensor
    mean: Tensor
    var: Tensor

    def take(self, other: "Tracked") -> bool:
        """The other's values in the same memory, as a captured graph needs it; whether they fit."""
        pairs = [*zip(self, other, strict=True)]
        fits = all(
            (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
            and not old.is_inference()
            for old, new in pairs
        )
        if fits:
            for old, new in pairs:
                old.copy_(new)
        return fits

    def elements_of(self, running: Running, count: Tensor) -> Tensor:
        """As kept, for each feature; where values are other ones, all batches had `count`."""
        assert running.batches is not None
        by_batches = running.batches * count
        if self.elements.shape != count.shape:
            return by_batches
        is_same = torch.ones_like(count, dtype=torch.bool)
        now = (running.batches, running.mean, running.var)
        for kept, value in zip(self[1:], now, strict=True):
            is_same = is_same & (kept.to(value) == value)
        return torch.where(is_same, self.elements.to(count), by_batches)


@contextmanager
def explained(layer: str | None) -> Iterator[None]:
    """What a layer says where torch.func allows no change of its running statistics."""
    try:
        yield
    except RuntimeError as error:
        if layer is None or not is_transformed():
            raise
        raise RuntimeError(
            f"{layer} can't update its running statistics inside of torch.func's "
            "vmap, grad and the like, which have no side effects. Give the transformed "
            "function the buffers as an argument (torch.func.functional_call; for ensembles, "
            "torch.func.stack_module_state); or freeze(normalize_by='batch'); or use "
            "batchnorm.torch.batch_norm and update_running."
        ) from error
