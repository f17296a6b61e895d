"""`convert` and `revert`: from torch.nn's layers to ours, and back."""

import copy

import pytest
import torch
from compare import alike, same
from torch import nn

import batchnorm.torch as bt

PAIRS = [
    (nn.BatchNorm1d, bt.BatchNorm1d, (4, 3)),
    (nn.BatchNorm2d, bt.BatchNorm2d, (4, 3, 2, 2)),
    (nn.BatchNorm3d, bt.BatchNorm3d, (4, 3, 2, 2, 2)),
    (nn.SyncBatchNorm, bt.SyncBatchNorm, (4, 3, 2)),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, affine=False)),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.BatchNorm2d(5, momentum=None),
    )


def step(model, seed=1):
    """One step of gradient descent on the sum of squares of the outputs, which it returns."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    y = model(torch.randn(6, 3, 5, 5))
    (y**2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return y.detach()


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
def test_each_class_and_back(theirs, ours, shape):
    layer = theirs(3)
    contents = dict(layer.__dict__)
    model = nn.Sequential(layer)
    assert bt.convert(model) is model
    assert type(model[0]) is ours
    assert bt.revert(model) is model
    assert type(model[0]) is theirs
    assert model[0].__dict__ == contents
    assert bt.revert(model)[0] is layer


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
def test_a_module_that_is_a_batch_normalization(theirs, ours, shape):
    layer = theirs(3)
    assert bt.convert(layer) is layer
    assert type(layer) is ours
    assert layer(torch.randn(shape)).shape == shape
    assert bt.revert(layer) is layer
    assert type(layer) is theirs


def test_outputs_and_training_stay_the_same():
    theirs = network()
    ours = bt.convert(copy.deepcopy(theirs))
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        for seed in range(3):
            alike(step(ours, seed), step(theirs, seed), 1e-4)
    alike(ours.state_dict(), theirs.state_dict(), 1e-4)


def test_reverting_gives_the_same_bits():
    model = network()
    step(model)
    before = copy.deepcopy(model)
    assert repr(bt.revert(bt.convert(model))) == repr(before)
    same(model.state_dict(), before.state_dict())
    assert torch.equal(step(model), step(before))
    same(model.state_dict(), before.state_dict())
    assert [vars(each).keys() for each in model.modules()] == [
        vars(each).keys() for each in before.modules()
    ]


def test_an_optimizer_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = list(model.parameters()), list(model.buffers())
    bt.convert(model)
    for ours, theirs in zip((model.parameters(), model.buffers()), before, strict=True):
        assert all(one is other for one, other in zip(ours, theirs, strict=True))
    weight = model[1].weight.detach().clone()
    model(torch.randn(6, 3, 5, 5)).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, weight)


def test_hooks_stay_and_can_be_removed():
    model, seen = nn.Sequential(nn.BatchNorm1d(3)), []

    def called(name):
        return lambda module, *_: seen.append((name, type(module)))

    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(called("before")),
        layer.register_forward_hook(called("after")),
        layer.register_full_backward_hook(called("backward")),
        layer.register_state_dict_pre_hook(called("save")),
        layer.register_load_state_dict_pre_hook(called("load")),
        layer.register_load_state_dict_post_hook(called("loaded")),
    ]
    bt.convert(model)

    def everything():
        model(torch.randn(4, 3, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())

    everything()
    names = ["before", "after", "backward", "save", "load", "loaded"]
    assert seen == [(name, bt.BatchNorm1d) for name in names]
    for handle in handles:
        handle.remove()
    everything()
    assert len(seen) == len(names)


def test_mode_and_requires_grad_stay():
    model = network().eval()
    model[4].train()
    model[1].weight.requires_grad_(False)
    before = [(each.training, [p.requires_grad for p in each.parameters()]) for each in model]
    bt.convert(model)
    assert before == [
        (each.training, [p.requires_grad for p in each.parameters()]) for each in model
    ]


def test_freezing_stays():
    model = bt.convert(network())
    model[1].freeze()
    assert bt.convert(model, sync=True)[1].normalize_by == "running"


def test_a_layer_with_two_names_stays_one():
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"one": layer, "other": nn.Sequential(layer)})
    model.outside = [layer]  # a list, where no walk through a model finds it
    bt.convert(model)
    assert model["one"] is model["other"][0] is model.outside[0]
    assert type(model.outside[0]) is bt.BatchNorm1d
    bt.revert(model)
    assert type(model.outside[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("change", [bt.convert, bt.revert])
@pytest.mark.parametrize("value", [{}, None, nn.BatchNorm1d, "model"], ids=str)
def test_what_is_no_module_is_refused(change, value):
    with pytest.raises(TypeError, match=r"module must be an instance of torch.*Module, but got"):
        change(value)


def test_a_model_without_batch_normalization_gives_a_warning():
    model = nn.Sequential(nn.Linear(4, 3))
    for sync in (None, True):
        with pytest.warns(UserWarning, match="no batch normalization of torch.nn in this Sequen"):
            assert bt.convert(model, sync=sync) is model
    assert bt.revert(model) is model
    model.append(bt.BatchNorm1d(3))
    assert bt.convert(model) is model  # there is one, which is converted already


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eps": "1e-5"}, TypeError, "eps must be a positive number, but got '1e-5'"),
        ({"eps": float("nan")}, ValueError, "eps must be positive and finite, but got nan"),
        ({"momentum": 1.1}, ValueError, "momentum must be within"),
        ({"num_features": 0}, ValueError, "num_features must be a positive integer, but got 0"),
        ({"affine": "no"}, TypeError, "affine must be True or False, but got 'no'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sync", [None, True])
def test_a_layer_whose_settings_are_bad_is_refused_by_name(settings, error, message, sync):
    bad = nn.BatchNorm1d(**{"num_features": 3, **settings})
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(bad))
    with pytest.raises(error, match=f"convert cannot take '1.0': {message}"):
        bt.convert(model, sync=sync)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_statistics_are_float32_until_reverted(dtype):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)).to(dtype)
    model[0].running_mean.fill_(3)
    bt.convert(model)
    assert {layer.running_mean.dtype for layer in model} == {torch.float32}
    assert torch.equal(model[0].running_mean, torch.full((4,), 3.0))
    x = torch.randn(6, 4).to(dtype)
    model(x)
    bt.revert(model)
    assert (model[0].running_mean.dtype, model[0].running_var.dtype) == (dtype, dtype)
    assert model.eval()(x).dtype == model.train()(x).dtype == dtype


def test_lazy_layers():
    model = bt.convert(nn.Sequential(nn.LazyBatchNorm2d(momentum=0.5)))
    assert type(model[0]) is bt.LazyBatchNorm2d
    assert type(bt.revert(model)[0]) is nn.LazyBatchNorm2d
    bt.convert(model)(torch.randn(2, 3, 4, 4))
    assert type(model[0]) is bt.BatchNorm2d
    assert model[0].num_features == 3
    assert type(bt.revert(model)[0]) is nn.BatchNorm2d


def test_a_lazy_layer_without_parameters_and_statistics():
    model = nn.Sequential(nn.LazyBatchNorm2d(affine=False, track_running_stats=False))
    expected = model(torch.arange(24.0).reshape(2, 3, 2, 2))
    alike(bt.convert(model)(torch.arange(24.0).reshape(2, 3, 2, 2)), expected, 1e-5)


def test_sync_makes_every_layer_one_that_shares_and_back():
    model = nn.Sequential(nn.BatchNorm2d(3), bt.BatchNorm2d(3, activation="relu"))
    model.append(nn.SyncBatchNorm(3))
    bt.convert(model, sync=True)
    bt.convert(model, sync=True)
    assert all(type(each) is bt.SyncBatchNorm for each in model)
    assert [each.activation for each in model] == [None, "relu", None]
    assert all(each.process_group is None for each in model)
    model(torch.randn(4, 3, 2, 2))  # torch.distributed is not initialized
    model[1].activation = None
    bt.revert(model)
    assert [type(each) for each in model] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm]
    assert "process_group" not in vars(model[0])
    assert "process_group" in vars(model[2])


@pytest.mark.parametrize("sync", [None, False])
def test_without_sync_each_layer_becomes_its_namesake(sync):
    model = bt.convert(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)), sync=sync)
    assert [type(each) for each in model] == [bt.BatchNorm2d, bt.SyncBatchNorm]


def test_a_group_that_is_none_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match=r"ProcessGroup, but got 'all'"):
        bt.convert(model, sync="all")
    assert type(model[0]) is nn.BatchNorm1d


class Theirs(nn.BatchNorm2d):
    pass


class Ours(bt.BatchNorm2d):
    pass


def test_unknown_classes_are_refused_by_name_and_nothing_changes():
    for unknown in (Theirs, Ours):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"norm": unknown(3)}))
        with pytest.raises(TypeError, match=rf"'1\.norm' is a .*\.{unknown.__name__}"):
            bt.convert(model)
        assert [type(each) for each in model.modules()][1] is nn.BatchNorm2d
    model = nn.Sequential(bt.BatchNorm2d(3), Ours(3))
    with pytest.raises(TypeError, match=r"revert .* '1' is a .*Ours"):
        bt.revert(model)
    assert type(model[0]) is bt.BatchNorm2d
    with pytest.raises(TypeError, match="'module' is a"):
        bt.convert(Theirs(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", lambda input: input),
        ("reset_running_stats", lambda: None),
        ("_load_from_state_dict", lambda *arguments: None),
        ("freeze", True),
        ("activation", "relu"),
    ],
)
@pytest.mark.parametrize("sync", [None, True])
def test_what_is_set_on_a_layer_itself_is_not_bypassed(name, value, sync):
    """A name that means something in ours would change its meaning without a word."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    setattr(model[1][0], name, value)
    with pytest.raises(TypeError, match=rf"'1\.0' another meaning of {name}, which is set on"):
        bt.convert(model, sync=sync)
    assert type(model[0]) is nn.BatchNorm2d
    assert getattr(model[1][0], name) is value


def test_a_method_that_is_set_on_a_layer_of_ours_stays():
    model = nn.Sequential(bt.BatchNorm2d(3))
    model[0].forward = lambda input: input + 1
    model[0].my_own = "stays"
    with pytest.raises(TypeError, match="'0' another meaning of forward"):
        bt.convert(model, sync=True)
    bt.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0].my_own == "stays"
    assert torch.equal(model(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))
    assert set(vars(nn.BatchNorm2d(3))) == set(vars(model[0])) - {"forward", "my_own"}


def test_lazy_layers_can_not_share():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(TypeError, match=r"num_features, but '1' is lazy"):
        bt.convert(model, sync=True)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (bt.BatchNorm1d(3, activation="silu"), "activation, but that of '1' is 'silu'"),
        (bt.BatchNorm1d(3, skip_nonfinite=True), "skip_nonfinite.* Set it to False first"),
        (bt.BatchNorm1d(3).freeze(), r"normalize_by.* Call its unfreeze\(\) first"),
        (bt.BatchNorm1d(3).freeze(normalize_by=None, update_running=True), "update_running"),
    ],
)
def test_what_torch_has_not_is_not_reverted(layer, name):
    model = nn.Sequential(bt.BatchNorm1d(3), layer)
    with pytest.raises(ValueError, match=f"no {name}"):
        bt.revert(model)
    assert type(model[0]) is bt.BatchNorm1d


def test_a_frozen_layer_that_is_unfrozen_is_reverted():
    model = nn.Sequential(bt.BatchNorm1d(3).freeze().unfreeze())
    assert vars(bt.revert(model)[0]).keys() == vars(nn.BatchNorm1d(3)).keys()


def test_state_of_momentum_none_goes_with_a_revert():
    layer = bt.BatchNorm1d(3, momentum=None)
    layer(torch.randn(4, 3))
    assert vars(bt.revert(layer)).keys() == vars(nn.BatchNorm1d(3)).keys()


def test_a_compiled_model_is_compiled_anew():
    theirs = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ours = copy.deepcopy(theirs)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.full((4, 3), 1.0)
    x[0] = 1e4
    alike(compiled(x), theirs(x), 1.3e-6)
    bt.convert(ours)
    ours[1].activation = "relu"
    alike(compiled(x), theirs(x).relu(), 1e-4)
    alike(ours.state_dict(), theirs.state_dict(), 1.3e-6)
