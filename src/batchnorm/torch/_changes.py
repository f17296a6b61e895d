"""What `fuse` and `fold` did to a model, and what they left."""

from collections.abc import Iterable
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .. import checks


class Change(NamedTuple):
    """What became of a batch normalization.

    Attributes
    ----------
    path : str
        Where it is in the model, or was.
    what : "fused", "folded" or "left"
    why : str
        With what it was fused, into what it was folded, or why it was left as it was.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> (change,) = batchnorm.torch.changes(batchnorm.torch.fuse(model))
    >>> change.path, change.what, change.why
    ('0', 'fused', "with the ReLU '1' after it")
    """

    path: str
    what: Literal["fused", "folded", "left"]
    why: str


# Beside the models, not in them: a model that is folded needs nothing of this package.
_made: WeakKeyDictionary[torch.nn.Module, list[Change]] = WeakKeyDictionary()


def record(model: torch.nn.Module, found: Iterable[Change]) -> None:
    """Keep what was done to the model."""
    _made[model] = list(found)


def changes(model: torch.nn.Module) -> list[Change]:
    """What the last `fuse` or `fold` did to each batch normalization of a model.

    It is known of the very object that they returned, or one that holds it, in this process: not
    of copies.

    Parameters
    ----------
    model : torch.nn.Module
        What `fuse` or `fold` has returned, or a module around it.

    Returns
    -------
    list of Change
        One row for each batch normalization, in the model's order.

    Raises
    ------
    TypeError
        If model is no torch.nn.Module.
    ValueError
        If neither has returned it.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    ...     torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU6(),
    ... )
    >>> for change in batchnorm.torch.changes(batchnorm.torch.fuse(model)):
    ...     print(*change, sep=": ")
    1: fused: with the ReLU '2' after it
    4: left: what follows is the ReLU6 '5', and no relu or silu
    """
    checks.instance("model", model, torch.nn.Module)
    for path, module in model.named_modules():
        if (found := _made.get(module)) is not None:
            prefix = f"{path}." if path else ""
            return [each._replace(path=f"{prefix}{each.path}".rstrip(".")) for each in found]
    raise ValueError(
        f"Nothing is known of this {type(model).__name__}: model must be what fuse or fold has "
        "returned in this process, or hold it, and no copy of that."
    )
