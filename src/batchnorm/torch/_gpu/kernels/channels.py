"""What is loaded and stored once a channel: the table, statistics, running statistics."""

import triton
import triton.language as tl

from .arithmetic import as_dtype, isfinite, rounded_for

# Rows of the table, [7, channels] in F, with ρ = 2 / √(var + eps):
CENTER = tl.constexpr(0)  # mean / 2, rounded to F
FIRST = tl.constexpr(1)  # and SLOPE: factors whose product is scale·ρ; 1 and this, unless it
SLOPE = tl.constexpr(2)  # overflows, then scale and ρ
SHIFT = tl.constexpr(3)  # bias − remainder·scale·ρ, where the remainder is mean/2 − center
RHO = tl.constexpr(4)
REMAINDER = tl.constexpr(5)  # remainder·ρ, so that x̂ = u·ρ − this
INVERSE_COUNT = tl.constexpr(6)
TABLE_ROWS = 7


@triton.jit
def load_row(table, ROW: tl.constexpr, channels, channel, kept):
    return tl.load(table + ROW * channels + channel, mask=kept, other=0.0)


@triton.jit
def load_affine(table, channels, channel, kept):
    """What makes u and z of a tile's columns: center, first, slope and shift."""
    center = load_row(table, CENTER, channels, channel, kept)
    first = load_row(table, FIRST, channels, channel, kept)
    slope = load_row(table, SLOPE, channels, channel, kept)
    shift = load_row(table, SHIFT, channels, channel, kept)
    return center[None, :], first[None, :], slope[None, :], shift[None, :]


@triton.jit
def _load_parameter(parameter, channel, kept, absent, dtype: tl.constexpr):
    """scale or bias, where there is one."""
    if parameter is None:
        value = tl.zeros(channel.shape, dtype) + absent
    else:
        value = tl.load(parameter + channel, mask=kept, other=0.0).to(dtype)
    return value


@triton.jit
def store_table(
    table,
    channels,
    channel,
    kept,
    center,
    remainder,
    rho,
    inverse_count,  # 0 for a count of 0
    scale,
    bias,
    F: tl.constexpr,
):
    """Of numbers in float64, or in F; returns what makes z of u."""
    first = _load_parameter(scale, channel, kept, 1.0, rho.dtype)
    slope = rho * first
    fits = isfinite(slope.to(F))
    first, slope = tl.where(fits, 1.0, first), tl.where(fits, slope, rho)
    shift = _load_parameter(bias, channel, kept, 0.0, rho.dtype) - (remainder * first) * slope
    tl.store(table + CENTER * channels + channel, center.to(F), mask=kept)
    tl.store(table + FIRST * channels + channel, first.to(F), mask=kept)
    tl.store(table + SLOPE * channels + channel, slope.to(F), mask=kept)
    tl.store(table + SHIFT * channels + channel, shift.to(F), mask=kept)
    tl.store(table + RHO * channels + channel, rho.to(F), mask=kept)
    tl.store(table + REMAINDER * channels + channel, (remainder * rho).to(F), mask=kept)
    tl.store(table + INVERSE_COUNT * channels + channel, inverse_count.to(F), mask=kept)
    return first, slope, shift


@triton.jit
def store_statistics(statistics, channels, channel, kept, count, mean, var):
    tl.store(statistics + channel, count, mask=kept)
    tl.store(statistics + channels + channel, mean, mask=kept)
    tl.store(statistics + 2 * channels + channel, var, mask=kept)


@triton.jit
def move_running(running_mean, running_var, rate, channel, kept, count, mean, var):
    """Towards the batch's, the variance with correction 1; in the dtype of `mean`."""
    rate = as_dtype(rate, mean.dtype)
    kept = kept & (count > 1)
    old_mean = tl.load(running_mean + channel, mask=kept, other=0.0).to(mean.dtype)
    old_var = tl.load(running_var + channel, mask=kept, other=0.0).to(mean.dtype)
    unbiased = var * (count / tl.where(count > 1, count - 1.0, 1.0))
    new_mean = (1.0 - rate) * old_mean + rate * mean
    new_var = (1.0 - rate) * old_var + rate * unbiased
    tl.store(running_mean + channel, rounded_for(new_mean, running_mean), mask=kept)
    tl.store(running_var + channel, rounded_for(new_var, running_var), mask=kept)


@triton.jit
def count_batch(batches):
    if batches is not None and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def store_parameter_gradients(dscale, dbias, channel, kept, sum_g, sum_g_x_hat):
    if dscale is not None:
        tl.store(dscale + channel, rounded_for(sum_g_x_hat, dscale), mask=kept)
    if dbias is not None:
        tl.store(dbias + channel, rounded_for(sum_g, dbias), mask=kept)
