"""The statistics of many batches as those of one set."""

import numpy as np

from ..moments import Statistics


class Pooled:
    """What has come to one layer: all batches as one set, and how their means lie apart.

    Of the memory of a few values a channel, however many batches there are.

    Attributes
    ----------
    batches : how many had an element that counts
    statistics : of all elements
    batch_means, batch_vars : of the batches' means and variances, each of the same weight
    """

    def __init__(self, channels: int) -> None:
        self.batches = 0
        self.statistics = self.batch_means = self.batch_vars = _nothing(channels)

    def add(self, statistics: Statistics) -> None:
        """Those of one batch, as NumPy's arrays of shape (channels,)."""
        count, mean, var = (np.asarray(each, np.float64) for each in statistics)
        self.statistics = self.statistics.merge(Statistics(count, mean, var))
        is_there, zeros = (count > 0).astype(np.float64), np.zeros_like(mean)
        self.batch_means = self.batch_means.merge(Statistics(is_there, mean, zeros))
        self.batch_vars = self.batch_vars.merge(Statistics(is_there, var, zeros))
        self.batches += bool(is_there.any())

    def join(self, other: "Pooled") -> None:
        """With what has come to the same layer elsewhere, in another process say."""
        self.statistics = self.statistics.merge(other.statistics)
        self.batch_means = self.batch_means.merge(other.batch_means)
        self.batch_vars = self.batch_vars.merge(other.batch_vars)
        self.batches += other.batches


def _nothing(channels: int) -> Statistics:
    return Statistics(*np.zeros((3, channels)))
