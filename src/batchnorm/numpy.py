"""Batch normalization of NumPy arrays.

float32, float64, float16 and bfloat16 (of `ml_dtypes`) arrays are normalized by the native kernels;
without them, and where the feature axes do not lie side by side, by `batchnorm.definition` in
float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import checks, definition, layout, native, ndarrays
from .definition import Inputs, Problem
from .documentation import documented
from .moments import Moments, Statistics, check_statistics
from .running import moved

__all__ = [
    "Gradients",
    "Statistics",
    "batch_norm",
    "batch_norm_gradients",
    "batch_statistics",
    "normalize",
    "update_running",
]

__dir__ = __all__.copy  # public names alone

Array = npt.NDArray[Any]
Axis = int | Sequence[int]

_STATISTICS = tuple(f"statistics.{name}" for name in Statistics._fields)  # in messages
_NUMBERS = "fiu"  # kinds of dtypes
_SETTLED = {np.ndarray, type(None)}

native.register_report("NumPy", lambda: "served")


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the arguments of `batch_norm`.

    Attributes
    ----------
    x : array, shape of x
    scale, bias : array of the feature shape, or None where there was no such argument
    residual : array of the shape of residual, or None
    """

    x: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None


@documented(wide="float64")
def batch_norm(
    x: npt.ArrayLike,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    mask: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: str | None = None,
    allow_one_value: bool = False,
    out: Array | None = None,
) -> tuple[Array, Statistics]:
    """...

    Parameters
    ----------
    out : array of the shape and dtype of x, optional
        Where to put y; x itself will do.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_norm
    >>> x = np.array([[1.0, 20.0], [3.0, 60.0]], dtype=np.float32)
    >>> y, statistics = batch_norm(x)
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(statistics.mean)
    [ 2. 40.]
    """
    names = "x", "scale", "bias", "mask", "residual"
    x, scale, bias, mask, residual = _settled(names, x, scale, bias, mask, residual)
    call = _Call(x, axis, mask).with_options(scale, bias, eps, residual, activation)
    values = layout.values_per_feature(call.features, call.x.shape)
    checks.more_than_one_value(values, call.x.shape, allow_one_value)

    def by_definition(problem: Problem, inputs: Inputs) -> dict[str, Any]:
        y, moments = definition.batch_norm(problem, inputs)
        return {"y": y, "statistics": moments.statistics()}

    done = call.run("batch_norm", by_definition, y=call.output(out), statistics=call.rows(3))
    return _in(out, done["y"]), _statistics(done["statistics"])


@documented()
def normalize(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    residual: npt.ArrayLike | None = None,
    activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """...

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import normalize
    >>> print(normalize(np.array([[3.0], [5.0]]), mean=[3.0], var=[4.0]).round(3))
    [[0.]
     [1.]]
    """
    names = "x", "mean", "var", "scale", "bias", "residual"
    x, mean, var, scale, bias, residual = _settled(names, x, mean, var, scale, bias, residual)
    call = _Call(x, axis).with_options(scale, bias, eps, residual, activation)
    mean, var = call.parameter("mean", mean), call.parameter("var", var)
    call.arguments |= {"mean": mean, "var": var}

    def by_definition(problem: Problem, inputs: Inputs) -> dict[str, Any]:
        if (var < 0).any():  # which a kernel leaves to us
            raise ValueError(f"var must be >= 0, but it holds {var.min()}.")
        moments = Moments.given(mean.astype(np.float64), var.astype(np.float64))
        return {"y": definition.normalize(problem, inputs, moments)}

    return _in(out, call.run("normalize", by_definition, y=call.output(out))["y"])


@documented(wide="float64")
def batch_statistics(
    x: npt.ArrayLike, *, axis: Axis = -1, mask: npt.ArrayLike | None = None
) -> Statistics:
    """... The statistics of two parts of a data set, merged, are those of the whole: data that do
    not fit into memory can be read in parts.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_statistics
    >>> data = np.arange(20.0).reshape(10, 2)
    >>> whole = batch_statistics(data[:4]).merge(batch_statistics(data[4:]))
    >>> print(whole.count, whole.mean, whole.var)
    [10. 10.] [ 9. 10.] [33. 33.]
    """
    x, mask = _settled(("x", "mask"), x, mask)
    call = _Call(x, axis, mask)

    def by_definition(problem: Problem, inputs: Inputs) -> dict[str, Any]:
        return {"statistics": definition.moments(problem, inputs).statistics()}

    done = call.run("statistics", by_definition, statistics=call.rows(3))
    return _statistics(done["statistics"])


@documented()
def update_running(
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    statistics: Statistics,
    *,
    rate: float,
    correction: int = 0,
) -> tuple[Array, Array]:
    """...

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_statistics, update_running
    >>> statistics = batch_statistics(np.array([[1.0], [3.0]]))
    >>> mean, var = update_running(np.zeros(1), np.ones(1), statistics, rate=0.5, correction=1)
    >>> print(mean, var)
    [1.] [1.5]
    """
    check_statistics("statistics", statistics)
    mean, var, *rows = _settled(("mean", "var", *_STATISTICS), mean, var, *statistics)
    mean, var = _real("mean", mean), _real("var", var)
    pairs = zip(_STATISTICS, rows, strict=True)
    batch = Statistics(*(_real(*pair, _NUMBERS).astype(np.float64, copy=False) for pair in pairs))
    rate = checks.fraction("rate", _number(rate))
    return moved(mean, var, batch, np.promote_types, rate=rate, correction=correction)


@documented(wide="float64")
def batch_norm_gradients(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    statistics: Statistics,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    mask: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: str | None = None,
) -> Gradients:
    """...

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_norm, batch_norm_gradients
    >>> x, dy = np.array([[1.0], [3.0], [8.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> scale = np.ones(1)
    >>> y, statistics = batch_norm(x, scale)
    >>> gradients = batch_norm_gradients(dy, x, statistics, scale)
    >>> print(gradients.x.ravel().round(3), gradients.scale.round(3))
    [ 0.109 -0.152  0.044] [-1.019]
    """
    check_statistics("statistics", statistics)
    names = "dy", "x", "scale", "bias", "mask", "residual", *_STATISTICS
    settled = _settled(names, dy, x, scale, bias, mask, residual, *statistics)
    dy, x, scale, bias, mask, residual, *given = settled
    call = _Call(x, axis, mask).with_options(scale, bias, eps, residual, activation)
    dy = _real("dy", dy)
    _check_shape("dy", dy, call.x)
    rows, sums = call.rows(3), call.rows(2)
    for row, name, value in zip(rows, _STATISTICS, given, strict=True):
        values = _real(name, value, _NUMBERS)
        checks.feature_shape(name, values.shape, call.feature_shape, call.x.shape)
        row[...] = values
    if call.x.itemsize == 8 and np.isinf(rows[2]).any():
        raise ValueError(
            "statistics.var must be finite, but of some feature it is infinite: the elements of x "
            "are further apart than a variance in float64 can say. Divide x by a power of two."
        )
    call.arguments |= {"statistics": rows, "dy": dy.astype(call.x.dtype, copy=False)}
    outputs = {"dx": call.output(), "dbias": sums[0], "dscale": sums[1]}
    if residual is not None:
        outputs["dresidual"] = call.output()

    def by_definition(problem: Problem, inputs: Inputs) -> dict[str, Any]:
        moments = Moments(rows[0], rows[1], None, None, rows[2])
        wide_dy = dy.astype(inputs.x.dtype, copy=False)
        dbias, dscale = definition.gradient_sums(problem, inputs, moments, wide_dy)
        dx, g = definition.input_gradient(problem, inputs, moments, wide_dy, dbias, dscale)
        return {"dx": dx, "dbias": dbias, "dscale": dscale, "dresidual": g}

    done = call.run("batch_norm_gradients", by_definition, **outputs)
    return Gradients(
        done["dx"],
        None if scale is None else done["dscale"],
        None if bias is None else done["dbias"],
        None if residual is None else _summed_to_residual(done["dresidual"], np.asarray(residual)),
    )


class _Call:
    """The checked arguments of a call, by the names that the kernels give them."""

    def __init__(self, x: npt.ArrayLike, axis: Axis, mask: npt.ArrayLike | None = None) -> None:
        self.x = x = _real("x", x)
        self.features = checks.feature_axes(axis, x.shape)
        self.feature_shape = layout.feature_shape(self.features, x.shape)
        self.arguments: dict[str, Any] = {"x": x, "features": self.features}
        if mask is not None:
            self.arguments["weights"] = _weights(mask, x, self.features)

    def with_options(
        self,
        scale: npt.ArrayLike | None,
        bias: npt.ArrayLike | None,
        eps: float,
        residual: npt.ArrayLike | None,
        activation: str | None,
    ) -> "_Call":
        arguments = self.arguments
        arguments["eps"] = checks.positive_eps(_number(eps))
        arguments["activation"] = checks.activation(activation)
        if scale is not None:
            arguments["scale"] = self.parameter("scale", scale)
        if bias is not None:
            arguments["bias"] = self.parameter("bias", bias)
        if residual is not None:
            arguments["residual"] = _residual(residual, self.x)
        return self

    def parameter(self, name: str, value: npt.ArrayLike) -> Array:
        """A value of each feature, in a dtype that the kernels and the definition know."""
        array = _real(name, value)
        checks.feature_shape(name, array.shape, self.feature_shape, self.x.shape)
        return array if array.dtype.char in "efd" else array.astype(np.float64)

    def rows(self, number: int) -> Array:
        return np.empty((number, *self.feature_shape))

    def output(self, out: Array | None = None) -> Array:
        """An array for a result: `out` if there is one."""
        if out is None:
            return np.empty_like(self.x)
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, but got {type(out).__name__}.")
        ndarrays.check_kinds("out", out)
        _check_shape("out", out, self.x)
        if out.dtype != self.x.dtype or not out.flags.writeable:
            raise ValueError(
                f"out must be writeable and of the dtype {self.x.dtype} of x, "
                f"but it is {'of dtype ' + str(out.dtype) if out.flags.writeable else 'read-only'}."
            )
        return out

    def run(
        self, kernel: str, by_definition: Callable[..., dict[str, Any]], **outputs: Array
    ) -> dict[str, Array]:
        """The outputs, written by a kernel or by the definition; some may be other arrays.

        What the kernel can't use as it lies in memory is replaced: x by a copy in C order, others
        like x by one in the layout of x.
        """
        given = {**self.arguments, **outputs}
        if self.x.dtype.kind == "V":  # bfloat16, which has no buffer
            given = {name: _bits(array) for name, array in given.items()}
        used = given
        while native.kernels is not None:
            name = getattr(native.kernels, kernel)(**used)
            if name is None:
                return outputs
            array = given[name]
            if used[name] is not array or not self.is_served():
                break
            new = np.empty_like(
                used["x"], array.dtype, "C" if name == "x" else "K", shape=array.shape
            )
            if name in outputs:
                outputs[name] = new.view(outputs[name].dtype)
            else:
                new[...] = array
            used = {**used, name: new}
        with np.errstate(all="ignore"):
            results = by_definition(*self.in_words_of_definition())
            arrays = {name: np.asarray(results[name]) for name in outputs}
            for name, output in outputs.items():  # where memory can't end any more
                output[...] = arrays[name]
        return outputs

    def is_served(self) -> bool:
        """Whether the kernels serve x if it lies in C order."""
        side_by_side = native.kernels.layout(self.x.shape, self.features) is not None
        return side_by_side and self.x.dtype.name in native.kernels.DTYPES

    def in_words_of_definition(self) -> tuple[Problem, Inputs]:
        """In float64, or wider."""
        given = self.arguments
        problem = Problem(self.features, given.get("eps", 1.0), given.get("activation"))
        arrays = (given.get(name) for name in Inputs._fields)
        return problem, Inputs(*(None if each is None else _wide(each) for each in arrays))


def _settled(names: Sequence[str], *arguments: Any) -> Sequence[Any]:
    """Arrays of the arguments, before any is looked at: making one may run code that moves others.

    What is a kind of array stays of that kind, since a plain view would not see it move in memory.
    """
    if _SETTLED.issuperset(map(type, arguments)):
        return arguments
    return [
        each if type(each) in _SETTLED else ndarrays.converted(name, each, np.asanyarray)
        for name, each in zip(names, arguments, strict=True)
    ]


def _number(value: Any) -> Any:
    """The number in an array without axes."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _in(out: Array | None, y: Array) -> Array:
    """y, in `out` if there is one."""
    if out is None or y is out:
        return y
    out[...] = y
    return out


def _statistics(rows: Array) -> Statistics:
    return Statistics(rows[0], rows[1], rows[2])  # which takes half the time of *rows


def _bits(argument: Any) -> Any:
    if isinstance(argument, np.ndarray) and argument.dtype.kind == "V":
        return argument.view("V2")
    return argument


def _wide(array: Array) -> Array:
    kind = array.dtype
    return array.astype(np.promote_types(kind, np.float64) if kind.kind == "f" else np.float64)


def _real(name: str, value: npt.ArrayLike, kinds: str = "f") -> Array:
    """An array of a dtype of these kinds, or of bfloat16."""
    array = np.asarray(value)
    dtype = array.dtype
    if dtype.kind not in kinds:
        checks.floating(name, dtype, dtype.kind == "V" and dtype.name == "bfloat16")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _check_shape(name: str, array: Array, x: Array) -> None:
    if array.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape {x.shape} of x, but its shape is {array.shape}."
        )


def _weights(mask: npt.ArrayLike, x: Array, features: layout.Axes) -> Array:
    """The mask as weights of the rank of x."""
    array = _real("mask", mask, "b" + _NUMBERS)
    checks.broadcasts("mask", array.shape, x.shape)
    if array.dtype != np.bool_ and array.size and not array.min() >= 0:
        raise ValueError(f"mask must hold bools or weights >= 0, but it holds {array.min()}.")
    array = array.astype(np.float64 if x.itemsize > 4 else np.float32)
    return np.broadcast_to(array, layout.weights_shape(features, array.shape, x.shape))


def _residual(residual: npt.ArrayLike, x: Array) -> Array:
    array = _real("residual", residual)
    checks.broadcasts("residual", array.shape, x.shape)
    return np.broadcast_to(array.astype(x.dtype, copy=False), x.shape)


def _summed_to_residual(gradient: Array, residual: Array) -> Array:
    """The gradient of the residual, which was broadcast to the shape of `gradient`."""
    leading = gradient.ndim - residual.ndim
    axes = tuple(
        axis
        for axis, size in enumerate(gradient.shape)
        if axis < leading or (residual.shape[axis - leading] == 1 and size != 1)
    )
    if axes:
        total: Array = _wide(gradient).sum(axis=axes, keepdims=True)
        gradient = total.reshape(residual.shape)
    return gradient.astype(residual.dtype, copy=False)
