"""`inspect`, for what holds arrays by name; and what the doors' own have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..moments import Statistics
from . import checkpoints
from .checkpoints import CheckpointError
from .observation import See, check_batches, check_seen
from .pooling import Pooled
from .report import Report
from .states import LOOKED_FOR, Place, Seen, State, Track, places_in, read


def inspect(mapping: Mapping[Any, Any]) -> Report:
    """Look at the batch normalizations among the arrays of a checkpoint, and say what is odd.

    Layers are found by the names that PyTorch, MLX, Flax and Keras give their running statistics,
    whatever is before them. What wraps a model (state_dict, model, module, _orig_mod; params and
    batch_stats apart) is seen through; each model of several (an average, a teacher) is judged by
    itself, as a group; and what an optimizer keeps is passed over.

    Parameters
    ----------
    mapping : mapping from names to arrays
        Of any framework; also one of mappings, as Flax's variables are.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If it is no mapping.
    ValueError
        If no batch normalization is found in it.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.tools import inspect
    >>> names = ("weight", "bias", "running_mean", "running_var")
    >>> report = inspect({f"bn.{name}": np.full(3, 0.5, np.float32) for name in names})
    >>> print(report)
    1 normalization: nothing odd.
    >>> var = np.array([0.5, -0.1, 0.5], np.float32)
    >>> report = inspect({"bn.running_mean": np.zeros(3), "bn.running_var": var})
    >>> report.findings[0].kind, report.findings[0].channels
    ('negative_variance', (1,))
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(
            "mapping must be a mapping from names to arrays, as a state_dict is, "
            f"but got {type(mapping).__name__}."
        )
    places = places_in(mapping)
    if not places:
        raise ValueError(f"mapping holds no batch normalization. Looked for {LOOKED_FOR}.")
    return Report(read(places))


def inspect_files(files: Sequence[Path], track: Track[Place] = list) -> Report:
    """As `inspect`, of checkpoint files, each of which is a group; `track` shows how far it is."""
    places = []
    for path in files:
        checkpoint = checkpoints.read(path)
        found = places_in(checkpoint.tree, checkpoint.settings)
        if not found:
            raise CheckpointError(f"{path} holds no batch normalization. Looked for {LOOKED_FOR}.")
        for each in found if len(files) > 1 else []:
            each.group = f"{path}, {each.group}" if each.group else str(path)
        places += found
    return Report(read(places, track))


def inspect_model(
    states: Sequence[State],
    batches: Iterable[Any] | None,
    observed: Callable[[See], AbstractContextManager[None]],
    call: Callable[[Any], object],
) -> Report:
    """A report of a model's layers, each of which may be without running statistics.

    `call` calls the model with a batch, within what a door's `observed` makes of a `see`.
    """
    if not states:
        raise ValueError(
            "model must have a batch normalization that keeps running statistics, but has none."
        )
    seen: dict[str, Seen] = {}

    def see(name: str, statistics: Statistics, is_positive: np.ndarray | None) -> None:
        if name not in seen:
            seen[name] = Seen(pooled=Pooled(len(statistics.mean)), order=len(seen))
        here = seen[name]
        here.pooled.add(statistics)
        if is_positive is not None:
            before = False if here.is_positive is None else here.is_positive
            here.is_positive = before | is_positive

    if batches is not None:
        check_batches(batches)
        number = 0
        with observed(see):
            for number, batch in enumerate(batches, 1):  # noqa: B007
                call(batch)
        check_seen(number, len(states), len(seen))
    return Report([replace(each, seen=seen.get(each.name)) for each in states])
