"""The devices that share statistics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from ..moments import Moments, pooled
from . import _compat as compat

AxisName = Any  # a hashable, or a tuple of them
Groups = Sequence[Sequence[int]]  # or whatever iterates as such: an array, ranges


class UnknownAxisError(NameError, ValueError):
    """A NameError, as JAX itself raises of such a name, and of a wrong argument a ValueError."""


class Devices(NamedTuple):
    """The devices that share statistics; with axis_name None, each has its own."""

    axis_name: AxisName | None
    groups: tuple[tuple[int, ...], ...] | None
    number: int

    @property
    def mapped(self) -> tuple[Any, ...]:
        """The names of mapped axes all of whose elements share statistics."""
        if self.axis_name is None or self.groups is not None:
            return ()
        return self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)

    def without(self, axis_name: Any) -> "Devices":
        """Those that are left when one axis is no longer mapped."""
        if axis_name not in self.mapped:
            return self
        others = tuple(name for name in self.mapped if name != axis_name)
        return self._replace(axis_name=others) if others else ALONE

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

    def pooled(self, moments: Moments) -> Moments:
        """The moments of all their elements."""
        if self.axis_name is None:
            return moments
        return pooled(moments, self.sum, jax.lax.stop_gradient)


ALONE = Devices(None, None, 1)


def devices(axis_name: AxisName | None, groups: Groups | None) -> Devices:
    size = 1
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    if axis_name is not None:
        try:
            hash(axis_name)
        except TypeError as error:
            raise TypeError(
                f"axis_name must be hashable, or a tuple of hashables, but got {axis_name!r}."
            ) from error
        found = compat.axis_size(axis_name)
        if found is None:
            raise UnknownAxisError(
                f"axis_name must name axes that are mapped here, but got {axis_name!r}. "
                "Call inside of jax.pmap, jax.shard_map or jax.vmap with that axis name."
            )
        size = found
    of_size = _checked(groups, axis_name, size)
    return Devices(axis_name, of_size, size if of_size is None else len(of_size[0]))


def _checked(groups: Any, axis_name: Any, size: int) -> tuple[tuple[int, ...], ...] | None:
    """`groups` of the indices along a mapped axis of that size; None stands for no groups."""
    if groups is None:
        return None
    if axis_name is None:
        raise ValueError("axis_index_groups needs an axis_name, but axis_name is None.")
    # By NumPy, as JAX would trace even how its arrays are iterated over.
    each = groups if isinstance(groups, (tuple, list)) else np.atleast_1d(groups)
    lists = [np.asarray(group).tolist() for group in each]
    if not all(isinstance(group, list) and all(map(checks.is_integer, group)) for group in lists):
        raise TypeError(
            f"axis_index_groups must be a sequence of sequences of integers, but got {groups!r}."
        )
    if sorted(index for group in lists for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index of axis_name={axis_name!r}, of size {size}, "
            f"exactly once, but got {groups!r}."
        )
    if len({len(group) for group in lists}) > 1:
        raise ValueError(f"axis_index_groups must be of one size, but got {groups!r}.")
    return tuple(map(tuple, lists))
