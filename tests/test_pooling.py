"""Statistics of many batches, against NumPy's of all of them."""

import numpy as np

from batchnorm.moments import Statistics
from batchnorm.tools.pooling import Pooled


def statistics_of(x: np.ndarray) -> Statistics:
    return Statistics(np.full(x.shape[1], len(x)), x.mean(axis=0), x.var(axis=0))


def test_pools_by_count_and_keeps_how_the_means_lie_apart():
    random = np.random.default_rng(0)
    batches = [random.normal(each, 1 + each, (rows, 3)) for each, rows in enumerate((256, 7, 1))]
    pooled, other = Pooled(3), Pooled(3)
    pooled.add(statistics_of(batches[0]))
    for batch in batches[1:]:
        other.add(statistics_of(batch))
    pooled.join(other)
    everything, means = np.concatenate(batches), np.stack([each.mean(axis=0) for each in batches])
    assert pooled.batches == 3
    assert (pooled.statistics.count == 264).all()
    vars_ = np.stack([each.var(axis=0) for each in batches])
    for found, expected in (
        (pooled.statistics, everything),
        (pooled.batch_means, means),
        (pooled.batch_vars, vars_),
    ):
        np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.var, expected.var(axis=0), rtol=1e-12)


def test_a_channel_in_which_nothing_counts_adds_nothing():
    pooled = Pooled(2)
    pooled.add(Statistics(np.array([4, 0]), np.array([1.0, 9.0]), np.array([2.0, 9.0])))
    pooled.add(Statistics(np.zeros(2), np.full(2, 9.0), np.full(2, 9.0)))
    assert pooled.batches == 1
    assert pooled.statistics.count.tolist() == [4, 0]
    assert pooled.batch_means.count.tolist() == [1, 0]
    assert pooled.batch_means.mean.tolist() == [1, 0]


def test_what_has_come_elsewhere_is_joined() -> None:
    random = np.random.default_rng(1)
    batches = [random.normal(each, 2, (3 + each, 2)) for each in range(5)]
    parts = Pooled(2), Pooled(2), Pooled(2)
    for part, own in zip(parts, (batches[:3], [], batches[3:]), strict=True):
        for batch in own:
            part.add(statistics_of(batch))
    joined = Pooled(2)
    for part in parts:
        joined.join(part)
    everything, means = np.concatenate(batches), np.stack([each.mean(axis=0) for each in batches])
    assert joined.batches == 5
    for found, expected in ((joined.statistics, everything), (joined.batch_means, means)):
        assert (found.count == len(expected)).all()
        np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.var, expected.var(axis=0), rtol=1e-12)
