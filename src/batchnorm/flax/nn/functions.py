"""Decorators that make Modules from functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .module import Module, derived


def module(function: Callable[..., Any]) -> type[Module]:
    """Make a Module whose `apply` is a function without `self`.

    Examples
    --------
    >>> from batchnorm.flax import nn
    >>> @nn.module
    ... def Twice(x):
    ...     return 2 * x
    >>> Twice.call({}, 4)
    8
    """

    def apply(self: Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    apply.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    apply.__doc__ = function.__doc__
    same = {each: getattr(function, each) for each in ("__module__", "__qualname__", "__doc__")}
    return derived(Module, function.__name__, apply=apply, **same)


class module_method:  # noqa: N801, it is used as a decorator
    """Make a function a further method of a Module, beside `apply`.

    A Model and a shared module have it as a method that uses the module's parameters.

    Examples
    --------
    >>> import jax
    >>> from batchnorm.flax import nn
    >>> class Shift(nn.Module):
    ...     def apply(self, x):
    ...         return x + self.param("bias", (), nn.initializers.ones)
    ...     @nn.module_method
    ...     def back(self, y):
    ...         return y - self.get_param("bias")
    >>> y, model = Shift.create(jax.random.PRNGKey(0), 2.0)
    >>> float(y), float(model.back(y))
    (3.0, 2.0)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Module | None, owner: type[Module]) -> type[Module]:
        # The method is itself a Module: the owner with another apply, made once for each.
        made_as = f"_{self._function.__name__}_method"
        if made_as not in vars(owner):
            name = self._function.__name__
            qualname = f"{owner.__qualname__}.{name}"
            method = derived(owner, name, apply=self._function, __qualname__=qualname)
            setattr(owner, made_as, method)
        made: type[Module] = vars(owner)[made_as]
        return made
