"""Sums of many elements that are accurate where a framework's own are running sums.

XLA, MLX and NumPy add the elements of an array one after the other, which can be off by as many
roundings. Summing axis by axis, and a long axis in blocks, then the blocks' sums, keeps that to the
sum of the lengths of the sums. Nothing is cut out of a reduced axis, which may be split over
devices; one that no blocks fit is filled up with zeros, a copy. An axis whose size is no int (of a
program for any batch) is summed at once.

PyTorch's compiler would make a program for each size that is looked at. Its sums can be in double,
at the speed of memory, and are, where the device has it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .arrays import Array, namespace
from .layout import Axes, is_empty

# A sum of up to _SHORT elements is taken at once, a longer one in blocks of up to as many, which
# are to have at least _BLOCK elements, and have at least _LEAST.
_SHORT, _BLOCK, _LEAST = 1024, 256, 32


AddUp = Callable[[Sequence[Array], Axes], Sequence[Array]]


def one_by_one(arrays: Sequence[Array], axes: Axes) -> Sequence[Array]:
    """The sum of each array over `axes`, which stay with length 1."""
    xp = namespace(arrays[0])
    return [xp.sum(x, axis=axes, keepdims=True) for x in arrays]


def total(x: Array, axes: Axes, at_once: bool = False) -> Array:
    """Σ x over `axes`, which stay with length 1; over none, x. `at_once`, for axes of any size."""
    return totals([x], axes, at_once)[0]


def totals(
    arrays: Sequence[Array], axes: Axes, at_once: bool = False, add_up: AddUp = one_by_one
) -> Sequence[Array]:
    """The totals of arrays of one shape; by the framework's own sums, or by another `add_up`."""
    if not axes:
        return arrays
    x = arrays[0]
    xp = namespace(x)
    if at_once:
        return add_up(arrays, axes)
    if is_empty(x):  # MLX 0.32 can hang in a sum of nothing
        shape = tuple([1 if axis in axes else size for axis, size in enumerate(x.shape)])
        return [xp.zeros(shape, dtype=x.dtype) for x in arrays]
    if xp.__name__.endswith("torch"):
        wide = None if x.device.type == "mps" else xp.float64
        sums = [xp.sum(x, axis=axes, keepdims=True, dtype=wide) for x in arrays]
        return [xp.astype(each, x.dtype) for each in sums]
    if not _is_long(math.prod([x.shape[axis] for axis in axes])):
        return add_up(arrays, axes)
    for axis in reversed(axes):
        while _is_long(arrays[0].shape[axis]):
            arrays = _summed_in_blocks(arrays, axis, add_up)
        arrays = add_up(arrays, (axis,))
    return arrays


def _is_long(size: Any) -> bool:
    return isinstance(size, int) and size > _SHORT


def _summed_in_blocks(arrays: Sequence[Array], axis: int, add_up: AddUp) -> Sequence[Array]:
    shape, xp = arrays[0].shape, namespace(arrays[0])
    before, length, after = shape[:axis], shape[axis], shape[axis + 1 :]
    number, block = _blocks(length)

    def in_blocks(x: Array) -> Array:
        if number * block > length:
            padding = xp.zeros((*before, number * block - length, *after), dtype=x.dtype)
            x = xp.concat([x, padding], axis=axis)
        return xp.reshape(x, (*before, number, block, *after))

    sums = add_up(list(map(in_blocks, arrays)), (axis + 1,))
    return [xp.reshape(each, (*before, number, *after)) for each in sums]


def _blocks(length: int) -> tuple[int, int]:
    """How many blocks, and their length: together at least `length`.

    The number keeps as many factors of 2 as it can: XLA then sums an axis that is split over
    devices where it lies.
    """
    odd = length
    while odd % 2 == 0:
        odd //= 2
    block = odd
    if odd > _SHORT:
        block = next(divisor for divisor in range(_SHORT - 1, 0, -2) if odd % divisor == 0)
    while block < _BLOCK and length % (2 * block) == 0:
        block *= 2
    if block >= _LEAST:
        return length // block, block
    number = 1
    while length >= 2 * number * _BLOCK:
        number *= 2
    return number, -(-length // number)
