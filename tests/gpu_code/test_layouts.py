"""How a tensor lies in memory, and what of it each program is given: all of it, and once."""

import itertools
import math

import numpy as np
import pytest
import torch
from gpu_code.cutting import SMALL, cut

from batchnorm.torch._gpu import tiles
from batchnorm.torch._gpu.layout import layout_of
from batchnorm.torch._gpu.tiles import Shape


def lying(tensor: torch.Tensor, *features: int):
    return layout_of(tensor.shape, tensor.stride(), features)


def permuted(sizes: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """Of these sizes, its axes in memory in this order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.empty([sizes[axis] for axis in order]).permute(back)


NCHW, NCDHW = torch.empty(4, 6, 5, 3), torch.empty(2, 3, 4, 5, 6)
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
LYING = {
    "contiguous": (NCHW, (1,), (4, 6, 15), (0, 1, 2, 3)),
    "channels last": (NCHW.to(memory_format=LAST), (1,), (60, 6, 1), (0, 2, 3, 1)),
    "channels last, 3d": (NCDHW.to(memory_format=LAST_3D), (1,), (240, 3, 1), (0, 2, 3, 4, 1)),
    "features last": (torch.empty(7, 5), (1,), (7, 5, 1), (0, 1)),
    "features first": (torch.empty(7, 5), (0,), (1, 7, 5), (0, 1)),
    "transposed": (torch.empty(7, 5).T, (1,), (1, 7, 5), (1, 0)),
    "permuted": (permuted((2, 3, 4, 5), (3, 1, 0, 2)), (1,), (5, 3, 8), (3, 1, 0, 2)),
    "two features": (NCHW, (1, 2), (4, 30, 3), (0, 1, 2, 3)),
    "two features, permuted": (permuted((2, 3, 4), (2, 0, 1)), (0, 1), (4, 6, 1), (2, 0, 1)),
    "all features": (torch.empty(3, 4), (0, 1), (1, 12, 1), (0, 1)),
    "a vector": (torch.empty(5), (0,), (1, 5, 1), (0,)),
    "one channel": (torch.empty(4, 1, 5), (1,), (1, 1, 20), (0, 2)),
    "axes of 1 between": (torch.empty(4, 1, 5, 1), (2,), (4, 5, 1), (0, 2)),
    "axes of 1 with any stride": (
        torch.empty(4, 1, 5).as_strided((4, 1, 5), (5, 77, 1)),
        (2,),
        (4, 5, 1),
        (0, 2),
    ),
    "a feature axis of 1 anywhere": (
        torch.empty(60).as_strided((4, 5, 1, 3), (15, 3, 1000, 1)),
        (1, 2),
        (4, 5, 3),
        (0, 1, 3),
    ),
    "one element": (torch.empty(1, 1), (1,), (1, 1, 1), ()),
    "a slice without gaps": (torch.empty(9, 5)[2:6], (1,), (4, 5, 1), (0, 1)),
}


@pytest.mark.parametrize("name", LYING)
def test_what_kernels_know(name: str):
    tensor, features, shape, order = LYING[name]
    found = lying(tensor, *features)
    assert found.shape == shape
    assert found.order == order
    assert found.feature_shape == tuple(tensor.shape[axis] for axis in features)
    assert math.prod(shape) == tensor.numel()


NOT_KNOWN = {
    "rows with gaps": (torch.empty(4, 7)[:, :5], (1,)),
    "every second": (torch.empty(8, 5)[::2], (1,)),
    "expanded": (torch.empty(1, 5).expand(4, 5), (1,)),
    "expanded over features": (torch.empty(4, 1).expand(4, 5), (1,)),
    "overlapping": (torch.empty(8).as_strided((4, 5), (1, 1)), (1,)),
    "features apart": (NCHW, (1, 3)),
    "features apart in memory": (permuted((2, 3, 4), (0, 2, 1)), (0, 1)),
    "features in another order": (permuted((2, 3, 4), (0, 2, 1)), (1, 2)),
    "fewer axes than features": (torch.empty(6), (1,)),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_kernels_do_not_know(name: str):
    tensor, features = NOT_KNOWN[name]
    assert lying(tensor, *features) is None


def test_every_order_of_axes():
    """An element's place in memory says which channel it is of, or no kernel takes it."""
    sizes, known = (2, 3, 1, 4), 0
    for order in itertools.permutations(range(4)):
        tensor = permuted(sizes, order)
        for features in ((0,), (1,), (2,), (3,), (0, 1), (1, 3), (0, 3), (0, 1, 3)):
            found = lying(tensor, *features)
            if found is None:
                assert len(features) > 1
                continue
            known += 1
            channels = np.arange(math.prod(found.feature_shape)).reshape(found.feature_shape)
            along = [sizes[axis] if axis in features else 1 for axis in range(4)]
            wanted = torch.from_numpy(np.broadcast_to(channels.reshape(along), sizes).copy())
            in_memory = torch.empty_like(tensor, dtype=torch.int64).copy_(wanted)
            in_memory = in_memory.as_strided((tensor.numel(),), (1,)).reshape(found.shape)
            assert (in_memory == torch.arange(found.shape[1])[:, None]).all()
    assert known > 100


# ---- tiles

SHAPES = [
    Shape(*each)
    for each in [
        *((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 7, 1), (1, 1, 5000), (5000, 1, 1), (1, 5000, 1)),
        *((3, 5, 7), (6, 5, 31), (6, 5, 32), (6, 5, 33), (64, 17, 49), (9, 3, 1000), (2, 3, 5000)),
        *((1000, 3, 1), (777, 33, 1), (513, 129, 2), (100, 65, 9), (4097, 16, 1), (8, 64, 784)),
        *((2, 300, 1), (31, 1500, 1), (5, 1, 2047), (257, 8, 40), (3, 2, 12321)),
    ]
]
WAYS = list(itertools.product(({}, SMALL), (2, 4, 8), (False, True)))


def counted(shape: Shape) -> np.ndarray:
    return np.zeros((shape.outer, shape.channels, shape.inner), np.int64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_summed_once(shape: Shape):
    for numbers, itemsize, is_weighted in WAYS:
        with cut(**numbers):
            sums = tiles.sums(shape, itemsize, is_weighted)
            most = tiles.MOST_TILES
        found = counted(shape)
        flat = found.reshape(shape.outer, shape.width)
        assert sums.programs == sums.blocks * sums.splits
        for program in range(sums.programs):
            split, block = divmod(program, sums.blocks)
            row = split // sums.column_splits * sums.rows_each
            rows = slice(row, row + sums.rows_each)
            assert row < shape.outer, "a program without rows"
            if sums.runs:
                column = split % sums.column_splits * sums.columns_each
                assert column < shape.inner, "a program without columns"
                found[rows, block, column : column + sums.columns_each] += 1
            else:
                assert sums.column_splits == 1
                flat[rows, block * sums.columns : (block + 1) * sums.columns] += 1
        assert (found == 1).all()
        assert sums.rows_each % sums.rows == 0
        assert sums.columns_each % sums.columns == 0
        column_tiles = sums.columns_each // sums.columns if sums.runs else 1
        assert sums.rows_each // sums.rows * column_tiles <= most


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_once(shape: Shape):
    for numbers, itemsize, _ in WAYS:
        with cut(**numbers):
            writes = tiles.writes(shape, itemsize)
        found = counted(shape).reshape(shape.outer, shape.width)
        for program in range(writes.programs):
            row = program // writes.blocks * writes.rows_each
            column = program % writes.blocks * writes.columns
            assert row < shape.outer
            assert column < shape.width
            found[row : row + writes.rows_each, column : column + writes.columns] += 1
        assert (found == 1).all()
        assert writes.rows_each % writes.rows == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_channels(shape: Shape):
    for is_weighted in (False, True):
        whole = tiles.whole(shape, is_weighted)
        if whole is None:
            assert shape.outer * shape.inner * 2 ** (is_weighted + 4) > tiles.WHOLE_ROWS
            continue
        found = counted(shape)
        assert whole.rows >= shape.outer
        for program in range(whole.programs):
            if whole.runs:
                assert whole.columns >= shape.inner
                found[:, program] += 1
            else:
                assert shape.inner == 1
                found[:, program * whole.columns : (program + 1) * whole.columns] += 1
        assert (found == 1).all()
        assert whole.rows * whole.columns <= tiles.WHOLE_RUNS


@pytest.mark.parametrize("channels", [1, 2, 3, 64, 255, 256, 257, 5000])
@pytest.mark.parametrize("sets", [1, 2, 17, 256, 257, 9999])
def test_every_channel_is_merged_once(channels: int, sets: int):
    merge = tiles.merge(channels, sets)
    assert (merge.programs - 1) * merge.channels < channels <= merge.programs * merge.channels
    assert merge.channels * merge.sets <= tiles.MERGED


def test_tiles_are_powers_of_two_that_fit_registers():
    for shape, (numbers, itemsize, is_weighted) in itertools.product(SHAPES, WAYS):
        with cut(**numbers):
            found = [tiles.sums(shape, itemsize, is_weighted)]
            found.append(tiles.writes(shape, itemsize))
            most = tiles.TILE
        for each in found:
            for number in (each.rows, each.columns):
                assert number & (number - 1) == 0
            assert each.rows * each.columns * itemsize <= most * max(4, itemsize)


@pytest.mark.parametrize("length", [*range(1, 70), 96, 1000, 4096])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_neighbours_loaded_at_once_divide_a_row(length: int, itemsize: int):
    found = tiles.vector(length, itemsize)
    assert length % found == 0
    assert found * itemsize <= tiles.VECTOR_BYTES
    assert 2 * found * itemsize > tiles.VECTOR_BYTES or length % (2 * found) != 0


# Channels and places of each batch norm of a ResNet-50, and how many of these there are.
RESNET50 = [
    *((64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5)),
    *((256, 28, 1), (256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4)),
]


@pytest.mark.parametrize("channels_last", [True, False])
def test_partial_sums_are_few(channels_last: bool):
    """Forward, in float32, written and read once each: to x of bfloat16, which is read twice."""
    itemsize, batch, x, partial = 2, 128, 0, 0
    for channels, side, times in RESNET50:
        shape = Shape(batch, channels, side**2)
        if channels_last:
            shape = Shape(batch * side**2, channels, 1)
        if tiles.whole(shape, False) is not None:
            continue
        sums = tiles.sums(shape, itemsize, False)
        columns = shape.channels if sums.runs else shape.width
        x += times * math.prod(shape) * itemsize
        partial += times * 3 * columns * sums.splits * 4
    assert 0 < 2 * partial < 0.03 * x


@pytest.mark.parametrize("width", [64, 96, 2**20])
def test_offsets_of_64_bits(width: int):
    """Where an offset, that of a tile's last row beyond the last of x included, is 2³¹ or more."""
    rows = 32
    last = 2**31 // width - rows
    for outer in (last - 1, last, last + 1):
        largest = (outer + rows) * width - 1  # of what a program's lanes may be
        assert tiles.is_wide(Shape(outer, width, 1), rows) == (largest + 1 >= 2**31)
    assert tiles.is_wide(Shape(2**31 // width, width, 1), 1)
