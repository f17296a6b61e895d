"""The table of conventions against the frameworks that it speaks of."""

import inspect
import re
import tomllib
from pathlib import Path

import equinox as eqx
import flax.linen
import jax
import keras
import mlx.core
import mlx.nn
import numpy as np
import onnx
import pytest
import torch

from batchnorm.conventions import CONVENTIONS

ROOT = Path(__file__).parents[1]


def default(function, name):
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize("layer", [mlx.nn.BatchNorm(3), torch.nn.BatchNorm1d(3)], ids=type)
def test_mlx_and_torch(layer):
    convention = CONVENTIONS["mlx" if isinstance(layer, mlx.nn.BatchNorm) else "torch"]
    for name in (convention.scale, convention.bias, convention.mean, convention.var):
        assert tuple(getattr(layer, name).shape) == (3,)
    assert default(type(layer), "momentum") == convention.momentum
    assert default(type(layer), "eps") == convention.eps


@pytest.mark.parametrize(
    ("framework", "layer", "array"),
    [
        ("mlx", mlx.nn.BatchNorm(3), mlx.core.array),
        ("torch", torch.nn.BatchNorm1d(3), torch.tensor),
    ],
    ids=["mlx", "torch"],
)
def test_momentum_and_correction(framework, layer, array):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    layer(array(x))
    convention = CONVENTIONS[framework]
    rate = convention.rate(convention.momentum)
    np.testing.assert_allclose(layer.running_mean, rate * x.mean(0), rtol=1e-5)
    variance = x.var(0, ddof=convention.correction)
    np.testing.assert_allclose(layer.running_var, (1 - rate) + rate * variance, rtol=1e-5)


@pytest.mark.parametrize("page", ["conventions.md", "coming-from-mlx.md"])
def test_the_oldest_mlx_is_the_first_that_has_this_convention(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = re.findall(r">=([\d.]+)", " ".join(extras["optional-dependencies"]["mlx"]))
    named = re.findall(r"MLX (\d+\.\d+\.\d+) or newer", (ROOT / "docs" / page).read_text())
    assert {*named} == {*required}


def test_flax():
    convention = CONVENTIONS["flax"]
    layer = flax.linen.BatchNorm(use_running_average=False)
    assert (layer.momentum, layer.epsilon) == (convention.momentum, convention.eps)
    assert hasattr(layer, convention.name_of_eps)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["params"]) == {convention.scale, convention.bias}
    _, state = layer.apply(variables, x, mutable=["batch_stats"])
    rate = convention.rate(convention.momentum)
    state = state["batch_stats"]
    np.testing.assert_allclose(state[convention.mean], rate * x.mean(0), rtol=1e-4)
    variance = x.var(0, ddof=convention.correction)
    np.testing.assert_allclose(state[convention.var], (1 - rate) + rate * variance, rtol=1e-5)


def test_equinox():
    convention = CONVENTIONS["equinox"]
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    assert (layer.momentum, layer.eps) == (convention.momentum, convention.eps)
    for name in (convention.scale, convention.bias, convention.name_of_eps):
        assert hasattr(layer, name)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    _, state = jax.vmap(layer, (0, None), (0, None), axis_name="batch")(x, state)
    mean, var = state.get(layer.batch_state_index)
    rate = convention.rate(convention.momentum)
    np.testing.assert_allclose(mean, rate * x.mean(0), rtol=1e-4)
    variance = x.var(0, ddof=convention.correction)
    np.testing.assert_allclose(var, (1 - rate) + rate * variance, rtol=1e-5)


def test_keras():
    convention = CONVENTIONS["keras"]
    layer = keras.layers.BatchNormalization()
    assert (layer.momentum, layer.epsilon) == (convention.momentum, convention.eps)
    assert hasattr(layer, convention.name_of_eps)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    layer(x, training=True)
    names = [convention.scale, convention.bias, convention.mean, convention.var]
    assert [each.name for each in layer.weights] == names
    mean, var = (getattr(layer, each).value for each in (convention.mean, convention.var))
    rate = convention.rate(convention.momentum)
    np.testing.assert_allclose(mean, rate * x.mean(0), rtol=1e-4)
    variance = x.var(0, ddof=convention.correction)
    np.testing.assert_allclose(var, (1 - rate) + rate * variance, rtol=1e-5)


def test_onnx():
    convention = CONVENTIONS["onnx"]
    schema = onnx.defs.get_schema("BatchNormalization")
    names = [each.name for each in schema.inputs]
    assert names[1:] == [convention.scale, convention.bias, convention.mean, convention.var]
    attributes = schema.attributes
    assert attributes["epsilon"].default_value.f == pytest.approx(convention.eps)
    assert attributes["momentum"].default_value.f == pytest.approx(convention.momentum)
