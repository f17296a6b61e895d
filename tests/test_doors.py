"""What all doors share: each test runs through every door, against a float64 truth.

The tests are functions of a door alone, so that test_the_tests.py can hand them a wrong one.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import truth
from cases import (
    BAD,
    CONSTANT,
    EXTREMES,
    EXTREMES_OF_FLOAT64,
    GOOD,
    HARD,
    HUGE,
    LARGE_MEAN,
    ONE_VALUE,
    OUTLIER_FIRST,
    WITHOUT_REDUCED_AXES,
    Bad,
    Extreme,
    Good,
    Hard,
)
from compare import ROUNDING, close, near
from doors import BFLOAT16, BY_DEFINITION, DOORS, FLOAT16, FLOAT32, FLOAT64, Door

from batchnorm.moments import Statistics


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_output_and_statistics(door: Door, dtype: np.dtype, case: Good):
    _, x, scale, bias, keywords = case.arrays(dtype)
    y, statistics = door.batch_norm(x, scale, bias, **keywords)
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    assert y.dtype == dtype
    near(y, wanted.y, ROUNDING[dtype])
    accuracy = ROUNDING[FLOAT64 if dtype == FLOAT64 else FLOAT32]
    near(statistics.mean, wanted.mean, accuracy, "mean")
    near(statistics.var, wanted.var, accuracy, "var")
    near(statistics.count, np.broadcast_to(wanted.count, wanted.mean.shape), accuracy, "count")


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_gradients(door: Door, dtype: np.dtype, case: Good):
    dy, x, scale, bias, keywords = case.arrays(dtype)
    got = door.batch_norm_gradients(dy, x, scale, bias, **keywords)
    wanted = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
    assert set(got) == {"x", "scale", "bias"} | ({"residual"} if case.residual else set())
    assert got["x"].dtype == dtype
    for name, gradient in got.items():
        if case.activation == "relu" and dtype in (FLOAT16, BFLOAT16):
            # Rounding can put an element on the other side of relu's kink.
            assert np.mean(np.abs(gradient - wanted[name]) > 0.05) < 0.02, name
        else:
            near(gradient, wanted[name], ROUNDING[dtype], name)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_statistics_alone(door: Door, dtype: np.dtype, case: Good):
    _, x, _, _, keywords = case.arrays(dtype)
    statistics = door.batch_statistics(x, axis=case.axis, mask=keywords.get("mask"))
    wanted = truth.batch_norm(x, axis=case.axis, mask=keywords.get("mask"))
    accuracy = ROUNDING[FLOAT64 if dtype == FLOAT64 else FLOAT32]
    near(statistics.mean, wanted.mean, accuracy)
    near(statistics.var, wanted.var, accuracy)


EVALUATED = [case for case in (*GOOD, *WITHOUT_REDUCED_AXES) if not case.mask]


@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_normalize(door: Door, dtype: np.dtype, case: Good):
    _, x, scale, bias, keywords = case.arrays(dtype)
    mean, var = scale * 2, scale * 3
    y = door.normalize(x, mean, var, scale, bias, **keywords)
    wanted = truth.batch_norm(x, None, None, axis=case.axis)  # for the shapes alone
    shape = [size if axis in case.features else 1 for axis, size in enumerate(x.shape)]
    along = [np.float64(each).reshape(shape) for each in (mean, var, scale, bias)]
    z = (np.float64(x) - along[0]) / np.sqrt(along[1] + 1e-3) * along[2] + along[3]
    z = z + np.float64(keywords.get("residual", 0))
    if case.activation == "relu":
        z = np.maximum(z, 0)
    if case.activation == "silu":
        z = z / (1 + np.exp(-z))
    assert y.dtype == dtype
    assert y.shape == wanted.y.shape
    near(y, z, ROUNDING[dtype])


def test_parameters_may_be_left_out(door: Door):
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    scale, bias = np.float32([1, 2, 3, 4]), np.float32([4, 3, 2, 1])
    for arguments in ({}, {"scale": scale}, {"bias": bias}):
        y, _ = door.batch_norm(x, **arguments)
        near(y, truth.batch_norm(x, **arguments).y, ROUNDING[FLOAT32])
        gradients = door.batch_norm_gradients(x, x, arguments.get("scale"), arguments.get("bias"))
        wanted = truth.batch_norm_gradients(x, x, **arguments)
        assert set(gradients) == {"x", *arguments}
        for name, gradient in gradients.items():
            near(gradient, wanted[name], ROUNDING[FLOAT32], name)


# ---- accuracy: what an obvious way to compute loses (see docs/how-a-call-travels.md)


@cache
def truth_of(hard: Hard, *shape: int) -> truth.Truth:
    return truth.batch_norm(hard.x(*shape), eps=hard.eps)


@pytest.mark.parametrize("hard", HARD, ids=str)
def test_hard_inputs(door: Door, hard: Hard):
    x, wanted = hard.x(), truth_of(hard)
    y, statistics = door.batch_norm(x, eps=hard.eps)
    assert y.dtype == x.dtype
    assert np.isfinite(y).all()
    close(y, wanted.y, rtol=0, atol=hard.tolerance)
    if wanted.var.max() > 0:
        close(y.std(axis=0, dtype=np.float64), wanted.y.std(axis=0), rtol=0, atol=1e-3)
    close(y.mean(axis=0, dtype=np.float64), np.zeros(2), atol=1e-3)
    close(statistics.mean, wanted.mean, rtol=1e-6, atol=1e-6 * np.sqrt(wanted.var.max()))
    if 0 < wanted.var.max() < 1e38:  # which is a float32
        close(statistics.var, wanted.var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", ["features last", "features first"])
def test_large_mean(door: Door, layout: str):
    x, wanted = LARGE_MEAN.x(features=4), truth_of(LARGE_MEAN, LARGE_MEAN.rows, 4).y
    if layout == "features last":
        y, _ = door.batch_norm(x)
    else:
        y, _ = door.batch_norm(np.ascontiguousarray(x.T)[None], axis=1)
        y = y[0].T
    assert abs(y.std(dtype=np.float64) - wanted.std()) < 1e-3
    assert abs(y.mean(dtype=np.float64)) < 1e-3
    close(y, wanted, rtol=0, atol=5e-3)


def test_gradients_at_a_large_mean(door: Door):
    x = LARGE_MEAN.x(1000, 4)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    for direction in (dy, dy + 1, dy + truth.batch_norm(x).y.astype(np.float32)):
        got = door.batch_norm_gradients(direction, x, None, None)["x"]
        wanted = truth.batch_norm_gradients(direction, x)["x"]
        assert np.linalg.norm(got - wanted) <= 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", [(1000, 3), (1_000_000, 1)])
def test_constant_feature(door: Door, shape: tuple[int, int]):
    y, _ = door.batch_norm(CONSTANT.x(*shape), None, np.full(shape[1], 0.25, np.float32))
    close(y, np.full(shape, 0.25), rtol=0, atol=1e-3)


def test_gradients_of_float32_whose_squares_overflow(door: Door):
    x = HUGE.x()
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    got = door.batch_norm_gradients(dy, x, None, None)["x"] * 1e30
    wanted = truth.batch_norm_gradients(dy, x)["x"] * 1e30
    close(got, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["features last", "features first"])
def test_an_outlier_first(door: Door, layout: str):
    x, wanted = OUTLIER_FIRST.x(), truth_of(OUTLIER_FIRST)
    if layout == "features last":
        y, statistics = door.batch_norm(x)
    else:
        y, statistics = door.batch_norm(np.ascontiguousarray(x.T), axis=0)
        y = y.T
    close(statistics.var, wanted.var, rtol=1e-4)
    near(y, wanted.y, ROUNDING[FLOAT32])


# ---- the ends of the range


def within(got, wanted, size, rounding, smallest, name):
    """Each value within some roundings of how large its terms are; ∞ where its dtype overflows.

    What is smaller than `smallest`, some hardware takes for 0.
    """
    with np.errstate(over="ignore", under="ignore"):
        wanted = np.asarray(wanted).astype(got.dtype).astype(np.longdouble)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(got[~finite].astype(np.longdouble), wanted[~finite], name)
    error = np.abs(np.where(finite, got, 0) - np.where(finite, wanted, 0))
    worst = (error / (rounding * size + smallest)).max()
    assert worst <= 1, f"{name}: {worst} times what is allowed, {got}, not {wanted}"


AT_THE_ENDS = [
    (door, extreme)
    for door in (*DOORS, *BY_DEFINITION)
    for extreme in (*EXTREMES, *(EXTREMES_OF_FLOAT64 if FLOAT64 in door.dtypes else ()))
]


@pytest.mark.parametrize(("shape", "axis"), [((12, 4), -1), ((3, 4, 100), 1)], ids=str)
@pytest.mark.parametrize(
    ("door", "extreme"),
    AT_THE_ENDS,
    ids=[f"{door.name}-{extreme}" for door, extreme in AT_THE_ENDS],
)
def test_the_ends_of_the_range(door: Door, extreme: Extreme, shape: tuple[int, ...], axis: int):
    dy, x, scale, bias, keywords = extreme.arrays(shape, axis)
    exact = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        wanted = truth.batch_norm(exact, scale, bias, **keywords)
        gradients = truth.batch_norm_gradients(dy, exact, scale, bias, **keywords)
        sizes = truth.sizes(dy, exact, scale, bias, **keywords)
    computed = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    smallest = 4 * float(np.finfo(computed).tiny) * np.maximum(1, sizes.pop("slope"))

    def right(got, wanted, name, size):
        rounding = 4 * max(ROUNDING[computed], ROUNDING[got.dtype])
        if got.shape == x.shape:
            within(got, wanted, sizes[size], rounding, smallest, name)
        else:
            wanted = np.broadcast_to(wanted, got.shape)
            within(got, wanted, sizes[size].ravel(), rounding, smallest.ravel(), name)

    y, statistics = door.batch_norm(x, scale, bias, **keywords)
    right(y, wanted.y, "y", "y")
    for name in statistics._fields:
        right(getattr(statistics, name), getattr(wanted, name), name, name)
    if door.name.startswith("numpy") and np.isinf(statistics.var).any():
        # All that a gradient knows of the variance.
        with pytest.raises(ValueError, match=r"statistics\.var must be finite"):
            door.batch_norm_gradients(dy, x, scale, bias, **keywords)
        return
    got = door.batch_norm_gradients(dy, x, scale, bias, **keywords)
    for name, gradient in got.items():
        right(gradient, gradients[name], f"the gradient of {name}", name)


@pytest.mark.parametrize(
    ("of_x", "of_residual", "each"), [(FLOAT16, FLOAT32, 100.0), (FLOAT32, FLOAT16, 2.0**-26)]
)
def test_the_gradient_of_a_residual_is_added_up_in_the_wider_dtype(
    door: Door, of_x: np.dtype, of_residual: np.dtype, each: float
):
    x = np.random.default_rng(0).normal(size=(4096, 2)).astype(of_x)
    dy, residual = np.full_like(x, each), np.zeros(2, of_residual)
    gradient = door.batch_norm_gradients(dy, x, None, None, residual=residual)["residual"]
    np.testing.assert_array_equal(gradient, np.full(2, 4096 * each, of_residual))


# ---- values that are not finite, masks, empty batches


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_feature(door: Door, value: float):
    for shape, axis, index in (
        ((40, 5), -1, (3, 2)),
        ((40, 5), -1, (0, 2)),
        ((3, 5, 300), 1, (1, 2, 7)),
        ((20, 5, 3), 1, (1, 2, 1)),
    ):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        dy = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        clean = door.batch_norm(x, axis=axis)[0]
        clean_gradient = door.batch_norm_gradients(dy, x, None, None, axis=axis)["x"]
        x[index] = value
        y, _ = door.batch_norm(x, axis=axis)
        gradient = door.batch_norm_gradients(dy, x, None, None, axis=axis)["x"]
        others = np.arange(5) != 2
        np.testing.assert_allclose(
            np.compress(others, y, axis), np.compress(others, clean, axis), atol=1e-5
        )
        np.testing.assert_allclose(
            np.compress(others, gradient, axis),
            np.compress(others, clean_gradient, axis),
            atol=1e-5,
        )
        assert np.isnan(np.take(y, 2, axis)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_masked_values_harm_nothing(door: Door, value: float, activation: str | None):
    for shape, axis in (((30, 4), -1), ((5, 4, 700), 1), ((30, 4, 3), 1)):
        random = np.random.default_rng(0)
        x = random.normal(size=shape).astype(np.float32)
        dy = random.normal(size=shape).astype(np.float32)
        scale, bias = np.float32([1, 2, 3, 4]), np.float32([0.5, 0, -0.5, 1])
        keywords = {"axis": axis, "activation": activation}
        mask = random.uniform(size=shape) > 0.3
        dy = np.where(mask, dy, 0).astype(np.float32)  # as where padding is left out of the loss
        wanted = truth.batch_norm(x, scale, bias, mask=mask, **keywords)
        wanted_gradients = truth.batch_norm_gradients(dy, x, scale, bias, mask=mask, **keywords)
        spoiled = np.where(mask, x, np.float32(value))
        y, statistics = door.batch_norm(spoiled, scale, bias, mask=mask, **keywords)
        near(statistics.mean, wanted.mean, ROUNDING[FLOAT32])
        near(statistics.var, wanted.var, ROUNDING[FLOAT32])
        near(np.where(mask, y, 0), np.where(mask, wanted.y, 0), ROUNDING[FLOAT32])
        gradients = door.batch_norm_gradients(dy, spoiled, scale, bias, mask=mask, **keywords)
        for name, gradient in gradients.items():
            assert np.isfinite(gradient).all(), name
            if name == "x":
                gradient = np.where(mask, gradient, 0)
                wanted_gradients["x"] = np.where(mask, wanted_gradients["x"], 0)
            near(gradient, wanted_gradients[name], ROUNDING[FLOAT32], name)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_what_has_no_weight_and_is_not_finite_gives_nan(door: Door, activation: str | None):
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    spoiled, mask = x.copy(), np.ones((40, 1), bool)
    spoiled[3:6] = np.float32([[np.inf], [-np.inf], [np.nan]])
    mask[3:7] = False
    y, _ = door.batch_norm(spoiled, mask=mask, activation=activation)
    wanted = truth.batch_norm(x, mask=mask, activation=activation).y
    wanted[3:6] = np.nan
    near(y, wanted, ROUNDING[FLOAT32])


def test_masked_values_are_normalized_all_the_same(door: Door):
    x = np.float32([[1, 1], [3, 3], [8, 8]])
    mask = np.array([[True], [True], [False]])
    y, statistics = door.batch_norm(x, mask=mask)
    np.testing.assert_allclose(statistics.mean, [2, 2])
    np.testing.assert_allclose(y[2], [6, 6], rtol=1e-4)


def test_a_mask_without_any_true_is_finite(door: Door):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    mask = np.ones((6, 3), bool)
    mask[:, 1] = False
    y, statistics = door.batch_norm(x, mask=mask)
    assert np.isfinite(y).all()
    np.testing.assert_allclose([each[1] for each in statistics], [0, 0, 0], atol=1e-6)
    gradient = door.batch_norm_gradients(x, x, None, None, mask=mask)["x"]
    assert np.isfinite(gradient).all()


def test_integer_weights_count_as_repeated_elements(door: Door):
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 3)).astype(np.float32)
    weights = random.integers(0, 4, (20, 1))
    weighted = door.batch_statistics(x, mask=weights.astype(np.float32))
    repeated = door.batch_statistics(np.repeat(x, weights[:, 0], axis=0))
    for got, wanted in zip(weighted, repeated, strict=True):
        near(got, wanted, ROUNDING[FLOAT32])


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), -1), ((2, 3, 0), 1), ((0, 3, 4), 1)])
def test_empty_batch(door: Door, shape: tuple[int, ...], axis: int):
    x = np.zeros(shape, np.float32)
    scale = np.ones(3, np.float32)
    y, statistics = door.batch_norm(x, scale, scale, axis=axis)
    assert y.shape == shape
    for each in statistics:
        np.testing.assert_array_equal(each, np.zeros(3))
    gradients = door.batch_norm_gradients(x, x, scale, scale, axis=axis)
    np.testing.assert_array_equal(gradients["scale"], np.zeros(3))
    assert door.normalize(x, scale, scale, axis=axis).shape == shape

    mean, var = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    statistics = door.call("batch_statistics", x, axis=axis)
    new = door.update_running(door.array(mean), door.array(var), statistics, rate=0.1, correction=1)
    np.testing.assert_array_equal(door.numpy(new[0]), mean)
    np.testing.assert_array_equal(door.numpy(new[1]), var)


# ---- one value of each feature


@pytest.mark.parametrize("case", ONE_VALUE, ids=str)
@pytest.mark.parametrize("door", [*DOORS, *BY_DEFINITION], ids=lambda door: door.name)
def test_one_value_of_each_feature(door: Door, case: Good):
    dy, x, scale, bias, keywords = case.arrays(np.float32)
    axis, mask = case.axis, keywords.get("mask")
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    allowed = {**keywords, "allow_one_value": True}
    y, statistics = door.batch_norm(x, scale, bias, **allowed)
    near(y, wanted.y, ROUNDING[FLOAT32])
    for found in (statistics, door.batch_statistics(x, axis=axis, mask=mask)):
        near(found.count, np.broadcast_to(wanted.count, scale.shape), ROUNDING[FLOAT32])
        near(found.mean, wanted.mean, ROUNDING[FLOAT32])
        np.testing.assert_array_equal(found.var, np.zeros(scale.shape))
    gradients = door.batch_norm_gradients(dy, x, scale, bias, **allowed)
    right = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
    for name, gradient in gradients.items():
        near(gradient, right[name], ROUNDING[FLOAT32], name)


def test_one_value_of_each_feature_is_its_bias(door: Door):
    bias = np.float32([1, -2, 0.1])
    for value in (3.0, -1e38, 1e-40):
        y, _ = door.batch_norm(np.full(3, value, np.float32), None, bias, allow_one_value=True)
        np.testing.assert_array_equal(y, bias)


@pytest.mark.parametrize(
    "door",
    [door for door in (*DOORS, *BY_DEFINITION) if not door.name.startswith("numpy")],
    ids=lambda door: door.name,
)
@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_gradients_of_normalize(door: Door, case: Good):
    def normalize(**arguments):
        return door.functions.normalize(**arguments), None

    dy, x, scale, bias, keywords = case.arrays(np.float32)
    residual = keywords.pop("residual", None)
    mean, var = bias / 2 + 3, scale * 3
    arrays = {"x": x, "scale": scale, "bias": bias, "mean": mean, "var": var}
    if residual is not None:
        arrays["residual"] = residual
    evaluation = replace(door, functions=SimpleNamespace(batch_norm=normalize))
    with door.kernels():
        got = door.gradients(evaluation, dy, arrays, keywords)
    wanted = truth.batch_norm_gradients(
        dy, x, scale, bias, residual=residual, given=(mean, var), **keywords
    )
    for name, gradient in got.items():
        assert gradient.shape == arrays[name].shape, name
        near(gradient, wanted[name], ROUNDING[FLOAT32], name)


# ---- running statistics and merging


@pytest.mark.parametrize("correction", [0, 1])
def test_update_running(door: Door, correction: int):
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    mean, var = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    new_mean, new_var = door.update_running(
        door.array(mean),
        door.array(var),
        door.call("batch_statistics", x),
        rate=0.25,
        correction=correction,
    )
    x = np.float64(x)
    near(door.numpy(new_mean), 0.75 * mean + 0.25 * x.mean(0), ROUNDING[FLOAT32])
    near(door.numpy(new_var), 0.75 * var + 0.25 * x.var(0, ddof=correction), ROUNDING[FLOAT32])


def test_narrow_running_statistics_move_on(door: Door, dtype: np.dtype):
    x = np.random.default_rng(0).normal(3.5, 2, (50, 3)).astype(np.float32)
    statistics = door.call("batch_statistics", x)
    mean, var = (door.array(each((3,)).astype(dtype)) for each in (np.zeros, np.ones))
    for _ in range(2000):
        mean, var = door.update_running(mean, var, statistics, rate=0.01)
    assert door.numpy(mean).dtype == door.numpy(var).dtype == np.promote_types(dtype, FLOAT32)
    near(door.numpy(mean), x.mean(0, dtype=np.float64), 1e-5)
    near(door.numpy(var), x.var(0, dtype=np.float64), 1e-5)


@pytest.mark.parametrize(
    "door", [door for door in DOORS if FLOAT64 in door.dtypes], ids=lambda door: door.name
)
def test_running_statistics_wider_than_the_batch_stay_so(door: Door):
    statistics = door.call("batch_statistics", np.float32([[1], [2]]))
    mean, var = (door.array(np.full(1, 1 / 3)) for _ in range(2))
    mean, var = door.update_running(mean, var, statistics, rate=0.5)
    near(door.numpy(mean), [(1 / 3 + 1.5) / 2], 1e-15)
    near(door.numpy(var), [(1 / 3 + 0.25) / 2], 1e-15)


def test_narrow_running_statistics_do_not_overflow(door: Door):
    statistics = door.call("batch_statistics", np.float32([[1e5], [3e5]]))
    mean, var = (door.array(np.ones(1, np.float16)) for _ in range(2))
    mean, var = door.update_running(mean, var, statistics, rate=0.5)
    near(door.numpy(mean), [100000.5], ROUNDING[FLOAT32])
    near(door.numpy(var), [0.5e10 + 0.5], ROUNDING[FLOAT32])


def test_update_running_leaves_a_feature_with_one_value(door: Door):
    statistics = door.call("batch_statistics", np.float32([[5.0]]))
    ones = door.array(np.ones(1, np.float32))
    mean, var = door.update_running(ones, ones, statistics, rate=0.5, correction=1)
    assert (door.numpy(mean), door.numpy(var)) == (1, 1)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rate": 1.5}, ValueError, r"rate must be within \[0, 1\], but got 1.5"),
        ({"rate": -0.1}, ValueError, r"rate must be within \[0, 1\], but got -0.1"),
        ({"rate": float("nan")}, ValueError, r"rate must be within \[0, 1\], but got nan"),
        ({"rate": "fast"}, TypeError, r"rate must be a number within \[0, 1\], but got 'fast'"),
        ({"rate": 0.1, "correction": 2}, ValueError, "correction must be 0 .* but got 2"),
    ],
)
def test_update_running_refuses(door: Door, keywords, error, message):
    statistics = door.call("batch_statistics", np.ones((4, 3), np.float32))
    running = door.array(np.ones(3, np.float32))
    with pytest.raises(error, match=message):
        door.update_running(running, running, statistics, **keywords)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_update_running_refuses_what_cannot_move(door: Door, dtype):
    statistics = door.functions.batch_statistics(door.array(np.ones((5, 3), np.float32)))
    right, wrong = door.array(np.zeros(3, np.float32)), door.array(np.zeros(3, dtype))
    with pytest.raises(TypeError, match="mean must be an array of real floating-point"):
        door.update_running(wrong, right, statistics, rate=0.1)
    with pytest.raises(TypeError, match="var must be an array of real floating-point"):
        door.update_running(right, wrong, statistics, rate=0.1)


def test_update_running_refuses_another_shape(door: Door):
    statistics = door.call("batch_statistics", np.ones((4, 3), np.float32))
    right, wrong = (door.array(np.ones(n, np.float32)) for n in (3, 1))
    with pytest.raises(ValueError, match=r"mean must have the shape \(3,\)"):
        door.update_running(wrong, right, statistics, rate=0.1)
    with pytest.raises(ValueError, match=r"var must have the shape \(3,\)"):
        door.update_running(right, wrong, statistics, rate=0.1)


def test_merged_parts_are_the_whole(door: Door):
    x = (np.random.default_rng(0).normal((0, 100, 1e4), 1, (90, 3))).astype(np.float32)
    whole = truth.batch_norm(x)
    merged = door.call("batch_statistics", x[:1])
    for part in (x[1:1], x[1:8], x[8:80], x[80:]):
        merged = merged.merge(door.call("batch_statistics", part))
    np.testing.assert_allclose(door.numpy(merged.count), 90)
    np.testing.assert_allclose(door.numpy(merged.mean), whole.mean, rtol=1e-6)
    np.testing.assert_allclose(door.numpy(merged.var), whole.var, rtol=1e-3)


def _merged(door: Door, *sets):
    """Of (count, mean, var) each, of one feature for each set of the list."""
    first, *others = (
        Statistics(*(door.array(np.float32(each)) for each in zip(*features, strict=True)))
        for features in sets
    )
    for other in others:
        first = first.merge(other)
    return [door.numpy(each) for each in first]


def test_an_empty_set_changes_nothing(door: Door):
    some = [
        *((7.0, 0.1, 3.3), (1.0, -3e38, 0.0), (3e7, 1e-40, 1e-38), (2.0, 1e30, np.inf)),
        *((2.0, np.inf, np.nan), (2.0, -np.inf, 1.0), (2.0, np.nan, np.nan), (0.0, 0.0, 0.0)),
        (np.nan, np.nan, np.nan),
    ]
    nothing = [(0.0, 0.0, 0.0)] * len(some)
    for sets in ((some, nothing), (nothing, some), (nothing, some, nothing)):
        merged = _merged(door, *sets)
        np.testing.assert_array_equal(merged, np.float32(some).T)


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("one", "other", "mean", "var"),
    [
        ((3, INF, NAN), (5, 1, 2), INF, NAN),
        ((3, -INF, NAN), (5, 1, 2), -INF, NAN),
        ((3, INF, NAN), (5, INF, NAN), INF, NAN),
        ((3, INF, NAN), (5, -INF, NAN), NAN, NAN),
        ((3, NAN, NAN), (5, 1, 2), NAN, NAN),
        ((3, NAN, NAN), (5, INF, NAN), NAN, NAN),
        ((3, INF, 0), (5, 1, 2), INF, INF),  # the one is infinitely far from the other
        ((3, 1e30, INF), (5, 1e30, INF), 1e30, INF),
        ((3, 0, INF), (5, 1, 2), 0.625, INF),
        ((1, INF, NAN), (2**25, 1, 2), INF, NAN),  # of which it is no part that a float32 holds
        ((4, 3e38, 0), (4, -3e38, 0), 0, INF),  # whose difference no float32 holds
        ((4, 3e38, 0), (12, -3e38, 0), -1.5e38, INF),
        ((1, 0, 0), (2**20, 1e20, 0), 1e20, 1e40 / 2**20),  # nor the square of it
        ((3, 1234.567, 0), (5, 1234.567, 0), 1234.567, 0),
    ],
)
def test_merged_at_the_ends_of_the_range(door: Door, one, other, mean, var):
    for sets in (([one], [other]), ([other], [one])):
        count, got_mean, got_var = _merged(door, *sets)
        np.testing.assert_array_equal(count, [np.float32(one[0] + other[0])])
        np.testing.assert_allclose(got_mean, [np.float32(mean)], rtol=1e-5)
        np.testing.assert_allclose(got_var, [np.float32(var)], rtol=1e-5)


# ---- bad input


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_refused(door: Door, case: Bad):
    if case.of_values and not door.looks_at_values:
        result = case.call(door)
        assert np.isnan(door.numpy(result[0])).all(), "a lazy door marks what it cannot refuse"
    else:
        with pytest.raises(case.error, match=case.message):
            case.call(door)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("batch_norm", "scale"),
        ("batch_norm", "bias"),
        ("normalize", "mean"),
        ("normalize", "var"),
        ("update_running", "mean"),
        ("update_running", "var"),
    ],
)
def test_what_is_not_floating_point_is_refused(door: Door, function: str, name: str, dtype: str):
    x, right = (door.array(np.ones(shape, np.float32)) for shape in ((6, 4), 4))
    pair, statistics = {"mean": right, "var": right}, door.functions.batch_statistics(x)
    arguments = {
        "batch_norm": {"x": x},
        "normalize": {"x": x, **pair},
        "update_running": {**pair, "statistics": statistics, "rate": 0.1},
    }[function]
    arguments[name] = door.array(np.ones(4, dtype))
    with pytest.raises(TypeError, match=f"{name} must be an array of real .* dtype is .*{dtype}"):
        getattr(door.functions, function)(**arguments)
