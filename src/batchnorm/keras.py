"""`keras.layers.BatchNormalization`, computed by `batchnorm.jax` or `batchnorm.torch`."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any, Literal

from .installation import missing

try:
    import keras
    from keras import ops
except ModuleNotFoundError as error:
    if error.name != "keras":  # but its backend, which KERAS_BACKEND names
        raise
    raise missing("batchnorm.keras", "Keras", "keras") from error

from . import checks, layers
from .arrays import namespace
from .conventions import CONVENTIONS
from .documentation import documented, with_parameters_of
from .moments import Statistics
from .tools import Report, recalibration
from .tools.inspection import inspect_model
from .tools.observation import NormalizeBy, See, first_of, is_positive, plain, put
from .tools.states import state

__all__ = ["BatchNormalization", "convert", "inspect", "recalibrate", "revert"]

__dir__ = __all__.copy  # public names alone

_CONVENTION = CONVENTIONS["keras"]
_DOORS = ("jax", "torch")  # for Keras' backends of the same names


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization in the place of `keras.layers.BatchNormalization`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * gamma + beta + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, in training, which also moves
    the moving statistics, ``moving = momentum * moving + (1 - momentum) * new``; else the moving
    ones. Weights, their names and their order are those of Keras' layer.

    With the backends jax and torch, it is computed by `batchnorm`; with another, by Keras' own
    layer, and without activation and residual.

    Parameters
    ----------
    **keywords
        Those of `keras.layers.BatchNormalization`, which may also be given by position.
    synchronized : bool
        By keyword: with the backend torch, whether statistics are those of all processes of
        torch.distributed. With jax they are those of the whole batch in any case, however it is
        sharded.
    activation : None, "relu" or "silu"

    Notes
    -----
    A mask has one axis less than the inputs, and holds bools, or weights >= 0. What differs in
    numbers is where Keras' are not exact: a large mean, and masked batches. A feature whose mask is
    nowhere true leaves its moving statistics as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
    .. [2] Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
       Models", 2017, https://arxiv.org/abs/1702.03275: what `renorm` does.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.5)
    >>> x = np.array([[1.0, 20.0], [3.0, 60.0]], np.float32)
    >>> print(np.round(layer(x, training=True), 2))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.moving_mean.value)
    [ 1. 20.]
    """

    @with_parameters_of(keras.layers.BatchNormalization.__init__)
    def __init__(
        self,
        *arguments: Any,
        synchronized: bool = False,
        activation: str | None = None,
        **keywords: Any,
    ) -> None:
        if keras.backend.backend() in _DOORS:
            super().__init__(*arguments, **keywords)
            # Which Keras refuses with these.
            self.synchronized = checks.boolean("synchronized", synchronized)
        else:
            super().__init__(*arguments, synchronized=synchronized, **keywords)
        self.activation = checks.activation(activation)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        residual: Any = None,
        inputs_mask: Any = None,
    ) -> Any:
        """Normalize the inputs and, in training, move the moving statistics.

        Parameters
        ----------
        inputs : tensor
        training : bool, optional
        mask : tensor of one axis less than the inputs, optional
            Which elements count in the statistics: bools, or weights >= 0.
        residual : tensor that broadcasts to the inputs, optional
            Added before the activation.
        inputs_mask : tensor, optional
            Where Keras puts the mask that the inputs carry if there is a residual.

        Returns
        -------
        outputs : tensor of the shape of the inputs, and the layer's compute_dtype

        Raises
        ------
        TypeError
            If an argument is of the wrong type; if the inputs are complex.
        ValueError
            If an argument is out of range or has the wrong shape.
        """
        mask = inputs_mask if mask is None else mask
        backend = keras.backend.backend()
        if backend not in _DOORS:
            for name, value in (("activation", self.activation), ("residual", residual)):
                if value is not None:
                    raise ValueError(
                        f"{name} must be None with Keras' backend {backend!r}, for which Keras' "
                        f"own layer serves. The backends {' and '.join(_DOORS)} take one."
                    )
            return super().call(inputs, training=training, mask=mask)
        if mask is not None:
            if len(mask.shape) != len(inputs.shape) - 1:
                return super().call(inputs, training=training, mask=mask)  # which says so
            checks.broadcasts(
                "mask", mask.shape, inputs.shape[:-1], "the inputs without their last axis"
            )
            mask = ops.expand_dims(mask, -1)
        if self.renorm:
            checks.fraction("renorm_momentum", self.renorm_momentum)
        inputs = ops.convert_to_tensor(inputs)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        checks.floating("inputs", dtype, not dtype.startswith("complex"))
        settings = layers.Settings(
            importlib.import_module(f".{backend}", __package__),
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=self.axis,
            dtype=getattr(namespace(inputs), self.compute_dtype),
            activation=self.activation,
            devices={"sync": True} if self.synchronized and backend == "torch" else {},
        )
        gamma, beta = map(_tensor, (self.gamma, self.beta))
        if not (training and self.trainable):
            mean, var = map(_tensor, (self.moving_mean, self.moving_variance))
            return layers.normalize(settings, inputs, mean, var, gamma, beta, residual)
        if not self.renorm:
            y, statistics = layers.batch_norm(settings, inputs, gamma, beta, residual, mask)
            _move(settings, self.moving_mean, self.moving_variance, statistics)
            return y

        # What corrects the normalization is known before it, and has no gradient.
        statistics = layers.batch_statistics(settings, ops.stop_gradient(inputs), mask)
        statistics = statistics._replace(var=ops.sqrt(statistics.var + self.epsilon))
        gamma, beta = self._corrected(gamma, beta, statistics.mean, statistics.var)
        y, _ = layers.batch_norm(settings, inputs, gamma, beta, residual, mask)
        _move(settings, self.moving_mean, self.moving_stddev, statistics)
        stddev, old = map(_tensor, (self.moving_stddev, self.moving_variance))
        variance = ops.relu(ops.square(stddev) - self.epsilon)
        self.moving_variance.assign(ops.where(statistics.count > 0, variance, old))
        settings = settings._replace(momentum=self.renorm_momentum)
        _move(settings, self.renorm_mean, self.renorm_stddev, statistics)
        return y

    def _corrected(self, gamma: Any, beta: Any, mean: Any, stddev: Any) -> tuple[Any, Any]:
        """Scale and bias of (x̂·r + d)·gamma + beta, Batch Renormalization's Algorithm 1 [2]."""
        old_mean, old_stddev = map(_tensor, (self.renorm_mean, self.renorm_stddev))
        old_stddev = ops.maximum(old_stddev, self.epsilon**0.5)
        r, d = stddev / old_stddev, (mean - old_mean) / old_stddev
        smallest, largest, farthest = map(self.renorm_clipping.get, ("rmin", "rmax", "dmax"))
        if smallest is not None:
            r = ops.maximum(r, smallest)
        if largest is not None:
            r = ops.minimum(r, largest)
        if farthest is not None:
            d = ops.clip(d, -farthest, farthest)
        if gamma is not None:
            r, d = r * gamma, d * gamma
        return r, d if beta is None else d + beta

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        if self.activation is not None:  # a key that Keras' layer does not know
            config["activation"] = self.activation
        return config


def _move(settings: layers.Settings, mean: Any, spread: Any, statistics: Any) -> None:
    """Move two variables, a mean and a variance or deviation, towards the batch's."""
    moved = layers.update_running(settings, _tensor(mean), _tensor(spread), statistics)
    mean.assign(moved[0])
    spread.assign(moved[1])


def _tensor(variable: Any) -> Any:
    return None if variable is None else ops.convert_to_tensor(variable)


def convert(model: keras.Model) -> keras.Model:
    """A copy of a model with a BatchNormalization of ours for each of `keras.layers`.

    It is cloned by `keras.models.clone_model`, and has the same weights; it is not compiled.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential, as `clone_model` asks for.

    Returns
    -------
    model : keras.Model

    Raises
    ------
    TypeError
        If there is a layer that can't be replaced: a subclass of `keras.layers.BatchNormalization`
        that is not ours, which may compute something else, or a layer within one of another class.

    Examples
    --------
    >>> import keras
    >>> from batchnorm.keras import convert
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> type(convert(model).layers[0]).__module__
    'batchnorm.keras'
    """

    def converted(layer: keras.Layer) -> keras.Layer:
        if type(layer) is keras.layers.BatchNormalization:
            return _clone(BatchNormalization, layer)
        _refuse_within(
            layer,
            lambda each: (
                isinstance(each, keras.layers.BatchNormalization)
                and not isinstance(each, BatchNormalization)
            ),
            "batchnorm.keras.BatchNormalization",
        )
        return _clone(type(layer), layer)

    return _cloned(model, converted)


def revert(model: keras.Model) -> keras.Model:
    """A copy of a model with a layer of `keras.layers` for each BatchNormalization of ours.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential.

    Returns
    -------
    model : keras.Model

    Raises
    ------
    ValueError
        If a layer has an activation, is called with a residual or is synchronized, none of which
        Keras' layer can with these backends.
    TypeError
        If there is a layer of ours within one of another class.
    """

    def reverted(layer: keras.Layer) -> keras.Layer:
        if type(layer) is not BatchNormalization:
            _refuse_within(
                layer,
                lambda each: isinstance(each, BatchNormalization),
                "keras.layers.BatchNormalization",
            )
            return _clone(type(layer), layer)
        if layer.activation is not None:
            raise ValueError(
                f"{layer.name} has activation={layer.activation!r}, which "
                "keras.layers.BatchNormalization has not. Make the model without it, with a "
                f'keras.layers.Activation("{layer.activation}") after the layer.'
            )
        if layer.synchronized:
            raise ValueError(
                f"{layer.name} has synchronized=True, which keras.layers.BatchNormalization has "
                f"not with the backend {keras.backend.backend()}. Set it to False before."
            )
        return _clone(keras.layers.BatchNormalization, layer)

    def call(layer: keras.Layer, *arguments: Any, **keywords: Any) -> Any:
        is_reverted = type(layer) is keras.layers.BatchNormalization
        if is_reverted and keywords.get("residual") is not None:
            raise ValueError(
                f"{layer.name} is called with a residual, which keras.layers.BatchNormalization "
                "does not take. Make the model with a keras.layers.Add after the layer."
            )
        return layer(*arguments, **keywords)

    return _cloned(model, reverted, call)


def _refuse_within(layer: keras.Layer, is_meant: Callable[[Any], bool], wanted: str) -> None:
    """Refuse a layer that is, or holds, one that is meant to be another, but stays by cloning."""
    for each in filter(is_meant, _layers_of(layer)):
        kind = f"{type(each).__module__}.{type(each).__name__}"
        where = "" if each is layer else f", within {layer.name} of {type(layer).__name__}"
        raise TypeError(
            f"{each.name} is of {kind}{where}, which can't be replaced by cloning. Make it a "
            f"{wanted}, or a subclass of that, where it is created."
        )


def _cloned(
    model: keras.Model,
    clone_function: Callable[[keras.Layer], keras.Layer],
    call_function: Callable[..., Any] | None = None,
) -> keras.Model:
    """By clone_model, and with what that leaves out: weights, and which layers are trained."""
    kinds = {each.__name__ for each in type(model).__mro__}  # Keras' Functional has no public name
    if not isinstance(model, keras.Sequential) and "Functional" not in kinds:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(
            f"model must be a Functional or Sequential one, but got {kind}, which can't be cloned. "
            "Change the import where its layers are created."
        )
    pairs = []

    def cloned_layer(layer: keras.Layer) -> keras.Layer:
        pairs.append((layer, clone_function(layer)))
        return pairs[-1][1]

    options: dict[str, Any] = {"clone_function": cloned_layer, "recursive": True}
    if call_function is not None and not isinstance(model, keras.Sequential):
        options["call_function"] = call_function
    compiled = [each for each in _layers_of(model) if getattr(each, "compiled", False)]
    try:
        for each in compiled:  # else the clone is, too, as far as its configuration goes
            each.compiled = False
        cloned = keras.models.clone_model(model, **options)
    finally:
        for each in compiled:
            each.compiled = True
    for new, old in zip(cloned.weights, model.weights, strict=True):
        new.assign(ops.copy(_tensor(old)))  # as training may give up the memory of one model's
    for old, new in pairs:
        own: dict[str, Any] = {}
        if isinstance(old, keras.Layer):  # and no operation
            old.save_own_variables(own)
        if own:  # of which a layer may make something more when it loads them
            new.load_own_variables(own)
    _copy_trainable(model, cloned)
    return cloned


def _copy_trainable(model: keras.Layer, cloned: keras.Layer) -> None:
    cloned.trainable = model.trainable  # of all that it holds, too, which have their own below
    if isinstance(model, keras.Model):
        for pair in zip(model.layers, cloned.layers, strict=True):
            _copy_trainable(*pair)


def _clone(kind: Any, layer: keras.Layer) -> keras.Layer:
    cloned: keras.Layer = kind.from_config(layer.get_config())
    return cloned


def _layers_of(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and all that it holds, however deep."""
    found: dict[int, keras.Layer] = {}
    left: list[Any] = [layer]
    while left:
        each = left.pop()
        if isinstance(each, keras.Layer) and id(each) not in found:
            found[id(each)] = each
            left += vars(each).values()
        elif isinstance(each, (list, tuple)):
            left += each
        elif isinstance(each, dict):
            left += each.values()
    return [*found.values()]


@recalibration.documented(
    "keras.Model, or a layer that holds some, built",
    "keras.layers and batchnorm.keras",
    _CONVENTION.correction,
    "The model is called with training=False.\nWith renorm, the other averages follow.",
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

    Parameters
    ----------
    forward
        ... It is to call the model itself, not predict(), which is compiled.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from batchnorm.keras import recalibrate
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> recalibrate(model, np.split(np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), [3]))
    >>> print(model.layers[0].moving_mean.value, model.layers[0].moving_variance.value)
    [3.] [2.]
    """
    checks.instance("model", model, keras.Layer)
    found = normalizations(model)
    for path, each in found.items():
        if not each.built:
            raise ValueError(f"model must be built, but {path} is not. Call the model once before.")
    known = recalibration.Model(
        found=found,
        kinds="BatchNormalization of keras.layers and batchnorm.keras",
        forward=recalibration.call_of(model, forward, training=False),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        keep=_keep,
        commit=_commit,
        is_frozen=lambda layer: not layer.trainable,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)


def _keep(layer: Any) -> Callable[[], None]:
    kept = [(each, ops.copy(_tensor(each))) for each in layer.non_trainable_variables]

    def restore() -> None:
        for variable, value in kept:
            variable.assign(value)

    return restore


def _commit(layer: Any, statistics: Statistics, _: int) -> None:
    old = (layer.moving_mean, layer.moving_variance)
    old_mean, old_var = (_numpy(_tensor(each)).astype("float64") for each in old)
    mean, var = recalibration.recalibrated(old_mean, old_var, statistics, _CONVENTION.correction)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    if layer.renorm:
        layer.renorm_mean.assign(mean)
        layer.renorm_stddev.assign((var + layer.epsilon) ** 0.5)
        layer.moving_stddev.assign((var + layer.epsilon) ** 0.5)


def normalizations(model: keras.Layer) -> dict[str, Any]:
    """By their paths: those of keras.layers and ours."""
    found: dict[str, Any] = {}
    for each in _layers_of(model):
        if isinstance(each, keras.layers.BatchNormalization):
            path = each.path or each.name
            found[path if path not in found else f"{path} ({len(found)})"] = each
    return found


@documented(model="keras.Layer")
def inspect(
    model: keras.Layer,
    batches: Iterable[Any] | None = None,
    *,
    forward: Callable[[Any, Any], object] | None = None,
) -> Report:
    """... It is called with ``training=False``.

    Examples
    --------
    >>> import keras
    >>> from batchnorm.keras import inspect
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.1)])
    >>> [(each.kind, each.severity) for each in inspect(model).findings]
    [('momentum_convention', 'warning'), ('never_updated', 'info')]
    """
    checks.instance("model", model, keras.Layer)

    def call(batch: Any) -> object:
        if forward is None:
            return model(first_of(batch), training=False)
        return forward(model, batch)

    has_one_pass = keras.backend.backend() in ("numpy", "torch")
    states = [
        state(
            path,
            "keras",
            partial(_weight, layer),
            eps=layer.epsilon,
            momentum=layer.momentum,
            is_exact=isinstance(layer, BatchNormalization) or not has_one_pass,
            is_frozen=not layer.trainable,
            is_of_model=True,
        )
        for path, layer in normalizations(model).items()
        if layer.built
    ]
    return inspect_model(states, batches, lambda see: observed(model, see), call)


def _weight(layer: keras.Layer, name: str) -> Any:
    return _tensor(getattr(layer, name, None))


@contextmanager
def observed(model: Any, see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py. Other layers do as they are told: training=False, say.

    No variable changes in it. What Keras has compiled, as predict() does, passes it over.
    """
    backend = keras.backend.backend()
    if backend not in _DOORS:
        raise ValueError(
            f"Keras' backend must be one of {' and '.join(_DOORS)} to look at what comes to "
            f"BatchNormalization, but it is {backend!r}."
        )
    with ExitStack() as undo:
        undo.enter_context(keras.StatelessScope())
        if backend == "torch":
            undo.enter_context(importlib.import_module("torch").no_grad())
        for path, layer in normalizations(model).items():
            put(undo, vars(layer), renorm=False, synchronized=False)
            put(undo, vars(layer), call=_observed(path, layer, layer.call, see, normalize_by))
        yield


def _numpy(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):  # PyTorch's, for which Keras' own function warns
        return tensor.detach().cpu().numpy()
    return ops.convert_to_numpy(tensor)


def _observed(
    path: str, layer: Any, call: Callable[..., Any], see: See, normalize_by: NormalizeBy
) -> Callable[..., Any]:
    parameters = signature(call)
    door = importlib.import_module(f".{keras.backend.backend()}", __package__)

    def observed_call(*arguments: Any, **keywords: Any) -> Any:
        bound = parameters.bind(*arguments, **keywords)
        named = bound.arguments
        inputs = next(iter(named.values()))
        mask = named.get("mask", named.get("inputs_mask"))
        mask = None if mask is None else ops.expand_dims(mask, -1)
        settings = layers.Settings(door, _CONVENTION, layer.epsilon, layer.momentum, layer.axis)
        statistics = layers.batch_statistics(settings, inputs, mask)
        statistics = plain(path, statistics, _numpy)
        named["training"] = normalize_by == "batch"
        y = call(*bound.args, **bound.kwargs)
        positive = None
        if getattr(layer, "activation", None) == "relu":
            features = checks.feature_axes(layer.axis, y.shape)
            positive = _numpy(is_positive(y, features, mask))
        see(path, statistics, positive)
        return y

    return observed_call
