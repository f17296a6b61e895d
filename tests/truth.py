"""The truth that tests compare with: batch normalization by plain formulas, in float64 or wider.

Of long double, it is in long double, whose range is wider as well.

Nothing here comes from the package. Gradients are by the chain rule, written out in another order
than in the package: through x̂, var and mean one after the other, as in Ioffe & Szegedy (2015).
"""

from typing import NamedTuple

import numpy as np


def _wide(x):
    """The dtype of the truth of x."""
    return np.longdouble if getattr(x, "dtype", None) == np.longdouble else np.float64


class Truth(NamedTuple):
    y: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class _Forward(NamedTuple):
    """What both directions are made of, along x; `reduced` are the axes to be summed over."""

    reduced: tuple[int, ...]
    weights: np.ndarray
    takes_part: np.ndarray
    count: np.ndarray
    divisor: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    centered: np.ndarray
    x_hat: np.ndarray
    z: np.ndarray

    def sum(self, values):
        return np.squeeze(values.sum(self.reduced, keepdims=True), self.reduced)


def _forward(x, scale, bias, axis, eps, mask, residual, given, dtype) -> _Forward:
    dtype = dtype or _wide(x)
    x = np.asarray(x, dtype)
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    features = sorted(each % x.ndim for each in axes)
    reduced = tuple(each for each in range(x.ndim) if each not in features)
    shape = [x.shape[each] if each in features else 1 for each in range(x.ndim)]
    weights = np.ones(x.shape, dtype)
    if mask is not None:
        weights = np.broadcast_to(np.asarray(mask, dtype), x.shape)
    takes_part = np.ones(x.shape, bool) if mask is None else (weights > 0) | np.isfinite(x)
    x = np.where(takes_part, x, 0)
    count = weights.sum(reduced, keepdims=True)
    divisor = np.where(count > 0, count, 1)

    def average(values):
        return (weights * values).sum(reduced, keepdims=True) / divisor

    def inside(values):
        return np.where(weights > 0, values, 0)

    if given is None:
        # About an element, of which a constant is exactly 0 apart; and what rounding the mean has
        # left out is not rounded away again.
        origin = np.where(weights > 0, x, -np.inf).max(reduced, keepdims=True, initial=-np.inf)
        origin = np.where(np.isfinite(origin), origin, 0)
        mean = average(inside(x - origin))
        rest = average(inside(x - origin - mean))
        centered = x - origin - mean - rest
        mean, var = origin + mean + rest, average(inside(centered) ** 2)
    else:
        mean, var = (np.asarray(each, dtype).reshape(shape) for each in given)
        centered = x - mean
    scale = np.ones(shape, dtype) if scale is None else np.asarray(scale, dtype).reshape(shape)
    bias = np.zeros(shape, dtype) if bias is None else np.asarray(bias, dtype).reshape(shape)
    x_hat = centered / np.sqrt(var + dtype(eps))
    z = x_hat * scale + bias + (0 if residual is None else np.asarray(residual, dtype))
    return _Forward(
        reduced, weights, takes_part, count, divisor, mean, var, scale, centered, x_hat, z
    )


def _sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def batch_norm(
    x,
    scale=None,
    bias=None,
    *,
    axis=-1,
    eps=1e-5,
    mask=None,
    residual=None,
    activation=None,
    given=None,
    dtype=None,
):
    """By the statistics of x; or by `given` ones, (mean, var), which are returned as they came."""
    forward = _forward(x, scale, bias, axis, eps, mask, residual, given, dtype)
    z = forward.z
    y = {None: lambda: z, "relu": lambda: np.maximum(z, 0), "silu": lambda: z * _sigmoid(z)}
    statistics = (forward.count, forward.mean, forward.var)
    squeezed = (np.squeeze(each, forward.reduced) for each in statistics)
    # With weights, what is not finite has no output.
    finite = mask is None or np.isfinite(np.asarray(x, z.dtype))
    return Truth(np.where(finite, y[activation](), np.nan), *squeezed)


def batch_norm_gradients(
    dy,
    x,
    scale=None,
    bias=None,
    *,
    axis=-1,
    eps=1e-5,
    mask=None,
    residual=None,
    activation=None,
    given=None,
    dtype=None,
):
    """Gradients of sum(y * dy), by the name of the argument; residual of the shape of x.

    With a `given` mean and var, which do not depend on x, those of them as well.
    """
    forward = _forward(x, scale, bias, axis, eps, mask, residual, given, dtype)
    reduced, centered, scale, z = forward.reduced, forward.centered, forward.scale, forward.z
    sigmoid = _sigmoid(z)
    slope = {
        None: 1.0,
        "relu": z > 0,
        "silu": sigmoid + z * sigmoid * (1 - sigmoid),
    }
    g = np.where(forward.takes_part, np.asarray(dy, z.dtype) * slope[activation], 0)
    d_x_hat = g * scale
    rstd = 1 / np.sqrt(forward.var + z.dtype.type(eps))
    d_var = (d_x_hat * centered).sum(reduced, keepdims=True) * -0.5 * rstd**3
    d_mean = -(d_x_hat * rstd).sum(reduced, keepdims=True)
    gradients = {
        "x": d_x_hat * rstd,
        "scale": forward.sum(g * forward.x_hat),
        "bias": forward.sum(g),
        "residual": g,
    }
    if given is not None:
        return {**gradients, "mean": np.squeeze(d_mean, reduced), "var": np.squeeze(d_var, reduced)}
    through = np.where(forward.weights > 0, 2 * d_var * centered + d_mean, 0)
    return {**gradients, "x": gradients["x"] + forward.weights / forward.divisor * through}


def sizes(dy, x, scale=None, bias=None, *, axis=-1, eps=1e-5, mask=None, **_):
    """How large the terms of each result are, of each feature, along x; and the slope.

    What is rounded before it cancels is off by as much, times the precision.
    """
    forward = _forward(x, scale, bias, axis, eps, mask, None, None, None)
    reduced, weights, x_hat = forward.reduced, forward.weights, forward.x_hat
    x, dy = np.asarray(x, x_hat.dtype), np.asarray(dy, x_hat.dtype)

    def largest(values):
        return np.abs(values).max(reduced, keepdims=True)

    def total(values):
        return np.abs(values).sum(reduced, keepdims=True)

    share = weights / forward.divisor
    slope = np.abs(forward.scale) / np.sqrt(forward.var + eps)
    shared = largest(share) * total(dy) + largest(share * x_hat) * total(dy * x_hat)
    bias = 0 if bias is None else np.abs(bias).reshape(slope.shape)
    return {
        "y": largest(x_hat * forward.scale) + bias,
        "count": forward.count,
        "mean": largest(np.where(weights > 0, x, 0)),
        "var": forward.var,
        "x": slope * (largest(dy) + shared),
        "scale": total(dy * x_hat),
        "bias": total(dy),
        "slope": slope,
    }
