"""What comes to the normalizations of a model while it is called; tools/observation.py says how."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..moments import Statistics
from ..tools.observation import NormalizeBy, See, is_positive, put
from ._arguments import checked
from ._compat import BatchNormBase
from ._derivatives import batch_statistics
from ._layer import Layer
from ._libraries import class_for
from ._running import rounded


def normalizations(model: torch.nn.Module) -> dict[str, Any]:
    """By their paths: those of torch.nn and ours, and those of libraries that `convert` knows."""
    found: dict[str, Any] = {}
    for path, each in model.named_modules():
        if not isinstance(each, BatchNormBase) and class_for(type(each)) is None:
            continue
        path = path.replace("_orig_mod.", "")  # where torch.compile keeps a model
        lazy: Any = isinstance(each, LazyModuleMixin) and each
        if lazy and lazy.has_uninitialized_params():
            raise ValueError(
                f"{path or 'model'} must know its channels, but it is lazy. Call the model once "
                "before."
            )
        found[path] = each
    return found


def is_frozen(layer: torch.nn.Module) -> bool:
    """Whether no batch moves its statistics: by `freeze`, or in a class of a library."""
    if isinstance(layer, Layer):
        return layer.update_running is False
    return not isinstance(layer, BatchNormBase)


@contextmanager
def observed(
    model: torch.nn.Module, see: See, *, normalize_by: NormalizeBy = "running"
) -> Iterator[None]:
    """The context of tools/observation.py; a wrapper for several devices only hands calls on."""
    modules = [*model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    devices = {each.device for each in tensors}
    gpus = [each for each in devices if each.type in ("cuda", "xpu")]  # of one kind
    with ExitStack() as undo:
        # Code that torch.compile has made would pass over what is put into the layers.
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(torch.random.fork_rng(gpus))
        undo.enter_context(torch.no_grad())
        for each in modules:
            put(undo, vars(each), training=False)
            if isinstance(each, DistributedDataParallel | DataParallel):
                put(undo, vars(each), forward=each.module.__call__)
        for path, layer in normalizations(model).items():
            by_batch = normalize_by == "batch" and isinstance(layer, BatchNormBase)
            if isinstance(layer, Layer):
                if layer.normalize_by is not None or layer.update_running is False:
                    by_batch = layer.normalize_by == "batch"
                put(undo, vars(layer), normalize_by=None, update_running=None)
            put(undo, vars(layer), forward=_observed(path, layer, layer.forward, see))
            if by_batch:  # as a layer of torch.nn or ours does in evaluation without these
                put(undo, vars(layer)["_buffers"], running_mean=None, running_var=None)
        yield


def _observed(
    path: str, layer: torch.nn.Module, forward: Callable[..., Any], see: See
) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def observed_forward(*arguments: Any, **keywords: Any) -> Any:
        named = {**signature.bind(*arguments, **keywords).arguments, **keywords}
        x = arguments[0] if arguments else next(iter(keywords.values()))
        mask = named.get("mask") if isinstance(layer, Layer) else None
        call, inputs = checked(x, None, None, 1, 1.0, mask, None, None)
        statistics = rounded(batch_statistics(call, inputs))
        y = forward(*arguments, **keywords)
        positive = _numpy(is_positive(y, (1,), inputs.weights)) if _applies_relu(layer) else None
        see(path, Statistics(*_numpy(statistics).astype(np.float64)), positive)
        return y

    return observed_forward


def _applies_relu(layer: Any) -> bool:
    if getattr(layer, "activation", None) == "relu":
        return True
    return isinstance(getattr(layer, "act", None), torch.nn.ReLU)  # timm's


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
