"""Sums of the gradient, their merging, and the input's gradient."""

import triton
import triton.language as tl

from .arithmetic import NONE, isfinite, through_activation, total_of
from .channels import (
    INVERSE_COUNT,
    REMAINDER,
    RHO,
    load_affine,
    load_row,
    store_parameter_gradients,
)
from .places import (
    INTEGERS,
    UNWEIGHTED,
    index_of,
    lanes_of,
    load_weights,
    own_partials,
    partials_of,
    share_of_sums,
    share_of_writes,
    tile_at,
)


@triton.jit
def g_and_u(
    values,
    dy,
    residual,
    offsets,
    inside,
    center,
    first,
    slope,
    shift,
    w,
    F: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """g = dy·act′(z) and u of a tile, both 0 where an element takes no part."""
    u = tl.fma(values, 0.5, -center)
    if ACTIVATION != NONE:
        z = tl.fma(u * first, slope, shift)
        if residual is not None:
            z += tl.load(residual + offsets, mask=inside, other=0.0).to(F)
        dy = through_activation(dy, z, ACTIVATION)
    if WEIGHTS != UNWEIGHTED:
        inside = inside & ((w > 0) | isfinite(values))
    return tl.where(inside, dy, 0.0), tl.where(inside, u, 0.0)


@triton.jit
def reduced_of(rho):
    """Such that u times this is finite, also where an element that does not count is far away."""
    return tl.where(rho > 1, 1.0, rho)


@triton.jit
def enlarged_of(rho):
    return tl.where(rho > 1, rho, 1.0)


@triton.jit
def _add_gradients(
    x,
    dy,
    residual,
    weights,
    dresidual,
    row,
    column,
    row1,
    column1,
    start,
    lanes,
    width,
    inner,
    coefficients,
    sums,
    F: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RUNS: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    center, first, slope, shift, reduced = coefficients
    sum_g, sum_g_u = sums
    offsets, inside = tile_at(
        *(row, width, start + column, lanes, row + tl.arange(0, ROWS) < row1),
        *(column + tl.arange(0, COLUMNS) < column1, VECTOR),
    )
    values = tl.load(x + offsets, mask=inside, other=0.0).to(F)
    g = tl.load(dy + offsets, mask=inside, other=0.0).to(F)
    w = values
    if WEIGHTS != UNWEIGHTED:
        w = load_weights(
            *(weights, row, row1, column, offsets, inside, inner, F, WEIGHTS, RUNS, ROWS, COLUMNS)
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
    if dresidual is not None:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)
    return sum_g + g, tl.fma(g, u * reduced, sum_g_u)


@triton.jit(do_not_specialize=INTEGERS)
def gradient_sums_kernel(
    x,
    dy,
    residual,
    weights,
    table,
    dresidual,  # g, or None
    partial,  # [2, columns, splits]: Σ g, and Σ g·u·ρ with 1 for a ρ that is larger
    outer,
    width,
    inner,
    channels,
    blocks,
    splits,
    rows_each,
    columns_each,
    column_splits,
    F: tl.constexpr,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = index_of(width, WIDE)
    split, block, row0, row1, start, column0, column1, channel, is_channel = share_of_sums(
        *(outer, width, inner, blocks, rows_each, columns_each, column_splits),
        *(RUNS, WIDE, COLUMNS),
    )
    lanes = lanes_of(width, VECTOR, WIDE, ROWS, COLUMNS)
    center, first, slope, shift = load_affine(table, channels, channel, is_channel)
    rho = load_row(table, RHO, channels, channel, is_channel)[None, :]
    coefficients = (center, first, slope, shift, reduced_of(rho))
    sum_g = tl.zeros((ROWS, COLUMNS), F)
    sum_g_u = tl.zeros((ROWS, COLUMNS), F)
    for row in range(row0, row1, ROWS):
        if RUNS:
            for column in range(column0, column1, COLUMNS):
                sum_g, sum_g_u = _add_gradients(
                    *(x, dy, residual, weights, dresidual, row, column, row1, column1, start),
                    *(lanes, width, inner, coefficients, (sum_g, sum_g_u)),
                    *(F, WEIGHTS, ACTIVATION, RUNS, VECTOR, ROWS, COLUMNS),
                )
        else:
            sum_g, sum_g_u = _add_gradients(
                *(x, dy, residual, weights, dresidual, row, column0, row1, column1, start),
                *(lanes, width, inner, coefficients, (sum_g, sum_g_u)),
                *(F, WEIGHTS, ACTIVATION, RUNS, VECTOR, ROWS, COLUMNS),
            )
    at, kept, plane = own_partials(partial, split, block, splits, blocks, width, RUNS, COLUMNS)
    tl.store(at, total_of(sum_g, RUNS), mask=kept)
    tl.store(at + plane, total_of(sum_g_u, RUNS), mask=kept)


@triton.jit
def _store_shares(
    shares, table, channels, channel, kept, sum_g, sum_g_x_hat, WEIGHTS: tl.constexpr
):
    """The sums / m; with weights the sums, as w / m may be representable where 1 / m is not."""
    if WEIGHTS == UNWEIGHTED:
        inverse_count = load_row(table, INVERSE_COUNT, channels, channel, kept)
        sum_g *= inverse_count
        sum_g_x_hat *= inverse_count
    to = shares + channel
    tl.store(to, sum_g.to(shares.dtype.element_ty), mask=kept)
    tl.store(to + channels, sum_g_x_hat.to(shares.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=INTEGERS)
def merge_sums_kernel(
    partial,  # of gradient_sums_kernel
    table,
    sums,  # [2, channels]: Σ g and Σ g·x̂, in float64; or None
    dscale,
    dbias,
    shares,  # [2, channels] in F, or None
    channels,
    sets,  # of a channel
    WEIGHTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SETS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    plane = channels.to(tl.int64) * sets
    first = tl.zeros((CHANNELS, SETS), tl.float64)
    second = tl.zeros((CHANNELS, SETS), tl.float64)
    for start in range(0, sets, SETS):
        at, inside = partials_of(start, channel, kept, sets, SETS)
        first += tl.load(partial + at, mask=inside, other=0.0)
        second += tl.load(partial + plane + at, mask=inside, other=0.0)
    sum_g = tl.sum(first, 1)
    remainder = load_row(table, REMAINDER, channels, channel, kept)
    enlarged = enlarged_of(load_row(table, RHO, channels, channel, kept))
    sum_g_x_hat = tl.sum(second, 1) * enlarged - remainder * sum_g
    if sums is not None:
        tl.store(sums + channel, sum_g, mask=kept)
        tl.store(sums + channels + channel, sum_g_x_hat, mask=kept)
    store_parameter_gradients(dscale, dbias, channel, kept, sum_g, sum_g_x_hat)
    if shares is not None:
        _store_shares(shares, table, channels, channel, kept, sum_g, sum_g_x_hat, WEIGHTS)


@triton.jit(do_not_specialize=INTEGERS)
def shares_kernel(
    sums,  # [2, channels] in float64, of all processes, each times its own scale
    table,
    shares,
    channels,
    WEIGHTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    sum_g = tl.load(sums + channel, mask=kept, other=0.0)
    sum_g_x_hat = tl.load(sums + channels + channel, mask=kept, other=0.0)
    _store_shares(shares, table, channels, channel, kept, sum_g, sum_g_x_hat, WEIGHTS)


@triton.jit
def input_gradient_of(
    g,
    u,
    w,
    coefficients,
    shares,
    OF_BATCH: tl.constexpr,
    ARE_SCALED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """slope·(g − w·(share + x̂·share of x̂)); where sums are of scale·g, rstd times their share."""
    first, slope, rho, remainder, inverse_count = coefficients
    slope *= 0.5  # of x, where u is half of it
    if OF_BATCH:
        share, share_of_x_hat = shares
        share = tl.fma(tl.fma(u, rho, -remainder), share_of_x_hat, share)
        if WEIGHTS != UNWEIGHTED:
            share = tl.where(w > 0, (w * inverse_count) * share, 0.0)
        if ARE_SCALED:
            dx = (g * first) * slope - (0.5 * rho) * share
        else:
            dx = ((g - share) * first) * slope
    else:
        dx = (g * first) * slope
    return dx


@triton.jit(do_not_specialize=INTEGERS)
def input_gradient_kernel(
    x,
    dy,
    residual,
    weights,
    table,
    shares,  # or None, where the statistics do not depend on x
    dx,
    outer,
    width,
    inner,
    channels,
    blocks,
    rows_each,
    F: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARE_SCALED: tl.constexpr,  # whether the sums are of scale·g
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = index_of(width, WIDE)
    row0, row1, start, columns = share_of_writes(outer, width, blocks, rows_each, WIDE, COLUMNS)
    inside_row = columns < width
    channel = columns // inner
    lanes = lanes_of(width, VECTOR, WIDE, ROWS, COLUMNS)
    center, first, slope, shift = load_affine(table, channels, channel, inside_row)
    rho, remainder, inverse_count, share, share_of_x_hat = center, center, center, center, center
    if shares is not None:
        rho = load_row(table, RHO, channels, channel, inside_row)[None, :]
        remainder = load_row(table, REMAINDER, channels, channel, inside_row)[None, :]
        inverse_count = load_row(table, INVERSE_COUNT, channels, channel, inside_row)[None, :]
        share = load_row(shares, 0, channels, channel, inside_row)[None, :]
        share_of_x_hat = load_row(shares, 1, channels, channel, inside_row)[None, :]
    for row in range(row0, row1, ROWS):
        rows_inside = row + tl.arange(0, ROWS) < row1
        offsets, inside = tile_at(row, width, start, lanes, rows_inside, inside_row, VECTOR)
        values = tl.load(x + offsets, mask=inside, other=0.0).to(F)
        g = tl.load(dy + offsets, mask=inside, other=0.0).to(F)
        w = values
        if WEIGHTS != UNWEIGHTED:
            w = load_weights(
                *(
                    weights,
                    row,
                    row1,
                    start,
                    offsets,
                    inside,
                    inner,
                    F,
                    WEIGHTS,
                    False,
                    ROWS,
                    COLUMNS,
                )
            )
        g, u = g_and_u(
            *(values, g, residual, offsets, inside, center, first, slope, shift, w),
            *(F, WEIGHTS, ACTIVATION),
        )
        d = input_gradient_of(
            *(g, u, w, (first, slope, rho, remainder, inverse_count), (share, share_of_x_hat)),
            *(shares is not None, ARE_SCALED, WEIGHTS),
        )
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
