"""State variables of modules, and the with statement that says where they are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .collection import Collection, frozen, path_to_store, retrieve
from .scope import Scope, Stack

_entered: Stack[Collection] = Stack()  # by `stateful`


@contextlib.contextmanager
def stateful(state: Collection | None = None, mutable: bool = True) -> Iterator[Collection]:
    """Let modules keep state, for the time of a with statement, in a mutable copy of `state`.

    Of several such statements the innermost counts; each thread has its own. Under
    `jax.jit` and its like, pass `state` as an argument, enter `stateful` inside of the
    transformed function, and return the new state.

    Parameters
    ----------
    state
        The state so far; by default there is none.
    mutable
        Whether modules may change it: pass False to evaluate. Then there is no copy.

    Yields
    ------
    Collection
        The copy, which holds the new state after the with statement; or `state`.

    Raises
    ------
    TypeError
        `state` is not a Collection.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.flax import nn
    >>> class Calls(nn.Module):
    ...     def apply(self):
    ...         calls = self.state("calls", (), nn.initializers.zeros)
    ...         if not self.is_initializing():
    ...             calls.value += 1
    ...         return calls.value
    >>> with nn.stateful() as state:
    ...     _, params = Calls.init(jax.random.PRNGKey(0))
    >>> @jax.jit
    ... def step(params, state):
    ...     with nn.stateful(state) as new_state:
    ...         Calls.call(params)
    ...     return new_state
    >>> float(step(params, step(params, state))["/"]["calls"])
    2.0
    """
    if not (state is None or isinstance(state, Collection)):
        raise TypeError(
            f"state must be a Collection or None, got {type(state).__name__}. "
            "nn.Collection(...) makes one from a dict."
        )
    before = Collection() if state is None else state
    kept = before.mutate() if mutable else contextlib.nullcontext(frozen(before))
    with kept as after, _entered.pushed(after):
        yield after


def is_stateful() -> bool:
    """Whether a `stateful` with statement is active in this thread.

    Examples
    --------
    >>> from batchnorm.flax import nn
    >>> with nn.stateful():
    ...     inside = nn.is_stateful()
    >>> inside, nn.is_stateful()
    (True, False)
    """
    return _entered.top is not None


def get_state() -> Collection:
    """Return the collection of the innermost `stateful` with statement.

    Raises
    ------
    ValueError
        None is active in this thread.

    Examples
    --------
    >>> from batchnorm.flax import nn
    >>> with nn.stateful() as state:
    ...     nn.get_state() is state
    True
    """
    if _entered.top is None:
        raise ValueError(
            "Use the flax.nn.stateful context manager to enable stateful computations:"
            " `with nn.stateful(state) as new_state:`, or pass a Collection."
        )
    return _entered.top


class ModuleState:
    """A state variable of a module, as `Module.state` returns it.

    All the variables of one module stand in one dict, under the module's path.

    Attributes
    ----------
    name
        The name of the variable.

    Examples
    --------
    >>> from batchnorm.flax import nn
    >>> class Last(nn.Module):
    ...     def apply(self, x):
    ...         last = self.state("x")
    ...         last.value = x
    ...         return last.name, last.value
    >>> with nn.stateful() as state:
    ...     Last.call({}, 3)
    ('x', 3)
    >>> state["/"]
    {'x': 3}
    """

    def __init__(self, collection: Collection, scope: Scope, name: str) -> None:
        self._collection = collection
        self._scope = scope
        self.name = name

    @property
    def value(self) -> Any:
        """The value in the collection, which assigning replaces.

        Raises
        ------
        ValueError
            On reading, the variable does not exist. On assigning, `Collection.store`
            refuses the value.
        """
        variables = variables_of(self._collection, self._scope, self.name)
        if self.name not in variables:
            raise ValueError(
                f"No state variable named `{self.name}` exists. Variables of this module: "
                f"{list(variables)}. `init` under `stateful` makes them."
            )
        return variables[self.name]

    @value.setter
    def value(self, value: Any) -> None:
        variables = variables_of(self._collection, self._scope, self.name)
        path = path_to_store(self._collection, self._scope, value)
        # In place: programs keep the dict, and write into it themselves.
        self._collection.state.setdefault(path, variables)[self.name] = value


def variables_of(collection: Collection, scope: Scope, name: str) -> dict[str, Any]:
    """Return the state variables of the module at `scope`, for the one of that name."""
    variables = retrieve(collection, scope, {})
    if not isinstance(variables, dict):
        raise ValueError(
            f"State variable `{name}` cannot be kept in this Collection: the module has"
            f" stored a {type(variables).__name__} there. Use a Collection of its own."
        )
    return variables
