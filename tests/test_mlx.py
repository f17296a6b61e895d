"""What is MLX's own: the layer in the place of mlx.nn.BatchNorm, and MLX's transformations."""

import copy
import math
import pickle
import re
from collections import Counter
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import pytest
import torch
import truth
from cases import HARD, HUGE, LARGE_FLOAT16, LARGE_MEAN
from compare import close
from mlx.utils import tree_flatten, tree_map

from batchnorm.mlx import (
    BatchNorm,
    Statistics,
    batch_norm,
    batch_statistics,
    normalize,
    update_running,
)

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
SHAPES = [(5, 4), (2, 4, 5), (2, 3, 3, 6)]


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whichever tests ran before."""
    RNG.bit_generator.state = START


@pytest.fixture(autouse=True, params=["native", "operations"])
def way(request, monkeypatch):
    """By the native operation, or by those of MLX; by as many as a large array takes, too."""
    if request.param != "native":
        monkeypatch.setattr("batchnorm.native.kernels", None)
    if request.param == "large":
        monkeypatch.setattr("batchnorm.mlx._operations.SMALL", 0)
    return request.param


ALL_WAYS = pytest.mark.parametrize("way", ["native", "operations", "large"], indirect=True)


def normal(*shape):
    return mx.array(RNG.normal(size=shape).astype(np.float32))


def layer_with_parameters(num_features, **options):
    layer = BatchNorm(num_features, **options)
    layer.weight, layer.bias = normal(num_features), normal(num_features)
    return layer


def operations(*arrays, path):
    """How often each primitive stands in the graph that computes the arrays."""
    mx.export_to_dot(str(path), *arrays)
    return Counter(re.findall(r'\[label ="(\w+)"', path.read_text()))


# ---- construction


def test_arguments_by_position_and_defaults():
    layer = BatchNorm(4, 1e-3, 0.2, False, False)
    assert isinstance(layer, mlx.nn.BatchNorm)
    assert (layer.num_features, layer.eps, layer.momentum) == (4, 1e-3, 0.2)
    assert layer.parameters() == {}
    theirs, ours = mlx.nn.BatchNorm(4), BatchNorm(4)
    assert (ours.eps, ours.momentum) == (theirs.eps, theirs.momentum)
    assert ours.training


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_parameters(affine, tracked):
    ours = BatchNorm(3, affine=affine, track_running_stats=tracked)
    theirs = mlx.nn.BatchNorm(3, affine=affine, track_running_stats=tracked)
    for of_ours, of_theirs in [
        (ours.parameters(), theirs.parameters()),
        (ours.trainable_parameters(), theirs.trainable_parameters()),
    ]:
        assert of_ours.keys() == of_theirs.keys()
        for name, value in of_theirs.items():
            assert of_ours[name].dtype == value.dtype
            assert mx.array_equal(of_ours[name], value)
    assert ours.trainable_parameters().keys() == ({"weight", "bias"} if affine else set())


def test_repr():
    expected = "BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    assert repr(BatchNorm(4)) == expected
    assert "affine=False, track_running_stats=False" in repr(BatchNorm(4, 1e-5, 0.1, False, False))
    assert repr(BatchNorm(4, activation="relu")).endswith("=True, activation='relu')")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 0}, ValueError, r"\[BatchNorm\] 'eps' must be positive but got 0\."),
        ({"eps": -1e-30}, ValueError, r"\[BatchNorm\] 'eps' must be positive but got -1e-30\."),
        ({"eps": float("nan")}, ValueError, r"'eps' must be positive but got nan"),
        ({"eps": float("inf")}, ValueError, r"'eps' must be positive but got inf"),
        ({"eps": "1"}, TypeError, r"'eps' must be a positive number but got '1'"),
        ({"momentum": 1.5}, ValueError, r"momentum must be within \[0, 1\], but got 1.5"),
        ({"momentum": -0.1}, ValueError, r"momentum must be within \[0, 1\], but got -0.1"),
        ({"momentum": float("nan")}, ValueError, r"momentum must be within \[0, 1\], but got nan"),
        ({"num_features": 0}, ValueError, "num_features must be a positive integer, but got 0"),
        ({"num_features": 2.0}, TypeError, "num_features must be a positive integer, but got 2.0"),
        ({"activation": "gelu"}, ValueError, "activation must be .*, but got 'gelu'"),
        ({"eps": "1e-5"}, TypeError, "'eps' must be a positive number but got '1e-5'"),
        ({"eps": 1e-40}, ValueError, r"eps must be within \[1e-37, 1e\+30\], but got 1e-40"),
        ({"eps": mx.ones(3)}, TypeError, r"eps must be a number, or an array .* shape \(3,\)"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number within .*, but got '0.1'"),
        ({"momentum": mx.array(True)}, TypeError, "momentum must be a number, .* dtype .*bool"),
        ({"num_features": True}, TypeError, "num_features must be a positive integer, .* True"),
        ({"num_features": -1}, ValueError, "num_features must be a positive integer, but got -1"),
        ({"affine": "no"}, TypeError, "affine must be True or False, but got 'no'"),
        ({"affine": 1}, TypeError, "affine must be True or False, but got 1"),
        ({"track_running_stats": "no"}, TypeError, "track_running_stats must be True or .*'no'"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**{"num_features": 4, **arguments})


# ---- training and evaluation


@ALL_WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_training_and_evaluation(shape):
    layer = layer_with_parameters(shape[-1], momentum=0.3)
    values = np.prod(shape[:-1])
    mean, var = np.zeros(shape[-1]), np.ones(shape[-1])
    for _ in range(3):
        x = 3 + 2 * normal(*shape)
        expected = truth.batch_norm(x, layer.weight, layer.bias)
        close(layer(x), expected.y)
        mean = 0.7 * mean + 0.3 * expected.mean
        var = 0.7 * var + 0.3 * expected.var * values / (values - 1)
        close(layer.running_mean, mean)
        close(layer.running_var, var)
    assert layer.eval() is layer
    assert layer.running_mean.shape == layer.running_var.shape == (shape[-1],)
    x = normal(*shape)
    expected = (np.array(x) - mean) / np.sqrt(var + 1e-5) * layer.weight + layer.bias
    close(layer(x), expected)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@ALL_WAYS
@pytest.mark.parametrize("affine", [True, False])
def test_against_mlx(affine):
    ours, theirs = BatchNorm(6, affine=affine), mlx.nn.BatchNorm(6, affine=affine)
    for _ in range(3):
        x = 2 + normal(2, 3, 3, 6)
        close(ours(x), theirs(x))
    for name, value in theirs.parameters().items():
        close(ours[name], value)
    close(ours.eval()(x), theirs.eval()(x))


@ALL_WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch(shape):
    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
    ours, theirs = layer_with_parameters(shape[-1]), kinds[len(shape)](shape[-1])
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(np.array(ours.weight)))
        theirs.bias.copy_(torch.from_numpy(np.array(ours.bias)))
    for train in (True, False):
        x = normal(*shape)
        y = theirs.train(train)(torch.from_numpy(np.array(x)).movedim(-1, 1)).movedim(1, -1)
        close(ours.train(train)(x), y.detach().numpy())
        close(ours.running_mean, theirs.running_mean.numpy())
        close(ours.running_var, theirs.running_var.numpy())


def test_output_is_normalized():
    x = 7 + 5 * normal(2, 3, 3, 4)
    y = BatchNorm(4)(x)
    close(y.mean(axis=(0, 1, 2)), np.zeros(4))
    close(y.var(axis=(0, 1, 2)), np.ones(4), atol=1e-4)


def test_untracked_evaluation_uses_the_batch():
    x = normal(5, 4)
    layer = BatchNorm(4, track_running_stats=False).eval()
    close(layer(x), truth.batch_norm(x).y)
    assert layer(normal(1, 4)).tolist() == [[0.0] * 4]


def test_tracking_may_be_switched_later():
    x = normal(5, 4)
    layer = BatchNorm(4).eval()
    assert not np.allclose(layer(x), truth.batch_norm(x).y, atol=1e-2)
    layer.track_running_stats = False
    close(layer(x), truth.batch_norm(x).y)
    layer.train()(x)
    assert layer.running_mean.tolist() == [0.0] * 4


def test_the_example_of_mlx():
    from batchnorm import mlx as nn

    x = mx.random.normal((5, 4))
    bn = nn.BatchNorm(num_features=4, affine=True)
    output = bn(x)
    assert output.shape == (5, 4)


@ALL_WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_residual_and_activation(training, activation):
    layer = layer_with_parameters(3, activation=activation).train(training)
    x, residual = normal(6, 5, 3), normal(5, 3)
    y = layer(x, residual=residual)
    z = truth.batch_norm(x, layer.weight, layer.bias, residual=residual).y
    if not training:
        z = np.array(x) / np.sqrt(1 + 1e-5) * layer.weight + layer.bias + residual
    act = {None: lambda z: z, "relu": mlx.nn.relu, "silu": mlx.nn.silu}[activation]
    close(y, act(mx.array(np.array(z, np.float32))))


def test_mask():
    layer = layer_with_parameters(3, momentum=0.5)
    x, mask = normal(6, 5, 3), mx.array(RNG.integers(0, 3, size=(6, 5, 1)))
    expected = truth.batch_norm(x, layer.weight, layer.bias, mask=mask)
    unbiased = expected.var * expected.count / (expected.count - 1)
    close(layer(x, mask=mask), expected.y)
    close(layer.running_mean, 0.5 * expected.mean)
    close(layer.running_var, 0.5 + 0.5 * unbiased)
    in_evaluation = layer.eval()(x)
    assert mx.array_equal(layer(x, mask=mask), in_evaluation)


@pytest.mark.parametrize("padding", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_padding_takes_no_part_in_any_gradient(padding, training):
    layer = layer_with_parameters(3).train(training)
    x = mx.array(RNG.normal(size=(5, 3)).astype("float32")).at[1].add(padding)
    mask = mx.array([1, 0, 1, 1, 1])[:, None]

    def loss(weight):
        layer.weight = weight
        return mx.where(mask, layer(x, mask=mask), 0).square().sum()

    assert mx.isfinite(mx.grad(loss)(layer.weight)).all()


def test_a_mask_of_one_element_leaves_the_statistics():
    layer = BatchNorm(2)
    mask = mx.array([[True, False], [False, True], [False, True]])
    layer(mx.array([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]), mask=mask)
    close(layer.running_mean, [0.0, 0.6])
    close(layer.running_var, [1.0, 0.9 + 0.1 * 8])


def test_negative_weights_make_their_feature_nan():
    x = normal(8, 2)
    mask = mx.ones((8, 2)).at[3, 1].add(-1.5)
    y, statistics = batch_norm(x, mask=mask)
    assert mx.isnan(y).all(axis=0).tolist() == [False, True]
    for each in statistics:
        assert mx.isnan(each).tolist() == [False, True]


def test_an_empty_batch_changes_nothing():
    layer = BatchNorm(3)
    layer(normal(4, 3))
    before = layer.running_mean.tolist(), layer.running_var.tolist()
    y = layer(mx.zeros((0, 5, 3)), residual=mx.zeros((0, 5, 3)), mask=mx.zeros((0, 5, 1)))
    assert y.shape == layer(mx.zeros((0, 5, 3))).shape == (0, 5, 3)
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == before
    assert layer.eval()(mx.zeros((0, 3))).shape == (0, 3)


@ALL_WAYS
@pytest.mark.parametrize("hard", HARD, ids=str)
def test_hard_inputs(hard):
    x = hard.x(2000)
    expected = truth.batch_norm(x, eps=hard.eps)
    layer = BatchNorm(2, eps=hard.eps)
    close(layer(mx.array(x)), expected.y, atol=min(hard.tolerance, 1e-3), rtol=0)
    if expected.var.max() < 1e38:  # which is a float32
        assert mx.isfinite(layer.running_var).all()


@ALL_WAYS
def test_float32_whose_squares_overflow():
    x = mx.array(HUGE.x(2000))
    close(BatchNorm(2)(x), truth.batch_norm(x).y)
    gradient = mx.grad(lambda x: (batch_norm(x)[0] ** 3).sum())(x)
    expected = truth.batch_norm_gradients(3 * truth.batch_norm(x).y ** 2, x)["x"]
    close(1e30 * gradient, 1e30 * expected, atol=1e-4)


@ALL_WAYS
def test_float16_whose_squares_overflow():
    layer = BatchNorm(2)
    x = mx.array(LARGE_FLOAT16.x(1000))
    close(layer(x), truth.batch_norm(x).y, atol=1e-4)
    assert mx.isfinite(layer.running_var).all()


# ---- frozen and trained


def test_freezing():
    layer = BatchNorm(3)
    assert layer.freeze() is layer
    assert layer.trainable_parameters() == {}
    layer(1 + normal(4, 3))
    assert layer.running_mean.tolist() != [0.0] * 3
    assert layer.unfreeze(keys="bias") is layer
    assert layer.trainable_parameters().keys() == {"bias"}
    layer.unfreeze(keys=["running_mean", "running_var"])
    assert layer.trainable_parameters().keys() == {"bias"}
    layer.unfreeze(recurse=False)
    assert layer.trainable_parameters().keys() == {"weight", "bias"}
    layer.freeze(keys="weight", recurse=False)
    assert layer.trainable_parameters().keys() == {"bias"}
    for method in (layer.freeze, layer.unfreeze):
        with pytest.raises(KeyError, match=r"Module doesn't contain member zzz\."):
            method(keys="zzz", strict=True)


def test_statistics_are_never_trained():
    model = mlx.nn.Sequential(mlx.nn.Linear(4, 3), BatchNorm(3))
    for each in (model, copy.deepcopy(model)):
        each.unfreeze()
        trained = [name for name, _ in tree_flatten(each.trainable_parameters())]
        assert sorted(trained) == [
            "layers.0.bias",
            "layers.0.weight",
            "layers.1.bias",
            "layers.1.weight",
        ]
    model.eval()
    loss = mlx.nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())
    mlx.optimizers.SGD(0.1, weight_decay=0.5).update(model, loss(normal(5, 4))[1])
    assert model.layers[1].running_var.tolist() == [1.0] * 3
    assert model.layers[1].bias.tolist() != [0.0] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied):
    layer = layer_with_parameters(3).freeze(keys="weight")
    other = copied(layer)
    assert other.trainable_parameters().keys() == {"bias"}
    assert other.unfreeze().trainable_parameters().keys() == {"weight", "bias"}
    x = normal(4, 3)
    close(other(x), layer(x))


def test_modes():
    layer = BatchNorm(3)
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training
    assert layer.state is layer
    assert not layer.train(False).training


@pytest.mark.parametrize("file", ["weights.npz", "weights.safetensors"])
def test_saving_and_loading(tmp_path, file):
    saved = layer_with_parameters(3)
    saved(normal(4, 3))
    saved.save_weights(str(tmp_path / file))
    loaded = BatchNorm(3)
    assert loaded.load_weights(str(tmp_path / file)) is loaded
    for name, value in saved.parameters().items():
        assert mx.array_equal(loaded[name], value)
    with pytest.raises(ValueError, match="parameters not in model: \nbias,\nweight"):
        BatchNorm(3, affine=False).load_weights(str(tmp_path / file))
    BatchNorm(3, affine=False).save_weights(str(tmp_path / file))
    with pytest.raises(ValueError, match="Missing 2 parameters: \nbias,\nweight"):
        BatchNorm(3).load_weights(str(tmp_path / file))
    theirs = mlx.nn.BatchNorm(3)
    theirs.update(saved.parameters())
    x = normal(4, 3)
    close(saved.eval()(x), theirs.eval()(x))


# ---- found by class, and changed by class


def norms_of(model):
    return [each for each in model.modules() if isinstance(each, mlx.nn.BatchNorm)]


def small_model(**options):
    return mlx.nn.Sequential(mlx.nn.Linear(4, 3), layer_with_parameters(3, **options))


def trained_names(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_every_attribute_of_theirs_is_there():
    ours, theirs = BatchNorm(3, 1e-3, 0.2), mlx.nn.BatchNorm(3, 1e-3, 0.2)
    names = {name for name in (*vars(theirs), *theirs) if not name.startswith("_")}
    assert {"eps", "momentum", "num_features", "weight", "running_var"} <= names
    for name in names:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_evaluating_by_class():
    class Frozen(mlx.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer_with_parameters(4)

        def train(self, mode=True):
            super().train(mode)
            for norm in norms_of(self):
                norm.eval()
            return self

    model, x = Frozen().train(), 3 + normal(6, 4)
    y = model.norm(x)
    assert model.norm.running_mean.tolist() == [0.0] * 4
    close(y, np.array(x) / np.sqrt(1 + 1e-5) * model.norm.weight + model.norm.bias)


def test_freezing_by_class():
    model = small_model()
    for norm in norms_of(model):
        norm.freeze()
    assert trained_names(model) == {"layers.0.weight", "layers.0.bias"}
    for norm in norms_of(model):
        norm.unfreeze()
    assert trained_names(model) == {
        *("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
    }


def test_resetting_by_class():
    model = small_model()
    model(normal(5, 4))
    for norm in norms_of(model):
        norm.running_mean = mx.zeros_like(norm.running_mean)
        norm.running_var = mx.ones_like(norm.running_var)
    assert model.layers[1].running_mean.tolist() == [0.0] * 3
    assert model.layers[1].running_var.tolist() == [1.0] * 3


def test_replacing_by_class():
    model = small_model()

    def replaced(module):
        return mlx.nn.GroupNorm(1, 3) if isinstance(module, mlx.nn.BatchNorm) else module

    is_module = mlx.nn.Module.is_module
    model.update_modules(tree_map(replaced, model.leaf_modules(), is_leaf=is_module))
    assert [type(each) for each in model.layers] == [mlx.nn.Linear, mlx.nn.GroupNorm]


def test_initialising_by_class():
    model = small_model()

    def is_scale(module, name, value):
        if isinstance(value, (dict, list)):
            return True
        return isinstance(module, mlx.nn.BatchNorm) and name == "weight"

    before = model.layers[0].weight
    model.apply(mlx.nn.init.constant(0.25), filter_fn=is_scale)
    assert model.layers[1].weight.tolist() == [0.25] * 3
    assert model.layers[0].weight is before


def test_casting_and_quantizing_but_for_a_class():
    model = mlx.nn.Sequential(mlx.nn.Linear(64, 32), layer_with_parameters(32))

    def others(name, module):
        if not isinstance(module, (mlx.nn.BatchNorm, mlx.nn.Sequential)):
            module.set_dtype(mx.bfloat16)

    model.apply_to_modules(others)
    assert model.layers[0].weight.dtype == mx.bfloat16
    assert model.layers[1].weight.dtype == mx.float32
    mlx.nn.quantize(model)
    assert [type(each) for each in model.layers] == [mlx.nn.QuantizedLinear, BatchNorm]
    y = model(normal(5, 64))
    close(y.mean(axis=0), model.layers[1].bias, atol=1e-5)


def folded(linear, norm):
    """What programs do before they deploy a model."""
    factor = norm.weight * mx.rsqrt(norm.running_var + norm.eps)
    other = mlx.nn.Linear(*reversed(linear.weight.shape))
    other.weight = linear.weight * factor[:, None]
    other.bias = (linear.bias - norm.running_mean) * factor + norm.bias
    return other


@pytest.mark.parametrize("eps", [1e-3, mx.array(1e-3)], ids=["number", "array"])
def test_folding_keeps_an_activation_or_fails(eps):
    model, x = small_model(eps=eps), normal(5, 4)
    model(x)
    linear, norm = model.eval().layers
    close(folded(linear, norm)(x), model(x))
    norm.activation = "relu"
    wanted = model(x)
    with pytest.raises(RuntimeError, match=r"with activation='relu' .* call mlx\.nn\.relu after"):
        folded(linear, norm)
    with pytest.raises(RuntimeError, match="eps of this BatchNorm with activation='relu'"):
        mlx.nn.BatchNorm(norm.num_features, norm.eps, norm.momentum)
    norm.activation = None
    close(mlx.nn.relu(folded(linear, norm)(x)), wanted)


@pytest.mark.parametrize("eps", [0.5, mx.array(0.5)], ids=["number", "array"])
@pytest.mark.parametrize("before", [0.1, mx.array(0.1)], ids=["was number", "was array"])
def test_eps_of_a_layer_with_an_activation(before, eps):
    layer, x = BatchNorm(3, before, activation="silu"), normal(5, 3)
    layer.eps = eps
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        wanted = truth.batch_norm(x, eps=0.5).y
        close(each(x), wanted / (1 + np.exp(-wanted)))
        assert ("eps" in each.parameters()) == isinstance(eps, mx.array)
        assert ("eps" in vars(each)) == (not isinstance(eps, mx.array))
        assert "eps=0.5" in repr(each).replace("array(0.5, dtype=float32)", "0.5")
        each.load_weights(list(tree_flatten(each.parameters())))
        each.freeze().unfreeze().train().eval()
        with pytest.raises(RuntimeError, match=r'vars\(layer\)\["eps"\]'):
            each.eps  # noqa: B018
        each.activation = None
        assert float(each.eps) == 0.5


# ---- subclasses


class Doubled(BatchNorm):
    """As programs subclass mlx.nn.BatchNorm."""

    def __init__(self, num_features, factor=2.0, **options):
        self.factor = factor
        super().__init__(num_features, **options)
        self.gain = mx.array([factor])

    def __call__(self, x):
        return self.gain * super().__call__(x)

    def _extra_repr(self):
        return f"{super()._extra_repr()}, factor={self.factor}"


class ByHand(BatchNorm):
    def __call__(self, x):
        mean, var = self._calc_stats(x)
        if self.training:
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        return (x - mean) * mx.rsqrt(var + self.eps) * self.weight + self.bias


def test_a_subclass():
    layer, x = Doubled(3, eps=0.1, activation="relu"), normal(6, 3)
    wanted = np.maximum(truth.batch_norm(x, eps=0.1).y, 0)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(each(x), 2 * wanted)
        close(each.running_mean, 0.1 * truth.batch_norm(x).mean)
        assert trained_names(each) == {"weight", "bias", "gain"}
        assert each.unfreeze(keys="gain") is each
    assert repr(layer) == (
        "Doubled(3, eps=0.1, momentum=0.1, affine=True, track_running_stats=True, "
        "activation='relu', factor=2.0)"
    )


def test_a_subclass_with_a_formula_of_its_own():
    layer, x = ByHand(3), normal(6, 3)
    close(layer(x), truth.batch_norm(x).y)
    close(layer.running_mean, 0.1 * truth.batch_norm(x).mean)


def own_statistics(self, x, ddof=0):
    return mx.zeros(3), mx.ones(3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["class", "object"])
def test_statistics_of_a_subclass_are_not_passed_over(where, training):
    cls = type("Shared", (BatchNorm,), {"_calc_stats": own_statistics})
    layer = (cls if where == "class" else BatchNorm)(3).train(training)
    if where == "object":
        vars(layer)["_calc_stats"] = partial(own_statistics, layer)
    before = dict(layer)
    with pytest.raises(TypeError, match=f"{type(layer).__name__} has a _calc_stats of its own"):
        layer(X)
    assert all(layer[name] is value for name, value in before.items())


# ---- dtypes


@ALL_WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.float64])
def test_dtype_of_the_layer(training, weights, dtype):
    layer = layer_with_parameters(3).train(training)
    layer.set_dtype(weights)
    x = normal(6, 3).astype(dtype)
    y = layer(x)
    assert y.dtype == mx.result_type(dtype, weights)
    assert layer.weight.dtype == weights
    assert layer.running_mean.dtype == layer.running_var.dtype == mx.float32
    expected = truth.batch_norm(x.astype(mx.float32), *map(wide, (layer.weight, layer.bias))).y
    if training:
        tolerance = 1e-5 if y.dtype == mx.float32 else 1e-2  # bfloat16 has 8 bits
        close(y, expected, rtol=tolerance, atol=tolerance)


def wide(array):
    return np.array(array.astype(mx.float32), np.float64)


def test_dtype_without_weights():
    layer = BatchNorm(3, affine=False)
    x = normal(6, 3).astype(mx.bfloat16)
    assert layer(x).dtype == layer.eval()(x).dtype == mx.bfloat16


def test_statistics_of_a_model_stay_float32():
    model = mlx.nn.Sequential(mlx.nn.Linear(4, 3), BatchNorm(3))
    model.set_dtype(mx.bfloat16)
    layer = model.layers[1]
    assert layer.weight.dtype == mx.bfloat16
    for _ in range(300):
        model(1 + normal(5, 4).astype(mx.bfloat16))
        mx.eval(model.state)
    assert layer.running_mean.dtype == layer.running_var.dtype == mx.float32
    layer.momentum = 1e-4  # a step that bfloat16 could not hold
    before = layer.running_var
    model(100 * normal(5, 4).astype(mx.bfloat16))
    assert (layer.running_var != before).all()


@ALL_WAYS
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.float64])
def test_dtype_of_the_functions(dtype):
    x = normal(6, 3).astype(dtype)
    y, statistics = batch_norm(x, mx.ones(3), mx.zeros(3, mx.float16), residual=mx.zeros(3))
    kept = mx.float64 if dtype == mx.float64 else mx.float32
    assert y.dtype == dtype
    assert {each.dtype for each in (*statistics, *batch_statistics(x))} == {kept}
    assert normalize(x, statistics.mean, statistics.var).dtype == dtype
    mean, var = update_running(mx.zeros(3, dtype), mx.ones(3), statistics, rate=0.1)
    assert (mean.dtype, var.dtype) == (kept, mx.float32)


# ---- nothing is evaluated, nothing is done twice


@ALL_WAYS
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_evaluated(tmp_path, training):
    layer = BatchNorm(3, activation="silu").train(training)
    # Logarithms that stand in no formula of ours: once evaluated, they would leave the graph.
    x, residual, mask = (mx.log1p(mx.ones((4, 3))) for _ in range(3))
    y = layer(x, residual=residual, mask=mask)
    count = operations(y, *layer.parameters().values(), path=tmp_path / "graph")
    assert count["Log1p"] == 3
    y, statistics = batch_norm(x, mask=mask, residual=residual)
    mean, var = update_running(mx.zeros(3), mx.ones(3), statistics, rate=0.1, correction=1)
    assert operations(y, mean, var, path=tmp_path / "graph")["Log1p"] == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (32, 32)])
def test_fewer_operations_than_mlx(tmp_path, training, shape, way):
    counts = []
    for cls in (BatchNorm, mlx.nn.BatchNorm):
        layer = cls(32).train(training)
        mx.eval(layer.parameters())
        x = normal(*shape)
        y = layer(x)
        counts.append(operations(y, layer.running_mean, layer.running_var, path=tmp_path / "graph"))
    ours, theirs = counts
    assert ours["Sum"] == (2 if training and way == "operations" else 0)
    assert ours.total() <= theirs.total() + (0 if training else 2)


def test_statistics_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.native.kernels", None)
    monkeypatch.setattr("batchnorm.mlx._operations.SMALL", 0)
    layer = BatchNorm(32)
    y = layer(normal(16, 32))
    count = operations(y, layer.running_mean, layer.running_var, path=tmp_path / "graph")
    # Of x for the pivot; then of what is left, and of its squares.
    assert (count["Sum"], count["Max"], count["Min"]) == (3, 1, 1)


# ---- transformations


def loss_of(function, dy):
    return lambda *arguments: (function(*arguments) * dy).sum()


def training_function(**options):
    return lambda *arguments: batch_norm(*arguments, **options)[0]


@ALL_WAYS
def test_value_and_grad_of_a_layer():
    layer = layer_with_parameters(3)
    x, dy = normal(4, 5, 3), normal(4, 5, 3)
    expected = truth.batch_norm_gradients(dy, x, layer.weight, layer.bias)
    value, gradients = mlx.nn.value_and_grad(layer, loss_of(layer, dy))(x)
    close(value, (truth.batch_norm(x, layer.weight, layer.bias).y * np.array(dy)).sum(), 1e-4)
    assert gradients.keys() == {"weight", "bias"}
    close(gradients["weight"], expected["scale"])
    close(gradients["bias"], expected["bias"])
    close(layer.running_mean, 0.1 * truth.batch_norm(x).mean)
    close(mx.grad(loss_of(layer, dy))(x), expected["x"])
    close(mx.vjp(lambda x: (layer(x),), [x], [dy])[1][0], expected["x"])


@ALL_WAYS
def test_gradient_of_the_statistics():
    x, a, b = normal(9, 3), normal(3), normal(3)

    def loss(x):
        statistics = batch_statistics(x)
        return (statistics.mean * a + statistics.var * b).sum()

    expected = (np.array(a) + 2 * np.array(b) * (np.array(x) - np.array(x).mean(0))) / 9
    close(mx.grad(loss)(x), expected)


def differences(function, x, v, step=1e-4):
    """The derivative of function at x along v, by central differences in float64."""
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


@ALL_WAYS
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_higher_order(activation, masked):
    # float64 so that differences tell; it takes the way of large arrays, float32 both.
    x, v, w, dy = (normal(7, 3).astype(mx.float64) for _ in range(4))
    mask = mx.array(RNG.integers(0, 3, size=(7, 1))) if masked else None
    scale, bias = normal(3).astype(mx.float64), normal(3).astype(mx.float64)
    function = training_function(mask=mask, activation=activation)
    loss = loss_of(lambda x: function(x, scale, bias), dy)
    first = mx.grad(loss)
    second = mx.grad(lambda x: (first(x) * v).sum())
    third = mx.grad(lambda x: (second(x) * w).sum())
    close(mx.jvp(lambda x: function(x, scale, bias), [x], [v])[1][0],
          differences(lambda x: function(x, scale, bias), x, v), atol=1e-6)  # fmt: skip
    close(second(x), differences(first, x, v), atol=1e-6)
    close(third(x), differences(second, x, w), atol=1e-5)
    close(mx.jvp(first, [x], [v])[1][0], second(x), atol=1e-6)
    in_float32 = [each.astype(mx.float32) for each in (x, v, w, dy, scale, bias)]
    x32, v32, _, dy32, scale32, bias32 = in_float32
    first32 = mx.grad(loss_of(lambda x: function(x, scale32, bias32), dy32))
    close(mx.grad(lambda x: (first32(x) * v32).sum())(x32), second(x), 1e-4, 1e-4)
    close(mx.jvp(first32, [x32], [v32])[1][0], second(x), 1e-4, 1e-4)


@ALL_WAYS
def test_vmap():
    x, scale, bias = normal(4, 6, 3), normal(3), normal(4, 3)
    function = training_function(activation="silu")
    each = [function(x[i], scale, bias[i]) for i in range(4)]
    close(mx.vmap(function, in_axes=(0, None, 0))(x, scale, bias), mx.stack(each))
    first = mx.grad(loss_of(function, normal(6, 3)))
    each = [first(x[i], scale, bias[i]) for i in range(4)]
    close(mx.vmap(first, in_axes=(0, None, 0))(x, scale, bias), mx.stack(each))
    along_last = mx.vmap(lambda x: function(x, scale), in_axes=2, out_axes=2)
    close(along_last(mx.moveaxis(x, 0, 2)), mx.stack([function(x[i], scale) for i in range(4)], 2))


@pytest.mark.parametrize("options", [{"training": False}, {"track_running_stats": False}])
def test_vmap_of_a_layer(options):
    training = options.pop("training", True)
    layer = layer_with_parameters(3, **options).train(training)
    x = normal(4, 6, 3)
    close(mx.vmap(layer)(x), mx.stack([layer(x[i]) for i in range(4)]))


@ALL_WAYS
@pytest.mark.parametrize("shape", [(5, 4), (32, 40, 4)])
def test_compile_with_state(shape):
    x, dy = normal(*shape), normal(*shape)
    compiled, plain = BatchNorm(4), BatchNorm(4)

    @partial(mx.compile, inputs=compiled.state, outputs=compiled.state)
    def step(x):
        return mlx.nn.value_and_grad(compiled, loss_of(compiled, dy))(x)

    for _ in range(2):
        value, gradients = step(x)
        expected_value, expected = mlx.nn.value_and_grad(plain, loss_of(plain, dy))(x)
        close(value, expected_value, rtol=1e-4, atol=1e-3)
        for name, gradient in expected.items():
            close(gradients[name], gradient, rtol=1e-4, atol=1e-4)
    for name, value in plain.parameters().items():
        close(compiled[name], value)
    first = mx.compile(mx.grad(loss_of(training_function(), dy)))
    close(first(x), truth.batch_norm_gradients(dy, x)["x"], rtol=1e-4)
    second = mx.grad(lambda x: (mx.grad(loss_of(training_function(), dy))(x) ** 2).sum())
    close(mx.compile(second)(x), second(x), rtol=1e-4, atol=1e-4)


# The first is traced: from few to many, the other way round, and where axes have length 1.
SIZES = [
    [(6, 3), (8, 3), (20000, 3), (2, 3)],
    [(20000, 3), (7, 3)],
    [(2, 3, 5, 4), (9, 3, 1, 30), (2, 3, 1, 1), (30, 3, 40, 20)],
    [(2, 3, 1, 1), (1, 3, 5, 4)],
    [(1, 3, 1, 4), (4, 3, 5, 1)],
]
EVERYTHING = ("mask", "residual", "silu")


@pytest.mark.parametrize("options", [(), ("mask",), ("residual", "silu"), EVERYTHING], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_functions_compiled_for_any_size(sizes, options):
    axis, activation = 1, "silu" if "silu" in options else None

    def forward(x, scale, bias, mask, residual):
        options = {"axis": axis, "mask": mask, "residual": residual, "activation": activation}
        return batch_norm(x, scale, bias, **options)

    def loss(x, scale, bias, residual, mask, dy):
        return (forward(x, scale, bias, mask, residual)[0] * dy).sum()

    compiled = mx.compile(forward, shapeless=True)
    of_statistics = mx.compile(
        lambda x, mask: batch_statistics(x, axis=axis, mask=mask), shapeless=True
    )
    argnums = (0, 1, 2, 3) if "residual" in options else (0, 1, 2)
    derivative = mx.compile(mx.grad(loss, argnums=argnums), shapeless=True)
    for shape in sizes:
        x, dy, scale, bias = 5 + normal(*shape), normal(*shape), normal(3), normal(3)
        mask = residual = None
        if "mask" in options:  # of which two, at least, count
            mask = mx.array(RNG.integers(0, 3, shape)).reshape(-1, 3).at[:2].add(1).reshape(shape)
        if "residual" in options:
            residual = normal(*shape)
        given = {"axis": axis, "mask": mask, "residual": residual, "activation": activation}
        wanted = truth.batch_norm(x, scale, bias, **given)
        y, statistics = compiled(x, scale, bias, mask, residual)
        close(y, wanted.y)
        for one in (statistics, of_statistics(x, mask)):
            for got, name in zip(one, Statistics._fields, strict=True):
                close(got, np.broadcast_to(getattr(wanted, name), (3,)), what=name)
        gradients = truth.batch_norm_gradients(dy, x, scale, bias, **given)
        for got, name in zip(
            derivative(x, scale, bias, residual, mask, dy),
            ("x", "scale", "bias", "residual"),
            strict=False,
        ):
            close(got, gradients[name], 1e-4, 1e-4, name)


@pytest.mark.parametrize(
    "sizes", [[(20, 5, 3), (7, 9, 3), (900, 40, 3)], [(900, 40, 3), (2, 3, 3)]]
)
@pytest.mark.parametrize(
    "part", [lambda n, m: (n, m, 1), lambda n, m: (n, 1, 1), lambda n, m: (m, 1)]
)
def test_a_mask_is_broadcast_to_any_size(sizes, part):
    def loss(x, mask, dy):
        return (batch_norm(x, mask=mask)[0] * dy).sum()

    derivative = mx.compile(mx.grad(loss), shapeless=True)
    for shape in sizes:
        x, dy, mask = normal(*shape), normal(*shape), mx.array(RNG.integers(1, 3, part(*shape[:2])))
        wanted = truth.batch_norm_gradients(dy, x, mask=mask)["x"]
        close(derivative(x, mask, dy), wanted, 1e-4, 1e-4)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_compiled_for_any_size(activation, masked):
    def loss(x, mask, dy):
        return (batch_norm(x, mask=mask, activation=activation)[0] * dy).sum()

    def second(x, mask, dy):
        return mx.grad(lambda x: (mx.grad(loss)(x, mask, dy) ** 2).sum())(x)

    compiled = mx.compile(second, shapeless=True)
    for shape in [(6, 3), (40, 3), (20000, 3), (4, 3)]:
        x, dy, mask = normal(*shape), normal(*shape), None
        if masked:
            mask = mx.array(RNG.integers(1, 3, (shape[0], 1)))
        wide_dy = dy.astype(mx.float64)
        first = mx.grad(partial(loss, mask=mask, dy=wide_dy))
        wide_x = x.astype(mx.float64)
        wanted = differences(first, wide_x, first(wide_x))
        close(compiled(x, mask, dy), 2 * wanted, 1e-3, 1e-3)


def test_vmap_in_a_program_for_any_size(way):
    function = mx.vmap(lambda x: batch_norm(x)[0])
    compiled = mx.compile(function, shapeless=True)
    if way == "operations":  # MLX's broadcasts are of one size there
        with pytest.raises(ValueError, match="squeeze"):
            compiled(normal(4, 6, 3))
        return
    for shape in [(4, 6, 3), (4, 900, 3), (4, 0, 3)]:
        x = normal(*shape)
        close(compiled(x), function(x))
    assert not compiled(normal(4, 1, 3)).any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_normalize_compiled_for_any_size(sizes):
    def loss(x, mean, var, scale, bias, dy):
        return (normalize(x, mean, var, scale, bias, axis=1) * dy).sum()

    derivative = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), shapeless=True)
    for shape in sizes:
        x, dy = normal(*shape), normal(*shape)
        mean, scale, bias, var = *(normal(3) for _ in range(3)), mx.array([1.0, 2.0, 3.0])
        wide_x, g, mean_of, var_of, scale_of = (
            np.float64(each) if each.ndim > 1 else np.float64(each).reshape(3, *[1] * (x.ndim - 2))
            for each in (x, dy, mean, var, scale)
        )
        rstd = 1 / np.sqrt(var_of + 1e-5)
        x_hat = (wide_x - mean_of) * rstd
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        value, gradients = derivative(x, mean, var, scale, bias, dy)
        along = np.float64(bias).reshape(scale_of.shape)
        close(value, (g * (x_hat * scale_of + along)).sum(), 1e-4, 1e-2)
        wanted = [
            g * rstd * scale_of,
            -(g * rstd * scale_of).sum(axes),
            -(g * x_hat * scale_of * rstd**2 / 2).sum(axes),
            (g * x_hat).sum(axes),
            g.sum(axes),
        ]
        for got, each in zip(gradients, wanted, strict=True):
            close(got, each, 1e-4, 2e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 3), (8, 3), (40000, 3)],
        [(40000, 3), (5, 3)],
        [(1, 5, 1, 3), (4, 1, 1, 3), (8, 70, 70, 3)],
    ],
    ids=str,
)
def test_a_layer_compiled_for_any_size(sizes, masked):
    layer = layer_with_parameters(3, momentum=0.3)
    mean, var = np.zeros(3), np.ones(3)

    @partial(mx.compile, inputs=layer.state, outputs=layer.state, shapeless=True)
    def step(x, mask, dy):
        return mlx.nn.value_and_grad(layer, lambda x: (layer(x, mask=mask) * dy).sum())(x)

    for shape in sizes:
        x, dy = 3 + normal(*shape), normal(*shape)
        mask = (
            mx.array(RNG.integers(0, 2, shape) * 1.0).reshape(-1, 3).at[:2].add(1)
            if masked
            else None
        )
        mask = None if mask is None else mask.reshape(shape)
        wanted = truth.batch_norm(x, layer.weight, layer.bias, mask=mask)
        gradients = truth.batch_norm_gradients(dy, x, layer.weight, layer.bias, mask=mask)
        value, got = step(x, mask, dy)
        close(value, (wanted.y * np.array(dy)).sum(), 1e-4, 1e-2)
        close(got["weight"], gradients["scale"], 1e-4, 1e-3)
        close(got["bias"], gradients["bias"], 1e-4, 1e-3)
        mean = 0.7 * mean + 0.3 * wanted.mean
        var = 0.7 * var + 0.3 * wanted.var * wanted.count / (wanted.count - 1)
        close(layer.running_mean, mean)
        close(layer.running_var, var)
    layer.eval()
    evaluation = mx.compile(lambda x: layer(x), shapeless=True)
    for shape in sizes:
        x = normal(*shape)
        close(evaluation(x), (np.array(x) - mean) / np.sqrt(var + 1e-5) * layer.weight + layer.bias)


@pytest.mark.parametrize("training", [True, False])
def test_export_for_any_size(tmp_path, training):
    layer, file = layer_with_parameters(3, track_running_stats=training), str(tmp_path / "l.mlxfn")
    layer.train(training)
    mx.export_function(file, lambda x: layer(x), 2 + normal(6, 3), shapeless=True)
    imported = mx.import_function(file)
    for shape in [(6, 3), (2, 3), (30000, 3)]:
        x = 5 + normal(*shape)
        close(imported(x)[0], truth.batch_norm(x, layer.weight, layer.bias).y)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hard", HARD, ids=str)
def test_hard_inputs_compiled_for_any_size(hard, masked):
    def function(x):
        return batch_norm(x, eps=hard.eps, mask=mx.ones_like(x) if masked else None)

    compiled = mx.compile(function, shapeless=True)
    for rows in (5, 1_000_000 if hard is LARGE_MEAN else 20_000):
        x = hard.x(rows)
        wanted = truth.batch_norm(x, eps=hard.eps)
        close(compiled(mx.array(x))[0], wanted.y, rtol=0, atol=min(hard.tolerance, 2e-3))


@pytest.mark.parametrize("has_float64", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.float64])
def test_dtypes_compiled_for_any_size(monkeypatch, dtype, has_float64):
    if not has_float64:  # as on a GPU
        monkeypatch.setattr("batchnorm.mlx._operations._has_float64", lambda: False)
    compiled = mx.compile(lambda x: batch_norm(x), shapeless=True)
    kept = mx.float64 if dtype == mx.float64 else mx.float32
    for shape in [(6, 3), (2000, 3)]:
        x = (3 + normal(*shape)).astype(dtype)
        y, statistics = compiled(x)
        assert (y.dtype, {each.dtype for each in statistics}) == (dtype, {kept})
        wanted = truth.batch_norm(np.array(x.astype(mx.float64)))
        tolerance = 1e-5 if dtype in (mx.float32, mx.float64) else 1e-2
        close(y.astype(mx.float64), wanted.y, tolerance, tolerance)
        close(statistics.var, wanted.var)


@pytest.mark.parametrize("function", [batch_norm, batch_statistics, BatchNorm(3).train()])
@pytest.mark.parametrize("shape", [(1, 3), (0, 3)])
def test_any_size_is_traced_with_several_values(function, shape, monkeypatch):
    monkeypatch.setattr("batchnorm.native.kernels", None)
    compiled = mx.compile(lambda x: function(x), shapeless=True)
    with pytest.raises(ValueError, match="more than one value"):
        compiled(mx.zeros(shape))


@ALL_WAYS
def test_export(tmp_path):
    x, layer, file = normal(6, 3), BatchNorm(3), str(tmp_path / "layer.mlxfn")
    mx.export_function(file, lambda x: layer(x), x)
    close(mx.import_function(file)(x)[0], truth.batch_norm(x).y)


@ALL_WAYS
def test_checkpoint():
    x, scale, bias, dy = normal(6, 3), normal(3), normal(3), normal(6, 3)
    gradients = mx.grad(loss_of(mx.checkpoint(training_function()), dy), argnums=(0, 1, 2))
    expected = truth.batch_norm_gradients(dy, x, scale, bias)
    for gradient, name in zip(gradients(x, scale, bias), ("x", "scale", "bias"), strict=True):
        close(gradient, expected[name])


def test_training_a_model():
    x = normal(64, 8)
    y = (x[:, :1] * 2 - x[:, 1:2]) * 3
    model = mlx.nn.Sequential(
        mlx.nn.Linear(8, 16), BatchNorm(16, activation="relu"), mlx.nn.Linear(16, 1)
    )
    optimizer = mlx.optimizers.Adam(1e-2)

    def loss():
        return mlx.nn.losses.mse_loss(model(x), y)

    step = mlx.nn.value_and_grad(model, loss)
    losses = []
    for _ in range(100):
        value, gradients = step()
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < 0.05 * losses[0]


# ---- bad input

X = mx.zeros((4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            [mx.zeros(3)],
            ValueError,
            "Expected input tensor to have 2, 3 or 4 dimensions, but got 1",
        ),
        ([mx.zeros((2,) * 4 + (3,))], ValueError, "2, 3 or 4 dimensions, but got 5"),
        ([mx.zeros((1, 3))], ValueError, "training requires more than one value per channel"),
        ([mx.zeros((1, 1, 1, 3))], ValueError, "more than one value per channel"),
        ([mx.zeros((4, 2))], ValueError, r"num_features=3 channels, .* 2: its shape is \(4, 2\)"),
        ([mx.zeros((4, 1))], ValueError, r"num_features=3 channels, .* 1: its shape is \(4, 1\)"),
        ([mx.zeros((4, 3), mx.int32)], TypeError, "x must be .*floating.*int32"),
        ([mx.zeros((4, 3), mx.complex64)], TypeError, "x must be .*floating.*complex64"),
        ([np.zeros((4, 3))], TypeError, "x must be an instance of mlx.core.array, but got ndarray"),
        ([X, mx.zeros((5, 3))], ValueError, r"residual must broadcast to .*\(4, 3\).*\(5, 3\)"),
        ([X, mx.zeros((4, 3), mx.int8)], TypeError, "residual must be .*floating.*int8"),
        ([X, 1.0], TypeError, "residual must be an instance of mlx.core.array, but got float"),
        ([X, None, mx.zeros((2, 4, 3))], ValueError, r"mask must broadcast to .*\(2, 4, 3\)"),
        ([X, None, mx.zeros((4, 2))], ValueError, r"mask must broadcast to .*\(4, 2\)"),
        ([X, None, mx.zeros((4, 3), mx.complex64)], TypeError, "mask must be .*complex64"),
        ([X, None, [True] * 4], TypeError, "mask must be an instance of mlx.core.array"),
    ],
)
def test_bad_calls_change_nothing(arguments, error, message):
    layer = BatchNorm(3)
    before = dict(layer)
    with pytest.raises(error, match=message):
        layer(*arguments)
    assert dict(layer).keys() == before.keys()
    for name, value in before.items():
        assert layer[name] is value


def test_a_mask_is_checked_in_evaluation_too():
    with pytest.raises(ValueError, match="mask must broadcast"):
        BatchNorm(3).eval()(X, mask=mx.ones((4, 2)))


def test_one_channel_is_not_any_number_of_channels():
    with pytest.raises(ValueError, match="x must have num_features=1 channels, but it has 3"):
        BatchNorm(1)(X)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("momentum", 2.0, r"momentum must be within \[0, 1\], but got 2.0"),
        ("eps", -1.0, "eps must be positive and finite, but got -1.0"),
        ("activation", "tanh", "activation must be .*'tanh'"),
        ("weight", mx.ones(2), r"weight must have the feature shape \(3,\) of x"),
        ("bias", mx.ones((1, 3)), r"bias must have the feature shape \(3,\) of x"),
    ],
)
def test_attributes_are_checked_where_they_are_used(attribute, value, message):
    layer = BatchNorm(3)
    setattr(layer, attribute, value)
    with pytest.raises(ValueError, match=message):
        layer(X)
    assert layer.running_mean.tolist() == [0.0] * 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 1), (1,), (1, 3), (4,)])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_have_the_feature_shape_in_both_modes(name, shape, training):
    layer = BatchNorm(3).train(training)
    layer[name] = mx.full(shape, 2.0)
    before = dict(layer)
    expected = re.escape(f"{name} must have the feature shape (3,) of x, ")
    with pytest.raises(
        ValueError, match=expected + re.escape(f"whose shape is (4, 3), but its shape is {shape}.")
    ):
        layer(X)
    for each, value in before.items():
        assert layer[each] is value


ARRAYS = ["weight", "bias", "running_mean", "running_var"]


def by_attribute(layer, name, value):
    setattr(layer, name, value)


def by_item(layer, name, value):
    layer[name] = value


def by_update(layer, name, value):
    layer.update({name: value}, strict=False)


def by_loading(layer, name, value):
    layer.load_weights([(name, value)], strict=False)


WAYS = [by_attribute, by_item, by_update, by_loading]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "value",
    [
        np.full(3, 0.5, np.float32),
        np.full(3, 0.5),
        np.linspace(1, 3, 6)[::-2],
        np.full(3, 0.5, ">f4"),
        np.full(3, 0.5, np.float16),
        np.full(3, 0.5, np.longdouble),
        ml_dtypes.bfloat16(0.5),
        np.full(3, 2),
        [0.5] * 3,
        (2, 2, 2),
        0.5,
        2,
        np.float32(0.5),
        np.array(0.5),
        mx.array(0.5),
        mx.full((3,), 2, mx.int32),
        [mx.array(0.5)] * 3,
        torch.full((3,), 0.5),
        jnp.full(3, 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_becomes_an_array_of_the_layer(name, value, training):
    x, wanted = normal(6, 3), np.broadcast_to(np.asarray(value).astype(np.float64), 3)
    options = {"scale": wanted} if name == "weight" else {"bias": wanted} if name == "bias" else {}
    layer = BatchNorm(3, momentum=0.25).train(training)
    before = dict(layer)
    for way in WAYS:
        way(layer, name, value)
        assert (layer[name].shape, layer[name].dtype) == ((3,), mx.float32)
        assert getattr(layer, name) is layer[name]
        assert layer.parameters().keys() == before.keys()
    if training:
        expected = truth.batch_norm(x, **options)
        close(layer(x), expected.y)
        if name == "running_mean":
            close(layer.running_mean, 0.75 * wanted + 0.25 * expected.mean)
    else:
        scale, bias, mean, var = (wanted if name == each else before[each] for each in ARRAYS)
        close(layer(x), (np.array(x) - mean) / np.sqrt(np.array(var) + 1e-5) * scale + bias)


def test_an_array_of_a_half_dtype_is_kept_where_it_is_trained():
    layer = BatchNorm(3)
    layer.weight = layer.running_var = mx.ones(3, mx.float16)
    assert (layer.weight.dtype, layer.running_var.dtype) == (mx.float16, mx.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", "must be an array, but of str none can be made"),
        ({}, "must be an array, but of dict none can be made"),
        ([[1.0], [1.0, 2.0]], "must be an array, but of list none can be made"),
        (np.array(["a", "b", "c"]), "must be an array, but of ndarray none can be made"),
        (np.ma.masked_array([1.0, 2.0, 3.0]), "must not be a masked array"),
        (np.datetime64("2020"), "must be an array, but of datetime64 none can be made"),
        (None, "must be an array, but of NoneType none can be made"),
        (1j, "must be an array, but of complex none can be made"),
        (mx.zeros(3, mx.complex64), "must be an array of real .*, but its dtype is .*complex64"),
    ],
)
def test_what_becomes_no_array_of_the_layer(name, way, value, message):
    layer = BatchNorm(3)
    before, attributes = dict(layer), dict(vars(layer))
    if isinstance(value, (dict, list)) and way in (by_update, by_loading):
        way = by_item  # there a tree of modules
    if value is None and way is by_attribute:
        way = by_item  # there it means that there is none
    with pytest.raises(TypeError, match=f"{name} {message}"):
        way(layer, name, value)
    assert vars(layer) == attributes
    assert all(layer[each] is kept for each, kept in before.items())


def test_without_a_weight_there_is_no_bias():
    x, theirs = normal(6, 3), mlx.nn.BatchNorm(3)
    ours = layer_with_parameters(3)
    theirs.weight = ours.weight = None
    theirs.bias = ours.bias
    close(ours(x), theirs(x))
    assert "affine=False" in repr(ours)
    ours.weight, theirs.weight = normal(3), None
    close(ours(x), truth.batch_norm(x, ours.weight, ours.bias).y)
    ours.bias = None
    close(ours(x), truth.batch_norm(x, ours.weight).y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_are_not_there(name, training):
    layer, x = BatchNorm(3).train(training), normal(6, 3)
    setattr(layer, name, None)
    with pytest.raises(ValueError, match=f"True, but {name} is None or absent. Set both, or set"):
        layer(x)
    setattr(layer, name, 1.0)
    layer(x)
    late = BatchNorm(3, track_running_stats=False).train(training)
    late.track_running_stats = True
    with pytest.raises(ValueError, match="True, but running_mean is None or absent"):
        late(x)
    late.running_mean, late.running_var = 0.0, 1.0
    late(x)
    assert late.trainable_parameters().keys() == {"weight", "bias"}


# ---- numbers in arrays


@ALL_WAYS
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.float64])
@pytest.mark.parametrize("shapeless", [False, True])
def test_numbers_of_functions_may_be_traced(shapeless, dtype):
    def function(x, eps, rate):
        y, statistics = batch_norm(x, eps=eps)
        moved = update_running(mx.zeros(3), mx.ones(3), statistics, rate=rate, correction=1)
        return y, normalize(x, mx.zeros(3), mx.ones(3), eps=eps), *moved

    compiled = mx.compile(function, shapeless=shapeless)
    for eps, rate in [(0.5, 0.25), (2.0, 0.75)]:
        x = normal(7, 3)
        y, evaluated, mean, var = compiled(x, mx.array(eps, dtype), mx.array(rate, dtype))
        assert {each.dtype for each in (y, evaluated, mean, var)} == {mx.float32}
        wanted = truth.batch_norm(x, eps=eps)
        close(y, wanted.y)
        close(evaluated, np.array(x) / np.sqrt(1 + eps))
        close(mean, rate * wanted.mean)
        close(var, 1 - rate + rate * wanted.var * 7 / 6)
        for number in (mx.array(1), mx.array(1, mx.int8)):
            close(batch_norm(x, eps=number)[0], truth.batch_norm(x, eps=1).y)


def test_a_number_in_an_array_has_a_derivative():
    x, dy = normal(7, 3), normal(7, 3)

    def loss(eps):
        return (batch_norm(x, eps=eps)[0] * dy).sum()

    wanted = differences(lambda eps: (truth.batch_norm(x, eps=eps).y * np.array(dy)).sum(), 0.5, 1)
    close(mx.grad(loss)(mx.array(0.5)), wanted, 1e-4)


def test_numbers_in_arrays_are_not_evaluated(tmp_path):
    layer, number = BatchNorm(3), mx.log1p(mx.array(0.5))
    layer.eps = layer.momentum = number
    y = layer(mx.ones((4, 3)))
    mean, var = update_running(mx.zeros(3), mx.ones(3), batch_statistics(X), rate=number)
    count = operations(y, mean, var, *layer.parameters().values(), path=tmp_path / "graph")
    assert count["Log1p"] == 1


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
def test_numbers_in_arrays_are_nan_where_they_are_out_of_range(value):
    rate = mx.array(value)
    for each in update_running(mx.zeros(3), mx.ones(3), batch_statistics(X), rate=rate):
        assert mx.isnan(each).all()
    for eps in (-1.0, 0.0, 1e-38, 1e31, math.nan, math.inf):
        for each in (batch_norm, lambda x, eps: (normalize(x, *mx.ones((2, 3)), eps=eps),)):
            assert mx.isnan(each(1 + X, eps=mx.array(eps))[0]).all()
    layer = BatchNorm(3, momentum=rate)
    layer(X)
    assert mx.isnan(layer.running_mean).all()


@pytest.mark.parametrize("number", [mx.ones(1), mx.array(True), mx.array(1j)])
def test_what_holds_no_real_number_is_refused(number):
    for name, call in {
        "eps": lambda: batch_norm(X, eps=number),
        "rate": lambda: update_running(mx.ones(3), mx.ones(3), batch_statistics(X), rate=number),
        "momentum": lambda: BatchNorm(3, momentum=number),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a number, or an array without axes"):
            call()


def test_a_schedule_of_a_compiled_layer():
    layer = layer_with_parameters(3, momentum=mx.array(0.5), eps=mx.array(0.25))
    step = mx.compile(lambda x: layer(x), inputs=layer.state, outputs=layer.state)
    mean = np.zeros(3)
    for momentum in (0.5, 0.25, 1.0):
        layer.momentum, x = mx.array(momentum), normal(6, 3)
        wanted = truth.batch_norm(x, layer.weight, layer.bias, eps=0.25)
        close(step(x), wanted.y)
        mean = (1 - momentum) * mean + momentum * wanted.mean
        close(layer.running_mean, mean)
    model = mlx.nn.Sequential(layer)
    model.unfreeze()
    model.set_dtype(mx.bfloat16)
    assert layer.trainable_parameters().keys() == {"weight", "bias"}
    assert layer.eps.dtype == layer.momentum.dtype == mx.float32
    layer.momentum = 0.5  # a number again
    assert layer.momentum == 0.5
    assert "momentum" not in layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: batch_norm(X, mx.ones(4)),
            ValueError,
            r"scale must have the feature shape \(3,\)",
        ),
        (lambda: batch_norm(X, mx.ones((1, 3))), ValueError, r"scale must .* shape is \(1, 3\)"),
        (lambda: batch_norm(X, 2.0), TypeError, "scale must be an instance of mlx.core.array"),
        (lambda: batch_norm(X, bias=mx.ones(3, mx.int32)), TypeError, "bias must be .*int32"),
        (lambda: batch_norm(X, axis=2), ValueError, r"axis must be within \[-2, 1\]"),
        (lambda: batch_norm(X, axis=(0, -2)), ValueError, "axis must not name an axis of x twice"),
        (lambda: batch_norm(X, axis=0.5), TypeError, "axis must be an integer"),
        (lambda: batch_norm(X, eps=0), ValueError, "eps must be positive"),
        (lambda: batch_norm(X, activation="tanh"), ValueError, "activation must be"),
        (lambda: batch_norm(mx.zeros((1, 3))), ValueError, "more than one value of each feature"),
        (lambda: batch_norm(X, group="world"), TypeError, "group must be an instance of .*Group"),
        (lambda: normalize(X, mx.ones(4), mx.ones(3)), ValueError, "mean must have the feature"),
        (lambda: normalize(X, mx.ones(3), mx.ones(1)), ValueError, "var must have the feature"),
        (lambda: batch_statistics(X.astype(mx.int32)), TypeError, "x must be .*int32"),
        (lambda: batch_statistics(X, mask=mx.ones(4)), ValueError, "mask must broadcast"),
        (
            lambda: update_running(mx.ones(2), mx.ones(3), batch_statistics(X), rate=0.1),
            ValueError,
            r"mean must have the shape \(3,\)",
        ),
        (
            lambda: update_running(mx.ones(3), mx.ones(3), batch_statistics(X), rate=-1),
            ValueError,
            "rate must be within",
        ),
        (
            lambda: update_running(
                mx.ones(3), mx.ones(3), batch_statistics(X), rate=0, correction=2
            ),
            ValueError,
            "correction must be 0",
        ),
    ],
)
def test_bad_arguments_of_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- the functions of this door


@ALL_WAYS
@pytest.mark.parametrize("axis", [0, 1, (1, 2), (0, 2)])
def test_axes(axis):
    x = 5 + normal(4, 5, 6)
    expected = truth.batch_norm(x, axis=axis)
    y, statistics = batch_norm(x, axis=axis)
    close(y, expected.y)
    for actual, wanted in zip(statistics, expected[1:], strict=True):
        close(actual, wanted)
    close(normalize(x, statistics.mean, statistics.var, axis=axis), expected.y)


def test_the_ways_of_computing_agree(monkeypatch):
    x, scale, bias = 100 + normal(50, 3), normal(3), normal(3)
    small = batch_norm(x, scale, bias, activation="silu")
    monkeypatch.setattr("batchnorm.mlx._operations.SMALL", 0)
    large = batch_norm(x, scale, bias, activation="silu")
    close(small[0], large[0])
    for one, other in zip(small[1], large[1], strict=True):
        close(one, other)


def test_a_group_of_one_is_no_group():
    x = normal(6, 3)
    alone = mx.distributed.init()
    assert alone.size() == 1
    assert mx.array_equal(batch_norm(x, group=alone)[0], batch_norm(x)[0])


def test_statistics_merge():
    x = 3 + normal(30, 2)
    merged = batch_statistics(x[:4]).merge(batch_statistics(x[4:]))
    assert isinstance(merged, Statistics)
    for actual, wanted in zip(merged, truth.batch_norm(x)[1:], strict=True):
        close(actual, wanted)
