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
from .progress import shown
from .report import Report
from .search import LOOKED_FOR, Found, found_in
from .states import Seen, State


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
        Channels are counted through all axes of a layer's statistics, where they have several.

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
    found = found_in(mapping)
    if not found:
        raise ValueError(f"mapping holds no batch normalization. Looked for {LOOKED_FOR}.")
    return Report([each.read() for each in found])


def inspect_files(files: Sequence[Path], *, progress: bool) -> Report:
    """As `inspect`, of checkpoint files, each of which is a group of its own."""
    found: list[Found] = []
    files = [*dict.fromkeys(files)]
    for path in files:
        checkpoint = checkpoints.read(path)
        here = found_in(checkpoint.tree, checkpoint.settings)
        if not here:
            raise CheckpointError(f"{path} holds no batch normalization. Looked for {LOOKED_FOR}.")
        for each in here if len(files) > 1 else []:
            each.group = f"{path}, {each.group}" if each.group else str(path)
        found += here
    with shown("Reading", found, 1, progress=progress) as walk:
        return Report([each.read() for each in walk()])


def inspect_model(
    states: Sequence[State],
    batches: Iterable[Any] | None,
    observed: Callable[[See], AbstractContextManager[None]],
    call: Callable[[Any], Any],
) -> Report:
    """A report of the layers of a model that keep running statistics.

    `call` calls the model with a batch, within what a door's `observed` makes of a `see`.
    """
    if not states:
        raise ValueError(
            "There must be a batch normalization that keeps running statistics, but there is none."
        )
    if batches is None:
        return Report(states)
    check_batches(batches)
    seen: dict[str, Seen] = {}
    now: dict[str, Pooled] = {}  # what has come to each in the calls with one batch

    def see(name: str, statistics: Statistics, is_positive: np.ndarray | None) -> None:
        channels = len(statistics.mean)
        here = seen.setdefault(name, Seen(Pooled(channels), Pooled(channels), len(seen)))
        here.calls.add(statistics)
        now.setdefault(name, Pooled(channels)).add(statistics)
        if is_positive is not None:
            before = False if here.is_positive is None else here.is_positive
            here.is_positive = before | is_positive

    number = 0
    with observed(see):
        for number, batch in enumerate(batches, 1):  # noqa: B007
            call(batch)
            for name, pooled in now.items():
                seen[name].batches.add(pooled.statistics)
            now.clear()
    check_seen(number, len(states), len(seen))
    return Report([replace(each, seen=seen.get(each.name)) for each in states])
