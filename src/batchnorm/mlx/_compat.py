"""What `mlx.nn.Module` does not promise and we rely on; tests/test_mlx_compat.py watches it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Module(nn.Module):  # type: ignore[misc, name-defined]
    """A module with `statistics`: arrays that stay float32 and are never trained."""

    def __init__(self, statistics: tuple[str, ...]) -> None:
        super().__init__()
        # For: what any unfreeze() takes out of a module's frozen keys, a parent's too, by passing
        # the module's own unfreeze(); MLX's layer is trained then. Breaks it: another name for the
        # set, or another test than `in`. Then: an optimizer moves the statistics.
        self._no_grad = _FrozenKeys(statistics)

    def __setitem__(self, key: str, value: Any) -> None:
        # For: set_dtype() and load_weights() of any parent. Breaks it: a way of setting an array
        # other than this. Then: statistics in bfloat16, which hold no small step.
        if isinstance(value, mx.array) and key in self._no_grad.always:
            value = value.astype(mx.float32)
        super().__setitem__(key, value)

    def _extra_repr(self) -> str:
        # For: options beside a module's name and above its children. Breaks it: another name for
        # this method. Then: repr() without them.
        return self.extra_repr()

    def extra_repr(self) -> str:
        """The options, as repr() shows them."""
        return ""


class _FrozenKeys(set[str]):
    """The keys of a module that are not trained; those of its statistics can't be taken out."""

    def __init__(self, always: tuple[str, ...]) -> None:
        super().__init__()
        self.always = always

    def __contains__(self, key: object) -> bool:
        return key in self.always or super().__contains__(key)
