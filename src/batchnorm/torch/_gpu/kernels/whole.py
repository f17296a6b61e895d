"""Each way in one kernel, where all of a channel fits one program."""

import triton
import triton.language as tl

from .arithmetic import activate, as_dtype, isfinite, or_one, reciprocal_root, total_of
from .backward import enlarged_of, g_and_u, input_gradient_of, reduced_of
from .channels import (
    INVERSE_COUNT,
    REMAINDER,
    RHO,
    count_batch,
    load_affine,
    load_row,
    move_running,
    store_parameter_gradients,
    store_statistics,
    store_table,
)
from .forward import pivot_of
from .places import INTEGERS, UNWEIGHTED, index_of, load_weights, whole_channels


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    x,
    residual,
    weights,
    scale,
    bias,
    y,
    statistics,  # [3, channels]: count, mean, var, in float64; or None
    table,
    running_mean,  # or None, as the next two
    running_var,
    batches,
    rate: tl.float64,
    eps: tl.float64,
    outer,
    width,
    inner,
    channels,
    F: tl.constexpr,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x is read once, and stays in registers."""
    width = index_of(width, WIDE)
    channel, kept, offsets, inside = whole_channels(
        outer, width, inner, RUNS, VECTOR, WIDE, ROWS, COLUMNS
    )
    values = tl.load(x + offsets, mask=inside, other=0.0).to(F)
    counts, w = inside, inside.to(F)
    if WEIGHTS != UNWEIGHTED:
        w = load_weights(
            *(weights, 0, outer, 0, offsets, inside, inner, F, WEIGHTS, RUNS, ROWS, COLUMNS)
        )
        counts = inside & (w != 0)
        w = tl.where(counts, w, 0.0)
    count = total_of(w, RUNS)
    back_of_weights = tl.full(count.shape, 1.0, F)
    if WEIGHTS != UNWEIGHTED:  # whose sum may be out of range
        overflows = ~isfinite(count)
        w *= tl.where(overflows, UNIT, 1.0).to(F)[None, :]
        back_of_weights = tl.where(overflows, 1.0 / UNIT, 1.0).to(F)
        count = total_of(w, RUNS)
    inverse_count = tl.where(count == 0, 0.0, 1.0) / or_one(count)
    share = w * inverse_count[None, :]
    mean = pivot_of(values, counts, F, RUNS)
    t = tl.where(counts, values - mean[None, :], 0.0)
    offset = total_of(t * share, RUNS)
    var = total_of(t * t * share, RUNS) - offset * offset
    unit = tl.full(var.shape, 1.0, F)
    back = unit
    overflows = kept & ~isfinite(var)
    if tl.max(overflows.to(tl.int32), 0) > 0:
        unit = tl.where(overflows, UNIT, 1.0).to(F)
        back = tl.where(overflows, 1.0 / UNIT, 1.0).to(F)
        small = pivot_of(values * unit[None, :], counts, F, RUNS)
        t = tl.where(counts, values * unit[None, :] - small[None, :], 0.0)
        mean = small * back
        offset = total_of(t * share, RUNS)
        var = total_of(t * t * share, RUNS) - offset * offset
        offset *= back
    var = tl.where(var < 0, 0.0, var)
    center = 0.5 * mean
    remainder = 0.5 * offset
    rho = (2.0 * unit) * reciprocal_root(var + (as_dtype(eps, F) * unit) * unit, F)
    first, slope, shift = store_table(
        *(table, channels, channel, kept, center, remainder, rho),
        *(inverse_count / back_of_weights, scale, bias, F),
    )
    if statistics is not None:
        wide_mean = mean.to(tl.float64) + offset.to(tl.float64)
        wide_var = (var.to(tl.float64) * back) * back
        wide_count = count.to(tl.float64) * back_of_weights
        store_statistics(statistics, channels, channel, kept, wide_count, wide_mean, wide_var)
    if running_mean is not None:
        move_running(
            *(running_mean, running_var, rate, channel, kept, count * back_of_weights),
            *(mean + offset, (var * back) * back),
        )
        count_batch(batches)
    u = tl.fma(values, 0.5, -center[None, :])
    z = tl.fma(u * first[None, :], slope[None, :], shift[None, :])
    if residual is not None:
        z += tl.load(residual + offsets, mask=inside, other=0.0).to(F)
    z = activate(z, ACTIVATION)
    if WEIGHTS != UNWEIGHTED:
        z = tl.where(isfinite(values), z, values - values)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def backward_kernel(
    x,
    dy,
    residual,
    weights,
    table,
    dx,
    dresidual,
    dscale,
    dbias,
    outer,
    width,
    inner,
    channels,
    F: tl.constexpr,
    OF_BATCH: tl.constexpr,  # whether the statistics depend on x
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x and dy are read once."""
    width = index_of(width, WIDE)
    channel, kept, offsets, inside = whole_channels(
        outer, width, inner, RUNS, VECTOR, WIDE, ROWS, COLUMNS
    )
    center, first, slope, shift = load_affine(table, channels, channel, kept)
    rho = load_row(table, RHO, channels, channel, kept)
    remainder = load_row(table, REMAINDER, channels, channel, kept)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(F)
    g = tl.load(dy + offsets, mask=inside, other=0.0).to(F)
    w = values
    if WEIGHTS != UNWEIGHTED:
        w = load_weights(
            *(weights, 0, outer, 0, offsets, inside, inner, F, WEIGHTS, RUNS, ROWS, COLUMNS)
        )
    g, u = g_and_u(
        *(
            values,
            g,
            residual,
            offsets,
            inside,
            center,
            first,
            slope,
            shift,
            w,
            F,
            WEIGHTS,
            ACTIVATION,
        )
    )
    sum_g = total_of(g, RUNS)
    sum_g_x_hat = (
        total_of(g * (u * reduced_of(rho)[None, :]), RUNS) * enlarged_of(rho) - remainder * sum_g
    )
    store_parameter_gradients(dscale, dbias, channel, kept, sum_g, sum_g_x_hat)
    inverse_count = load_row(table, INVERSE_COUNT, channels, channel, kept)
    share, share_of_x_hat = sum_g[None, :], sum_g_x_hat[None, :]
    if WEIGHTS == UNWEIGHTED:
        share *= inverse_count[None, :]
        share_of_x_hat *= inverse_count[None, :]
    coefficients = (first, slope, rho[None, :], remainder[None, :], inverse_count[None, :])
    d = input_gradient_of(g, u, w, coefficients, (share, share_of_x_hat), OF_BATCH, False, WEIGHTS)
    tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)
