"""Running statistics that are exactly those of the data at hand."""

import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import checks
from ..conventions import CONVENTIONS
from ..documentation import documented
from ..tools import recalibration
from ..tools.observation import call_of
from ._arguments import group_of_several
from ._observation import normalizations, observed

_CONVENTION = CONVENTIONS["mlx"]
_STATISTICS = (_CONVENTION.mean, _CONVENTION.var)


@documented(
    model="mlx.nn.Module",
    layers="mlx.nn and batchnorm.mlx",
    divisor="count - 1",
    others="The others run as in eval().\nNone may be within mx.compile or the like.",
)
def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
    group: mx.distributed.Group | None = None,
) -> None:
    """...

    Parameters
    ----------
    group : mx.distributed.Group, optional
        The devices over whose batches statistics are pooled. All of them call the function, and get
        the same statistics or all none. They need not have equally many batches: only the end of
        each pass is an exchange.

    Raises
    ------
    RuntimeError
        If another device has failed.

    Examples
    --------
    >>> import mlx.core as mx
    >>> import mlx.nn as nn
    >>> from batchnorm.mlx import recalibrate
    >>> model = nn.Sequential(nn.BatchNorm(1))
    >>> recalibrate(model, mx.split(mx.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), [3]))
    >>> model.layers[0].running_mean, model.layers[0].running_var
    (array([3], dtype=float32), array([2.5], dtype=float32))
    """
    checks.instance("model", model, nn.Module)  # type: ignore[attr-defined]
    group = group_of_several(group)
    known = recalibration.Model(
        found=normalizations(model),
        kinds="BatchNorm of mlx.nn and batchnorm.mlx",
        forward=call_of(model, forward),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        correction=_CONVENTION.correction,
        keep=_keep,
        running=_running,
        commit=_commit,
        is_tracked=lambda layer: layer.track_running_stats,
        gather=partial(_gather, group),
    )
    is_first = group is None or group.rank() == 0
    recalibration.recalibrate(
        known,
        batches,
        normalize_by=normalize_by,
        progress=checks.boolean("progress", progress) and is_first,
    )


def _keep(layer: Any) -> Callable[[], None]:
    kept = [(name, layer[name]) for name in _STATISTICS]

    def restore() -> None:
        for name, value in kept:
            layer[name] = value

    return restore


def _running(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, var = (np.array(layer[name].astype(mx.float32), np.float64) for name in _STATISTICS)
    return mean, var


def _commit(layer: Any, mean: np.ndarray, var: np.ndarray, _: int) -> None:
    for name, value in zip(_STATISTICS, (mean, var), strict=True):
        layer[name] = mx.array(value.astype(np.float32)).astype(layer[name].dtype)


def _gather(group: mx.distributed.Group | None, said: Any) -> list[Any]:
    """By way of bytes, which MLX has of every device when they are equally many."""
    if group is None:
        return [said]
    own = np.frombuffer(pickle.dumps(said), np.uint8)
    sizes = np.array(mx.distributed.all_gather(mx.array([own.size], mx.uint32), group=group))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    heard = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
    rows = heard.reshape(group.size(), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
