"""PyTorch's layers among libraries: those with layers of their own, and those that look at ours.

The libraries are stood in for by classes of the same shape, since they bring much that is not used.
"""

import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
from compare import alike, same
from torch import nn

import batchnorm.torch as bt


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: what it does after normalization are two modules."""

    def __init__(self, num_features, act=None, drop=None, **settings):
        super().__init__(num_features, **settings)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x):
        x = super().forward(x)
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: all is a buffer, and there is no count of batches."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict, prefix, *others):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + bias[:, None, None]

    def __repr__(self):
        return f"{type(self).__name__}({len(self.weight)}, eps={self.eps})"


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(self, num_features, act):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


for each in (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d):
    each.__module__ = "timm.layers.norm_act"
FrozenBatchNorm2d.__module__ = "torchvision.ops.misc"


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """Where pickle finds these classes."""
    for kind in (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, FrozenBatchNorm2d):
        path = kind.__module__
        for end in (*(place for place, letter in enumerate(path) if letter == "."), len(path)):
            module = sys.modules.get(path[:end]) or types.ModuleType(path[:end])
            monkeypatch.setitem(sys.modules, path[:end], module)
        monkeypatch.setattr(module, kind.__name__, kind, raising=False)


def filled(layer):
    """With parameters and statistics that are not those of a new one."""
    for number, tensor in enumerate((*layer.parameters(), *layer.buffers())):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)) + number)
    return layer


def gradients(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, [each.grad for each in layer.parameters()]


X, DY = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

ACTS = {
    "none": (None, None, None),
    "relu": (nn.ReLU(inplace=True), None, "relu"),
    "silu": (nn.SiLU(), None, "silu"),
    "gelu": (nn.GELU(), None, None),
    "relu6": (nn.ReLU6(), None, None),
    "dropped": (nn.ReLU(), nn.Hardtanh(-0.5, 0.5), None),
}


@pytest.mark.parametrize(("act", "drop", "fused"), ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("sync", [None, True])
def test_a_norm_with_an_activation_of_timm(act, drop, fused, sync):
    theirs = nn.Sequential(filled(BatchNormAct2d(3, act, drop, eps=1e-3)))
    ours = bt.convert(copy.deepcopy(theirs), sync=sync)
    assert isinstance(ours[0], (bt.layers.Layer, nn.BatchNorm2d, BatchNormAct2d))
    assert (type(ours[0]).__name__, ours[0].activation) == (
        "BatchNormAct2d" if sync is None else "SyncBatchNormAct2d",
        fused,
    )
    for training in (True, False):
        ours.train(training), theirs.train(training)
        found, expected = gradients(ours, X, DY), gradients(theirs, X, DY)
        alike(found, expected, 1e-5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    alike(ours.state_dict(), theirs.state_dict(), 1e-6)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), bt.convert(ours)):
        same(again(X), ours(X))
    bt.revert(ours)
    assert type(ours[0]) is BatchNormAct2d
    assert vars(ours[0]).keys() == vars(theirs[0]).keys()
    alike(ours(X), theirs(X), 1e-5)


def test_what_timm_itself_has_made_sync_or_frozen():
    layer = SyncBatchNormAct(3)  # which timm gives act and drop, or not
    model = bt.convert(nn.Sequential(filled(layer), filled(SyncBatchNormAct(3))))
    layer.act = nn.ReLU()
    frozen = nn.Sequential(filled(FrozenBatchNormAct2d(3, nn.ReLU())))
    expected = frozen(X), nn.Sequential(*(filled(nn.SyncBatchNorm(3)) for _ in range(2)))
    alike(bt.convert(copy.deepcopy(frozen))(X), expected[0], 1e-5)
    assert bt.convert(frozen)[0].activation == "relu"
    assert model[0].activation == "relu"
    alike(model[1](X), expected[1][1](X), 1e-5)
    bt.revert(model), bt.revert(frozen)
    assert [type(each) for each in (*model, *frozen)] == [
        SyncBatchNormAct,
        SyncBatchNormAct,
        FrozenBatchNormAct2d,
    ]


def test_what_becomes_of_an_activation_of_timm_after_conversion_counts():
    layer = bt.convert(filled(BatchNormAct2d(3, nn.ReLU())))
    plain = filled(bt.BatchNorm2d(3))
    seen = []
    handle = layer.act.register_forward_hook(lambda module, arguments, y: seen.append(y))
    same(layer(X), plain(X).relu())
    assert len(seen) == 1
    handle.remove()
    layer.act = nn.GELU()
    alike(layer(X), nn.functional.gelu(plain(X)), 1e-6)
    layer.act = nn.SiLU()
    alike(layer(X), nn.functional.silu(plain(X)), 1e-6)
    layer.act.forward = lambda x: 2 * x
    alike(layer(X), 2 * plain(X), 1e-6)
    layer.drop = nn.Hardtanh(0, 1)
    alike(layer(X), 2 * plain(X).clamp(0, 1), 1e-6)
    alike(layer(x=X), 2 * plain(X).clamp(0, 1), 1e-6)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNorm2d])
def test_a_layer_whose_forward_a_program_has_set_is_refused_by_name(kind):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"norm": kind(3)}))
    model[1]["norm"].forward = lambda x: x
    with pytest.raises(TypeError, match=r"'1\.norm' another meaning of forward"):
        bt.convert(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_frozen_layer_of_torchvision():
    theirs = nn.Sequential(filled(FrozenBatchNorm2d(3, eps=1e-3)))
    expected, keys = theirs(X), list(theirs.state_dict())
    ours = bt.convert(copy.deepcopy(theirs))
    assert isinstance(ours[0], FrozenBatchNorm2d)
    assert isinstance(ours[0], nn.BatchNorm2d)
    assert (ours[0].normalize_by, ours[0].update_running) == ("running", False)
    assert list(ours.parameters()) == []
    assert repr(ours) == repr(theirs)
    before = copy.deepcopy(ours.state_dict())
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        alike(model.train()(X), expected, 1e-6)
        torch.optim.swa_utils.update_bn([X], model)
        model[0].reset_parameters()
        assert list(model.state_dict()) == keys
        same(model.state_dict(), before)
    bt.convert(ours, sync=True)
    alike(ours(X), expected, 1e-6)
    bt.revert(ours)
    assert type(ours[0]) is FrozenBatchNorm2d
    del ours[0].momentum  # which update_bn sets on whatever is a batch normalization
    assert vars(ours[0]).keys() == vars(theirs[0]).keys()


def test_a_frozen_layer_of_torchvision_loads_what_a_batch_norm_has_saved():
    checkpoint = filled(nn.BatchNorm2d(3)).state_dict()
    layer = bt.convert(FrozenBatchNorm2d(3))
    assert not any(layer.load_state_dict(checkpoint))
    same(layer.running_mean, checkpoint["running_mean"])
    without_metadata = {name: each for name, each in checkpoint.items() if name[:3] != "num"}
    assert not any(layer.load_state_dict(without_metadata))


def test_a_frozen_layer_of_torchvision_without_eps():
    theirs = filled(FrozenBatchNorm2d(3, eps=0.0))
    ours = bt.convert(copy.deepcopy(theirs))
    alike(ours(x=X), theirs(X), 1e-6)
    assert vars(bt.revert(ours)).keys() == vars(theirs).keys()
    assert ours.eps == 0
    other = bt.convert(FrozenBatchNorm2d(3))
    other.eps = 0.0
    assert torch.isfinite(other(X)).all()
    with pytest.raises(ValueError, match="'module': eps must be positive"):
        bt.convert(nn.BatchNorm2d(3, eps=0.0))


def test_a_model_of_timm_that_torch_fx_has_traced():
    theirs = nn.Sequential(
        filled(BatchNormAct2d(3, nn.ReLU())), filled(BatchNormAct2d(3, nn.GELU()))
    )
    traced = torch.fx.symbolic_trace(bt.convert(copy.deepcopy(theirs)))
    assert [node.op for node in traced.graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "output",
    ]
    expected = theirs(X)
    alike(traced(X), expected, 1e-5)
    bt.revert(traced)
    alike(traced(X), expected, 1e-6)


def test_one_that_is_unfrozen_is_trained_and_not_reverted():
    model = bt.convert(nn.Sequential(filled(FrozenBatchNorm2d(3))))
    before = model[0].running_mean.clone()
    model[0].unfreeze()(X)
    assert not torch.equal(model[0].running_mean, before)
    with pytest.raises(
        ValueError, match=r"FrozenBatchNorm2d .* that of '0' is None\. Call its freeze"
    ):
        bt.revert(model)
    model[0].freeze()
    assert type(bt.revert(model)[0]) is FrozenBatchNorm2d


@pytest.mark.parametrize(
    "made", [lambda: FrozenBatchNorm2d(3), lambda: FrozenBatchNormAct2d(3, nn.ReLU())]
)
def test_a_frozen_layer_without_memory_loads_a_checkpoint(made):
    saved = filled(made()).state_dict()
    with torch.device("meta"):
        layer = bt.convert(made())
    assert not any(copy.deepcopy(layer).load_state_dict(saved, assign=True))
    layer = layer.to_empty(device="cpu")
    assert torch.equal(layer.running_var, torch.ones(3))
    assert not any(layer.load_state_dict(saved))
    alike(layer(X), filled(made())(X), 1e-5)


def test_blocks_of_a_library_are_gone_through():
    class Conv2dNormActivation(nn.Sequential):  # as torchvision's
        pass

    block = Conv2dNormActivation(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert type(bt.convert(block)[1]) is bt.BatchNorm2d


# ---- classes of one's own


class Named(nn.BatchNorm2d):
    pass


class Alone(nn.Module):
    """Which has nothing to do with torch.nn's."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels


class Synchronized(bt.SyncBatchNorm):
    pass


def test_kinds_says_what_becomes_of_a_class():
    model = nn.Sequential(Named(3), nn.ModuleDict({"norm": Named(3)}), nn.BatchNorm2d(3), Alone(3))
    model.append(model[0])
    layers = list(model)
    kinds = {Named: bt.BatchNorm2d, Alone: lambda layer: bt.BatchNorm2d(layer.channels).freeze()}
    with pytest.raises(TypeError, match=r"convert\(model, kinds=\{Named: \.\.\.\}\)"):
        bt.convert(model)
    assert bt.convert(model, kinds=kinds) is model
    assert model[0] is model[4] is layers[0]
    assert {type(each) for each in model.modules()} == {
        nn.Sequential,
        nn.ModuleDict,
        bt.BatchNorm2d,
    }
    assert model[3].normalize_by == "running"
    same(model[0](X), bt.BatchNorm2d(3)(X))
    model[3].unfreeze()
    bt.revert(model)
    assert [type(each) for each in (model[0], model[1]["norm"], model[2])] == [
        Named,
        Named,
        nn.BatchNorm2d,
    ]
    assert vars(model[0]).keys() == vars(Named(3)).keys()


def test_kinds_of_a_module_that_is_one():
    new = bt.BatchNorm2d(3)
    assert bt.convert(Alone(3), kinds={Alone: lambda layer: new}) is new
    layer = Named(3)
    assert bt.convert(layer, kinds={Named: bt.BatchNorm2d}) is layer
    stays = nn.Sequential(layer)
    assert bt.convert(stays, kinds={nn.BatchNorm2d: lambda layer: layer})[0] is layer


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm


def test_kinds_within_what_another_rule_has_made():
    model = nn.Sequential(Block(Named(3)))
    kinds = {
        Block: lambda block: nn.Sequential(block, Block(block.norm)),
        Named: lambda layer: bt.BatchNorm2d(3),
    }
    bt.convert(model, kinds=kinds)
    assert type(model[0][0].norm) is bt.BatchNorm2d
    assert model[0][0].norm is model[0][1].norm


def test_kinds_that_share_their_batch():
    kinds = {Named: bt.BatchNorm2d}
    model = bt.convert(nn.Sequential(Named(3)), kinds=kinds, sync=True)
    assert type(model[0]) is bt.SyncBatchNorm
    assert type(bt.revert(model)[0]) is Named
    bt.convert(model, kinds={Named: Synchronized}, sync=True)
    assert type(model[0]) is Synchronized
    assert model[0].process_group is None


class WithoutSettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-5


class OursOfOne(bt.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("kinds", "sync", "message"),
    [
        ([Named], None, "kinds must be a dict from classes to rules, but got list"),
        ({"Named": bt.BatchNorm2d}, None, "kinds must have subclasses of .* keys, but got 'Named'"),
        ({Named: nn.BatchNorm2d}, None, r"kinds\[Named\] must be a class of batchnorm.torch, or a"),
        ({Named: "ours"}, None, r"kinds\[Named\] must be .* but got 'ours'"),
        ({Named: lambda layer: None}, None, r"kinds\[Named\] must return .* of '1', but .* None"),
        ({Named: OursOfOne}, True, "would make '1' a OursOfOne, which is no SyncBatchNorm"),
        ({Named: lambda _: bt.BatchNorm2d(3)}, True, "no SyncBatchNorm in the place of '1'"),
        (
            {Named: bt.BatchNorm2d, WithoutSettings: bt.BatchNorm2d},
            None,
            "cannot take '2': a BatchNorm2d needs num_features, but this WithoutSettings has none",
        ),
    ],
)
def test_kinds_that_are_none(kinds, sync, message):
    model = nn.Sequential(nn.BatchNorm2d(3), Named(3), WithoutSettings())
    with pytest.raises(TypeError, match=message):
        bt.convert(model, kinds=kinds, sync=sync)
    assert [type(each) for each in model] == [nn.BatchNorm2d, Named, WithoutSettings]


# ---- what builds another layer of ours


def rebuilt_by_torch(layer):
    return nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def fused_with_a_convolution(layer):
    return torch.nn.utils.fusion.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), layer)


def fused_with_a_linear(layer):
    return torch.nn.utils.fusion.fuse_linear_bn_eval(nn.Linear(3, 3).eval(), layer)


def for_mkldnn(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which it is made with
        from torch.utils.mkldnn import to_mkldnn

        return to_mkldnn(nn.Sequential(layer))


def frozen_by_attributes(layer):
    frozen = FrozenBatchNorm2d(layer.num_features, layer.eps)
    frozen.load_state_dict(layer.state_dict())
    return frozen


REBUILDING = [
    rebuilt_by_torch,
    fused_with_a_convolution,
    fused_with_a_linear,
    for_mkldnn,
    frozen_by_attributes,
]
BEYOND = {
    "activation": lambda: bt.BatchNorm2d(3, activation="relu"),
    "skip_nonfinite": lambda: bt.BatchNorm2d(3, skip_nonfinite=True),
    "normalize_by": lambda: bt.BatchNorm2d(3).freeze(),
    "update_running": lambda: bt.BatchNorm2d(3).freeze(normalize_by=None),
    "fused": lambda: bt.convert(BatchNormAct2d(3, nn.SiLU())),
    "sync": lambda: bt.SyncBatchNorm(3, activation="relu"),
}


@pytest.mark.parametrize("rebuild", REBUILDING)
@pytest.mark.parametrize("made", BEYOND.values(), ids=BEYOND)
def test_what_would_lose_something_of_a_layer_is_refused(rebuild, made):
    layer = made().eval()
    with pytest.raises(RuntimeError, match=r"eps of this .* would lose that without a word"):
        rebuild(layer)
    assert type(layer) is type(made())


@pytest.mark.parametrize("rebuild", REBUILDING[1:-1])
def test_a_layer_that_has_nothing_of_its_own_is_fused(rebuild):
    assert isinstance(rebuild(filled(bt.BatchNorm2d(3)).eval()), nn.Module)


def test_what_would_undo_a_conversion_is_refused():
    def freeze_batch_norm_2d(layer):  # as timm's
        return FrozenBatchNorm2d(layer.num_features, layer.eps)

    for undo in (rebuilt_by_torch, freeze_batch_norm_2d):
        with pytest.raises(RuntimeError, match=r"would lose what is ours without .* sync=True"):
            undo(bt.BatchNorm2d(3))
        undo(bt.revert(bt.BatchNorm2d(3)))


@pytest.mark.parametrize("made", BEYOND.values(), ids=BEYOND)
def test_other_habits_are_served_whatever_a_layer_has(made):
    layer = made()
    assert "eps=1e-05" in repr(layer)
    layer.eps = 1e-3
    assert vars(layer)["eps"] == vars(copy.deepcopy(layer))["eps"] == 1e-3
    assert vars(pickle.loads(pickle.dumps(layer)))["eps"] == 1e-3
    nn.init.constant_(layer.weight, 2.0)
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer), use_buffers=True)
    averaged.update_parameters(nn.Sequential(layer))
    layer.momentum = 1.0  # as precise statistics are gathered
    layer.train()(X)
    assert layer.running_mean.shape == (3,)
    layer.reset_parameters()


def test_an_activation_is_put_after_the_layer():
    layer = bt.BatchNorm2d(3, activation="silu")
    model = nn.ModuleDict({"one": nn.Sequential(layer, bt.BatchNorm2d(3)), "other": layer})
    expected = model["one"](X)
    layer.reset_running_stats()
    with pytest.raises(ValueError, match=r"'one\.0' is 'silu'.* separate_activations=True"):
        bt.revert(model)
    assert bt.revert(model, separate_activations=True) is model
    assert repr(model["other"]) == repr(nn.Sequential(nn.BatchNorm2d(3), nn.SiLU()))
    assert model["other"] is model["one"][0]
    assert model["other"][0] is layer
    alike(model["one"](X), expected, 1e-5)
    alone = bt.revert(bt.BatchNorm2d(3, activation="relu"), separate_activations=True)
    alike(alone(X), nn.BatchNorm2d(3)(X).relu(), 1e-5)
    assert vars(alone[0]).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert not bt.revert(bt.BatchNorm2d(3, activation="relu").eval(), separate_activations=True)[
        1
    ].training
    with pytest.raises(ValueError, match="normalize_by"):
        bt.revert(bt.BatchNorm2d(3, activation="relu").freeze(), separate_activations=True)
    with pytest.raises(TypeError, match="separate_activations must be True or False, but got 1"):
        bt.revert(model, separate_activations=1)


# ---- what looks for layers by their class

TUPLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@pytest.mark.parametrize("kind", TUPLE)
def test_a_layer_that_shares_its_batch_is_found_by_class(kind):
    model = bt.convert(nn.Sequential(kind(3)), sync=True)
    for layer in (model[0], bt.SyncBatchNorm(3), pickle.loads(pickle.dumps(model[0]))):
        assert isinstance(layer, TUPLE)
        assert kind is nn.SyncBatchNorm or isinstance(layer, kind)
        assert not isinstance(layer, nn.SyncBatchNorm)  # DistributedDataParallel's refusal on CPUs
    assert type(bt.revert(model)[0]) is kind


def test_statistics_of_layers_that_share_their_batch_are_estimated_anew():
    model = bt.convert(nn.Sequential(nn.BatchNorm2d(3)), sync=True)
    torch.optim.swa_utils.update_bn([X, X + 1], model)
    alike(model[0].running_mean, X.mean((0, 2, 3)) + 0.5, 1e-6)
    assert model[0].momentum == 0.1


def test_layers_share_their_batch_by_the_method_of_the_class():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(3)))
    layer = model[0]
    assert bt.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert model[0] is layer
    assert type(layer) is type(model[1][0]) is bt.SyncBatchNorm
    assert layer.process_group is None
    with pytest.raises(TypeError, match=r"ProcessGroup, but got 'all'"):
        bt.SyncBatchNorm.convert_sync_batchnorm(model, process_group="all")


# ---- Opacus


@pytest.fixture
def opacus(monkeypatch):
    """Its tables of classes: what it refuses, and what it puts in the place."""

    class ModuleValidator:
        VALIDATORS = dict.fromkeys(TUPLE, lambda layer: ["mixes examples"])
        FIXERS = dict.fromkeys(TUPLE, lambda layer, **_: nn.GroupNorm(1, layer.num_features))

        @classmethod
        def validate(cls, model):
            found = (cls.VALIDATORS.get(type(each)) for each in model.modules())
            return [message for each in found if each for message in each(model)]

    validators = types.ModuleType("opacus.validators")
    validators.ModuleValidator = ModuleValidator
    monkeypatch.setitem(sys.modules, "opacus.validators", validators)
    return ModuleValidator


class MyBatchNorm(bt.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "made",
    [
        lambda: bt.BatchNorm1d(3, track_running_stats=False),
        lambda: bt.LazyBatchNorm2d(track_running_stats=False),
        lambda: bt.SyncBatchNorm(3),
        lambda: MyBatchNorm(3),
        lambda: bt.convert(nn.BatchNorm3d(3)),
        lambda: bt.convert(nn.BatchNorm3d(3), sync=True),
        lambda: bt.convert(BatchNormAct2d(3, nn.ReLU())),
        lambda: bt.convert(Alone(3), kinds={Alone: lambda layer: MyBatchNorm(3)}),
    ],
)
def test_opacus_refuses_a_layer_of_ours(opacus, made):
    assert opacus.validate(nn.Sequential(made())) == ["mixes examples"]


def test_opacus_hears_of_a_layer_that_is_loaded(opacus):
    saved = pickle.dumps(MyBatchNorm(3))
    opacus.VALIDATORS.pop(MyBatchNorm)
    assert opacus.validate(pickle.loads(saved))


def test_opacus_replaces_a_layer_and_keeps_its_activation(opacus):
    for kind in (bt.BatchNorm2d, MyBatchNorm):
        layer = kind(3, activation="relu")
        fixed = opacus.FIXERS[kind](layer)
        assert repr(fixed) == repr(nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU()))
        assert repr(opacus.FIXERS[kind](kind(3))) == repr(nn.GroupNorm(1, 3))
    layer = bt.convert(BatchNormAct2d(3, nn.GELU()))
    fixed = opacus.FIXERS[type(layer)](layer)
    assert repr(fixed) == repr(nn.Sequential(nn.GroupNorm(1, 3), nn.Identity(), nn.GELU()))
