"""The native core: that it serves, on any number of threads, from many at once, after a fork."""

import ast
import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm
import batchnorm.numpy as bn
import batchnorm.torch  # noqa: F401  # which registers its tensors
from batchnorm import native
from batchnorm.activations import ACTIVATIONS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def _threads():
    before = native.kernels.num_threads()
    yield
    batchnorm.set_num_threads(before)


def test_native_kernels_serve():
    """The suite means nothing about the kernels where they were not built."""
    assert native.kernels is not None, batchnorm.native_status()
    assert batchnorm.native_status().startswith("Native kernels serve, with ")


def test_status_names_no_door_that_is_not_imported():
    program = "import batchnorm; print(batchnorm.native_status())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert re.fullmatch(r"Native kernels serve, with \S+ and up to \d+ threads?\.\n", done.stdout)


def test_status_names_the_number_of_threads():
    batchnorm.set_num_threads(1)
    assert "and up to 1 thread. " in batchnorm.native_status()
    batchnorm.set_num_threads(3)
    assert "and up to 3 threads. " in batchnorm.native_status()
    assert " NumPy: served." in batchnorm.native_status()


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
    before = native.kernels.num_threads()
    with pytest.raises(error, match=message):
        batchnorm.set_num_threads(threads)
    assert native.kernels.num_threads() == before


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
    ignored = shutil.ignore_patterns("_cpu.*so", "__pycache__")
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
    (without_native / "batchnorm" / "native" / "_cpu.abi3.so").write_bytes(b"not a library")
    result = run_beside(without_native, "import batchnorm")
    assert result.returncode != 0
    assert "ImportError" in result.stderr


def test_importing_the_package_imports_no_framework():
    program = """
import sys, batchnorm
frameworks = {"jax", "flax", "equinox", "keras", "torch", "mlx", "onnx", "tensorflow"}
loaded = frameworks & set(sys.modules)
assert not loaded, loaded
doors = {name for name in sys.modules if name.startswith("batchnorm.")}
assert doors <= {"batchnorm.native", "batchnorm.native._cpu"}, doors
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- every instruction set, and tensors beyond the cache


@pytest.fixture(params=native.instruction_sets())
def level(request):
    """Each instruction set of this machine in turn."""
    before = native.kernels.instruction_set()
    native.set_instruction_set(request.param)
    yield request.param
    native.set_instruction_set(before)


@pytest.fixture(params=["within the cache", "beyond the cache"])
def reach(request):
    """Small tensors on their own way, and on the way of tensors that the cache does not hold."""
    before = native.kernels.last_level_cache_bytes()
    if request.param == "beyond the cache":
        native.kernels.set_last_level_cache_bytes(0)
    yield request.param
    native.kernels.set_last_level_cache_bytes(before)


def test_the_widest_instruction_set_serves():
    assert native.instruction_sets()[0] == native.kernels.instruction_set()
    assert native.instruction_sets()[0] in batchnorm.native_status()


def test_an_instruction_set_that_is_not_there_is_refused():
    before = native.kernels.instruction_set()
    with pytest.raises(ValueError, match=r"of this machine .* but got 'AVX-1024'"):
        native.set_instruction_set("AVX-1024")
    assert native.kernels.instruction_set() == before


def test_a_level_is_used_once_it_is_set(level):
    assert native.kernels.instruction_set() == level
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
    before = native.kernels.last_level_cache_bytes(), native.kernels.num_threads()
    native.kernels.set_last_level_cache_bytes(cache)
    native.set_num_threads(threads)
    try:
        y, statistics = bn.batch_norm(x, scale, bias, axis=1)
        gradients = bn.batch_norm_gradients(dy, x, statistics, scale, bias, axis=1)
    finally:
        native.kernels.set_last_level_cache_bytes(before[0])
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
def arrays_in_memory(draw):
    """An array, often without gaps, its axes in any order in memory; and its feature axes."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    axes = list(range(len(sizes)))
    order = draw(st.permutations(axes))
    gap = draw(st.sampled_from([0, 0, 0, 1]))
    memory = np.zeros([sizes[axis] + gap for axis in order])
    array = memory[tuple(slice(sizes[axis]) for axis in order)].transpose(np.argsort(order))
    if draw(st.integers(0, 9)) == 0:
        array = np.flip(array, draw(st.sampled_from(axes)))
    features = draw(st.sets(st.sampled_from(axes), min_size=1, max_size=len(axes) - 1))
    return array, tuple(sorted(features))


@settings(max_examples=500)
@given(arrays_in_memory())
def test_layout_is_where_the_elements_are(case):
    """[outer, channels, inner] in C order has an element of each channel where the array has it."""
    x, features = case
    strides = [stride // x.itemsize for stride in x.strides]
    layout = native.kernels.layout(x.shape, features, strides)
    shape = [x.shape[axis] for axis in features]
    channel_at = {}
    for index in np.ndindex(x.shape):
        offset = sum(i * stride for i, stride in zip(index, strides, strict=True))
        channel_at[offset] = np.ravel_multi_index([index[axis] for axis in features], shape)
    offsets = range(x.size)
    channels = math.prod(shape)
    in_memory = [channel_at.get(offset) for offset in offsets]
    possible = [
        (outer, channels, x.size // channels // outer)
        for outer in range(1, x.size // channels + 1)
        if x.size // channels % outer == 0
    ]
    fitting = [
        each
        for each in possible
        if in_memory == [offset // each[2] % channels for offset in offsets]
    ]
    assert layout in fitting if fitting else layout is None


def test_layout_of_no_elements_and_in_c_order():
    assert native.kernels.layout((0, 3), (1,)) == (0, 3, 1)
    assert native.kernels.layout((4, 3, 0), (1,), (7, -1, 0)) == (0, 3, 1)
    assert native.kernels.layout((2, 3, 4), (1,)) == (2, 3, 4)
    assert native.kernels.layout(features=(0, 2), shape=(2, 3, 4)) is None
    assert native.kernels.layout([2] * 40, (1,)) is None
    with pytest.raises(ValueError, match="must go with each other"):
        native.kernels.layout((2, 3), (2,))
    with pytest.raises(ValueError, match="must go with each other"):
        native.kernels.layout((2, 3), (1,), (1,))
    with pytest.raises(ValueError, match=r"features must ascend .* got \(1, 0\)"):
        native.kernels.layout((2, 3), (1, 0))


# ---- the boundary: each operand of each function

KINDS = ["NumPy", "PyTorch"]
N, C = 6, 4


def operands(kernel: str, kind: str = "NumPy") -> dict[str, Any]:
    """All that a kernel takes, for float32 x of shape (6, 4)."""
    random = np.random.default_rng(0)

    def array(*shape, dtype=np.float32):
        values = np.array(random.random(shape) + 1, dtype)
        return values if kind == "NumPy" else torch.from_numpy(values)

    like_x = {name: array(N, C) for name in ("x", "residual", "dy", "y", "dx", "dresidual")}
    vectors = ("scale", "bias", "mean", "var", "dscale", "dbias", "running_mean", "running_var")
    rows = {"statistics": array(3, C, dtype=np.float64), "sums": array(2, C, dtype=np.float64)}
    numbers = {"eps": 1e-5, "activation": "relu", "rate": 0.5, "correction": 1.0, "team": None}
    everything = {
        **like_x,
        **{name: array(C) for name in vectors},
        **rows,
        **numbers,
        "weights": array(N, 1),
        "batches": array(dtype=np.int64),
        "features": (1,),
    }
    return {name: everything[name] for name in NAMES[kernel]}


STATED = ast.parse((Path(native.__file__).parent / "_cpu.pyi").read_text())
NAMES = {
    function.name: [
        each.arg
        for each in function.args.kwonlyargs
        # One of the two ways to say what an output is normalized by.
        if not (each.arg in ("mean", "var") and "gradient" in function.name)
        and (each.arg, function.name) != ("statistics", "normalize")
    ]
    for function in STATED.body
    if isinstance(function, ast.FunctionDef) and function.args.kwonlyargs
}
ARRAYS = [
    (kernel, name)
    for kernel, names in NAMES.items()
    for name in names
    if name not in ("features", "eps", "activation", "rate", "correction", "team")
]
OPTIONAL = {"scale", "bias", "residual", "weights", "dscale", "dbias", "dresidual", "batches"}
WRITTEN = {"y", "dx", "dresidual", "dscale", "dbias", "running_mean", "running_var", "batches"}
WRITTEN_BY = {"batch_norm": {"statistics"}, "statistics": {"statistics"}, "gradient_sums": {"sums"}}


def run(kernel: str, arguments: dict[str, Any]) -> str | None:
    return getattr(native.kernels, kernel)(**arguments)


def values_of(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.numpy()


def copies(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: values_of(value).copy()
        for name, value in arguments.items()
        if type(value) in (np.ndarray, torch.Tensor)
    }


def unchanged(before: dict[str, np.ndarray], after: dict[str, Any]) -> bool:
    return all(np.array_equal(values, values_of(after[name])) for name, values in before.items())


def test_the_stub_states_the_module():
    stated = {node.name for node in STATED.body if isinstance(node, ast.FunctionDef)}
    stated |= {
        node.target.id
        for node in STATED.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    there = {name for name in dir(native.kernels) if not name.startswith("__")}
    assert there == stated - {"Array", "Axes"}


@pytest.mark.parametrize("kernel", NAMES)
def test_the_stub_states_the_keywords(kernel):
    for name in NAMES[kernel]:  # and what it states as optional may be left out
        arguments = operands(kernel)
        del arguments[name]
        if (
            name in OPTIONAL | {"activation", "team"} and kernel != "update_running"
        ) or name == "batches":
            assert run(kernel, arguments) is None
        else:
            with pytest.raises(TypeError, match="needs"):
                run(kernel, arguments)
    others = {name for names in NAMES.values() for name in names} - set(NAMES[kernel])
    for name in others - {"mean", "var", "statistics"} | {"X", "no_such"}:
        with pytest.raises(TypeError, match=f"{kernel}\\(\\) has no argument '{name}'"):
            run(kernel, {**operands(kernel), name: None})
    with pytest.raises(TypeError, match="by keyword alone"):
        getattr(native.kernels, kernel)(np.zeros((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", NAMES)
def test_a_call_of_the_boundary_serves(kernel, kind):
    assert run(kernel, operands(kernel, kind)) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kernel", "name"), ARRAYS)
def test_a_wrong_shape_is_an_error_by_name(kernel, name, kind):
    """Of a tensor that was changed after it was checked, say."""
    arguments = operands(kernel, kind)
    shape = tuple(arguments[name].shape)
    wrong = [(*shape, 2), (*shape[:-1], 5), (2, 3, 4)]
    for each in wrong:
        given = operands(kernel, kind)
        zeros = np.zeros(each, values_of(given[name]).dtype)
        given[name] = zeros if kind == "NumPy" else torch.from_numpy(zeros)
        before = copies(given)
        with pytest.raises(ValueError, match="must have the shape") as error:
            run(kernel, given)
        # x, or the statistics in its place, is what the others are compared with.
        is_measure = name == ("statistics" if kernel == "update_running" else "x")
        assert is_measure or str(error.value).startswith(name), error.value
        assert unchanged(before, given)


def spoilt(array: Any, how: str) -> Any:
    """The same values in memory that a kernel can't use; None where there is no such thing."""
    numpy = isinstance(array, np.ndarray)
    values = array if numpy else array.numpy()
    if how == "dtype":
        changed = values.astype(np.int32)
    elif how == "unaligned":
        memory = np.zeros(values.nbytes + 1, np.uint8)
        changed = memory[1:].view(values.dtype).reshape(values.shape)
        changed[...] = values
    elif how == "strided":
        if values.ndim < 2:
            return None
        changed = np.repeat(values, 2, axis=0)[::2]
    elif how == "backwards":
        if not numpy or values.ndim < 2:
            return None
        changed = values[::-1].copy()[::-1]
    elif how == "read-only":
        if not numpy:
            return None
        changed = values.copy()
        changed.flags.writeable = False
    elif how == "list":
        return values.tolist()
    elif numpy:
        return None
    elif how == "meta":
        return array.to("meta")
    elif how == "zeros that are none":
        zeros: Any = torch._efficientzerotensor  # what autograd makes of no gradient
        return zeros(array.shape, dtype=array.dtype)
    elif how == "freed":
        array = array.clone()
        array.untyped_storage().resize_(0)
        return array
    elif how == "subclass":
        return array.as_subclass(Subclass)
    elif how == "sparse":
        return array.to_sparse() if array.ndim else None
    return changed if numpy else torch.from_numpy(changed)


class Subclass(torch.Tensor):
    pass


HOWS = ["dtype", "unaligned", "strided", "backwards", "read-only", "list"]
HOWS += ["meta", "zeros that are none", "freed", "subclass", "sparse"]
SPOILT = [
    (kernel, name, kind, how)
    for kernel, name in ARRAYS
    for kind in KINDS
    for how in HOWS
    if spoilt(operands(kernel, kind)[name], how) is not None
]
WRITTEN_ARRAYS = [
    (kernel, name) for kernel, name in ARRAYS if name in WRITTEN | WRITTEN_BY.get(kernel, set())
]


@pytest.mark.parametrize(("kernel", "name", "kind", "how"), SPOILT)
def test_what_cannot_be_used_is_named(kernel, name, kind, how):
    arguments = operands(kernel, kind)
    arguments[name] = spoilt(arguments[name], how)
    before = copies({key: value for key, value in arguments.items() if key != name})
    if how == "read-only" and (kernel, name) not in WRITTEN_ARRAYS:
        assert run(kernel, arguments) is None
    else:
        named, is_unchanged = run(kernel, arguments), unchanged(before, arguments)
        assert (named, is_unchanged) == (name, True)  # a freed tensor can't be printed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kernel", "name"), WRITTEN_ARRAYS)
def test_an_output_may_not_share_memory(kernel, name, kind):
    for other in operands(kernel, kind):
        arguments = operands(kernel, kind)
        if other == name or not hasattr(arguments[other], "shape"):
            continue
        one, two = values_of(arguments[name]), values_of(arguments[other])
        memory = np.ones(one.nbytes + two.nbytes, np.uint8)
        begin = (one.nbytes - 1) // 8 * 8  # the last word of the one is the first of the other
        first = memory[: one.nbytes].view(one.dtype).reshape(one.shape)
        second = memory[begin : begin + two.nbytes].view(two.dtype).reshape(two.shape)
        first[...], second[...] = one, two
        if kind == "PyTorch":
            first, second = torch.from_numpy(first), torch.from_numpy(second)
        arguments |= {name: first, other: second}
        assert run(kernel, arguments) in (name, other), other


@pytest.mark.parametrize("kernel", ["batch_norm", "normalize"])
def test_y_may_be_x(kernel):
    arguments = operands(kernel)
    run(kernel, arguments)
    wanted = arguments["y"]
    arguments = operands(kernel)
    arguments["y"] = arguments["x"]
    assert run(kernel, arguments) is None
    np.testing.assert_array_equal(arguments["x"], wanted)
    memory = np.ones((N + 1, C), np.float32)
    arguments.update(x=memory[1:], y=memory[:-1])
    assert run(kernel, arguments) == "y"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.dtype("V2")])
@pytest.mark.parametrize("stride", [1, 2, -1])
def test_values_of_a_feature_come_in_any_dtype_and_strides(dtype, stride):
    """Two bytes that are no number are those of a bfloat16."""
    random = np.random.default_rng(0)
    values = random.normal(size=(5, C)).astype(BFLOAT16).astype(np.float64)
    wanted = operands("batch_norm")
    wanted |= dict(
        zip(("scale", "bias", "running_mean", "running_var"), values[1:].copy(), strict=True)
    )
    given = dict(wanted)
    for name in ("scale", "bias", "running_mean", "running_var"):
        narrow = wanted[name].astype(BFLOAT16 if dtype == "V2" else dtype).view(dtype)
        memory = np.zeros(2 * C + 1, dtype)[:: 2 if stride == 2 else 1][:C][
            :: -1 if stride < 0 else 1
        ]
        memory[...] = narrow
        given[name] = memory
    given["statistics"], given["y"] = np.zeros((3, C)), np.zeros((N, C), np.float32)
    assert run("batch_norm", wanted) is None
    assert run("batch_norm", given) is None
    np.testing.assert_array_equal(given["y"], wanted["y"])
    for name in ("running_mean", "running_var"):
        moved = np.ascontiguousarray(given[name])
        rounded = wanted[name].astype(BFLOAT16 if dtype == "V2" else dtype).view(dtype)
        np.testing.assert_array_equal(moved, rounded)


def test_a_parameter_without_memory_of_its_own_cannot_be_written():
    arguments = operands("batch_norm", "PyTorch")
    arguments["running_mean"] = torch.zeros(1).expand(C)
    assert run("batch_norm", arguments) == "running_mean"
    arguments = operands("batch_norm", "PyTorch")
    arguments["scale"] = torch.zeros(1).expand(C)  # which may be read
    assert run("batch_norm", arguments) is None


@pytest.mark.parametrize("weights", [(N, 1), (N, C)])
def test_weights_lie_in_the_order_of_x(weights):
    arguments = operands("batch_norm")
    arguments |= {name: np.asfortranarray(arguments[name]) for name in ("x", "residual", "y")}
    arguments["weights"] = np.ones(weights, np.float32)
    assert run("batch_norm", arguments) == ("weights" if weights == (N, C) else None)
    arguments["weights"] = np.asfortranarray(arguments["weights"])
    assert run("batch_norm", arguments) is None


def test_no_elements_are_not_touched():
    arguments = operands("batch_norm")
    for name in ("x", "residual", "y"):
        arguments[name] = np.zeros((0, C), np.float32)
    arguments["weights"] = np.zeros((0, 1), np.float32)
    before = copies(arguments)
    assert run("batch_norm", arguments) is None
    before["statistics"][...] = 0
    assert unchanged(before, arguments)  # the running statistics and the number of batches, too


def test_axes_of_one_element_lie_anywhere():
    arguments = operands("batch_norm")
    ones = np.lib.stride_tricks.as_strided
    for name in ("x", "residual", "y"):
        arguments[name] = arguments[name].reshape(N, 1, C)
    arguments["y"] = ones(arguments["y"], strides=(4 * C, 12345 * 4, 4))
    arguments |= {"features": (2,), "weights": arguments["weights"].reshape(N, 1, 1)}
    assert run("batch_norm", arguments) is None


def test_running_statistics_move_in_the_same_call():
    both, apart = operands("batch_norm"), operands("batch_norm")
    running = {name: apart.pop(name) for name in ("running_mean", "running_var", "batches", "rate")}
    before = int(running["batches"])
    assert run("batch_norm", both) is None
    assert run("batch_norm", apart) is None
    statistics = apart["statistics"]
    assert run("update_running", {**running, "statistics": statistics, "correction": 1}) is None
    for name in ("running_mean", "running_var", "batches"):
        np.testing.assert_array_equal(both[name], running[name])
    assert both["batches"] == before + 1


def test_what_is_no_number_or_name_is_an_error():
    arguments = operands("batch_norm")
    for name, value, error in [
        ("eps", "1", TypeError),
        ("rate", [], TypeError),
        ("features", [1], TypeError),
        ("features", (), TypeError),
        ("features", ("1",), TypeError),
        ("features", (-1,), ValueError),
        ("features", (1, 1), ValueError),
        ("features", (2,), ValueError),
        ("features", (70,), ValueError),
        ("activation", "gelu", ValueError),
        ("activation", "", ValueError),
        ("activation", 1, ValueError),
        ("team", 0, ValueError),
    ]:
        with pytest.raises(error):
            run("batch_norm", {**arguments, name: value})
    with pytest.raises(TypeError, match="running_mean, running_var and rate, or none"):
        run("batch_norm", {**arguments, "running_var": None})
    gradients = operands("batch_norm_gradients")
    with pytest.raises(TypeError, match="either statistics or mean and var"):
        run("batch_norm_gradients", {**gradients, "mean": np.ones(C), "var": np.ones(C)})


def test_only_types_that_say_where_they_lie_are_registered():
    assert native.kernels.register_tensor(torch.Tensor)
    assert native.kernels.register_tensor(torch.nn.Parameter)
    assert not native.kernels.register_tensor(np.ndarray)


def in_process_of_its_own(program, timeout=120):
    """What it prints; it might end the process."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LIMIT_MEMORY = """
import resource
import numpy as np
import batchnorm.numpy as bn
from batchnorm import native

def leave(bytes_left):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_left, -1))
"""


def test_a_want_of_memory_is_a_memory_error_and_changes_nothing():
    program = """
x = np.random.default_rng(0).normal(size=(4, 1 << 16)).astype(np.float16)
channels = x.shape[1]
arrays = {
    "y": np.full_like(x, 7),
    "statistics": np.full((3, channels), 7.0),
    "running_mean": np.full(channels, 7.0),
    "running_var": np.full(channels, 7.0, np.float32),
    "batches": np.array(7),
}
common = {"x": x, "features": (1,), "eps": 1e-5}
native.kernels.batch_norm(**common, statistics=np.empty((3, channels)), y=np.empty_like(x))
bn.batch_norm(x[:, :8], out=np.empty_like(x[:, :8]))  # imports what it needs while there is memory
leave(1 << 21)
try:
    native.kernels.batch_norm(**common, **arrays, rate=0.5)
except MemoryError:
    print("refused")
try:
    bn.batch_norm(x, out=arrays["y"])
except MemoryError:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert all((array == 7).all() for array in arrays.values())
assert native.kernels.batch_norm(**common, **arrays, rate=0.5) is None
"""
    assert in_process_of_its_own(LIMIT_MEMORY + program) == "refused\nrefused\n"


def test_a_first_call_imports_nothing():
    """An import takes time and memory, and may fail, in the middle of a user's program."""
    program = """
import sys
import numpy as np
from batchnorm.numpy import batch_norm
x = np.ones((4, 4), np.float32)
like_a_file = x.view(np.memmap)
before = set(sys.modules)
batch_norm(x, x[0], x[1], out=np.empty_like(x))
batch_norm(like_a_file)
print(sorted(set(sys.modules) - before))
"""
    assert in_process_of_its_own(program) == "[]\n"


def test_what_fits():
    fit, x, good = native.kernels.fit, torch.zeros(2, 3), torch.zeros(3)
    assert fit(x, good, None, torch.nn.Parameter(good), torch.zeros(6)[::2])
    for dtype in (torch.float16, torch.bfloat16):
        assert fit(x.to(dtype), good, good.to(dtype))
        assert not fit(x.to(dtype), good.double())
        assert not fit(x, good.to(dtype))
    freed = torch.zeros(3)
    freed.untyped_storage().resize_(0)
    for bad in (
        torch.zeros(2),
        torch.zeros(3, 1),
        good.double(),
        good.to("meta"),
        good.to_sparse(),
        freed,
        np.zeros(3, np.float32),
        3.0,
    ):
        assert not fit(x, good, bad)
    for other in (x.to("meta"), x.double(), x.numpy(), 3.0, torch.zeros(3)):
        assert not fit(other, good)
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        assert not fit(x.to(dtype), good.to(dtype))
    with pytest.raises(TypeError, match="needs x"):
        fit()


@pytest.mark.parametrize("shape", [(4, 1 << 21), (1, 1 << 18, 64), (64, 1 << 17)])
def test_many_channels_need_little_memory(shape):
    """Less than the parameters themselves."""
    program = f"""
shape = {shape}
x = np.ones(shape, np.float16)
channels = shape[1]
count, mean, var = statistics = np.zeros((3, channels))
sums, y = np.empty((2, channels)), np.empty_like(x)
common = {{"x": x, "features": (1,), "eps": 1e-5}}
leave(24 << 20)
kernels = native.kernels
assert kernels.batch_norm(**common, statistics=statistics, y=y) is None
assert kernels.normalize(**common, mean=mean, var=var, y=y) is None
assert kernels.batch_norm_gradients(
    **common, statistics=statistics, dy=x, dx=y, dscale=sums[0], dbias=sums[1]) is None
"""
    in_process_of_its_own(LIMIT_MEMORY + program)


def test_a_small_stack_is_enough():
    program = """
import threading
import numpy as np
import batchnorm
from batchnorm import native

batchnorm.set_num_threads(1)
random = np.random.default_rng(0)
kernels = native.kernels

def work():
    for shape in ((70, 3000), (9, 70, 7), (3, 5, 700)):
        for dtype in (np.float16, np.float32, np.float64):
            x = random.normal(size=shape).astype(dtype)
            weights = np.ones((shape[0], 1, *shape[2:]), np.promote_types(dtype, np.float32))
            rows, sums, y = np.empty((3, shape[1])), np.empty((2, shape[1])), np.empty_like(x)
            for activation in (None, "relu", "silu"):
                common = {"x": x, "features": (1,), "weights": weights, "residual": x, "eps": 1e-5}
                common["activation"] = activation
                assert kernels.batch_norm(**common, statistics=rows, y=y) is None
                assert kernels.batch_norm_gradients(
                    **common, statistics=rows, dy=x, dx=y, dscale=sums[0], dbias=sums[1]) is None

work()
threading.stack_size(64 << 10)
for instruction_set in kernels.instruction_sets():
    kernels.set_instruction_set(instruction_set)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
    in_process_of_its_own(program)


def test_a_fork_during_the_first_call():
    """The child must not wait for what a thread of its parent was about to do."""
    program = """
import os, threading, time
import numpy as np
import batchnorm.numpy as bn

x = np.ones((600, 600), np.float32)

def fork(body):
    child = os.fork()
    if child == 0:
        body()
        os._exit(0)
    return child

def ends(child):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return True
        time.sleep(0.001)
    os.kill(child, 9)
    return False

def first_call_and_fork():
    threading.Thread(target=bn.batch_norm, args=(x,)).start()
    os._exit(not ends(fork(lambda: bn.batch_norm(x))))

for _ in range(100):
    assert os.waitpid(fork(first_call_and_fork), 0)[1] == 0, "a child hangs"
"""
    in_process_of_its_own(program, timeout=300)


def test_a_daemon_thread_may_die_in_a_kernel():
    """The end of the program unwinds its stack, or lets it hang, when it asks for the lock."""
    program = """
import threading, time
import numpy as np
import batchnorm, batchnorm.numpy as bn
batchnorm.set_num_threads(1)
x = np.ones((1 << 16, 64), np.float32)
started = threading.Event()
def work():
    while True:
        started.set()
        bn.batch_norm(x)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.05)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_kernels_know_every_activation():
    assert list(native.kernels.ACTIVATIONS) == list(ACTIVATIONS)


def test_threads_may_be_set_while_a_kernel_runs():
    """In a process of its own, which it would end: scratch memory is that of a number of tasks."""
    program = """
import threading, numpy as np, batchnorm, batchnorm.numpy as bn
x = np.random.default_rng(0).normal(size=(16, 1 << 19)).astype(np.float16)
going = True
def change():
    while going:
        for threads in (1, 64):
            batchnorm.set_num_threads(threads)
changing = threading.Thread(target=change)
changing.start()
wanted = x.astype(np.float64).mean(0)
for _ in range(20):
    assert np.allclose(bn.batch_statistics(x).mean, wanted, atol=1e-3)
going = False
changing.join()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_buffer_that_does_not_say_its_strides_is_named():
    x = (ctypes.c_float * 4 * 6)()
    statistics = np.zeros((3, 4))
    assert native.kernels.statistics(x=x, features=(1,), statistics=statistics) == "x"


def test_running_statistics_need_a_rate():
    x, running = np.ones((6, 4), np.float32), np.zeros(4)
    with pytest.raises(TypeError, match="needs running_mean, running_var and rate, or none"):
        native.kernels.batch_norm(
            x=x,
            features=(1,),
            eps=1e-5,
            statistics=np.empty((3, 4)),
            y=np.empty_like(x),
            running_mean=running,
            running_var=running.copy(),
        )


@pytest.mark.parametrize("shape", [(-3, 2), (3, -2)])
def test_layout_of_no_shape(shape):
    with pytest.raises(ValueError, match="must go with each other"):
        native.kernels.layout(shape, (1,))


DOUBLES = {
    "noise": lambda rows, noise: noise,
    "ramp": lambda rows, noise: 1e8 + rows / len(rows),
    "trend": lambda rows, noise: rows + noise,
    "large mean": lambda rows, noise: 1e12 + 0.01 * noise,
    "two units of the mean": lambda rows, noise: 1e8 + 2 * np.spacing(1e8) * np.round(noise),
    "outlier first": lambda rows, noise: np.where(rows == 0, 1e6, noise),
    "beyond squares": lambda rows, noise: 1e200 * noise,
    "to the end of the range": lambda rows, noise: np.copysign(1.7e308, noise),
}


@pytest.mark.parametrize("layout", ["rows", "runs"])
@pytest.mark.parametrize("name", DOUBLES)
def test_doubles_are_as_exact_as_the_definition(name, layout, monkeypatch):
    """Within a few times; the truth is in long double."""
    rows = np.arange(60_000.0)[:, None] * np.ones(3)
    x = DOUBLES[name](rows, np.random.default_rng(0).normal(size=rows.shape))
    eps = 1e-20 if name.startswith("two") else 1e-5
    long = x.astype(np.longdouble)
    centered = long - long.mean(0)
    centered = centered - centered.mean(0)
    variance = np.square(centered).mean(0)
    wanted = centered / np.sqrt(variance + np.longdouble(eps))

    def errors():
        if layout == "rows":
            y, statistics = bn.batch_norm(x, eps=eps)
        else:
            by_runs = np.ascontiguousarray(x.reshape(20, 3000, 3).transpose(0, 2, 1))
            y, statistics = bn.batch_norm(by_runs, axis=1, eps=eps)
            y = y.transpose(0, 2, 1).reshape(x.shape)
        of_variance = np.where(variance < 1e308, np.abs(statistics.var - variance) / variance, 0)
        return np.abs(y - wanted).max(), of_variance.max()

    of_kernels = errors()
    monkeypatch.setattr(native, "kernels", None)
    for kernel, definition in zip(of_kernels, errors(), strict=True):
        assert kernel <= 10 * definition + 1e-15


@pytest.mark.parametrize("other", ["nan", "infinity", "overflow", "gradient", "scale"])
@pytest.mark.parametrize("shape", [(300, 7), (70, 3000), (9, 6, 7), (3, 5, 700)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_bits_of_a_feature_do_not_depend_on_others(dtype, shape, other):
    random = np.random.default_rng(0)
    x, dy = (random.normal(size=shape).astype(dtype) for _ in range(2))
    scale, mask = np.ones(shape[1], dtype), random.random((shape[0], 1, *shape[2:])) < 0.8

    def results(x, dy, scale):
        options = {"axis": 1, "activation": "silu", "mask": mask}
        with np.errstate(all="ignore"):
            y, statistics = bn.batch_norm(x, scale, **options)
            found = [y, statistics.mean, statistics.var]
            if not np.isinf(statistics.var).any():  # which no gradient is taken of
                gradients = bn.batch_norm_gradients(dy, x, statistics, scale, **options)
                found += [gradients.x, gradients.scale]
        return found

    before = results(x, dy, scale)
    most = 0.9 * float(np.finfo(dtype).max)
    match other:
        case "nan" | "infinity":
            x[2, 3] = float(other)
        case "overflow":
            x[:, 3] = np.copysign(most, x[:, 3])
        case "gradient":
            dy[:, 3] = most
        case "scale":
            scale[3] = most
    for one, another in zip(before, results(x, dy, scale), strict=False):
        axis = min(1, one.ndim - 1)
        np.testing.assert_array_equal(np.delete(one, 3, axis), np.delete(another, 3, axis))


@pytest.mark.parametrize(
    ("dtype", "x_size", "dy_size", "scale", "eps", "weight"),
    [
        ("float32", 1e-10, 1.0, 1.0, 1e-20, 1e-25),
        ("float32", 3e-12, 1.0, 1.0, 2e-25, 6e-20),
        ("float64", 1.0, 1.0, 1.0, 1e-5, 1e-280),
        ("float32", 1e-10, 1e-30, 1.0, 1e-20, None),
        ("float32", 1e-10, 1e-36, 1.0, 1e-20, None),
        ("float32", 1e-18, 1e-28, 1.0, 1e-37, None),
        ("float32", 1e-15, 1e25, 1e-15, 1e-32, None),
        ("float32", 1e10, 1e-30, 1e10, 1e-5, None),
        ("float64", 1e120, 1e-244, 1e88, 1e-5, None),
        ("float32", 1.0, 1e-30, 1.0, 1e-5, 1e20),
        ("float32", 1.0, 1e30, 1.0, 1e-5, 1e-29),
        ("float64", 1.0, 1e200, 1.0, 1e-5, 1e-200),
        ("float32", 1.0, 1.0, 1e31, 1e-5, "padding"),
        ("float64", 1.0, 1.0, 1e280, 1e-5, "padding"),
    ],
)
@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 100)])
def test_sizes_far_from_1(shape, dtype, x_size, dy_size, scale, eps, weight):
    random = np.random.default_rng(0)
    x = (x_size * random.normal(size=shape)).astype(dtype)
    dy = (dy_size * random.normal(size=shape)).astype(dtype)
    scales, mask = np.full(3, scale, dtype), None
    if weight is not None:
        mask = random.integers(0, 3, size=(shape[0], 1, *shape[2:])).astype(dtype)
        if weight == "padding":
            outside = np.broadcast_to(mask == 0, shape)
            x[outside], dy[outside] = np.finfo(dtype).min, 0
        else:
            mask *= np.array(weight, dtype)
    options = {"axis": 1, "eps": eps, "mask": mask}
    exact = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        y, statistics = bn.batch_norm(x, scales, **options)
        got = bn.batch_norm_gradients(dy, x, statistics, scales, **options)
        wanted = truth.batch_norm_gradients(dy, exact, scales, **options)
        right = truth.batch_norm(exact, scales, **options)
        inside = np.isfinite(right.y.astype(dtype))
        pairs = [
            (y[inside], right.y[inside]),
            (got.x, wanted["x"]),
            (got.scale, wanted["scale"]),
            (statistics.var, right.var),
        ]
    for found, true in pairs:
        rounding = 1e-13 if dtype == "float64" else 3e-6
        assert np.abs(found - true).max() <= rounding * np.abs(true).max()


@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 100)])
def test_a_large_gradient_does_not_spoil_others_of_its_feature(shape):
    """In evaluation, where they have no share in each other; and a residual's, always."""
    dy = np.full(shape, 1e-30, np.float32)
    dy[0] = 3e38
    x, ones, residual = np.ones(shape, np.float32), np.ones(3), np.zeros(shape, np.float32)
    common = {"x": x, "features": (1,), "eps": 1e-5, "dy": dy, "residual": residual}
    dx, dresidual = np.empty_like(x), np.empty_like(x)
    outputs = {"dx": dx, "dresidual": dresidual, "dscale": np.empty(3), "dbias": np.empty(3)}
    kernel = native.kernels.batch_norm_gradients
    assert kernel(**common, **outputs, mean=ones, var=ones) is None
    np.testing.assert_allclose(dx, dy / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(dresidual, dy)
    statistics = np.stack([np.full(3, dy.size / 3), ones, ones])
    assert kernel(**common, **outputs, statistics=statistics) is None
    np.testing.assert_array_equal(dresidual, dy)


def test_a_mean_beyond_float32():
    y = bn.normalize(np.float32([[1.0], [-3.0]]), np.array([1e40]), np.array([1e20]))
    np.testing.assert_allclose(y, -1e30, rtol=1e-6)
