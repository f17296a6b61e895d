"""Normalizations, additions and activations of a model in one call each, for training."""

import operator
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node
from torch.nn.modules.lazy import LazyModuleMixin

from .. import checks
from ._activations import name_of
from ._changes import Change, record
from ._compat import is_as_its_class
from ._fused import (
    FusedForward,
    Program,
    Settings,
    has_forward,
    is_as_sequential,
    is_identity,
    together,
)
from ._layer import Layer
from ._libraries import Act, after_normalization, is_normalization
from ._tracing import UntraceableError, name_of_function, trace, traced_owners, why_unseen
from .conversion import becomes, convert

_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE: set[Any] = {operator.iadd, "add_"}
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.silu: "silu",
}
_OUT_OF_PLACE: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem),
    getattr,
}
# Whose functions change nothing, unless their names or arguments say so.
_PURE = {None, "torch", "torch.nn.functional", "math", "builtins", "collections"}
# Their outputs are in new memory, which nothing else has yet.
_MAKERS = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Make each normalization one call with the relu or silu after it, and an addition between.

    ``relu(norm(x) + y)`` is one pass over memory then, and its backward pass keeps x (and y) alone.
    It is for training, and holds in evaluation as well.

    Each module that calls a normalization in its own forward is traced by torch.fx, alone: its
    children are called as they are, a torch.nn.Sequential only where a fusion goes beyond its
    bounds. Of a module where something is fused, `forward` becomes what was traced; all else of the
    model, its classes, parameters, `state_dict`, hooks and methods, stays. What is fused is made
    ours, as by `convert`. A module's own forward is called where it is given other arguments than
    tensors for those without default, or where its settings (its attributes, and what is in them if
    they are lists or dicts) have changed since; so are the layer and the activation apart, where
    they have been replaced or hooked, or where the addition changes shape or dtype.

    `changes` says what was fused, and why the others were left: those that more than one call uses,
    say, or whose output goes elsewhere as well.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    TypeError
        If model is no torch.nn.Module.

    Warns
    -----
    UserWarning
        If the model holds no batch normalization.

    See Also
    --------
    revert : takes back what is fused.

    Notes
    -----
    What a forward does beside computing, printing say, it does while it is traced, and no longer in
    a call; and it reads no more of objects that are no modules, a configuration say. One that sets
    attributes, draws random numbers by itself, decides by values or types of tensors or changes
    autograd's mode is left as it is. torch.nn.DataParallel, which copies modules in a way of its
    own, does not go with what is fused; DistributedDataParallel does.

    Examples
    --------
    >>> import torch
    >>> import batchnorm.torch
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    ...         self.norm = torch.nn.BatchNorm2d(8)
    ...     def forward(self, x):
    ...         return torch.relu(self.norm(self.conv(x)) + x)
    >>> model = batchnorm.torch.fuse(torch.nn.Sequential(Block(), Block()))
    >>> for change in batchnorm.torch.changes(model):
    ...     print(*change, sep=": ")
    0.norm: fused: with the addition and the relu after it
    1.norm: fused: with the addition and the relu after it
    >>> type(model[0]) is Block
    True
    """
    checks.instance("model", model, torch.nn.Module)
    paths = {each: path for path, each in model.named_modules() if is_normalization(each)}
    if not paths:
        warnings.warn(
            f"fuse found no batch normalization in this {type(model).__name__}, and so changes "
            "nothing.",
            stacklevel=2,
        )
    plan = _Plan(model, paths)
    for layer in plan.fused:
        convert(layer)
    for owner in plan.graphs:
        vars(owner).pop("forward", None)
        if owner in plan.forwards:
            vars(owner)["forward"] = plan.forwards[owner]
    record(
        model,
        [
            Change(path, "fused", plan.fused[layer])
            if layer in plan.fused
            else Change(path, "left", plan.left[layer])
            for layer, path in paths.items()
        ],
    )
    return model


class _Site(NamedTuple):
    """The calls that become one."""

    normalization: Node
    addition: Node | None
    activation: Node

    @property
    def residual(self) -> Any:
        if self.addition is None:
            return None
        one, other = self.addition.args
        return other if one is self.normalization else one

    @property
    def paths(self) -> list[str]:
        """Where they are called: of the modules, and "" of a function in the forward itself."""
        calls = [each for each in self if each is not None]
        return [str(each.target) if each.op == "call_module" else "" for each in calls]

    def why(self, owner: torch.nn.Module) -> str:
        after = "the" if self.addition is None else "the addition and the"
        if (module := _module(self.activation, owner)) is not None:
            return f"with {after} {type(module).__name__} {self.activation.target!r} after it"
        return f"with {after} {_ACTIVATIONS[self.activation.target]} after it"


class _Plan:
    """What is to be done, before anything is."""

    def __init__(self, model: torch.nn.Module, paths: dict[torch.nn.Module, str]) -> None:
        self.fused: dict[torch.nn.Module, str] = {}
        self.left: dict[torch.nn.Module, str] = {}
        self.forwards: dict[torch.nn.Module, FusedForward] = {}
        self.graphs, failures = traced_owners(model)
        self.identities = {
            owner: _see_through(owner, graphs) for owner, graphs in self.graphs.items()
        }
        calls = Counter(
            owner.get_submodule(str(node.target))
            for owner, graphs in self.graphs.items()
            for node in graphs[True].nodes
            if node.op == "call_module"
        )
        self.candidates: set[torch.nn.Module] = set()
        for layer, path in paths.items():
            kind, reason = _kind(path, layer)
            if reason is None and calls[layer] > 1:
                reason = "more than one call uses it"
            if reason is not None:
                self.left[layer] = reason
            elif issubclass(kind, Act):
                self.fused[layer] = "with its own activation"
            else:
                self.candidates.add(layer)
        for owner in self.graphs:
            self._fuse(owner)
        for layer in paths:
            self.left.setdefault(layer, why_unseen(layer, failures))

    def _fuse(self, owner: torch.nn.Module) -> None:
        within = self._crossed(owner)
        graphs, identities = self.graphs[owner], self.identities[owner]
        if within:
            graphs = trace(owner, within.values())
            identities = _see_through(owner, graphs)
        sites = {}
        for training, graph in graphs.items():
            sites[training], reasons = self._sites(owner, graph)
            for layer, reason in reasons.items():
                self.left.setdefault(layer, reason)
        if not any(sites.values()):
            return
        programs = {}
        for training, graph in graphs.items():
            for layer, site in sites[training].items():
                self.fused[layer] = site.why(owner)
                _rewrite(graph, site)
            code = graph.python_code("self")
            programs[training] = Program(code.src, code.globals)
        followed = [*_followed(owner, within), *sorted(identities)]
        settings = [Settings.of(path, owner.get_submodule(path)) for path in followed]
        self.forwards[owner] = FusedForward(owner, programs, settings)

    def _crossed(self, owner: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """By path, the Sequentials that an owner calls and a fusion goes beyond the bounds of."""
        called = [node.target for node in self.graphs[owner][True].nodes]
        inner = {
            path: each
            for path, each in owner.named_modules()
            if is_as_sequential(each)
            and not self.candidates.isdisjoint(each.modules())
            and any(f"{path}.".startswith(f"{one}.") for one in called)
        }
        try:
            graphs = trace(owner, inner.values()) if inner else {}
        except UntraceableError:
            graphs = {}
        _see_through(owner, graphs)
        crossed = {}
        for graph in graphs.values():
            for site in self._sites(owner, graph)[0].values():
                for path, each in inner.items():
                    inside = [one.startswith(f"{path}.") for one in site.paths]
                    if any(inside) and not all(inside):
                        crossed[path] = each
        return crossed

    def _sites(
        self, owner: torch.nn.Module, graph: fx.Graph
    ) -> tuple[dict[torch.nn.Module, _Site], dict[torch.nn.Module, str]]:
        """What can be fused in a graph, and why the other normalizations in it can't be."""
        sites: dict[torch.nn.Module, _Site] = {}
        reasons: dict[torch.nn.Module, str] = {}
        for node in graph.nodes:
            layer = _module(node, owner)
            if layer not in self.candidates:
                continue
            found = _site(node, owner)
            if isinstance(found, str):
                reasons[layer] = found
            elif any(found.activation is each.activation for each in sites.values()):
                reasons[layer] = "it is what is added to another normalization, which is fused"
            else:
                sites[layer] = found
        return sites, reasons


def _see_through(owner: torch.nn.Module, graphs: Mapping[bool, fx.Graph]) -> set[str]:
    """Take away the calls of torch.nn.Identity, and say which they were."""
    found = set()
    for node in [each for graph in graphs.values() for each in graph.nodes]:
        if is_identity(_module(node, owner)) and len(node.args) == 1:
            found.add(str(node.target))
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
    return found


def _followed(owner: torch.nn.Module, within: Mapping[str, torch.nn.Module]) -> list[str]:
    """The paths of modules whose own children a trace has called: lists of modules, too."""
    followed = [""]
    for path, each in owner.named_modules():
        is_around = path in within or not has_forward(each)
        if path and is_around and path.rpartition(".")[0] in followed:
            followed.append(path)
    return followed


def _kind(path: str, layer: torch.nn.Module) -> tuple[type[torch.nn.Module], str | None]:
    """Its class of ours; and why nothing can be fused with it, if so."""
    kind: type[torch.nn.Module] = type(layer)
    if isinstance(layer, LazyModuleMixin):
        return kind, "it is lazy: call the model once before"
    if not is_as_its_class(layer):
        return kind, "it has hooks or a forward of its own"
    try:
        kind = becomes(path, layer) or kind
    except (TypeError, ValueError) as error:
        return kind, str(error)
    if issubclass(kind, Act):
        drop, act = after_normalization(layer)
        name = name_of(act) if type(drop) is torch.nn.Identity and is_as_its_class(drop) else None
        if name is None:
            return kind, "it calls modules of its own after it, which are no relu or silu alone"
        return kind, f"it applies its {name} itself" if kind is type(layer) else None
    if isinstance(layer, Layer) and layer.activation is not None:
        return kind, f"it applies its {layer.activation} itself"
    return kind, None


def _module(node: Node, owner: torch.nn.Module) -> torch.nn.Module | None:
    """What is called, if it is a module."""
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def _function(node: Node) -> Any:
    """What is called, if it is a function, or the name of a method."""
    return node.target if node.op in ("call_function", "call_method") else None


def _site(node: Node, owner: torch.nn.Module) -> _Site | str:
    """What can be fused with a call of a normalization; or why nothing can be."""
    if node.kwargs or len(node.args) != 1:
        return "it is called with more than its input"
    if len(node.users) != 1:
        return "its output goes to more than one place" if node.users else "nothing uses its output"
    (user,) = node.users
    addition = None
    if _function(user) in _ADDITIONS:
        if (
            user.kwargs
            or len(user.args) != 2
            or not all(isinstance(each, Node) for each in user.args)
        ):
            return "what is added is no other tensor, or is weighted"
        if user.args[0] is user.args[1]:
            return "it is added to itself"
        if _function(user) in _IN_PLACE and user.args[0] is not node:
            return "it is added in place to a tensor that may have another name"
        if len(user.users) != 1:
            return "its sum with another tensor goes to more than one place"
        addition, (user,) = user, user.users
    if _activation(user, owner) is None:
        return f"what follows is {_described(user, owner)}, and no relu or silu"
    site = _Site(node, addition, user)
    return _why_not_together(site, owner) or site


def _activation(node: Node, owner: torch.nn.Module) -> str | None:
    module = _module(node, owner)
    return _ACTIVATIONS.get(_function(node)) if module is None else name_of(module)


def _described(node: Node, owner: torch.nn.Module) -> str:
    if node.op == "output":
        return "the end of the forward that calls it"
    if (module := _module(node, owner)) is None:
        return f"the function {name_of_function(node)}"
    hooked = "" if is_as_its_class(module) else ", with hooks or a forward of its own"
    return f"the {type(module).__name__} {node.target!r}{hooked}"


def _why_not_together(site: _Site, owner: torch.nn.Module) -> str | None:
    """Whether it matters that the normalization is called where the addition is.

    And that its backward pass keeps what is added, which that of an addition does not.
    """
    if site.addition is None:
        return None
    nodes = list(site.normalization.graph.nodes)
    places = [nodes.index(each) for each in (site.normalization, site.addition, site.activation)]
    (input,) = site.normalization.all_input_nodes
    is_its_own = len(input.users) == 1 and isinstance(_module(input, owner), _MAKERS)
    for place, node in enumerate(nodes):
        if node.op == "get_attr" and node.target.startswith(f"{site.normalization.target}."):
            return f"{node.target} is read in the same forward, perhaps in between"
        if place in places or not _may_change(node, owner):
            continue
        if places[0] < place < places[1] and not is_its_own:
            return f"{_described(node, owner)}, called in between, may change its input"
        if place > places[1] and site.residual in node.all_input_nodes:
            return f"{_described(node, owner)} may change what is added, later on"
    return None


def _may_change(node: Node, owner: torch.nn.Module) -> bool:
    """Whether a call may change its arguments; all modules but torch.nn's and ours may."""
    module = _module(node, owner)
    if module is not None:
        return not all(
            is_as_sequential(each) or (_is_known(each) and not getattr(each, "inplace", False))
            for each in module.modules()
        )
    if (function := _function(node)) is None or function in _OUT_OF_PLACE:
        return False
    if isinstance(function, str):
        return function.endswith("_")
    arguments = [*node.args, *node.kwargs.values()]  # inplace=True, say
    is_pure = function.__module__ in _PURE and not function.__name__.endswith("_")
    return not is_pure or any(each is True for each in arguments) or "out" in node.kwargs


def _is_known(module: torch.nn.Module) -> bool:
    is_torch = type(module).__module__.startswith("torch.nn.modules.")
    return (is_torch or is_normalization(module)) and is_as_its_class(module)


def _rewrite(graph: fx.Graph, site: _Site) -> None:
    """Put one call in the place of those of a site."""
    (input,) = site.normalization.args
    activation: Any = _ACTIVATIONS.get(_function(site.activation))
    in_place = site.addition is not None and _function(site.addition) in _IN_PLACE
    with graph.inserting_before(site.addition or site.normalization):
        layer = graph.get_attr(str(site.normalization.target))
        if activation is None:
            activation = graph.get_attr(str(site.activation.target))
        arguments = (layer, input, site.residual, activation, in_place)
        call = graph.call_function(together, arguments)
    site.activation.replace_all_uses_with(call)
    for node in (site.activation, site.addition, site.normalization):
        if node is not None:
            graph.erase_node(node)
