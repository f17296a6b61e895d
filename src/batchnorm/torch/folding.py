"""Normalizations of a model into the convolutions and linear layers before them, to evaluate it."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.lazy import LazyModuleMixin

from .. import checks, layers
from ._activations import MODULES
from ._changes import Change, record
from ._compat import is_as_its_class
from ._fused import has_forward, is_as_sequential, restore
from ._layer import Layer
from ._libraries import after_normalization, is_normalization
from ._tracing import (
    UntraceableError,
    name_of_function,
    trace,
    why_unseen,
    why_untraceable,
)
from .conversion import becomes
from .layers import BatchNorm2d, BatchNorm3d, SyncBatchNorm

_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
_KINDS = {torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, *_TRANSPOSED, torch.nn.Linear}
_TOLERANCE = 1e-6


def fold(model: torch.nn.Module, example: Any = None) -> torch.nn.Module:
    """Copy a model for evaluation, without the normalizations that follow a convolution.

    ``norm(conv(x))`` is a convolution as well, by the running statistics:
    ``weight·s`` and ``(bias - mean)·s + norm.bias``, with ``s = norm.weight / sqrt(var + eps)``.
    So it is after a linear layer. That is computed in float64, and stored in the dtype of the
    weight. In the place of a layer that is folded is a torch.nn.Identity, or what the layer did
    beside normalizing: its activation, and the addition of a residual.

    A normalization is folded where all that is known of the model says that it follows a layer
    whose output goes nowhere else: each module's forward is traced by torch.fx, as in `fuse`, in
    evaluation and with its required arguments alone. Where one can't be traced, that is known of
    the torch.nn.Sequentials in it, if they are called as a whole.

    `changes` says what was folded, and why the others were left.

    Parameters
    ----------
    model : torch.nn.Module
        It stays as it is.
    example : tensor, or tuple of arguments, optional
        For model. With it, the model and its copy are computed in float64, and compared.

    Returns
    -------
    torch.nn.Module
        A copy of the model, in evaluation mode, which needs nothing of this package unless the
        model does.

    Raises
    ------
    TypeError
        If model is no torch.nn.Module, or lazy in a part: it is to be called once before.
    ValueError
        If the outputs on the example differ by more than 1e-6 of the largest.

    Warns
    -----
    UserWarning
        If the model holds no batch normalization.

    Notes
    -----
    A linear layer and a BatchNorm1d are taken to have inputs (N, C). In (N, L, C), what is
    normalized is L, which is possible only where L = C: such a model is refused with an example.

    Two modules that share a parameter do so no longer if one is folded.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    ...     torch.nn.MaxPool2d(2), torch.nn.BatchNorm2d(8),
    ... )
    >>> x = torch.randn(2, 3, 8, 8)
    >>> folded = batchnorm.torch.fold(model, x)
    >>> for change in batchnorm.torch.changes(folded):
    ...     print(*change, sep=": ")
    1: folded: into the Conv2d '0'
    4: left: what comes before it is the MaxPool2d '3'
    >>> torch.allclose(folded(x), model.eval()(x), atol=1e-5)
    True
    """
    checks.instance("model", model, torch.nn.Module)
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin):
            raise TypeError(
                f"fold needs to know all parameters, but {path or 'model'!r} is lazy. Call the "
                "model once before."
            )
    if not any(map(is_normalization, model.modules())):
        warnings.warn(
            f"fold found no batch normalization in this {type(model).__name__}: what it returns "
            "is a copy in evaluation mode.",
            stacklevel=2,
        )
    folded = copy.deepcopy(model).eval()
    found = _fold(folded)
    if example is not None:
        _compare(model, example if isinstance(example, tuple) else (example,))
    record(folded, found)
    return folded


class Rest(torch.nn.Module):
    """What a layer that is folded did with a residual that it was called with."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = torch.nn.Identity() if activation is None else MODULES[activation]()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        total = input if residual is None else (input + residual).to(input.dtype)
        output: Tensor = self.activation(total)
        return output


def _fold(model: torch.nn.Module) -> list[Change]:
    """Fold what can be folded, in place."""
    restore(model)
    paths = {each: path for path, each in model.named_modules()}
    calls = _Calls(model)
    found = []
    rests = {}
    for layer, path in paths.items():
        if not is_normalization(layer):
            continue
        before = calls.before(layer)
        if not isinstance(before, str):
            before = _put_into(before, layer, path) or before
        if isinstance(before, str):
            found.append(Change(path, "left", before))
            continue
        rests[layer] = _rest(layer, layer in calls.with_residual).eval()
        found.append(Change(path, "folded", f"into the {type(before).__name__} {paths[before]!r}"))
    for layer, rest in rests.items():
        # The same object, which may be known elsewhere than in the tree: in a list, say.
        layer.__class__ = type(rest)
        layer.__dict__ = dict(vars(rest))
    return found


class _Calls:
    """Which layers follow which, in everything that is known of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Of each layer, what comes after it or before it, in each of its calls: a module, or words.
        self.after: defaultdict[torch.nn.Module, list[Any]] = defaultdict(list)
        self.comes: defaultdict[torch.nn.Module, list[Any]] = defaultdict(list)
        self.with_residual: set[torch.nn.Module] = set()
        self.read: set[torch.nn.Module] = set()
        self.failures: dict[torch.nn.Module, str] = {}
        graphs: dict[torch.nn.Module, fx.Graph] = {}
        entered: set[torch.nn.Module] = set()
        for path, owner in model.named_modules():
            if not _calls_others(owner):
                continue
            within = [
                each for each in owner.modules() if each is not owner and is_as_sequential(each)
            ]
            try:
                graphs[owner] = trace(owner, within, entered)[False]
            except UntraceableError as error:
                self.failures[owner] = why_untraceable(path, owner, error)
        for owner, graph in graphs.items():
            # Its callers say more of a Sequential than itself, where all of them are known.
            has_unknown = any(owner is one for each in self.failures for one in each.modules())
            if owner not in entered or has_unknown:
                self._read(owner, graph)

    def _read(self, owner: torch.nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr" and not all(map(_asks_for_no_values, node.users)):
                self.read.add(owner.get_submodule(node.target.rpartition(".")[0]))
            if node.op != "call_module":
                continue
            module = owner.get_submodule(node.target)
            users = list(node.users)
            is_one = (
                len(users) == 1 and users[0].op == "call_module" and users[0].args[:1] == (node,)
            )
            self.after[module].append(owner.get_submodule(users[0].target) if is_one else None)
            if is_normalization(module):
                self.comes[module].append(self._before(node, owner, module))

    def _before(self, node: fx.Node, owner: torch.nn.Module, layer: torch.nn.Module) -> Any:
        arguments = [*node.args[1:], *node.kwargs]
        if not node.args:
            return "it is called with its input by name"
        if arguments:
            if len(arguments) > 1 or not (node.args[1:] or "residual" in node.kwargs):
                return "it is called with more than its input and a residual"
            self.with_residual.add(layer)
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op in ("placeholder", "get_attr"):
            return "what comes before it is the input of the forward that calls it"
        if before.op != "call_module":
            return f"what comes before it is the function {name_of_function(before)}"
        module = owner.get_submodule(str(before.target))
        if type(module) not in _KINDS:
            return f"what comes before it is the {type(module).__name__} {before.target!r}"
        return module

    def before(self, layer: torch.nn.Module) -> torch.nn.Module | str:
        """The layer that it always follows, and alone does; or why there is none."""
        if layer not in self.comes:
            return why_unseen(layer, self.failures)
        before, *others = self.comes[layer]
        if any(each is not before for each in others):
            words = [each for each in (before, *others) if isinstance(each, str)]
            return words[0] if words else "it follows more than one layer"
        if isinstance(before, str):
            return before
        if any(each is not layer for each in self.after[before]):
            return f"the output of the {type(before).__name__} before it goes elsewhere, too"
        if layer in self.with_residual and len(self.comes[layer]) > 1:
            return "more than one call uses it, with a residual"
        if before in self.read or layer in self.read:
            return "its parameters, or those of the layer before it, are read elsewhere"
        return before


def _asks_for_no_values(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("dtype", "device")


def _calls_others(module: torch.nn.Module) -> bool:
    return (
        type(module) not in _KINDS
        and not is_normalization(module)
        and has_forward(module)
        and any(type(each) in _KINDS or is_normalization(each) for each in module.modules())
    )


def _put_into(before: Any, layer: Any, path: str) -> str | None:
    """Fold a normalization into the layer before it; or say why it can't be."""
    if not (is_as_its_class(before) and is_as_its_class(layer)):
        return "it, or the layer before it, has hooks or a forward of its own"
    try:
        kind = becomes(path, layer) or type(layer)
    except (TypeError, ValueError) as error:
        return str(error)
    if layer.running_mean is None or getattr(layer, "normalize_by", None) == "batch":
        return "it normalizes by the batch in evaluation, too"
    if getattr(layer, "update_running", None):
        return "it moves its running statistics in evaluation, too"
    is_of_images = issubclass(kind, BatchNorm2d | BatchNorm3d) and not issubclass(
        kind, SyncBatchNorm
    )
    if type(before) is torch.nn.Linear and is_of_images:
        return "it normalizes another axis than the last, which the Linear before it makes"
    weight = before.weight
    if weight.is_meta or weight.is_complex():
        return "the weight before it has no values yet, or complex ones"
    is_transposed = type(before) in _TRANSPOSED
    channels = weight.shape[1] * before.groups if is_transposed else len(weight)
    if len(layer.running_mean) != channels:
        return "it has another number of channels than the layer before it makes"
    ones = [1] * (weight.ndim - 2)
    exact, shape = _exact(weight), (channels, 1, *ones)
    if is_transposed:  # (in, out / groups, ...), where each group has its own of both
        exact = exact.unflatten(0, (before.groups, -1))
        shape = (before.groups, 1, weight.shape[1], *ones)
    folded_weight, folded_bias = layers.folded(
        exact,
        _exact(before.bias),
        shape,
        mean=_exact(layer.running_mean),
        var=_exact(layer.running_var),
        scale=_exact(layer.weight),
        shift=_exact(layer.bias),
        eps=float(vars(layer)["eps"]),
    )
    new_weight = torch.empty_like(weight).copy_(folded_weight.reshape(weight.shape))
    new_bias = folded_bias.to(weight.device, weight.dtype)
    if not (new_weight.isfinite().all() and new_bias.isfinite().all()):
        return f"what it would be folded into is not finite in {weight.dtype}"
    before.weight, before.bias = (
        torch.nn.Parameter(each, requires_grad=weight.requires_grad)
        for each in (new_weight, new_bias)
    )
    return None


def _exact(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().cpu().double()


def _rest(layer: torch.nn.Module, has_residual: bool) -> torch.nn.Module:
    """What takes the place of a layer that is folded."""
    name = getattr(layer, "activation", None) if isinstance(layer, Layer) else None
    if has_residual:
        return Rest(name)
    after = [each for each in after_normalization(layer) if type(each) is not torch.nn.Identity]
    if not after and name is not None:
        after = [MODULES[name]()]
    if len(after) == 1:
        return after[0]
    return torch.nn.Sequential(*after) if after else torch.nn.Identity()


def _compare(model: torch.nn.Module, example: tuple[Any, ...]) -> None:
    """That the fold of a model does the same as the model, both in float64."""
    outputs = []
    for is_folded in (False, True):
        exact = copy.deepcopy(model).double().eval()
        if is_folded:
            _fold(exact)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(list(_tensors(exact(*_doubled(example)))))
    if not outputs[0]:
        raise TypeError(
            "fold compares tensors, in tuples, lists and dicts, but what the model returns for "
            "example holds none."
        )
    for wanted, got in zip(*outputs, strict=True):
        off = (got - wanted).abs().max() / wanted.abs().max() if wanted.numel() else 0
        if not (off <= _TOLERANCE or torch.equal(got, wanted)):
            raise ValueError(
                f"fold would change what the model returns for example: in float64, by {off:.1g} "
                f"of the largest output, more than {_TOLERANCE:g}. A forward may use a layer in a "
                "way that can't be seen, or a BatchNorm1d follow a Linear on three axes. Fold a "
                "part of the model that has none."
            )


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(each) for key, each in value.items()}
    return type(value)(map(_doubled, value)) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that a model returns."""
    if isinstance(value, Tensor):
        yield value.double()
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)
