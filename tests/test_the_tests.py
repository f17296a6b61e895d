"""A wrong door must not pass: each deliberate mistake is found by the tests of test_doors.py."""

from dataclasses import replace

import numpy as np
import pytest
import test_doors
from cases import GOOD
from doors import DOORS, Door

import batchnorm.numpy
from batchnorm.numpy import Statistics

CASES = [case for case in GOOD if case.name in ("NHWC", "mask", "relu", "residual")]


def run_all(door: Door) -> None:
    """A selection of test_doors.py, as pytest would run it."""
    for case in CASES:
        test_doors.test_output_and_statistics(door, case)
        test_doors.test_gradients(door, case)
    test_doors.test_update_running(door, 1)
    test_doors.test_merged_parts_are_the_whole(door)
    test_doors.test_large_mean(door, "features last")
    test_doors.test_what_is_not_finite_stays_in_its_feature(door, np.nan)
    test_doors.test_masked_values_harm_nothing(door, np.nan, None)
    test_doors.test_empty_batch(door, (0, 3), -1)


class Wrong:
    """batchnorm.numpy with one function replaced."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __getattr__(self, name):
        return self.function if name == self.name else getattr(batchnorm.numpy, name)


def sample_variance(x, *arguments, **keywords):
    y, (count, mean, var) = batchnorm.numpy.batch_norm(x, *arguments, **keywords)
    return y, Statistics(count, mean, var * count / np.maximum(count - 1, 1))


def eps_outside_the_root(x, scale=None, bias=None, *, eps=1e-5, **keywords):
    _, statistics = batchnorm.numpy.batch_norm(x, scale, bias, eps=eps, **keywords)
    keywords.pop("mask", None)
    wrong = (np.sqrt(statistics.var) + eps) ** 2
    return (
        batchnorm.numpy.normalize(x, statistics.mean, wrong, scale, bias, eps=1e-30, **keywords),
        statistics,
    )


def without_mask(x, *arguments, mask=None, **keywords):
    return batchnorm.numpy.batch_norm(x, *arguments, **keywords)


def rounded_mean(x, scale=None, bias=None, *, eps=1e-5, **keywords):
    _, statistics = batchnorm.numpy.batch_norm(x, scale, bias, eps=eps, **keywords)
    keywords.pop("mask", None)
    mean = statistics.mean.astype(np.float32) if x.dtype == np.float32 else statistics.mean
    y = batchnorm.numpy.normalize(x, mean, statistics.var, scale, bias, eps=eps, **keywords)
    return y, statistics


def half_a_gradient(dy, x, statistics, *arguments, **keywords):
    gradients = batchnorm.numpy.batch_norm_gradients(dy, x, statistics, *arguments, **keywords)
    return gradients._replace(x=gradients.x * 1.01)


def momentum_the_other_way(mean, var, statistics, *, rate, correction=0):
    return batchnorm.numpy.update_running(
        mean, var, statistics, rate=1 - rate, correction=correction
    )


WRONG = [
    ("batch_norm", sample_variance),
    ("batch_norm", eps_outside_the_root),
    ("batch_norm", without_mask),
    ("batch_norm", rounded_mean),
    ("batch_norm_gradients", half_a_gradient),
    ("update_running", momentum_the_other_way),
]


def test_the_right_door_passes():
    run_all(DOORS[0])


@pytest.mark.parametrize(
    ("name", "function"), WRONG, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrong_door_fails(name, function):
    with pytest.raises(AssertionError):
        run_all(replace(DOORS[0], functions=Wrong(name, function)))
