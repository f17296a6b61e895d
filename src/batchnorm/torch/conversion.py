"""From torch.nn's layers to ours, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from . import layers
from ._sync import Group, group_of

_OURS: dict[type, type] = {
    each: getattr(layers, each.__name__)
    for each in (
        torch.nn.BatchNorm1d,
        torch.nn.BatchNorm2d,
        torch.nn.BatchNorm3d,
        torch.nn.SyncBatchNorm,
        torch.nn.LazyBatchNorm1d,
        torch.nn.LazyBatchNorm2d,
        torch.nn.LazyBatchNorm3d,
    )
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(module: torch.nn.Module, *, sync: Group | bool | None = None) -> torch.nn.Module:
    """Put our layers in the place of every batch normalization of torch.nn in a model.

    They share the parameters and buffers of the layers that they replace (an optimizer goes on
    training them), and their hooks, mode and freezing.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place, but for itself.
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes whose batches are normalized as one, True for all: every layer becomes a
        `SyncBatchNorm`. Otherwise each becomes ours of the same name.

    Returns
    -------
    torch.nn.Module
        The same module; or where that is a batch normalization itself, the layer in its place.

    Raises
    ------
    TypeError
        If the model holds a subclass of torch.nn's layers, which may mean something of its own; or
        if sync is something else. Nothing is changed then.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> type(batchnorm.torch.convert(model)[1])
    <class 'batchnorm.torch.layers.BatchNorm2d'>
    """
    group_of(sync)
    return _replaced(module, lambda path, layer: _converted(path, layer, sync))


def revert(module: torch.nn.Module) -> torch.nn.Module:
    """Put torch.nn's layers back in the place of ours.

    They share parameters, buffers, hooks and mode, as in `convert`; a layer that `convert` has
    made becomes one of the class that it was made from.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place, but for itself.

    Returns
    -------
    torch.nn.Module
        The same module; or where that is a layer of ours itself, the layer in its place.

    Raises
    ------
    TypeError
        If the model holds a subclass of ours.
    ValueError
        If a layer has what torch.nn's has not: an activation, say, or if it is frozen. Nothing is
        changed then.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = batchnorm.torch.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
    >>> type(batchnorm.torch.revert(model)[0])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    return _replaced(module, _reverted)


def _replaced(
    module: torch.nn.Module, replacement: Callable[[str, torch.nn.Module], torch.nn.Module | None]
) -> torch.nn.Module:
    """Put replacements, where there are any, in the place of modules: all of them, or none."""
    found = {
        id(each): new
        for path, each in module.named_modules()
        if (new := replacement(path, each)) is not None
    }
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in found:
                parent._modules[name] = found[id(child)]
    return found.get(id(module), module)


def _converted(
    path: str, layer: torch.nn.Module, sync: Group | bool | None
) -> torch.nn.Module | None:
    kind = type(layer)
    if not isinstance(layer, _BatchNorm) or (kind in _THEIRS and sync is None):
        return None
    if kind not in _OURS and kind not in _THEIRS:
        raise TypeError(
            f"convert knows the batch normalizations of torch.nn, but {path or 'module'!r} is a "
            f"{kind.__module__}.{kind.__qualname__}, which may do something of its own. Replace it "
            "by hand, or leave it out of the module that is converted."
        )
    if sync is None:
        return _as(_OURS[kind], layer)
    if isinstance(layer, LazyModuleMixin):
        raise TypeError(
            f"convert(..., sync=...) needs to know num_features, but {path or 'module'!r} is lazy. "
            "Call the model once before."
        )
    new = _as(layers.SyncBatchNorm, layer)
    new.process_group = None if sync is True else sync
    new._converted_from = _THEIRS.get(kind, kind)
    return new


def _reverted(path: str, layer: torch.nn.Module) -> torch.nn.Module | None:
    if not isinstance(layer, layers._Layer):
        return None
    kind = type(layer)
    if kind not in _THEIRS:
        raise TypeError(
            f"revert knows the layers of batchnorm.torch, but {path or 'module'!r} is a "
            f"{kind.__module__}.{kind.__qualname__}. Replace it by hand."
        )
    for name in ("activation", "skip_nonfinite", *layers.FREEZING):
        value = getattr(layer, name)
        if value is not None and value is not False:
            raise ValueError(
                f"torch.nn's layers have no {name}, but that of {path or 'module'!r} is {value!r}."
            )
    new = _as(layer._converted_from or _THEIRS[kind], layer)
    for name in [name for name in vars(layers._Layer) if name in new.__dict__]:
        del new.__dict__[name]
    return new


def _as(kind: Any, layer: torch.nn.Module) -> Any:
    """A module of that class with everything that `layer` holds."""
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    return new
