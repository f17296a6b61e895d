"""What `fuse` puts in the place of a module's forward."""

import functools
import importlib
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._activations import FUNCTIONS, name_of
from ._compat import has_hooks, is_as_its_class
from ._layer import Layer

_USUAL = {*vars(torch.nn.Module()), "forward"}


class Program:
    """A function of a module and its inputs, as source with the objects that it names."""

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        self.source, self.names = source, dict(names)
        found: dict[str, Any] = dict(names)
        exec(compile(source, "<batchnorm.torch.fuse>", "exec"), found)
        self.function: Callable[..., Any] = found["forward"]

    def __reduce__(self) -> Any:
        names = {
            name: _Imported(each.__name__) if isinstance(each, types.ModuleType) else each
            for name, each in self.names.items()
        }
        return _program, (self.source, names)

    def __deepcopy__(self, memo: Any) -> "Program":
        return self  # which nothing changes


class _Imported(NamedTuple):
    """A Python module, which can't be pickled."""

    name: str


def _program(source: str, names: Mapping[str, Any]) -> Program:
    found = {
        name: importlib.import_module(each.name) if isinstance(each, _Imported) else each
        for name, each in names.items()
    }
    return Program(source, found)


class Settings(NamedTuple):
    """What a forward may have decided by, of the module at a path of its owner."""

    path: str
    values: dict[str, Any]
    children: list[str]

    @classmethod
    def of(cls, path: str, module: torch.nn.Module) -> "Settings":
        state = module.__getstate__()  # what a copy lacks would stay behind in its settings
        copied = state if isinstance(state, dict) else vars(module)
        values = {
            name: _setting(each)
            for name, each in vars(module).items()
            if name in copied and name not in _USUAL
        }
        return cls(path, values, [name for name, _ in module.named_children()])

    def hold(self, owner: torch.nn.Module) -> bool:
        """Whether they are what they were."""
        module = owner.get_submodule(self.path)
        is_its_own = is_as_sequential(module) or is_identity(module) or not has_forward(module)
        if self.path and not is_its_own:
            return False
        return self.children == [name for name, _ in module.named_children()] and all(
            _is_as_it_was(getattr(module, name, None), each) for name, each in self.values.items()
        )


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _setting(value: Any) -> Any:
    """A value as it is now: what is in a container, and of a tensor no more than that it is one.

    A tensor is read in each call.
    """
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        return {key: _setting(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_setting(each) for each in value]
    return set(value) if isinstance(value, set) else value


def _is_as_it_was(now: Any, setting: Any) -> bool:
    if now is setting:
        return True
    if isinstance(now, Tensor):
        return setting is Tensor
    if isinstance(now, dict):
        return (
            isinstance(setting, dict)
            and now.keys() == setting.keys()
            and all(_is_as_it_was(each, setting[key]) for key, each in now.items())
        )
    if isinstance(now, list | tuple):
        is_as_long = isinstance(setting, list) and len(now) == len(setting)
        return is_as_long and all(map(_is_as_it_was, now, setting))
    return type(now) is type(setting) and isinstance(now, (*_PLAIN, set)) and bool(now == setting)


class FusedForward:
    """A forward with normalizations, additions and activations in one; where it can't serve, the
    class's own.

    It is an attribute of its module, which stays what it was otherwise: a copy of the module has a
    copy of it, which knows the copy.
    """

    def __init__(
        self, owner: torch.nn.Module, programs: dict[bool, Program], settings: list[Settings]
    ) -> None:
        self.owner, self.programs, self.settings = owner, programs, settings
        parameters = list(inspect.signature(type(owner).forward).parameters.values())[1:]
        self.positional = [each.name for each in parameters if each.kind < each.VAR_POSITIONAL]
        self.defaults = {
            each.name: each.default for each in parameters if each.default is not each.empty
        }
        self.required = [each for each in self.positional if each not in self.defaults]

    def __reduce__(self) -> Any:
        return FusedForward, (self.owner, self.programs, self.settings)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        owner = self.owner
        inputs = self._inputs(arguments, keywords)
        if inputs is None or not all(each.hold(owner) for each in self.settings):
            return type(owner).forward(owner, *arguments, **keywords)
        return self.programs[owner.training].function(owner, *inputs)

    def _inputs(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor] | None:
        """The required ones, if they are tensors, and all others have their defaults."""
        given = {**dict(zip(self.positional, arguments, strict=False)), **keywords}
        inputs = [given.pop(name, None) for name in self.required]
        is_usual = (
            len(inputs) + len(given) == len(arguments) + len(keywords)
            and all(isinstance(each, Tensor) for each in inputs)
            and all(
                name in self.defaults and each is self.defaults[name]
                for name, each in given.items()
            )
        )
        return inputs if is_usual else None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.owner).forward, self.owner))


def has_forward(module: torch.nn.Module) -> bool:
    """Whether it has one in Python; a ModuleList has none, nor has a program of torch.jit."""
    return getattr(type(module), "forward", None) not in (None, torch.nn.Module.forward)


def is_as_sequential(module: torch.nn.Module) -> bool:
    """Whether a call of it is that of its children, one after the other, and nothing else."""
    return (
        isinstance(module, torch.nn.Sequential)
        and type(module).forward is torch.nn.Sequential.forward
        and not has_hooks(module)
        and isinstance(vars(module).get("forward"), FusedForward | None)
    )


def is_identity(module: torch.nn.Module | None) -> bool:
    """Whether a call of it gives what it got, and does nothing."""
    return type(module) is torch.nn.Identity and is_as_its_class(module)


def restore(model: torch.nn.Module) -> None:
    """Give every module the forward of its class again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del vars(module)["forward"]


def together(
    layer: torch.nn.Module,
    input: Tensor,
    residual: Any,
    activation: torch.nn.Module | str,
    in_place: bool = False,
) -> Tensor:
    """activation(layer(input) + residual), in one call where that is the same.

    Not where the sum has another shape or dtype than the input; nor where something else is to
    happen at the layer or the activation, which may have been hooked, replaced or converted since.
    """
    name = activation if isinstance(activation, str) else name_of(activation)
    if (
        name is not None
        and isinstance(layer, Layer)
        and layer.activation is None
        and is_as_its_class(layer)
        and (residual is None or _can_be_added(residual, input))
    ):
        output: Tensor = layer(input, residual, activation=name)
        return output
    y = layer(input)
    if residual is not None:
        y = operator.iadd(y, residual) if in_place else y + residual
    return FUNCTIONS[activation](y) if isinstance(activation, str) else activation(y)


def _can_be_added(residual: Any, input: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.device == input.device
        and residual.layout == input.layout
        and residual.is_floating_point()
        and torch.promote_types(residual.dtype, input.dtype) == input.dtype
    )
