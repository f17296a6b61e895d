"""The native core: that it serves, on any number of threads, from many at once, after a fork."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import batchnorm
import batchnorm.numpy as bn
from batchnorm import native
from batchnorm.torch import _stages as torch_stages

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def _threads():
    before = native._cpu.num_threads()
    yield
    batchnorm.set_num_threads(before)


def test_native_kernels_serve():
    """The suite means nothing about the kernels where they were not built."""
    assert native._cpu is not None, batchnorm.native_status()
    assert batchnorm.native_status().startswith("Native kernels serve, with ")


def test_status_names_the_number_of_threads():
    batchnorm.set_num_threads(1)
    assert batchnorm.native_status().endswith("up to 1 thread.")
    batchnorm.set_num_threads(3)
    assert batchnorm.native_status().endswith("up to 3 threads.")


@pytest.mark.parametrize(
    ("threads", "error", "message"),
    [
        (0, ValueError, r"threads must be within \[1, 1024\], but got 0"),
        (-2, ValueError, "but got -2"),
        (2000, ValueError, "but got 2000"),
        (1.0, TypeError, "threads must be an integer, but got 1.0"),
        (True, TypeError, "but got True"),
        ("2", TypeError, "but got '2'"),
    ],
)
def test_set_num_threads_refuses(threads, error, message):
    before = native._cpu.num_threads()
    with pytest.raises(error, match=message):
        batchnorm.set_num_threads(threads)
    assert native._cpu.num_threads() == before


SHAPES = [
    ((32, 14, 14, 64), -1),
    ((16, 64, 28, 28), 1),
    ((2, 3, 300_000), 1),
    ((400_000, 3), 1),
    ((1, 700_000), 0),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_results_do_not_depend_on_the_number_of_threads(shape, axis):
    x = (np.random.default_rng(0).normal(size=shape) * 3 + 100).astype(np.float32)
    dy = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        batchnorm.set_num_threads(threads)
        y, statistics = bn.batch_norm(x, axis=axis)
        gradients = bn.batch_norm_gradients(
            dy, x, statistics, np.ones(statistics.mean.shape), axis=axis
        )
        results.append((y, statistics.mean, statistics.var, gradients.x))
    for other in results[1:]:
        for one, many in zip(results[0], other, strict=True):
            assert np.abs(one - many).max() <= 1e-6 * np.abs(one).max()


def test_calls_from_many_threads_at_once():
    batchnorm.set_num_threads(4)
    inputs = [np.random.default_rng(i).normal(size=(3000, 64)).astype(np.float32) for i in range(8)]
    wanted = [bn.batch_norm(x)[0] for x in inputs]
    failures = []

    def work(x, y):
        for _ in range(20):
            if not np.array_equal(bn.batch_norm(x)[0], y):
                failures.append(x)

    workers = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not failures


def test_the_gil_is_released():
    """Another thread goes on while a kernel runs; were the lock held, it would wait for the end."""
    x = np.zeros((1 << 23, 4), np.float32)
    batchnorm.set_num_threads(1)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(1e-4):
            ticks.append(None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # so that nothing but a release lets the ticker in
    try:
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        before = len(ticks)
        for _ in range(5):
            bn.batch_statistics(x)
        seen = len(ticks) - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
    ticker.join(10)
    assert seen > 5


def test_a_forked_child_computes():
    program = """
import os, sys, warnings
import numpy as np
import batchnorm, batchnorm.numpy as bn
warnings.simplefilter("ignore")
batchnorm.set_num_threads(4)
x = np.random.default_rng(0).normal(size=(100_000, 16)).astype(np.float32)
wanted = bn.batch_norm(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(bn.batch_norm(x)[0], wanted) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert np.array_equal(bn.batch_norm(x)[0], wanted)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_more_than_two_to_the_31_elements():
    """Pages of zeros that are only read take no memory of their own: 4 GiB of float16 cost none."""
    rows = (1 << 31) // 8 + 1
    x = np.zeros((rows, 8), np.float16)
    x[-1] = np.arange(8) * 100
    statistics = bn.batch_statistics(x)
    np.testing.assert_array_equal(statistics.count, rows)
    np.testing.assert_allclose(statistics.mean, np.arange(8) * 100 / rows)
    tall = bn.batch_statistics(x.reshape(1, -1), axis=0)
    np.testing.assert_allclose(tall.mean, 2800 / (8 * rows))
    np.testing.assert_allclose(
        tall.var, np.sum((np.arange(8) * 100.0) ** 2) / (8 * rows), rtol=1e-5
    )


def run_beside(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """`program` in a new process that imports the batchnorm in `folder`, not the installed one."""
    first = """
import sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""
    return subprocess.run(
        [sys.executable, "-c", first + program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


@pytest.fixture
def without_native(tmp_path):
    """A folder with the package as it is after an installation without a compiler."""
    package = Path(batchnorm.__file__).parent
    ignored = shutil.ignore_patterns("_cpu*", "__pycache__")
    shutil.copytree(package, tmp_path / "batchnorm", ignore=ignored)
    return tmp_path


def test_a_package_without_its_native_module_says_so(without_native):
    program = """
import numpy as np, batchnorm, batchnorm.numpy as bn
assert batchnorm.native_status().startswith("Native kernels are not built")
batchnorm.set_num_threads(2)
y, statistics = bn.batch_norm(np.float32([[1, 2], [3, 6]]))
assert np.allclose(y, [[-1, -1], [1, 1]], atol=1e-4) and y.dtype == np.float32
"""
    result = run_beside(without_native, program)
    assert result.returncode == 0, result.stderr


def test_a_broken_native_module_is_an_error(without_native):
    (without_native / "batchnorm" / "_cpu.abi3.so").write_bytes(b"not a library")
    result = run_beside(without_native, "import batchnorm")
    assert result.returncode != 0
    assert "ImportError" in result.stderr


def test_importing_the_package_imports_no_framework():
    program = """
import sys, batchnorm
loaded = {"jax", "flax", "torch", "mlx", "onnx", "tensorflow"} & set(sys.modules)
assert not loaded, loaded
doors = {name for name in sys.modules if name.startswith("batchnorm.")}
assert doors <= {"batchnorm.native", "batchnorm._cpu"}, doors
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- every instruction set, and tensors beyond the cache


@pytest.fixture(params=native.instruction_sets())
def level(request):
    """Each instruction set of this machine in turn."""
    before = native._cpu.instruction_set()
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(before)


@pytest.fixture(params=["within the cache", "beyond the cache"])
def reach(request):
    """Small tensors on their own way, and on the way of tensors that the cache does not hold."""
    before = native._cpu.last_level_cache_bytes()
    if request.param == "beyond the cache":
        native._cpu.set_last_level_cache_bytes(0)
    yield request.param
    native._cpu.set_last_level_cache_bytes(before)


def test_the_widest_instruction_set_serves():
    assert native.instruction_sets()[0] == native._cpu.instruction_set()
    assert native.instruction_sets()[0] in batchnorm.native_status()


def test_an_instruction_set_that_is_not_there_is_refused():
    before = native._cpu.instruction_set()
    with pytest.raises(ValueError, match=r"of this machine .* but got 'AVX-1024'"):
        native.set_instruction_set("AVX-1024")
    assert native._cpu.instruction_set() == before


def test_a_level_is_used_once_it_is_set(level):
    assert native._cpu.instruction_set() == level
    assert level in batchnorm.native_status()


LAYOUTS = [((64, 5), -1), ((300, 70), -1), ((9, 2100), -1), ((6, 3, 7), 1), ((5, 4, 333), 1)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_levels_compute_the_truth(level, reach, dtype, activation, masked):
    random = np.random.default_rng(0)
    tolerance = {"float64": 1e-11, "float32": 3e-5, "float16": 3e-3, "bfloat16": 3e-2}
    for shape, axis in LAYOUTS:
        x, dy, residual = (random.normal(size=shape).astype(dtype) for _ in range(3))
        keywords = {"axis": axis, "activation": activation, "residual": residual}
        if masked:
            one = list(shape)
            one[axis] = 1
            keywords["mask"] = random.random(one) < 0.7
        scale, bias = random.normal(size=(2, shape[axis]))
        y, statistics = bn.batch_norm(x, scale, bias, **keywords)
        gradients = bn.batch_norm_gradients(dy, x, statistics, scale, bias, **keywords)
        wanted = truth.batch_norm(x, scale, bias, **keywords)
        wanted_gradients = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
        pairs = {"y": (y, wanted.y)}
        for name in ("x", "scale", "bias", "residual"):
            pairs[name] = (getattr(gradients, name), wanted_gradients[name])
        for name, (got, want) in pairs.items():
            error = np.abs(np.float64(got) - want).max() / (1 + np.abs(want).max())
            assert error <= tolerance[np.dtype(dtype).name], (name, shape, error)


@pytest.mark.parametrize("cache", [0, 1 << 21, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 150, 257])
def test_blocks_of_channels(channels, threads, cache):
    """Shared by all threads or each of one thread, with another one to come or none."""
    random = np.random.default_rng(0)
    shape = (6, channels, 400)
    x, dy = random.normal(size=(2, *shape)).astype(np.float32)
    scale, bias = random.normal(size=(2, channels))
    before = native._cpu.last_level_cache_bytes(), native._cpu.num_threads()
    native._cpu.set_last_level_cache_bytes(cache)
    native.set_num_threads(threads)
    try:
        y, statistics = bn.batch_norm(x, scale, bias, axis=1)
        gradients = bn.batch_norm_gradients(dy, x, statistics, scale, bias, axis=1)
    finally:
        native._cpu.set_last_level_cache_bytes(before[0])
        native.set_num_threads(before[1])
    wanted = truth.batch_norm(x, scale, bias, axis=1)
    wanted_gradients = truth.batch_norm_gradients(dy, x, scale, bias, axis=1)
    np.testing.assert_allclose(y, wanted.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-5)
    for name in ("x", "scale", "bias"):
        np.testing.assert_allclose(
            getattr(gradients, name), wanted_gradients[name], rtol=1e-4, atol=1e-4, err_msg=name
        )


def accuracy_inputs():
    """The inputs that break other implementations: values, tolerance of mean and of std."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((200_000, 3))
    yield "large mean", (1e4 + 3e-4 * np.arange(3) + 0.01 * normal).astype(np.float32)
    yield "huge", (1e30 * np.sign(normal)).astype(np.float32)
    yield "float16 far from 0", (350 + 25 * normal).clip(300, 400).astype(np.float16)
    yield "float16 large", (300 * normal).astype(np.float16)


@pytest.mark.parametrize("layout", ["features last", "features first"])
def test_levels_are_accurate(level, reach, layout):
    for name, x in accuracy_inputs():
        wanted = truth.batch_norm(x)
        if layout == "features first":
            y, statistics = bn.batch_norm(np.ascontiguousarray(x.T), axis=0)
            y = y.T
        else:
            y, statistics = bn.batch_norm(x)
        y = np.float64(y)
        assert np.abs(y.std(axis=0) - wanted.y.std(axis=0)).max() <= 1e-3, name
        assert np.abs(y.mean(axis=0)).max() <= 1e-3, name
        np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("far", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize(("images", "pixels"), [(32, 49), (8, 3136), (25_000, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_levels_bear_a_start_far_off(level, images, pixels, far, masked):
    """The first elements are those from which sums of squares begin to be taken."""
    random = np.random.default_rng(0)
    x = random.standard_normal((images * pixels, 3)).astype(np.float32)
    x[:far] += 1e4
    mask = random.random((len(x), 1)) < 0.5 if masked else None
    wanted = truth.batch_norm(x, mask=mask).var

    def folded(rows):
        return rows.reshape(images, pixels, -1).swapaxes(1, 2).copy()

    mask = None if mask is None else folded(mask)
    found = bn.batch_norm(folded(x), axis=1, mask=mask)[1].var
    np.testing.assert_allclose(found, wanted, rtol=8e-6)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_levels_round_to_nearest(level, dtype):
    """The bits of a float32 come as a bias: of all kinds, and a NaN with every bit set."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 50_000, np.uint32)
    ties = bits & 0xFFFF0000 | 0x8000
    edges = np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x80018000])
    bias = np.concatenate([edges, ties, bits]).view(np.float32)
    zeros, ones = np.zeros(bias.size), np.ones(bias.size)
    with np.errstate(all="ignore"):
        wanted = bias.astype(dtype)
        y = bn.normalize(np.ones((1, bias.size), dtype), zeros, ones, zeros, bias)
    np.testing.assert_array_equal(np.float32(y[0]), np.float32(wanted))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_levels_follow_activations_to_their_ends(level, dtype, activation):
    inside = np.array([-5, -0.5, 0, 0.5, 5], dtype)
    z = np.array([-np.inf, -1e30, -1000, -90, *inside, 90, 1e30, np.inf, np.nan], dtype)
    zeros, ones = np.zeros(z.size), np.ones(z.size)
    x = np.zeros((1, z.size), dtype)
    y = bn.normalize(x, zeros, ones, bias=z, activation=activation)[0]
    statistics = bn.Statistics(ones, zeros, ones)
    dy = np.ones_like(x)
    gradients = bn.batch_norm_gradients(dy, x, statistics, bias=z, activation=activation)
    if activation == "relu":
        wanted, slope, slope_at_nan = np.maximum(inside, 0), inside > 0, 1
    else:
        sigmoid = 1 / (1 + np.exp(-inside.astype(np.float64)))
        wanted, slope = inside * sigmoid, sigmoid * (1 + inside * (1 - sigmoid))
        slope_at_nan = np.nan
    few_units = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, [0, 0, 0, 0, *wanted, *z[9:]], rtol=few_units, atol=1e-35)
    slope = [0, 0, 0, 0, *slope, 1, 1, 1, slope_at_nan]
    np.testing.assert_allclose(gradients.bias, slope, rtol=few_units, atol=few_units)


# ---- how x lies in memory


@st.composite
def dense_arrays(draw):
    """An array without gaps, its axes in any order in memory, and its feature axes."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    axes = list(range(len(sizes)))
    order = draw(st.permutations(axes))
    array = np.zeros([sizes[axis] for axis in order]).transpose(np.argsort(order))
    features = draw(st.sets(st.sampled_from(axes), min_size=1, max_size=len(axes) - 1))
    return array, tuple(sorted(features))


@given(dense_arrays())
def test_numpy_and_torch_see_the_same_layout(case):
    """NumPy's door has one less often: not where axes of size 1 lie between the feature axes.

    Of one channel, outer and inner may be told apart in two ways.
    """
    x, features = case
    call = bn._Call(x, None, None, features, 1e-5, None, None, None)
    strides = tuple(stride // x.itemsize for stride in x.strides)
    layout = torch_stages._layout(x.shape, strides, features)
    if call.native:
        assert layout is not None
        outer, channels, inner = call.shape
        assert channels == layout.channels
        assert outer * inner == layout.outer * layout.inner
        assert channels == 1 or inner == layout.inner
