"""What each program of a kernel is given, from the shape alone: the same on every device.

A tile has ROWS · COLUMNS elements, powers of two; of x as [outer, channels, inner] in memory, a row
is one `outer`, of channels · inner columns.
"""

from functools import lru_cache
from typing import NamedTuple

TILE = 2048  # elements that are summed or written at a time
SCALAR_TILE = 1024  # where each is loaded by itself
# That share a tile. More elements a thread, with several coefficients each, would leave registers.
SUMMING_THREADS, WRITING_THREADS = 128, 256
# Of one tile through all stages, in registers: a channel's runs, or rows of 16 channels or more;
# with weights half of it.
WHOLE_RUNS, WHOLE_ROWS = 16_384, 8192
LEAST_CHANNELS = 16
MERGED = 256  # sets that are merged at a time, of as many channels as that gives
# Tiles that one program sums: kernels/__init__.py says why not more.
MOST_TILES = 32
# Programs to aim at. Those that sum leave numbers behind for each column, so there are fewer.
SUMMING, WRITING = 512, 2048
LONG = 32  # runs from which on a program sums those of one channel
VECTOR_BYTES = 16


class Shape(NamedTuple):
    outer: int
    channels: int
    inner: int

    @property
    def width(self) -> int:
        return self.channels * self.inner


class Whole(NamedTuple):
    """A channel, or a block of them, in one program."""

    programs: int
    runs: bool
    rows: int
    columns: int

    @property
    def threads(self) -> int:
        return max(32, min(512, self.rows * self.columns // 16))


class Sums(NamedTuple):
    programs: int
    runs: bool
    rows: int
    columns: int
    blocks: int
    splits: int
    rows_each: int
    columns_each: int
    column_splits: int
    threads: int = SUMMING_THREADS

    @property
    def cut(self) -> tuple[int, int, int]:
        return self.rows_each, self.columns_each, self.column_splits


class Writes(NamedTuple):
    programs: int
    rows: int
    columns: int
    blocks: int
    rows_each: int
    runs: bool = False
    threads: int = WRITING_THREADS


class Merge(NamedTuple):
    programs: int
    channels: int
    sets: int


def power_of_two(number: int) -> int:
    """The next, from `number` up."""
    return 1 << max(0, number - 1).bit_length()


def divided_up(a: int, b: int) -> int:
    return -(-a // b)


def vector(length: int, itemsize: int) -> int:
    """How many neighbours, a power of two that divides `length`, are loaded at once."""
    return min(VECTOR_BYTES // itemsize, length & -length)


def is_wide(shape: Shape, rows: int) -> bool:
    """Whether offsets, those of a tile's rows beyond the last too, need 64 bits."""
    return (shape.outer + rows) * shape.width >= 2**31


@lru_cache(maxsize=1024)
def whole(shape: Shape, is_weighted: bool) -> Whole | None:
    """None where a channel is too large."""
    rows, runs = power_of_two(shape.outer), shape.inner > 1
    most = (WHOLE_RUNS if runs else WHOLE_ROWS) // (1 + is_weighted)
    if runs:
        columns = power_of_two(shape.inner)
    else:
        columns = min(power_of_two(shape.channels), 2 * LEAST_CHANNELS)
        while columns > LEAST_CHANNELS and rows * columns > most:
            columns //= 2
    if rows * columns > most:
        return None
    programs = shape.channels if runs else divided_up(shape.channels, columns)
    return Whole(programs, runs, rows, columns)


@lru_cache(maxsize=1024)
def sums(shape: Shape, itemsize: int, is_weighted: bool) -> Sums:
    runs = shape.inner >= LONG
    length = shape.inner if runs else shape.width
    tile = _elements(length, itemsize)
    if is_weighted:  # one load a thread
        tile = min(tile, SUMMING_THREADS * VECTOR_BYTES // itemsize)
    columns = _columns(length, min(tile, 1024) if runs else 64)
    rows = min(tile // columns, power_of_two(shape.outer))
    blocks = shape.channels if runs else divided_up(shape.width, columns)
    row_tiles = divided_up(shape.outer, rows)
    column_tiles = divided_up(shape.inner, columns) if runs else 1
    each = max(1, min(MOST_TILES, row_tiles * column_tiles * blocks // SUMMING))
    column_tiles_each = divided_up(column_tiles, divided_up(column_tiles, each))
    row_tiles_each = max(1, min(row_tiles, each // column_tiles_each))
    column_splits = divided_up(column_tiles, column_tiles_each)
    splits = divided_up(row_tiles, row_tiles_each) * column_splits
    return Sums(
        *(blocks * splits, runs, rows, columns, blocks, splits),
        *(row_tiles_each * rows, column_tiles_each * columns, column_splits),
    )


@lru_cache(maxsize=1024)
def writes(shape: Shape, itemsize: int) -> Writes:
    tile = _elements(shape.width, itemsize)
    columns = _columns(shape.width, min(tile, 512))
    rows = min(tile // columns, power_of_two(shape.outer))
    blocks = divided_up(shape.width, columns)
    tiles = divided_up(shape.outer, rows)
    each = max(1, min(MOST_TILES, tiles * blocks // WRITING))
    return Writes(divided_up(tiles, each) * blocks, rows, columns, blocks, each * rows)


@lru_cache(maxsize=1024)
def merge(channels: int, sets: int) -> Merge:
    at_once = min(MERGED, power_of_two(sets))
    each = min(MERGED // at_once, power_of_two(channels))
    return Merge(divided_up(channels, each), each, at_once)


def _elements(length: int, itemsize: int) -> int:
    is_scalar = vector(length, itemsize) * itemsize < VECTOR_BYTES
    elements = SCALAR_TILE if is_scalar else TILE
    return elements * 4 // max(4, itemsize)


def _columns(length: int, most: int) -> int:
    """Of a tile: so many that few lie beyond `length`."""
    columns = min(most, power_of_two(length))
    while columns > 32 and divided_up(length, columns) * columns > 1.25 * length:
        columns //= 2
    return columns
