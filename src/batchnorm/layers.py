"""What the layers of other libraries have in common, over the functions of a door.

They take integers, and one value of each feature; their results have a dtype of their own, rounded
to once; and messages name what the library names.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from . import checks
from .arrays import Array, namespace
from .conventions import Convention
from .moments import Statistics


class Settings(NamedTuple):
    """How a layer normalizes, as its library names it.

    Attributes
    ----------
    door
        The module of the functions: `batchnorm.jax`, say.
    dtype
        That of the result; None for the one to which x, scale and bias promote.
    devices
        What the door's functions are told of those that share statistics, by its arguments' names.
    """

    door: Any
    convention: Convention
    eps: Any
    momentum: Any
    axis: Any = -1
    dtype: Any = None
    activation: str | None = None
    devices: Mapping[str, Any] = MappingProxyType({})


def batch_norm(
    settings: Settings,
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Statistics]:
    x, dtype = _in_dtypes(settings, x, scale, bias)
    y, statistics = settings.door.batch_norm(
        x,
        scale,
        bias,
        **_options(settings, x),
        residual=residual,
        mask=mask,
        allow_one_value=True,
        **settings.devices,
    )
    return _cast(y, dtype), statistics


def batch_statistics(settings: Settings, x: Array, mask: Array | None = None) -> Statistics:
    x, _ = _in_dtypes(settings, x, None, None)
    statistics: Statistics = settings.door.batch_statistics(
        x, axis=settings.axis, mask=mask, **settings.devices
    )
    return statistics


def normalize(
    settings: Settings,
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
) -> Array:
    x, dtype = _in_dtypes(settings, x, scale, bias)
    y = settings.door.normalize(
        x, mean, var, scale, bias, **_options(settings, x), residual=residual
    )
    return _cast(y, dtype)


def update_running(
    settings: Settings,
    mean: Array,
    var: Array,
    statistics: Statistics,
    *,
    keeps_dtype: bool = False,
) -> tuple[Array, Array]:
    """The new averages: of their dtypes, or of those to which they and the statistics promote."""
    xp, dtype = namespace(statistics.mean), statistics.mean.dtype
    wide = (_cast(each, xp.result_type(each.dtype, dtype)) for each in (mean, var))
    rate = settings.convention.rate(_momentum(settings, statistics.mean))
    new_mean, new_var = settings.door.update_running(*wide, statistics, rate=rate)
    if keeps_dtype:
        return _cast(new_mean, mean.dtype), _cast(new_var, var.dtype)
    return new_mean, new_var


def folded(
    weight: Array,
    bias: Array | None,
    channels: tuple[int, ...],
    *,
    mean: Array,
    var: Array,
    scale: Array | None,
    shift: Array | None,
    eps: float,
) -> tuple[Any, Any]:
    """Weight and bias of a linear layer, with the normalization of its output put into it.

    ``(x·weight + bias - mean)·s + shift`` is linear in x, with ``s = scale / sqrt(var + eps)``. In
    the weight, `channels` is the shape of s.
    """
    s: Any = (var + eps) ** -0.5
    if scale is not None:
        s = s * scale
    new_bias = -mean * s if bias is None else (bias - mean) * s
    return weight * s.reshape(channels), new_bias if shift is None else new_bias + shift


def refuse_infinite_fold(dtype: Any) -> NoReturn:
    raise ValueError(
        f"The folded layer's parameters are not finite in {dtype}: running_var may be 0, or a "
        "statistic not finite. Fold in a wider dtype, or call the layers one after the other."
    )


def refuse_subclass(name: str, layer: Any, parent: str, ours: str) -> NoReturn:
    """Of a layer that a conversion finds at `name`, and does not know."""
    kind = type(layer)
    raise TypeError(
        f"{name} is of {kind.__module__}.{kind.__name__}, a subclass of {parent}, which may "
        f"compute something else. Replace it in the model by one of that class, or derive its "
        f"class from {ours}."
    )


def _options(settings: Settings, x: Array) -> dict[str, Any]:
    _momentum(settings, x)  # a wrong one is refused before anything moves, in evaluation too
    name = settings.convention.name_of_eps
    eps = number(name, settings.eps, x, lambda eps: checks.positive_eps(eps, name))
    return {"axis": settings.axis, "eps": eps, "activation": settings.activation}


def _momentum(settings: Settings, x: Array) -> Any:
    return number("momentum", settings.momentum, x, partial(checks.fraction, "momentum"))


def number(name: str, value: Any, x: Array, check: Callable[[Any], float]) -> Any:
    """A number, checked. An array of x's framework stays one, NaN to the door if out of range."""
    if checks.is_real(value) or not hasattr(value, "dtype"):
        return check(value)
    xp = namespace(value)
    is_real = xp.isdtype(value.dtype, ("real floating", "integral"))
    checks.scalar(name, value.shape, value.dtype, is_real)
    return value if xp is namespace(x) else check(value.item())


def _in_dtypes(
    settings: Settings, x: Array, scale: Array | None, bias: Array | None
) -> tuple[Array, Any]:
    """x in the dtype of the result, or else in that of computation; and the result's."""
    xp, dtype = namespace(x), settings.dtype
    if dtype is None:
        dtype = xp.result_type(*[each for each in (x, scale, bias) if each is not None])
        if xp.isdtype(dtype, ("bool", "integral")):
            dtype = xp.result_type(dtype, xp.float32)
    elif not xp.isdtype(dtype, "real floating"):
        raise ValueError(f"dtype must be None or a real floating-point dtype, but got {dtype!r}.")
    is_complex = xp.isdtype(x.dtype, "complex floating")  # which the door refuses
    if (x.dtype != dtype or x.dtype.itemsize == 1) and not is_complex:
        x = _cast(x, xp.float64 if xp.float64 in (x.dtype, dtype) else xp.float32)
    return x, dtype


def _cast(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else namespace(array).astype(array, dtype)
