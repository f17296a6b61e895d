"""Feature axes and reduced axes: which values belong together, and the shapes that follow.

`features` is a sorted tuple of non-negative feature axes of x; all its other axes are reduced. A
parameter has the feature shape: the sizes of x along them. Where the elements lie in memory is said
in csrc/stages/layout.h.
"""

from collections.abc import Sequence
from typing import Any

from .arrays import Array, namespace

Axes = tuple[int, ...]
Shape = Sequence[int]


def reduced_axes(features: Axes, ndim: int) -> Axes:
    return tuple([axis for axis in range(ndim) if axis not in features])


def feature_shape(features: Axes, shape: Shape) -> tuple[int, ...]:
    return tuple([shape[axis] for axis in features])


def values_per_feature(features: Axes, shape: Shape) -> Any:
    """How many elements each feature has: an int where the sizes are."""
    values = 1
    for axis, size in enumerate(shape):
        if axis not in features:
            values *= size
    return values


def weights_shape(features: Axes, shape: Shape, x_shape: Shape) -> tuple[int, ...]:
    """Of weights that broadcast to x: of one for each row, or for each element."""
    shape = (1,) * (len(x_shape) - len(shape)) + tuple(shape)
    one_a_row = all(shape[axis] == 1 for axis in features)
    return tuple(
        [1 if one_a_row and axis in features else size for axis, size in enumerate(x_shape)]
    )


def is_empty(x: Array) -> bool:
    """Whether x is known to have no elements; a size that is no int is taken for a positive one."""
    return any(isinstance(size, int) and size == 0 for size in x.shape)


def per_feature(features: Axes, reduced: Array) -> Array:
    """`reduced`, whose reduced axes have length 1, without them."""
    return namespace(reduced).reshape(reduced, feature_shape(features, reduced.shape))


def along(features: Axes, parameter: Array, x: Array) -> Array:
    """`parameter`, of the feature shape, with axes of length 1 where x is reduced.

    In MLX the axes before the first feature axis are left out. Its derivatives always sum over what
    is not there, but over an axis of length 1 only if x was longer when a program was traced.
    """
    xp, sizes = namespace(x), x.shape
    first = features[0] if xp.__name__.startswith("mlx") else 0
    if first + len(features) == len(sizes):
        return parameter
    shape = [sizes[axis] if axis in features else 1 for axis in range(first, len(sizes))]
    return xp.reshape(parameter, tuple(shape))
