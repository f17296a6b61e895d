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
from typing import Any

from .arrays import Array, namespace
from .layout import Axes, is_empty

# A sum of up to _SHORT elements is taken at once, a longer one in blocks of up to as many, which
# are to have at least _BLOCK elements, and have at least _LEAST.
_SHORT, _BLOCK, _LEAST = 1024, 256, 32


def total(x: Array, axes: Axes, at_once: bool = False) -> Array:
    """Σ x over `axes`, which stay with length 1; over none, x. `at_once`, for axes of any size."""
    if not axes:
        return x
    xp = namespace(x)
    if at_once:
        return xp.sum(x, axis=axes, keepdims=True)
    if is_empty(x):  # MLX 0.32 can hang in a sum of nothing
        shape = tuple([1 if axis in axes else size for axis, size in enumerate(x.shape)])
        return xp.zeros(shape, dtype=x.dtype)
    if xp.__name__.endswith("torch"):
        wide = None if x.device.type == "mps" else xp.float64
        return xp.astype(xp.sum(x, axis=axes, keepdims=True, dtype=wide), x.dtype)
    if not _is_long(math.prod([x.shape[axis] for axis in axes])):
        return xp.sum(x, axis=axes, keepdims=True)
    for axis in reversed(axes):
        while _is_long(x.shape[axis]):
            x = _summed_in_blocks(xp, x, axis)
        x = xp.sum(x, axis=axis, keepdims=True)
    return x


def _is_long(size: Any) -> bool:
    return isinstance(size, int) and size > _SHORT


def _summed_in_blocks(xp: Any, x: Array, axis: int) -> Array:
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    number, block = _blocks(length)
    if number * block > length:
        padding = xp.zeros((*before, number * block - length, *after), dtype=x.dtype)
        x = xp.concat([x, padding], axis=axis)
    return xp.sum(xp.reshape(x, (*before, number, block, *after)), axis=axis + 1)


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
