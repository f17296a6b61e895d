"""A wrong door must not pass test_doors.py, nor a wrong array the comparisons of compare.py."""

from dataclasses import replace

import compare
import numpy as np
import pytest
import test_doors
from cases import GOOD
from doors import NUMPY, Door

import batchnorm.numpy
from batchnorm.numpy import Statistics

CASES = [case for case in GOOD if case.name in ("NHWC", "mask", "relu", "residual")]


def run_all(door: Door) -> None:
    """A selection of test_doors.py, as pytest would run it."""
    for case in CASES:
        for dtype in door.dtypes:
            test_doors.test_output_and_statistics(door, dtype, case)
            test_doors.test_gradients(door, dtype, case)
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
    run_all(NUMPY)


@pytest.mark.parametrize(
    ("name", "function"), WRONG, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrong_door_fails(name, function):
    with pytest.raises(AssertionError):
        run_all(replace(NUMPY, functions=Wrong(name, function)))


# ---- comparisons


def refused(comparison, *arguments):
    with pytest.raises(AssertionError):
        comparison(*arguments)


def changed(array, change):
    """The array, as NumPy's, after one of the changes that a comparison may have to notice."""
    array = np.array(array)
    if change == "a value":
        array[1, 2] += 0.01
    if change == "NaN":
        array[1, 2] = np.nan
    if change == "shape":
        array = array[None]
    if change == "a row for all":
        array = array[:1]
    if change == "dtype":
        array = array.astype(np.float16)
    return array


COMPARISONS = {
    "close": lambda got, wanted: compare.close(got, wanted, rtol=1e-3, atol=1e-3),
    "near": lambda got, wanted: compare.near(got, wanted, 1e-3),
    "alike": lambda got, wanted: compare.alike(got, wanted, 1e-3),
    "same": compare.same,
}
EXACT = np.ones((3, 4), np.float32)  # in every dtype


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_sees_what_it_claims_to_look_at(door: Door, name: str):
    comparison, wanted = COMPARISONS[name], door.array(EXACT)
    for container in (lambda each: each, lambda each: [EXACT, {"a": (None, each)}]):
        comparison(container(door.array(EXACT)), container(wanted))
        for change in ("a value", "NaN", "shape", "a row for all", "dtype"):
            got = container(door.array(changed(EXACT, change)))
            if change == "dtype" and name in ("close", "near"):
                comparison(got, container(wanted))
            else:
                refused(comparison, got, container(wanted))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_sees_what_is_missing(name: str):
    whole = {"a": EXACT, "b": [EXACT, EXACT]}
    for part in ({"a": EXACT}, {"a": EXACT, "b": [EXACT]}, {"a": None, "b": [EXACT, EXACT]}):
        for one, other in ((whole, part), (part, whole)):
            refused(COMPARISONS[name], one, other)


@pytest.mark.parametrize("name", COMPARISONS)
def test_what_nan_is_like(name: str):
    array = changed(EXACT, "NaN")
    if name in ("close", "near"):
        COMPARISONS[name](array, array)
    else:
        refused(COMPARISONS[name], array, array)


def test_the_tolerances_of_comparisons():
    wanted = np.array([1000, 0, np.inf, np.nan])
    compare.close(np.array([1009, 0.9, np.inf, np.nan]), wanted, 0.01, 1)
    refused(compare.close, np.array([1012, 0.9, np.inf, np.nan]), wanted, 0.01, 1)
    refused(compare.close, np.array([1009, 1.1, np.inf, np.nan]), wanted, 0.01, 1)
    compare.near(np.array([1000.9, 0.9, np.inf, np.nan]), wanted, 1e-3)
    refused(compare.near, np.array([1000, 1.1, np.inf, np.nan]), wanted, 1e-3)
    refused(compare.near, np.array([1000, 0, 1e30, np.nan]), wanted, 1e-3)
    refused(compare.near, np.array([0.0]), np.array([1.1e-3]), 1e-3)
    compare.alike(np.array([1009.0]), np.array([1000.0]), 0.01)
    refused(compare.alike, np.array([1010.1]), np.array([1000.0]), 0.01)
    refused(compare.same, np.array([1 + 1e-15]), np.array([1.0]))
