"""Module: a function with parameters; Model: one together with them; and what is made of both."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import numpy as np

from ._compat import belongs_to, current_trace
from .by_shape import partly_evaluated
from .collection import Collection
from .keys import check_key, fold_in, split
from .outputs import outputs_at, record
from .scope import Frame, Scope, check_name, frames, initializing_frame, top_frame
from .state import ModuleState, get_state, is_stateful, variables_of

Initializer = Callable[..., Any]


class Module(abc.ABC):
    """A function with parameters: a subclass defines it as `apply`.

    `init` and `call` run a module from outside. Inside of another module's `apply`,
    constructing a module runs it as a submodule and gives its output, not an instance.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.flax import nn
    >>> class Dense(nn.Module):
    ...     def apply(self, x, features):
    ...         shape = (x.shape[-1], features)
    ...         return x @ self.param("kernel", shape, nn.initializers.ones)
    >>> class Network(nn.Module):
    ...     def apply(self, x):
    ...         x = Dense(x, features=3)
    ...         return Dense(x, features=1, name="last")
    >>> y, params = Network.init(jax.random.PRNGKey(0), jnp.ones((1, 2)))
    >>> jax.tree.map(jnp.shape, params)
    {'Dense_0': {'kernel': (2, 3)}, 'last': {'kernel': (3, 1)}}
    >>> Network.call(params, jnp.ones((1, 2)))
    Array([[6.]], dtype=float32)
    """

    __signature__: ClassVar[inspect.Signature]

    _bound: ClassVar[dict[str, Any]] = {}  # arguments given to `partial` and `shared`
    _name: ClassVar[str | None] = None
    _owner: ClassVar[weakref.ref[Frame] | None] = None  # the frame that called `shared`
    _transparent: ClassVar[bool] = False

    _frame: Frame

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.apply is Module.apply:
            return
        signature = inspect.signature(cls.apply)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        cls.__doc__ = cls.apply.__doc__ or cls.__doc__

    def __new__(cls, /, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        parent = cls._parent()
        if name is None:
            name = cls._name
        else:
            cls._check_renaming(name)
        automatic = name is None
        if name is None:
            name = f"{cls.__name__}_{parent.automatic_names}"
        check_name(name)
        if cls._owner is None:
            parent.check_free(name, shared=False)

        creating = parent.rng is not None and name not in parent.params
        if not (creating or name in parent.params):
            raise ValueError(
                f"No module named {name} was created during initialization. "
                f"The parameters have: {list(parent.params)}."
            )
        frame = Frame(
            scope=parent.scope_of(name, cls.__name__),
            params={} if creating else cls._wrap(parent.params[name]),
            rng=parent.make(fold_in, parent.rng, name) if creating else None,
            trace=parent.trace,
            transparent=cls._transparent,
        )
        output = cls._run(frame, args, kwargs)
        # The parent learns of the submodule here, so that one that fails leaves nothing.
        if creating:
            parent.params[name] = cls._unwrap(frame.params)  # type: ignore[index]
        parent.automatic_names += automatic
        parent.shared[name] = cls._owner is not None
        return output

    @abc.abstractmethod
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output from the arguments and from `self.param(...)`."""

    @classmethod
    def init(
        cls, rng: Any, /, *args: Any, name: str | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the module and make its parameters.

        A parameter's key depends on `rng` and on the names of the modules around it. Under
        `stateful` each state variable changes the keys of the parameters declared after it
        in the same module.

        Parameters
        ----------
        rng
            A JAX random key.
        *args, **kwargs
            The arguments of `apply`.
        name
            The module's name in a Collection. By default it has none.

        Returns
        -------
        tuple
            The output, and the parameters as nested dicts.

        Raises
        ------
        TypeError
            `rng` is not a random key, or the arguments are not those of `apply`.
        ValueError
            Names clash, or an initializer gave another shape than `param` was asked for.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", (), nn.initializers.ones)
        >>> y, params = Shift.init(jax.random.PRNGKey(0), 2.0)
        >>> float(y), float(params["bias"])
        (3.0, 1.0)
        """
        check_key(rng)
        frame = cls._outermost_frame(name, params={}, rng=rng)
        output = cls._run(frame, args, kwargs)
        return output, cls._unwrap(frame.params)

    @classmethod
    def init_by_shape(
        cls,
        rng: Any,
        /,
        input_specs: Iterable[Any],
        *args: Any,
        name: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Make the module's parameters from the shapes of its inputs, computing nothing else.

        What depends on the inputs comes back as `jax.ShapeDtypeStruct`, the rest as it is.

        Parameters
        ----------
        rng, name
            As for `init`.
        input_specs
            For each of the first arguments of `apply`: a pair (shape, dtype), a shape, which
            means float32, or anything with `.shape` and `.dtype`.
        *args, **kwargs
            The other arguments of `apply`.

        Returns
        -------
        tuple
            The output, and the parameters as nested dicts.

        Raises
        ------
        TypeError
            `input_specs` is none of these; else as for `init`.
        ValueError
            As for `init`.

        Examples
        --------
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", x.shape[-1:], nn.initializers.ones)
        >>> y, params = Shift.init_by_shape(jax.random.PRNGKey(0), [((8, 2), jnp.float32)])
        >>> y.shape, params
        ((8, 2), {'bias': Array([1., 1.], dtype=float32)})
        """

        def init(*inputs: Any) -> tuple[Any, Any]:
            return cls.init(rng, *inputs, *args, name=name, **kwargs)

        output, params = partly_evaluated(init, input_specs)
        return output, params

    @classmethod
    def create(
        cls, rng: Any, /, *args: Any, name: str | None = None, **kwargs: Any
    ) -> tuple[Any, Model]:
        """Do as `init`, and return the output and a Model.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", (), nn.initializers.ones)
        >>> y, model = Shift.create(jax.random.PRNGKey(0), 2.0)
        >>> float(model(5.0))
        6.0
        """
        output, params = cls.init(rng, *args, name=name, **kwargs)
        return output, Model(cls, params)

    @classmethod
    def create_by_shape(
        cls,
        rng: Any,
        /,
        input_specs: Iterable[Any],
        *args: Any,
        name: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Model]:
        """Do as `init_by_shape`, and return the output and a Model."""
        output, params = cls.init_by_shape(rng, input_specs, *args, name=name, **kwargs)
        return output, Model(cls, params)

    @classmethod
    def call(cls, params: Any, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Run the module with the given parameters.

        Parameters
        ----------
        params
            The parameters, as `init` returned them. They are only read; more than the module
            asks for are allowed.
        *args, **kwargs
            The arguments of `apply`.
        name
            The module's name in a Collection. By default it has none.

        Returns
        -------
        Any
            The output of `apply`.

        Raises
        ------
        TypeError
            The arguments are not those of `apply`.
        ValueError
            `params` lacks something that the module asks for, or has it in another shape.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", (), nn.initializers.ones)
        >>> Shift.call({"bias": jax.numpy.array(0.5)}, 2.0)
        Array(2.5, dtype=float32, weak_type=True)
        """
        return cls._run(cls._outermost_frame(name, params=cls._wrap(params)), args, kwargs)

    @classmethod
    def partial(cls, *, name: str | None = None, **kwargs: Any) -> type[Module]:
        """Make a subclass with some arguments, and maybe the name, already given.

        Arguments at the call win over these, and these over those of a `partial` before.

        Parameters
        ----------
        name
            The name of the module.
        **kwargs
            Arguments of `apply`.

        Raises
        ------
        ValueError
            `name` is not fit to be one, or the module is shared and has its name already.

        Examples
        --------
        >>> from batchnorm.flax import nn
        >>> class Scale(nn.Module):
        ...     def apply(self, x, by):
        ...         return by * x
        >>> Twice = Scale.partial(by=2)
        >>> Twice.call({}, 5), Twice.call({}, 5, by=3)
        (10, 15)
        """
        if name is not None:
            check_name(name)
            cls._check_renaming(name)
        return derived(
            cls, _bound={**cls._bound, **kwargs}, _name=cls._name if name is None else name
        )

    @classmethod
    def shared(cls, *, name: str | None = None, **kwargs: Any) -> type[Module]:
        """Make a submodule of the module that runs, to be used more than once.

        All uses have the same parameters, which live in the module where `shared` was
        called, even if another one, to which it is passed, uses it.

        Parameters
        ----------
        name
            The name of the submodule. By default it is the next number.
        **kwargs
            Arguments of `apply`, as for `partial`.

        Raises
        ------
        ValueError
            No module runs, or `name` is taken or not fit to be one.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", (), nn.initializers.ones)
        >>> class Twice(nn.Module):
        ...     def apply(self, x):
        ...         shift = Shift.shared(name="shift")
        ...         return shift(shift(x))
        >>> Twice.init(jax.random.PRNGKey(0), 2.0)[1]
        {'shift': {'bias': Array(1., dtype=float32)}}
        """
        parent = frames.top
        if parent is None:
            raise ValueError(
                "The shared module should be used during Module application: call `shared`"
                " inside of a module's apply function."
            )
        automatic = name is None
        if name is None:
            name = str(parent.automatic_names)
        check_name(name)
        parent.check_free(name, shared=True)
        parent.shared[name] = True
        parent.automatic_names += automatic
        return derived(cls, _bound={**cls._bound, **kwargs}, _name=name, _owner=weakref.ref(parent))

    def param(self, name: str, shape: tuple[int, ...] | None, initializer: Initializer) -> Any:
        """Declare a parameter, from within `apply`.

        Parameters
        ----------
        name
            The name of the parameter.
        shape
            Its shape, which is checked; None allows any pytree.
        initializer
            A function of a random key and `shape`, called by `init` alone. It runs at once,
            not under `jax.jit`, as far as it depends on no traced value; where the key is
            traced, in the transformation in which `init` was called.

        Returns
        -------
        Any
            The value of the parameter.

        Raises
        ------
        ValueError
            During `init`, the name is taken, or the value belongs to a JAX transformation
            inside of the module; else the parameter does not exist; or its shape is another.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Shift(nn.Module):
        ...     def apply(self, x):
        ...         return x + self.param("bias", x.shape, nn.initializers.zeros)
        >>> Shift.init(jax.random.PRNGKey(0), jax.numpy.ones(2))[1]
        {'bias': Array([0., 0.], dtype=float32)}
        """
        frame = self._frame
        if frame.rng is None:
            value = self.get_param(name)
            _check_shape(name, value, shape)
            return value
        if name in frame.params or name in frame.shared:
            raise ValueError(
                f"Name '{name}' was already used for another parameter. "
                "Each parameter and submodule of a module needs its own."
            )
        value = frame.make(initializer, frame.make(fold_in, frame.rng, name), shape)
        _check_shape(name, value, shape)
        if not belongs_to(value, frame.trace):
            raise ValueError(
                f"Parameter '{name}' belongs to a Jax transformation inside of the module that"
                " is initialized, and would be lost with it. Initialize the module outside of"
                " `jax.jit` and its like, or do not apply them inside of it."
            )
        frame.params[name] = value  # type: ignore[index]
        return value

    def get_param(self, name: str) -> Any:
        """Return the value of a parameter that was declared before, from within `apply`.

        Raises
        ------
        ValueError
            The parameter does not exist.
        """
        params = self._frame.params
        if name not in params:
            raise ValueError(
                f"Parameter with name '{name}' does not exist. The parameters have: {list(params)}."
            )
        return params[name]

    def state(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        initializer: Initializer | None = None,
        collection: Collection | None = None,
    ) -> ModuleState:
        """Declare a state variable, from within `apply`.

        `init` gives it its first value; afterwards assign to `.value` what the next
        application shall find.

        Parameters
        ----------
        name
            The name of the variable.
        shape
            Passed to the initializer.
        initializer
            A function of a random key and `shape`. Without one there is no first value.
        collection
            Where the variable is kept: by default in the one of `stateful`.

        Returns
        -------
        ModuleState
            An object with `.value`.

        Raises
        ------
        TypeError
            `collection` is not a Collection.
        ValueError
            There is no collection, or, during `init`, it cannot store the first value.

        Examples
        --------
        >>> import jax
        >>> from batchnorm.flax import nn
        >>> class Average(nn.Module):
        ...     def apply(self, x, rate=0.1):
        ...         average = self.state("average", (), nn.initializers.zeros)
        ...         if not self.is_initializing():
        ...             average.value += rate * (x - average.value)
        ...         return average.value
        >>> with nn.stateful() as state:
        ...     _, params = Average.init(jax.random.PRNGKey(0), 5.0)
        >>> with nn.stateful(state) as new_state:
        ...     Average.call(params, 5.0)
        Array(0.5, dtype=float32)
        """
        if collection is None:
            collection = get_state()
        elif not isinstance(collection, Collection):
            raise TypeError(
                f"collection must be a Collection or None, got {type(collection).__name__}."
            )
        scope = self._frame.scope
        variable = ModuleState(collection, scope, name)
        frame = initializing_frame()
        if initializer is not None and frame is not None:
            rng, key = frame.make(split, frame.rng)
            value = frame.make(initializer, key, shape)
            # A module that `init` does not make, but comes upon, keeps the state that it has.
            if frame is self._frame or name not in variables_of(collection, scope, name):
                variable.value = value
            frame.rng = rng
        return variable

    def is_stateful(self) -> bool:
        """Whether a `stateful` with statement is active."""
        return is_stateful()

    def is_initializing(self) -> bool:
        """Whether `init` runs, of this module or of one around it."""
        top_frame("is_initializing")
        return initializing_frame() is not None

    @classmethod
    def _parent(cls) -> Frame:
        """Return the frame in whose parameters those of a submodule live."""
        if frames.top is None:
            raise ValueError(
                "A Module should only be instantiated directly inside another module. Outside"
                f" use {cls.__name__}.init(rng, ...) and {cls.__name__}.call(params, ...)."
            )
        if cls._owner is None:
            return frames.top
        owner = cls._owner()
        if owner is None:
            raise ValueError(
                "The shared module should be used during Module application: the module in"
                f' which "{cls._name}" was made has returned.'
            )
        return owner

    @classmethod
    def _check_renaming(cls, name: str) -> None:
        if cls._owner is not None:
            raise ValueError(
                f'Cannot override the name of a shared module: it is "{cls._name}", got "{name}".'
                " Give the name to `shared`."
            )

    @classmethod
    def _outermost_frame(cls, name: str | None, params: Any, rng: Any = None) -> Frame:
        """Make the frame of a module that gets its parameters from its caller."""
        if name is None:
            name = cls._name
        if name is not None:
            check_name(name)
        around = frames.top
        scope = Scope(name, None, name) if around is None else around.scope_of(name, cls.__name__)
        trace = None if rng is None else current_trace()
        return Frame(scope, params, rng, trace, transparent=cls._transparent)

    @classmethod
    def _run(cls, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        instance = object.__new__(cls)
        instance._frame = frame
        with frames.pushed(frame):
            output = instance.apply(*args, **{**cls._bound, **kwargs})
            record(output)
        return output

    @classmethod
    def _wrap(cls, params: Any) -> Any:
        """Turn the parameters that users see into those that a frame works with."""
        return params

    @classmethod
    def _unwrap(cls, params: Any) -> Any:
        return params


def _check_shape(name: str, value: Any, shape: Any) -> None:
    if shape is not None and np.shape(value) != (tuple(shape) if np.iterable(shape) else shape):
        raise ValueError(
            f"Existing shape {np.shape(value)} differs from requested shape {shape} of parameter"
            f" '{name}'."
        )


def derived(cls: abc.ABCMeta, name: str | None = None, **attributes: Any) -> type[Module]:
    """Make a subclass that, but for `attributes`, looks like the class itself."""
    alike = {each: getattr(cls, each) for each in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(
        name or cls.__name__, (cls,), exec_body=lambda body: body.update(alike | attributes)
    )


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
        """Run `wrapped_module`, and return for each path the outputs of the module there."""
        if wrapped_module is None or truncate_path is None:
            raise ValueError(
                "`wrapped_module` and `truncate_path` are required keyword arguments. "
                f"Got {wrapped_module!r} and {truncate_path!r}."
            )
        run = functools.partial(wrapped_module, *args, name="0", **kwargs)
        return outputs_at(truncate_path, run)


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
