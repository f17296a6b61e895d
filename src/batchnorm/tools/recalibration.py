"""Running statistics that are exactly those of the data at hand: what all doors do alike."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .. import checks, definition
from ..moments import Statistics
from .observation import NormalizeBy, See, check_batches, check_seen
from .pooling import Pooled
from .progress import Walk, shown

_ANEW = "Give a list of batches, or what makes them anew, as a DataLoader does."


@dataclass(frozen=True)
class Model:
    """What a door knows of a model.

    Attributes
    ----------
    found : every normalization, by its path
    kinds : what it was that was looked for
    forward : calls the model with a batch
    observed : (see, normalize_by) -> the context of observation.py
    correction : of the running variance
    keep : layer -> a function that gives it back the statistics that it has now
    running : layer -> the mean and the variance that it has now, of float64
    commit : (layer, mean, var, batches), makes these the layer's
    is_tracked, is_frozen, skips_nonfinite : of a layer
    gather : what this process says -> what each says, in the same order in all
    """

    found: dict[str, Any]
    kinds: str
    forward: Callable[[Any], Any]
    observed: Callable[[See, NormalizeBy], AbstractContextManager[None]]
    correction: int
    keep: Callable[[Any], Callable[[], object]]
    running: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    commit: Callable[[Any, np.ndarray, np.ndarray, int], None]
    is_tracked: Callable[[Any], bool] = lambda layer: True
    is_frozen: Callable[[Any], bool] = lambda layer: False
    skips_nonfinite: Callable[[Any], bool] = lambda layer: False
    gather: Callable[["_Said"], list["_Said"]] = lambda said: [said]


@dataclass
class _Said:
    """What one process has found in a pass.

    `called` are the layers to which something has come, in the order of their first calls. What
    has come is pooled of each, or of one alone.
    """

    failure: str = ""
    batches: int = 0
    called: list[str] = field(default_factory=list)
    pooled: dict[str, Pooled] = field(default_factory=dict)


def recalibrate(
    model: Model, batches: Iterable[Any], *, normalize_by: NormalizeBy, progress: bool
) -> None:
    """Give every layer the statistics of all batches; or, whatever happens, leave all as it was."""
    with _told_to_all(model):
        _check_arguments(batches, normalize_by, progress)
        if not model.found:
            raise ValueError(f"recalibrate looks for {model.kinds}, but the model holds none.")
    tracked = {path: each for path, each in model.found.items() if model.is_tracked(each)}
    layers = {path: each for path, each in tracked.items() if not model.is_frozen(each)}
    _warn("are frozen", [path for path in tracked if path not in layers])
    if not layers:
        return
    by_layer = normalize_by == "running"
    if by_layer and isinstance(batches, Iterator):
        with _told_to_all(model):
            raise ValueError(
                f"normalize_by='running' goes through the batches {len(layers)} times, once for "
                f"each layer, but batches is a {type(batches).__name__}, which can be gone through "
                f"once. {_ANEW}"
            )
    kept = [model.keep(each) for each in layers.values()]
    done: set[str] = set()
    try:
        passes = len(layers) if by_layer else 1
        with shown("recalibrate", batches, passes, progress=progress) as walk:
            one_pass = partial(_one_pass, model, layers, walk, normalize_by)
            own = _Said()
            first = found = one_pass(own, first_alone=by_layer)
            for path in first.called[1:] if by_layer else ():
                with _told_to_all(model):
                    _commit(model, layers, found, done)
                found = one_pass(_Said(), only=path, is_again=own.batches > 0)
            _commit(model, layers, found, done)
        _warn("had too few elements come to them", [path for path in layers if path not in done])
    except BaseException:
        for restore in kept:
            restore()
        raise


def recalibrated(
    mean: np.ndarray, var: np.ndarray, statistics: Statistics, correction: int
) -> tuple[np.ndarray, np.ndarray]:
    """The new running mean and variance; the old ones where a channel has too few elements."""
    old, enough = (mean, var), (statistics.count > correction).reshape(mean.shape)
    new = definition.update_running(
        statistics.mean, statistics.var, statistics, rate=1.0, correction=correction
    )
    new_mean, new_var = (
        np.where(enough, one.reshape(mean.shape), other)
        for one, other in zip(new, old, strict=True)
    )
    return new_mean, new_var


@contextmanager
def _told_to_all(model: Model, said: _Said | None = None) -> Iterator[None]:
    """Where this process may fail: the others then learn of it at the end of their pass."""
    said = _Said() if said is None else said
    try:
        yield
    except BaseException as error:
        if said.batches:
            error.add_note(
                f"recalibrate had come to batch {said.batches}; all statistics are as they were."
            )
        said.failure = f"{type(error).__name__}: {error}"
        model.gather(said)
        raise


def _check_arguments(batches: Any, normalize_by: Any, progress: Any) -> None:
    if normalize_by not in ("batch", "running"):
        raise ValueError(f"normalize_by must be 'batch' or 'running', but got {normalize_by!r}.")
    checks.boolean("progress", progress)
    check_batches(batches)


def _one_pass(
    model: Model,
    layers: dict[str, Any],
    walk: Walk,
    normalize_by: NormalizeBy,
    said: _Said,
    *,
    first_alone: bool = False,
    only: str | None = None,
    is_again: bool = False,
) -> _Said:
    """What has come to the layers in all processes; in this one, it is `said`.

    It is pooled for all of them, for the first alone that is called, or for `only` one.
    """
    called: dict[str, None] = {}

    def see(path: str, statistics: Statistics, _: Any) -> None:
        if path not in layers:
            return
        called.setdefault(path)
        wanted = next(iter(called)) if first_alone else only
        if wanted not in (None, path):
            return
        if not all(np.isfinite(each).all() for each in statistics):
            if model.skips_nonfinite(layers[path]):
                return
            raise ValueError(
                f"The input of {path or 'the model'} has statistics that are not finite: NaN or "
                "infinity has come to it, or a mask with a negative weight. Leave such batches "
                "out, or mask such elements."
            )
        said.pooled.setdefault(path, Pooled(len(statistics.mean))).add(statistics)

    with _told_to_all(model, said), model.observed(see, normalize_by):
        for batch in walk():
            said.batches += 1
            model.forward(batch)
        if is_again and not said.batches:
            raise ValueError(
                "batches must be the same in every pass, but there are none any more: what gives "
                f"them is used up. {_ANEW}"
            )
    said.called = [*called]
    return _joined(model.gather(said), len(layers))


def _joined(heard: list[_Said], layers: int) -> _Said:
    """The same in all processes, bit for bit, or an error in all."""
    for process, each in enumerate(heard):
        if each.failure:
            raise RuntimeError(
                f"recalibrate has left all statistics as they were, in all processes, since it "
                f"failed in process {process}: {each.failure}"
            )
    joined = _Said(batches=sum(each.batches for each in heard))
    joined.called = [*dict.fromkeys(path for each in heard for path in each.called)]
    check_seen(joined.batches, layers, len(joined.called))
    for each in heard:
        for path, pooled in each.pooled.items():
            channels = len(pooled.statistics.mean)
            joined.pooled.setdefault(path, Pooled(channels)).join(pooled)
    return joined


def _commit(model: Model, layers: dict[str, Any], said: _Said, done: set[str]) -> None:
    for path, pooled in said.pooled.items():
        layer, statistics = layers[path], pooled.statistics
        mean, var = model.running(layer)
        if len(statistics.mean) != mean.size:
            raise ValueError(
                f"What comes to {path or 'the model'} has {len(statistics.mean)} channels, but it "
                f"keeps statistics of {mean.size}: its class normalizes something else than its "
                "input, which can't be seen."
            )
        if (statistics.count > model.correction).any():
            new = recalibrated(mean, var, statistics, model.correction)
            model.commit(layer, *new, pooled.batches)
            done.add(path)


def _warn(what: str, paths: list[str]) -> None:
    if paths:
        names = ", ".join(path or "the model" for path in paths[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        warnings.warn(
            f"recalibrate leaves these layers as they are, since they {what}: {names}{more}.",
            stacklevel=4,
        )
