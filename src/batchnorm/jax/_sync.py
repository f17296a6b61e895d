"""The devices that share statistics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import checks
from . import _compat as compat

AxisName = Any  # a hashable, or a tuple of them
Groups = Sequence[Sequence[int]]


class Devices(NamedTuple):
    """The devices that share statistics; with axis_name None, each has its own."""

    axis_name: AxisName | None
    groups: tuple[tuple[int, ...], ...] | None
    number: int

    def sum(self, *arrays: jax.Array, like: jax.Array | None = None) -> Sequence[jax.Array]:
        """The sum of each array over the devices, by one collective.

        It is as varying as `like`, so that its transpose, too, is one collective.
        """
        stacked = jnp.stack(arrays)
        if self.groups is None:
            total = jax.lax.psum(stacked, self.axis_name)
        else:
            groups = [list(group) for group in self.groups]
            total = compat.group_sum(stacked, self.axis_name, groups)
        if like is not None:
            total, _ = compat.varying_alike([total, like])
        return list(total)


def devices(axis_name: AxisName | None, groups: Groups | None) -> Devices:
    size = 1
    if axis_name is not None:
        found = compat.axis_size(axis_name)
        checks.bound_axis_name(axis_name, found is not None)
        size = found or 1
    of_size = checks.axis_index_groups(groups, axis_name, size)
    return Devices(axis_name, of_size, size if of_size is None else len(of_size[0]))
