"""How a tensor lies in memory: as [outer, channels, inner], as csrc/stages/layout.h has it."""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from ...layout import Axes, feature_shape
from .tiles import Shape


class Layout(NamedTuple):
    """`order`: the axes longer than 1, as they lie in memory, the outermost first."""

    shape: Shape
    order: Axes
    feature_shape: tuple[int, ...]


def are_neighbours(features: Axes, sizes: tuple[int, ...]) -> bool:
    """Whether the features lie side by side in contiguous memory."""
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    places = [place for place, axis in enumerate(axes) if axis in features]
    if features[-1] >= len(sizes):  # of a tensor that has changed
        return False
    return not places or places[-1] - places[0] == len(places) - 1


@lru_cache(maxsize=4096)
def layout_of(sizes: tuple[int, ...], strides: tuple[int, ...], features: Axes) -> Layout | None:
    """None where elements are apart or shared, or features do not lie side by side in order."""
    if features[-1] >= len(sizes):  # of a tensor that has changed
        return None
    order = tuple(sorted((i for i, n in enumerate(sizes) if n > 1), key=lambda i: -strides[i]))
    step = 1
    for axis in reversed(order):
        if strides[axis] != step:
            return None
        step *= sizes[axis]
    by_feature = feature_shape(features, sizes)
    places = [place for place, axis in enumerate(order) if axis in features]
    if not places:  # a single feature
        return Layout(Shape(1, 1, step), order, by_feature)
    first, last = places[0], places[-1] + 1
    if list(order[first:last]) != [axis for axis in features if sizes[axis] > 1]:
        return None
    outer, channels, inner = (
        prod(sizes[axis] for axis in axes)
        for axes in (order[:first], order[first:last], order[last:])
    )
    return Layout(Shape(outer, channels, inner), order, by_feature)
