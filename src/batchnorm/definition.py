"""Batch normalization, defined once, on the arrays of any array-API namespace.

The formulas are those of Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training
by Reducing Internal Covariate Shift" (2015, https://arxiv.org/abs/1502.03167), in four stages:

    moments         m = Σ w,   mean = Σ w·x / m,   var = Σ w·(x − mean)² / m
    normalize       y = act( x̂ · scale + bias + residual ),   x̂ = (x − mean) / √(var + eps)
    gradient_sums   Σ g  and  Σ g·x̂,   with  g = dy · act′
    input_gradient  dx = slope · ( g − w/m · (Σ g + x̂ · Σ g·x̂) ),   slope = scale / √(var + eps)

Forward derivatives take the same way, with a sum over the elements in between:

    tangent_sums    p = act′·(slope·ẋ + ṙ),   t₀ = −rstd/m·Σ w·ẋ,   t₁ = −rstd/m·Σ w·ẋ·x̂
    output_tangent  ẏ = p + act′·(s₀ + s₁·x̂),   s₀ = scale·t₀ + ḃ,   s₁ = scale·t₁ + ṡ

where rstd is 1/√(var + eps), r is the residual, b the bias and s the scale. Transposed, in reverse
order, these two are gradient_sums and input_gradient. What is summed over several devices are t₀
and t₁, or scale·Σ g and scale·Σ g·x̂: each device has a scale of its own.

w is the weight (the mask) of an element, 1 without one; sums run over the reduced axes. Every
function computes in the dtype that it is given. An element whose weight is 0 takes no part in the
statistics but is normalized all the same. Where such an element is not finite, it takes no part in
any gradient; its output is NaN, as with weights that of all elements is which are not finite.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .activations import activate, through_activation
from .arrays import Array, namespace
from .layout import Axes, along, is_empty, per_feature, reduced_axes, values_per_feature
from .moments import Constant, Moments, Statistics, or_one, unchanged, unit_for
from .sums import AddUp, one_by_one, total, totals


class Problem(NamedTuple):
    """What a call does, apart from its arrays; eps may be an array without axes.

    With `any_size`, the sizes of the arrays are of one call alone out of many that the operations
    are to serve, and nothing may be made of those of reduced axes. The inputs then have weights.
    """

    features: Axes
    eps: Any = 1.0
    activation: str | None = None
    any_size: bool = False


class Inputs(NamedTuple):
    """The arrays that all stages have in common.

    scale and bias are of the feature shape; residual and weights broadcast to x.
    """

    x: Array
    scale: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    weights: Array | None = None


# ---- forward


def moments(
    problem: Problem,
    inputs: Inputs,
    constant: Constant = unchanged,
    add_up: AddUp = one_by_one,
) -> Moments:
    """The statistics of x. `constant` is the framework's stop_gradient.

    With it, a derivative takes no pass over x for the pivot and the unit. `add_up` may take one
    pass for several sums.
    """
    inputs = inputs._replace(x=_where(_inside(inputs), inputs.x, 0.0))
    return _centered(problem, inputs, constant, add_up)[1]


def normalize(problem: Problem, inputs: Inputs, moments: Moments) -> Array:
    """act((x − mean) / √(var + eps) · scale + bias + residual)."""
    x, _ = _valid(inputs)
    return _known(inputs, output(problem, inputs, moments, _coordinate(problem, x, moments)))


def batch_norm(
    problem: Problem,
    inputs: Inputs,
    constant: Constant = unchanged,
    add_up: AddUp = one_by_one,
) -> tuple[Array, Moments]:
    """`moments` and `normalize` in one, with a pass over x less; differentiable to any order."""
    x, _ = _valid(inputs)
    u, found = _centered(problem, inputs._replace(x=x), constant, add_up)
    return _known(inputs, output(problem, inputs, found, u)), found


def output(problem: Problem, inputs: Inputs, moments: Moments, u: Array) -> Array:
    """act(u·slope + shift + residual), u = (x − pivot) / unit.

    What is done once for each feature is done in the feature shape, and put along x only then: a
    fusing compiler would otherwise do it anew for every element.
    """
    return activate(_affine(problem, inputs, moments, u), problem.activation)


def _affine(problem: Problem, inputs: Inputs, moments: Moments, u: Array) -> Array:
    """What comes before the activation; finite factors alone are multiplied by u."""
    slope = _slope(inputs, moments, _deviation(problem, moments))
    shift = inputs.bias
    if moments.offset is not None:
        shift = _multiplied(moments.offset, slope)
        shift = -shift if inputs.bias is None else inputs.bias - shift
    z = _multiplied(u, [along(problem.features, factor, u) for factor in slope])
    if shift is not None:
        z = z + along(problem.features, shift, u)
    return z if inputs.residual is None else z + inputs.residual


def _centered(
    problem: Problem, inputs: Inputs, constant: Constant, add_up: AddUp
) -> tuple[Array, Moments]:
    """u = (x − pivot) / unit and the moments of x in it; x is finite wherever weights are 0.

    The pivot is the mean up to the rounding of a sum, but within the range of the elements: a
    constant feature is its own pivot, and a sum that overflows does no harm. Weights are divided by
    the largest of their feature, so that their products neither overflow nor vanish.
    """
    features, x, weights = problem.features, inputs.x, inputs.weights
    xp = namespace(x)
    axes, at_once = reduced_axes(features, x.ndim), problem.any_size
    if is_empty(x):
        nothing = per_feature(features, total(x, axes))
        return x, Moments(nothing, nothing, nothing + 1.0, nothing, nothing)
    inside = None
    low = high = fixed = constant(x)
    divisor = values_per_feature(features, x.shape)
    if weights is not None:
        weights = xp.broadcast_to(weights, x.shape)
        inside = weights > 0
        heaviest = constant(xp.max(weights, axis=axes, keepdims=True))
        heaviest = xp.where(heaviest > 0, heaviest, 1.0)
        weights = weights / heaviest
        count = total(weights, axes, at_once)
        divisor = or_one(count)
        low, high = (xp.where(inside, fixed, end) for end in (math.inf, -math.inf))
        fixed = xp.where(inside, fixed, 0.0)

    mean = total(_times(weights, fixed), axes, at_once) / divisor
    mean = xp.where(xp.isfinite(mean), mean, 0.0)
    smallest = xp.min(low, axis=axes, keepdims=True)
    largest = xp.max(high, axis=axes, keepdims=True)
    pivot = xp.minimum(xp.maximum(mean, smallest), largest)
    reach = xp.maximum(largest - pivot, pivot - smallest)
    if weights is not None:  # perhaps none that counts
        pivot, reach = (xp.where(count > 0, each, 0.0) for each in (pivot, reach))
    pivot = constant(pivot)
    unit = constant(unit_for(reach))

    u = _from(x, pivot, unit)
    counted = _where(inside, u, 0.0)  # before a square of what has no weight overflows
    parts = _times(weights, counted), _times(weights, xp.square(counted))
    offset, squares = (each / divisor for each in totals(parts, axes, at_once, add_up))
    # Rounding can leave a variance of 0 a little below it.
    var = xp.abs(squares - xp.square(offset))
    count = xp.full_like(pivot, divisor) if weights is None else count * heaviest
    found = (per_feature(features, each) for each in (count, pivot, unit, offset, var))
    return u, Moments(*found)


def _from(x: Array, pivot: Array, unit: Array) -> Array:
    """(x − pivot) / unit: rounded once, as unit is a power of two, and finite where x is."""
    inverse = 1.0 / unit
    return x * inverse - pivot * inverse


def _times(weights: Array | None, values: Array) -> Array:
    return values if weights is None else weights * values


def _coordinate(problem: Problem, x: Array, moments: Moments) -> Array:
    """u = (x − pivot) / unit."""
    pivot = along(problem.features, moments.pivot, x)
    if moments.unit is None:
        return x - pivot
    return _from(x, pivot, along(problem.features, moments.unit, x))


def _deviation(problem: Problem, moments: Moments) -> Array:
    """√(var + eps), in units of unit."""
    var = moments.var_plus(problem.eps)
    xp = namespace(var)
    if moments.unit is None:
        return xp.sqrt(var)
    return xp.sqrt(xp.maximum(var, xp.full_like(var, xp.finfo(var.dtype).smallest_normal)))


def _slope(inputs: Inputs, moments: Moments, deviation: Array) -> Sequence[Array]:
    """The factors of scale / deviation. Where a batch's own overflows, both are; else the last.

    The first is multiplied by what may be large, and has no weight: 1 makes it no larger.
    """
    if inputs.scale is None:
        return [1.0 / deviation]
    slope = inputs.scale / deviation
    if moments.count is None:
        return [slope]
    xp = namespace(slope)
    fits = xp.isfinite(slope)
    return [xp.where(fits, 1.0, inputs.scale), xp.where(fits, slope, 1.0 / deviation)]


def _multiplied(values: Array, factors: Sequence[Array]) -> Array:
    for factor in factors:
        values = values * factor
    return values


def _inside(inputs: Inputs) -> Array | None:
    """Where an element counts; None for everywhere."""
    return None if inputs.weights is None else inputs.weights > 0


def _known(inputs: Inputs, y: Array) -> Array:
    """y, with NaN where with weights an element has no output: where it is not finite.

    No constant NaN, which what looks for NaN would take for one that was computed.
    """
    x = inputs.x
    return y if inputs.weights is None else namespace(x).where(namespace(x).isfinite(x), y, x - x)


def takes_part(x: Array, weights: Array) -> Array:
    """Where an element has gradients: all but what is not finite and has no weight."""
    xp = namespace(x)
    return xp.logical_or(weights > 0, xp.isfinite(x))


def _valid(inputs: Inputs) -> tuple[Array, Array | None]:
    """x, with 0 in place of what takes no part; and where it does, None for everywhere."""
    if inputs.weights is None:
        return inputs.x, None
    valid = takes_part(inputs.x, inputs.weights)
    return _where(valid, inputs.x, 0.0), valid


def _where(valid: Array | None, values: Array, other: float) -> Array:
    return values if valid is None else namespace(values).where(valid, values, other)


# ---- backward, and forward derivatives


class _Standard(NamedTuple):
    """What derivatives are made of, along x; x̂ is enlarge · v, 0 where an element takes no part.

    v is finite wherever x is. x̂ of an element that does not count may overflow, and then must not
    meet a factor of 0.
    """

    v: Array
    enlarge: Array  # of the feature shape
    rstd: Array
    slope: Sequence[Array]  # its factors
    z: Array | None  # None without an activation, which alone needs it
    share: Array | None  # w / m; None where mean and variance do not depend on x
    valid: Array | None


def _standard(problem: Problem, inputs: Inputs, moments: Moments) -> _Standard:
    x, valid = _valid(inputs)
    features, xp = problem.features, namespace(x)
    deviation = _deviation(problem, moments)
    inverse = 1.0 / deviation
    one = xp.ones_like(inverse)
    reduce, enlarge = xp.minimum(inverse, one), xp.maximum(inverse, one)
    u = _coordinate(problem, x, moments)
    v = u * along(features, reduce, x)
    if moments.offset is not None:
        v = v - along(features, moments.offset * reduce, x)
    z = None if problem.activation is None else _affine(problem, inputs, moments, u)
    if moments.unit is not None:
        deviation = deviation * moments.unit
    slope = [along(features, each, x) for each in _slope(inputs, moments, deviation)]
    share = None
    if moments.count is not None:
        share = along(features, or_one(moments.count), x)
        share = 1.0 / share if inputs.weights is None else inputs.weights / share
    rstd = along(features, 1.0 / deviation, x)
    return _Standard(_where(valid, v, 0.0), enlarge, rstd, slope, z, share, valid)


def _through(problem: Problem, standard: _Standard, dy: Array) -> Array:
    """act′·dy, 0 where an element takes no part."""
    return _where(standard.valid, through_activation(dy, standard.z, problem.activation), 0.0)


def _sum(problem: Problem, x: Array) -> Array:
    axes = reduced_axes(problem.features, x.ndim)
    return per_feature(problem.features, total(x, axes, problem.any_size))


def _sums(problem: Problem, standard: _Standard, g: Array) -> tuple[Array, Array]:
    """Σ g and Σ g·x̂ of each feature."""
    return _sum(problem, g), standard.enlarge * _sum(problem, g * standard.v)


def _times_share(
    problem: Problem, inputs: Inputs, standard: _Standard, s0: Array, s1: Array
) -> Array:
    """w/m·(s₀ + x̂·s₁), 0 where w is, whatever an element there holds."""
    inside = _inside(inputs)
    x_hat = _where(inside, standard.v, 0.0) * along(problem.features, standard.enlarge, standard.v)
    s0, s1 = (along(problem.features, each, x_hat) for each in (s0, s1))
    return _where(inside, standard.share * (s0 + x_hat * s1), 0.0)


def gradient_sums(
    problem: Problem, inputs: Inputs, moments: Moments, dy: Array
) -> tuple[Array, Array]:
    """Σ g and Σ g·x̂ of each feature: the gradients of bias and of scale."""
    standard = _standard(problem, inputs, moments)
    return _sums(problem, standard, _through(problem, standard, dy))


def input_gradient(
    problem: Problem,
    inputs: Inputs,
    moments: Moments,
    dy: Array | None,
    sum_g: Array,
    sum_g_x_hat: Array,
    *,
    are_scaled: bool = False,
) -> tuple[Array, Array]:
    """dx; and g, the residual's gradient. No dy stands for zeros.

    `are_scaled`: whether the sums are of scale·g, as those of several devices.
    """
    standard = _standard(problem, inputs, moments)
    g = namespace(inputs.x).zeros_like(standard.v)
    if dy is not None:
        g = _through(problem, standard, dy)
    if standard.share is None:
        return _multiplied(g, standard.slope), g
    share = _times_share(problem, inputs, standard, sum_g, sum_g_x_hat)
    if are_scaled:
        return _multiplied(g, standard.slope) - standard.rstd * share, g
    return _multiplied(g - share, standard.slope), g


def weight_tangent(
    problem: Problem, inputs: Inputs, moments: Moments, weights_dot: Array
) -> tuple[Array, Array, Array]:
    """The tangents of count, offset and var, for that of the weights; pivot and unit have none.

    Σ ẇ,  Σ ẇ·(u − offset) / m  and  Σ ẇ·((u − offset)² − var) / m.
    """
    x, valid = _valid(inputs)
    xp = namespace(x)
    offset, var = (along(problem.features, each, x) for each in (moments.offset, moments.var))
    centered = _coordinate(problem, x, moments) - offset
    # That of an element which does not count may overflow, and then must not meet a tangent of 0.
    square = xp.minimum(xp.square(centered), xp.finfo(x.dtype).max)
    weights_dot = _where(valid, xp.broadcast_to(weights_dot, x.shape), 0.0)
    parts = weights_dot, weights_dot * centered, weights_dot * (square - var)
    count, first, second = (_sum(problem, part) for part in parts)
    divisor = or_one(moments.count)
    return count, first / divisor, second / divisor


def tangent_sums(
    problem: Problem, inputs: Inputs, moments: Moments, x_dot: Array, residual_dot: Array | None
) -> tuple[Array, Array, Array]:
    """p, t₀ and t₁, for the tangents of x and residual."""
    standard = _standard(problem, inputs, moments)
    partial = _multiplied(x_dot, standard.slope)
    weighed = -_where(_inside(inputs), standard.share * (x_dot * standard.rstd), 0.0)
    sums = _sums(problem, standard, weighed)
    if residual_dot is not None:
        partial = partial + residual_dot
    return _through(problem, standard, partial), *sums


def output_tangent(
    problem: Problem, inputs: Inputs, moments: Moments, partial: Array | None, s0: Array, s1: Array
) -> Array:
    """ẏ; no partial stands for zeros."""
    standard = _standard(problem, inputs, moments)
    features, v = problem.features, standard.v
    z_dot = along(features, s0, v) + along(features, s1 * standard.enlarge, v) * v
    y_dot = _through(problem, standard, z_dot)
    return y_dot if partial is None else y_dot + partial


# ---- the step that follows


def update_running(
    mean: Array, var: Array, statistics: Statistics, *, rate: float | Array, correction: int
) -> tuple[Array, Array]:
    """(1 − rate)·old + rate·new, the new variance multiplied by m / (m − correction).

    A feature with no more than `correction` elements (an empty batch, say) stays as it was. A count
    that is a number, the same for every feature, takes no operation.
    """
    xp = namespace(mean)
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
