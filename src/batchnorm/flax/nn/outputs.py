"""Looking at, and returning, the outputs of the modules inside of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ._compat import belongs_to, current_trace
from .collection import Collection, path_to_store
from .scope import Stack, top_frame

_recorders: Stack[Callable[[Any], None]] = Stack()


def record(output: Any) -> None:
    """Show the output of the module that runs to all who look on."""
    for recorder in _recorders.items:
        recorder(output)


@contextlib.contextmanager
def capture_module_outputs() -> Iterator[Collection]:
    """Keep the outputs of all modules that run, for the time of a with statement.

    Yields
    ------
    Collection
        A list of outputs for each path; a shared module has one for each use.

    Examples
    --------
    >>> from batchnorm.flax import nn
    >>> @nn.module
    ... def Double(x):
    ...     return 2 * x
    >>> @nn.module
    ... def Network(x):
    ...     return Double(x) + 1
    >>> with nn.capture_module_outputs() as outputs:
    ...     Network.call({"Double_0": {}}, 5)
    11
    >>> outputs.as_dict()
    {'/Double_0': [10], '/': [11]}
    """
    with (
        Collection().mutate() as outputs,
        _recorders.pushed(lambda output: _keep(outputs, output)),
    ):
        yield outputs


def outputs_at(paths: Any, run: Callable[[], Any]) -> Any:
    """Return what `run` makes modules put out: for each of a pytree of paths, a list."""
    trace = current_trace()
    with Collection().mutate() as outputs:

        def recorder(output: Any) -> None:
            # Nothing can come out of a transformation inside of the model.
            if belongs_to(output, trace):
                _keep(outputs, output)

        with _recorders.pushed(recorder):
            run()
    return jax.tree.map(outputs.__getitem__, paths)


def _keep(outputs: Collection, output: Any) -> None:
    path = path_to_store(outputs, top_frame("capture_module_outputs").scope, output)
    outputs.state.setdefault(path, []).append(output)
