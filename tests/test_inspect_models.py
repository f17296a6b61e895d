"""Models of every framework: trained on digits and healthy, then made sick."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import batchnorm.flax.linen
import batchnorm.flax.nnx
import batchnorm.keras
import batchnorm.mlx
import batchnorm.torch
from batchnorm.tools import Report

BATCH, STEPS = 128, 150


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order].astype(np.float32) / 16, labels[order]


def batches(shift: float = 0, size: int = BATCH) -> list[np.ndarray]:
    """Some that are held out."""
    images, _ = digits()
    return [images[-8 * size + start :][:size] + shift for start in range(0, 8 * size, size)]


def training_batches() -> list[tuple[np.ndarray, np.ndarray]]:
    images, labels = digits()
    random = np.random.default_rng(0)
    rows = [random.choice(len(images) - 8 * BATCH, BATCH, replace=False) for _ in range(STEPS)]
    return [(images[each], labels[each]) for each in rows]


@dataclass
class Door:
    """A trained network of two normalizations, of the framework's or ours, and how to get at it.

    Attributes
    ----------
    names : of the two layers
    inspect : of the network and batches of NumPy's
    tensor : of a layer, by its number, one that keeps this: "mean", "var", "scale" or "bias"
    put : the same, to change it
    """

    names: tuple[str, str]
    trained: Callable[[bool], Any]
    inspect: Callable[..., Report]
    get: Callable[[Any, int, str], np.ndarray]
    put: Callable[[Any, int, str, np.ndarray], None]
    copy: Callable[[Any], Any] = copy.deepcopy
    momentum: float | None = 0.9  # as is said in the model


@cache
def of_torch(is_ours: bool) -> Any:
    import torch

    torch.manual_seed(0)
    kind = batchnorm.torch.BatchNorm1d if is_ours else torch.nn.BatchNorm1d
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    model = torch.nn.Sequential(
        linear(64, 32), kind(32), relu(), linear(32, 32), kind(32), relu(), torch.nn.Dropout(0.1),
        linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images, labels in training_batches():
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(images)), torch.from_numpy(labels)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


OF_TORCH = {"mean": "running_mean", "var": "running_var", "scale": "weight", "bias": "bias"}


def inspect_torch(model: Any, inputs: Any = None) -> Report:
    import torch

    tensors = None if inputs is None else [torch.from_numpy(each) for each in inputs]
    return batchnorm.torch.inspect(model, tensors)


def of_torch_layer(model: Any, index: int, name: str) -> Any:
    return getattr(model[(1, 4)[index]], OF_TORCH[name]).data


def put_torch(model: Any, index: int, name: str, value: np.ndarray) -> None:
    import torch

    of_torch_layer(model, index, name).copy_(torch.from_numpy(value))


@cache
def of_mlx(is_ours: bool) -> Any:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers

    mx.random.seed(0)
    kind = batchnorm.mlx.BatchNorm if is_ours else nn.BatchNorm
    model = nn.Sequential(
        nn.Linear(64, 32), kind(32), nn.ReLU(), nn.Linear(32, 32), kind(32), nn.ReLU(),
        nn.Dropout(0.1), nn.Linear(32, 10),
    )  # fmt: skip

    def loss_of(images: mx.array, labels: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(images), labels, reduction="mean")

    optimizer = mlx.optimizers.SGD(0.05, 0.9)
    for images, labels in training_batches():
        _, gradients = nn.value_and_grad(model, loss_of)(mx.array(images), mx.array(labels))
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return model


def inspect_mlx(model: Any, inputs: Any = None) -> Report:
    import mlx.core as mx

    return batchnorm.mlx.inspect(model, None if inputs is None else [mx.array(x) for x in inputs])


def put_mlx(model: Any, index: int, name: str, value: np.ndarray) -> None:
    import mlx.core as mx

    model.layers[(1, 4)[index]][OF_TORCH[name]] = mx.array(value)


@cache
def of_nnx(is_ours: bool) -> Any:
    import jax
    from flax import nnx

    kind, rngs = batchnorm.flax.nnx.BatchNorm if is_ours else nnx.BatchNorm, nnx.Rngs(0)
    normalizations = (kind(32, momentum=0.9, rngs=rngs) for _ in range(2))
    model = nnx.Sequential(
        nnx.Linear(64, 32, rngs=rngs), next(normalizations), nnx.relu,
        nnx.Linear(32, 32, rngs=rngs), next(normalizations), nnx.relu,
        nnx.Dropout(0.1, rngs=rngs), nnx.Linear(32, 10, rngs=rngs),
    )  # fmt: skip

    @nnx.jit
    def step(model: Any, images: Any, labels: Any) -> None:
        def loss_of(model: Any) -> Any:
            scores = jax.nn.log_softmax(model(images))
            return -jax.numpy.take_along_axis(scores, labels[:, None], axis=1).mean()

        gradients = nnx.grad(loss_of)(model)
        moved = jax.tree.map(lambda p, g: p - 0.2 * g, nnx.state(model, nnx.Param), gradients)
        nnx.update(model, moved)

    model.train()
    for images, labels in training_batches():
        step(model, images, labels)
    return model


def put_nnx(model: Any, index: int, name: str, value: np.ndarray) -> None:
    getattr(model.layers[(1, 4)[index]], name)[...] = value


def linen_model(is_ours: bool) -> Any:
    import flax.linen as nn

    kind = batchnorm.flax.linen.BatchNorm if is_ours else nn.BatchNorm

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            for _ in range(2):
                x = nn.relu(kind(use_running_average=not train, momentum=0.9)(nn.Dense(32)(x)))
            return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))

    return Network()


@cache
def of_linen(is_ours: bool) -> Any:
    """The variables, and the network that they are for."""
    import jax

    model = linen_model(is_ours)
    variables = model.init(jax.random.key(0), batches()[0], train=False)

    @jax.jit
    def step(variables: Any, key: Any, images: Any, labels: Any) -> Any:
        def loss_of(params: Any) -> Any:
            scores, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            scores = jax.nn.log_softmax(scores)
            return -jax.numpy.take_along_axis(scores, labels[:, None], axis=1).mean(), updates

        gradients, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
        moved = jax.tree.map(lambda p, g: p - 0.2 * g, variables["params"], gradients)
        return {"params": moved, **updates}

    for number, (images, labels) in enumerate(training_batches()):
        variables = step(variables, jax.random.key(number), images, labels)
    return model, variables


def copied_linen(model: Any) -> Any:
    import jax

    return model[0], jax.tree.map(np.array, model[1])


def inspect_linen(model: Any, inputs: Any = None) -> Report:
    network, variables = model
    if inputs is None:
        return batchnorm.flax.linen.inspect(variables)
    return batchnorm.flax.linen.inspect(
        variables, inputs, apply=lambda variables, x: network.apply(variables, x, train=False)
    )


def of_linen_layer(model: Any, index: int, name: str) -> np.ndarray:
    collection = "params" if name in ("scale", "bias") else "batch_stats"
    return model[1][collection][f"BatchNorm_{index}"][name]


def put_linen(model: Any, index: int, name: str, value: np.ndarray) -> None:
    of_linen_layer(model, index, name)[...] = value


def keras_network(is_ours: bool) -> Any:
    import keras

    of_keras, dense = keras.layers, keras.layers.Dense
    kind = batchnorm.keras.BatchNormalization if is_ours else of_keras.BatchNormalization
    return keras.Sequential(
        [
            keras.Input((64,)), dense(32), kind(momentum=0.9, name="first"), of_keras.ReLU(),
            dense(32), kind(momentum=0.9, name="second"), of_keras.ReLU(), of_keras.Dropout(0.1),
            dense(10),
        ],
        name="network",
    )  # fmt: skip


@cache
def of_keras(is_ours: bool) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    model = keras_network(is_ours)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.2), loss)
    images, labels = map(np.concatenate, zip(*training_batches(), strict=True))
    model.fit(images, labels, BATCH, verbose=0, shuffle=False)
    return model


def copied_keras(model: Any) -> Any:
    copied = keras_network(isinstance(model.layers[1], batchnorm.keras.BatchNormalization))
    for layer, other in zip(copied.layers, model.layers, strict=True):
        for variable, old in zip(layer.weights, other.weights, strict=True):
            variable.assign(old.value)
    return copied


OF_KERAS = {"mean": "moving_mean", "var": "moving_variance", "scale": "gamma", "bias": "beta"}


def of_keras_layer(model: Any, index: int, name: str) -> Any:
    return getattr(model.get_layer(("first", "second")[index]), OF_KERAS[name])


DOORS = {
    "torch": Door(
        ("1", "4"),
        of_torch,
        inspect_torch,
        lambda model, index, name: of_torch_layer(model, index, name).numpy(),
        put_torch,
        momentum=0.1,
    ),
    "mlx": Door(
        ("layers.1", "layers.4"),
        of_mlx,
        inspect_mlx,
        lambda model, index, name: np.array(model.layers[(1, 4)[index]][OF_TORCH[name]]),
        put_mlx,
        momentum=0.1,
    ),
    "nnx": Door(
        ("layers.1", "layers.4"),
        of_nnx,
        batchnorm.flax.nnx.inspect,
        lambda model, index, name: np.array(getattr(model.layers[(1, 4)[index]], name)[...]),
        put_nnx,
    ),
    "linen": Door(
        ("BatchNorm_0", "BatchNorm_1"),
        of_linen,
        inspect_linen,
        of_linen_layer,
        put_linen,
        copied_linen,
        momentum=None,  # which variables do not hold
    ),
    "keras": Door(
        ("network/first", "network/second"),
        of_keras,
        batchnorm.keras.inspect,
        lambda model, index, name: np.array(of_keras_layer(model, index, name).value),
        lambda model, index, name, value: of_keras_layer(model, index, name).assign(value),
        copied_keras,
    ),
}


@pytest.fixture(params=[(name, is_ours) for name in DOORS for is_ours in (False, True)])
def network(request):
    name, is_ours = request.param
    return DOORS[name], DOORS[name].copy(DOORS[name].trained(is_ours))


def test_a_trained_network_is_healthy(network):
    door, model = network
    report = door.inspect(model)
    assert report.findings == []
    assert [each.name for each in report.layers] == [*door.names]
    for index, layer in enumerate(report.layers):
        for name in ("mean", "var", "scale", "bias"):
            assert (getattr(layer, name) == door.get(model, index, name)).all()
        assert layer.batches in (STEPS, None)
        assert layer.momentum == door.momentum
        assert not layer.is_frozen
    report = door.inspect(model, batches())
    assert report.findings == []
    assert all(each.seen.batches.batches == 8 for each in report.layers)


def test_data_that_are_shifted(network):
    door, model = network
    before = [door.get(model, i, name).copy() for i in (0, 1) for name in ("mean", "var")]
    report = door.inspect(model, batches(shift=3))
    first, second = (each for each in report.findings if each.kind == "drift")
    assert (first.layer, first.severity) == (door.names[0], "severe")
    assert second.advice == f"Look first at {door.names[0]}, where this begins."
    after = [door.get(model, i, name) for i in (0, 1) for name in ("mean", "var")]
    assert all((old == new).all() for old, new in zip(before, after, strict=True))


def test_single_examples_are_noisy(network):
    door, model = network
    kinds = {(each.layer, each.kind) for each in door.inspect(model, batches(size=2)).findings}
    assert (door.names[1], "noisy_batches") in kinds


def test_a_layer_that_is_broken(network):
    door, model = network
    values = door.get(model, 1, "var").copy()
    values[3] = np.nan
    door.put(model, 1, "var", values)
    found = door.inspect(model).findings
    assert [(x.layer, x.kind, x.channels) for x in found] == [(door.names[1], "not_finite", (3,))]


def test_a_layer_whose_statistics_were_lost(network):
    door, model = network
    door.put(model, 0, "mean", np.zeros(32, np.float32))
    door.put(model, 0, "var", np.ones(32, np.float32))
    (found,) = door.inspect(model).findings
    assert (found.layer, found.kind, found.severity) == (door.names[0], "never_updated", "warning")


def test_no_batches(network):
    door, model = network
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        door.inspect(model, [])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "torch.nn on a CPU"),
        ("mlx", "mlx.nn"),
        ("nnx", "use_fast_variance=True"),
        ("linen", "use_fast_variance=True"),
        ("keras", None),  # whose backend here is JAX, in which its layer is exact
    ],
)
@pytest.mark.parametrize("is_ours", [False, True])
def test_a_large_mean_is_named_where_the_layer_has_one_pass(name, said, is_ours):
    door = DOORS[name]
    model = door.copy(door.trained(is_ours))
    door.put(model, 0, "mean", door.get(model, 0, "mean") + 1000)
    found = [each.sentence for each in door.inspect(model).findings]
    is_told = said is not None and (name == "linen" or not is_ours)  # of variables alone
    assert len(found) == is_told
    assert all(said in each for each in found)


def test_linen_modules_that_are_called_as_wrappers_are():
    import flax.linen as nn
    import jax

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=True)(x)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = Inner(name="model")(x)
            return nn.BatchNorm(use_running_average=True, name="ema_norm")(x)

    x = np.random.default_rng(0).normal(20, 1, (64, 3)).astype(np.float32)
    network = Network()
    variables = network.init(jax.random.key(0), x)
    report = batchnorm.flax.linen.inspect(variables, [x[:32], x[32:]], apply=network.apply)
    assert sorted(each.path for each in report.layers) == ["ema_norm", "model/BatchNorm_0"]
    assert {each.path for each in report.findings if each.kind == "drift"} == {
        each.path for each in report.layers
    }


def test_a_layer_of_torch_that_is_called_several_times_with_a_batch():
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> None:
            for part in x.split(8):
                self.norm(part)

    torch.manual_seed(0)
    network = Network()
    for _ in range(100):
        network(torch.randn(64, 4))
    (layer,) = batchnorm.torch.inspect(network, [torch.randn(64, 4) for _ in range(3)]).layers
    assert (layer.seen.batches.batches, layer.seen.calls.batches) == (3, 24)


def test_a_layer_of_torch_whose_parameters_alone_are_not_trained_is_frozen():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    assert not batchnorm.torch.inspect(model).layers[0].is_frozen
    model[1].requires_grad_(False)
    assert batchnorm.torch.inspect(model).layers[0].is_frozen
    model.requires_grad_(False)  # a model that is only evaluated
    assert not batchnorm.torch.inspect(model).layers[0].is_frozen


def test_what_was_not_seen_is_said():
    import torch

    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4))
    report = batchnorm.torch.inspect(model, [torch.randn(8, 4)])
    assert report.summary.endswith("To 2 came fewer than 2 batches, too few to see drift.")
    report = batchnorm.torch.inspect(
        model, [torch.randn(8, 4)] * 2, forward=lambda model, x: model[0](x)
    )
    assert report.summary.endswith("To 1 came fewer than 2 batches, too few to see drift.")
    with pytest.raises(ValueError, match="None of the 2 normalizations of the model was called"):
        batchnorm.torch.inspect(model, [torch.randn(8, 4)], forward=lambda model, x: x)
    with pytest.raises(TypeError, match=r"\[batch\] is one of a single batch"):
        batchnorm.torch.inspect(model, torch.randn(8, 4))


def test_a_forward_that_fails_changes_nothing():
    import torch

    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    before = copy.deepcopy(model.state_dict())

    def fail(model: Any, x: Any) -> None:
        model(x)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        batchnorm.torch.inspect(model, [torch.randn(8, 4)], forward=fail)
    assert model.training
    assert model[0].training
    assert "forward" not in vars(model[0])
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
