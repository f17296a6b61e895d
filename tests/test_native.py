"""The native core: that it serves, on any number of threads, from many at once, after a fork."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import batchnorm
import batchnorm.numpy as bn
from batchnorm import native


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
