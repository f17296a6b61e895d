"""What comes to the normalizations of a model while it is called; tools/observation.py says how."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ..moments import Statistics
from ..tools.observation import NormalizeBy, See, is_positive, plain, put, random_numbers_kept
from ._arguments import checked
from ._compat import BatchNormBase
from ._derivatives import batch_statistics
from ._layer import Layer
from ._libraries import class_for
from ._running import rounded

_KNOWN = (BatchNormBase.forward, torch.nn.SyncBatchNorm.forward)
_BATCH_NORM = inspect.signature(F.batch_norm)


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
    tensors = [*model.parameters(), *model.buffers()]
    devices = {each.device for each in tensors}
    gpus = [each for each in devices if each.type in ("cuda", "xpu")]  # of one kind
    with ExitStack() as undo:
        # Code that torch.compile has made would pass over what is put into the layers.
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        kind = gpus[0].type if gpus else "cuda"
        undo.enter_context(torch.random.fork_rng(gpus, device_type=kind))
        undo.enter_context(random_numbers_kept())
        undo.enter_context(torch.no_grad())
        for each in model.modules():
            undo.callback(setattr, each, "training", each.training)
            each.training = False
            if isinstance(each, DistributedDataParallel | DataParallel):
                put(undo, vars(each), forward=each.module.__call__)
        for path, layer in normalizations(model).items():
            by_batch = normalize_by == "batch" and isinstance(layer, BatchNormBase)
            if isinstance(layer, Layer):
                if layer.normalize_by is not None or layer.update_running is False:
                    by_batch = layer.normalize_by == "batch"
                put(undo, vars(layer), normalize_by=None, update_running=None)
            buffers = vars(layer)["_buffers"]
            put(undo, buffers, **buffers)  # to be put back, whatever a call makes of them
            put(undo, vars(layer), forward=_observed(path, layer, see, by_batch))
        yield


def _observed(path: str, layer: Any, see: See, by_batch: bool) -> Callable[..., Any]:
    forward, buffers = layer.forward, vars(layer)["_buffers"]
    signature = inspect.signature(forward)
    is_known = isinstance(layer, Layer) or type(layer).forward in _KNOWN

    def statistics_of(x: Any, mask: Any = None) -> Statistics:
        x = x.detach() if isinstance(x, Tensor) else x
        with torch.no_grad():  # whatever the model does around the layer
            call, inputs = checked(x, None, None, 1, 1.0, mask, None, None)
            return plain(path, Statistics(*rounded(batch_statistics(call, inputs))), _numpy)

    def observed_forward(*arguments: Any, **keywords: Any) -> Any:
        named = {**signature.bind(*arguments, **keywords).arguments, **keywords}
        x = arguments[0] if arguments else next(iter(named.values()))
        mask = named.get("mask") if isinstance(layer, Layer) else None
        statistics = statistics_of(x, mask)
        inner = _Inner(layer, statistics_of, by_batch)
        with ExitStack() as undo:
            put(undo, vars(layer), training=False)  # whatever the model has set meanwhile
            if by_batch and is_known:  # without running statistics evaluation is by the batch's
                put(undo, buffers, running_mean=None, running_var=None)
            elif by_batch and layer.running_mean is not None:  # for a forward that needs some
                new = [torch.from_numpy(each).to(layer.running_mean) for each in statistics[1:]]
                put(undo, buffers, running_mean=new[0], running_var=new[1])
            if not is_known:
                undo.enter_context(inner)
            y = forward(*arguments, **keywords)
        positive = _numpy(is_positive(y, (1,), mask)) if _applies_relu(layer, named) else None
        for each in inner.found or [statistics]:
            see(path, each, positive)
        return y

    return observed_forward


class _Inner(TorchFunctionMode):
    """What a forward of its own hands on to torch.nn.functional's batch_norm.

    That is what the layer normalizes, and may be something else than its input.
    """

    def __init__(self, layer: Any, statistics_of: Callable[[Any], Statistics], by_batch: bool):
        super().__init__()
        self.layer, self.statistics_of, self.by_batch = layer, statistics_of, by_batch
        self.found: list[Statistics] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if function is F.batch_norm:
            call = _BATCH_NORM.bind(*arguments, **keywords)
            named = call.arguments
            if named["running_mean"] is self.layer.running_mean:
                self.found.append(self.statistics_of(named["input"]))
                if self.by_batch:
                    named |= {"running_mean": None, "running_var": None, "training": True}
                arguments, keywords = call.args, call.kwargs
        return function(*arguments, **keywords)


def _applies_relu(layer: Any, named: dict[str, Any]) -> bool:
    if (named.get("activation") or getattr(layer, "activation", None)) == "relu":
        return True
    return isinstance(getattr(layer, "act", None), torch.nn.ReLU)  # timm's


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
