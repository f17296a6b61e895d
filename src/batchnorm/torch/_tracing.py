"""What the forward of one module does, as torch.fx records it; or why that can't be known.

torch.fx runs a forward once, on values that are not there yet. What it would record wrongly without
a word is refused here: what depends on how it is called, on a mode, on random numbers or on a value
that it changes.
"""

import inspect
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Attribute

from ._fused import FusedForward, has_forward
from ._libraries import is_normalization

_IN_PLACE = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}
_AUTOCAST = ("cpu", "cuda")
_COLLECTIONS = (dict, list, immutable_dict, immutable_list)
_OF_ATTRIBUTES = ("root", "attr", "_node")  # what torch.fx sets on values of that kind
# Where a module keeps what torch.fx records, in the place of reading and changing it.
_RECORDED = ("_parameters", "_buffers", "_modules")


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
        for training, others, mode in product((True, False), repeat=3):
            for each in _in_python(owner):
                vars(each)["training"] = training if each is owner else others
            with torch.set_grad_enabled(mode), _autocast(mode):
                graph = _traced(owner, within, entered)
            if before.changed():
                raise UntraceableError("it changes the module, or draws random numbers of its own")
            if source_of(graph) != source_of(graphs.setdefault(training, graph)):
                raise UntraceableError(
                    "it depends on the modes of its children, of gradients or of autocast"
                )
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
    for path, each in owner.named_modules():
        vars(each)["parameters"] = partial(tracer.parameters_of, path, each)
    try:
        graph = tracer.trace(owner)
    except UntraceableError:
        raise
    except Exception as error:
        message = str(error).partition("\n")[0].rstrip(".")
        raise UntraceableError(f"{type(error).__name__}: {message}") from error
    finally:
        for each in owner.modules():
            del vars(each)["parameters"]
    if entered is not None:
        entered |= tracer.entered
    graph.output_node().type = None  # an annotation of the user's, which a program has no use for
    return graph


class _Value(fx.Proxy):
    """A value that is not there yet. It says where torch.fx would take it for something else."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance asks, where the class itself does not tell."""
        raise UntraceableError(f"it asks for the type of {_name_of(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", *_OF_ATTRIBUTES):
            raise UntraceableError(f"it sets {name} of {_name_of(self)}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """That of torch.fx has every attribute, whatever hasattr is asked for."""
        if not hasattr(torch.Tensor, name):
            raise UntraceableError(f"it asks for {name} of {_name_of(self)}, as no tensor has it")
        return _AttributeOfValue(self, name)


class _AttributeOfValue(_Value, Attribute):
    """An attribute of a value, or a method of one, which is about to be called."""


def _name_of(value: fx.Proxy) -> str:
    is_given = value.node.op == "placeholder"
    return f"its argument {value.node.target}" if is_given else value.node.name


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
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg({**a}),), {})
        if isinstance(a, dict | list) and type(a) not in _COLLECTIONS:  # which torch.fx would make
            raise UntraceableError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

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
        if _holds_collection((*args, *kwargs.values())):
            raise UntraceableError(
                f"it gives {self.path_of_module(m)!r} a list or dict, which that may change"
            )
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def parameters_of(
        self, path: str, module: torch.nn.Module, recurse: bool = True
    ) -> Iterator[fx.Proxy]:
        """What its parameters() are: their dtype, say, may be another one in a call."""
        for name, _ in module.named_parameters(path, recurse):
            yield self.create_proxy("get_attr", name, (), {})


def _holds_collection(value: Any) -> bool:
    kind = type(value)  # isinstance would ask values that are not there yet
    return issubclass(kind, dict | list) or (
        issubclass(kind, tuple) and any(map(_holds_collection, value))
    )


@contextmanager
def _autocast(is_enabled: bool) -> Iterator[None]:
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in _AUTOCAST]
    try:
        for kind, _ in before:
            torch.set_autocast_enabled(kind, is_enabled)
        yield
    finally:
        for kind, was_enabled in before:
            torch.set_autocast_enabled(kind, was_enabled)


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *map(torch.is_autocast_enabled, _AUTOCAST),
    )


def _in_python(owner: torch.nn.Module) -> list[torch.nn.Module]:
    """Its modules, without programs of torch.jit, in which attributes come and go."""
    return [each for each in owner.modules() if not isinstance(each, torch.jit.ScriptModule)]


class _State:
    """All that a forward may change while it is traced, as it was before."""

    def __init__(self, owner: torch.nn.Module) -> None:
        self.attributes = [(vars(each), dict(vars(each))) for each in _in_python(owner)]
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.generators = [(get, put, get()) for get, put in _GENERATORS]
        self.seen: set[int] = set()
        for attributes, _ in self.attributes:
            for name, value in attributes.items():
                if name in _RECORDED:
                    self.containers.append((value, value.copy()))
                else:
                    self._enter(value)

    def _enter(self, value: Any) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, dict | list | set | deque):
            self.containers.append((value, value.copy()))
        if isinstance(value, dict | list | set | deque | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                self._enter(each)
        elif isinstance(value, torch.Tensor) and not value.is_meta:
            self.tensors.append((value, value.detach().clone()))
        elif (generator := _generator(value)) is not None:
            get, put = generator
            self.generators.append((get, put, get()))

    def changed(self) -> bool:
        for now, before in self.attributes:
            if now.keys() != before.keys() or any(
                now[name] is not each for name, each in before.items() if name != "training"
            ):
                return True
        return (
            any(
                len(now) != len(before) or any(map(operator.is_not, _values(now), _values(before)))
                for now, before in self.containers
            )
            or not all(_equal(now, before) for now, before in self.tensors)
            or not all(_equal(get(), before) for get, _, before in self.generators)
        )

    def put_back(self) -> None:
        for now, before in (*self.attributes, *self.containers):
            now.clear()
            if isinstance(now, list | deque):
                now.extend(before)
            else:
                now.update(before)
        with torch.no_grad():
            for tensor, values in self.tensors:
                if not _equal(tensor, values):
                    tensor.copy_(values)
        for _, put, state in self.generators:
            put(state)


def _values(container: Any) -> list[Any]:
    return [*container, *(container.values() if isinstance(container, dict) else ())]


_Generator = tuple[Callable[[], Any], Callable[[Any], Any]]
_GENERATORS: list[_Generator] = [
    (random.getstate, random.setstate),
    (partial(np.random.get_state, legacy=False), np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
]


def _generator(value: Any) -> _Generator | None:
    """How the state of a generator of random numbers is read and set, if it is one."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return partial(value.get_state, legacy=False), value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_equal(one[key], other[key]) for key in one)
    return bool(np.all(one == other))
