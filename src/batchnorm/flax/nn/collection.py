"""Collection: values kept outside of the parameters, each under the path of its module."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from ._compat import belongs_to, current_trace
from .scope import Scope, frames, path_of, top_frame

Tree = TypeVar("Tree")


def _copied(tree: Tree) -> Tree:
    """Copy the containers and keep the leaves."""
    copy: Tree = jax.tree.map(lambda leaf: leaf, tree)
    return copy


@dataclasses.dataclass
class Mutation:
    """What a collection knows for the time of being mutable."""

    trace: Any  # the transformation in which it became so
    root: Scope | None = None  # the first scope below the anchor that stored


class Collection:
    """Values that modules keep from one application to the next, such as running averages.

    A collection maps the paths of modules, "/" and "/block/conv", to what they stored.
    Paths begin at the module in which the collection was made, or at the outermost one.
    It is a pytree, so that it may go in and out of `jax.jit` and its like. Modules can
    only store in a copy made by `mutate`, for the time of its with statement.

    Parameters
    ----------
    state
        What the collection holds, by path. Empty by default.

    Raises
    ------
    TypeError
        `state` is not a dict.

    Examples
    --------
    >>> import jax
    >>> from batchnorm.flax import nn
    >>> class Square(nn.Module):
    ...     def apply(self, x, inputs):
    ...         inputs.store(x)
    ...         return x * x
    >>> with nn.Collection().mutate() as inputs:
    ...     Square.call({}, 3, inputs)
    9
    >>> inputs["/"]
    3
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        if not (state is None or isinstance(state, dict)):
            raise TypeError(
                f"state must be a dict from paths to values, got {type(state).__name__}."
            )
        self.state = {} if state is None else state
        self.anchor = None if frames.top is None else frames.top.scope  # where paths begin
        self.mutation: Mutation | None = None

    def __repr__(self) -> str:
        return f"Collection({self.state!r})"

    def as_dict(self) -> dict[str, Any]:
        """Return what is stored, by path.

        The dict is a copy, the values are those of the collection: what is written into a
        dict that a module has stored counts.
        """
        return self.state.copy()

    def __getitem__(self, path: str) -> Any:
        if path not in self.state:
            raise KeyError(f"Nothing is stored under {path!r}. Paths: {list(self.state)}.")
        return self.state[path]

    @contextlib.contextmanager
    def mutate(self) -> Iterator[Collection]:
        """Make a copy in which modules can store; after the with statement it is frozen.

        Dicts, lists and other containers are copied, what they hold is not.
        """
        collection = _unflatten(self.anchor, (_copied(self.state),))
        collection.mutation = Mutation(current_trace())
        try:
            yield collection
        finally:
            # Whoever keeps the collection must not keep the transformation alive.
            collection.mutation = None

    def retrieve(self, default: Any = None) -> Any:
        """Return what the module that runs has stored.

        Parameters
        ----------
        default
            Returned where nothing is stored.

        Raises
        ------
        ValueError
            No module runs, or it lies outside of the one in which the collection was made.
        """
        return retrieve(self, top_frame("retrieve").scope, default)

    def store(self, value: Any) -> Any:
        """Store a value for the module that runs, and return the one it replaces, or None.

        Parameters
        ----------
        value
            Any pytree.

        Raises
        ------
        ValueError
            No module runs, or it lies outside of the one in which the collection was made;
            the collection is not mutable; the value belongs to a JAX transformation that
            began after `mutate`; or a second outermost module stores, and one of the two
            has no name to keep them apart.
        """
        return store(self, top_frame("store").scope, value)


def frozen(collection: Collection) -> Collection:
    """Return the collection, in the place of a mutable one another that holds the same."""
    if collection.mutation is None:
        return collection
    return _unflatten(collection.anchor, (collection.state,))


def retrieve(collection: Collection, scope: Scope, default: Any) -> Any:
    """Return what the module at `scope` has stored."""
    return collection.state.get(path_of(_line_to(scope, collection.anchor)), default)


def store(collection: Collection, scope: Scope, value: Any) -> Any:
    """Store a value for the module at `scope`, and return the one it replaces."""
    path = path_to_store(collection, scope, value)
    replaced = collection.state.get(path)
    collection.state[path] = value
    return replaced


def path_to_store(collection: Collection, scope: Scope, value: Any) -> str:
    """Return where the module at `scope` stores, if it may store `value`."""
    mutation = collection.mutation
    if mutation is None:
        raise ValueError(
            "Collection is not mutable. Use the `mutate` method to create a mutable copy,"
            " or `stateful` with mutable=True, and store inside of its with statement."
        )
    if not belongs_to(value, mutation.trace):
        raise ValueError(
            "Stateful operations are not allowed when the Collection is created outside of"
            " the current Jax transformation. Make it mutable (`mutate`, `stateful`,"
            " `capture_module_outputs`) inside of the transformed function, and return it"
            " from there."
        )
    line = _line_to(scope, collection.anchor)
    first, root = mutation.root or line[0], line[0]
    if first is not root and None in (first.name, root.name):
        raise ValueError(
            "When multiple top-level module calls use a Collection each top-level module"
            " should have a name. Pass name= to each call, the same one where they share"
            " state, or make the Collection mutable for each of them anew."
        )
    mutation.root = first
    return path_of(line)


def _line_to(scope: Scope, anchor: Scope | None) -> list[Scope]:
    line = scope.line_from(anchor)
    if line is None:
        raise ValueError(
            "Trying to capture state outside the scope of this Collection. Most likely due"
            " to passing around a shared Module: make the Collection where the shared"
            " module was made, or further out."
        )
    if not line:
        raise ValueError(
            "State should be stored from within a module. Consider using the value directly"
            " instead of storing it in a Collection that this module itself has made."
        )
    return line


def _flatten(collection: Collection) -> tuple[tuple[Any], Scope | None]:
    if collection.mutation is not None:
        raise ValueError(
            "A mutable collection should not be transformed by Jax. Pass the collection it was"
            " made from, and call `mutate` or `stateful` inside of the transformed function."
        )
    return (collection.state,), collection.anchor


def _unflatten(anchor: Scope | None, children: tuple[Any]) -> Collection:
    collection = Collection()
    collection.anchor = anchor
    (collection.state,) = children  # any state, unchecked: JAX also unflattens with placeholders
    return collection


jax.tree_util.register_pytree_node(Collection, _flatten, _unflatten)
