"""Looking at, and returning, the outputs of the modules inside of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from .collection import Collection
from .module import Module
from .scope import context, pushed
from .tracing import belongs_to, current_trace


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
    {'/': [11], '/Double_0': [10]}
    """
    with (
        Collection().mutate() as outputs,
        pushed(context.recorders, lambda output: _record(outputs, output)),
    ):
        yield outputs


def _record(outputs: Collection, output: Any) -> None:
    outputs.store([*outputs.retrieve(default=[]), output])


class TransparentModule(Module):
    """A module around one other that does not show in the parameters or in paths.

    The child has the name "0", which `shared` gives to the first one without a name.

    Examples
    --------
    >>> import jax
    >>> from batchnorm.flax import nn
    >>> class Shift(nn.Module):
    ...     def apply(self, x):
    ...         return x + self.param("bias", (), nn.initializers.ones)
    >>> class Doubled(nn.TransparentModule):
    ...     def apply(self, x):
    ...         return 2 * Shift(x, name="0")
    >>> Doubled.init(jax.random.PRNGKey(0), 2.0)[1]
    {'bias': Array(1., dtype=float32)}
    """

    _transparent = True

    @classmethod
    def _wrap(cls, params: Any) -> Any:
        return {"0": params}

    @classmethod
    def _unwrap(cls, params: Any) -> Any:
        if len(params) != 1:
            raise ValueError(
                f"Transparent modules should have exactly one child. Got {list(params)}."
            )
        if "0" not in params:
            raise ValueError(
                f"Transparent modules should contain an unnamed child. Got {list(params)};"
                ' pass name="0" to it.'
            )
        return params["0"]


class TruncatedModule(TransparentModule):
    """A module around another that returns outputs from inside of it; see Model.truncate_at."""

    def apply(
        self,
        *args: Any,
        wrapped_module: type[Module] | None = None,
        truncate_path: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run a module and return outputs from inside of it.

        Parameters
        ----------
        *args, **kwargs
            The arguments of the wrapped module.
        wrapped_module
            The module to run.
        truncate_path
            The path of a module inside of it, or a pytree of paths.

        Returns
        -------
        Any
            For each path the list of the outputs of the module there.

        Raises
        ------
        ValueError
            `wrapped_module` or `truncate_path` is missing.
        KeyError
            No module has the path.
        """
        if wrapped_module is None or truncate_path is None:
            raise ValueError(
                "`wrapped_module` and `truncate_path` are required keyword arguments. "
                f"Got {wrapped_module!r} and {truncate_path!r}."
            )
        trace = current_trace()
        with Collection().mutate() as outputs:

            def record(output: Any) -> None:
                # Nothing can come out of a transformation inside of the model.
                if belongs_to(output, trace):
                    _record(outputs, output)

            with pushed(context.recorders, record):
                wrapped_module(*args, name="0", **kwargs)
        return jax.tree.map(outputs.__getitem__, truncate_path)
