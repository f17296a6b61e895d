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
    """Mean and variance in the coordinate u = (x − pivot) / unit.

    In exact arithmetic no result depends on pivot or unit. In floating point, a pivot near the mean
    makes x − pivot exact however large the mean is, and leaves the mean, pivot + unit·offset, as a
    sum of two terms that need not be rounded to one; a unit as large as the largest |x − pivot|
    keeps every square finite. Each has the rank of x, with length 1 along the reduced axes.
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
    constant: Callable[[Array], Array] = lambda array: array,
) -> tuple[Array, Statistics]:
    """Normalize x by its own statistics: statistics and normalize without a rounding in between.

    `constant` is the framework's stop_gradient; with it, differentiating this function gives the
    derivatives of every order, and without a pass over x for the pivot and the unit.
    """
    xp = array_namespace(x)
    valid = None
    if weights is not None:
        valid = xp.logical_or(weights > 0, xp.isfinite(x))
        x = xp.where(valid, x, 0.0)
    u, moments = _standard_coordinate(x, features, weights, constant)
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
    return y, _statistics(moments, features)


def statistics(
    x: Array,
    *,
    features: Axes,
    weights: Array | None = None,
    constant: Callable[[Array], Array] = lambda array: array,
) -> Statistics:
    """Count, mean and population variance of each feature."""
    if weights is not None:
        x = array_namespace(x).where(weights > 0, x, 0.0)
    _, moments = _standard_coordinate(x, features, weights, constant)
    return _statistics(moments, features)


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
    return _affine(
        x - _along(features, mean, x),
        None,
        _along(features, var, x) + eps,
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
    return _per_feature(features, _total(g, axes)), _per_feature(features, _total(g * x_hat, axes))


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
    slope = rstd if scale is None else rstd * _along(features, scale, x)
    return slope * (g - share * (sum_g + x_hat * sum_g_x_hat)), g


def update_running(
    mean: Array, var: Array, statistics: Statistics, *, rate: float, correction: int
) -> tuple[Array, Array]:
    """(1 − rate)·old + rate·new, the new variance multiplied by m / (m − correction).

    A feature with no more than `correction` elements (an empty batch, say) stays as it was.
    """
    xp = array_namespace(mean)
    count, new_mean, new_var = statistics
    enough = count > correction
    degrees = xp.where(enough, count - correction, 1.0)
    return (
        xp.where(enough, (1 - rate) * mean + rate * new_mean, mean),
        xp.where(enough, (1 - rate) * var + rate * (new_var * (count / degrees)), var),
    )


def _standard_coordinate(
    x: Array, features: Axes, weights: Array | None, constant: Callable[[Array], Array]
) -> tuple[Array, Moments]:
    """u = (x − pivot) / unit and the moments of x in it; x is finite wherever weights are 0."""
    xp = array_namespace(x)
    axes = _reduced(features, x)
    if 0 in x.shape:
        zero = _total(x, axes)
        return x, Moments(zero, zero, zero + 1.0, zero, zero)
    if weights is None:
        inside = x
        count = xp.full_like(_part(x, axes, slice(1)), math.prod(x.shape[axis] for axis in axes))
    else:
        weights = xp.broadcast_to(weights, x.shape)
        inside = xp.where(weights > 0, x, 0.0)
        count = _total(weights, axes)

    pivot = constant(_pivot(inside, axes, weights, count))
    reach = xp.maximum(
        xp.max(inside, axis=axes, keepdims=True) - pivot,
        pivot - xp.min(inside, axis=axes, keepdims=True),
    )
    unit = constant(xp.maximum(reach, xp.ones_like(reach)))
    u = (x - pivot) * (1.0 / unit)
    offset = _total(u, axes, weights) / _or_one(count)
    var = _total(u * u, axes, weights) / _or_one(count) - offset * offset
    return u, Moments(count, pivot, unit, offset, xp.maximum(var, xp.zeros_like(var)))


def _pivot(x: Array, axes: Axes, weights: Array | None, count: Array) -> Array:
    """A value near the mean of each feature: the mean of a leading part of x, or of all weighed x.

    The mean of a k-th part of the elements is within √k standard deviations of the mean of all, so
    that Σ u² loses no more than a factor k to cancellation. The second average removes what the
    first lost in adding large numbers.
    """
    if weights is None:
        longest = max(axes, key=lambda axis: x.shape[axis])
        x = _part(x, (longest,), slice(-(-x.shape[longest] // 64)))
        count = math.prod(x.shape[axis] for axis in axes)
    else:
        count = _or_one(count)
    rough = _total(x, axes, weights) / count
    return rough + _total(x - rough, axes, weights) / count


def _statistics(moments: Moments, features: Axes) -> Statistics:
    count, pivot, unit, offset, var = moments
    return Statistics(
        _per_feature(features, count),
        _per_feature(features, pivot + unit * offset),
        _per_feature(features, unit * unit * var),
    )


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
    """act((centered − offset) / √var_plus_eps · scale + bias + residual), as one product and sum."""
    xp = array_namespace(centered)
    slope = 1.0 / xp.sqrt(var_plus_eps)
    if scale is not None:
        slope = slope * _along(features, scale, centered)
    y = centered * slope
    if offset is not None and bias is not None:
        y = y + (_along(features, bias, centered) - offset * slope)
    elif offset is not None:
        y = y - offset * slope
    elif bias is not None:
        y = y + _along(features, bias, centered)
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
    xp = array_namespace(x)
    rstd = 1.0 / xp.sqrt(_along(features, var, x) + eps)
    x_hat = (x - _along(features, mean, x)) * rstd
    z = x_hat if scale is None else x_hat * _along(features, scale, x)
    z = z if bias is None else z + _along(features, bias, x)
    z = z if residual is None else z + residual
    g = _through_activation(dy, z, activation)
    if weights is not None:
        valid = xp.logical_or(weights > 0, xp.isfinite(x))
        x_hat = xp.where(valid, x_hat, 0.0)
        g = xp.where(valid, g, 0.0)
    return g, x_hat, rstd


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * array_namespace(z).tanh(0.5 * z)


def _activate(z: Array, activation: str | None) -> Array:
    if activation == "relu":
        return array_namespace(z).where(z <= 0, 0.0, z)
    if activation == "silu":
        return z * _sigmoid(z)
    return z


def _through_activation(dy: Array, z: Array, activation: str | None) -> Array:
    """dy · act′(z)."""
    if activation == "relu":
        return array_namespace(z).where(z <= 0, 0.0, dy)
    if activation == "silu":
        sigmoid = _sigmoid(z)
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    return dy


def _total(x: Array, axes: Axes, weights: Array | None = None) -> Array:
    """Σ w·x over `axes`, which stay with length 1.

    A running float sum of n elements can be off by n roundings. Summing axis by axis, and a long
    axis as about √n sums of √n elements, keeps that to the sum of the lengths of the sums.
    """
    xp = array_namespace(x)
    if weights is not None:
        x = xp.where(weights > 0, weights * x, 0.0)
    for axis in reversed(axes):
        length = x.shape[axis]
        block = math.isqrt(length) if length > 1024 else 1
        if block > 1:
            whole = length - length % block
            blocks = (*x.shape[:axis], whole // block, block, *x.shape[axis + 1 :])
            head = xp.sum(xp.reshape(_part(x, (axis,), slice(whole)), blocks), axis=axis + 1)
            tail = _part(x, (axis,), slice(whole, None))
            x = xp.concat([head, tail], axis=axis)
        x = xp.sum(x, axis=axis, keepdims=True)
    return x


def _part(x: Array, axes: Axes, part: slice) -> Array:
    """The `part` of x along each of `axes`."""
    return x[tuple(part if axis in axes else slice(None) for axis in range(x.ndim))]


def _reduced(features: Axes, x: Array) -> Axes:
    return tuple(axis for axis in range(x.ndim) if axis not in features)


def _per_feature(features: Axes, reduced: Array) -> Array:
    """`reduced`, whose reduced axes have length 1, without them."""
    shape = tuple(reduced.shape[axis] for axis in features)
    return array_namespace(reduced).reshape(reduced, shape)


def _along(features: Axes, parameter: Array, x: Array) -> Array:
    """`parameter`, of the feature shape, with axes of length 1 where x is reduced."""
    shape = tuple(x.shape[axis] if axis in features else 1 for axis in range(x.ndim))
    return array_namespace(x).reshape(parameter, shape)


def _or_one(count: Array) -> Array:
    """`count`, with 1 for 0: the divisor of sums that are 0 as well."""
    xp = array_namespace(count)
    return xp.where(count > 0, count, xp.ones_like(count))
