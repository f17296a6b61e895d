"""What the forward of one module does, as torch.fx records it; or why that can't be known.

torch.fx runs a forward once, on values that are not there yet. What it would record wrongly without
a word is refused here: what depends on how it is called, on a mode, on random numbers or on a value
that it changes.
"""

import inspect
import operator
import random
from collections.abc import Callable, Collection
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx

from ._fused import FusedForward
from ._libraries import is_normalization

_IN_PLACE = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}


class UntraceableError(Exception):
    """Why it can't be known what a forward does."""


def trace(
    owner: torch.nn.Module,
    within: Collection[torch.nn.Module] = (),
    entered: set[torch.nn.Module] | None = None,
) -> dict[bool, fx.Graph]:
    """What the forward of a module does in training (True) and in evaluation (False).

    It is called with tensors for its required arguments. Its children are called as they are, but
    for those Sequentials that are `within`, of which it is their children that are called; they are
    added to `entered`.

    Raises
    ------
    UntraceableError
        If the forward does something else for other inputs, say, or changes the module.
    """
    if not isinstance(vars(owner).get("forward"), FusedForward | None):
        raise UntraceableError("a forward is set on the module itself")
    graphs: dict[bool, fx.Graph] = {}
    before = _State(owner)
    try:
        for training, others, gradients in product((True, False), repeat=3):
            for each in owner.modules():
                vars(each)["training"] = training if each is owner else others
            with torch.set_grad_enabled(gradients):
                graph = _traced(owner, within, entered)
            if before.changed():
                raise UntraceableError("it changes the module, or draws random numbers of its own")
            if source_of(graph) != source_of(graphs.setdefault(training, graph)):
                raise UntraceableError("it depends on the modes of its children, or of gradients")
    finally:
        before.put_back()
    return graphs


def traced_owners(
    model: torch.nn.Module,
) -> tuple[dict[torch.nn.Module, dict[bool, fx.Graph]], dict[torch.nn.Module, str]]:
    """What each module with a forward and a normalization in it does; or why that is unknown."""
    graphs: dict[torch.nn.Module, dict[bool, fx.Graph]] = {}
    failures: dict[torch.nn.Module, str] = {}
    for path, owner in model.named_modules():
        is_around = any(map(is_normalization, owner.modules())) and not is_normalization(owner)
        if not (is_around and has_forward(owner)):
            continue
        try:
            graphs[owner] = trace(owner)
        except UntraceableError as error:
            failures[owner] = why_untraceable(path, owner, error)
    return graphs, failures


def has_forward(module: torch.nn.Module) -> bool:
    """Whether it has one in Python; a ModuleList has none, nor has a program of torch.jit."""
    return getattr(type(module), "forward", None) not in (None, torch.nn.Module.forward)


def why_untraceable(path: str, owner: torch.nn.Module, error: UntraceableError) -> str:
    where = repr(path) if path else f"the model, a {type(owner).__name__},"
    return f"the forward of {where} can't be traced: {error}"


def why_unseen(layer: torch.nn.Module, failures: dict[torch.nn.Module, str]) -> str:
    """Why a layer is in no graph."""
    around = [
        why for owner, why in failures.items() if any(layer is one for one in owner.modules())
    ]
    return around[-1] if around else "nothing that could be traced calls it"


def name_of_function(node: fx.Node) -> str:
    """Of a call of a function or method."""
    return str(getattr(node.target, "__name__", node.target))


def source_of(graph: fx.Graph) -> str:
    """A graph as a function `forward` of the module and its inputs."""
    source: str = graph.python_code("self").src
    return source


def _traced(
    owner: torch.nn.Module,
    within: Collection[torch.nn.Module],
    entered: set[torch.nn.Module] | None,
) -> fx.Graph:
    tracer = _Tracer(within)
    try:
        graph = tracer.trace(owner)
    except UntraceableError:
        raise
    except Exception as error:
        message = str(error).partition("\n")[0].rstrip(".")
        raise UntraceableError(f"{type(error).__name__}: {message}") from error
    if entered is not None:
        entered |= tracer.entered
    graph.output_node().type = None  # an annotation of the user's, which a program has no use for
    return graph


class _Value(fx.Proxy):
    """A value that is not there yet. It says where torch.fx would take it for something else."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance asks, where the class itself does not tell."""
        is_given = self.node.op == "placeholder"
        what = f"its argument {self.node.target}" if is_given else self.node.name
        raise UntraceableError(f"it asks for the type of {what}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise UntraceableError(f"it sets {name} of {self.node.name}")
        super().__setattr__(name, value)


def _recorded_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """That of torch.fx would be a sum, say, in the place of one that changes its first operand."""

    def record(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name, _function in _IN_PLACE.items():
    setattr(_Value, _name, _recorded_in_place(_function))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # which would be changed, were they themselves

    def __init__(self, within: Collection[torch.nn.Module]) -> None:
        # Those of `math`, replaced for a while, would stay so for what is imported meanwhile.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.within, self.modes = within, _modes()
        self.entered: set[torch.nn.Module] = set()

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [
            each.name
            for each in parameters
            if each.default is each.empty and each.kind < each.VAR_POSITIONAL
        ]
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in required]
        return root_fn, [self.root, *inputs]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_node(self, *arguments: Any, **keywords: Any) -> fx.Node:
        if _modes() != self.modes:
            raise UntraceableError("it changes the mode of autograd or autocast within")
        return super().create_node(*arguments, **keywords)

    def call_module(
        self, m: torch.nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if any(m is each for each in self.within):
            self.entered.add(m)
            return type(m).forward(m, *args, **kwargs)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _State:
    """All that a forward may change while it is traced, as it was before."""

    def __init__(self, owner: torch.nn.Module) -> None:
        self.attributes = [(vars(each), dict(vars(each))) for each in owner.modules()]
        containers = [
            value
            for _, attributes in self.attributes
            for value in attributes.values()
            if isinstance(value, dict | list)
        ]
        self.containers = [(each, each.copy()) for each in containers]
        self.random = _random_state()

    def changed(self) -> bool:
        for now, before in self.attributes:
            if now.keys() != before.keys() or any(
                now[name] is not each for name, each in before.items() if name != "training"
            ):
                return True
        return any(
            len(now) != len(before) or any(map(operator.is_not, _values(now), _values(before)))
            for now, before in self.containers
        ) or not all(map(_equal, _random_state(), self.random))

    def put_back(self) -> None:
        for now, before in (*self.attributes, *self.containers):
            now.clear()
            if isinstance(now, list):
                now.extend(before)
            else:
                now.update(before)
        python, numpy, pytorch = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def _values(container: Any) -> list[Any]:
    return [*container, *(container.values() if isinstance(container, dict) else ())]


def _random_state() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_equal(one[key], other[key]) for key in one)
    return bool(np.all(one == other))
