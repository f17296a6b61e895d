"""batchnorm.torch's layers against torch.nn's: what they are, what they keep, what they compute."""

import copy
import inspect
import io
import itertools
import pickle
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import truth
from compare import alike, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm.torch as bt
from batchnorm import native

LAYERS = [
    (bt.BatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (bt.BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (bt.BatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 6)),
    (bt.BatchNorm3d, nn.BatchNorm3d, (2, 4, 3, 2, 5)),
]
CLASSES = LAYERS[1:]
IDS = ["1d-NC", "1d-NCL", "2d", "3d"]


def tensor(*shape, dtype=torch.float64, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(size=shape) * 2 + 3).to(dtype)


# Of float64, where no other tolerance is named.
close = partial(alike, tolerance=1e-11)


def state(layer):
    """A copy of all that a layer keeps, by name."""
    return {
        name: each.clone() for name, each in (*layer.named_parameters(), *layer.named_buffers())
    }


def saved_and_loaded(value, **keywords):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **keywords)


def with_parameters(layer, seed=7):
    """The layer, with weights and running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if each is not None:
                each.copy_(torch.rand(each.shape, generator=generator) + 0.5)
    return layer


# ---- construction


ARGUMENTS = [
    ((4,), {}),
    ((4, 1e-3), {}),
    ((4, 1e-3, 0.3), {}),
    ((4, 1e-3, None), {}),
    ((4, 1e-3, 0.3, False), {}),
    ((4, 1e-3, 0.3, True, False), {}),
    ((4, 1e-3, 0.3, False, False), {}),
    ((4, 1e-3, 0.3, True, True, "meta"), {}),
    ((4, 1e-3, 0.3, True, True, "cpu", torch.float64), {}),
    ((), {"num_features": 4, "eps": 0.1, "momentum": 0.2, "affine": False}),
    ((4,), {"track_running_stats": False}),
    ((4,), {"device": "meta", "dtype": torch.bfloat16}),
    ((4,), {"bias": False}),
    ((4,), {"affine": False, "bias": True}),
]


@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
@pytest.mark.parametrize(("arguments", "keywords"), ARGUMENTS, ids=str)
def test_constructor_is_that_of_torch(ours, theirs, shape, arguments, keywords):
    one, other = ours(*arguments, **keywords), theirs(*arguments, **keywords)
    assert repr(one) == repr(other)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(one, name) == getattr(other, name)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert [name for name, _ in one.named_buffers()] == [name for name, _ in other.named_buffers()]
    for name, wanted in other.state_dict().items():
        got = one.state_dict()[name]
        dtype = torch.float32 if wanted.dtype == torch.bfloat16 and "running" in name else None
        assert (got.shape, got.device) == (wanted.shape, wanted.device)
        assert got.dtype == (dtype or wanted.dtype)
        assert wanted.is_meta or torch.equal(got, wanted)


NAMES = [name for name in bt.__all__ if "BatchNorm" in name]


@pytest.mark.parametrize("name", NAMES)
def test_what_tools_see_of_a_constructor(name):
    kind, theirs = getattr(bt, name), inspect.signature(getattr(nn, name)).parameters
    ours = inspect.signature(kind).parameters
    added = {"activation": None, "skip_nonfinite": False}
    assert [*ours] == [*theirs, *added]
    for one in ours.values():
        other = theirs.get(one.name)
        assert one.annotation is not inspect.Parameter.empty
        assert one.kind == (one.KEYWORD_ONLY if other is None else other.kind)
        assert one.default == (added[one.name] if other is None else other.default)
    assert typing.get_type_hints(kind.__init__).keys() == {*ours, "return"}


@pytest.mark.parametrize("name", [name for name in NAMES if "Lazy" not in name])
def test_a_layer_is_made_without_initialization(name):
    layer = nn.utils.skip_init(getattr(bt, name), 4, activation="relu", device="cpu")
    assert layer.activation == "relu"
    assert layer.running_mean.device.type == "cpu"


@pytest.mark.parametrize("name", ["BatchNorm1d", "SyncBatchNorm"])
def test_without_bias_everywhere(name):
    layer = getattr(bt, name)(4, affine=True, bias=False)
    assert (layer.bias, layer.weight.shape) == (None, (4,))
    with pytest.raises(TypeError, match="bias must be True or False, but got 'no'"):
        getattr(bt, name)(4, bias="no")


BAD_SETTINGS = [
    ({"num_features": 0}, ValueError, "num_features must be a positive integer, but got 0"),
    ({"num_features": -1}, ValueError, "num_features must be a positive integer, but got -1"),
    ({"num_features": "3"}, TypeError, "num_features must be a positive integer, but got '3'"),
    ({"num_features": 3.0}, TypeError, "num_features must be a positive integer, but got 3.0"),
    ({"eps": "1e-5"}, TypeError, "eps must be a positive number, but got '1e-5'"),
    ({"eps": None}, TypeError, "eps must be a positive number, but got None"),
    ({"eps": 0}, ValueError, "eps must be positive and finite, but got 0"),
    ({"eps": float("nan")}, ValueError, "eps must be positive and finite, but got nan"),
    ({"eps": torch.tensor(-1.0)}, ValueError, "eps must be positive and finite, but got -1"),
    ({"momentum": 1.1}, ValueError, r"momentum must be within \[0, 1\], but got 1.1"),
    ({"momentum": "0.1"}, TypeError, r"momentum must be a number within \[0, 1\], but got '0.1'"),
    ({"momentum": torch.ones(3)}, TypeError, r"momentum must be a number within \[0, 1\]"),
    ({"affine": "no"}, TypeError, "affine must be True or False, but got 'no'"),
    ({"track_running_stats": 1}, TypeError, "track_running_stats must be True or False, but got 1"),
    ({"activation": "gelu"}, ValueError, "activation must be None"),
    ({"activation": []}, ValueError, "activation must be None"),
    ({"skip_nonfinite": "no"}, TypeError, "skip_nonfinite must be True or False, but got 'no'"),
]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def hidden(layer):
    layer.__dict__["weight"] = 2 * layer.weight


def deleted(layer):
    weight = 2 * layer.weight
    del layer.weight
    layer.weight = weight


def assigned(layer):
    layer.running_mean = torch.full((3,), 2.0)


def in_its_class(layer):
    """As some ways of sharding give a layer a weight that is gathered when it is read."""
    weight = 2 * layer.weight
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {"weight": property(lambda layer: weight)})


@pytest.mark.parametrize("change", [parametrized, hidden, deleted, assigned, in_its_class])
@pytest.mark.parametrize("training", [False, True])
def test_tensors_are_found_wherever_they_are(change, training):
    layers = [torch.nn.BatchNorm1d(3), bt.BatchNorm1d(3)]
    x = torch.randn(8, 3)
    for layer in layers:
        layer.train(training)
        layer.weight.data.fill_(1.5)
        change(layer)
    theirs, ours = (layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()


@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [((), {}), ((4, 1, 1, True, True, None, None, True), {}), ((4,), {"epsilon": 1}), (("x",), {})],
    ids=str,
)
def test_constructor_refuses_what_torch_refuses(ours, theirs, shape, arguments, keywords):
    for kind in (ours, theirs):
        with pytest.raises(TypeError):
            kind(*arguments, **keywords)


@pytest.mark.parametrize("ours", [each[0] for each in CLASSES], ids=IDS[1:])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("keywords", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused_at_construction(ours, lazy, keywords, error, message):
    if lazy:
        ours = getattr(bt, f"Lazy{ours.__name__}", None)
        if ours is None or "num_features" in keywords:
            return  # there is no such class, or argument
    else:
        keywords = {"num_features": 3, **keywords}
    with pytest.raises(error, match=message):
        ours(**keywords)


def test_our_own_arguments_are_keywords():
    layer = bt.BatchNorm2d(3, activation="silu", skip_nonfinite=True)
    assert repr(layer) == (
        "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "activation=silu, skip_nonfinite=True)"
    )
    assert "normalize_by=batch, update_running=True" in repr(
        layer.freeze(normalize_by="batch", update_running=True)
    )
    with pytest.raises(ValueError, match='activation must be None, "relu" or "silu", but got'):
        bt.BatchNorm2d(3, activation="gelu")


def message(layer, x):
    """Of the ValueError that the call raises; None if it raises none."""
    try:
        layer(x)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
def test_ranks_and_messages_are_those_of_torch(ours, theirs, shape):
    for rank, training in itertools.product(range(1, 7), (True, False)):
        x = torch.ones((2, 4, 1, 1, 1, 1)[:rank]) if rank > 1 else torch.ones(4)
        got, wanted = (message(kind(4).train(training), x) for kind in (ours, theirs))
        assert got == wanted
        assert got is None or f"got {rank}D input" in got


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1)])
def test_one_value_a_channel_is_refused_as_by_torch(shape):
    layer, x = bt.BatchNorm1d(4), torch.ones(shape)
    before = state(layer)
    assert message(layer, x).startswith("Expected more than 1 value per channel when training")
    assert message(layer, x) == message(nn.BatchNorm1d(4), x)
    same(state(layer), before)
    assert layer.eval()(x).shape == shape


@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
def test_an_instance_of_the_class_of_torch(ours, theirs, shape):
    assert isinstance(ours(4), theirs)
    assert issubclass(ours, theirs)


# ---- state


@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
def test_state_dict_goes_both_ways(ours, theirs, shape):
    for kinds in ((ours, theirs), (theirs, ours)):
        assert ours(4, skip_nonfinite=True).state_dict().keys() == theirs(4).state_dict().keys()
        one = with_parameters(kinds[0](4))
        one(tensor(*shape, dtype=torch.float32))
        loaded = saved_and_loaded(one.state_dict(), weights_only=True)
        other = kinds[1](4)
        other.load_state_dict(loaded, strict=True)
        same(state(one), state(other))
        assert other.num_batches_tracked == 1
        missing = {name: each for name, each in loaded.items() if name != "running_var"}
        with pytest.raises(RuntimeError, match="running_var"):
            other.load_state_dict(missing)


def test_a_state_dict_from_before_num_batches_tracked_loads():
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    bt.BatchNorm1d(3).load_state_dict(old)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: saved_and_loaded(layer, weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_go_on_alike_and_apart(copied):
    layer = bt.BatchNorm1d(4, momentum=None, activation="relu", skip_nonfinite=True)
    layer(tensor(5, 4, dtype=torch.float32))
    layer.freeze(normalize_by=None, update_running=True)
    other = copied(layer)
    assert repr(other) == repr(layer)
    same(state(layer), state(other))
    before = state(layer)
    x = tensor(9, 4, dtype=torch.float32, seed=1)
    y = other(x)
    same(state(layer), before)
    assert torch.equal(layer(x), y)
    same(state(layer), state(other))


# The exporter of PyTorch looks into storages by what PyTorch calls deprecated; not our layers.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "outside", [["batchnorm.**"], ["batchnorm.native.**", "array_api_compat.**", "sys"]], ids=str
)
def test_a_package_holds_a_model(outside):
    model = nn.Sequential(nn.Linear(3, 4), bt.BatchNorm1d(4, activation="relu", momentum=None))
    model(tensor(6, 3, dtype=torch.float32))
    file = io.BytesIO()
    with torch.package.PackageExporter(file) as exporter:
        exporter.extern([*outside, "torch.**", "numpy.**"])
        exporter.intern("batchnorm.**")
        exporter.save_pickle("model", "model.pkl", model)
    file.seek(0)
    loaded = torch.package.PackageImporter(file).load_pickle("model", "model.pkl")
    assert isinstance(loaded[1], nn.BatchNorm1d)
    x = tensor(5, 3, dtype=torch.float32, seed=1)
    for training in (True, False):
        same(loaded.train(training)(x), model.train(training)(x))
        same(state(loaded), state(model))


def test_to_moves_everything():
    layer = bt.BatchNorm1d(3, skip_nonfinite=True).to("meta")
    assert all(each.is_meta for each in state(layer).values())
    x = torch.ones(4, 3, device="meta")
    assert layer(x, mask=torch.ones(4, 1, device="meta")).is_meta
    layer = bt.BatchNorm1d(3, 1e-5, 0.1, True, True, "meta", skip_nonfinite=True)
    assert layer.num_batches_skipped.is_meta
    layer = bt.BatchNorm1d(3, momentum=None)
    layer(tensor(4, 3, dtype=torch.float32))
    layer.double()(tensor(4, 3))
    assert layer.running_mean.dtype == torch.float64


def test_the_default_device_is_not_that_of_the_input():
    x = tensor(5, 3, dtype=torch.float32).requires_grad_()
    layer = bt.BatchNorm1d(3)
    with torch.device("meta"):
        y = layer(x, mask=torch.ones(5, 1, device="cpu"))
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    wanted = bt.BatchNorm1d(3)(x)
    assert torch.equal(y, wanted)
    assert torch.equal(gradient, torch.autograd.grad(wanted.square().sum(), x)[0])


# ---- numbers


def _layouts(shape):
    """Tensors of one shape, which lie differently in memory."""
    x = tensor(*shape)
    gaps = tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
    apart = tensor(shape[0], 2 * shape[1], *shape[2:])[:, 1::2]
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    backwards = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    return {
        "contiguous": x,
        "channels last": last,
        "gaps": gaps,
        "gaps between channels": apart,
        "gaps, channels last": apart.movedim(1, -1).contiguous()[::1].movedim(-1, 1),
        "transposed": backwards,
        "offset": tensor(shape[0] + 1, *shape[1:])[1:],
        "expanded batch": x[:1].expand(shape),
        "expanded": x[..., :1].expand(shape),
        "expanded, channels last": last[:1].expand(shape),
    }


@pytest.mark.parametrize("layout", _layouts((2, 2)))
@pytest.mark.parametrize(("ours", "theirs", "shape"), LAYERS, ids=IDS)
def test_every_number_is_that_of_torch(ours, theirs, shape, layout):
    one, other = ours(4, dtype=torch.float64), theirs(4, dtype=torch.float64)
    with_parameters(one), with_parameters(other)
    base = _layouts(shape)[layout]
    dy = tensor(*shape, seed=3)
    for training in (True, True, True, False):
        results = []
        for layer in (one, other):
            layer.train(training).zero_grad()
            x = base.detach().requires_grad_()
            y = layer(x)
            y.backward(dy)
            results.append([y, x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        # float64 leaves a constant batch's variance at a few roundings, which eps then divides.
        for got, wanted in zip(*results, strict=True):
            close(got, wanted, tolerance=1e-9)
        y = results[0][0]
        assert y.stride() == torch.empty_like(base).stride()  # as of an elementwise operation


@pytest.mark.parametrize(("ours", "theirs", "shape"), LAYERS[2:], ids=IDS[2:])
def test_output_keeps_the_memory_format_as_that_of_torch(ours, theirs, shape):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for form, training in itertools.product((torch.contiguous_format, memory_format), (0, 1)):
        x = tensor(*shape, dtype=torch.float32).contiguous(memory_format=form)
        one, other = ours(4).train(bool(training)), theirs(4).train(bool(training))
        x.requires_grad_()
        y = one(x, residual=torch.ones_like(x, memory_format=torch.contiguous_format))
        assert y.is_contiguous(memory_format=form)
        assert y.stride() == other(x).stride()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.is_contiguous(memory_format=form)


@pytest.mark.parametrize("keywords", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_without_parameters_or_statistics(keywords):
    one = bt.BatchNorm1d(4, dtype=torch.float64, **keywords)
    other = nn.BatchNorm1d(4, dtype=torch.float64, **keywords)
    for training in (True, False):
        x = tensor(7, 4)
        close(one.train(training)(x), other.train(training)(x))
    assert state(one).keys() == state(other).keys()


# torch.nn's own lazy layers say so, from which ours derive.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("lazy", [False, True])
def test_without_parameters_and_statistics_a_layer_takes_any_channels(lazy):
    keywords = {"affine": False, "track_running_stats": False}
    name, arguments = ("LazyBatchNorm1d", ()) if lazy else ("BatchNorm1d", (4,))
    one, other = (getattr(kind, name)(*arguments, **keywords) for kind in (bt, nn))
    for training, channels in itertools.product((True, False), (5, 4, 1)):
        x = tensor(7, channels, 2)
        close(one.train(training)(x), other.train(training)(x))
    assert one(torch.ones(3, 0)).shape == (3, 0)
    for layer in (one, other):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer.train()(torch.ones(1, 9))
    assert repr(one) == repr(other)


def test_running_statistics_may_be_taken_away():
    one, other = (kind(4, dtype=torch.float64) for kind in (bt.BatchNorm1d, nn.BatchNorm1d))
    for layer in (one, other):
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    for training in (True, False):
        close(one.train(training)(tensor(7, 4)), other.train(training)(tensor(7, 4)))


def test_as_patched_for_functorch():
    one = torch.func.replace_all_batch_norm_modules_(bt.BatchNorm1d(4, dtype=torch.float64))
    x = tensor(3, 7, 4)
    wanted = nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64)
    close(torch.vmap(one)(x), torch.stack([wanted(each) for each in x]))


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)])
def test_an_empty_batch_changes_nothing(shape):
    layer = with_parameters(bt.BatchNorm1d(4, momentum=None, skip_nonfinite=True))
    before = state(layer)
    for training in (True, False):
        x = torch.zeros(shape, requires_grad=True)
        y = layer.train(training)(x, residual=x, mask=torch.ones(shape))
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert torch.equal(layer.weight.grad, torch.zeros(4))
    same(state(layer), before)
    plain = with_parameters(bt.BatchNorm1d(4))
    before = state(plain)
    plain(x)
    plain.freeze(update_running=True)(x)
    same(state(plain), before)


def test_all_zero_mask_is_an_empty_batch():
    for momentum in (0.1, None):
        layer = with_parameters(bt.BatchNorm1d(4, momentum=momentum))
        before = state(layer)
        layer(tensor(6, 4, dtype=torch.float32), mask=torch.zeros(6, 1))
        same(state(layer), before)
        assert layer.num_batches_tracked == 0


def test_inference_mode():
    x = tensor(5, 3, dtype=torch.float32)
    one, other = bt.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.inference_mode():
        one(x), other(x)
        inner = bt.BatchNorm1d(3)
        inner(x)
    same(state(inner), state(one))
    one(x), other(x)
    for got, wanted in zip(one.buffers(), other.buffers(), strict=True):
        close(got, wanted, tolerance=1e-6)


# ---- activation, residual and mask


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", [None, "other", "broadcast", "x itself"])
def test_residual_and_activation(activation, training, which):
    after = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU()}[activation]
    one = with_parameters(bt.BatchNorm2d(4, activation=activation, dtype=torch.float64))
    other = with_parameters(nn.BatchNorm2d(4, dtype=torch.float64))
    results = []
    for layer in (one.train(training), other.train(training)):
        x = tensor(3, 4, 5, 6).requires_grad_()
        z = tensor(*((4, 1, 6) if which == "broadcast" else x.shape), seed=1).requires_grad_()
        residual = {None: None, "x itself": x}.get(which, z)
        if layer is one:
            y = layer(x, residual=residual)
        else:
            y = after(layer(x) if residual is None else layer(x) + residual)
        y.backward(tensor(3, 4, 5, 6, seed=2))
        results.append([y, x.grad, z.grad, layer.weight.grad, layer.bias.grad])
    for got, wanted in zip(*results, strict=True):
        if wanted is None:
            assert got is None
        else:
            close(got, wanted)


@pytest.mark.parametrize("kind", ["bool", "weights"])
@pytest.mark.parametrize("shape", [(8, 1, 5), (8, 4, 5), (1, 5), (8, 1, 1)])
def test_mask(kind, shape):
    mask = torch.from_numpy(np.random.default_rng(0).uniform(size=shape)) > 0.4
    mask = mask if kind == "bool" else mask * tensor(*shape).abs()
    x = tensor(8, 4, 5)
    layer = bt.BatchNorm1d(4, dtype=torch.float64)
    wanted = truth.batch_norm(x.numpy(), axis=1, mask=mask.numpy())
    close(layer(x, mask=mask), torch.from_numpy(wanted.y), tolerance=1e-9)
    mean, var, count = map(torch.from_numpy, (wanted.mean, wanted.var, wanted.count))
    close(layer.running_mean, 0.1 * mean)
    close(layer.running_var, 0.9 + 0.1 * var * count / (count - 1))
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.eval()(x, mask=mask), layer(x))  # of no consequence in evaluation


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
@pytest.mark.parametrize("shape", [(6, 4, 1), (6, 4, 300), (6, 4)])
def test_a_bad_weight_makes_its_feature_nan(bad, shape):
    weights = torch.ones(shape)
    weights[(2, 1, 0)[: len(shape)]] = bad
    x = tensor(*shape, dtype=torch.float32).requires_grad_()
    layer = bt.BatchNorm1d(4)
    y = layer(x, mask=weights)
    y.square().sum().backward()
    for each in (y, x.grad):
        assert each[:, 1].isnan().all()
        assert each[:, [0, 2, 3]].isfinite().all()
    assert (layer.running_mean != 0).tolist() == [
        True,
        False,
        True,
        True,
    ]  # no part of such a batch
    assert bt.batch_statistics(x, axis=1, mask=weights[:, :1] * 0 + bad).count.isnan().all()


def test_a_mask_with_a_gradient():
    x, w = tensor(6, 4), torch.ones(6, 1, dtype=torch.float64, requires_grad=True)
    one, other = bt.BatchNorm1d(4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64)
    close(one(x, mask=w), other(x))
    for got, wanted in zip(one.buffers(), other.buffers(), strict=True):
        close(got, wanted)
    one, x = bt.BatchNorm1d(4), x.float()
    one(x, mask=w.float())
    close(one.running_mean.double(), other.running_mean, tolerance=1e-6)


# ---- running statistics


def test_momentum_none_pools_batches_by_their_counts():
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [tensor(n, 3, seed=n) + n for n in (5, 2, 9)]
    for batch in batches:
        layer(batch)
    counts = [len(batch) for batch in batches]
    variances = sum(n * batch.var(0) for n, batch in zip(counts, batches, strict=True))
    close(layer.running_mean, torch.cat(batches).mean(0))
    close(layer.running_var, variances / sum(counts))
    assert layer.num_batches_tracked == 3
    layer.reset_running_stats()
    layer(batches[0])
    close(layer.running_mean, batches[0].mean(0))


def test_momentum_none_counts_each_feature_by_its_mask():
    layer = bt.BatchNorm1d(2, momentum=None, dtype=torch.float64)
    first = torch.tensor([[1, 1], [3, 3]], dtype=torch.float64)
    second = torch.tensor([[5, 5], [7, 9]], dtype=torch.float64)
    layer(first)
    layer(torch.cat([second, second]), mask=torch.tensor([[1, 1], [1, 1], [0, 1], [0, 1]]).bool())
    close(layer.running_mean, torch.tensor([4, (2 * 2 + 4 * 7) / 6], dtype=torch.float64))


def test_momentum_none_of_equal_batches_is_that_of_torch():
    one, other = (
        kind(3, momentum=None, dtype=torch.float64) for kind in (bt.BatchNorm1d, nn.BatchNorm1d)
    )
    for seed in range(6):
        if seed == 3:  # after which ours knows num_batches_tracked alone
            other(tensor(4, 3, seed=9))
            one.load_state_dict(other.state_dict())
        one(tensor(4, 3, seed=seed)), other(tensor(4, 3, seed=seed))
        for got, wanted in zip(one.buffers(), other.buffers(), strict=True):
            close(got, wanted)


def averaged(start, batches, elements=None):
    """Running statistics, and of how many elements they are, after more batches; in plain words.

    `start` is num_batches_tracked, a mean and a variance; without `elements`, all its batches had
    as many as the first of the others.
    """
    number, mean, var = start
    elements = number * len(batches[0]) if elements is None else elements
    for batch in batches:
        share = len(batch) / (elements + len(batch))
        mean = (1 - share) * mean + share * batch.mean(0)
        var = (1 - share) * var + share * batch.var(0)
        number, elements = number + 1, elements + len(batch)
    return (number, mean, var), elements


def pruned(layer):
    layer.num_features = 2
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[1:]))
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name)[1:].clone())


def other_values(layer, seed=11):
    """Those that another layer may have after as many batches."""
    mean, var = tensor(layer.num_features, seed=seed), tensor(layer.num_features, seed=seed).abs()
    return {
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": layer.num_batches_tracked.clone(),
    }


def copied(layer, of_batches=0):
    for name, value in other_values(layer).items():
        getattr(layer, name).copy_(value)
    layer.num_batches_tracked += of_batches


def assigned(layer):
    for name, value in other_values(layer).items():
        setattr(layer, name, value)


def assigned_data(layer):
    for name, value in other_values(layer).items():
        getattr(layer, name).data = value


def registered(layer):
    for name, value in other_values(layer).items():
        delattr(layer, name)
        layer.register_buffer(name, value)


def zeroed(layer):
    for each in layer.buffers():
        each.zero_()


def trained_with_momentum(layer, reset=False):
    if reset:
        layer.reset_running_stats()
    layer.momentum = 0.1
    for seed in range(3):
        layer(tensor(5, layer.num_features, seed=20 + seed))
    layer.momentum = None


OTHER_VALUES = {
    "zeroed": zeroed,
    "reset": lambda layer: layer.reset_running_stats(),
    "copied": copied,
    "copied, of more batches": partial(copied, of_batches=2),
    "assigned": assigned,
    "assigned as data": assigned_data,
    "registered anew": registered,
    "pruned": pruned,
    "loaded": lambda layer: layer.load_state_dict({**layer.state_dict(), **other_values(layer)}),
    "loaded by assignment": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), **other_values(layer)}, assign=True
    ),
    "moved by momentum": trained_with_momentum,
    "moved by momentum to as many batches": partial(trained_with_momentum, reset=True),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_momentum_none_knows_no_elements_of_other_values(change, compiled):
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    step = torch.compile(layer, backend="aot_eager", dynamic=True) if compiled else layer
    for n in (6, 2, 8):
        step(tensor(n, 3, seed=n))
    change(layer)
    start = [
        layer.num_batches_tracked.item(),
        layer.running_mean.clone(),
        layer.running_var.clone(),
    ]
    batches = [tensor(n, layer.num_features, seed=n) for n in (4, 9, 3)]
    for batch in batches:
        step(batch)
    (number, mean, var), _ = averaged(start, batches)
    assert layer.num_batches_tracked == number
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_momentum_none_estimates_anew_in_every_epoch():
    layer = bt.BatchNorm1d(2)
    for _ in range(3):
        layer.momentum = 0.1
        for _ in range(20):
            layer(tensor(8, 2, dtype=torch.float32) - 3)
        zeroed(layer)
        layer.momentum = None
        batches = [tensor(8, 2, dtype=torch.float32, seed=seed) for seed in range(5)]
        for batch in batches:
            layer(batch)
        close(layer.running_mean, torch.cat(batches).mean(0), tolerance=1e-6)


def test_momentum_none_pools_what_stays_as_it_was():
    """Whoever moves, copies or hides it on the way."""
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    ways = [
        lambda layer: layer,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: saved_and_loaded(layer, weights_only=False),
        lambda layer: layer.eval().train(),
        lambda layer: layer.freeze().unfreeze(),
        lambda layer: layer.load_state_dict(layer.state_dict()) and layer,
        lambda layer: bt.convert(bt.convert(layer, sync=True)),
    ]
    batches = [tensor(n, 3, seed=n) for n in range(2, 2 + len(ways))]
    for way, batch in zip(ways, batches, strict=True):
        layer = way(layer)
        layer(batch)
    (_, mean, var), _ = averaged((0, 0.0, 1.0), batches)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_momentum_none_pools_through_other_dtypes():
    layer = bt.BatchNorm1d(3, momentum=None)
    batches = [tensor(n, 3, seed=n) for n in (6, 2, 9, 4, 3)]
    for batch, dtype in zip(
        batches, ("float32", "float64", "float32", "half", "bfloat16"), strict=True
    ):
        dtype = getattr(torch, dtype)
        layer.to(dtype)(batch.to(dtype))
    (_, mean, var), _ = averaged((0, 0.0, 1.0), batches)
    close(layer.running_mean.double(), mean, tolerance=5e-3)
    close(layer.running_var.double(), var, tolerance=2e-2)


def test_momentum_none_with_the_buffers_of_a_call():
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    for n in (6, 2):
        layer(tensor(n, 3, seed=n))
    own, others = state(layer), other_values(layer)
    start = [2, others["running_mean"].clone(), others["running_var"].clone()]
    torch.func.functional_call(layer, others, tensor(5, 3))
    (number, mean, var), elements = averaged(start, [tensor(5, 3)])
    close(others["running_mean"], mean)
    close(others["running_var"], var)
    same(state(layer), own)
    torch.func.functional_call(layer, others, tensor(9, 3, seed=1))
    (_, mean, var), _ = averaged((number, mean, var), [tensor(9, 3, seed=1)], elements)
    close(others["running_mean"], mean)
    close(others["running_var"], var)
    start = [2, own["running_mean"], own["running_var"]]
    layer(tensor(7, 3))
    (_, mean, var), _ = averaged(start, [tensor(7, 3)])
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@pytest.mark.parametrize("inference", [(True, True), (True, False), (False, True)])
def test_momentum_none_in_inference_mode(inference):
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [tensor(n, 3, seed=n) for n in (6, 2, 9, 4)]
    for place, batch in enumerate(batches):
        with torch.inference_mode(inference[place % 2]):
            layer(batch)
    (_, mean, var), _ = averaged((0, 0.0, 1.0), batches)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_momentum_none_where_operations_are_recorded(mode):
    """As a graph of CUDA's does it, which replays operations and runs no Python."""
    layer = bt.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    for n in (6, 2):
        layer(tensor(n, 3, seed=n))

    def step(mean, var, number, x):
        return torch.func.functional_call(
            layer, {"running_mean": mean, "running_var": var, "num_batches_tracked": number}, x
        )

    buffers = list(state(layer).values())[2:]
    make = torch.fx.experimental.proxy_tensor.make_fx
    recorded = make(step, tracing_mode=mode, _allow_non_fake_inputs=True)(
        *(each.clone() for each in buffers), tensor(4, 3, seed=4)
    )
    start, batches = (
        [2, *(each.clone() for each in buffers[:2])],
        [tensor(4, 3, seed=i) for i in (4, 5)],
    )
    elements = 8
    for batch in batches:
        recorded(*buffers, batch)
        (number, mean, var), _ = averaged(start, [batch], elements)
        close(buffers[0], mean)
        close(buffers[1], var)
        start, elements = (number, mean, var), None
    layer(tensor(7, 3))  # which goes on as it was


def test_without_a_number_of_batches_momentum_none_moves_nothing():
    one, other = (kind(3, momentum=None).double() for kind in (bt.BatchNorm1d, nn.BatchNorm1d))
    for layer in (one, other):
        layer(tensor(6, 3))
        layer.num_batches_tracked = None
    for training in (True, False):
        close(one.train(training)(tensor(8, 3)), other.train(training)(tensor(8, 3)))
    same(one.running_mean, other.running_mean)
    close(one.running_var, other.running_var)
    skipping = bt.BatchNorm1d(3, momentum=None, skip_nonfinite=True)
    skipping.num_batches_tracked = None
    skipping(torch.full((4, 3), torch.nan))
    assert skipping.num_batches_skipped == 1
    assert torch.equal(skipping.running_mean, torch.zeros(3))


def test_update_bn_of_unequal_batches():
    model = nn.Sequential(bt.BatchNorm1d(3, dtype=torch.float64))
    model(tensor(4, 3))
    batches = [tensor(n, 3, seed=n) for n in (256, 256, 4)]
    torch.optim.swa_utils.update_bn(batches, model)
    close(model[0].running_mean, torch.cat(batches).mean(0))
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_skip_nonfinite(bad, momentum):
    good, spoiled = tensor(6, 4, dtype=torch.float32), tensor(6, 4, dtype=torch.float32, seed=1)
    spoiled[3, 2] = bad
    layer = bt.BatchNorm1d(4, momentum=momentum, skip_nonfinite=True)
    layer(good)
    before = state(layer)
    for count in (1, 2):
        layer(spoiled)
        after = state(layer)
        assert after.pop("num_batches_skipped") == count
        same(after, {name: each for name, each in before.items() if name in after})
    layer(spoiled, mask=spoiled.isfinite())
    assert layer.running_mean.isfinite().all()
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 2)
    layer(good)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (3, 2)
    layer.reset_running_stats()
    assert layer.num_batches_skipped == 0

    usual, theirs = bt.BatchNorm1d(4), nn.BatchNorm1d(4)
    usual(spoiled), theirs(spoiled)
    assert torch.equal(usual.running_mean.isfinite(), theirs.running_mean.isfinite())


def test_skip_nonfinite_skips_as_if_the_batch_had_not_been():
    batches = [tensor(n, 3, seed=n) for n in (5, 4, 9)]
    one, other = (bt.BatchNorm1d(3, momentum=None, skip_nonfinite=skip) for skip in (True, False))
    one.double(), other.double()
    for batch in batches:
        if len(batch) == 4:
            one(batch * float("nan"))
        else:
            one(batch), other(batch)
    close(one.running_mean, other.running_mean)
    close(one.running_var, other.running_var)
    bt.BatchNorm1d(3, track_running_stats=False, skip_nonfinite=True)(torch.ones(2, 3))


# ---- freezing


SWITCHES = list(itertools.product(("running", "batch", None), (True, False, None), (True, False)))


@pytest.mark.parametrize(("normalize_by", "update_running", "training"), SWITCHES)
def test_freezing(normalize_by, update_running, training):
    layer = with_parameters(bt.BatchNorm1d(4, dtype=torch.float64)).train(training)
    assert layer.freeze(normalize_by=normalize_by, update_running=update_running) is layer
    x, before = tensor(6, 4), state(layer)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    by_batch = training if normalize_by is None else normalize_by == "batch"
    wanted = nn.functional.batch_norm(
        x,
        *((None, None) if by_batch else (mean, var)),
        layer.weight,
        layer.bias,
        training=by_batch,
    )
    close(layer(x), wanted)
    if training if update_running is None else update_running:
        close(layer.running_mean, 0.9 * mean + 0.1 * x.mean(0))
        close(layer.running_var, 0.9 * var + 0.1 * x.var(0))
        assert layer.num_batches_tracked == 1
    else:
        same(state(layer), before)


def test_frozen_by_default_is_evaluation_for_good():
    model = nn.Sequential(nn.Linear(3, 4), bt.BatchNorm1d(4).freeze())
    x = torch.randn(6, 3)
    wanted, before = model.eval()(x), state(model[1])
    for frozen in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        frozen.train()
        assert torch.equal(frozen(x), wanted)
        same(state(frozen[1]), before)
    model(x).square().sum().backward()
    assert model[1].weight.grad.abs().min() > 0  # its parameters learn, if they require gradients
    model[1].unfreeze()
    assert not torch.equal(model(x), wanted)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("assign", [False, True])
def test_freezing_is_a_mode_and_not_in_the_state_dict(assign):
    frozen = nn.ModuleDict({"norm": with_parameters(bt.BatchNorm1d(4)).freeze()})
    usual = nn.ModuleDict({"norm": with_parameters(nn.BatchNorm1d(4), seed=1)})
    assert frozen.state_dict()._metadata == usual.state_dict()._metadata
    fresh = nn.ModuleDict({"norm": bt.BatchNorm1d(4)})
    old = saved_and_loaded(frozen.state_dict(), weights_only=True)
    old._metadata["norm"].update(
        normalize_by="batch", update_running="garbage"
    )  # said by older ones
    for loaded in (old, usual.state_dict()):
        for model in (fresh, frozen):
            model.load_state_dict(loaded, strict=True, assign=assign)
            same(dict(model.state_dict()), dict(loaded))
        assert (fresh["norm"].normalize_by, fresh["norm"].update_running) == (None, None)
        assert (frozen["norm"].normalize_by, frozen["norm"].update_running) == ("running", False)


def estimated_by_precise_bn(model, batches):
    """By each batch's own statistics, which momentum=1.0 shows, averaged and assigned."""
    layers = [each for each in model.modules() if hasattr(each, "running_mean")]
    momenta = [each.momentum for each in layers]
    sums = [[0.0, 0.0] for _ in layers]
    for layer in layers:
        layer.momentum = 1.0
    for batch in batches:
        model(batch)
        for layer, each in zip(layers, sums, strict=True):
            each[0] = each[0] + layer.running_mean / len(batches)
            each[1] = each[1] + layer.running_var / len(batches)
    for layer, momentum, (mean, var) in zip(layers, momenta, sums, strict=True):
        layer.running_mean, layer.running_var, layer.momentum = mean, var, momentum


def reset_by_hand(model, batches):
    for each in model.modules():
        if hasattr(each, "reset_running_stats"):
            each.reset_running_stats()
    for batch in batches:
        model(batch)


def averaged_with_buffers(model, batches):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for batch in batches:
        model(batch)
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn(batches, average)
    model.load_state_dict(average.module.state_dict())


TOOLS = {
    "update_bn": lambda model, batches: torch.optim.swa_utils.update_bn(batches, model),
    "AveragedModel": averaged_with_buffers,
    "precise BN": estimated_by_precise_bn,
    "reset": reset_by_hand,
    "reset_parameters": lambda model, batches: model[0].reset_parameters(),
}


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("normalize_by", ["running", "batch", None])
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_tools_leave_frozen_statistics_as_they_are(tool, normalize_by, sync):
    frozen = with_parameters(bt.BatchNorm1d(4, skip_nonfinite=True, dtype=torch.float64))
    frozen.num_batches_tracked.fill_(3)
    frozen.num_batches_skipped.fill_(2)
    before = dict(state(frozen), weight=torch.ones(4), bias=torch.zeros(4))
    model = nn.Sequential(frozen, bt.BatchNorm1d(4, dtype=torch.float64))
    bt.convert(model, sync=sync)
    frozen.freeze(normalize_by=normalize_by, update_running=False).reset_parameters()
    before |= {name: before[name].double() for name in ("weight", "bias")}
    same(state(frozen), before)
    batches = [tensor(8, 4, seed=seed) for seed in range(3)]
    tool(model, batches)
    for name, value in state(frozen).items():
        close(value, before[name])
    if tool is TOOLS["update_bn"]:  # the other one is estimated anew
        through = torch.cat([frozen(batch).detach() for batch in batches])
        close(model[1].running_mean, through.mean(0))
    frozen.unfreeze().reset_running_stats()
    assert not any(each.any() for each in (frozen.running_mean, frozen.num_batches_tracked))
    assert frozen.num_batches_skipped == 0


@pytest.mark.parametrize("update_running", [None, True])
def test_statistics_that_batches_move_are_reset(update_running):
    layer = with_parameters(bt.BatchNorm1d(4)).freeze(update_running=update_running)
    layer.reset_running_stats()
    same(state(layer)["running_var"], torch.ones(4))


def test_a_frozen_layer_gets_its_first_statistics():
    made = bt.BatchNorm1d(4, device="meta", skip_nonfinite=True).freeze().to_empty(device="cpu")
    made.reset_parameters()
    lazy = bt.LazyBatchNorm1d(skip_nonfinite=True).freeze()
    lazy(tensor(6, 4, dtype=torch.float32))
    narrow = bt.BatchNorm1d(4, device="meta", dtype=torch.half, skip_nonfinite=True).freeze()
    narrow = nn.Sequential(narrow).to_empty(device="cpu")[0].float()
    narrow.reset_parameters()
    wanted = bt.BatchNorm1d(4, skip_nonfinite=True)
    for layer in (made, lazy, narrow):
        same(state(layer), state(wanted))
    without = bt.BatchNorm1d(4, device="meta", skip_nonfinite=True).freeze()
    without.running_var = without.num_batches_tracked = None
    same(without.to_empty(device="cpu").running_mean, wanted.running_mean)
    lazy = bt.LazyBatchNorm1d(device="meta").half()  # has none yet
    assert lazy.has_uninitialized_params()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"normalize_by": "mean"}, "normalize_by must be one of 'running', 'batch', None, but got"),
        ({"update_running": "no"}, "update_running must be one of True, False, None, but got 'no'"),
    ],
)
def test_freezing_refuses(keywords, message):
    layer = bt.BatchNorm1d(4)
    with pytest.raises(ValueError, match=message):
        layer.freeze(**keywords)
    assert (layer.normalize_by, layer.update_running) == (None, None)


def test_freezing_needs_running_statistics():
    layer = bt.BatchNorm1d(4, track_running_stats=False)
    for keywords in ({}, {"normalize_by": "batch", "update_running": True}):
        with pytest.raises(ValueError, match="needs running statistics, but the layer has none"):
            layer.freeze(**keywords)
    layer.freeze(normalize_by="batch")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("taken", "freezing", "message"),
    [
        (["running_var"], {}, "must either both be None or neither"),
        (["running_mean"], {}, "must either both be None or neither"),
        (["running_mean", "running_var"], {"normalize_by": "running"}, "needs running statistics"),
        (
            ["running_mean", "running_var"],
            {"normalize_by": "batch", "update_running": True},
            "needs running statistics",
        ),
    ],
)
def test_running_statistics_that_are_not_there(taken, freezing, message, grad):
    for training in (True, False):
        layer = bt.BatchNorm1d(4).train(training)
        if freezing:
            layer.freeze(**freezing)
        for name in taken:
            setattr(layer, name, None)
        before = state(layer)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            layer(tensor(6, 4, dtype=torch.float32))
        same(state(layer), before)


# ---- dtypes

ROUNDING = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIXES = [(dtype, dtype) for dtype in ROUNDING]
MIXES += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "of_layer"), MIXES, ids=str)
def test_dtypes(dtype, of_layer):
    layer = bt.BatchNorm2d(4, dtype=of_layer)
    x, dy = tensor(5, 4, 6, 7, dtype=dtype), tensor(5, 4, 6, 7, dtype=dtype, seed=1)
    exact = nn.BatchNorm2d(4, dtype=torch.float64)
    y, wanted = layer(x.requires_grad_()), exact(precise := x.detach().double().requires_grad_())
    y.backward(dy), wanted.backward(dy.double())
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, of_layer)
    tolerance = ROUNDING[dtype]
    close(y.double(), wanted, tolerance=3 * tolerance)
    close(x.grad.double(), precise.grad, tolerance=3 * tolerance)
    tolerance = ROUNDING[of_layer]
    close(layer.weight.grad.double(), exact.weight.grad, tolerance=10 * tolerance)
    for got, wanted in zip(layer.buffers(), exact.buffers(), strict=True):
        close(got.double(), wanted.double(), tolerance=2 * tolerance)
    of_buffers = torch.promote_types(of_layer, torch.float32)
    assert [each.dtype for each in layer.buffers()] == [of_buffers, of_buffers, torch.int64]
    close(
        layer.eval()(x).double(), exact.eval()(precise), tolerance=3 * ROUNDING[dtype] + tolerance
    )


@pytest.mark.parametrize(
    ("dtype", "of_layer"),
    [pair for pair in itertools.product(ROUNDING, ROUNDING) if pair not in MIXES],
    ids=str,
)
def test_other_mixes_are_refused(dtype, of_layer):
    for keywords in ({}, {"affine": False}, {"track_running_stats": False}):
        layer = bt.BatchNorm1d(4, dtype=of_layer, **keywords)
        before = state(layer)
        name, of_it = "weight", of_layer
        if keywords == {"affine": False}:
            name, of_it = "running_mean", layer.running_mean.dtype
            if of_it == torch.float32 != dtype != torch.float64 or dtype == of_it:
                continue  # nothing is of the layer's dtype
        message = f"{name} must have the dtype {dtype} of input .* its dtype is {of_it}"
        with pytest.raises(TypeError, match=message):
            layer(tensor(6, 4, dtype=dtype))
        same(state(layer), before)


CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.float16, memory_format=torch.channels_last), torch.float16),
    "to like": (lambda model: model.to(torch.zeros(0, dtype=torch.bfloat16)), torch.bfloat16),
    "type": (lambda model: model.type(torch.float16), torch.float16),
    "twice": (lambda model: model.half().bfloat16(), torch.bfloat16),
    "and back": (lambda model: model.half().float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "from double": (lambda model: model.double().half(), torch.float16),
    "share_memory": (lambda model: model.half().share_memory(), torch.float16),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("keywords", [{}, {"affine": False}], ids=str)
def test_running_statistics_stay_exact_in_a_model_that_is_cast(cast, dtype, keywords):
    layer = bt.BatchNorm2d(4, **keywords)
    layer.running_mean.copy_(torch.rand(4) + 1000)
    layer.running_var.copy_(torch.rand(4) + 1e5)  # infinite in float16
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    model = cast(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer)))
    for got, wanted in zip((layer.running_mean, layer.running_var), before, strict=True):
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(got.float(), wanted)
    assert model[0].weight.dtype == dtype
    x = torch.linspace(900, 1100, 2 * 4 * 25).reshape(2, 4, 5, 5).to(dtype)
    exact = copy.deepcopy(layer).double()
    for training in (False, True):
        y = model[1].train(training)(x)
        assert y.dtype == dtype
        close(y.double(), exact.train(training)(x.double()), tolerance=3 * ROUNDING[dtype])
    for got, wanted in zip((layer.running_mean, layer.running_var), exact.buffers(), strict=False):
        close(got.double(), wanted, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_running_statistics_of_narrow_layers_reach_the_batch(dtype):
    x = torch.tensor([[2.0], [5.0]], dtype=dtype)
    for layer in (
        bt.BatchNorm1d(1, momentum=0.01, dtype=dtype),
        bt.BatchNorm1d(1, momentum=0.01).to(dtype),
        bt.convert(nn.BatchNorm1d(1, momentum=0.01, dtype=dtype)),
        bt.LazyBatchNorm1d(momentum=0.01, dtype=dtype),
        bt.LazyBatchNorm1d(momentum=0.01).to(dtype),
    ):
        for _ in range(2000):
            layer(x)
        close(layer.running_mean, torch.tensor([3.5]), tolerance=1e-4)
        close(layer.running_var, torch.tensor([4.5]), tolerance=1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_narrow_running_statistics_are_loaded_as_float32(assign):
    narrow = with_parameters(nn.BatchNorm1d(4)).half()
    layer = bt.BatchNorm1d(4)
    layer.load_state_dict(narrow.state_dict(), strict=True, assign=assign)
    for name in ("running_mean", "running_var"):
        got, wanted = getattr(layer, name), getattr(narrow, name)
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted.float())
    layer.half()(tensor(6, 4, dtype=torch.float16))


def test_a_narrow_layer_without_memory():
    layer = bt.BatchNorm1d(4, device="meta").half().to_empty(device="cpu")
    assert (layer.weight.dtype, layer.running_mean.dtype) == (torch.float16, torch.float32)
    layer.reset_parameters()
    layer(tensor(6, 4, dtype=torch.float16))


def test_functions_change_running_statistics_in_the_dtype_that_they_have():
    x, mean, var = tensor(6, 4).half(), torch.zeros(4).half(), torch.ones(4).half()
    exact = torch.zeros(4), torch.ones(4)
    bt.functional.batch_norm(x, mean, var, training=True)
    nn.functional.batch_norm(x.float(), *exact, training=True)
    assert mean.dtype == var.dtype == torch.float16
    close(mean.float(), exact[0], tolerance=2e-3)
    close(var.float(), exact[1], tolerance=2e-3)


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str
)
def test_a_tensor_without_axes_is_the_number_that_it_holds(kind):
    x = tensor(6, 4)
    one = torch.tensor(1, dtype=kind)
    same(bt.batch_norm(x, eps=one)[0], bt.batch_norm(x, eps=1.0)[0])
    same(bt.normalize(x, x[0], x[0] ** 2, eps=one), bt.normalize(x, x[0], x[0] ** 2, eps=1))
    running, wanted = (torch.zeros(4).double(), torch.ones(4).double()), bt.batch_statistics(x)
    same(bt.update_running(*running, wanted, rate=one), wanted[1:])
    bt.functional.batch_norm(x, *running, training=True, momentum=one, eps=one)
    same(running[0], wanted.mean)
    layer, other = bt.BatchNorm1d(4, one, one).double(), bt.BatchNorm1d(4, 1, 1).double()
    same(layer(x), other(x))
    same(state(layer), state(other))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor(-1.0), ValueError),
        (torch.tensor(torch.nan), ValueError),
        (torch.tensor(True), TypeError),
        (torch.tensor(1j), TypeError),
        (torch.tensor([0.1]), TypeError),
    ],
    ids=str,
)
def test_a_tensor_that_is_no_such_number(value, error):
    x, statistics = tensor(6, 4), bt.batch_statistics(tensor(6, 4))
    with pytest.raises(error, match="eps must be"):
        bt.batch_norm(x, eps=value)
    with pytest.raises(error, match="rate must be"):
        bt.update_running(statistics.mean, statistics.var, statistics, rate=value)
    with pytest.raises(error, match="momentum must be"):
        bt.functional.batch_norm(x, None, None, training=True, momentum=value)


@pytest.mark.parametrize("layer", [bt.BatchNorm1d(4), bt.LazyBatchNorm1d(), bt.SyncBatchNorm(4)])
@pytest.mark.parametrize("value", [np.zeros((6, 4), np.float32), [[1.0, 2.0]], None], ids=str)
def test_what_is_no_tensor_is_refused_by_name(layer, value):
    message = f"must be an instance of torch.Tensor, but got {type(value).__name__}. torch.as_tens"
    before = repr(layer), layer.num_features
    with pytest.raises(TypeError, match=f"input {message}"):
        layer(value)
    assert (repr(layer), layer.num_features) == before
    if value is not None:
        x = tensor(6, 4, dtype=torch.float32)
        for name in ("mask", "residual"):
            with pytest.raises(TypeError, match=f"{name} {message}"):
                bt.BatchNorm1d(4)(x, **{name: value})
        with pytest.raises(TypeError, match=f"scale {message}"):
            bt.batch_norm(x, value)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_statistics_of_another_dtype(autocast, dtype):
    x = torch.randn(8, 3).to(dtype).requires_grad_()
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    with torch.autocast("cpu", dtype=autocast):
        bt.functional.batch_norm(x, mean, var).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_stays_one_in_bfloat16(bits):
    x = torch.randn(5, 3)
    x[0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    mean, var = (torch.ones(3, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    bt.functional.batch_norm(x, mean, var, weight, training=True).sum().backward()
    for each in (mean, var, weight.grad):
        assert each.isnan().tolist() == [True, False, False]


def test_autocast():
    norm = bt.BatchNorm2d(4, activation="relu")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1))
    x = tensor(2, 3, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[1](model[0](x))
        loss = model(x).float().square().mean()
    assert hidden.dtype == torch.bfloat16
    loss.backward()
    assert all(each.grad.dtype == torch.float32 for each in model.parameters())
    assert model[1].running_var.dtype == torch.float32
    close(hidden.float(), model[1](model[0](x)), tolerance=0.05)


# ---- bad input


GOOD = tensor(6, 4, dtype=torch.float32)
META = torch.device("meta")

# A name, attributes of the layer, the input, keywords of the call, the error and a piece of it.
REFUSED = [
    ("too few channels", {}, GOOD[:, :3], {}, ValueError, "num_features=4 channels, but it has 3"),
    ("integers", {}, GOOD.int(), {}, TypeError, "input must be an array of real floating-point"),
    ("complex", {}, GOOD.cfloat(), {}, TypeError, "input must be .* dtype is torch.complex64"),
    ("elsewhere", {}, GOOD.to(META), {}, ValueError, "weight must be on the device meta of input"),
    ("eps", {"eps": -1.0}, GOOD, {}, ValueError, "eps must be positive"),
    ("eps None", {"eps": None}, GOOD, {}, TypeError, "eps must be a positive number"),
    ("momentum", {"momentum": 1.5}, GOOD, {}, ValueError, r"momentum must be within \[0, 1\]"),
    *(
        (f"{name}, {what}", {name: value}, GOOD, {}, error, f"{name} must {message}")
        for name in ("weight", "bias", "running_mean", "running_var")
        for what, value, error, message in (
            ("elsewhere", torch.ones(4, device=META), ValueError, "be on the device cpu of input"),
            ("short", torch.ones(3), ValueError, r"have the feature shape \(4,\)"),
            ("wide", torch.ones(4).double(), TypeError, "have the dtype torch.float32 of input"),
        )
    ),
    *(
        (f"{name}, {what}", {}, GOOD, {name: value}, error, f"{name} must {message}")
        for name in ("residual", "mask")
        for what, value, error, message in (
            ("short", GOOD[:5], ValueError, "broadcast"),
            ("larger", GOOD[None], ValueError, "broadcast"),
            ("complex", GOOD.cfloat(), TypeError, "be an array of real floating-point numbers"),
            ("a list", [1.0], TypeError, "be an instance of torch.Tensor, but got list"),
            ("elsewhere", GOOD.to(META), ValueError, "be on the device cpu of"),
        )
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_bad_input_is_refused_and_changes_nothing(case, skip_nonfinite):
    _, attributes, x, keywords, error, message = case
    layer = bt.BatchNorm1d(4, skip_nonfinite=skip_nonfinite)
    for name, value in attributes.items():
        is_parameter = name in ("weight", "bias")
        setattr(layer, name, nn.Parameter(value) if is_parameter else value)
    before = state(layer)
    with pytest.raises(error, match=message):
        layer(x, **keywords)
    for name, value in state(layer).items():
        assert value.is_meta or torch.equal(value, before[name])


def nested(x, layout):
    parts = [x[:2], x[2:]] if x.ndim > 1 else [x, x]
    return torch.nested.nested_tensor(parts, layout=layout)


# How a tensor may lie that is not dense, what a message calls it, and what it says to do.
LAYOUTS = {
    "COO": (lambda x: x.to_sparse(), "of the layout torch.sparse_coo", "to_dense"),
    "CSR": (lambda x: x.to_sparse_csr(), "of the layout torch.sparse_csr", "to_dense"),
    "CSC": (lambda x: x.to_sparse_csc(), "of the layout torch.sparse_csc", "to_dense"),
    "BSR": (lambda x: x.to_sparse_bsr((2, 2)), "of the layout torch.sparse_bsr", "to_dense"),
    "BSC": (lambda x: x.to_sparse_bsc((2, 2)), "of the layout torch.sparse_bsc", "to_dense"),
    "MKL-DNN": (lambda x: x.to_mkldnn(), "of the layout torch._mkldnn", "to_dense"),
    "nested": (
        lambda x: nested(x, torch.strided),
        "a nested tensor, .* torch.strided",
        "to_padded",
    ),
    "jagged": (lambda x: nested(x, torch.jagged), "a nested tensor, .* torch.jagged", "to_padded"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), "a masked tensor", "get_data"),
}


# PyTorch says so of each of these layouts when a tensor is made, here to be refused: nested and
# masked ones, CSR and CSC, BSR and BSC.
@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.filterwarnings("ignore:Sparse C.* support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse B.* support is in beta state")
@pytest.mark.parametrize(("made", "what", "advice"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [bt.BatchNorm1d, bt.SyncBatchNorm])
@pytest.mark.parametrize("keywords", [{}, {"momentum": None, "skip_nonfinite": True}], ids=str)
def test_what_is_not_dense_is_refused_by_its_layout(kind, keywords, training, made, what, advice):
    layer = kind(4, **keywords).train(training)
    before, other = state(layer), made(GOOD)
    for name, call in {
        "input": lambda: layer(other),
        "residual": lambda: layer(GOOD, residual=other),
        "mask": lambda: layer(GOOD, mask=other),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be a dense .* it is {what}.*{advice}"):
            call()
        same(state(layer), before)
    if what[-3:] in ("csr", "csc", "bsr", "bsc"):
        return  # of two axes
    other = made(torch.ones(4))
    for name in ("weight", "bias", "running_mean", "running_var"):
        layer = kind(4, **keywords).train(training)
        if name in ("weight", "bias"):
            delattr(layer, name)
        setattr(layer, name, other)
        kept = [each for each in layer.buffers() if each is not other]
        before = [each.clone() for each in kept]
        with pytest.raises(TypeError, match=f"^{name} must be a dense .* it is {what}.*{advice}"):
            layer(GOOD)
        same(kept, before)


# ---- torch.nn.functional's function


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_functional(training, affine):
    results = []
    for function in (bt.functional.batch_norm, nn.functional.batch_norm):
        mean, var = tensor(4, seed=1), tensor(4, seed=2).abs()
        weight, bias = (tensor(4, seed=3), tensor(4, seed=4)) if affine else (None, None)
        y = function(tensor(6, 4, 5), mean, var, weight, bias, training, 0.3, 1e-3)
        results.append((y, mean, var))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)


def test_functional_without_running_statistics():
    x = tensor(6, 4)
    close(
        bt.functional.batch_norm(x, None, None, training=True),
        nn.functional.batch_norm(x, None, None, training=True),
    )
    mean, var = torch.zeros(4).double(), torch.ones(4)  # of two widths, in memory of two sizes
    bt.functional.batch_norm(x, mean, var, training=True)
    close(mean, 0.1 * x.mean(0))
    close(var, (0.9 + 0.1 * x.var(0)).float(), tolerance=1e-6)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (
            (None, None),
            {},
            "Expected running_mean and running_var to be defined when training=False",
        ),
        ((torch.zeros(4), None), {"training": True}, "must either both be None or neither be None"),
        ((torch.zeros(3), torch.ones(4)), {"training": True}, "running_mean must have the feature"),
        ((torch.zeros(4), torch.ones(5)), {}, "running_var must have the feature shape"),
        ((None, None), {"training": True, "momentum": 2.0}, "momentum must be within"),
        ((None, None), {"training": True, "eps": 0.0}, "eps must be positive"),
    ],
)
def test_functional_refuses(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        bt.functional.batch_norm(tensor(6, 4, dtype=torch.float32), *arguments, **keywords)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bt.functional.batch_norm(torch.ones(1, 4), None, None, training=True)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_functional_refuses_what_has_no_channels(shape):
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"at least 2D input \(got {len(shape)}D input\)"):
            bt.functional.batch_norm(torch.ones(shape), None, None, training=training)


# ---- lazy layers


# torch.nn's own lazy layers say so, from which ours derive.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("ours", "theirs", "shape"), CLASSES, ids=IDS[1:])
def test_lazy_layers(ours, theirs, shape):
    name = f"Lazy{ours.__name__}"
    keywords = {"eps": 1e-3, "momentum": 0.3, "dtype": torch.float64}
    layer, other = getattr(bt, name)(activation="relu", **keywords), getattr(nn, name)(**keywords)
    assert isinstance(layer, getattr(nn, name))
    assert isinstance(layer, ours)
    x = tensor(*shape)
    close(layer(x), other(x).relu())
    assert type(layer) is ours
    for got, wanted in zip(state(layer).values(), state(other).values(), strict=True):
        close(got, wanted)
    skipping = getattr(bt, name)(skip_nonfinite=True, dtype=torch.float64)
    skipping(x * float("nan"))
    assert skipping.num_batches_skipped == 1


# ---- any shape, any layout, any dtype


@st.composite
def _calls(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    shape[0] += 1
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    expanded = [draw(st.sampled_from([False, False, False, True])) for _ in shape]
    memory = [1 if e else n * step for n, step, e in zip(shape, steps, expanded, strict=True)]
    x = tensor(*(memory[axis] for axis in order), seed=draw(st.integers(0, 99)))
    x = x.permute(*(order.index(axis) for axis in range(len(shape))))
    x = x[tuple(slice(None, None, 1 if e else s) for s, e in zip(steps, expanded, strict=True))]
    return x.expand(shape), draw(st.sampled_from([*ROUNDING])), draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_calls())
def test_any_call_is_that_of_torch(call):
    exact, dtype, training = call
    narrow = torch.empty(exact.untyped_storage().nbytes() // 8, dtype=dtype)
    narrow = narrow.copy_(exact.as_strided((len(narrow),), (1,), 0))
    narrow = narrow.as_strided(exact.shape, exact.stride(), exact.storage_offset())
    channels = exact.shape[1]
    dy = tensor(*exact.shape, seed=5).to(dtype)
    results = []
    for function, x in (
        (bt.functional.batch_norm, narrow.detach().requires_grad_()),
        (nn.functional.batch_norm, narrow.double().detach().requires_grad_()),
    ):
        mean, var = torch.zeros(channels, dtype=x.dtype), torch.ones(channels, dtype=x.dtype)
        weight, bias = (tensor(channels, seed=i).to(dtype).to(x.dtype) for i in (1, 2))
        y = function(x, mean, var, weight, bias, training, eps=0.1)
        y.backward(dy.to(x.dtype))
        results.append([each.double() for each in (y, x.grad, mean, var)])
    for got, wanted in zip(*results, strict=True):
        close(got, wanted, tolerance=5 * ROUNDING[dtype])


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's OpenMP runtime is another one there")
@pytest.mark.skipif(native.kernels is None, reason="native kernels are not built")
def test_work_is_done_by_the_threads_of_torch():
    """No others are started; in the child of a fork, where those are lost, it is done as well."""
    program = """
import os, warnings
import torch
import batchnorm, batchnorm.torch
warnings.simplefilter("ignore")
batchnorm.set_num_threads(8)
torch.set_num_threads(3)
threads = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(64, 16, 56, 56)
layer = batchnorm.torch.BatchNorm2d(16)
torch.relu(x)
before = threads()
wanted = layer(x).detach()
assert threads() == before, (before, threads())
child = os.fork()
if child == 0:
    found = layer(x).detach()  # an operation of torch's own would wait for lost threads
    os._exit(0 if (found.numpy() == wanted.numpy()).all() else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's OpenMP runtime is another one there")
@pytest.mark.skipif(native.kernels is None, reason="native kernels are not built")
@pytest.mark.parametrize("where", ["a fork", "a worker of DataLoader", "a thread"])
def test_set_num_threads_is_a_limit(where):
    program = """
import os, sys, threading, warnings
import torch
import batchnorm, batchnorm.torch
warnings.simplefilter("ignore")
batchnorm.set_num_threads(8)
torch.set_num_threads(4)
x = torch.randn(64, 16, 56, 56)
layer = batchnorm.torch.BatchNorm2d(16)
layer(x)

def started():
    before = len(os.listdir("/proc/self/task"))
    layer(x)
    return len(os.listdir("/proc/self/task")) - before

def in_child(threads):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        os._exit(100 + started())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 100

def in_thread():
    torch.set_num_threads(1)
    found = []
    thread = threading.Thread(target=lambda: found.append(started()))
    thread.start()
    thread.join()
    return found[0]

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return started()

where = sys.argv[1]
if where == "a fork":
    assert [in_child(threads) for threads in (1, 2, 4)] == [0, 1, 3]
elif where == "a thread":
    assert in_thread() == 0
else:
    assert [each.item() for each in torch.utils.data.DataLoader(Data(), num_workers=1)] == [0]
"""
    command = [sys.executable, "-c", program, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_move_running_statistics_one_after_the_other(dtype):
    layer = bt.BatchNorm1d(8, momentum=1e-4, dtype=dtype)
    x = torch.full((64, 8), 5.0, dtype=dtype)
    steps, workers = 200, 4

    def step(_):
        for _ in range(steps):
            layer(x)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(step, range(workers)))
    assert layer.num_batches_tracked == steps * workers
    wanted = torch.full((8,), 5 * (1 - (1 - 1e-4) ** (steps * workers)), dtype=dtype)
    torch.testing.assert_close(layer.running_mean, wanted, rtol=1e-3, atol=0)


def test_running_statistics_that_negate_what_is_in_memory():
    x = tensor(16, 4, dtype=torch.float32)
    mean, var = torch.full((4,), 2.0), torch.ones(4)
    bt.functional.batch_norm(x, mean, var, training=True)
    negated = torch._neg_view(torch.full((4,), -2.0))
    assert negated.is_neg()
    bt.functional.batch_norm(x, negated, torch.ones(4), training=True)
    torch.testing.assert_close(negated.resolve_neg(), mean)
    layer = bt.BatchNorm1d(4)
    layer.running_mean = torch._neg_view(torch.full((4,), -2.0))
    layer.num_batches_tracked = torch._neg_view(torch.tensor(-3))
    layer(x)
    torch.testing.assert_close(layer.running_mean.resolve_neg(), mean)
    assert layer.num_batches_tracked == 4
    layer = bt.BatchNorm1d(4)
    layer.num_batches_tracked = torch._neg_view(torch.tensor(-3))
    layer(x)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_padding_takes_no_part_in_evaluation_whoever_looks_on(padding):
    layer = bt.BatchNorm1d(3).eval()
    x, mask = tensor(5, 3, dtype=torch.float32), torch.tensor([1, 0, 1, 1, 1]).bool()[:, None]
    x[1] = padding
    parameters = tuple(layer.parameters())

    def gradients(layer, create_graph=False):
        y = layer(x, mask=mask)
        assert torch.isnan(y[1]).all()
        loss = torch.where(mask, y, 0).sin().sum()
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    wanted = gradients(layer)
    assert all(each.isfinite().all() for each in wanted)
    torch.testing.assert_close(gradients(layer, create_graph=True), wanted)
    torch.testing.assert_close(gradients(torch.compile(layer, backend="aot_eager")), wanted)
