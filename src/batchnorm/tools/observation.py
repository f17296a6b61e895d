"""What the doors' observations of a model have in common.

In each door, `observed(model, see, normalize_by=...)` is a context in which every batch
normalization of the model, of whichever class, says what comes to it: after each of its calls it
calls `see` with

    its name, the path to it in the model,
    the Statistics of its input in that call, of float64, in one axis of channels,
    whether the output of each channel had a positive value, where the layer itself applies relu;
    else None,

and normalizes by its running statistics or, with normalize_by="batch", by those of the batch. A
layer that is frozen keeps to what it normalizes by. Nothing moves, nothing is pooled over devices,
no gradient is kept, and all other layers are in evaluation mode. Behind the context all is as it
was: modes, flags, hooks, classes, statistics and random state.
"""

import random
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np

from ..arrays import Array, namespace
from ..layout import Axes, reduced_axes
from ..moments import Statistics

NormalizeBy = Literal["running", "batch"]
See = Callable[[str, Statistics, np.ndarray | None], None]


def plain(
    name: str, statistics: Statistics, numpy: Callable[[Array], np.ndarray] = np.asarray
) -> Statistics:
    """Statistics as `see` takes them, of the layer of that name."""
    try:
        return Statistics(*(numpy(each).astype(np.float64).ravel() for each in statistics))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name or 'the model'} is called within a transformation (of a jit, compile, "
            "checkpoint, remat, scan or vmap), where what comes to it can't be looked at. Call the "
            f"model without, by forward=..., or without that one around the layer. ({error})"
        ) from error


def is_positive(y: Array, features: Axes, mask: Array | None) -> Array:
    """Whether each feature has a positive value where the mask, which broadcasts, is not 0."""
    xp = namespace(y)
    found = y > 0 if mask is None else (y > 0) & (mask != 0)
    return xp.any(found, axis=reduced_axes(features, y.ndim))


def check_batches(batches: Any) -> None:
    if not hasattr(batches, "__iter__") or hasattr(batches, "shape"):
        raise TypeError(
            "batches must be an iterable over batches, a DataLoader or a list say, but got "
            f"{type(batches).__name__}. [batch] is one of a single batch."
        )


def call_of(model: Callable[..., Any], forward: Any, **options: Any) -> Callable[[Any], Any]:
    """What is done with a batch: `forward(model, batch)`, or the model is called with its inputs.

    These are the first element of a batch that is a tuple or list.
    """
    if forward is None:
        return lambda batch: model(
            batch[0] if isinstance(batch, (tuple, list)) else batch, **options
        )
    if not callable(forward):
        raise TypeError(
            f"forward must be None or a function of the model and a batch, but got {forward!r}."
        )
    return lambda batch: forward(model, batch)


def check_seen(batches: int, layers: int, called: int) -> None:
    """That there were batches, and that a layer was called with them."""
    if not batches:
        raise ValueError("batches must hold at least one batch, but there are none.")
    if not called:
        raise ValueError(
            f"None of the {layers} normalizations of the model was called: the forward does not "
            "come to them, or calls a function that was compiled or traced before. Call the model "
            "itself, by forward=... say."
        )


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Leave the random numbers of Python and NumPy as if none had been drawn."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def put(undo: ExitStack, mapping: MutableMapping[str, Any], **values: Any) -> None:
    """Set values, until `undo` closes."""
    for key, value in values.items():
        if key in mapping:
            undo.callback(mapping.__setitem__, key, mapping[key])
        else:
            undo.callback(mapping.pop, key, None)
        mapping[key] = value
