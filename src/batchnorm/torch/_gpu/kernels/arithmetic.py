"""Numbers: what kernels compute of them that the language has not, or has otherwise."""

import triton
import triton.language as tl

NONE, RELU, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def isfinite(value):
    return (value - value) == 0.0


@triton.jit
def or_one(count):
    return tl.where(count == 0, 1.0, count)


@triton.jit
def as_dtype(number, F: tl.constexpr):
    """A number that came as an argument, which in the interpreter is Python's and has no dtype."""
    return (tl.full((1,), 0.0, tl.float64) + number).to(F)


@triton.jit
def rounded_for(value, to):
    """A value in the dtype of what `to` points at, from float64 by way of float32."""
    if to.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(to.dtype.element_ty)


@triton.jit
def total_of(values, RUNS: tl.constexpr):
    """Over a tile, [1], or over its rows, one for each column."""
    if RUNS:
        total = tl.sum(values) + tl.zeros((1,), values.dtype)
    else:
        total = tl.sum(values, 0)
    return total


@triton.jit
def largest_of(values, RUNS: tl.constexpr):
    if RUNS:
        largest = tl.max(values) + tl.zeros((1,), values.dtype)
    else:
        largest = tl.max(values, 0)
    return largest


@triton.jit
def reciprocal_root(value, F: tl.constexpr):
    """1 / √value; in float32 the device's estimate and a step of Newton, about an ulp."""
    if F == tl.float64:
        root = 1.0 / tl.sqrt(value)
    else:
        root = tl.rsqrt(value)
        root = tl.fma(0.5 * root, tl.fma(-value * root, root, 1.0), root)
    return root


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """By tl.where, as tl.maximum loses a NaN where it is compiled."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    if ACTIVATION == SILU:
        z = tl.where(z < -87.0, -87.0, z)  # where silu is as good as 0, and e^-z still finite
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """dy · act′(z)"""
    if ACTIVATION == RELU:
        dy = tl.where(z <= 0, 0.0, dy)
    if ACTIVATION == SILU:
        z = tl.where(z < -87.0, -87.0, z)
        z = tl.where(z > 87.0, 87.0, z)
        e = tl.exp(-z)
        sigmoid = 1.0 / (1.0 + e)
        dy = dy * (sigmoid * (1.0 + z * (e * sigmoid)))
    return dy
