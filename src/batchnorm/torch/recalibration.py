"""Running statistics that are exactly those of the data at hand."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from .. import checks
from ..conventions import CONVENTIONS
from ..documentation import documented
from ..tools import recalibration
from ..tools.observation import call_of
from ._observation import is_frozen, normalizations, observed
from ._sync import Group, group_of

_CONVENTION = CONVENTIONS["torch"]
_TENSORS = ("running_mean", "running_var", "num_batches_tracked")


@documented(
    model="torch.nn.Module",
    layers="torch.nn and batchnorm.torch",
    divisor="count - 1",
    others="The others run in evaluation mode, without gradients.",
)
def recalibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
    sync: Group | bool | None = True,
) -> None:
    """... num_batches_tracked becomes the number of batches.

    Parameters
    ----------
    model
        ... DistributedDataParallel only hands calls on, and what torch.compile has made runs as it
        was written.
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes over whose batches statistics are pooled, True for all that there are. All of
        them call the function, and get the same statistics or all none. They need not have equally
        many batches: only the end of each pass is an exchange.

    Raises
    ------
    ValueError
        ... To a layer with skip_nonfinite, such a batch is none.
    RuntimeError
        If another process has failed.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import recalibrate
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    >>> batches = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(5, 1).split(3)
    >>> recalibrate(model, batches)
    >>> model[0].running_mean, model[0].running_var, model[0].num_batches_tracked
    (tensor([3.]), tensor([2.5000]), tensor(2))
    """
    checks.instance("model", model, torch.nn.Module)
    group = group_of(sync)
    known = recalibration.Model(
        found=normalizations(model),
        kinds="batch normalizations of torch.nn and batchnorm.torch",
        forward=call_of(model, forward),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        correction=_CONVENTION.correction,
        keep=_keep,
        running=_running,
        commit=_commit,
        is_tracked=lambda layer: layer.running_mean is not None,
        is_frozen=is_frozen,
        skips_nonfinite=lambda layer: getattr(layer, "skip_nonfinite", False),
        gather=partial(_gather, group),
    )
    is_first = group is None or dist.get_rank(group) == 0
    recalibration.recalibrate(
        known,
        batches,
        normalize_by=normalize_by,
        progress=checks.boolean("progress", progress) and is_first,
    )


def _keep(layer: Any) -> Callable[[], None]:
    tensors = [each for name in _TENSORS if (each := getattr(layer, name)) is not None]
    values = [each.clone() for each in tensors]

    @torch.inference_mode()  # in which tensors can be changed that were made in it, too
    def restore() -> None:
        for each, value in zip(tensors, values, strict=True):
            each.copy_(value)

    return restore


def _running(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, var = (each.cpu().double().numpy() for each in (layer.running_mean, layer.running_var))
    return mean, var


@torch.inference_mode()
def _commit(layer: Any, mean: np.ndarray, var: np.ndarray, batches: int) -> None:
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(var))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)


def _gather(group: Group | None, said: Any) -> list[Any]:
    if group is None:
        return [said]
    heard: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(heard, said, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "recalibrate could not exchange statistics with the other processes: one of them has "
            f"ended, or has not come as far. Every process of the group must call it. ({error})"
        ) from error
    return heard
