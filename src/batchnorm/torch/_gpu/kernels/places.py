"""Where in memory a program reads and writes: rows, columns, tiles, partial sums."""

import triton
import triton.language as tl

# What weights are: none; [outer], where inner is 1; [outer, inner]; [outer, channels, inner].
UNWEIGHTED, BY_ROW = tl.constexpr(0), tl.constexpr(1)
BY_ROW_AND_PLACE, BY_ELEMENT = tl.constexpr(2), tl.constexpr(3)

# Of these no value is worth a compilation of its own, such as 1 or the multiples of 16.
INTEGERS = [
    *("outer", "channels", "blocks", "splits", "rows_each", "columns_each", "column_splits"),
    "sets",
]


@triton.jit
def index_of(number, WIDE: tl.constexpr):
    """What offsets are products of; in the interpreter, a loop's variable has no dtype."""
    return tl.full((), 0, tl.int64 if WIDE else tl.int32) + number


@triton.jit
def lanes_of(
    width, VECTOR: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Offsets of a tile's elements from its first."""
    rows = tl.arange(0, ROWS).to(tl.int64 if WIDE else tl.int32)
    lanes = rows[:, None] * width + tl.arange(0, COLUMNS)[None, :]
    return tl.max_contiguous(tl.multiple_of(lanes, (1, VECTOR)), (1, VECTOR))


@triton.jit
def tile_at(row, width, first, lanes, rows_inside, columns_inside, VECTOR: tl.constexpr):
    """Offsets of the tile that begins at `row` and at `first` in it, and which are inside.

    With what the compiler may rely on: groups of VECTOR elements. For AMD it has to be said of each
    part of a sum.
    """
    start = tl.multiple_of(row * width + first, VECTOR)
    offsets = tl.max_contiguous(tl.multiple_of(start + lanes, (1, VECTOR)), (1, VECTOR))
    inside = rows_inside[:, None] & columns_inside[None, :]
    return offsets, tl.max_constancy(inside, (1, VECTOR))


@triton.jit
def load_weights(
    weights,
    row,
    row1,
    column,
    offsets,
    inside,
    inner,
    F: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Those of a tile, NaN where they are negative; `column` is that in the run (RUNS) or row."""
    rows = row + tl.arange(0, ROWS)
    if WEIGHTS == BY_ROW:
        w = tl.load(weights + rows, mask=rows < row1, other=0).to(F)
        w = tl.where(inside, w[:, None], 0.0)
    else:
        if WEIGHTS == BY_ROW_AND_PLACE:
            columns = column + tl.arange(0, COLUMNS)
            if not RUNS:
                columns = columns % inner
            offsets = rows[:, None] * inner + columns[None, :]
        w = tl.load(weights + offsets, mask=inside, other=0).to(F)
    return tl.where(w < 0, float("nan"), w)


@triton.jit
def share_of_sums(
    outer,
    width,
    inner,
    blocks,
    rows_each,
    columns_each,
    column_splits,
    RUNS: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What a program sums: rows row0 … row1; of these, from `start` on, columns column0 … column1.

    With RUNS that is a part of one channel's runs, else a block of columns.
    """
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row0 = (split // column_splits).to(INT) * rows_each
    row1 = tl.minimum(row0 + rows_each, outer)
    if RUNS:
        start = block.to(INT) * inner
        column0 = (split % column_splits).to(INT) * columns_each
        column1 = tl.minimum(column0 + columns_each, inner)
        channel = block + tl.arange(0, 1)
        is_channel = channel >= 0
    else:
        start = tl.full((), 0, INT)
        column0 = block.to(INT) * COLUMNS
        column1 = tl.minimum(column0 + COLUMNS, width)
        columns = column0 + tl.arange(0, COLUMNS)
        channel = columns // inner
        is_channel = columns < width
    return split, block, row0, row1, start, column0, column1, channel, is_channel


@triton.jit
def own_partials(
    partial, split, block, splits, blocks, width, RUNS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Where they go, [plane, column, split]: those of a channel lie side by side."""
    if RUNS:
        column = block + tl.arange(0, 1)
        columns = blocks
    else:
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        columns = width
    at = partial + (column.to(tl.int64) * splits + split)
    return at, column < columns, splits.to(tl.int64) * columns


@triton.jit
def partials_of(start, channel, kept, sets, SETS: tl.constexpr):
    """Where SETS sets of each channel are, from `start` on: [channels, sets]."""
    each = start + tl.arange(0, SETS)
    at = channel.to(tl.int64)[:, None] * sets + each[None, :]
    return at, kept[:, None] & (each < sets)[None, :]


@triton.jit
def share_of_writes(
    outer,
    width,
    blocks,
    rows_each,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What a program writes. The last come first: sums have left them in the cache."""
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start = (program % blocks).to(INT) * COLUMNS
    row0 = (program // blocks).to(INT) * rows_each
    return row0, tl.minimum(row0 + rows_each, outer), start, start + tl.arange(0, COLUMNS)


@triton.jit
def whole_channels(
    outer,
    width,
    inner,
    RUNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One channel (RUNS), or a block of them where inner is 1, as one tile."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    if RUNS:
        start = program.to(tl.int64 if WIDE else tl.int32) * inner
        channel = program + tl.arange(0, 1)
        kept = channel >= 0
        columns_inside = columns < inner
    else:
        start = program.to(tl.int64 if WIDE else tl.int32) * COLUMNS
        channel = program * COLUMNS + columns
        kept = channel < width
        columns_inside = kept
    lanes = lanes_of(width, VECTOR, WIDE, ROWS, COLUMNS)
    offsets, inside = tile_at(
        0, width, start, lanes, tl.arange(0, ROWS) < outer, columns_inside, VECTOR
    )
    return channel, kept, offsets, inside
