"""From torch.nn's layers to ours, and back."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from .. import checks
from . import layers
from ._arguments import check_settings
from ._compat import BatchNormBase
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

# What our classes define: an attribute of that name on a layer of torch.nn means something else.
_DEFINED = {
    name
    for kind in (layers.Layer, layers.SyncBatchNorm)
    for name in vars(kind)
    if not name.startswith("__")
}
# Of these, what our layers keep on themselves.
_STATE = {name for name in _DEFINED if not callable(getattr(layers.SyncBatchNorm, name))}
_STATE.add("process_group")


def convert(module: torch.nn.Module, *, sync: Group | bool | None = None) -> torch.nn.Module:
    """Make every batch normalization of torch.nn in a model one of ours.

    The layers stay the same objects, of another class: their parameters and buffers (an optimizer
    goes on training them), hooks, mode and freezing are what they were. Only running statistics of
    float16 or bfloat16 become float32.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes whose batches are normalized as one, True for all: every layer becomes a
        `SyncBatchNorm`. Otherwise each becomes ours of the same name.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    TypeError
        If the model holds a subclass of torch.nn's layers, which may mean something of its own, or
        one with an attribute that means something else in ours (a `forward` of its own, say), or
        one whose settings ours refuses; or if module or sync is something else. Nothing is changed
        then.
    ValueError
        If this process is not in the group, or a setting of a layer (a momentum above 1, say) is
        out of range. Nothing is changed then.

    Warns
    -----
    UserWarning
        If the model holds no batch normalization.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> type(batchnorm.torch.convert(model)[1])
    <class 'batchnorm.torch.layers.BatchNorm2d'>
    """
    checks.instance("module", module, torch.nn.Module)
    group_of(sync)
    if not any(isinstance(each, BatchNormBase) for each in module.modules()):
        warnings.warn(
            f"convert found no batch normalization of torch.nn in this {type(module).__name__}, "
            "and so changes nothing.",
            stacklevel=2,
        )
    shared = sync is not None and sync is not False
    for layer, kind in _found(module, lambda path, layer: _converted(path, layer, shared)):
        before, layer.__class__ = type(layer), kind
        if kind is layers.SyncBatchNorm and shared:
            layer.converted_from = layer.converted_from or _THEIRS.get(before, before)
            layer.process_group = None if sync is True else sync
        layer.widen_statistics()
    return module


def revert(module: torch.nn.Module) -> torch.nn.Module:
    """Make every layer of ours in a model one of torch.nn's.

    As in `convert`, the layers stay the same objects. One that `convert` has made becomes one of
    the class that it was made from. Running statistics take the dtype of the weight, as torch.nn's
    layers need it.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        The same module.

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
    checks.instance("module", module, torch.nn.Module)
    for layer, kind in _found(module, _reverted):
        layer.__class__ = kind
        if layer.weight is not None and layer.running_mean is not None:
            for name in ("running_mean", "running_var"):
                setattr(layer, name, getattr(layer, name).to(layer.weight.dtype))
        for name in _STATE.intersection(vars(layer)):
            if name != "process_group" or kind is not torch.nn.SyncBatchNorm:
                delattr(layer, name)
    return module


def _found(
    module: torch.nn.Module, new_class: Callable[[str, torch.nn.Module], type | None]
) -> list[tuple[Any, Any]]:
    """The layers whose class changes, with their new classes; before any is changed."""
    found = ((each, new_class(path, each)) for path, each in module.named_modules())
    return [(each, kind) for each, kind in found if kind is not None]


def _converted(path: str, layer: torch.nn.Module, shared: bool) -> type | None:
    kind = type(layer)
    if not isinstance(layer, BatchNormBase) or (kind in _THEIRS and not shared):
        return None
    if kind not in _OURS and kind not in _THEIRS:
        raise TypeError(
            f"convert knows the batch normalizations of torch.nn, but {path or 'module'!r} is a "
            f"{kind.__module__}.{kind.__qualname__}, which may do something of its own. Replace it "
            "by hand, or leave it out of the module that is converted."
        )
    try:
        check_settings(
            layer.eps,
            layer.momentum,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
        )
        if not isinstance(layer, LazyModuleMixin):
            checks.positive_integer("num_features", layer.num_features)
    except (TypeError, ValueError) as error:
        raise type(error)(f"convert cannot take {path or 'module'!r}: {error}") from error
    own = _DEFINED.intersection(vars(layer)) - (_STATE if kind in _THEIRS else set())
    if own:
        raise TypeError(
            f"convert would give {path or 'module'!r} another meaning of {', '.join(sorted(own))}, "
            "which is set on this layer itself. Remove it, or leave the layer out of the module "
            "that is converted."
        )
    if shared and isinstance(layer, LazyModuleMixin):
        raise TypeError(
            f"convert(..., sync=...) needs to know num_features, but {path or 'module'!r} is lazy. "
            "Call the model once before."
        )
    return layers.SyncBatchNorm if shared else _OURS[kind]


def _reverted(path: str, layer: torch.nn.Module) -> type | None:
    if not isinstance(layer, layers.Layer):
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
    return layer.converted_from or _THEIRS[kind]
