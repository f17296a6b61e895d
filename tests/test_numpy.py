"""What NumPy users expect of the NumPy door: memory layouts, out=, dtypes, lists."""

import subprocess
import sys
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest
import truth
from doors import without_native
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchnorm.numpy import (
    Statistics,
    batch_norm,
    batch_norm_gradients,
    batch_statistics,
    normalize,
    update_running,
)


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


LAYOUTS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "channels last in memory": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(
        0, 3, 1, 2
    ),
    "every second": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "backwards": lambda x: x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "broadcast": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "offset": lambda x: (
        np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, -1, (1, 2), (0, 3)])
def test_memory_layouts(layout: str, axis):
    x, dy, residual = (LAYOUTS[layout](random(5, 4, 6, 3, seed=seed)) for seed in range(3))
    x.flags.writeable = False
    before = x.copy()
    keywords = {"axis": axis, "residual": residual, "activation": "relu"}
    shape = batch_statistics(x, axis=axis).mean.shape
    scale, bias = random(*shape), random(*shape, seed=1)
    y, statistics = batch_norm(x, scale, bias, **keywords)
    np.testing.assert_allclose(y, truth.batch_norm(x, scale, bias, **keywords).y, atol=1e-5)
    gradients = batch_norm_gradients(dy, x, statistics, scale, bias, **keywords)
    wanted = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
    for name in ("x", "scale", "bias", "residual"):
        np.testing.assert_allclose(getattr(gradients, name), wanted[name], atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(x, before)


def test_the_output_keeps_a_dense_layout():
    x = np.asfortranarray(random(6, 4, 5))
    assert batch_norm(x, axis=1)[0].flags.f_contiguous


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_out(axis):
    x = random(6, 4, 5)
    wanted = batch_norm(x, axis=axis)[0]
    shape = batch_statistics(x, axis=axis).mean.shape
    wanted_normalized = normalize(x, np.zeros(shape), np.ones(shape), axis=axis)
    for out in (
        np.empty_like(x),
        np.empty_like(x, order="F"),
        np.empty((12, 4, 5), np.float32)[::2],
        np.empty((6, 4, 5), np.float32)[::-1],
    ):
        y, _ = batch_norm(x, axis=axis, out=out)
        assert y is out
        np.testing.assert_array_equal(out, wanted)
        y = normalize(x, np.zeros(shape), np.ones(shape), axis=axis, out=out)
        assert y is out
        np.testing.assert_array_equal(out, wanted_normalized)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_out_may_overlap_what_comes_in(activation):
    memory = random(9, 4)
    for first, last in ((0, 8), (1, 9)):
        for residual in (None, memory[1:9].copy()):
            wanted, _ = batch_norm(memory[:8], residual=residual, activation=activation)
            copy = memory.copy()
            y, _ = batch_norm(
                copy[:8], residual=residual, activation=activation, out=copy[first:last]
            )
            np.testing.assert_array_equal(y, wanted)
            assert np.shares_memory(y, copy)
    residual = random(8, 4, seed=2)
    wanted, _ = batch_norm(memory[:8], residual=residual)
    y, _ = batch_norm(memory[:8], residual=residual, out=residual)
    assert y is residual
    np.testing.assert_array_equal(residual, wanted)


@pytest.mark.parametrize("by_definition", [False, True])
@pytest.mark.parametrize("name", ["scale", "bias", "residual", "mask", "mean", "var"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_out_may_overlap_any_argument(name: str, dtype, by_definition: bool):
    x = random(64, 4, dtype=dtype)
    for shift in (0, 1, 3):
        memory = np.zeros(300, dtype)
        out = memory[8:264].reshape(64, 4)
        size = 256 if name in ("residual", "mask") else 4
        argument = memory[8 + shift : 8 + shift + size].reshape(-1, 4)
        argument[...] = 0.1 + np.abs(random(*argument.shape, seed=1, dtype=dtype))
        argument = argument if size > 4 else argument[0]
        arguments = {"mean": np.zeros(4), "var": np.ones(4)} if name in ("mean", "var") else {}
        arguments[name] = argument
        function = normalize if name in ("mean", "var") else batch_norm
        copies = {key: value.copy() for key, value in arguments.items()}
        wanted = function(x, **copies)
        with without_native() if by_definition else nullcontext():
            got = function(x, **arguments, out=out)
        if function is batch_norm:
            np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5)
            got, wanted = got[0], wanted[0]
        assert got is out
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_results_share_no_memory():
    x, dy, scale = random(8, 4), random(8, 4, seed=1), np.ones(4, np.float32)
    _, statistics = batch_norm(x, scale, scale, residual=x)
    gradients = batch_norm_gradients(dy, x, statistics, scale, scale, residual=x)
    mean, var = np.zeros(4), np.ones(4)
    still = update_running(mean, var, batch_statistics(x[:0]), rate=0.0)
    arrays = [x, dy, scale, *statistics, *gradients, mean, var, *still]
    for i, one in enumerate(arrays):
        assert not any(np.shares_memory(one, other) for other in arrays[:i])


RESIZING = """
import itertools, sys
import numpy as np
from batchnorm.numpy import Statistics, batch_norm, batch_norm_gradients, normalize, update_running

ROWS = 3_000_000  # more than malloc keeps


class Own(np.ndarray):
    "Of which a plain array is a view."


class Resizing:
    def __init__(self, values, victim):
        self.values, self.victim = values, victim

    def __array__(self, dtype=None, copy=None):
        self.victim.resize((2, 4), refcheck=False)
        return self.values


def own(array):
    made = np.ndarray.__new__(Own, array.shape, array.dtype)
    made[...] = array
    return made


def call(function, **arguments):
    try:
        function(**arguments)
    except ValueError:  # shapes that do not go together
        pass


large, row = np.ones((ROWS, 4), np.float32), np.ones(4)
for make in (np.copy, own):
    for name in ("scale", "bias", "mask"):
        x = make(large)
        call(batch_norm, x=x, **{name: Resizing(row, x)})
    for name, victim in itertools.product(("scale", "residual"), ("x", "dy", "residual")):
        if name != victim:
            arguments = {"x": make(large), "dy": make(large), "residual": make(large)}
            values = large if name == "residual" else row
            arguments[name] = Resizing(values, arguments[victim])
            call(batch_norm_gradients, statistics=Statistics(row, row, row), **arguments)
    x = make(large)
    call(normalize, x=x, mean=row, var=Resizing(row, x))
    mean = make(np.ones((ROWS, 4)))
    statistics = Statistics(row, row, Resizing(row, mean))
    call(update_running, mean=mean, var=np.ones((ROWS, 4)), statistics=statistics, rate=0.1)
print("lived")
"""


@pytest.mark.parametrize("by_definition", [False, True])
def test_an_argument_that_resizes_another(by_definition: bool):
    """What is looked at is what is there, once every argument is an array."""
    without = "import batchnorm.native; batchnorm.native.kernels = None\n"
    program = (without if by_definition else "") + RESIZING
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr


ENDING = """
import resource
import numpy as np
import batchnorm.native
from batchnorm.numpy import batch_norm

batchnorm.native.kernels = None
x, out = np.ones((4_000_000, 4), np.float32), np.zeros((4_000_000, 4), np.float32)
batch_norm(x[:8], out=np.empty_like(x[:8]))  # imports what it needs while there is memory
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
for more in range(0, 600, 50):
    resource.setrlimit(resource.RLIMIT_AS, (used + more * 2**20, resource.RLIM_INFINITY))
    try:
        batch_norm(x, out=out)
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert not out.any() and (x == 1).all(), more
        print("ended")
"""


def test_out_stays_as_it_was_where_memory_ends():
    done = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ended" in done.stdout


def test_out_is_checked():
    x = random(6, 4)
    read_only = np.empty_like(x)
    read_only.flags.writeable = False
    for out, error, message in (
        (np.empty((6, 5), np.float32), ValueError, r"out must have the shape \(6, 4\)"),
        (np.empty((6, 4)), ValueError, "dtype float32 of x, but it is of dtype float64"),
        (read_only, ValueError, "out must be writeable .* but it is read-only"),
        ([[0.0] * 4] * 6, TypeError, "out must be a NumPy array, but got list"),
        (np.ma.masked_array(x), TypeError, "out must not be a masked array.*Pass out.data"),
    ):
        with pytest.raises(error, match=message):
            batch_norm(x, out=out)


def test_bad_input_leaves_out_as_it_was():
    out = np.zeros((6, 4), np.float32)
    with pytest.raises(ValueError, match="scale"):
        batch_norm(random(6, 4), np.ones(3), out=out)
    np.testing.assert_array_equal(out, 0)


def test_lists_are_arrays():
    y, statistics = batch_norm([[1.0, 2.0], [3.0, 6.0]], [1.0, 2.0], [0.0, 1.0])
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, [[-1, -1], [1, 3]], atol=1e-4)
    np.testing.assert_array_equal(statistics.mean, [2, 4])


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (np.ones((3, 2), np.uint8), "uint8"),
        (np.ones((3, 2), object), "object"),
        (np.array([["a", "b"]]), "<U1"),
        (np.ones((3, 2), "datetime64[s]"), "datetime64"),
        (np.ones((3, 2), ml_dtypes.float8_e4m3fn), "float8"),
    ],
)
def test_other_dtypes_are_refused(x, dtype):
    with pytest.raises(TypeError, match=f"x must be an array of real .*{dtype}"):
        batch_norm(x)


def test_long_double_is_computed_in_long_double():
    x = random(50, 3, dtype=np.longdouble)
    y, _ = batch_norm(x)
    assert y.dtype == np.longdouble
    np.testing.assert_allclose(y, truth.batch_norm(x).y, rtol=1e-12)


def test_bfloat16():
    x = random(64, 5).astype(ml_dtypes.bfloat16)
    y, statistics = batch_norm(x, np.ones(5, ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    wanted = truth.batch_norm(x)
    np.testing.assert_array_equal(y, wanted.y.astype(np.float32).astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(statistics.mean, wanted.mean, rtol=1e-6)


def test_a_residual_that_is_broadcast_has_a_gradient_of_its_shape():
    x, dy, residual = random(6, 4, 5), random(6, 4, 5, seed=1), random(4, 1, seed=2)
    _, statistics = batch_norm(x, axis=1, residual=residual)
    gradients = batch_norm_gradients(dy, x, statistics, axis=1, residual=residual)
    np.testing.assert_allclose(gradients.residual, dy.sum((0, 2))[:, None], rtol=1e-5)


def test_gradients_check_what_they_are_given():
    x = random(6, 4)
    _, statistics = batch_norm(x)
    for dy, wrong, message in (
        (random(6, 5), statistics, r"dy must have the shape \(6, 4\) of x"),
        (x, statistics._replace(mean=np.zeros(3)), r"statistics.mean must have the feature shape"),
        (
            x,
            statistics._replace(count=np.zeros(1)),
            r"statistics.count must have the feature shape",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            batch_norm_gradients(dy, x, wrong)
    with pytest.raises(TypeError, match="dy must be an array of real"):
        batch_norm_gradients(np.ones((6, 4), int), x, statistics)


@pytest.mark.parametrize("name", Statistics._fields)
@pytest.mark.parametrize("wrong", [1j, "1", None])
def test_statistics_that_are_no_real_numbers_are_refused(name, wrong):
    x = random(6, 4)
    statistics = batch_statistics(x)._replace(**{name: np.full(4, wrong)})
    for call in (
        lambda: batch_norm_gradients(x, x, statistics),
        lambda: update_running(np.zeros(4), np.ones(4), statistics, rate=0.1),
    ):
        with pytest.raises(TypeError, match=f"statistics.{name} must be an array of real"):
            call()


def test_a_count_may_be_an_integer():
    x = random(6, 4)
    statistics = batch_statistics(x)
    whole = statistics._replace(count=np.full(4, 6))
    np.testing.assert_array_equal(
        batch_norm_gradients(x, x, whole).x, batch_norm_gradients(x, x, statistics).x
    )
    running = np.zeros(4), np.ones(4)
    np.testing.assert_array_equal(
        update_running(*running, whole, rate=0.1), update_running(*running, statistics, rate=0.1)
    )


def test_running_statistics_keep_their_dtype():
    statistics = batch_statistics(random(9, 3))
    mean, var = update_running(
        np.zeros(3, np.float32), np.ones(3, np.float64), statistics, rate=0.1
    )
    assert (mean.dtype, var.dtype) == (np.float32, np.float64)


def test_statistics_of_a_memory_mapped_file(tmp_path):
    data = random(10_000, 3) * 5 + 1000
    np.save(tmp_path / "data.npy", data)
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    pooled = batch_statistics(mapped[:1000])
    for start in range(1000, 10_000, 1000):
        pooled = pooled.merge(batch_statistics(mapped[start : start + 1000]))
    wanted = truth.batch_norm(data)
    np.testing.assert_allclose(pooled.mean, wanted.mean, rtol=1e-8)
    np.testing.assert_allclose(pooled.var, wanted.var, rtol=1e-5)


# ---- properties

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
TOLERANCE = dict(zip(DTYPES, (1e-10, 1e-4, 1e-2, 5e-2), strict=True))


@st.composite
def calls(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=6))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=shape) * draw(st.sampled_from([0.1, 1.0, 20.0]))).astype(dtype)
    order = draw(st.permutations(range(len(shape))))
    x = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    x = x[tuple(slice(None, None, draw(st.sampled_from([1, 1, -1, 2]))) for _ in shape)]
    axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape) - 1))
    axis = tuple(each - len(shape) * draw(st.integers(0, 1)) for each in axes)
    mask = None
    if draw(st.booleans()):
        sides = [draw(st.sampled_from([1, size])) for size in x.shape]
        mask = generator.uniform(size=sides) * draw(st.sampled_from([1.0, 1e3]))
        mask[generator.uniform(size=sides) < 0.3] = 0
        if draw(st.booleans()):
            mask = mask > 0
    activation = draw(st.sampled_from([None, "silu"]))
    return x, {"axis": axis, "mask": mask, "activation": activation, "eps": 1e-2}


@settings(max_examples=300, deadline=None)
@given(calls())
def test_any_layout_axis_mask_and_dtype(call):
    x, keywords = call
    features = [each % x.ndim for each in keywords["axis"]]
    if np.prod([n for axis, n in enumerate(x.shape) if axis not in features]) == 1:
        return
    tolerance = TOLERANCE[x.dtype.type]
    y, statistics = batch_norm(x, **keywords)
    wanted = truth.batch_norm(x, **keywords)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(np.float64(y), wanted.y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(statistics.mean, wanted.mean, rtol=1e-4, atol=1e-4)
    gradients = batch_norm_gradients(np.ones_like(x), x, statistics, **keywords)
    wanted_gradients = truth.batch_norm_gradients(np.ones(x.shape), x, **keywords)
    scale = 1 + np.abs(wanted_gradients["x"]).max()
    np.testing.assert_allclose(
        np.float64(gradients.x), wanted_gradients["x"], rtol=0, atol=2 * tolerance * scale
    )
