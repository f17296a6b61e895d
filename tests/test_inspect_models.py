"""Models of every framework: trained on digits and healthy, then made sick."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

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


DOORS = {
    "torch": Door(
        ("1", "4"),
        of_torch,
        inspect_torch,
        lambda model, index, name: of_torch_layer(model, index, name).numpy(),
        put_torch,
    ),
    "mlx": Door(
        ("layers.1", "layers.4"),
        of_mlx,
        inspect_mlx,
        lambda model, index, name: np.array(model.layers[(1, 4)[index]][OF_TORCH[name]]),
        put_mlx,
    ),
}


@pytest.fixture(params=[(name, is_ours) for name in DOORS for is_ours in (False, True)])
def network(request):
    name, is_ours = request.param
    return DOORS[name], DOORS[name].copy(DOORS[name].trained(is_ours)), is_ours


def test_a_trained_network_is_healthy(network):
    door, model, is_ours = network
    report = door.inspect(model)
    assert report.findings == []
    assert [each.name for each in report.layers] == [*door.names]
    for index, layer in enumerate(report.layers):
        for name in ("mean", "var", "scale", "bias"):
            assert (getattr(layer, name) == door.get(model, index, name)).all()
        assert layer.batches in (STEPS, None)
        assert layer.momentum in (0.1, 0.99, 0.9)
        assert layer.is_of_model
        assert not layer.is_frozen
        assert (layer.one_pass is None) == is_ours
    report = door.inspect(model, batches())
    assert report.findings == []
    assert all(each.seen.pooled.batches == 8 for each in report.layers)


def test_data_that_are_shifted(network):
    door, model, _ = network
    before = [door.get(model, i, name).copy() for i in (0, 1) for name in ("mean", "var")]
    report = door.inspect(model, batches(shift=3))
    first, second = (each for each in report.findings if each.kind == "drift")
    assert (first.layer, first.severity) == (door.names[0], "severe")
    assert f"comes after {door.names[0]}" in second.sentence
    after = [door.get(model, i, name) for i in (0, 1) for name in ("mean", "var")]
    assert all((old == new).all() for old, new in zip(before, after, strict=True))


def test_single_examples_are_noisy(network):
    door, model, _ = network
    kinds = {(each.layer, each.kind) for each in door.inspect(model, batches(size=2)).findings}
    assert (door.names[1], "noisy_batches") in kinds


def test_a_layer_that_is_broken(network):
    door, model, _ = network
    values = door.get(model, 1, "var").copy()
    values[3] = np.nan
    door.put(model, 1, "var", values)
    found = door.inspect(model).findings
    assert [(x.layer, x.kind, x.channels) for x in found] == [(door.names[1], "not_finite", (3,))]


def test_a_layer_whose_statistics_were_lost(network):
    door, model, _ = network
    door.put(model, 0, "mean", np.zeros(32, np.float32))
    door.put(model, 0, "var", np.ones(32, np.float32))
    (found,) = door.inspect(model).findings
    assert (found.layer, found.kind, found.severity) == (door.names[0], "never_updated", "warning")


def test_no_batches(network):
    door, model, _ = network
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        door.inspect(model, [])
