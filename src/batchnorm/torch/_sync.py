"""Sums over the processes of a group, and the statistics of what they hold together.

A step of training has two collectives, both sums of float64 numbers: forward, of 3 for each feature
and process, which is how every process gets to know the statistics of each, and of 3 for each
process, by which they know whether they do the same, and on enough; backward, of 2 for each
feature. Where torch.compile or a derivative of higher order looks on, the sum backward is as the
one forward.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..moments import or_one
from ._compat import is_watched, traceable_all_reduce

_ENOUGH = 2
Group = Any  # torch.distributed.ProcessGroup, where PyTorch is built with it


class Alone:
    """A process that shares its statistics with nobody.

    Statistics are one tensor here, whose rows are those of `Statistics`: count, mean, var.
    """

    is_shared = False

    def pooled(self, statistics: Tensor, eps: float | Tensor) -> Tensor:
        return statistics

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


class Processes(Alone):
    """Those that share statistics; `name` says for whom, in an error.

    `place` is the same number in all of them where they are at the same layer of the same model; 0
    where that is not known. Of so many `values` of each feature the batch of this one is; or of
    enough, where one in all will do. Where all together have one, it is to be refused.
    """

    is_shared = True

    def __init__(self, group: Group, name: Callable[[], str]) -> None:
        self.group, self.name, self.place = group, name, 0
        self.values, self.refuse = _ENOUGH, lambda: None

    def need_values(self, values: int, refuse: Callable[[], None]) -> None:
        self.values, self.refuse = values, refuse

    def pooled(self, statistics: Tensor, eps: float | Tensor) -> Tensor:
        """The statistics of all the processes' elements: the formula of Chan, Golub & LeVeque.

        (1979; for many sets at once.) Every process computes the same from the same numbers.
        """
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        like: Any = {"dtype": statistics.dtype, "device": statistics.device}
        # A number comes to a device as an argument of `full`, for which nothing waits; a symbolic
        # size as well.
        what = torch.stack(
            [
                eps.to(**like) if isinstance(eps, Tensor) else torch.full((), eps, **like),
                torch.full((), self.place, **like),
                torch.full((), self.values, **like),
            ]
        )
        own = torch.cat((statistics.flatten(), what))
        others = torch.zeros_like(own)
        parts = torch.stack([own if each == rank else others for each in range(size)])
        total = self.sum(parts)
        whats = total[:, -3:].detach()
        counts, means, variances = total[:, :-3].unflatten(1, statistics.shape).unbind(1)
        count = counts.sum(0)
        shares = counts / or_one(count)
        mean = (shares * means).sum(0)
        if whats.is_cpu and not is_watched(whats):
            self.check_agreement(*whats.T.tolist())
        else:  # whose values can't be looked at, or not without waiting for them
            is_wrong = (whats[:, 0] != what[0]).any() | (whats[:, 2].sum() == 1)
            mean = torch.where(is_wrong, torch.nan, mean)
        var = (shares * (variances + (means - mean) ** 2)).sum(0)
        return torch.stack((count, mean, var))

    def check_agreement(self, eps: list[float], places: list[float], values: list[float]) -> None:
        """That all processes do the same, on enough; if not, all of them find out."""
        if len(set(eps)) > 1:
            raise RuntimeError(
                f"{self.name()} must have the same eps in every process of the group, but from the "
                f"first process to the last, eps is {', '.join(map(str, eps))}. Or the processes "
                "do not call the same layers in the same order."
            )
        if len(set(places) - {0.0}) > 1:
            raise RuntimeError(
                f"{self.name()} met another layer in another process: every process of the group "
                "must call the same layers of the same model, in the same order."
            )
        if sum(values) == 1:
            self.refuse()

    def sum(self, tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which can't look into `_Sum`
            return traceable_all_reduce(tensor, "sum", self.group)
        total: Tensor = _Sum.apply(tensor, self)
        return total

    def sum_in_place(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.name()} could not add up its statistics with the other processes: one of "
                "them has failed, has another number of channels, or has not come to this layer. "
                "Every process of the group must call it equally often, with an empty batch if it "
                f"has no data, and take part in every backward pass. ({error})"
            ) from error


ALONE = Alone()


class _Sum(torch.autograd.Function):
    """The sum over the processes; linear, and its own transpose."""

    @staticmethod
    def forward(tensor: Tensor, processes: Processes) -> Tensor:
        total = tensor.clone()
        processes.sum_in_place(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Processes], output: Tensor) -> None:
        ctx.processes = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.sum(gradient), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        total: Tensor = ctx.processes.sum(tangent)
        return total

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], tensor: Tensor, processes: Processes
    ) -> tuple[Tensor, int | None]:
        return processes.sum(tensor), in_dims[0]


def processes_of(sync: Any, name: Callable[[], str]) -> Alone:
    """Whom a `sync` argument means, for an operation of that name."""
    group = group_of(sync)
    return ALONE if group is None else Processes(group, name)


def group_of(sync: Any) -> Group | None:
    """The process group that a `sync` argument means; None where there is nobody to share with."""
    if sync is None or sync is False:
        return None
    if sync is not True:
        _check(sync)
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if sync is True else sync
    return group if dist.get_world_size(group) > 1 else None


def path_of(layer: torch.nn.Module) -> str:
    """Its path in the outermost model that is being called and holds it; empty if none does."""
    models: list[torch.nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.nn.Module) and not any(caller is each for each in models):
            models.append(caller)
        frame = frame.f_back
    for model in reversed(models):
        for path, module in model.named_modules():
            if module is layer:
                return path
    return ""


def _check(group: Any) -> None:
    if not dist.is_available() or isinstance(group, dist.ProcessGroup):
        return
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"sync must be a process group that this process is in, but rank {dist.get_rank()} "
            "is not. Use the group that it was given in torch.distributed.new_group."
        )
    raise TypeError(
        f"sync must be True, False, None or a torch.distributed.ProcessGroup, but got {group!r}."
    )
