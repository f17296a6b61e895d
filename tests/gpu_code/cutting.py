"""Other ways to cut x into tiles and programs than tiles.py has for its size."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from batchnorm.torch._gpu import plans, tiles

_CACHES = (plans.plan_of, plans._weighted, tiles.whole, tiles.sums, tiles.writes, tiles.merge)
# Small tensors have several programs of several tiles, and more sets than are merged at once.
SMALL = {"TILE": 256, "SCALAR_TILE": 128, "SUMMING": 3, "WRITING": 3, "MOST_TILES": 4, "MERGED": 2}


@contextmanager
def cut(*, in_one_kernel: bool = False, **numbers: int) -> Iterator[None]:
    """With these numbers of tiles.py."""
    with ExitStack() as stack:
        for name, number in numbers.items():
            stack.enter_context(patch.object(tiles, name, number))
        if not in_one_kernel:
            stack.enter_context(patch.object(tiles, "whole", lambda *arguments: None))
        stack.callback(_forget)
        _forget()
        yield


def _forget() -> None:
    for each in _CACHES:
        each.cache_clear()
