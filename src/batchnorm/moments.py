"""The statistics of a batch: as users see them, and as the stages hand them on."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .arrays import Array, namespace, quiet

Constant = Callable[[Array], Array]


def unchanged(array: Array) -> Array:
    """Where nothing is differentiated, in the place of a framework's stop_gradient."""
    return array


class Statistics(NamedTuple):
    """Count, mean and population variance of each feature.

    Attributes
    ----------
    count : array, feature shape
        How many elements each feature has: with a mask, the sum of its weights.
    mean, var : array, feature shape
        The mean, and the variance divided by count. Both are 0 where count is 0.
    """

    count: Array
    mean: Array
    var: Array

    def merge(self, other: "Statistics") -> "Statistics":
        """Pool the statistics of two disjoint sets, exactly up to rounding.

        The formula is that of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm
        for Computing Sample Variances" (1979). An empty set (count 0) changes nothing.

        Parameters
        ----------
        other : Statistics
            Statistics of further elements of the same features.

        Returns
        -------
        Statistics
            Infinite means are added up as infinite numbers are: the mean of all is infinite, too,
            and NaN where the two have unlike signs.

        Raises
        ------
        TypeError
            If other is no Statistics, or not of the same kind of arrays.
        ValueError
            If its features are not as many, or of another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm.numpy import batch_statistics
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> pooled = batch_statistics(x[:1]).merge(batch_statistics(x[1:]))
        >>> bool(np.allclose(pooled.var, x.var(axis=0)))
        True
        """
        check_statistics("other", other)
        shape = tuple(self.mean.shape)
        for name, array in other._asdict().items():
            if not hasattr(array, "shape"):
                raise TypeError(f"other.{name} must be an array, but got {type(array).__name__}.")
            if tuple(array.shape) != shape:
                raise ValueError(
                    f"other.{name} must have the shape {shape} of the statistics that it is merged "
                    f"with, but its shape is {tuple(array.shape)}."
                )
        try:
            with quiet(namespace(self.mean)):
                return self._pooled(other)
        except TypeError as error:
            raise TypeError(
                f"other must be of {type(self.mean).__name__}, as the statistics that it is merged "
                f"with, but it is of {type(other.mean).__name__}: {error}"
            ) from error

    def _pooled(self, other: "Statistics") -> "Statistics":
        count = self.count + other.count
        xp = namespace(count)
        own, others = (each.count / or_one(count) for each in (self, other))
        shift = other.mean - self.mean
        mean = self.mean + others * shift  # of equal means exactly that
        mean = xp.where(xp.isfinite(shift), mean, own * self.mean + others * other.mean)
        var = own * self.var + others * other.var + (own * shift) * (others * shift)
        return Statistics(
            *(
                xp.where(other.count == 0, one, xp.where(self.count == 0, another, both))
                for one, another, both in zip(self, other, (count, mean, var), strict=True)
            )
        )


def check_statistics(name: str, value: object) -> None:
    if not isinstance(value, Statistics):
        raise TypeError(
            f"{name} must be a Statistics, as batch_statistics returns it and batch_norm does "
            f"beside y, but got {type(value).__name__}."
        )


class Moments(NamedTuple):
    """Mean and variance in the coordinate u = (x − pivot) / unit, of the feature shape.

    In exact arithmetic no result depends on pivot or unit. In floating point, a pivot near the mean
    makes x − pivot exact however large the mean is, and leaves the mean, pivot + unit·offset, as a
    sum of two terms that need not be rounded to one; a large unit keeps every difference and its
    square finite. The unit is a power of two.

    unit and offset may be None: 1 and 0. count may be None, where mean and variance do not depend
    on x: running statistics.
    """

    count: Array
    pivot: Array
    unit: Array
    offset: Array
    var: Array

    @classmethod
    def given(cls, mean: Array, var: Array) -> "Moments":
        """A mean and a variance that do not depend on x."""
        return cls(None, mean, None, None, var)

    @classmethod
    def about(
        cls, statistics: Statistics, narrow: Callable[[Array], Array], constant: Constant
    ) -> "Moments":
        """Statistics of a wider dtype in the one that `narrow` casts to, the mean not rounded."""
        count, mean, var = statistics
        xp = namespace(mean)
        pivot = constant(narrow(mean))
        unit = constant(unit_for(narrow(xp.sqrt(var))))
        offset, var = (mean - pivot) / unit, var / xp.square(xp.astype(unit, var.dtype))
        return cls(
            None if count is None else narrow(count), pivot, unit, narrow(offset), narrow(var)
        )

    def with_eps(self, eps: float | Array | None) -> "Moments":
        """These with var + eps in the place of var, if there is an eps."""
        return self._replace(var=self.var_plus(eps))

    def var_plus(self, eps: float | Array | None) -> Array:
        if eps is None:
            return self.var
        if self.unit is None:
            return self.var + eps
        xp = namespace(self.var)
        root = math.sqrt(eps) if isinstance(eps, float) else xp.sqrt(eps)
        return self.var + xp.square(root / self.unit)  # unit² may overflow

    def statistics(self) -> Statistics:
        """These, rounded to one mean and one variance."""
        count, pivot, unit, offset, var = self
        if unit is None:
            return Statistics(count, pivot, var)
        return Statistics(count, pivot + unit * offset, unit * (unit * var))


def unit_for(reach: Array) -> Array:
    """A power of two, in which what is within `reach` of the pivot can be squared and added up.

    In 2, the smallest, no difference of finite numbers overflows; what a halved subnormal number
    loses is nothing beside an eps.
    """
    xp = namespace(reach)
    step = 2.0 ** (math.frexp(xp.finfo(reach.dtype).max)[1] // 4)
    unit = xp.full_like(reach, 2.0)
    for power in (step, step**2, step**3):
        unit = xp.where(reach >= power, power, unit)
    return unit


Sum = Callable[..., Sequence[Array]]


def pooled(moments: Moments, add_up: Sum, constant: Constant = unchanged) -> Moments:
    """The moments of all devices' elements; `add_up(*arrays)` sums each array over the devices.

    First the devices agree on a pivot, the mean to within rounding, and on a unit, and then add up
    moments around it, which loses nothing: the formula of Chan, Golub & LeVeque (1979), for many
    sets at once. `constant` is the framework's stop_gradient, for the pivot and the unit.
    """
    count, own_pivot, own_unit, offset, var = moments
    xp = namespace(own_pivot)
    # Neither a count times a value nor a sum over a thousand devices overflows.
    share, reach = count * 1e-12, own_unit + xp.abs(own_pivot) / 1024
    reach = xp.where(count == 0, xp.zeros_like(own_pivot), reach)
    share, mean, reach = add_up(*map(constant, (share, share * own_pivot, reach)))
    pivot = mean / or_one(share)
    unit = unit_for(reach)
    ratio = own_unit / unit
    offset = own_pivot / unit - pivot / unit + ratio * offset
    squares = var * ratio**2 + offset * offset
    count, first, second = add_up(count, count * offset, count * squares)
    offset = first / or_one(count)
    var = second / or_one(count) - offset * offset
    return Moments(count, pivot, unit, offset, xp.where(var < 0, xp.zeros_like(var), var))


def or_one(count: Array) -> Array:
    """`count`, with 1 for 0: the divisor of sums that are 0 as well."""
    xp = namespace(count)
    return xp.where(count == 0, xp.ones_like(count), count)
