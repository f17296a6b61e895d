"""The definition against others: finite differences, frameworks, ONNX, the array API standard."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import array_api_strict
import flax.linen
import jax
import jax.numpy as jnp
import mlx.core as mx
import mlx.nn
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import truth
from cases import GOOD, Good
from compare import as_numpy, close
from onnx.backend.test.case.node import _NodeTestCases, batch_normalization  # noqa: F401

from batchnorm import definition
from batchnorm.definition import Inputs, Problem
from batchnorm.moments import Moments, pooled
from batchnorm.sums import total


class Stages(NamedTuple):
    """What the definition makes of a case."""

    y: Any
    moments: Moments
    sums: Any
    dx: Any
    dresidual: Any


def arguments(features, keywords, x, scale, bias, convert=np.asarray):
    """A problem and its inputs, in float64, of a door's keywords."""
    x, scale, bias, residual, mask = (
        None if value is None else convert(np.asarray(value, np.float64))
        for value in (x, scale, bias, keywords.get("residual"), keywords.get("mask"))
    )
    problem = Problem(features, keywords["eps"], keywords.get("activation"))
    return problem, Inputs(x, scale, bias, residual, mask)


def stages(problem, inputs, dy):
    y, moments = definition.batch_norm(problem, inputs)
    sums = definition.gradient_sums(problem, inputs, moments, dy)
    return Stages(y, moments, sums, *definition.input_gradient(problem, inputs, moments, dy, *sums))


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_against_brute_force(case: Good):
    dy, x, scale, bias, keywords = case.arrays()
    problem, inputs = arguments(case.features, keywords, x, scale, bias)
    got = stages(problem, inputs, dy)
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    np.testing.assert_allclose(got.y, wanted.y, rtol=1e-12, atol=1e-12)
    alone = definition.moments(problem, inputs)
    for statistics in (got.moments.statistics(), alone.statistics()):
        np.testing.assert_allclose(statistics.mean, wanted.mean, rtol=1e-12)
        np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-11)
    np.testing.assert_allclose(
        definition.normalize(problem, inputs, alone), wanted.y, rtol=1e-12, atol=1e-12
    )
    gradients = {
        "x": got.dx,
        "scale": got.sums[1],
        "bias": got.sums[0],
        "residual": got.dresidual,
    }
    for name, wanted in truth.batch_norm_gradients(dy, x, scale, bias, **keywords).items():
        np.testing.assert_allclose(gradients[name], wanted, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_against_finite_differences(case: Good):
    dy, x, scale, bias, keywords = case.arrays()
    problem, inputs = arguments(case.features, keywords, x, scale, bias)
    got = stages(problem, inputs, dy)
    random, step = np.random.default_rng(1), 1e-6
    for name, gradient in (("x", got.dx), ("scale", got.sums[1]), ("bias", got.sums[0])):
        value = getattr(inputs, name)
        direction = random.normal(size=value.shape)

        def y(shift, name=name, value=value, direction=direction):
            moved = inputs._replace(**{name: value + shift * direction})
            return definition.batch_norm(problem, moved)[0]

        slope = np.sum((y(step) - y(-step)) / (2 * step) * dy)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_forward_derivatives_against_finite_differences(case: Good):
    _, x, scale, bias, keywords = case.arrays()
    problem, inputs = arguments(case.features, keywords, x, scale, bias)
    moments = definition.moments(problem, inputs)
    random, step = np.random.default_rng(1), 1e-6
    x_dot = random.normal(size=x.shape)
    scale_dot, bias_dot = random.normal(size=(2, *inputs.scale.shape))
    residual_dot = None if inputs.residual is None else random.normal(size=inputs.residual.shape)

    def y(shift):
        moved = inputs._replace(
            x=inputs.x + shift * x_dot,
            scale=inputs.scale + shift * scale_dot,
            bias=inputs.bias + shift * bias_dot,
            residual=None if residual_dot is None else inputs.residual + shift * residual_dot,
        )
        return definition.batch_norm(problem, moved)[0]

    partial, t0, t1 = definition.tangent_sums(problem, inputs, moments, x_dot, residual_dot)
    s0, s1 = inputs.scale * t0 + bias_dot, inputs.scale * t1 + scale_dot
    got = definition.output_tangent(problem, inputs, moments, partial, s0, s1)
    wanted = (y(step) - y(-step)) / (2 * step)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_on_the_strict_namespace(case: Good):
    """array-api-strict refuses whatever the standard does not have."""
    dy, x, scale, bias, keywords = case.arrays()
    strict = array_api_strict.asarray
    problem, inputs = arguments(case.features, keywords, x, scale, bias, strict)
    got = stages(problem, inputs, strict(dy))
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    np.testing.assert_allclose(np.asarray(got.y), wanted.y, rtol=1e-12, atol=1e-12)
    statistics = got.moments.statistics()
    assert all(each.__array_namespace__() is array_api_strict for each in (got.y, *statistics))
    moments = pooled(definition.moments(problem, inputs), lambda *parts: parts)
    definition.normalize(problem, inputs, moments)
    given = Moments.given(*statistics[1:])
    definition.normalize(problem, inputs, given)
    definition.input_gradient(problem, inputs, given, None, *got.sums)
    definition.input_gradient(problem, inputs, moments, strict(dy), *got.sums, are_scaled=True)
    partial, *sums = definition.tangent_sums(problem, inputs, moments, strict(dy), None)
    definition.output_tangent(problem, inputs, moments, partial, *sums)
    definition.update_running(*statistics[1:], statistics.merge(statistics), rate=0.1, correction=1)


@pytest.mark.parametrize(
    "length", [1, 1024, 1025, 1031, 2 * 1031, 4096, 10_007, 100_352, 1_000_003]
)
def test_long_sums_are_exact_to_some_roundings(length: int):
    """Of float32 values of one sign, which a running sum would be far off from."""
    x = np.random.default_rng(0).uniform(1, 2, (2, length)).astype(np.float32)

    class OneByOne:
        """NumPy, whose sum adds up the elements of an axis one after the other."""

        def __getattr__(self, name):
            return getattr(np, name)

        def sum(self, x, axis, keepdims=False):
            axes = axis if isinstance(axis, tuple) else (axis,)
            for each in sorted(axes, reverse=True):
                x = np.take(np.cumsum(x, axis=each, dtype=x.dtype), [-1], axis=each)
                x = x if keepdims else np.squeeze(x, each)
            return x

    with patch("batchnorm.sums.namespace", lambda x: OneByOne()):
        for axis in (0, 1):
            values = np.ascontiguousarray(x.T) if axis == 0 else x
            got = total(values, (axis,))
            wanted = values.sum(axis=axis, keepdims=True, dtype=np.float64)
            np.testing.assert_allclose(got, wanted, rtol=4e-5)
            assert got.shape == wanted.shape


@pytest.mark.parametrize("parts", [[3, 4], [0, 5, 1], [1, 1, 1], [0, 0]])
def test_pooling_over_devices(parts: list[int]):
    """Those of each device's part, about one pivot, are those of the whole."""
    x = np.random.default_rng(0).normal(5, 2, (sum(parts), 3))
    x[:1] += 1e3
    problem = Problem((1,), 1e-5)
    pieces = np.split(x, np.cumsum(parts)[:-1])
    own = [definition.moments(problem, Inputs(piece)) for piece in pieces]
    arrived, barrier = [], threading.Barrier(len(parts))

    def add_up(*arrays):
        arrived.append(arrays)
        barrier.wait()
        totals = [sum(values) for values in zip(*arrived, strict=True)]
        if barrier.wait() == 0:
            arrived.clear()
        barrier.wait()
        return totals

    with ThreadPoolExecutor(len(parts)) as devices:
        results = list(devices.map(lambda moments: pooled(moments, add_up), own))
    count = sum(parts)
    for statistics in (each.statistics() for each in results):
        np.testing.assert_allclose(statistics.count, count)
        np.testing.assert_allclose(statistics.mean, x.mean(0) if count else 0, rtol=1e-12)
        np.testing.assert_allclose(statistics.var, x.var(0) if count else 0, rtol=1e-9)


# ---- installed frameworks, on input that none of them finds hard


@pytest.fixture
def nhwc():
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 8, 4, 4, 3)).astype(np.float32)
    scale, bias = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    got = stages(*arguments((3,), {"eps": 1e-5}, x, scale, bias), dy)
    return x, dy, scale, bias, got.y, got.moments.statistics(), got.dx, got.sums


def assert_near(*pairs):
    for got, wanted in pairs:
        close(got, wanted, rtol=1e-4, atol=1e-5)


def test_against_torch(nhwc):
    x, dy, scale, bias, y, statistics, dx, sums = nhwc
    nchw = [torch.tensor(each).permute(0, 3, 1, 2) for each in (x, dy)]
    x_torch = nchw[0].requires_grad_()
    parameters = [torch.tensor(each, requires_grad=True) for each in (scale, bias)]
    mean, var = torch.zeros(3), torch.ones(3)
    y_torch = torch.nn.functional.batch_norm(
        x_torch, mean, var, *parameters, training=True, momentum=0.3
    )
    y_torch.backward(nchw[1])
    running = definition.update_running(np.zeros(3), np.ones(3), statistics, rate=0.3, correction=1)
    assert_near(
        (y_torch.detach().permute(0, 2, 3, 1), y),
        (x_torch.grad.permute(0, 2, 3, 1), dx),
        (parameters[0].grad, sums[1]),
        (parameters[1].grad, sums[0]),
        (mean, running[0]),
        (var, running[1]),
    )


def test_against_mlx(nhwc):
    x, dy, scale, bias, y, statistics, dx, sums = nhwc
    layer = mlx.nn.BatchNorm(3, momentum=0.3)

    def loss(x, scale, bias):
        layer.weight, layer.bias = scale, bias
        y = layer(x)
        return (y * mx.array(dy)).sum(), y

    (_, y_mlx), gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(
        mx.array(x), mx.array(scale), mx.array(bias)
    )
    running = definition.update_running(np.zeros(3), np.ones(3), statistics, rate=0.3, correction=1)
    assert_near(
        (y_mlx, y),
        *zip(gradients, (dx, sums[1], sums[0]), strict=True),
        (layer.running_mean, running[0]),
        (layer.running_var, running[1]),
    )


def test_against_flax(nhwc):
    x, dy, scale, bias, y, statistics, dx, sums = nhwc
    layer = flax.linen.BatchNorm(use_running_average=False, momentum=0.7, epsilon=1e-5)
    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

    def loss(x, parameters):
        y, updated = layer.apply(
            {"params": parameters, "batch_stats": state}, x, mutable=["batch_stats"]
        )
        return (y * dy).sum(), (y, updated["batch_stats"])

    (_, (y_flax, running)), (dx_flax, gradients) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(jnp.asarray(x), {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)})
    mean, var = definition.update_running(
        np.zeros(3), np.ones(3), statistics, rate=0.3, correction=0
    )
    assert_near(
        (y_flax, y),
        (dx_flax, dx),
        (gradients["scale"], sums[1]),
        (gradients["bias"], sums[0]),
        (running["mean"], mean),
        (running["var"], var),
    )


# ---- ONNX


def run_onnx(training: bool, x, scale, bias, mean, var, eps, momentum):
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    node = onnx.helper.make_node(
        "BatchNormalization",
        ["x", "scale", "bias", "mean", "var"],
        outputs,
        epsilon=eps,
        momentum=momentum,
        training_mode=int(training),
    )
    inputs = {"x": x, "scale": scale, "bias": bias, "mean": mean, "var": var}
    float_type = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "batch_norm",
        [onnx.helper.make_tensor_value_info(n, float_type, v.shape) for n, v in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, float_type, None) for n in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])
    model.ir_version = 8
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)


def ours_as_onnx(training: bool, x, scale, bias, mean, var, eps, momentum):
    """BatchNormalization of the ONNX specification, from the stages."""
    problem, inputs = arguments((1,), {"eps": eps}, x, scale, bias)
    if not training:
        return [definition.normalize(problem, inputs, Moments.given(mean, var))]
    y, moments = definition.batch_norm(problem, inputs)
    running = definition.update_running(
        mean, var, moments.statistics(), rate=1 - momentum, correction=0
    )
    return [y, *running]


@pytest.mark.parametrize("training", [False, True])
def test_against_onnx_runtime(training: bool):
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 3, 5, 4)).astype(np.float32)
    scale, bias, mean = random.normal(size=(3, 3)).astype(np.float32)
    var = random.uniform(0.5, 2, 3).astype(np.float32)
    arguments = (training, x, scale, bias, mean, var, 1e-3, 0.8)
    got, wanted = ours_as_onnx(*arguments), run_onnx(*arguments)
    assert len(got) == len(wanted)
    assert_near(*zip(got, wanted, strict=True))


# Importing the module that makes them adds the cases to the package's list.
ONNX_CASES = [case for case in _NodeTestCases if case.name.startswith("test_batchnorm")]


def test_onnx_ships_its_cases():
    assert len(ONNX_CASES) >= 4


@pytest.mark.parametrize("case", ONNX_CASES, ids=lambda case: case.name)
def test_onnx_node_case(case):
    node = case.model.graph.node[0]
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    ((inputs, outputs),) = case.data_sets
    got = ours_as_onnx(
        bool(attributes.get("training_mode", 0)),
        *inputs,
        attributes.get("epsilon", 1e-5),
        attributes.get("momentum", 0.9),
    )
    assert len(got) == len(outputs)
    for ours, theirs in zip(got, outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- what takes no part, whatever it holds: derivatives of first and second order


def _jax_derivatives(loss, arrays, directions):
    def slope(*arrays):
        return jax.jvp(partial(loss, jnp), arrays, directions)[1]

    def gradient(*arrays):
        return jax.grad(partial(loss, jnp), argnums=(0, 1, 2))(*arrays)

    return gradient(*arrays), jax.grad(slope, argnums=(0, 1, 2))(*arrays)


def _mlx_derivatives(loss, arrays, directions):
    first = mx.grad(partial(loss, mx), argnums=(0, 1, 2))

    def slope(*arrays):
        return sum((g * d).sum() for g, d in zip(first(*arrays), directions, strict=True))

    return first(*arrays), mx.grad(slope, argnums=(0, 1, 2))(*arrays)


def _torch_derivatives(loss, arrays, directions):
    arrays = [each.requires_grad_() for each in arrays]
    first = torch.autograd.grad(loss(torch, *arrays), arrays, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    return first, torch.autograd.grad(slope, arrays)


DERIVATIVES = {
    "jax": (jnp.asarray, _jax_derivatives),
    "mlx": (mx.array, _mlx_derivatives),
    "torch": (torch.tensor, _torch_derivatives),
}


@pytest.mark.parametrize("value", [np.finfo(np.float32).min, np.finfo(np.float32).max, 1e38, -1e38])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("by", ["its own", "its own, weighted", "given"])
@pytest.mark.parametrize("noise", [1e-2, 10.0])
@pytest.mark.parametrize("framework", DERIVATIVES)
def test_huge_padding_has_no_part_in_a_derivative(framework, noise, by, activation, value):
    convert, derivatives = DERIVATIVES[framework]
    random = np.random.default_rng(0)
    x = noise * random.normal(size=(12, 3)).astype(np.float32)
    scale, bias, mean, var = random.uniform(1, 2, (4, 3)).astype(np.float32)
    inside = np.ones((12, 1), bool)
    inside[[2, 7]] = False
    weights = inside * random.uniform(0.5, 2, (12, 1)).astype(np.float32)
    weights = inside.astype(np.float32) if by == "its own" else weights
    problem = Problem((1,), 1e-8, activation)
    given = Moments.given(convert(noise * mean), convert(noise**2 * var))

    def loss(xp, x, scale, bias):
        if by == "given":
            y = definition.normalize(problem, Inputs(x, scale, bias), given)
        else:
            inputs = Inputs(x, scale, bias, weights=convert(weights))
            y, _ = definition.batch_norm(problem, inputs)
        return (xp.where(convert(inside), y, convert(np.float32(0))) ** 3).sum()

    found = []
    for padding in (value, 0):
        padded = np.where(inside, x, np.float32(padding))
        arrays = tuple(convert(each) for each in (padded, scale, bias))
        directions = tuple(convert(each) for each in (inside * x, scale[::-1].copy(), bias))
        found.append(derivatives(loss, arrays, directions))
    if framework == "mlx" and noise < 1:
        # MLX's `where` multiplies a second derivative by 0, and here the output is infinite.
        found = [orders[:1] for orders in found]
    assert all(np.isfinite(as_numpy(each)).all() for order in found[0] for each in order)
    close(*found, rtol=1e-4, atol=1e-3)
