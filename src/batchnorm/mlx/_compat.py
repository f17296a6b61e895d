"""What `mlx.nn` does not promise and we rely on; tests/test_mlx_compat.py watches it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import checks
from ..conventions import CONVENTIONS
from ..ndarrays import converted

_CONVENTION = CONVENTIONS["mlx"]
_STATISTICS = (_CONVENTION.mean, _CONVENTION.var)
_OF_FEATURES = (*_STATISTICS, _CONVENTION.scale, _CONVENTION.bias)
_NUMBERS = ("eps", "momentum")
_NEVER_TRAINED = (*_STATISTICS, *_NUMBERS)
TheirLayer: Any = nn.BatchNorm  # type: ignore[attr-defined]
_CALC_STATS = getattr(TheirLayer, "_calc_stats", None)


def _never_computed() -> mx.array:
    """What stands for an array in a transformation, kept beyond it."""
    kept: list[mx.array] = []

    def keep(x: mx.array) -> mx.array:
        kept.append(x)
        return x

    mx.vmap(keep)(mx.zeros(1))
    return kept[0]


_COMPUTED, _NEVER_COMPUTED = mx.array(0.0), _never_computed()


def is_traced_for_any_size() -> bool:
    """Whether a program is being traced that serves arrays of other sizes (`shapeless=True`).

    There every array has the sizes of one call, as if they were known.
    """
    # For: sums over as many elements as there will be. Breaks it: an array that is broadcast to its
    # own shape elsewhere by an operation too, or by none there. Then: slow calls, or programs that
    # are right at one size.
    try:
        mx.broadcast_arrays(_COMPUTED, _NEVER_COMPUTED)[0].item()
    except (RuntimeError, ValueError):  # an operation that waits for the other array
        return True
    return False


class Layer(nn.BatchNorm):  # type: ignore[misc, name-defined]
    """MLX's own layer, but for what stays float32, is never trained or is no array of MLX."""

    def __init__(self, num_features: int, affine: bool, track_running_stats: bool) -> None:
        super().__init__(num_features, affine=affine, track_running_stats=track_running_stats)
        # For: a parent's unfreeze() empties its modules' sets of frozen keys without asking them.
        # Breaks it: another name for the set, or another test than `in`. Then: an optimizer moves
        # what is not trained.
        self._no_grad = _FrozenKeys()

    def __setitem__(self, key: str, value: Any) -> None:
        # For: set_dtype() and load_weights() of any parent. Breaks it: a way of setting an array
        # other than this. Then: statistics in bfloat16, which hold no small step.
        if key in _OF_FEATURES:
            value = self._of_features(key, value)
        elif key in _NUMBERS and not _is_float32(value):
            checks.instance(key, value, mx.array)
            value = _float32(key, value)
        super().__setitem__(key, value)

    def __setattr__(self, key: str, value: Any) -> None:
        # For: numbers and others' arrays, which a module keeps beside its parameters; and an array
        # in the place of eps, before which a module asks for the number, that may refuse. Breaks
        # it: a way of setting an attribute other than this. Then: a weight that is not used.
        if (key in _OF_FEATURES and value is not None) or (
            key == "eps" and isinstance(value, mx.array)
        ):
            self[key] = value
            self.__dict__.pop(key, None)
        else:
            super().__setattr__(key, value)

    def _of_features(self, key: str, value: Any) -> mx.array:
        if not isinstance(value, mx.array):
            value = converted(key, value, _float32_array)
        if value.dtype != mx.float32 and (
            key in _STATISTICS or not mx.issubdtype(value.dtype, mx.floating)
        ):
            value = _float32(key, value)
        return value if value.ndim else mx.broadcast_to(value, (self.num_features,))

    def _extra_repr(self) -> str:
        # For: options beside a module's name and above its children, which `extra_repr` gives.
        # Breaks it: another name for this method. Then: repr() without them.
        options: str = self.extra_repr()
        return options


def refuse_other_statistics(layer: Layer) -> None:
    """Refuse one that takes statistics as mlx.nn.BatchNorm would, over devices for instance."""
    # For: a layer's own `_calc_stats`, which nothing would call. Breaks it: another name for
    # it. Then: such a layer is passed over.
    own = getattr(layer, "_calc_stats", None)
    if getattr(own, "__func__", own) is not _CALC_STATS:
        raise TypeError(
            f"{type(layer).__name__} has a _calc_stats of its own, but batchnorm.mlx.BatchNorm "
            "takes the statistics together with the output and would not call it. Override "
            "__call__ and use batchnorm.mlx.batch_norm, which pools over a group."
        )


def _is_float32(value: Any) -> bool:
    return type(value) is mx.array and value.dtype == mx.float32


def _float32_array(value: Any) -> mx.array:
    # Not by mx.array alone, which ends the process on a date, and takes no negative strides.
    return mx.array(np.asarray(value).astype(np.float32, order="C", casting="same_kind"))


def _float32(name: str, value: mx.array) -> mx.array:
    checks.floating(name, value.dtype, not mx.issubdtype(value.dtype, mx.complexfloating))
    return value.astype(mx.float32)


class _FrozenKeys(set[str]):
    """The keys of a module that are not trained; those that it keeps can't be taken out."""

    def __contains__(self, key: object) -> bool:
        return key in _NEVER_TRAINED or super().__contains__(key)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave MLX's random numbers as if none had been drawn."""
    # For: a state that can be read and not written. Breaks it: a key that is not the two halves of
    # its seed. Then: other random numbers afterwards.
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
