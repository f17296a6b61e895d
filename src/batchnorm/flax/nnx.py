"""`flax.nnx.BatchNorm`, computed by `batchnorm.jax`."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from ..installation import missing

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
except ModuleNotFoundError as error:
    raise missing("batchnorm.flax.nnx", "Flax", "flax") from error

from .. import checks, layers
from .. import jax as door
from ..conventions import CONVENTIONS
from ..documentation import documented, with_parameters_of
from ..layout import feature_shape
from ..moments import Statistics
from ..ndarrays import converted
from ..tools import Report, recalibration
from ..tools.inspection import inspect_model
from ..tools.observation import NormalizeBy, See, first_of, is_positive, plain, put
from ..tools.states import state

__all__ = ["BatchNorm", "convert", "fold", "inspect", "recalibrate", "revert"]

__dir__ = __all__.copy  # public names alone

_CONVENTION = CONVENTIONS["flax"]
Model = TypeVar("Model")


class BatchNorm(nnx.BatchNorm):
    """Batch normalization in the place of `flax.nnx.BatchNorm`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, which also moves the running
    averages, ``average = momentum * average + (1 - momentum) * new``; or, with
    `use_running_average`, the running averages. The paths and the kinds of its Variables are those
    of Flax's layer.

    Parameters
    ----------
    num_features : int
    activation : None, "relu" or "silu"
    **keywords
        Those of `flax.nnx.BatchNorm`: use_running_average, axis, momentum, epsilon, dtype,
        param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups,
        promote_dtype, rngs, bias_metadata, scale_metadata; and use_fast_variance, without effect,
        as the variance is always exact. momentum and epsilon may also be arrays without axes,
        traced or not; out of range, they count as NaN.

    Notes
    -----
    Complex x is refused. What differs in numbers is where Flax's are not exact: a large mean,
    devices with masks of different size, and the running averages, which stay as they are kept,
    whatever `promote_dtype` makes of them. A feature whose mask is nowhere true leaves its averages
    as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import BatchNorm
    >>> layer = BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0, 20.0], [3.0, 60.0]])).round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.mean[...])
    [ 1. 20.]
    """

    @with_parameters_of(nnx.BatchNorm.__init__)
    def __init__(
        self, num_features: int, *, activation: str | None = None, **keywords: Any
    ) -> None:
        super().__init__(num_features, **keywords)
        self.activation = checks.activation(activation)

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        residual: Any = None,
    ) -> jax.Array:
        """Normalize x and, in training, move the running averages.

        Parameters
        ----------
        x : array
            Of any number of axes.
        use_running_average : bool, optional
            In the place of the attribute.
        mask : array that broadcasts to x, optional
            Which elements count in the statistics: bools, or weights >= 0.
        residual : array that broadcasts to x, optional
            Added before the activation.

        Returns
        -------
        y : array of the shape of x

        Raises
        ------
        TypeError
            If an argument is of the wrong type; if x is complex.
        ValueError
            If `use_running_average` is given nowhere, or an argument is out of range or has the
            wrong shape.
        NameError
            If there is no axis `axis_name` here.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            return super().__call__(x, mask=mask)  # which says where to give it
        x = converted("x", x, jnp.asarray)
        features = checks.feature_axes(self.axis, x.shape)
        channels = math.prod(feature_shape(features, x.shape))
        checks.number_of_channels(channels, self.num_features, x.shape)
        mean, var = self.mean[...], self.var[...]
        scale, bias = (None if each is None else each[...] for each in (self.scale, self.bias))
        promote = getattr(self, "promote_dtype", None)  # Flax 0.11 has none
        if promote is not None:
            x, _, _, scale, bias = promote((x, mean, var, scale, bias), dtype=self.dtype)
        devices = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=features,
            dtype=self.dtype,
            activation=self.activation,
            devices=devices,
        )
        if use_running_average:
            return layers.normalize(settings, x, mean, var, scale, bias, residual)
        y, statistics = layers.batch_norm(settings, x, scale, bias, residual, mask)
        moved = layers.update_running(settings, mean, var, statistics)
        self.mean[...], self.var[...] = map(jax.lax.stop_gradient, moved)
        return y


def convert(
    model: Model,
    *,
    axis_name: Any = ...,
    axis_index_groups: Any = ...,
    momentum: Any = ...,
) -> Model:
    """Make every `flax.nnx.BatchNorm` of a model one of ours, where it is.

    The layers stay the same objects, with the same Variables: what is shared, sharded or observed
    by an optimizer stays so. It is for models outside of nnx's transformations, to which the class
    of a layer is part of the program.

    Parameters
    ----------
    model : nnx.Module, or what else holds some
    axis_name, axis_index_groups, momentum
        To set in all of these layers, if given.

    Returns
    -------
    model : the same

    Raises
    ------
    TypeError
        If there is a subclass of `flax.nnx.BatchNorm` that is not ours, which may compute something
        else, or momentum is no number. No layer has been changed then.
    ValueError
        If momentum is out of range, or axis_index_groups are given to a layer without an
        axis_name. No layer has been changed then.

    Examples
    --------
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import convert
    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> type(convert(model).layers[0]).__module__
    'batchnorm.flax.nnx'
    """
    found = _layers(model)
    for path, layer in found:
        if type(layer) is not nnx.BatchNorm and not isinstance(layer, BatchNorm):
            layers.refuse_subclass(
                path, layer, "flax.nnx.BatchNorm", "batchnorm.flax.nnx.BatchNorm"
            )
        name = layer.axis_name if axis_name is ... else axis_name
        if axis_index_groups is not ... and axis_index_groups is not None and name is None:
            raise ValueError(f"axis_index_groups needs an axis_name, but {path} has none.")
    if momentum is not ...:
        is_fraction = partial(checks.fraction, "momentum")
        momentum = layers.number("momentum", momentum, jnp.zeros(()), is_fraction)
        if isinstance(momentum, jax.Array) and hasattr(nnx, "data"):  # Flax 0.11 has none
            momentum = nnx.data(momentum)
    changed = {
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "momentum": momentum,
    }
    for _, layer in found:
        if not isinstance(layer, BatchNorm):
            _become(layer, BatchNorm)
            layer.activation = None
        for name, value in changed.items():
            if value is not ...:
                setattr(layer, name, value)
    return model


def revert(model: Model) -> Model:
    """Make every BatchNorm of ours in a model a `flax.nnx.BatchNorm` again, where it is.

    Parameters
    ----------
    model : nnx.Module, or what else holds some

    Returns
    -------
    model : the same

    Raises
    ------
    TypeError
        If there is a subclass of ours. No layer has been changed then.
    ValueError
        If a layer has an activation, which Flax's has not. No layer has been changed then.
    """
    found = [each for each in _layers(model) if isinstance(each[1], BatchNorm)]
    for path, layer in found:
        if type(layer) is not BatchNorm:
            layers.refuse_subclass(
                path, layer, "batchnorm.flax.nnx.BatchNorm", "flax.nnx.BatchNorm"
            )
        if layer.activation is not None:
            raise ValueError(
                f"{path} has activation={layer.activation!r}, which flax.nnx.BatchNorm has not. "
                f"Set it to None, and call flax.nnx.{layer.activation} after the layer."
            )
    for _, layer in found:
        del layer.activation
        _become(layer, nnx.BatchNorm)
    return model


@documented(model="nnx.Module, or what else holds some")
def inspect(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """...

    Examples
    --------
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import inspect
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    >>> model.layers[1].var[...] -= 2
    >>> [(each.layer, each.kind, each.severity) for each in inspect(model).findings]
    [('layers.1', 'negative_variance', 'severe')]
    """

    def call(batch: Any) -> object:
        return model(first_of(batch)) if forward is None else forward(model, batch)

    states = [
        state(
            path,
            "flax",
            partial(_value, layer),
            eps=layer.epsilon,
            momentum=layer.momentum,
            is_exact=isinstance(layer, BatchNorm) or not layer.use_fast_variance,
            is_of_model=True,
        )
        for path, layer in _layers(model)
    ]
    return inspect_model(states, batches, lambda see: observed(model, see), call)


def _value(layer: Any, name: str) -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else variable[...]


Folded = TypeVar("Folded", nnx.Conv, nnx.ConvTranspose, nnx.Linear)


def fold(layer: Folded, normalization: nnx.BatchNorm) -> Folded:
    """Make one layer of a convolution or linear layer and the normalization of its output.

    ``fold(layer, normalization)(x)`` is ``normalization(layer(x), use_running_average=True)``. It
    is computed in float64, and stored in the dtype of the layer's kernel.

    Parameters
    ----------
    layer : nnx.Conv, nnx.ConvTranspose or nnx.Linear
        It stays as it is.
    normalization : nnx.BatchNorm, or ours
        Over the last axis, of as many features as the layer makes; without an activation.

    Returns
    -------
    A new layer, of the class of `layer`, with a bias

    Raises
    ------
    TypeError
        If layer or normalization is something else, a subclass for instance, which may compute
        something of its own.
    ValueError
        If the normalization is over another axis than -1, has an activation or another number of
        features, or if what comes out is not finite in the dtype of the kernel.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import BatchNorm, fold
    >>> conv, norm = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), BatchNorm(8, rngs=nnx.Rngs(0))
    >>> x = jnp.linspace(-1, 1, 96).reshape(2, 4, 4, 3)
    >>> y = norm(conv(x))  # which moves the running averages
    >>> wanted = norm(conv(x), use_running_average=True)
    >>> bool(jnp.allclose(fold(conv, norm)(x), wanted, atol=1e-5))
    True
    """
    if type(layer) not in (nnx.Conv, nnx.ConvTranspose, nnx.Linear):
        raise TypeError(
            "layer must be an nnx.Conv, nnx.ConvTranspose or nnx.Linear itself, but got "
            f"{type(layer).__module__}.{type(layer).__name__}."
        )
    if type(normalization) not in (nnx.BatchNorm, BatchNorm):
        raise TypeError(
            "normalization must be a flax.nnx.BatchNorm or a batchnorm.flax.nnx.BatchNorm itself, "
            f"but got {type(normalization).__module__}.{type(normalization).__name__}."
        )
    activation = getattr(normalization, "activation", None)
    if activation is not None:
        raise ValueError(
            f"normalization has activation={activation!r}, which a folded layer can't have. Set it "
            f"to None, and call flax.nnx.{activation} after the layer."
        )
    if normalization.axis not in (-1, (-1,), [-1]):
        raise ValueError(
            "normalization must be over axis -1, in which are the features of the layer before it, "
            f"but its axis is {normalization.axis!r}."
        )
    kernel = layer.kernel[...]
    checks.number_of_channels(
        layer.out_features, normalization.num_features, kernel.shape, "layer.kernel"
    )
    # The kernel of a transposed convolution may be that of the convolution which it transposes.
    is_turned = getattr(layer, "transpose_kernel", False)
    parameters = layers.folded(
        _exact(layer.kernel),
        _exact(layer.bias),
        (-1, 1) if is_turned else (-1,),
        mean=_exact(normalization.mean),
        var=_exact(normalization.var),
        scale=_exact(normalization.scale),
        shift=_exact(normalization.bias),
        eps=float(normalization.epsilon),
    )
    new_kernel, new_bias = (jnp.asarray(each, kernel.dtype) for each in parameters)
    if not (jnp.isfinite(new_kernel).all() and jnp.isfinite(new_bias).all()):
        layers.refuse_infinite_fold(kernel.dtype)
    new = nnx.clone(layer)
    new.kernel[...] = new_kernel
    if new.bias is None:
        new.bias, new.use_bias = nnx.Param(new_bias), True
    else:
        new.bias[...] = new_bias
    return new


def _exact(variable: Any) -> Any:
    return None if variable is None else np.asarray(variable[...]).astype(np.float64)


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path)) or "the model", module)
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.BatchNorm)
    ]


@recalibration.documented(
    "nnx.Module, or what else holds some",
    "flax.nnx and batchnorm.flax.nnx",
    _CONVENTION.correction,
    "The others run with deterministic=True.\nNone may be within nnx.jit, nnx.remat or the like.",
)
def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
) -> None:
    """...

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import recalibrate
    >>> model = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> recalibrate(model, jnp.split(jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), [3]))
    >>> print(model.layers[0].mean[...], model.layers[0].var[...])
    [3.] [2.]
    """
    known = recalibration.Model(
        found=dict(_layers(model)),
        kinds="BatchNorm of flax.nnx and batchnorm.flax.nnx",
        forward=recalibration.call_of(model, forward),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        keep=_keep,
        commit=_commit,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)


def _keep(layer: Any) -> Callable[[], None]:
    mean, var = layer.mean[...], layer.var[...]

    def restore() -> None:
        layer.mean[...], layer.var[...] = mean, var

    return restore


def _commit(layer: Any, statistics: Statistics, _: int) -> None:
    old_mean, old_var = layer.mean[...], layer.var[...]
    mean, var = recalibration.recalibrated(
        np.asarray(old_mean, np.float64),
        np.asarray(old_var, np.float64),
        statistics,
        _CONVENTION.correction,
    )
    layer.mean[...] = _like(old_mean, mean)
    layer.var[...] = _like(old_var, var)


def _like(old: Any, new: Any) -> Any:
    return jnp.asarray(new, old.dtype, device=getattr(old, "sharding", None))


@contextmanager
def observed(model: Any, see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py, outside of JAX's and nnx's transformations."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    with ExitStack() as undo:
        for each in nodes:
            if isinstance(each, nnx.RngState):
                undo.callback(each.__setitem__, ..., each[...])
            elif isinstance(each, nnx.Module) and "deterministic" in vars(each):
                put(undo, vars(each), deterministic=True)
        for path, layer in _layers(model):
            undo.callback(_become, layer, type(layer))
            _become(layer, _observed(path, type(layer), see, normalize_by == "running"))
            put(undo, vars(layer), axis_name=None, axis_index_groups=None)
        yield


def _become(layer: Any, kind: type) -> None:
    object.__setattr__(layer, "__class__", kind)  # no attribute of nnx's


def _observed(path: str, kind: Any, see: See, by_running: bool) -> type:
    """Such a layer, whose calls are seen."""

    def call(layer: Any, x: Any, _: bool | None = None, **keywords: Any) -> Any:
        x = jnp.asarray(x)
        features = checks.feature_axes(layer.axis, x.shape)
        mask = keywords.get("mask")
        settings = layers.Settings(
            door, _CONVENTION, layer.epsilon, layer.momentum, features, layer.dtype
        )
        statistics = plain(path, layers.batch_statistics(settings, x, mask))
        keywords["use_running_average"] = by_running
        with ExitStack() as undo:
            if not by_running:  # into Variables that are thrown away
                put(undo, vars(layer), mean=layer.mean.copy(), var=layer.var.copy())
            y = kind.__call__(layer, x, **keywords)
        positive = None
        if getattr(layer, "activation", None) == "relu":
            positive = np.array(is_positive(y, features, mask)).ravel()
        see(path, statistics, positive)
        return y

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
