"""What `mlx.nn.Module` does not promise and we rely on; tests/test_mlx_compat.py watches it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import checks
from ..conventions import CONVENTIONS

_STATISTICS = (CONVENTIONS["mlx"].mean, CONVENTIONS["mlx"].var)
_KEPT = (*_STATISTICS, "eps", "momentum")


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


class Module(nn.Module):  # type: ignore[misc, name-defined]
    """A module whose running statistics, eps and momentum stay float32 and are never trained."""

    def __init__(self) -> None:
        super().__init__()
        # For: a parent's unfreeze() empties its modules' sets of frozen keys without asking them.
        # Breaks it: another name for the set, or another test than `in`. Then: an optimizer moves
        # what is not trained.
        self._no_grad = _FrozenKeys()

    def __setitem__(self, key: str, value: Any) -> None:
        # For: set_dtype() and load_weights() of any parent. Breaks it: a way of setting an array
        # other than this. Then: statistics in bfloat16, which hold no small step.
        if key in _KEPT and not (type(value) is mx.array and value.dtype == mx.float32):
            checks.instance(key, value, mx.array)
            checks.floating(key, value.dtype, not mx.issubdtype(value.dtype, mx.complexfloating))
            value = value.astype(mx.float32)
        super().__setitem__(key, value)

    def _extra_repr(self) -> str:
        # For: options beside a module's name and above its children, which `extra_repr` gives.
        # Breaks it: another name for this method. Then: repr() without them.
        options: str = self.extra_repr()
        return options


class _FrozenKeys(set[str]):
    """The keys of a module that are not trained; those that it keeps can't be taken out."""

    def __contains__(self, key: object) -> bool:
        return key in _KEPT or super().__contains__(key)
