"""Batch normalization of NumPy arrays.

float32, float64, float16 and bfloat16 (of `ml_dtypes`) arrays are normalized by the native kernels;
without them, and where the feature axes do not lie side by side, by `batchnorm.definition` in
float64.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from . import checks, definition
from .definition import Gradients, Statistics
from .documentation import documented
from .native import _cpu

__all__ = [
    "Gradients",
    "Statistics",
    "batch_norm",
    "batch_norm_gradients",
    "batch_statistics",
    "normalize",
    "update_running",
]

Array = npt.NDArray[Any]
Axis = int | Sequence[int]


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
    call = _Call(x, scale, bias, axis, eps, mask, residual, activation)
    checks.more_than_one_value(call.values, call.x.shape)
    y = call.output(out)
    if call.native:
        statistics, addresses = call.new_statistics()
        _cpu.batch_norm(*call.native_arguments(), *addresses, _address(y))
        return call.finished(y, out), statistics
    with np.errstate(all="ignore"):
        y[...], statistics = definition.batch_norm(*call.wide_arrays(), **call.options())
    return call.finished(y, out), statistics


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
    call = _Call(x, scale, bias, axis, eps, None, residual, activation)
    mean, var = call.parameter("mean", mean), call.parameter("var", var)
    y = call.output(out)
    if call.native:
        _cpu.normalize(
            *call.native_arguments(),
            _cpu.DTYPES["float64"],
            _address(mean),
            _address(var),
            _address(y),
        )
        return call.finished(y, out)
    wide_x, scale, bias = call.wide_arrays()
    options = call.options()
    del options["weights"]
    with np.errstate(all="ignore"):
        y[...] = definition.normalize(wide_x, mean, var, scale, bias, **options)
    return call.finished(y, out)


def batch_statistics(
    x: npt.ArrayLike, *, axis: Axis = -1, mask: npt.ArrayLike | None = None
) -> Statistics:
    """Count, mean and population variance of each feature.

    The statistics of two parts of a data set, merged, are those of the whole: data that do not fit
    into memory can be read in parts.

    Parameters
    ----------
    x, axis, mask
        As in `batch_norm`.

    Returns
    -------
    Statistics
        In float64, of the feature shape.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_statistics
    >>> data = np.arange(20.0).reshape(10, 2)
    >>> whole = batch_statistics(data[:4]).merge(batch_statistics(data[4:]))
    >>> print(whole.count, whole.mean, whole.var)
    [10. 10.] [ 9. 10.] [33. 33.]
    """
    call = _Call(x, None, None, axis, 1.0, mask, None, None)
    if call.native:
        statistics, addresses = call.new_statistics()
        _cpu.statistics(*call.native_arguments(), *addresses)
        return statistics
    with np.errstate(all="ignore"):
        return definition.statistics(
            call.wide_arrays()[0], features=call.features, weights=call.weights
        )


def update_running(
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    statistics: Statistics,
    *,
    rate: float,
    correction: int = 0,
) -> tuple[Array, Array]:
    """Move running statistics towards those of a batch.

    ``new = (1 - rate) * old + rate * batch``; the variance of the batch is first multiplied by
    ``count / (count - correction)``. A feature of which the batch has no more than `correction`
    elements stays as it was.

    Parameters
    ----------
    mean, var : array of the feature shape
    statistics : Statistics
    rate : float within [0, 1]
        The weight of the new value. PyTorch and MLX call it momentum; Flax and Keras call
        ``1 - rate`` momentum.
    correction : 0 or 1
        1 for the unbiased variance, as PyTorch and MLX keep it; 0 as Flax and Keras do.

    Returns
    -------
    mean, var : array, of the dtypes that came

    Raises
    ------
    TypeError, ValueError
        If rate or correction is out of range, or a shape differs from the statistics'.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.numpy import batch_statistics, update_running
    >>> statistics = batch_statistics(np.array([[1.0], [3.0]]))
    >>> mean, var = update_running(np.zeros(1), np.ones(1), statistics, rate=0.5, correction=1)
    >>> print(mean, var)
    [1.] [1.5]
    """
    rate = checks.fraction("rate", rate)
    correction = checks.correction(correction)
    mean, var = np.asarray(mean), np.asarray(var)
    count, batch_mean, batch_var = (np.asarray(each, np.float64) for each in statistics)
    checks.statistics_shape("mean", mean.shape, batch_mean.shape)
    checks.statistics_shape("var", var.shape, batch_mean.shape)
    new_mean, new_var = definition.update_running(
        mean.astype(np.float64),
        var.astype(np.float64),
        Statistics(count, batch_mean, batch_var),
        rate=rate,
        correction=correction,
    )
    return new_mean.astype(mean.dtype), new_var.astype(var.dtype)


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
    """Gradients of a loss through `batch_norm`, from its gradient with respect to y.

    ``dx = scale / sqrt(var + eps) * (g - w / m * (sum(g) + x_hat * sum(g * x_hat)))`` with
    ``g = dy * activation'``, w the mask (1 without one) and m its sum; the gradients of bias and
    scale are the two sums.

    Parameters
    ----------
    dy : array of the shape of x
    x, scale, bias, axis, eps, mask, residual, activation
        As they were given to `batch_norm`.
    statistics : Statistics
        As `batch_norm` returned them.

    Returns
    -------
    Gradients
        x and residual in their dtypes, scale and bias in float64; None for what was not given.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; and if dy or the statistics do not have the shapes that go with x.

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
    call = _Call(x, scale, bias, axis, eps, mask, residual, activation)
    dy = np.asarray(dy)
    checks.same_shape("dy", dy.shape, call.x.shape)
    _floating("dy", dy)
    statistics = Statistics(
        *(
            call.parameter(f"statistics.{name}", value)
            for name, value in zip(Statistics._fields, statistics, strict=True)
        )
    )
    sums = np.empty((2, *statistics.mean.shape))
    dx = call.output(None)
    dresidual = None if call.residual is None else call.output(None)
    if call.native:
        dy = call.in_memory_order(dy.astype(call.x.dtype, copy=False))
        _cpu.batch_norm_gradients(
            *call.native_arguments(),
            *_addresses(statistics),
            _address(dy),
            *_addresses(sums),
            _address(dx),
            _address(dresidual),
        )
    else:
        wide_x, scale, bias = call.wide_arrays()
        dy = dy.astype(wide_x.dtype, copy=False)
        options = call.options()
        with np.errstate(all="ignore"):
            sums[:] = definition.gradient_sums(
                dy, wide_x, statistics.mean, statistics.var, scale, bias, **options
            )
            dx[...], g = definition.input_gradient(
                dy, wide_x, statistics, (sums[0], sums[1]), scale, bias, **options
            )
        if dresidual is not None:
            dresidual[...] = g
    return Gradients(
        dx,
        None if call.scale is None else sums[1],
        None if call.bias is None else sums[0],
        None if dresidual is None else _summed_to_residual(dresidual, np.asarray(residual)),
    )


class _Call:
    """The checked arguments of a call, and how its arrays lie in memory.

    `order` is the order of the axes of x in memory, None for C order; `shape` is the size of the
    feature axes, and of what lies outside and inside them in memory.
    """

    def __init__(
        self,
        x: npt.ArrayLike,
        scale: npt.ArrayLike | None,
        bias: npt.ArrayLike | None,
        axis: Axis,
        eps: float,
        mask: npt.ArrayLike | None,
        residual: npt.ArrayLike | None,
        activation: str | None,
    ) -> None:
        self.x = x = _floating("x", x)
        self.features = features = checks.feature_axes(axis, x.shape)
        self.feature_shape = tuple([x.shape[each] for each in features])
        self.values = x.size // (math.prod(self.feature_shape) or 1)
        self.eps = checks.positive_eps(eps)
        self.activation = checks.activation(activation)
        self.scale = None if scale is None else self.parameter("scale", scale)
        self.bias = None if bias is None else self.parameter("bias", bias)
        self.weights = None if mask is None else _weights(mask, x)
        self.residual = None if residual is None else _residual(residual, x)

        sizes: Sequence[int] = x.shape
        self.order = None if x.flags.c_contiguous else _memory_order(x)
        if self.order is not None:
            sizes = [x.shape[each] for each in self.order]
            features = tuple(self.order.index(each) for each in features)
        begin, end = features[0], features[-1] + 1
        self.shape = (
            math.prod(sizes[:begin]),
            math.prod(sizes[begin:end]),
            math.prod(sizes[end:]),
        )
        side_by_side = len(features) == 1 or features == tuple(range(begin, end))
        self.code = _code(x.dtype)
        self.native = side_by_side and self.code is not None

    def parameter(self, name: str, value: npt.ArrayLike) -> Array:
        """A value of each feature, in float64."""
        array = np.asarray(value)
        dtype = array.dtype
        checks.floating(name, dtype, dtype.kind in "fbiu" or _is_bfloat16(dtype))
        checks.feature_shape(name, array.shape, self.feature_shape, self.x.shape)
        return array.astype(np.float64, order="C", copy=False)

    def output(self, out: Array | None = None) -> Array:
        """An array for a result: `out`, where the result can be written there directly."""
        y = np.empty(self.x.shape, self.x.dtype) if self.order is None else np.empty_like(self.x)
        if out is None:
            return y
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, but got {type(out).__name__}.")
        checks.same_shape("out", out.shape, self.x.shape)
        if out.dtype != self.x.dtype or not out.flags.writeable:
            raise ValueError(
                f"out must be writeable and of the dtype {self.x.dtype} of x, "
                f"but it is {'of dtype ' + str(out.dtype) if out.flags.writeable else 'read-only'}."
            )
        apart = all(
            array is None or array is out or not np.may_share_memory(out, array)
            for array in (self.x, self.residual, self.weights)
        )
        return out if apart and out.strides == y.strides else y

    def finished(self, y: Array, out: Array | None) -> Array:
        if out is None or out is y:
            return y
        out[...] = y
        return out

    # ---- for the native kernels

    def in_memory_order(self, array: Array) -> Array:
        if self.order is not None:
            array = array.transpose(self.order)
        return np.ascontiguousarray(array)

    def native_arguments(self) -> tuple[Any, ...]:
        """The arguments that all kernels have in common; csrc/batch_norm.h says what they are."""
        weights, weight_channels = None, 0
        if self.weights is not None:
            per_feature = any(self.weights.shape[each] != 1 for each in self.features)
            weight_channels = self.shape[1] if per_feature else 1
            shape = tuple(
                1 if axis in self.features and not per_feature else size
                for axis, size in enumerate(self.x.shape)
            )
            dtype = np.float64 if self.x.dtype == np.float64 else np.float32
            weights = self.in_memory_order(np.broadcast_to(self.weights, shape).astype(dtype))
        residual = None if self.residual is None else self.in_memory_order(self.residual)
        x = self.in_memory_order(self.x)
        self.held = (x, residual, weights)  # as long as their addresses are in use
        return (
            *self.shape,
            self.code,
            _cpu.ACTIVATIONS[self.activation],
            self.eps,
            _address(x),
            _address(residual),
            _cpu.DTYPES["float64"],
            _address(self.scale),
            _address(self.bias),
            _address(weights),
            weight_channels,
            0,  # no host's threads
        )

    def new_statistics(self) -> tuple[Statistics, tuple[int, int, int]]:
        """Statistics for a kernel to fill in, and their addresses."""
        memory = np.empty((3, *self.feature_shape))
        first, size = _address(memory), memory.nbytes // 3
        return Statistics(*memory), (first, first + size, first + 2 * size)

    # ---- for the definition, in float64 or wider

    def wide_arrays(self) -> tuple[Array, Array | None, Array | None]:
        return self.x.astype(_wide(self.x.dtype), copy=False), self.scale, self.bias

    def options(self) -> dict[str, Any]:
        residual = self.residual
        return {
            "features": self.features,
            "eps": self.eps,
            "weights": self.weights,
            "residual": None if residual is None else residual.astype(_wide(residual.dtype)),
            "activation": self.activation,
        }


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "V" and dtype.name == "bfloat16"


@cache
def _code(dtype: np.dtype[Any]) -> int | None:
    """The kernels' number for an element type, None for one that they do not know."""
    return None if _cpu is None else _cpu.DTYPES.get(dtype.name)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.promote_types(dtype, np.float64) if dtype.kind == "f" else np.dtype(np.float64)


def _floating(name: str, value: npt.ArrayLike) -> Array:
    array = np.asarray(value)
    dtype = array.dtype
    checks.floating(name, dtype, dtype.kind == "f" or _is_bfloat16(dtype))
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _weights(mask: npt.ArrayLike, x: Array) -> Array:
    """The mask as float64 weights, of the rank of x."""
    array = np.asarray(mask)
    checks.floating("mask", array.dtype, array.dtype.kind in "biuf" or _is_bfloat16(array.dtype))
    checks.broadcasts("mask", array.shape, x.shape)
    if array.dtype != np.bool_ and array.size:
        checks.non_negative("mask", array.min())
    shape = (1,) * (x.ndim - array.ndim) + array.shape
    return array.reshape(shape).astype(np.float64)


def _residual(residual: npt.ArrayLike, x: Array) -> Array:
    array = _floating("residual", residual)
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
        total: Array = gradient.sum(axis=axes, dtype=_wide(gradient.dtype), keepdims=True)
        gradient = total.reshape(residual.shape)
    return gradient.astype(residual.dtype, copy=False)


def _memory_order(x: Array) -> tuple[int, ...] | None:
    """The order of its axes in which x is contiguous, None if there is none."""
    order = tuple(sorted(range(x.ndim), key=lambda axis: -x.strides[axis]))
    return order if x.transpose(order).flags.c_contiguous else None


def _address(array: Array | None) -> int:
    """Where the first element is; 0 for no array."""
    if array is None:
        return 0
    if array.dtype.kind == "V":  # bfloat16 has no buffer protocol
        array = array.view(np.uint16)
    address: int = _cpu.address(array)
    return address


def _addresses(arrays: Iterable[Array]) -> tuple[int, ...]:
    return tuple(_address(array) for array in arrays)
