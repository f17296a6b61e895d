"""Where in the tree of modules the program is: a scope for each place, a frame for each run."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax

from ._compat import set_current_trace

Item = TypeVar("Item")


@dataclasses.dataclass(eq=False, frozen=True)
class Scope:
    """A place in the tree of modules.

    A scope holds no arrays, so that a Collection may keep one, and JAX may keep the
    Collection's structure, without keeping tracers alive.
    """

    name: str | None  # None for a module that `init` or `call` ran without one
    parent: Scope | None = None  # that of the module above
    segment: str | None = None  # what this place adds to the path of all that is stored in it

    def line_from(self, ancestor: Scope | None) -> list[Scope] | None:
        """List the scopes from below `ancestor` down to this one; None if it lies elsewhere."""
        line: list[Scope] = []
        scope: Scope | None = self
        while scope is not ancestor:
            if scope is None:
                return None
            line.append(scope)
            scope = scope.parent
        return line[::-1]


def path_of(line: list[Scope] | None) -> str:
    """Return the path of the last scope of a line, such as "/block/conv"."""
    root, *below = line or [Scope(None)]
    # A root without a name is "/", also where it stands inside of a module.
    segments = [None if root.name is None else root.segment, *(s.segment for s in below)]
    return "/" + "/".join(segment for segment in segments if segment is not None)


@dataclasses.dataclass(eq=False)
class Frame:
    """What one run of a module works with."""

    scope: Scope
    params: Mapping[str, Any]  # its own and those of its submodules, by name
    rng: Any = None  # the key from which `init` makes parameters; None where they are only read
    trace: Any = None  # that in which `init` was called: what is stored in `params` belongs to it
    transparent: bool = False  # whether submodules stand, in paths, at the place of the module
    shared: dict[str, bool] = dataclasses.field(default_factory=dict)  # of each submodule's name
    automatic_names: int = 0
    unnamed_runs: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.params, Mapping):
            raise TypeError(
                f'params of the module "{path_of(self.scope.line_from(None))}" must be a dict by'
                f" name, as `init` returns it beside the output, got {type(self.params).__name__}."
            )

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what makes a key or a parameter: at once, or with a traced key where `init` runs.

        What is made must not be lost with a transformation inside of the module, such as
        `jax.lax.scan`, which would trace whatever a traced key takes part in.
        """
        place: Any = contextlib.nullcontext()
        if isinstance(self.rng, jax.core.Tracer):
            place = set_current_trace(self.trace)  # type: ignore[no-untyped-call]
        with place, jax.ensure_compile_time_eval():
            return function(*args)

    def check_free(self, name: str, *, shared: bool) -> None:
        """Refuse a name for a submodule that another one, or a parameter, has."""
        if name not in self.shared:
            if self.rng is not None and name in self.params:
                raise ValueError(f"Name '{name}' was already used for a parameter of this module.")
        elif self.shared[name] != shared:
            raise ValueError(
                f'The name "{name}" is used for both a shared and unshared module. Rename one.'
            )
        elif shared:
            raise ValueError(
                f'Shared module named "{name}" already exists. Call `shared` once and use its'
                " result each time."
            )
        else:
            raise ValueError(
                f'A module with named "{name}" already exists. Rename one, or make it once with'
                " `shared` to use it twice."
            )

    def scope_of(self, name: str | None, class_name: str) -> Scope:
        """Make the scope of a module that runs inside this one."""
        if self.transparent:
            return Scope(name, self.scope, None)
        if name is not None:
            return Scope(name, self.scope, name)
        # A colon stands in no module's name, so this meets none of them.
        segment = f"{class_name}:{self.unnamed_runs}"
        self.unnamed_runs += 1
        return Scope(None, self.scope, segment)


class Stack(threading.local, Generic[Item]):
    """What the with statements of one thread have entered; the innermost is the last."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    @property
    def top(self) -> Item | None:
        return self.items[-1] if self.items else None

    @contextlib.contextmanager
    def pushed(self, item: Item) -> Iterator[Item]:
        """Keep `item` on top for the time of a with statement."""
        self.items.append(item)
        try:
            yield item
        finally:
            self.items.pop()


frames: Stack[Frame] = Stack()  # of the modules that run


def top_frame(caller: str) -> Frame:
    """Return the frame of the module that runs, or say that `caller` needs one."""
    if frames.top is None:
        raise ValueError(f"{caller} should only be used inside a module's apply function.")
    return frames.top


def initializing_frame() -> Frame | None:
    """Return the innermost frame that makes parameters, or None outside of any `init`."""
    return next((frame for frame in reversed(frames.items) if frame.rng is not None), None)


def check_name(name: object) -> None:
    """Refuse what cannot be a part of a path."""
    if not isinstance(name, str):
        raise ValueError(f"Name must be a string. Got {name!r}, a {type(name).__name__}.")
    if "/" in name or ":" in name:
        raise ValueError(
            f'Name should not contain slashes or colons. Got "{name}"; both have a meaning in '
            "the paths of a Collection."
        )
    if not name:
        raise ValueError("Name should not be empty. Leave it out to have one made.")
