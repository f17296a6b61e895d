"""Statistics of batches in the layers of a model: observed, and set, in every library."""

import copy
import io
import os
import random
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import keras
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from compare import as_numpy, close, near, same
from flax import nnx
from models import CHANNELS, ROWS
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm.flax.linen
import batchnorm.flax.nnx
import batchnorm.keras as bk
import batchnorm.mlx
import batchnorm.torch as bt
from batchnorm.moments import Statistics
from batchnorm.tools.recalibration import recalibrated

RANDOM = np.random.default_rng(0)
BATCHES = [
    (RANDOM.normal(shift, scale, (rows, CHANNELS))).astype(np.float32)
    for rows, shift, scale in ((256, 0, 1), (256, 1, 2), (5, 3, 1), (2, -2, 4))
]
EVERYTHING = np.concatenate(BATCHES).astype(np.float64)

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
both = pytest.mark.parametrize("normalize_by", ["batch", "running"])


def normalized(x, mean, var, eps):
    return (x - mean) / np.sqrt(var + eps)


def relative(found, wanted, scale):
    """Within 1e-6 of the truth, in standard deviations for a mean."""
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * scale)


def expected(row, normalize_by):
    """What the layers are to keep of all batches: the mean and variance of each."""
    unbiased = EVERYTHING.var(axis=0, ddof=row.correction)
    if normalize_by == "batch":
        wide = [each.astype(np.float64) for each in BATCHES]
        parts = [normalized(each, each.mean(0), each.var(0), row.eps) for each in wide]
        second = np.concatenate(parts)
    else:
        second = normalized(EVERYTHING, EVERYTHING.mean(0), unbiased, row.eps)
    pairs = [(EVERYTHING.mean(0), unbiased), (second.mean(0), second.var(0, ddof=row.correction))]
    return pairs, second


@rows
@both
def test_every_element_weighs_the_same(row, normalize_by):
    model = row.make()
    row.recalibrate(model, [row.array(each) for each in BATCHES], normalize_by=normalize_by)
    pairs, _ = expected(row, normalize_by)
    for layer, (mean, var) in zip(row.layers(model), pairs, strict=True):
        relative(layer.mean, mean, np.sqrt(var).max())
        relative(layer.var, var, 0)


@rows
@both
def test_an_observation_sees_every_call_and_moves_nothing(row, normalize_by):
    model, seen = row.make(), []
    row.recalibrate(model, [row.array(EVERYTHING.astype(np.float32))], normalize_by="running")
    before = row.everything(model)
    with row.observed(model, lambda *call: seen.append(call), normalize_by=normalize_by):
        for x in BATCHES:
            row.call(model, x)
    assert row.everything(model) == before
    _, second = expected(row, normalize_by)
    theirs, ours = row.layers(model)
    assert [path for path, *_ in seen] == [theirs.path, ours.path] * len(BATCHES)
    starts = np.cumsum([0] + [len(each) for each in BATCHES])
    for k, x in enumerate(BATCHES):
        (_, first, none), (_, statistics, positive) = seen[2 * k : 2 * k + 2]
        y = second[starts[k] : starts[k + 1]]
        assert none is None
        for found, truth in ((first, x.astype(np.float64)), (statistics, y)):
            assert {each.dtype for each in found} == {np.dtype(np.float64)}
            close(found.count, np.full(CHANNELS, len(truth)))
            close(found.mean, truth.mean(0), rtol=1e-5, atol=1e-5)
            close(found.var, truth.var(0), rtol=1e-5, atol=1e-5)
        by_batch = normalized(y, y.mean(0), y.var(0), row.eps)
        by = by_batch if normalize_by == "batch" else normalized(y, ours.mean, ours.var, row.eps)
        assert positive.tolist() == (by > 0).any(axis=0).tolist()


@rows
def test_a_relu_that_is_never_positive_is_seen(row):
    model, seen = row.make(theirs=False), []
    row.set_mean(model, 1e3)
    padding = np.array([[1], [0]] * 2, np.float32)
    x = np.where(padding > 0, 1, 1e6).astype(np.float32) + np.zeros(CHANNELS, np.float32)
    with row.observed(model, lambda *call: seen.append(call)):
        row.call(model, x, padding)
    ((_, _, positive),) = seen
    assert positive.tolist() == [False] * CHANNELS


@rows
def test_what_a_mask_leaves_out_may_be_anything(row):
    """By weights, too; a batch in which nothing counts is none."""
    model = row.make(theirs=False)
    masks = [RANDOM.integers(0, 3, (len(x), 1)).astype(np.float32) for x in BATCHES]
    masks[2][:] = 0
    batches = [
        (np.where(mask > 0, x, np.nan).astype(np.float32), mask)
        for x, mask in zip(BATCHES, masks, strict=True)
    ]
    row.recalibrate(model, batches, forward=lambda call, batch: call(*batch))
    repeated = np.repeat(EVERYTHING, np.concatenate(masks)[:, 0].astype(int), axis=0)
    (layer,) = row.layers(model)
    relative(layer.mean, repeated.mean(0), repeated.std(0).max())
    relative(layer.var, repeated.var(0, ddof=row.correction), 0)
    if row.name == "torch":
        assert model.ours.num_batches_tracked == 3


@rows
def test_poisoned_statistics_are_healed(row):
    model = row.make(theirs=False)
    row.set_mean(model, np.nan)
    row.recalibrate(model, [row.array(each) for each in BATCHES])
    relative(row.layers(model)[0].mean, EVERYTHING.mean(0), EVERYTHING.std())


@rows
def test_a_batch_may_be_a_tuple_whose_first_element_is_the_input(row):
    model, other = row.make(), row.make()
    row.recalibrate(model, iter([(row.array(BATCHES[0]), "a label")]))
    row.recalibrate(other, [[row.array(BATCHES[0])]])
    same([each[1:] for each in row.layers(model)], [each[1:] for each in row.layers(other)])


class BrokenError(Exception):
    pass


@rows
@both
@pytest.mark.parametrize("kind", [BrokenError, KeyboardInterrupt])
def test_what_fails_in_the_middle_changes_nothing(row, normalize_by, kind):
    """In the second pass, too, where a layer has its new statistics already."""
    model, calls = row.make(), []
    before = row.everything(model)

    def forward(call, batch):
        calls.append(batch)
        if len(calls) == (6 if normalize_by == "running" else 3):
            raise kind("on purpose")
        return call(batch)

    with pytest.raises(kind, match="on purpose") as caught:
        row.recalibrate(model, BATCHES, forward=forward, normalize_by=normalize_by)
    assert "all statistics are as they were" in caught.value.__notes__[-1]
    assert row.everything(model) == before


@rows
def test_random_numbers_are_drawn_as_if_nothing_had_been(row):
    model = row.make()

    def draw():
        return row.random(), random.random(), np.random.random()

    def forward(call, batch):
        draw()
        return call(batch)

    seeds = {"torch": [torch.manual_seed], "mlx": [mx.random.seed]}.get(row.name, [])
    drawn = []
    for recalibrates in (False, True):
        for seed in (*seeds, random.seed, np.random.seed):
            seed(0)
        if recalibrates:
            row.recalibrate(model, BATCHES, forward=forward)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


BAD = {
    "nothing": ([], {}, ValueError, "batches must hold at least one batch"),
    "one batch": (BATCHES[0], {}, TypeError, r"batches must be an iterable .* \[batch\]"),
    "a number": (3, {}, TypeError, "batches must be an iterable over batches"),
    "another way": (BATCHES, {"normalize_by": "both"}, ValueError, "normalize_by must be 'batch'"),
    "used up": (
        iter(BATCHES),
        {"normalize_by": "running"},
        ValueError,
        "goes through the batches 2 times, .* but batches is a list_iterator",
    ),
    "NaN": ([np.full((2, 3), np.nan, np.float32)], {}, ValueError, "theirs has statistics that"),
}


@rows
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(row, case):
    batches, keywords, kind, message = BAD[case]
    if isinstance(batches, list):
        batches = [row.array(each) for each in batches]
    model = row.make()
    before = row.everything(model)
    with pytest.raises(kind, match=message):
        row.recalibrate(model, batches, **keywords)
    assert row.everything(model) == before


class OnceFull:
    """Batches that are gone after one pass, behind something that is no iterator."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        batches, self.batches = self.batches, []
        return iter(batches)


@rows
def test_batches_that_are_used_up_after_a_pass(row):
    model = row.make()
    before = row.everything(model)
    with pytest.raises(ValueError, match="there are none any more"):
        row.recalibrate(
            model, OnceFull([row.array(each) for each in BATCHES]), normalize_by="running"
        )
    assert row.everything(model) == before


@rows
def test_a_forward_that_comes_to_no_layer(row):
    model = row.make()
    before = row.layers(model)[1]

    with pytest.raises(ValueError, match="None of the 2 normalizations of the model was called"):
        row.recalibrate(model, [np.zeros(1)], forward=lambda call, batch: None)
    same(row.layers(model)[1], before)


# ---- libraries alone


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="it starts the other one")
def test_keras_with_the_backend_torch():
    """What of this file is for Keras and any backend, once more."""
    chosen = ["-k", "keras and not transformation", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen, __file__],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def test_keras_layers_with_renorm_and_frozen_ones():
    frozen = keras.layers.BatchNormalization(trainable=False)
    theirs, ours = (
        kind(renorm=True, epsilon=0.25)
        for kind in (keras.layers.BatchNormalization, bk.BatchNormalization)
    )
    model = keras.Sequential([keras.Input((CHANNELS,)), frozen, theirs, ours])
    with pytest.warns(UserWarning, match=r"since they are frozen: \S*batch_normalization"):
        bk.recalibrate(model, BATCHES, normalize_by="running")
    wide = EVERYTHING / np.sqrt(1 + 1e-3)
    for layer in (theirs, ours):
        mean, var = wide.mean(0), wide.var(0)
        kept = (layer.moving_mean, layer.moving_variance, layer.renorm_mean)
        near([as_numpy(each.value) for each in kept], [mean, var, mean])
        for each in (layer.moving_stddev, layer.renorm_stddev):
            near(as_numpy(each.value), np.sqrt(var + 0.25))
        wide = normalized(wide, mean, var, 0.25)
    assert as_numpy(frozen.moving_mean.value).tolist() == [0] * CHANNELS


def test_a_keras_model_that_is_not_built():
    model = keras.Sequential([keras.layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"model must be built, but batch_normalization\S* is not"):
        bk.recalibrate(model, BATCHES)


def test_keras_statistics_in_bfloat16():
    layer = keras.layers.BatchNormalization(dtype="bfloat16")
    model = keras.Sequential([keras.Input((CHANNELS,)), layer])
    bk.recalibrate(model, BATCHES)
    close(as_numpy(layer.moving_mean.value).astype(float), EVERYTHING.mean(0), rtol=1 / 128)


class InTraining(mlx.nn.Module):
    """A model that sets its mode by itself."""

    def __init__(self):
        super().__init__()
        self.norm = mlx.nn.BatchNorm(CHANNELS)

    def __call__(self, x):
        self.train()
        return self.norm(x)


def test_the_mode_that_a_model_of_mlx_sets_itself():
    model = InTraining().eval()
    (row,) = (each for each in ROWS if each.name == "mlx")
    with row.observed(model, lambda *_: None):
        y = model(mx.array(BATCHES[0]))
    assert model.norm.running_mean.tolist() == [0] * CHANNELS
    near(y, BATCHES[0] / np.sqrt(1 + 1e-5))
    assert not model.norm.training


class OverTime(mlx.nn.BatchNorm):
    """Of arrays whose channels are in another place."""

    def __call__(self, x):
        return super().__call__(x.swapaxes(1, 2)).swapaxes(1, 2)


def test_what_a_layer_of_mlx_normalizes_may_be_no_input_of_it():
    model = mlx.nn.Sequential(OverTime(CHANNELS))
    with pytest.raises(ValueError, match=r"comes to layers\.0 has 5 channels, .* statistics of 3"):
        batchnorm.mlx.recalibrate(model, [mx.zeros((2, CHANNELS, 5))])


class Brief(nnx.BatchNorm):
    """Of a call that takes nothing else."""

    def __call__(self, x):
        return super().__call__(x)


@both
def test_a_layer_of_nnx_with_a_call_of_its_own(normalize_by):
    layer = Brief(CHANNELS, rngs=nnx.Rngs(0))
    batches = [jnp.asarray(each) for each in BATCHES]
    batchnorm.flax.nnx.recalibrate(layer, batches, normalize_by=normalize_by)
    relative(as_numpy(layer.var[...]), EVERYTHING.var(0), 0)
    assert layer.use_running_average is False


def compiled_mlx():
    layer = mlx.nn.BatchNorm(CHANNELS)
    return batchnorm.mlx, layer, mx.array, {"forward": lambda model, x: mx.compile(model)(x)}


def compiled_nnx():
    layer = nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, x: model(x))
    return batchnorm.flax.nnx, layer, jnp.asarray, {"forward": forward}


def compiled_keras():
    model = keras.Sequential([keras.Input((CHANNELS,)), keras.layers.BatchNormalization()])
    return bk, model, np.asarray, {"forward": lambda model, x: jax.jit(model)(x)}


def mapped_torch():
    forward = {"forward": lambda model, x: torch.func.vmap(model)(x[None])}
    return bt, nn.BatchNorm1d(CHANNELS), torch.tensor, forward


@pytest.mark.parametrize("make", [compiled_mlx, compiled_nnx, compiled_keras, mapped_torch])
def test_what_is_called_within_a_transformation_cannot_be_seen(make):
    tools, model, array, forward = make()
    with pytest.raises(TypeError, match=r"is called within a transformation"):
        tools.recalibrate(model, [array(BATCHES[0])], **forward)


def test_statistics_over_devices_are_those_of_one():
    """Without the axis that the layers were made for."""
    layer = batchnorm.flax.nnx.BatchNorm(CHANNELS, axis_name="devices", rngs=nnx.Rngs(0))
    batchnorm.flax.nnx.recalibrate(layer, [jnp.asarray(BATCHES[0])])
    near(layer.mean[...], BATCHES[0].astype(np.float64).mean(0))
    assert layer.axis_name == "devices"


def test_variables_of_linen_are_not_changed_and_of_the_same_kind():
    model = flax.linen.BatchNorm(use_running_average=True, axis=(1, 2), dtype=jnp.bfloat16)
    x = jnp.asarray(RANDOM.normal(size=(8, 2, 3)).astype(np.float32))
    for freeze in (dict, flax.core.freeze):
        variables = freeze(model.init(jax.random.key(0), x))
        before = jax.tree.map(np.array, variables)
        new = batchnorm.flax.linen.recalibrate(model.apply, variables, [x[:5], x[5:]])
        same(jax.tree.leaves(jax.tree.map(np.array, variables)), jax.tree.leaves(before))
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        near(new["batch_stats"]["var"], np.asarray(x, np.float64).var(0))


@pytest.mark.parametrize("variables", [{}, {"params": {}, "batch_stats": {}}])
def test_variables_of_linen_without_averages(variables):
    with pytest.raises(ValueError, match='recalibrate looks for "batch_stats" of BatchNorm'):
        batchnorm.flax.linen.recalibrate(lambda variables, x: x, variables, [jnp.zeros(2)])


# ---- PyTorch alone


def sequential(*modules):
    return nn.Sequential(*modules).train()


def test_update_bn_weighs_a_small_last_batch_like_any_other():
    torch.manual_seed(0)
    batches = [torch.randn(256, 1) for _ in range(3)] + [torch.randn(4, 1) + 5]
    theirs, ours = (sequential(nn.BatchNorm1d(1)) for _ in range(2))
    update_bn(batches, theirs)
    bt.recalibrate(ours, batches)
    assert 1 < theirs[0].running_mean < 1.5
    close(ours[0].running_mean, torch.cat(batches).double().mean(0), rtol=0, atol=1e-6)
    assert ours[0].num_batches_tracked == 4


class Doubling(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class ByFunction(nn.BatchNorm1d):
    """As some do: in evaluation by the running statistics, whatever they are."""

    def forward(self, x):
        statistics = {"running_mean": self.running_mean, "running_var": self.running_var}
        return torch.nn.functional.batch_norm(x, **statistics, training=self.training)


class ByHand(nn.BatchNorm1d):
    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt()


@both
@pytest.mark.parametrize("kind", [ByFunction, ByHand])
def test_a_forward_of_its_own(kind, normalize_by):
    """In which what is normalized is seen, and by what."""
    (row,) = (each for each in ROWS if each.name == "torch")
    model = sequential(kind(CHANNELS), nn.BatchNorm1d(CHANNELS))
    bt.recalibrate(model, [torch.tensor(each) for each in BATCHES], normalize_by=normalize_by)
    pairs, _ = expected(row, normalize_by)
    for layer, (mean, var) in zip(model, pairs, strict=True):
        relative(as_numpy(layer.running_mean), mean, np.sqrt(var).max())
        relative(as_numpy(layer.running_var), var, 0)
        assert layer.num_batches_tracked == len(BATCHES)


class LastAxis(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@both
def test_what_a_layer_normalizes_may_be_no_input_of_it(normalize_by):
    model = sequential(LastAxis(CHANNELS), LastAxis(CHANNELS))
    x = RANDOM.normal(0, 1, (8, CHANNELS, CHANNELS)) + 10 * np.arange(CHANNELS)
    bt.recalibrate(model, [torch.tensor(x).float()], normalize_by=normalize_by)
    close(model[0].running_mean, x.mean((0, 1)), rtol=1e-5, atol=1e-5)
    close(model[1].running_mean, np.zeros(CHANNELS), rtol=0, atol=1e-5)


class ByItself(nn.Module):
    """It sets its mode, takes gradients, and gives arguments by name."""

    def __init__(self):
        super().__init__()
        self.theirs, self.ours = nn.BatchNorm1d(CHANNELS), bt.BatchNorm1d(CHANNELS)

    def forward(self, x):
        self.train()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.ours(mask=torch.ones(len(x), 1), input=self.theirs(x))
            return torch.autograd.grad(y.square().sum(), x)[0]


@both
def test_a_model_that_does_much_by_itself(normalize_by):
    (row,) = (each for each in ROWS if each.name == "torch")
    model = ByItself().eval()
    batches = [torch.tensor(each) for each in BATCHES]
    before = row.everything(model)
    with row.observed(model, lambda *_: None, normalize_by=normalize_by):
        model(batches[0])
    assert row.everything(model) == before
    bt.recalibrate(model, batches, normalize_by=normalize_by)
    pairs, _ = expected(row, normalize_by)
    for layer, (mean, var) in zip((model.theirs, model.ours), pairs, strict=True):
        relative(as_numpy(layer.running_mean), mean, np.sqrt(var).max())
        relative(as_numpy(layer.running_var), var, 0)


class Replacing(nn.BatchNorm1d):
    def forward(self, x):
        self.running_mean = self.running_mean + 1
        return super().forward(x)


@both
def test_tensors_that_a_forward_replaces_are_put_back(normalize_by):
    model = Replacing(CHANNELS)
    before = model.running_mean
    bt.recalibrate(model, [torch.tensor(BATCHES[0])], normalize_by=normalize_by)
    assert model.running_mean is before
    relative(as_numpy(before), BATCHES[0].astype(np.float64).mean(0), 1)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.BatchNorm1d(CHANNELS)
    bt.recalibrate(model, [torch.tensor(BATCHES[0])])
    relative(as_numpy(model.running_mean), BATCHES[0].astype(np.float64).mean(0), 1)
    other, weights = nn.BatchNorm1d(CHANNELS), torch.ones(CHANNELS, requires_grad=True)
    y = (weights * other.running_mean).sum()
    bt.recalibrate(other, [torch.tensor(BATCHES[0])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()  # autograd knows
    assert not other.running_mean.is_inference()


# PyTorch says that of all of torch.jit; programs made by it are still about.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_in_evaluation_mode_too():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(CHANNELS)))
    model = sequential(scripted, nn.BatchNorm1d(CHANNELS))
    bt.recalibrate(model, [torch.tensor(each) for each in BATCHES])
    assert scripted.training
    assert scripted.state_dict()["0.num_batches_tracked"] == 0
    relative(as_numpy(model[1].running_mean), EVERYTHING.mean(0) / np.sqrt(1 + 1e-5), 5)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, which is known by its name."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, num_features):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        return x - self.running_mean


def test_layers_of_every_kind():
    shared = nn.BatchNorm1d(3)
    model = sequential(
        nn.SyncBatchNorm(3),
        Doubling(3),
        bt.SyncBatchNorm(3),
        shared,
        shared,
        nn.BatchNorm1d(3, track_running_stats=False),
        bt.BatchNorm1d(3).freeze(),
        bt.BatchNorm1d(3).freeze(normalize_by="batch", update_running=None),
        bt.BatchNorm1d(3).freeze(normalize_by=None, update_running=True),
    )
    batches = [torch.tensor(each) for each in BATCHES]
    with pytest.warns(UserWarning, match=r"since they are frozen: 6\.$"):
        bt.recalibrate(model, batches)
    of_input = EVERYTHING.mean(0), EVERYTHING.var(0, ddof=1)
    relative(as_numpy(model[0].running_mean), of_input[0], 10)
    relative(as_numpy(model[0].running_var), of_input[1], 0)
    close(model[2].running_var, torch.full((3,), 4 * 519 / 518), rtol=1e-4)
    assert shared.num_batches_tracked == 2 * len(batches)
    assert model[6].num_batches_tracked == 0
    assert model[7].num_batches_tracked == model[8].num_batches_tracked == len(batches)
    assert model[6].update_running is False
    frozen = sequential(FrozenBatchNorm2d(3))
    with pytest.warns(UserWarning, match="frozen: 0"):
        bt.recalibrate(frozen, batches)
    close(frozen[0].running_mean, torch.zeros(3), rtol=0, atol=0)


def test_a_layer_that_is_not_called_is_left_and_named():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)})
    with pytest.warns(
        UserWarning, match=r"since they had too few elements come to them: unused\.$"
    ):
        bt.recalibrate(model, BATCHES, forward=lambda model, x: model["used"](torch.tensor(x)))
    assert model["unused"].num_batches_tracked == 0


def test_a_single_element_has_no_variance():
    model = nn.BatchNorm1d(3)
    with pytest.warns(UserWarning, match=r"had too few elements come to them: the model\.$"):
        bt.recalibrate(model, [torch.ones(1, 3)], normalize_by="running")
    assert model.num_batches_tracked == 0


def test_a_warning_that_is_an_error_changes_nothing():
    """As in these tests, where every warning is one."""
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)})
    with pytest.raises(UserWarning, match="unused"):
        bt.recalibrate(model, BATCHES, forward=lambda model, x: model["used"](torch.tensor(x)))
    assert model["used"].num_batches_tracked == 0
    assert model["used"].running_mean.tolist() == [0] * 3


def test_a_compiled_model_and_one_for_several_devices():
    inner = sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), bt.BatchNorm1d(3))
    plainly = copy.deepcopy(inner)
    compiled = torch.compile(inner, backend="eager")
    compiled(torch.tensor(BATCHES[0]))
    plainly(torch.tensor(BATCHES[0]))
    for model in (nn.DataParallel(compiled), plainly):
        bt.recalibrate(model, [torch.tensor(each) for each in BATCHES])
    same(inner.state_dict(), plainly.state_dict())


def test_what_skips_nonfinite_batches_skips_them():
    layer = bt.BatchNorm1d(3, skip_nonfinite=True)
    bt.recalibrate(layer, [torch.full((2, 3), torch.nan), torch.tensor(BATCHES[0])])
    assert layer.num_batches_tracked == 1
    relative(as_numpy(layer.running_mean), BATCHES[0].astype(np.float64).mean(0), 1)


class Activated(nn.BatchNorm1d):
    """As timm's: what it does after normalization is a module."""

    def __init__(self, num_features, act):
        super().__init__(num_features)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


def test_a_relu_of_timm_is_seen():
    model, seen = sequential(Activated(3, nn.ReLU()), Activated(3, nn.Tanh())), []
    model[0].running_mean += 1e3
    (torch_row,) = (row for row in ROWS if row.name == "torch")
    with torch_row.observed(model, lambda path, statistics, positive: seen.append(positive)):
        model(torch.tensor(BATCHES[0]))
    assert [None if each is None else each.tolist() for each in seen] == [[False] * 3, None]


def test_a_relu_of_one_call_is_seen():
    model, seen = bt.BatchNorm1d(3), []
    model.running_mean += 1e3
    (torch_row,) = (row for row in ROWS if row.name == "torch")
    with torch_row.observed(model, lambda path, statistics, positive: seen.append(positive)):
        model(torch.tensor(BATCHES[0]), activation="relu")
    assert [each.tolist() for each in seen] == [[False] * 3]


def test_gradients_modes_and_hooks_are_as_before():
    model = sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.BatchNorm1d(3))
    model[1].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(torch.tensor(BATCHES[0])).sum().backward()
    gradient = model[0].weight.grad.clone()
    bt.recalibrate(model, [torch.tensor(each) for each in BATCHES])
    assert calls == [True] + [False] * len(BATCHES)
    assert [each.training for each in model] == [True, False, True]
    same(model[0].weight.grad, gradient)
    assert model(torch.tensor(BATCHES[0])).requires_grad


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "recalibrate looks for batch normalizations of torch.nn and batchnorm"),
        (nn.LazyBatchNorm1d(), "model must know its channels, but it is lazy"),
    ],
)
def test_models_without_what_is_looked_for(model, message):
    with pytest.raises(ValueError, match=message):
        bt.recalibrate(model, [torch.tensor(BATCHES[0])])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"forward": 3}, "forward must be None or a function of the model and a batch, but got 3"),
        ({"progress": 3}, "progress must be True or False, but got 3"),
        ({"sync": 3}, "sync must be True, False, None or a torch.distributed.ProcessGroup"),
        ({"model": 3}, "model must be an instance of torch.nn.modules.module.Module, but got int"),
    ],
)
def test_arguments_of_a_wrong_type(keywords, message):
    with pytest.raises(TypeError, match=message):
        bt.recalibrate(**{"model": nn.BatchNorm1d(3), "batches": [], **keywords})


def test_a_model_that_keeps_no_statistics_needs_nothing():
    bt.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), [torch.zeros(1)])


def test_a_channel_with_too_few_elements_stays_as_it_was():
    statistics = Statistics(np.array([1, 4]), np.array([9.0, 9.0]), np.array([0.0, 3.0]))
    mean, var = recalibrated(np.array([np.nan, np.nan]), np.array([7.0, 7.0]), statistics, 1)
    close(mean, [np.nan, 9.0])
    close(var, [7.0, 4.0])


class OnceMore:
    """Batches that do not say how many they are."""

    def __iter__(self):
        return iter(BATCHES)


class Endless(OnceMore):
    """As some data sets say it that are read as they come."""

    def __len__(self):
        raise NotImplementedError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("batches", [list(BATCHES), OnceMore(), Endless()])
def test_progress_is_seen_on_a_terminal_alone(monkeypatch, batches):
    model = sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    shown = {}
    for progress in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        bt.recalibrate(
            model,
            batches,
            normalize_by="running",
            forward=lambda model, x: model(torch.tensor(x)),
            progress=progress,
        )
        shown[progress] = terminal.getvalue()
    assert "recalibrate: 2 passes over the batches, one for each layer" in shown[True]
    assert "8/8" in shown[True]
    assert shown[False] == ""
