"""Arrays as users bring them to NumPy's door, JAX's and MLX's layer, which make arrays of much."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.ma import MaskedArray  # np.ma would import it in a user's first call

Array = TypeVar("Array")


def converted(name: str, value: Any, convert: Callable[[Any], Array]) -> Array:
    """`convert(value)`, where that is all that the value means."""
    check_kinds(name, value)
    try:
        array = convert(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be an array, but of {type(value).__name__} none can be made: {error}"
        ) from error
    check_kinds(name, array)
    return array


def check_kinds(name: str, value: Any) -> None:
    """Refuse arrays that mean more than their elements, which alone would be taken."""
    for kind in _kinds(value):
        if not issubclass(kind, np.ndarray):
            continue
        if issubclass(kind, MaskedArray):
            filled = f"{name}.filled(value), with the value to take where it is masked"
            instead = {"x": "x.data, mask=~x.mask", "out": "out.data"}.get(name, filled)
            raise TypeError(
                f"{name} must not be a masked array, whose mask would be lost. Pass {instead}."
            )
        if any(getattr(kind, each) is not getattr(np.ndarray, each) for each in _ARITHMETIC):
            raise TypeError(
                f"{name} must be a plain array, but got {kind.__name__}, whose arithmetic is its "
                "own (as that of units is) and would be lost. Pass its elements alone, as "
                f"numpy.asarray({name}) gives them, if those are meant."
            )


_ARITHMETIC = ("__array_ufunc__", "__array_function__")


def _kinds(value: Any) -> set[type]:
    """The types of the arrays that an array is to be made of."""
    if not isinstance(value, (list, tuple)):
        return {type(value)}
    kinds = set(map(type, value))
    if kinds & {list, tuple}:
        return kinds.union(*map(_kinds, value))
    return kinds
