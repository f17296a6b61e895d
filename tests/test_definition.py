"""The definition against others: finite differences, frameworks, ONNX, the array API standard."""

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
from compare import close
from onnx.backend.test.case.node import _NodeTestCases, batch_normalization  # noqa: F401

from batchnorm import definition


def definition_arguments(case: Good, keywords, convert=np.asarray):
    options = {"features": case.features, "eps": keywords["eps"], "activation": case.activation}
    for name, option in (("mask", "weights"), ("residual", "residual")):
        value = keywords.get(name)
        options[option] = None if value is None else convert(np.asarray(value, np.float64))
    return options


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_against_brute_force(case: Good):
    dy, x, scale, bias, keywords = case.arrays()
    options = definition_arguments(case, keywords)
    y, statistics = definition.batch_norm(x, scale, bias, **options)
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    np.testing.assert_allclose(y, wanted.y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-12)
    alone = definition.statistics(x, features=case.features, weights=options["weights"])
    np.testing.assert_allclose(alone.var, wanted.var, rtol=1e-12)

    sums = definition.gradient_sums(dy, x, *statistics[1:], scale, bias, **options)
    dx, g = definition.input_gradient(dy, x, statistics, sums, scale, bias, **options)
    wanted = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
    for got, name in ((dx, "x"), (sums[1], "scale"), (sums[0], "bias"), (g, "residual")):
        np.testing.assert_allclose(got, wanted[name], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_against_finite_differences(case: Good):
    dy, x, scale, bias, keywords = case.arrays()
    scale, bias = np.float64(scale), np.float64(bias)
    options = definition_arguments(case, keywords)
    _, statistics = definition.batch_norm(x, scale, bias, **options)
    sums = definition.gradient_sums(dy, x, *statistics[1:], scale, bias, **options)
    dx, _ = definition.input_gradient(dy, x, statistics, sums, scale, bias, **options)

    random, step = np.random.default_rng(1), 1e-6
    for argument, gradient in ((0, dx), (1, sums[1]), (2, sums[0])):
        values = [x, scale, bias]
        direction = random.normal(size=values[argument].shape)

        def loss(shift, values=values, argument=argument, direction=direction):
            moved = list(values)
            moved[argument] = moved[argument] + shift * direction
            return np.sum(definition.batch_norm(*moved, **options)[0] * dy)

        slope = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_on_the_strict_namespace(case: Good):
    """array-api-strict refuses whatever the standard does not have."""
    dy, x, scale, bias, keywords = case.arrays()
    strict = array_api_strict.asarray
    options = definition_arguments(case, keywords, strict)
    scale, bias = np.float64(scale), np.float64(bias)
    y, statistics = definition.batch_norm(strict(x), strict(scale), strict(bias), **options)
    wanted = truth.batch_norm(x, scale, bias, **keywords)
    np.testing.assert_allclose(np.asarray(y), wanted.y, rtol=1e-12, atol=1e-12)
    assert all(each.__array_namespace__() is array_api_strict for each in (y, *statistics))
    definition.statistics(strict(x), features=case.features, weights=options["weights"])
    parameters = (strict(scale), strict(bias))
    sums = definition.gradient_sums(strict(dy), strict(x), *statistics[1:], *parameters, **options)
    definition.input_gradient(strict(dy), strict(x), statistics, sums, *parameters, **options)
    definition.update_running(*statistics[1:], statistics.merge(statistics), rate=0.1, correction=1)
    options.pop("weights")
    definition.normalize(strict(x), *statistics[1:], *parameters, **options)


# ---- installed frameworks, on input that none of them finds hard


@pytest.fixture
def nhwc():
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 8, 4, 4, 3)).astype(np.float32)
    scale, bias = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    y, statistics = definition.batch_norm(np.float64(x), scale, bias, features=(3,), eps=1e-5)
    options = {"features": (3,), "eps": 1e-5}
    sums = definition.gradient_sums(dy, x, *statistics[1:], scale, bias, **options)
    dx, _ = definition.input_gradient(dy, x, statistics, sums, scale, bias, **options)
    return x, dy, scale, bias, y, statistics, dx, sums


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
    x = np.float64(x)
    options = {"features": (1,), "eps": eps}
    if not training:
        return [definition.normalize(x, mean, var, scale, bias, **options)]
    y, statistics = definition.batch_norm(x, scale, bias, **options)
    return [y, *definition.update_running(mean, var, statistics, rate=1 - momentum, correction=0)]


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
