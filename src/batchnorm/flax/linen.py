"""`flax.linen.BatchNorm`, computed by `batchnorm.jax`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from ..installation import missing

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import traverse_util
    from flax.core import copy
except ModuleNotFoundError as error:
    raise missing("batchnorm.flax.linen", "Flax", "flax") from error

from .. import checks, layers
from .. import jax as door
from ..conventions import CONVENTIONS
from ..layout import feature_shape
from ..moments import Statistics
from ..ndarrays import converted
from ..tools import Report, recalibration
from ..tools.inspection import inspect_model
from ..tools.observation import NormalizeBy, See, is_positive, plain
from ..tools.states import places_in

__all__ = ["BatchNorm", "inspect", "recalibrate"]

__dir__ = __all__.copy  # public names alone

_CONVENTION = CONVENTIONS["flax"]
_DICTS: Any = traverse_util


class BatchNorm(nn.BatchNorm):
    """Batch normalization in the place of `flax.linen.BatchNorm`, and one itself.

    ``y = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)``, with the mean
    and the population variance of each feature [1]_: of the batch, or, with `use_running_average`,
    the running averages. In training these move, if the collection "batch_stats" is mutable:
    ``average = momentum * average + (1 - momentum) * new``. Names, order, shapes and dtypes of the
    variables are those of Linen's layer, as are the random keys of their initializers: checkpoints
    of the one are those of the other.

    Parameters
    ----------
    use_running_average : bool, optional
        Here, or in the call.
    axis : int or tuple of ints
        The feature axis or axes, over which there is no average.
    momentum : float within [0, 1]
        The weight of the old value in the running averages. It and epsilon may also be arrays
        without axes, traced or not; out of range, they count as NaN.
    epsilon : float
        Added to the variance, inside the root; within [1e-37, 1e30].
    dtype
        The dtype of the result; None for the one to which x, scale and bias promote.
    param_dtype
        That of scale and bias.
    use_bias, use_scale : bool
        Whether there are such parameters.
    bias_init, scale_init
        Their initializers.
    axis_name : hashable or tuple of hashables, optional
        The mapped axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` over whose devices the
        statistics are taken, exactly, except during initialization.
    axis_index_groups
        Groups of indices along that axis, each of which has statistics of its own.
    use_fast_variance : bool
        Without effect: the variance is always exact.
    force_float32_reductions : bool
        Whether the averages are float32, and not param_dtype. They are computed in float32 in any
        case.
    activation : None, "relu" or "silu"

    Notes
    -----
    Complex x is refused. What differs in numbers is where Linen's are not exact: a large mean, and
    devices with masks of different size. A feature whose mask is nowhere true leaves its averages
    as they were.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import BatchNorm
    >>> layer = BatchNorm(use_running_average=False, momentum=0.5)
    >>> x = jnp.array([[1.0, 20.0], [3.0, 60.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(updates["batch_stats"]["mean"])
    [ 1. 20.]
    """

    activation: str | None = None

    @nn.compact
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
            Here, or as an attribute.
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
            If `use_running_average` is given twice or never, or an argument is out of range or has
            the wrong shape.
        NameError
            If there is no axis `axis_name` here.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = converted("x", x, jnp.asarray)
        features = checks.feature_axes(self.axis, x.shape)
        devices = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
        settings = layers.Settings(
            door,
            _CONVENTION,
            eps=self.epsilon,
            momentum=self.momentum,
            axis=features,
            dtype=self.dtype,
            activation=self.activation,
            devices={} if self.is_initializing() else devices,
        )
        shape = feature_shape(features, x.shape)
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)

        if use_running_average:
            return layers.normalize(settings, x, mean.value, var.value, scale, bias, residual)
        y, statistics = layers.batch_norm(settings, x, scale, bias, residual, mask)
        if not self.is_initializing():
            mean.value, var.value = layers.update_running(
                settings,
                mean.value,
                var.value,
                statistics,
                keeps_dtype=not self.force_float32_reductions,  # which may be a narrow one
            )
        return y


def inspect(
    variables: Mapping[str, Any],
    batches: Iterable[Any] | None = None,
    *,
    apply: Callable[[Any, Any], object] | None = None,
) -> Report:
    """Say which batch normalizations of a model's variables are sick, and in which channels.

    Without batches, by what the layers keep; with batches, also by what comes to them. Layers are
    those of Linen, or ours; whichever they are in `apply`, they normalize by their averages.

    Parameters
    ----------
    variables : mapping
        With the collections "params" and "batch_stats", as `init` returns them.
    batches : iterable, optional
        What `apply` is called with, once each.
    apply : callable, optional
        Of the variables and a batch, to call the model in evaluation:
        ``lambda variables, images: model.apply(variables, images, train=False)``, say; and not
        within `jax.jit`.

    Returns
    -------
    batchnorm.tools.Report
        With `layers` and `findings`; print it. docs/tools.md says what each finding means.

    Raises
    ------
    TypeError
        If variables is no mapping, or there is one of batches and apply without the other.
    ValueError
        If the variables have no averages of a batch normalization, or batches are given, but there
        is none.

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import inspect
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> x = 100 + jax.random.normal(jax.random.key(1), (64, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> print(inspect(variables).summary)
    1 normalization: info in 1.
    >>> report = inspect(variables, [x[:32], x[32:]], apply=model.apply)
    >>> [(each.layer, each.kind, each.severity) for each in report.findings]
    [('layers_1', 'drift', 'severe'), ('layers_1', 'never_updated', 'info')]
    """
    checks.instance("variables", variables, Mapping)
    if (batches is None) != (apply is None):
        given, absent = ("batches", "apply") if apply is None else ("apply", "batches")
        raise TypeError(f"{given} needs {absent}: apply(variables, batch) calls the model.")

    @contextmanager
    def with_names_of_files(see: See) -> Iterator[None]:
        with observed(lambda path, *seen: see(path.replace("/", "."), *seen)):
            yield

    states = [each.read() for each in places_in(variables)]

    def call(batch: Any) -> object:
        assert apply is not None
        return apply(variables, batch)

    return inspect_model(states, batches, with_names_of_files, call)


@recalibration.documented(
    "",
    "flax.linen and batchnorm.flax.linen",
    _CONVENTION.correction,
    "None may be within jax.jit, nn.remat, nn.scan or the like.",
)
def recalibrate(
    apply: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    progress: bool = True,
) -> Any:
    """...

    Parameters
    ----------
    apply : function of variables and an input
        Applies the model as in evaluation, not compiled:
        ``lambda variables, x: model.apply(variables, x, train=False)``, say.
    variables : dict of collections
        Not changed.

    Returns
    -------
    variables, with other "batch_stats"

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import recalibrate
    >>> model, x = nn.BatchNorm(use_running_average=True), jnp.arange(1.0, 6.0)[:, None]
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables = recalibrate(model.apply, variables, [x[:2], x[2:]])
    >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
    [3.] [2.]
    """
    checks.instance("variables", variables, Mapping)
    if not callable(apply):
        raise TypeError(f"apply must be a function of variables and an input, but got {apply!r}.")
    kept = dict(_DICTS.flatten_dict(variables.get("batch_stats", {})))
    new = dict(kept)

    def now() -> Any:
        return copy(variables, {"batch_stats": _DICTS.unflatten_dict(new)})

    def commit(path: tuple[str, ...], statistics: Statistics, _: int) -> None:
        old = [new[*path, name] for name in ("mean", "var")]
        mean, var = (np.asarray(each, np.float64) for each in old)
        values = recalibration.recalibrated(mean, var, statistics, _CONVENTION.correction)
        for name, value, before in zip(("mean", "var"), values, old, strict=True):
            device = getattr(before, "sharding", None)  # of what was loaded, none perhaps
            new[*path, name] = jnp.asarray(value, before.dtype, device=device)

    known = recalibration.Model(
        found={"/".join(path): path for *path, name in map(tuple, kept) if name == "mean"},
        kinds='"batch_stats" of BatchNorm of flax.linen and batchnorm.flax.linen in variables',
        forward=recalibration.call_of(lambda x: apply(now(), x), None),
        observed=lambda see, by: observed(see, normalize_by=by),
        keep=lambda path: lambda: None,  # what failed returns nothing
        commit=commit,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)
    return now()


@contextmanager
def observed(see: See, *, normalize_by: NormalizeBy = "running") -> Iterator[None]:
    """The context of tools/observation.py, outside of JAX's transformations.

    It is around whichever models are applied in it. Their other layers do as they are told there.
    """
    is_own_call = False

    def interceptor(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        nonlocal is_own_call
        layer, path = context.module, "/".join(context.module.path)
        if is_own_call or not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return call(*arguments, **keywords)
        own: Any = {"axis_name": None, "axis_index_groups": None}
        alone = layer.clone(parent=None, use_running_average=normalize_by == "running", **own)
        keywords = {key: each for key, each in keywords.items() if key != "use_running_average"}
        x = jnp.asarray(arguments[0] if arguments else keywords.pop("x"))
        features = checks.feature_axes(layer.axis, x.shape)
        mask = keywords.get("mask")
        settings = layers.Settings(
            door, _CONVENTION, layer.epsilon, layer.momentum, features, layer.dtype
        )
        statistics = plain(path, layers.batch_statistics(settings, x, mask))
        is_own_call = True
        try:
            y, _ = alone.apply(layer.variables, x, **keywords, mutable=["batch_stats"])
        finally:
            is_own_call = False
        positive = None
        if getattr(layer, "activation", None) == "relu":
            positive = np.array(is_positive(y, features, mask)).ravel()
        see(path, statistics, positive)
        return y

    with nn.intercept_methods(interceptor):
        yield
