"""The native operation of MLX: a node of the graph, with every transformation of it."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path
from unittest.mock import Mock, patch

import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import pytest
import truth
from compare import close
from doors import without_native

import batchnorm
from batchnorm.mlx import BatchNorm, batch_norm, batch_statistics, normalize
from batchnorm.mlx import _native as native

RNG = np.random.default_rng(0)


def normal(*shape):
    return mx.array(RNG.normal(size=shape).astype(np.float32))


def nodes(*arrays, path):
    mx.export_to_dot(str(path), *arrays)
    return Counter(re.findall(r'\[label ="(\w+)"', path.read_text()))


@pytest.fixture
def new_runs():
    """How many stages have run since the test began."""
    before = native.runs()
    return lambda: native.runs() - before


def by_operations(function):
    def call(*arguments):
        with without_native():
            return function(*arguments)

    return call


def agree(function, *arguments, tolerance=1e-5):
    """Natively, where that is no derivative that runs no stage, and by operations."""
    with patch.object(native, "serves", Mock(side_effect=native.serves)) as asked:
        found = function(*arguments)
        assert asked.called
    wanted = by_operations(function)(*arguments)
    for one, other in zip(*(each if isinstance(each, (list, tuple)) else [each]
                            for each in (found, wanted)), strict=True):  # fmt: skip
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        close(one, other, tolerance, tolerance)


# ---- a node of the graph


def test_it_serves():
    assert f" MLX: served, as MLX {mx.__version__}." in batchnorm.native_status()


def test_nothing_runs_before_it_is_asked_for(new_runs, tmp_path):
    layer = BatchNorm(3)
    y = layer(mx.log1p(normal(5, 3)))
    assert new_runs() == 0
    count = nodes(y, layer.running_mean, path=tmp_path / "graph")
    assert (count["BatchNorm"], count["BatchNormUpdateRunning"]) == (1, 1)
    mx.eval(y, layer.state)
    assert new_runs() == 2  # the running statistics move in the same evaluation
    assert nodes(layer.running_mean, path=tmp_path / "graph").total() == 0


def test_a_layer_in_training_has_one_pass_forward_and_one_back(new_runs, tmp_path):
    layer, x = BatchNorm(3), normal(5, 3)
    gradient = mx.grad(lambda x: layer(x).square().sum())(x)
    assert nodes(gradient, path=tmp_path / "graph")["BatchNormGradients"] == 1
    mx.eval(gradient)
    assert new_runs() == 2


def test_mx_compile_keeps_the_node_and_merges_equal_ones(new_runs, tmp_path):
    def twice(x):
        return batch_norm(x, activation="relu")[0] + batch_norm(x, activation="relu")[0]

    x = normal(6, 3)
    y = mx.compile(twice)(x)
    assert nodes(y, path=tmp_path / "graph")["BatchNorm"] == 1
    mx.eval(y)
    assert new_runs() == 1
    close(y, twice(x))
    y = mx.compile(lambda x: batch_norm(x)[0] + batch_norm(x, eps=1e-3)[0])(x)
    assert nodes(y, path=tmp_path / "graph")["BatchNorm"] == 2  # which are not equal


@pytest.mark.parametrize("shape", [(64, 16), (7, 33), (300, 5, 8)])
def test_results_are_aligned(shape):
    x = normal(*shape)
    y, statistics = batch_norm(x, mx.ones(shape[-1]))
    gradient = mx.grad(lambda x: batch_norm(x)[0].square().sum())(x)
    for each in (y, gradient, normalize(x, statistics.mean, statistics.var)):
        assert np.array(each, copy=False).ctypes.data % 64 == 0
        assert np.array(mx.reshape(each, (-1,))).shape == (each.size,)


def test_x_that_nobody_needs_any_more_becomes_y():
    x = normal(2**18, 4)
    mean, var = mx.zeros(4), mx.ones(4)
    wanted = normalize(x * 2, mean, var)
    mx.eval(x, mean, var, wanted)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    y = normalize(x * 2, mean, var)
    mx.eval(y)
    assert mx.get_peak_memory() - before < 1.5 * x.nbytes
    assert mx.array_equal(y, wanted)


def test_its_results_are_arrays_as_any(tmp_path):
    y, (count, _, _) = batch_norm(normal(64, 16))
    y += 1
    y[0] = 0
    mx.save(str(tmp_path / "y.npy"), y)
    assert mx.array_equal(mx.load(str(tmp_path / "y.npy")), y)
    assert np.from_dlpack(y).shape == (64, 16)
    assert count.tolist() == [64.0] * 16


def test_results_go_with_arrays_of_other_layouts():
    x, other = normal(8, 6), normal(6, 8).T
    y, statistics = batch_norm(x)
    gradient = mx.grad(lambda x: (batch_norm(x)[0] ** 3).sum())(x)
    for each in (y, normalize(x, statistics.mean, statistics.var), gradient):
        mx.eval(each)
        wanted = np.array(each) + np.array(other)
        close(each + other, wanted)
        close(mx.where(other > 0, each, other), np.where(np.array(other) > 0, each, other))


def test_a_part_of_a_large_array_does_not_become_y():
    mean, var = mx.zeros(4), mx.ones(4)
    large = normal(2**18, 4)
    part = large[:8]
    mx.eval(large, part, mean, var)
    before = mx.get_active_memory()
    del large
    y = normalize(part, mean, var)
    del part
    mx.eval(y)
    assert mx.get_active_memory() < before - 2**20


def test_an_array_that_was_never_made_is_no_array():
    program = """
import mlx.core as mx
from batchnorm.mlx import BatchNorm
try:
    BatchNorm(3)(mx.array.__new__(mx.array))
except TypeError:
    print("refused")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "refused\n"


# ---- what it is given


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "of_layout",
    [
        lambda x: x,
        lambda x: x.transpose(0, 3, 1, 2).transpose(0, 2, 3, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: mx.broadcast_to(x[:1, :, :1], x.shape),
        lambda x: x[::-1],
    ],
)
def test_layouts(of_layout, dtype, activation):
    x, dy = of_layout(normal(4, 6, 5, 3)).astype(dtype), normal(4, 6, 5, 3).astype(dtype)
    scale, bias = normal(6)[::2], mx.broadcast_to(normal(1), (3,))
    dy = of_layout(dy)
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2

    def function(*arguments):
        return batch_norm(*arguments, activation=activation)[0]

    agree(function, x, scale, bias, tolerance=tolerance)
    agree(lambda *a: mx.vjp(function, a, [dy])[1], x, scale, bias, tolerance=tolerance)


@pytest.mark.parametrize(
    "shape", [(4, 5, 3), (4, 1, 3), (1, 5, 1), (4, 5, 1), (1, 1, 3), (5, 3), (3,)]
)
@pytest.mark.parametrize("dtype", [mx.bool_, mx.int32, mx.float16, mx.float32])
def test_masks_broadcast(shape, dtype):
    x = normal(4, 5, 3)
    mask = mx.array(RNG.integers(0, 3, size=shape) + (np.arange(shape[-1]) == 0)).astype(dtype)
    agree(lambda x: [batch_norm(x, mask=mask)[0], *batch_norm(x, mask=mask)[1]], x)
    agree(lambda x: list(batch_statistics(x, mask=mask)), x)
    agree(mx.grad(lambda x: batch_norm(x, mask=mask)[0].square().sum(axis=1)[0, 0]), x)


@pytest.mark.parametrize("dtype", [mx.bool_, mx.int32])
def test_a_mask_of_x_itself_takes_no_derivative(tmp_path, dtype):
    gradient = mx.grad(lambda x: (batch_norm(x, mask=(x > 0).astype(dtype))[0] ** 3).sum())
    x = normal(9, 3)
    assert nodes(gradient(x), path=tmp_path / "graph")["BatchNormGradients"] == 1
    agree(gradient, x, tolerance=1e-4)


@pytest.mark.parametrize("of_residual", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("of_x", [mx.float16, mx.float32])
@pytest.mark.parametrize("shape", [(3, 1), (1,), (1, 1)])
def test_residuals(of_x, of_residual, shape):
    x, bias = mx.array([[0.0], [1.0], [3.0]]).astype(of_x), mx.array([-2048.0])
    residual = (2048 + mx.arange(3.0)[: shape[0]].reshape(shape)).astype(of_residual)
    y = batch_norm(x, None, bias, residual=residual)[0]
    with without_native():
        wanted = batch_norm(x, None, bias, residual=residual)[0]
    close(y, wanted, atol=1e-3)


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_weights_that_are_no_weights_make_their_features_nan(wrong):
    mask = np.ones((5, 3), np.float32)
    mask[2, 1] = wrong
    y, statistics = batch_norm(normal(5, 3), mask=mx.array(mask))
    for each in (y.T, statistics.mean, statistics.var, statistics.count):
        found = np.isnan(np.array(each)).reshape(3, -1).all(axis=1)
        assert found.tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (4, 0)])
def test_empty_arrays(shape):
    x, scale = mx.zeros(shape), mx.ones(shape[-1:])
    agree(lambda x: [batch_norm(x)[0], *batch_norm(x)[1]], x)
    agree(lambda x, scale: mx.vjp(lambda *a: batch_norm(*a)[0], [x, scale], [x])[1], x, scale)
    layer = BatchNorm(shape[-1]) if shape[-1] else None
    if layer:
        layer.running_mean = normal(3)
        mean = mx.array(layer.running_mean)
        mx.eval(layer(x), layer.state)
        assert mx.array_equal(layer.running_mean, mean)


# ---- derivatives


def losses(training, masked, activation):
    mask = mx.array([[1.0], [0.0], [2.0], [1.0], [1.0]]) if masked else None

    def loss(x, scale, bias, residual, mean, var):
        options = {"residual": residual, "activation": activation}
        if not training:
            return normalize(x, mean, var, scale, bias, **options)
        y, statistics = batch_norm(x, scale, bias, mask=mask, **options)
        return y + (mean * statistics.mean + var * statistics.var).astype(y.dtype)

    return loss


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("training", "masked"), [(True, False), (True, True), (False, False)])
def test_derivatives(training, masked, activation):
    function = losses(training, masked, activation)
    arguments = [normal(5, 3), normal(3), normal(3), normal(5, 3), normal(3), normal(3) ** 2 + 1]
    along = [normal(*each.shape) for each in arguments]
    dy = normal(5, 3)

    def first(*arguments):
        return mx.vjp(function, arguments, [dy])[1]

    def product(*arguments):
        return sum((g * v).sum() for g, v in zip(first(*arguments), along, strict=True))

    def forward(*arguments):
        return mx.jvp(function, arguments, along)[1]

    agree(function, *arguments)
    agree(first, *arguments, tolerance=1e-4)
    agree(forward, *arguments, tolerance=1e-4)
    agree(lambda *a: mx.grad(product, argnums=list(range(6)))(*a), *arguments, tolerance=1e-3)
    agree(lambda *a: mx.jvp(product, a, along)[1], *arguments, tolerance=1e-3)
    agree(lambda *a: mx.jvp(lambda *a: forward(*a)[0], a, along)[1], *arguments, tolerance=1e-3)
    agree(lambda *a: mx.vjp(lambda *a: forward(*a)[0], a, [dy])[1], *arguments, tolerance=1e-3)


def test_third_derivatives():
    x, v, dy = normal(6, 2), normal(6, 2), normal(6, 2)
    first = mx.grad(lambda x: (batch_norm(x, activation="silu")[0] * dy).sum())
    second = mx.grad(lambda x: (first(x) * v).sum())
    third = mx.grad(lambda x: (second(x) * v).sum())
    agree(third, x, tolerance=1e-3)


def test_the_gradient_of_a_mask():
    x, mask, dy = normal(5, 3), mx.abs(normal(5, 1)), normal(5, 3)
    agree(mx.grad(lambda m: (batch_norm(x, mask=m)[0] * dy).sum()), mask, tolerance=1e-4)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_through_the_statistics_of_large_arrays(activation):
    x, dy = 3 + normal(40000, 3), normal(3)

    def loss(x):
        y, statistics = batch_norm(x, mx.array([1.0, 0.0, 2.0]), activation=activation)
        return (y[:3] * dy).sum() + (statistics.mean * dy + statistics.var).sum()

    agree(mx.grad(loss), x)


def in_axes_of_x_and_scale():
    for axis in range(3):
        yield from [(axis, None), (axis, 0), (None, 0)]


@pytest.mark.parametrize(("of_x", "of_scale"), [*in_axes_of_x_and_scale()])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap(of_x, of_scale, masked):
    x = normal(5, 3) if of_x is None else mx.moveaxis(normal(4, 5, 3), 0, of_x)
    scale = normal(3) if of_scale is None else normal(4, 3)
    mask = mx.array([[1.0], [0.0], [2.0], [1.0], [1.0]]) if masked else None

    def both(x, scale):
        y, statistics = batch_norm(x, scale, mask=mask, activation="silu")
        return [y, *statistics, normalize(x, mx.zeros(3), mx.ones(3), scale)]

    axes = of_x, of_scale
    agree(mx.vmap(both, in_axes=axes), x, scale)
    gradients = mx.grad(lambda *a: (both(*a)[0] ** 3).sum(), argnums=(0, 1))
    agree(mx.vmap(gradients, in_axes=axes), x, scale, tolerance=1e-4)
    mapped = mx.vmap(lambda *a: both(*a)[0], in_axes=axes)
    agree(mx.grad(lambda *a: (mapped(*a) ** 3).sum(), argnums=(0, 1)), x, scale, tolerance=1e-4)


def test_vmap_over_masks_and_statistics():
    x, masks = normal(5, 3), mx.array(RNG.integers(1, 3, size=(4, 5, 1)))
    agree(mx.vmap(lambda mask: batch_norm(x, mask=mask)[0]), masks)
    agree(mx.vmap(lambda mean: normalize(x, mean, mx.ones(3))), normal(4, 3))
    agree(mx.vmap(mx.vmap(lambda x: batch_norm(x)[0])), normal(2, 3, 5, 3))


# ---- programs


def train(steps, compiled, batch=16):
    """The losses of a small network, and its running mean."""
    mx.random.seed(0)
    network = mlx.nn.Sequential(
        mlx.nn.Linear(8, 16), BatchNorm(16, activation="relu"), mlx.nn.Linear(16, 1)
    )
    optimizer = mlx.optimizers.SGD(0.05)
    x, wanted = mx.random.normal((batch, 8)), mx.random.normal((batch, 1))
    state = [network.state, optimizer.state]

    def step(x, wanted):
        loss, gradients = mlx.nn.value_and_grad(
            network, lambda x, wanted: ((network(x) - wanted) ** 2).mean()
        )(x, wanted)
        optimizer.update(network, gradients)
        return loss

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    found = []
    for _ in range(steps):
        found.append(step(x, wanted))
        mx.eval(state, found[-1])
    return mx.stack(found), network.layers[1].running_mean


@pytest.mark.parametrize("compiled", [False, True])
def test_training(compiled):
    agree(lambda: train(10, compiled), tolerance=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_keeps_no_memory(compiled):
    train(100, compiled)
    mx.clear_cache()
    active, resident = mx.get_active_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(600, compiled)
    mx.clear_cache()
    assert mx.get_active_memory() <= active + 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 20_000  # kB


def test_checkpoint():
    x, scale, dy = normal(6, 3), normal(3), normal(6, 3)
    again = mx.checkpoint(lambda *a: batch_norm(*a, activation="silu")[0])
    agree(lambda *a: mx.vjp(again, a, [dy])[1], x, scale)


@pytest.mark.parametrize("shapeless", [False, True])
def test_export_and_import(tmp_path, shapeless):
    layer = BatchNorm(3, activation="silu")
    layer.weight, layer.bias = normal(3), normal(3)
    x, constant = normal(6, 3), normal(6, 3)

    def training(x, mean, var):
        layer.running_mean, layer.running_var = mean, var
        return layer.train()(x), layer.running_mean, layer.running_var

    def gradient(x):
        return mx.grad(lambda x: (batch_norm(x, layer.weight)[0] ** 3).sum())(x)

    functions = {
        "training": (training, [x, mx.zeros(3), mx.ones(3)]),
        "gradient": (gradient, [x]),
        "compiled": (mx.compile(lambda x: batch_norm(x)[0]), [x]),
        "evaluation": (lambda x: normalize(x, mx.zeros(3), mx.ones(3)), [x]),
        "of constants": (lambda x: x + batch_norm(constant)[0].mean(axis=0), [x]),
    }
    for name, (function, arguments) in functions.items():
        path = str(tmp_path / f"{name}.mlxfn")
        mx.export_function(path, function, *arguments, shapeless=shapeless)
        imported = mx.import_function(path)
        for rows in (6, 40) if shapeless else (6,):
            others = [normal(rows, 3), *arguments[1:]]
            found, wanted = imported(*others), function(*others)
            for one, other in zip(found, [wanted] if len(found) == 1 else wanted, strict=True):
                close(one, other, 1e-4, 1e-4)


def test_streams_threads_and_async_eval():
    xs = [normal(200, 3) for _ in range(6)]
    wanted = [by_operations(lambda x: batch_norm(x)[0])(x) for x in xs]
    mx.eval(wanted)
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    found = []
    for i, x in enumerate(xs):
        with mx.stream(streams[i % 3]):
            found.append(batch_norm(x)[0])
            mx.async_eval(found[-1])
    for one, other in zip(found, wanted, strict=True):
        close(one, other)

    failed = []

    def work(x, wanted):
        stream = mx.new_thread_local_stream(mx.cpu) if hasattr(mx, "new_thread_local_stream") else (
            mx.new_stream(mx.cpu))  # fmt: skip
        try:
            with mx.stream(stream):
                for _ in range(20):
                    y = batch_norm(x)[0]
                    mx.eval(y)
                close(y, wanted)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=each) for each in zip(xs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# ---- errors


def test_an_error_of_an_evaluation_has_its_message_and_breaks_nothing():
    scale = normal(3)
    compiled = mx.compile(lambda x: batch_norm(x, scale)[0], shapeless=True)
    x = normal(5, 3)
    wanted = batch_norm(x, scale)[0]
    close(compiled(x), wanted)
    message = r"scale must have the shape \(4,\) that goes with x, whose shape is \(5, 4\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            mx.eval(compiled(normal(5, 4)))
        close(compiled(x), wanted)

    def evaluate_asynchronously():  # either may be the one that raises
        mx.async_eval(compiled(normal(5, 4)))
        mx.synchronize()

    with pytest.raises(RuntimeError, match=message):
        evaluate_asynchronously()
    close(batch_norm(x, scale)[0], wanted)


def test_an_error_within_a_derivative_has_its_message(monkeypatch):
    def refuse(*_):
        raise ValueError("no derivative today")

    monkeypatch.setattr("batchnorm.mlx._operations.batch_norm", refuse)
    with pytest.raises(RuntimeError, match="no derivative today"):
        mx.jvp(lambda x: batch_norm(x)[0], [normal(5, 3)], [normal(5, 3)])
    monkeypatch.undo()
    agree(lambda x: mx.jvp(lambda x: batch_norm(x)[0], [x], [x])[1], normal(5, 3))


# ---- which MLX


def test_the_operands_have_the_names_that_csrc_gives_them():
    header = Path(__file__).parent.parent / "csrc" / "faces" / "mlx_operation.h"
    listed = re.search(r"kSlotNames\[\] = \{(.*?)\}", header.read_text(), re.DOTALL)
    assert re.findall(r'"(\w+)"', listed[1]) == list(native.Operands._fields)


def test_another_version_is_not_opened(monkeypatch):
    monkeypatch.setattr(native, "version_of_mlx", lambda: "0.99.0")
    module, state = native._opened()
    assert module is None
    assert "as no kernels were built for MLX 0.99.0; for these, pip install " in state


PROGRAM = """
import json, sys
import mlx.core as mx
import batchnorm, batchnorm.mlx
x = mx.arange(12.0).reshape(6, 2) ** 2
layer = batchnorm.mlx.BatchNorm(2)
gradient = mx.grad(lambda x: (layer(x) ** 3).sum())(x)
y = layer(x)
print(json.dumps({
    "mlx": mx.__version__, "status": batchnorm.native_status(), "y": y.tolist(),
    "gradient": gradient.tolist(),
}))
"""


def test_beside_another_version_of_mlx(tmp_path):
    """In an environment of its own, into which pip puts another MLX."""
    other = "0.32.3" if mx.__version__ != "0.32.3" else "0.32.2"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = [f"mlx[cpu]=={other}", "numpy", "array-api-compat"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    package, installed = Path(batchnorm.__file__).parent, distribution("batchnorm").locate_file("")
    for each in (package, *Path(installed).glob("batchnorm-*.dist-info")):
        (tmp_path / each.name).symlink_to(each)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [python, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    )
    result = json.loads(found.stdout)
    assert result["mlx"] == other
    assert f"as no kernels were built for MLX {other}; for these, pip " in result["status"]
    x = np.arange(12.0).reshape(6, 2) ** 2
    close(np.array(result["y"]), truth.batch_norm(x).y)
