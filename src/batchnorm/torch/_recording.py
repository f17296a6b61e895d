"""What torch.fx records: a call, where an argument stands for a value that is not there yet."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Proxy

from ._compat import has_hooks


def stand_in(*arguments: Any) -> Proxy | None:
    """The first of the arguments, or of what they hold, that stands for a value; None if none."""
    for each in arguments:
        if isinstance(each, (Proxy, tuple)):
            found = each if isinstance(each, Proxy) else stand_in(*each)
            if found is not None:
                return found
    return None


def recorded(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """The call of a function, as of one of PyTorch's own."""
    proxy = stand_in(*arguments, *keywords.values())
    return torch.overrides.handle_torch_function(function, (proxy,), *arguments, **keywords)


def recorded_layer(
    layer: torch.nn.Module, proxy: Any, own: Callable[..., Any] | None, **arguments: Any
) -> Any:
    """The call of a layer, as of one of torch.nn's.

    Within a forward of its own, which is recorded itself: that of the function `own`, which takes
    the layer first.
    """
    tracer, name = proxy.tracer, type(layer).__name__
    path = tracer.path_of_module(layer)
    if not path:
        raise TypeError(
            "torch.fx records which of a model's modules are called, but the model is this "
            f"{name} itself. Trace torch.nn.Sequential(layer)."
        )
    places = (arguments.pop("input"),)
    if own is not None:
        module = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_function", own, (module, *places), arguments)
    if has_hooks(layer):
        raise TypeError(
            f"The {name} {path!r} has hooks, which would be called in tracing and again in every "
            "call of what is traced. Remove them first, or trace by a torch.fx.Tracer whose "
            "is_leaf_module(module, name) is True for the layers of batchnorm.torch."
        )
    return tracer.create_proxy("call_module", path, places, arguments)
