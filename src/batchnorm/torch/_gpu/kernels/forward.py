"""Moments, their merging, and what is normalized by them."""

import triton
import triton.language as tl

from .arithmetic import activate, as_dtype, isfinite, largest_of, or_one, total_of
from .channels import count_batch, load_affine, move_running, store_statistics, store_table
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
def _values_that_count(
    x,
    weights,
    row,
    column,
    row1,
    column1,
    start,
    lanes,
    width,
    inner,
    F: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RUNS: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile, which of its elements count, and their weights, or anything where there are none."""
    offsets, counts = tile_at(
        *(row, width, start + column, lanes, row + tl.arange(0, ROWS) < row1),
        *(column + tl.arange(0, COLUMNS) < column1, VECTOR),
    )
    values = tl.load(x + offsets, mask=counts, other=0.0).to(F)
    w = values
    if WEIGHTS != UNWEIGHTED:
        w = load_weights(
            *(weights, row, row1, column, offsets, counts, inner, F, WEIGHTS, RUNS, ROWS, COLUMNS)
        )
        counts = counts & (w != 0)  # a weight that is NaN makes its feature NaN
    return values, counts, w


@triton.jit
def pivot_of(values, counts, F: tl.constexpr, RUNS: tl.constexpr):
    """The mean of a tile's elements that count, about; of equal ones, their value."""
    one = largest_of(tl.where(counts, values, -float("inf")), RUNS)
    number = total_of(counts.to(F), RUNS)
    one = tl.where(number == 0, 0.0, one)
    return one + total_of(tl.where(counts, values - one[None, :], 0.0), RUNS) / or_one(number)


@triton.jit
def _add_moments(
    values,
    counts,
    w,
    pivot,
    sums,
    unit,
    unit_of_weights,
    WEIGHTS: tl.constexpr,
):
    count, first, second = sums
    t = tl.where(counts, values * unit - pivot[None, :], 0.0)
    if WEIGHTS != UNWEIGHTED:
        w = tl.where(counts, w * unit_of_weights, 0.0)
        count += w
        first += w * t
        second += w * t * t
    else:
        first += t
        second = tl.fma(t, t, second)
    return count, first, second


@triton.jit
def _store_moments(
    place,
    kept,
    unit,  # what x is multiplied by
    unit_of_weights,  # and weights
    F: tl.constexpr,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Those of a program's share, where `kept`; returns where they overflow."""
    x, weights, at, plane, row0, row1, start, column0, column1, lanes, width, inner = place
    values, found, w = _values_that_count(
        *(x, weights, row0, column0, row1, column1, start, lanes, width, inner),
        *(F, WEIGHTS, RUNS, VECTOR, ROWS, COLUMNS),
    )
    values *= unit
    if WEIGHTS != UNWEIGHTED:  # the first value that counts, of half of the lanes at least
        row, column = row0, column0
        if RUNS:
            column += COLUMNS
        else:
            row += ROWS
        inside = (row0 + tl.arange(0, ROWS) < row1)[:, None]
        inside = inside & (column0 + tl.arange(0, COLUMNS) < column1)[None, :]
        lanes_inside = total_of(inside.to(tl.int32), RUNS)
        lanes_found = total_of(found.to(tl.int32), RUNS)
        while (row < row1) & (tl.max((2 * lanes_found < lanes_inside).to(tl.int32)) > 0):
            if column < column1:
                more, counts, w = _values_that_count(
                    *(x, weights, row, column, row1, column1, start, lanes, width, inner),
                    *(F, WEIGHTS, RUNS, VECTOR, ROWS, COLUMNS),
                )
                values = tl.where(found, values, more * unit)
                found = found | counts
                lanes_found = total_of(found.to(tl.int32), RUNS)
            if RUNS:
                column += COLUMNS
                if column >= column1:
                    column = column0
                    row += ROWS
            else:
                row += ROWS
    pivot = pivot_of(values, found, F, RUNS)

    nothing = tl.zeros((ROWS, COLUMNS), F)
    count, first, second = nothing, nothing, nothing
    for row in range(row0, row1, ROWS):
        if RUNS:
            for column in range(column0, column1, COLUMNS):
                values, counts, w = _values_that_count(
                    *(x, weights, row, column, row1, column1, start, lanes, width, inner),
                    *(F, WEIGHTS, RUNS, VECTOR, ROWS, COLUMNS),
                )
                count, first, second = _add_moments(
                    values, counts, w, pivot, (count, first, second), unit, unit_of_weights, WEIGHTS
                )
        else:
            values, counts, w = _values_that_count(
                *(x, weights, row, column0, row1, column1, start, lanes, width, inner),
                *(F, WEIGHTS, RUNS, VECTOR, ROWS, COLUMNS),
            )
            count, first, second = _add_moments(
                values, counts, w, pivot, (count, first, second), unit, unit_of_weights, WEIGHTS
            )

    first, second = total_of(first, RUNS), total_of(second, RUNS)
    overflows = ~isfinite(first + second)
    tl.store(at, pivot, mask=kept)
    tl.store(at + plane, first, mask=kept)
    tl.store(at + 2 * plane, tl.where(unit == 1.0, second, -second), mask=kept)
    if WEIGHTS != UNWEIGHTED:
        count = total_of(count, RUNS)
        overflows = overflows | ~isfinite(count)
        tl.store(at + 3 * plane, tl.where(unit_of_weights == 1.0, count, -count), mask=kept)
    return kept & overflows


@triton.jit(do_not_specialize=INTEGERS)
def moments_kernel(
    x,
    weights,
    partial,  # [3, columns, splits]: pivot, Σ w·t, Σ w·t²; with weights a fourth plane, Σ w
    outer,
    width,
    inner,
    blocks,  # of columns; of channels, of which a program has one (RUNS)
    splits,
    rows_each,  # a multiple of ROWS
    columns_each,  # with RUNS; a multiple of COLUMNS
    column_splits,
    F: tl.constexpr,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr,  # in which no square of x overflows
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = index_of(width, WIDE)
    split, block, row0, row1, start, column0, column1, _, _ = share_of_sums(
        *(outer, width, inner, blocks, rows_each, columns_each, column_splits),
        *(RUNS, WIDE, COLUMNS),
    )
    lanes = lanes_of(width, VECTOR, WIDE, ROWS, COLUMNS)
    at, kept, plane = own_partials(partial, split, block, splits, blocks, width, RUNS, COLUMNS)
    place = (x, weights, at, plane, row0, row1, start, column0, column1, lanes, width, inner)
    overflows = kept
    if WEIGHTS == UNWEIGHTED:
        overflows = _store_moments(
            place, overflows, 1.0, 1.0, F, RUNS, WEIGHTS, VECTOR, ROWS, COLUMNS
        )
        if tl.max(overflows.to(tl.int32), 0) > 0:
            _store_moments(place, overflows, UNIT, 1.0, F, RUNS, WEIGHTS, VECTOR, ROWS, COLUMNS)
    else:
        unit, unit_of_weights = tl.full((), 1.0, F), tl.full((), 1.0, F)
        attempts = 3
        while attempts > 0:
            overflows = _store_moments(
                *(place, overflows, unit, unit_of_weights),
                *(F, RUNS, WEIGHTS, VECTOR, ROWS, COLUMNS),
            )
            attempts = tl.where(tl.max(overflows.to(tl.int32), 0) > 0, attempts - 1, 0)
            unit_of_weights, unit = unit, tl.full((), UNIT, F)


@triton.jit
def _finish_moments(
    statistics,
    table,
    running_mean,
    running_var,
    batches,
    scale,
    bias,
    rate,
    eps,
    channels,
    channel,
    kept,
    count,
    mean,  # in float64, as are the others
    rest,  # what rounding the mean has left out
    var,  # in `unit`
    unit,
    F: tl.constexpr,
):
    """What is made of the moments of whole channels."""
    back = 1.0 / unit
    plain_var = (var * back) * back
    if statistics is not None:
        store_statistics(statistics, channels, channel, kept, count, mean, plain_var)
    if table is not None:
        center = (0.5 * mean).to(F)
        remainder = (0.5 * mean - center.to(tl.float64)) + 0.5 * rest
        # In a large unit eps is nothing, and a variance of 0 needs another divisor.
        inside_root = tl.maximum(
            var + (as_dtype(eps, tl.float64) * unit) * unit, 2.2250738585072014e-308
        )
        inside_root = tl.where(var == var, inside_root, var)  # which tl.maximum may lose
        rho = (2.0 * unit) / tl.sqrt(inside_root)
        inverse_count = tl.where(count == 0, 0.0, 1.0) / or_one(count)
        store_table(
            *(table, channels, channel, kept, center, remainder, rho, inverse_count),
            *(scale, bias, F),
        )
    if running_mean is not None:
        move_running(running_mean, running_var, rate, channel, kept, count, mean, plain_var)
        count_batch(batches)


@triton.jit
def _load_moments(
    partial,
    plane,
    start,
    channel,
    kept,
    sets,
    splits,
    outer,
    inner,
    rows_each,
    columns_each,
    column_splits,
    unit,
    reference,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr,
    SETS: tl.constexpr,
):
    """Count, mean − reference and Σ w·(x − mean)² of SETS sets of each channel, in `unit`."""
    at, inside = partials_of(start, channel, kept, sets, SETS)
    pivot = tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
    first = tl.load(partial + plane + at, mask=inside, other=0.0).to(tl.float64)
    second = tl.load(partial + 2 * plane + at, mask=inside, other=0.0).to(tl.float64)
    back_of_weights = 1.0
    is_in_unit = second < 0
    if WEIGHTS != UNWEIGHTED:
        n = tl.load(partial + 3 * plane + at, mask=inside, other=0.0).to(tl.float64)
        back_of_weights = tl.where(n < 0, 1.0 / UNIT, 1.0).to(tl.float64)
        is_in_unit = is_in_unit | (n < 0)  # then x is, too, though its squares may be 0
        n = tl.abs(n)
    else:
        split = (start + tl.arange(0, SETS)) % splits
        row0 = (split // column_splits).to(tl.int64) * rows_each
        number = tl.minimum(row0 + rows_each, outer) - row0
        if RUNS:
            column0 = (split % column_splits).to(tl.int64) * columns_each
            number *= tl.minimum(column0 + columns_each, inner) - column0
        n = tl.where(inside, number[None, :], 0).to(tl.float64)
    offset = first / or_one(n)
    squares = tl.abs(second) - first * offset
    squares = tl.where(squares < 0, 0.0, squares) * back_of_weights
    factor = unit[:, None] * tl.where(is_in_unit, 1.0 / UNIT, 1.0).to(tl.float64)
    of_set = (pivot * factor - reference[:, None]) + offset * factor
    return n * back_of_weights, of_set, (squares * factor) * factor


@triton.jit(do_not_specialize=INTEGERS)
def merge_moments_kernel(
    partial,  # of moments_kernel
    statistics,  # [3, channels]: count, mean, var, in float64; or None
    table,  # or None, as all that follow up to rate
    running_mean,
    running_var,
    batches,
    scale,
    bias,
    rate: tl.float64,
    eps: tl.float64,
    channels,
    sets,  # of a channel
    splits,
    outer,
    inner,
    rows_each,
    columns_each,
    column_splits,
    F: tl.constexpr,
    RUNS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    SETS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    plane = channels.to(tl.int64) * sets
    # One of the means, from which the others are measured: of equal ones, the mean is exactly that.
    unit = tl.full((CHANNELS,), 1.0, tl.float64)
    reference = tl.zeros((CHANNELS,), tl.float64)
    largest = tl.full((CHANNELS,), -float("inf"), tl.float64)
    for start in range(0, sets, SETS):
        n, of_set, _ = _load_moments(
            *(partial, plane, start, channel, kept, sets, splits, outer, inner),
            *(rows_each, columns_each, column_splits, unit, reference, RUNS, WEIGHTS, UNIT, SETS),
        )
        largest = tl.maximum(largest, tl.max(tl.where(n == 0, -float("inf"), of_set), 1))
    reference = tl.where(isfinite(largest), largest, 0.0)
    if F == tl.float64:  # whose squares can overflow here, too
        in_unit = unit
        for start in range(0, sets, SETS):
            n, of_set, squares = _load_moments(
                *(partial, plane, start, channel, kept, sets, splits, outer, inner),
                *(
                    rows_each,
                    columns_each,
                    column_splits,
                    unit,
                    reference,
                    RUNS,
                    WEIGHTS,
                    UNIT,
                    SETS,
                ),
            )
            is_large = (squares > 1e300) | (tl.abs(of_set) > 1e140)
            is_large = is_large & (n != 0)
            in_unit = tl.where(tl.max(is_large.to(tl.int32), 1) > 0, UNIT, in_unit)
        unit = in_unit
        reference *= unit
    count = tl.zeros((CHANNELS, SETS), tl.float64)
    first = tl.zeros((CHANNELS, SETS), tl.float64)
    for start in range(0, sets, SETS):
        n, of_set, _ = _load_moments(
            *(partial, plane, start, channel, kept, sets, splits, outer, inner),
            *(rows_each, columns_each, column_splits, unit, reference, RUNS, WEIGHTS, UNIT, SETS),
        )
        count += n
        first += tl.where(n == 0, 0.0, n * of_set)
    count = tl.sum(count, 1)
    offset = tl.sum(first, 1) / or_one(count)
    mean = reference + offset
    second = tl.zeros((CHANNELS, SETS), tl.float64)
    for start in range(0, sets, SETS):
        n, of_set, squares = _load_moments(
            *(partial, plane, start, channel, kept, sets, splits, outer, inner),
            *(rows_each, columns_each, column_splits, unit, reference, RUNS, WEIGHTS, UNIT, SETS),
        )
        shift = of_set - offset[:, None]
        second += tl.where(n == 0, 0.0, squares + n * shift * shift)
    var = tl.sum(second, 1) / or_one(count)
    _finish_moments(
        *(statistics, table, running_mean, running_var, batches, scale, bias, rate, eps, channels),
        *(channel, kept, count, mean / unit, ((reference - mean) + offset) / unit, var, unit, F),
    )


@triton.jit(do_not_specialize=INTEGERS)
def coefficients_kernel(
    mean,
    var,
    count,  # or None, for statistics that do not depend on x
    table,
    scale,
    bias,
    eps: tl.float64,
    channels,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A table of statistics from elsewhere: given ones, or those of several processes."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < channels
    of_channel = tl.load(mean + channel, mask=kept, other=0.0).to(tl.float64)
    var_of_channel = tl.load(var + channel, mask=kept, other=1.0).to(tl.float64)
    unit = tl.full((CHANNELS,), 1.0, tl.float64)
    number = unit
    if count is not None:
        number = tl.load(count + channel, mask=kept, other=0.0).to(tl.float64)
    _finish_moments(
        *(None, table, None, None, None, scale, bias, 0.0, eps, channels, channel, kept),
        *(number, of_channel, 0.0, var_of_channel, unit, F),
    )


@triton.jit(do_not_specialize=INTEGERS)
def normalize_kernel(
    x,
    residual,
    table,
    y,
    outer,
    width,
    inner,
    channels,
    blocks,
    rows_each,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_MASKED: tl.constexpr,  # whether what is not finite has no output
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
    for row in range(row0, row1, ROWS):
        rows_inside = row + tl.arange(0, ROWS) < row1
        offsets, inside = tile_at(row, width, start, lanes, rows_inside, inside_row, VECTOR)
        values = tl.load(x + offsets, mask=inside, other=0.0).to(F)
        z = tl.fma(tl.fma(values, 0.5, -center) * first, slope, shift)
        if residual is not None:
            z += tl.load(residual + offsets, mask=inside, other=0.0).to(F)
        z = activate(z, ACTIVATION)
        if IS_MASKED:
            z = tl.where(isfinite(values), z, values - values)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def running_kernel(
    statistics,  # [3, channels]: count, mean, var, in float64
    running_mean,
    running_var,
    batches,  # or None
    skipped,  # counts batches with NaN or infinity, which then change nothing else; or None
    rate: tl.float64,
    channels,
    CHANNELS: tl.constexpr,
):
    """One program, which sees all channels: whether a batch counts at all.

    It has elements in one channel at least and, where `skipped`, is finite in all.
    """
    is_empty = True
    is_finite = True
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        kept = channel < channels
        count = tl.load(statistics + channel, mask=kept, other=0.0)
        mean = tl.load(statistics + channels + channel, mask=kept, other=0.0)
        var = tl.load(statistics + 2 * channels + channel, mask=kept, other=0.0)
        is_empty = is_empty & (tl.max((count > 0).to(tl.int32), 0) == 0)
        finite = isfinite(count) & isfinite(mean) & isfinite(var)
        is_finite = is_finite & (tl.min(finite.to(tl.int32), 0) == 1)
    moves = True
    if skipped is not None:
        moves = is_finite
        if not is_finite:
            tl.store(skipped, tl.load(skipped) + 1)
    if moves:
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            kept = channel < channels
            count = tl.load(statistics + channel, mask=kept, other=0.0)
            mean = tl.load(statistics + channels + channel, mask=kept, other=0.0)
            var = tl.load(statistics + 2 * channels + channel, mask=kept, other=0.0)
            move_running(running_mean, running_var, rate, channel, kept, count, mean, var)
        if batches is not None and not is_empty:
            tl.store(batches, tl.load(batches) + 1)
