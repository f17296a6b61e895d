"""From torch.nn's layers to ours, and back."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from .. import checks
from . import layers
from ._activations import apart
from ._arguments import check_settings
from ._compat import BatchNormBase
from ._fused import restore
from ._layer import BEYOND_TORCH, Layer
from ._libraries import class_for, synchronized
from ._opacus import tell_opacus
from ._sync import Group, group_of

Rule = type[Layer] | Callable[[Any], torch.nn.Module]


_OF_TORCH: dict[type, Rule] = {
    kind.stands_for: kind
    for kind in (
        layers.BatchNorm1d,
        layers.BatchNorm2d,
        layers.BatchNorm3d,
        layers.SyncBatchNorm,
        layers.LazyBatchNorm1d,
        layers.LazyBatchNorm2d,
        layers.LazyBatchNorm3d,
    )
}
# What our classes define: an attribute of that name on another layer means something else.
_DEFINED = {
    name
    for kind in (Layer, layers.SyncBatchNorm)
    for name in vars(kind)
    if not name.startswith("__") and name != "eps"
}
# Of these, what our layers keep on themselves.
_STATE = _DEFINED & (Layer.__annotations__ | layers.SyncBatchNorm.__annotations__).keys()
_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert(
    module: torch.nn.Module,
    *,
    sync: Group | bool | None = None,
    kinds: Mapping[type, Rule] | None = None,
) -> torch.nn.Module:
    """Make every batch normalization in a model one of ours.

    The layers stay the same objects, of another class: their parameters and buffers (an optimizer
    goes on training them), hooks, mode and freezing are what they were. Only running statistics of
    float16 or bfloat16 become float32.

    They are those of torch.nn, torchvision's FrozenBatchNorm2d, which becomes a frozen layer, and
    timm's BatchNormAct2d, SyncBatchNormAct and FrozenBatchNormAct2d, which keep their `drop` and
    `act`, and fuse a relu or silu that has no drop before it.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.
    sync : torch.distributed.ProcessGroup or bool, optional
        The processes whose batches are normalized as one, True for all: every layer becomes a
        `SyncBatchNorm`, unless it is frozen in its class, as torchvision's. Otherwise each becomes
        ours of the same name.
    kinds : dict from class to rule, optional
        What becomes of layers of other classes, exactly these. A rule is a class of ours, if a
        layer of it does all that the other did, with the same parameters and settings; or a
        function of the layer, whose result takes its place in the model.

    Returns
    -------
    torch.nn.Module
        The same module; or what a rule has put in its place.

    Raises
    ------
    TypeError
        If the model holds a subclass of torch.nn's layers that is not in kinds, which may mean
        something of its own, or one with an attribute that means something else in ours (a
        `forward` of its own, say), or one whose settings ours refuses; or if module, sync or kinds
        is something else. Nothing is changed then.
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

    >>> class Scaled(torch.nn.BatchNorm2d):
    ...     pass
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Scaled(8))
    >>> model = batchnorm.torch.convert(model, kinds={Scaled: batchnorm.torch.BatchNorm2d})
    >>> type(model[1])
    <class 'batchnorm.torch.layers.BatchNorm2d'>
    >>> type(batchnorm.torch.revert(model)[1]) is Scaled
    True
    """
    checks.instance("module", module, torch.nn.Module)
    group_of(sync)
    is_shared = sync is not None and sync is not False
    rules = {**_OF_TORCH, **_rules_of_libraries(module), **_checked_kinds(kinds)}
    if not any(type(each) in rules or isinstance(each, BatchNormBase) for each in module.modules()):
        warnings.warn(
            f"convert found no batch normalization of torch.nn in this {type(module).__name__}, "
            "and so changes nothing.",
            stacklevel=2,
        )
    found = _found(module, lambda path, layer: _converted(path, layer, rules, is_shared))
    replacements: dict[torch.nn.Module, torch.nn.Module] = {}
    for layer, new in found:
        if isinstance(new, torch.nn.Module):
            replacements[layer] = new
            continue
        before = _stands_for(layer)
        vars(layer).pop("stands_for", None)
        layer.__class__ = new
        if new.stands_for is not before:
            layer.stands_for = before
        if issubclass(new, layers.SyncBatchNorm):
            if is_shared:
                layer.process_group = None if sync is True else sync
            vars(layer).setdefault("process_group")
        layer.widen_statistics()
        tell_opacus(new)
    return replaced(module, replacements)


def revert(module: torch.nn.Module, *, separate_activations: bool = False) -> torch.nn.Module:
    """Make every layer of ours in a model one of torch.nn's.

    As in `convert`, the layers stay the same objects. One that `convert` has made becomes one of
    the class that it was made from; what `fuse` has made one call is apart again. Running
    statistics take the dtype of the weight, as torch.nn's layers need it.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.
    separate_activations : bool
        Whether in the place of a layer with an activation comes a torch.nn.Sequential of the layer,
        now without, and the activation as a module of torch.nn. In the model's state_dict,
        "norm.weight" is "norm.0.weight" then.

    Returns
    -------
    torch.nn.Module
        The same module; or a Sequential, if it is itself a layer with an activation.

    Raises
    ------
    TypeError
        If the model holds a subclass of ours.
    ValueError
        If a layer has what torch.nn's has not: an activation that is not to be separated, say, or
        if it is frozen. Nothing is changed then.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = batchnorm.torch.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
    >>> type(batchnorm.torch.revert(model)[0])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>

    >>> model = torch.nn.Sequential(batchnorm.torch.BatchNorm2d(8, activation="relu"))
    >>> batchnorm.torch.revert(model, separate_activations=True)[0][1]
    ReLU()
    """
    checks.instance("module", module, torch.nn.Module)
    checks.boolean("separate_activations", separate_activations)
    found = _found(module, lambda path, layer: _reverted(path, layer, separate_activations))
    restore(module)
    replacements = {}
    for layer, kind in found:
        replacements[layer] = apart(layer, vars(layer).get("activation"))
        layer.__class__ = kind
        if layer.weight is not None and layer.running_mean is not None:
            for name in ("running_mean", "running_var"):
                setattr(layer, name, getattr(layer, name).to(layer.weight.dtype))
        for name in _STATE.intersection(vars(layer)):
            delattr(layer, name)
        if not issubclass(kind, torch.nn.SyncBatchNorm):
            vars(layer).pop("process_group", None)
    return replaced(module, replacements)


def becomes(path: str, layer: torch.nn.Module) -> type[Layer] | None:
    """The class that `convert` would give a layer; None, if it has it already.

    Raises
    ------
    TypeError, ValueError
        As `convert`, if it can't have one.
    """
    new = _converted(path, layer, {**_OF_TORCH, **_rules_of_libraries(layer)}, False)
    return new if isinstance(new, type) else None


def _found(
    module: torch.nn.Module, change: Callable[[str, torch.nn.Module], Any]
) -> list[tuple[Any, Any]]:
    """The layers that change, and what they become; before any is changed."""
    found = ((each, change(path, each)) for path, each in module.named_modules())
    return [(each, new) for each, new in found if new is not None]


def replaced(
    module: torch.nn.Module, replacements: Mapping[torch.nn.Module, torch.nn.Module]
) -> torch.nn.Module:
    """The module, with others in the place of some within, wherever they are."""
    for root in (module, *replacements.values()):
        by_path = dict(root.named_modules(remove_duplicate=False))
        for path, child in by_path.items():
            parent, _, name = path.rpartition(".")
            new = replacements.get(child, child)
            if name and new is not child and new is not root:  # which may hold what it replaces
                setattr(by_path[parent], name, new)
    return replacements.get(module, module)


def _stands_for(layer: torch.nn.Module) -> type:
    """The class of which `convert` makes one like this; its own, if it is none of ours."""
    kind = type(layer)
    found: type = vars(layer).get("stands_for", vars(kind).get("stands_for", kind))
    return found


def _rules_of_libraries(module: torch.nn.Module) -> dict[type, Rule]:
    kinds = {type(each) for each in module.modules()}
    return {kind: ours for kind in kinds if (ours := class_for(kind)) is not None}


def _checked_kinds(kinds: Any) -> Mapping[type, Rule]:
    if kinds is None:
        return {}
    if not isinstance(kinds, Mapping):
        raise TypeError(
            f"kinds must be a dict from classes to rules, but got {type(kinds).__name__}."
        )
    for kind, rule in kinds.items():
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise TypeError(
                f"kinds must have subclasses of torch.nn.Module as keys, but got {kind!r}."
            )
        if not (issubclass(rule, Layer) if isinstance(rule, type) else callable(rule)):
            raise TypeError(
                f"kinds[{kind.__name__}] must be a class of batchnorm.torch, or a function that "
                f"takes the layer and returns the module to put in its place, but got {rule!r}."
            )
    return kinds


def _converted(
    path: str, layer: torch.nn.Module, rules: Mapping[type, Rule], is_shared: bool
) -> type[Layer] | torch.nn.Module | None:
    kind, name = type(layer), path or "module"
    is_ours = "stands_for" in vars(kind)
    rule = rules.get(kind, kind if is_ours else None)
    if rule is None:
        if not isinstance(layer, BatchNormBase):
            return None
        raise TypeError(
            f"convert knows the batch normalizations of torch.nn, but {name!r} is a "
            f"{kind.__module__}.{kind.__qualname__}, which may do something of its own. Say what "
            f"becomes of it, as in convert(model, kinds={{{kind.__name__}: ...}}), or leave it out "
            "of the module that is converted."
        )
    if not isinstance(rule, type):
        return _replacement(name, layer, rule, is_shared)
    new: type[Layer] = rule
    if is_shared and isinstance(layer, LazyModuleMixin):
        raise TypeError(
            f"convert(..., sync=...) needs to know num_features, but {name!r} is lazy. "
            "Call the model once before."
        )
    if is_shared and not issubclass(new, layers.SyncBatchNorm):
        if "stands_for" not in vars(new):
            raise TypeError(
                f"convert(..., sync=...) would make {name!r} a {new.__name__}, which is no "
                "SyncBatchNorm. Give kinds a subclass of batchnorm.torch.SyncBatchNorm."
            )
        new = synchronized(new)
    if new is kind and not is_shared:
        return None
    _check_settings(name, layer, new)
    own = _DEFINED.intersection(vars(layer)) - (_STATE if is_ours else set())
    if own:
        raise TypeError(
            f"convert would give {name!r} another meaning of {', '.join(sorted(own))}, which is "
            "set on this layer itself. Remove it, or leave the layer out of the module that is "
            "converted."
        )
    return new


def _replacement(
    name: str, layer: torch.nn.Module, rule: Callable[[Any], Any], is_shared: bool
) -> torch.nn.Module:
    new = rule(layer)
    if not isinstance(new, torch.nn.Module):
        raise TypeError(
            f"kinds[{type(layer).__name__}] must return the module that takes the place of "
            f"{name!r}, but it returned {type(new).__name__}."
        )
    unshared = [each for each in new.modules() if isinstance(each, Layer)]
    if is_shared and not all(isinstance(each, layers.SyncBatchNorm) for each in unshared):
        raise TypeError(
            f"convert(..., sync=...) would put a layer that is no SyncBatchNorm in the place of "
            f"{name!r}. Let kinds[{type(layer).__name__}] return one that is."
        )
    return new


def _check_settings(name: str, layer: torch.nn.Module, new: type[Layer]) -> None:
    """That a layer has, or its class will give it, what ours need, and in range."""
    own = vars(layer)
    for each in (*_SETTINGS, *_TENSORS):
        is_there = each in own or (each in _TENSORS and hasattr(layer, each))
        if not is_there and (each == "eps" or not hasattr(new, each)):
            raise TypeError(
                f"convert cannot take {name!r}: a {new.__name__} needs {each}, but this "
                f"{type(layer).__name__} has none."
            )
    momentum, *switches = (own.get(each, getattr(new, each, None)) for each in _SETTINGS[2:])
    try:
        eps, names = new.usable_eps(own["eps"]), _SETTINGS[3:]
        check_settings(eps, momentum, **dict(zip(names, switches, strict=True)))
        # One without parameters and statistics has no use for it, and 0 if it was lazy.
        is_used = any(getattr(layer, each) is not None for each in _TENSORS)
        if "num_features" in own and is_used and not isinstance(layer, LazyModuleMixin):
            checks.positive_integer("num_features", own["num_features"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"convert cannot take {name!r}: {error}") from error


def _reverted(path: str, layer: torch.nn.Module, separate_activations: bool) -> type | None:
    if not isinstance(layer, Layer):
        return None
    kind, name = type(layer), path or "module"
    if "stands_for" not in vars(kind):
        raise TypeError(
            f"revert knows the layers of batchnorm.torch, but {name!r} is a "
            f"{kind.__module__}.{kind.__qualname__}. Replace it by hand."
        )
    target = _stands_for(layer)
    for each in BEYOND_TORCH:
        usual = getattr(kind, each)
        value = vars(layer).get(each, usual)
        if value != usual and not (each == "activation" and separate_activations):
            remedy = {
                "activation": " Or pass separate_activations=True.",
                "skip_nonfinite": " Set it to False first.",
            }.get(each, f" Call its {'freeze' if value is None else 'unfreeze'}() first.")
            raise ValueError(
                f"A {target.__name__} of {target.__module__.partition('.')[0]} has no {each}, but "
                f"that of {name!r} is {value!r}.{remedy}"
            )
    return target
