"""Model: a module together with its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .module import Module
from .outputs import TruncatedModule


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A module together with its parameters, to be called like a function.

    A model is a pytree whose leaves are the parameters, so that it may be passed through
    `jax.jit` and `jax.vmap`; its gradient is a model too. Methods that the module has by
    `nn.module_method` are the model's methods. Models are equal only if identical, so that
    what `jax.jit(model)` has compiled is used for no other.

    Parameters
    ----------
    module
        A subclass of Module.
    params
        Its parameters, as `init` returns them.

    Raises
    ------
    TypeError
        `module` is not a subclass of Module.

    Examples
    --------
    >>> import jax
    >>> from batchnorm.flax import nn
    >>> class Shift(nn.Module):
    ...     def apply(self, x):
    ...         return x + self.param("bias", (), nn.initializers.ones)
    >>> _, params = Shift.init(jax.random.PRNGKey(0), 2.0)
    >>> model = nn.Model(Shift, params)
    >>> float(model(2.0))
    3.0
    >>> gradient = jax.grad(lambda model: model(2.0) ** 2)(model)
    >>> float(gradient.params["bias"])
    6.0
    """

    module: type[Module]
    params: Any

    def __post_init__(self) -> None:
        if not (isinstance(self.module, type) and issubclass(self.module, Module)):
            raise TypeError(
                f"module must be a subclass of nn.Module, got {self.module!r}. "
                "The order is nn.Model(module, params)."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module; the arguments are those of `Module.call`."""
        return self.module.call(self.params, *args, **kwargs)

    def replace(self, **changes: Any) -> Model:
        """Return a copy with another `module` or other `params`."""
        return dataclasses.replace(self, **changes)

    def truncate_at(self, module_path: Any) -> Model:
        """Return a model that outputs what modules inside of this one put out.

        Parameters
        ----------
        module_path
            The path of a module, such as "/block/conv", or a list, dict or other pytree of
            paths. Calling the new model with a path that no module has is a KeyError.

        Returns
        -------
        Model
            Its output has the structure of `module_path`, and for each path the list of
            the outputs of the module there.

        Examples
        --------
        >>> from batchnorm.flax import nn
        >>> @nn.module
        ... def Double(x):
        ...     return 2 * x
        >>> @nn.module
        ... def Network(x):
        ...     return Double(x) + 1
        >>> nn.Model(Network, {"Double_0": {}}).truncate_at("/Double_0")(5)
        [10]
        """
        return self.replace(
            module=TruncatedModule.partial(wrapped_module=self.module, truncate_path=module_path)
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # vars: `self.module` would lead here again where unpickling has not set it yet.
        method = getattr(vars(self).get("module"), name, None)
        if isinstance(method, type) and issubclass(method, Module):
            return functools.partial(method.call, self.params)
        raise AttributeError(
            f'No attribute named "{name}". A Model has module, params, replace, truncate_at and'
            " the functions that its module declares with nn.module_method."
        )


jax.tree_util.register_dataclass(Model, data_fields=["params"], meta_fields=["module"])
