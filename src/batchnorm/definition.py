"""Batch normalization, defined once, on the arrays of any array-API namespace.

The formulas are those of Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training
by Reducing Internal Covariate Shift" (2015, https://arxiv.org/abs/1502.03167), in four stages:

    statistics      m = Σ w,   mean = Σ w·x / m,   var = Σ w·(x − mean)² / m
    normalize       y = act( (x − mean) / √(var + eps) · scale + bias + residual )
    gradient_sums   Σ g  and  Σ g·x̂,   with  x̂ = (x − mean) / √(var + eps)  and  g = dy · act′
    input_gradient  dx = scale / √(var + eps) · ( g − w/m · (Σ g + x̂ · Σ g·x̂) )

Sums run over every axis but the feature axes. w is the weight (the mask) of an element, 1 without
one. `features` is a sorted tuple of non-negative feature axes; scale, bias, mean and var have the
shape of x along them; weights and residual broadcast against x. Every function computes in the
dtype that it is given.

An element whose weight is 0 takes no part in the statistics but is normalized all the same. Where
such an element is not finite, its output is NaN and it takes no part in any gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

Array = Any
Axes = tuple[int, ...]
Constant = Callable[[Array], Array]
SumOfSquares = Callable[[Array, Axes], Array]
OverDevices = Callable[[Array], Array]

# Lengths of sums in `total`: one of up to _SHORT elements is taken at once, a longer one in
# blocks of _BLOCK to twice as many.
_SHORT, _BLOCK = 1024, 256


class Statistics(NamedTuple):
    """Count, mean and population variance of each feature.

    Attributes
    ----------
    count : array, feature shape
        How many elements each feature has: with a mask, the sum of its weights.
    mean, var : array, feature shape
        The mean, and the variance divided by count. Both are 0 where count is 0.
    """

    count: Array
    mean: Array
    var: Array

    def merge(self, other: "Statistics") -> "Statistics":
        """Pool the statistics of two disjoint sets, exactly up to rounding.

        The formula is that of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm
        for Computing Sample Variances" (1979). An empty set (count 0) changes nothing.

        Parameters
        ----------
        other : Statistics
            Statistics of further elements of the same features.

        Returns
        -------
        Statistics

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm.numpy import batch_statistics
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> pooled = batch_statistics(x[:1]).merge(batch_statistics(x[1:]))
        >>> bool(np.allclose(pooled.var, x.var(axis=0)))
        True
        """
        count = self.count + other.count
        fraction = other.count / _or_one(count)
        shift = other.mean - self.mean
        mean = self.mean + fraction * shift
        var = self.var + fraction * (other.var - self.var + (1 - fraction) * shift * shift)
        return Statistics(count, mean, var)


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


class Moments(NamedTuple):
    """Mean and variance in the coordinate u = (x − pivot) / unit, of the feature shape.

    In exact arithmetic no result depends on pivot or unit. In floating point, a pivot near the mean
    makes x − pivot exact however large the mean is, and leaves the mean, pivot + unit·offset, as a
    sum of two terms that need not be rounded to one; a unit as large as the largest |x − pivot|
    keeps every square finite. count is an int where every feature has that many elements.
    """

    count: Array
    pivot: Array
    unit: Array
    offset: Array
    var: Array


def batch_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    features: Axes,
    eps: float,
    weights: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    constant: Constant = lambda array: array,
    sum_of_squares: SumOfSquares | None = None,
    over_devices: OverDevices | None = None,
    wide: bool = False,
) -> tuple[Array, Statistics]:
    """Normalize x by its own statistics: statistics and normalize without a rounding in between.

    `constant` is the framework's stop_gradient; with it, differentiating this function gives the
    derivatives of every order, and without a pass over x for the pivot and the unit.
    `sum_of_squares(u, axes)` is Σ u² over axes that stay with length 1, where the framework has a
    cheaper derivative for it. `over_devices` adds an array elementwise over the devices that share
    a batch; its derivative does the same. Every device calls it as often, an empty part or not.
    `wide` says that x holds float32 values as float64, which the plain formulas neither overflow
    nor cancel: the fewest operations, for small arrays without weights on one device. The count is
    a number then.
    """
    if 0 in x.shape and over_devices is None:
        return x, statistics(x, features=features)
    if wide:
        return _plainly(x, scale, bias, features, eps, residual, activation)
    xp = _namespace(x)
    valid = None
    if weights is not None:
        valid = xp.logical_or(weights > 0, xp.isfinite(x))
        x = xp.where(valid, x, 0.0)
    u, moments = _standard_coordinate(x, features, weights, constant, sum_of_squares, over_devices)
    y = _affine(
        u,
        moments.offset,
        moments.var + eps / (moments.unit * moments.unit),
        scale,
        bias,
        features,
        residual,
        activation,
    )
    if valid is not None:
        y = xp.where(valid, y, math.nan)
    return y, _statistics(moments)


def statistics(
    x: Array,
    *,
    features: Axes,
    weights: Array | None = None,
    constant: Constant = lambda array: array,
    sum_of_squares: SumOfSquares | None = None,
    over_devices: OverDevices | None = None,
) -> Statistics:
    """Count, mean and population variance of each feature; the options are `batch_norm`'s."""
    if weights is not None:
        x = _namespace(x).where(weights > 0, x, 0.0)
    _, moments = _standard_coordinate(x, features, weights, constant, sum_of_squares, over_devices)
    return _statistics(moments)


def moments(
    x: Array, *, features: Axes, weights: Array | None = None, constant: Constant
) -> Moments:
    """The statistics, not rounded to a mean and a variance: for stages that are apart."""
    if weights is not None:
        x = _namespace(x).where(weights > 0, x, 0.0)
    _, moments = _standard_coordinate(x, features, weights, constant, None, None)
    return moments._replace(count=_statistics(moments).count)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    features: Axes,
    eps: float,
    residual: Array | None = None,
    activation: str | None = None,
) -> Array:
    """y = act((x − mean) / √(var + eps) · scale + bias + residual)."""
    if 0 in x.shape:
        return x
    return _affine(
        x - _along(features, mean, x),
        None,
        var + eps,
        scale,
        bias,
        features,
        residual,
        activation,
    )


def gradient_sums(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    features: Axes,
    eps: float,
    weights: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> tuple[Array, Array]:
    """Σ g and Σ g·x̂ of each feature: the gradients of bias and of scale."""
    g, x_hat, _ = _g_and_x_hat(
        dy, x, mean, var, scale, bias, features, eps, weights, residual, activation
    )
    axes = _reduced(features, x)
    return _per_feature(features, total(g, axes)), _per_feature(features, total(g * x_hat, axes))


def input_gradient(
    dy: Array,
    x: Array,
    statistics: Statistics,
    sums: tuple[Array, Array],
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    features: Axes,
    eps: float,
    weights: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> tuple[Array, Array]:
    """dx = scale / √(var + eps) · (g − w/m · (Σ g + x̂ · Σ g·x̂)); and g, the residual's gradient."""
    count, mean, var = statistics
    g, x_hat, rstd = _g_and_x_hat(
        dy, x, mean, var, scale, bias, features, eps, weights, residual, activation
    )
    sum_g, sum_g_x_hat = (_along(features, each, x) for each in sums)
    share = 1.0 / _along(features, _or_one(count), x)
    if weights is not None:
        share = weights * share
        x_hat = _namespace(x).where(weights > 0, x_hat, 0.0)  # and not ∞ · 0
    slope = rstd if scale is None else rstd * _along(features, scale, x)
    return slope * (g - share * (sum_g + x_hat * sum_g_x_hat)), g


def update_running(
    mean: Array, var: Array, statistics: Statistics, *, rate: float | Array, correction: int
) -> tuple[Array, Array]:
    """(1 − rate)·old + rate·new, the new variance multiplied by m / (m − correction).

    A feature with no more than `correction` elements (an empty batch, say) stays as it was. A count
    that is a number, the same for every feature, takes no operation.
    """
    xp = _namespace(mean)
    count, new_mean, new_var = statistics
    if isinstance(count, int):
        if count <= correction:
            return mean, var
        unbiased = rate * (count / (count - correction))
        return (1 - rate) * mean + rate * new_mean, (1 - rate) * var + unbiased * new_var
    enough = count > correction
    degrees = xp.where(enough, count - correction, 1.0)
    return (
        xp.where(enough, (1 - rate) * mean + rate * new_mean, mean),
        xp.where(enough, (1 - rate) * var + rate * (new_var * (count / degrees)), var),
    )


def total(x: Array, axes: Axes, weights: Array | None = None) -> Array:
    """Σ w·x over `axes`, which stay with length 1.

    A running float sum of n elements can be off by n roundings. Summing axis by axis, and a long
    axis in blocks, then the blocks' sums, keeps that to the sum of the lengths of the sums.
    """
    xp = _namespace(x)
    if 0 in x.shape:  # MLX 0.32 can hang in a sum of nothing
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        return xp.zeros(shape, dtype=x.dtype)
    if weights is not None:
        x = xp.where(weights > 0, weights * x, 0.0)
    if math.prod([x.shape[axis] for axis in axes]) <= _SHORT:
        return xp.sum(x, axis=axes, keepdims=True)
    for axis in reversed(axes):
        while x.shape[axis] > _SHORT:
            # As many blocks as a power of 2: XLA then sums an axis that is split over devices
            # where it lies.
            number = 1
            while x.shape[axis] >= 2 * number * _BLOCK:
                number *= 2
            block = x.shape[axis] // number
            whole = number * block
            blocks = (*x.shape[:axis], number, block, *x.shape[axis + 1 :])
            head = xp.sum(xp.reshape(_part(x, (axis,), slice(whole)), blocks), axis=axis + 1)
            tail = _part(x, (axis,), slice(whole, None))
            x = xp.concat([head, tail], axis=axis)
        x = xp.sum(x, axis=axis, keepdims=True)
    return x


def _plainly(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    features: Axes,
    eps: float,
    residual: Array | None,
    activation: str | None,
) -> tuple[Array, Statistics]:
    """`batch_norm` by the formulas as they are written."""
    axes = _reduced(features, x)
    count = math.prod([x.shape[axis] for axis in axes])
    mean = total(x, axes) / _or_one(count)
    centered = x - mean
    var = _per_feature(features, total(centered * centered, axes)) / _or_one(count)
    y = _affine(centered, None, var + eps, scale, bias, features, residual, activation)
    return y, Statistics(count, _per_feature(features, mean), var)


def _standard_coordinate(
    x: Array,
    features: Axes,
    weights: Array | None,
    constant: Constant,
    sum_of_squares: SumOfSquares | None,
    over_devices: OverDevices | None,
) -> tuple[Array, Moments]:
    """u = (x − pivot) / unit and the moments of x in it; x is finite wherever weights are 0."""
    xp = _namespace(x)
    axes = _reduced(features, x)
    count: Array | int = math.prod([x.shape[axis] for axis in axes])
    inside = x
    if weights is not None:
        weights = xp.broadcast_to(weights, x.shape)
        inside = xp.where(weights > 0, x, 0.0)
        count = total(weights, axes)

    if 0 in x.shape:
        pivot = reach = total(x, axes)
    else:
        pivot = _pivot(inside, axes, weights, count)
        # The pivot lies between them, so that no |x − pivot| is larger.
        reach = xp.max(inside, axis=axes, keepdims=True) - xp.min(inside, axis=axes, keepdims=True)
    if over_devices is not None:
        count = xp.full_like(pivot, count) if isinstance(count, int) else count
        pivot, reach = _shared(pivot, reach, count, over_devices)
    pivot = constant(pivot)
    unit = constant(reach + 1.0)

    u = (x - pivot) * (1.0 / unit)
    first = total(u, axes, weights)
    if sum_of_squares is None or weights is not None:
        second = total(u * u, axes, weights)
    else:
        second = sum_of_squares(u, axes)
    if over_devices is not None:
        sums = over_devices(xp.stack([count, first, second]))
        count, first, second = sums[0, ...], sums[1, ...], sums[2, ...]
    if not isinstance(count, int):
        count = _per_feature(features, count)
    offset = _per_feature(features, first) / _or_one(count)
    # Rounding can leave a variance of 0 a little below it.
    var = xp.abs(_per_feature(features, second) / _or_one(count) - offset * offset)
    pivot, unit = _per_feature(features, pivot), _per_feature(features, unit)
    return u, Moments(count, pivot, unit, offset, var)


def _pivot(x: Array, axes: Axes, weights: Array | None, count: Array | int) -> Array:
    """A value near the mean of each feature: the mean of a leading part of x, or of all weighed x.

    The mean of a k-th part of the elements is within √k standard deviations of the mean of all, so
    that Σ u² loses no more than a factor k to cancellation. Averaging differences from a value
    nearby loses nothing in adding large numbers, and gives a constant feature itself.
    """
    if weights is not None:
        rough = total(x, axes, weights) / _or_one(count)
        return rough + total(x - rough, axes, weights) / _or_one(count)
    longest = axes[0]
    for axis in axes:  # and not max(), which torch.compile does not trace
        longest = axis if x.shape[axis] > x.shape[longest] else longest
    part = _part(x, (longest,), slice(-(-x.shape[longest] // 64)))
    count = math.prod([part.shape[axis] for axis in axes])
    if count == 1:
        return part
    first = _part(x, axes, slice(1))
    return first + total(part - first, axes) / count


def _shared(
    pivot: Array, reach: Array, count: Array, over_devices: OverDevices
) -> tuple[Array, Array]:
    """One pivot for all devices: the mean of those that have elements; and a reach around it."""
    xp = _namespace(pivot)
    present = xp.where(count > 0, xp.ones_like(pivot), xp.zeros_like(pivot))
    sums = over_devices(xp.stack([present, present * pivot]))
    shared = sums[1, ...] / _or_one(sums[0, ...])
    return shared, over_devices(present * (reach + xp.abs(pivot - shared)))


def _statistics(moments: Moments) -> Statistics:
    count, pivot, unit, offset, var = moments
    if isinstance(count, int):
        count = _namespace(pivot).full_like(pivot, count)
    return Statistics(count, pivot + unit * offset, unit * unit * var)


def _affine(
    centered: Array,
    offset: Array | None,
    var_plus_eps: Array,
    scale: Array | None,
    bias: Array | None,
    features: Axes,
    residual: Array | None,
    activation: str | None,
) -> Array:
    """act((centered − offset) / √var_plus_eps · scale + bias + residual), as one product and sum.

    What is done once for each feature is done in the feature shape, and put along x only then: a
    fusing compiler would otherwise do it anew for every element.
    """
    slope = (1.0 if scale is None else scale) / _namespace(centered).sqrt(var_plus_eps)
    shift = bias
    if offset is not None:
        shift = -(offset * slope) if bias is None else bias - offset * slope
    y = centered * _along(features, slope, centered)
    if shift is not None:
        y = y + _along(features, shift, centered)
    if residual is not None:
        y = y + residual
    return _activate(y, activation)


def _g_and_x_hat(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    features: Axes,
    eps: float,
    weights: Array | None,
    residual: Array | None,
    activation: str | None,
) -> tuple[Array, Array, Array]:
    """g = dy · act′ and x̂, both 0 at an element that takes no part, and 1 / √(var + eps)."""
    xp = _namespace(x)
    rstd = 1.0 / xp.sqrt(_along(features, var, x) + eps)
    x_hat = (x - _along(features, mean, x)) * rstd
    z = x_hat if scale is None else x_hat * _along(features, scale, x)
    z = z if bias is None else z + _along(features, bias, x)
    z = z if residual is None else z + residual
    g = _through_activation(dy, z, activation)
    if weights is not None:
        inside = weights > 0
        x_hat = xp.where(xp.logical_or(inside, xp.isfinite(x_hat)), x_hat, 0.0)
        g = xp.where(xp.logical_or(inside, xp.isfinite(x)), g, 0.0)
    return g, x_hat, rstd


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * _namespace(z).tanh(0.5 * z)


def _activate(z: Array, activation: str | None) -> Array:
    if activation == "relu":
        return _namespace(z).where(z <= 0, 0.0, z)
    if activation == "silu":
        # z·σ(z), beyond ±80 by its limits: neither it nor its derivative is ∞ · 0 there.
        xp = _namespace(z)
        near = xp.clip(z, -80.0, 80.0)
        return near * _sigmoid(near) + xp.maximum(z - 80.0, xp.zeros_like(z))
    return z


def _through_activation(dy: Array, z: Array, activation: str | None) -> Array:
    """dy · act′(z)."""
    if activation == "relu":
        return _namespace(z).where(z <= 0, 0.0, dy)
    if activation == "silu":
        z = _namespace(z).clip(z, -80.0, 80.0)  # beyond, the slope is 0 or 1, not ∞ · 0
        sigmoid = _sigmoid(z)
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    return dy


_NAMESPACES: dict[type, Any] = {}


def _namespace(x: Array) -> Any:
    """`array_namespace` of x, once for each type: a look-up takes longer than a small operation."""
    kind = type(x)
    if kind not in _NAMESPACES:
        _NAMESPACES[kind] = array_namespace(x)
    return _NAMESPACES[kind]


def _part(x: Array, axes: Axes, part: slice) -> Array:
    """The `part` of x along each of `axes`."""
    return x[tuple(part if axis in axes else slice(None) for axis in range(x.ndim))]


def _reduced(features: Axes, x: Array) -> Axes:
    return tuple([axis for axis in range(x.ndim) if axis not in features])


def _per_feature(features: Axes, reduced: Array) -> Array:
    """`reduced`, whose reduced axes have length 1, without them."""
    shape = tuple([reduced.shape[axis] for axis in features])
    return _namespace(reduced).reshape(reduced, shape)


def _along(features: Axes, parameter: Array, x: Array) -> Array:
    """`parameter`, of the feature shape, with axes of length 1 where x is reduced."""
    shape = tuple([size if axis in features else 1 for axis, size in enumerate(x.shape)])
    return _namespace(x).reshape(parameter, shape)


def _or_one(count: Array | int) -> Array | int:
    """`count`, with 1 for 0: the divisor of sums that are 0 as well."""
    if isinstance(count, int):
        return count or 1
    xp = _namespace(count)
    return xp.where(count == 0, xp.ones_like(count), count)
