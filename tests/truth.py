"""The truth that tests compare with: batch normalization by plain formulas in float64.

Nothing here comes from the package. Gradients are by the chain rule, written out in another order
than in the package: through x̂, var and mean one after the other, as in Ioffe & Szegedy (2015).
"""

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    y: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def _forward(x, scale, bias, axis, eps, mask, residual):
    x = np.asarray(x, np.float64)
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    features = sorted(each % x.ndim for each in axes)
    reduced = tuple(each for each in range(x.ndim) if each not in features)
    weights = np.ones(x.shape)
    if mask is not None:
        weights = np.broadcast_to(np.asarray(mask, np.float64), x.shape)
    inside = np.where(weights > 0, x, 0.0)
    count = weights.sum(reduced, keepdims=True)
    divisor = np.where(count > 0, count, 1)
    mean = (weights * inside).sum(reduced, keepdims=True) / divisor
    centered = np.where(weights > 0, x - mean, 0.0)
    mean = mean + (weights * centered).sum(reduced, keepdims=True) / divisor
    centered = np.where(weights > 0, x - mean, 0.0)
    var = (weights * centered**2).sum(reduced, keepdims=True) / divisor
    shape = [x.shape[each] if each in features else 1 for each in range(x.ndim)]
    scale = np.ones(shape) if scale is None else np.asarray(scale, np.float64).reshape(shape)
    bias = np.zeros(shape) if bias is None else np.asarray(bias, np.float64).reshape(shape)
    x_hat = (x - mean) / np.sqrt(var + eps)
    z = x_hat * scale + bias + (0 if residual is None else np.asarray(residual, np.float64))
    return x, reduced, weights, count, divisor, mean, var, scale, x_hat, z


def _sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def batch_norm(
    x, scale=None, bias=None, *, axis=-1, eps=1e-5, mask=None, residual=None, activation=None
):
    x, reduced, _, count, _, mean, var, _, _, z = _forward(
        x, scale, bias, axis, eps, mask, residual
    )
    y = {None: lambda: z, "relu": lambda: np.maximum(z, 0), "silu": lambda: z * _sigmoid(z)}
    squeezed = (np.squeeze(each, reduced) for each in (count, mean, var))
    return Truth(y[activation](), *squeezed)


def batch_norm_gradients(
    dy, x, scale=None, bias=None, *, axis=-1, eps=1e-5, mask=None, residual=None, activation=None
):
    """Gradients of sum(y * dy), by the name of the argument; residual of the shape of x."""
    x, reduced, weights, _, divisor, mean, var, scale, x_hat, z = _forward(
        x, scale, bias, axis, eps, mask, residual
    )
    sigmoid = _sigmoid(z)
    slope = {
        None: 1.0,
        "relu": z > 0,
        "silu": sigmoid + z * sigmoid * (1 - sigmoid),
    }
    g = np.asarray(dy, np.float64) * slope[activation]
    d_x_hat = g * scale
    centered = x - mean
    rstd = 1 / np.sqrt(var + eps)
    d_var = (d_x_hat * centered).sum(reduced, keepdims=True) * -0.5 * rstd**3
    d_mean = -(d_x_hat * rstd).sum(reduced, keepdims=True)
    d_x = d_x_hat * rstd + weights / divisor * (2 * d_var * centered + d_mean)
    return {
        "x": d_x,
        "scale": np.squeeze((g * x_hat).sum(reduced, keepdims=True), reduced),
        "bias": np.squeeze(g.sum(reduced, keepdims=True), reduced),
        "residual": g,
    }
