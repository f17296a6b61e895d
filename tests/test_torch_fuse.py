"""`fuse`: normalizations, additions and activations in one call, and nothing else changed."""

import copy
import logging
import operator
import pickle
import random
import threading
from collections import OrderedDict, defaultdict
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import alike, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bt


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More would wait for each other, in tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome(model):
    return {each.path: (each.what, each.why) for each in bt.changes(model)}


def fused(model):
    return [each.path for each in bt.changes(model) if each.what == "fused"]


def step(model, *inputs, rate=0.01):
    """One step of gradient descent on the mean square of the output, which it returns."""
    y = model(*inputs)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= rate * gradient
    return y.detach()


def equal_in_training(model, other, *inputs, steps=3, tolerance=1e-9, rate=0.01):
    for mode in (*[True] * steps, False):
        model.train(mode), other.train(mode)
        torch.manual_seed(0)
        y = step(model, *copy.deepcopy(inputs), rate=rate)
        torch.manual_seed(0)
        alike(y, step(other, *copy.deepcopy(inputs), rate=rate), tolerance)
    alike(dict(model.state_dict()), dict(other.state_dict()), tolerance)


# ---- whole models


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride, has_downsample):
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if has_downsample:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet50(nn.Module):
    """He et al. (2015), table 1, an eighth as wide."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for number, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), start=1):
            made = []
            for block in range(blocks):
                made.append(Bottleneck(channels, width, 1 if block else stride, block == 0))
                channels = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*made))
            width *= 2
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_all_49_relus_of_resnet50_go_in():
    torch.manual_seed(0)
    model = ResNet50().double()
    keys, kinds = list(model.state_dict()), [type(each) for each in model.modules()]
    ours = copy.deepcopy(model)
    assert bt.fuse(ours) is ours
    assert len(fused(ours)) == 49
    left = {path: why for path, (what, why) in outcome(ours).items() if what == "left"}
    assert list(left) == [f"layer{number}.0.downsample.1" for number in (1, 2, 3, 4)]
    assert set(left.values()) == {
        "what follows is the end of the forward that calls it, and no relu or silu"
    }
    assert list(ours.state_dict()) == keys
    assert [getattr(type(each), "stands_for", type(each)) for each in ours.modules()] == kinds
    # Each step makes fifty times as much of a difference, as it does of what `convert` makes.
    x = tensor(4, 3, 48, 48).double()
    equal_in_training(ours, model, x, steps=5, tolerance=1e-6, rate=1e-3)


# ---- what is fused


class Net(nn.Module):
    """conv, then norm, then what `after` makes of it."""

    def __init__(self, after, norm=nn.BatchNorm2d, **modules):
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(3, 3, 3, padding=1), norm(3), after
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.after(self, x)


def normalized(net, x):
    return net.norm(net.conv(x))


def sum_in_place(net, x):
    y = normalized(net, x)
    y += x
    return F.relu_(y)


def sum_of_two(net, x):
    y = normalized(net, x)
    return net.relu(y + net.other(x))


def with_activation_used_twice(net, x):
    return net.relu(net.relu(normalized(net, x)) + 1)


def with_a_residual_made_between(net, x):
    y = normalized(net, x)
    return net.relu(net.inner(x) + y)


def with_identities(net, x):
    return net.relu(net.path(net.norm(net.path(net.conv(x)))) + net.path(x))


FUSED = {
    "a module": lambda net, x: net.relu(normalized(net, x)),
    "silu": lambda net, x: net.silu(normalized(net, x)),
    "a function": lambda net, x: F.relu(normalized(net, x)),
    "a function in place": lambda net, x: F.relu(normalized(net, x), inplace=True),
    "a function of torch": lambda net, x: torch.relu(normalized(net, x)),
    "a method": lambda net, x: normalized(net, x).relu(),
    "a method in place": lambda net, x: normalized(net, x).relu_(),
    "silu as a function": lambda net, x: F.silu(normalized(net, x), inplace=True),
    "a sum": lambda net, x: net.relu(normalized(net, x) + x),
    "a sum, the other way": lambda net, x: net.silu(x + normalized(net, x)),
    "a sum in place": sum_in_place,
    "torch.add": lambda net, x: torch.relu(torch.add(normalized(net, x), x)),
    "add": lambda net, x: normalized(net, x).add(x).relu(),
    "add_": lambda net, x: normalized(net, x).add_(x).relu_(),
    "an activation used twice": with_activation_used_twice,
    "a residual made between": with_a_residual_made_between,
}
KINDS = {
    "torch": nn.BatchNorm2d,
    "ours": bt.BatchNorm2d,
    "frozen": lambda channels: bt.BatchNorm2d(channels).freeze(),
    "no parameters": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "no statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
}


def pair(after, **others):
    torch.manual_seed(0)
    model = Net(after, **others).double()
    ours = copy.deepcopy(model)
    bt.fuse(ours)
    return ours, model


def calls_of_norm(model, *inputs, path="norm", **named):
    """The keywords with which the layer is called."""
    seen = []
    layer = model.get_submodule(path)
    kind = type(layer)

    class Seen(kind):
        def forward(self, input, residual=None, mask=None, *, activation=None):
            seen.append((residual is not None, activation))
            return super().forward(input, residual, mask, activation=activation)

    layer.__class__ = Seen
    model(*inputs, **named)
    layer.__class__ = kind
    return seen


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        *((after, "torch") for after in FUSED),
        *(("a sum", kind) for kind in KINDS if kind != "torch"),
    ],
)
def test_what_is_fused(after, kind):
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    ours, model = pair(FUSED[after], norm=KINDS[kind], inner=inner)
    assert "norm" in fused(ours)
    x = tensor(4, 3, 5, 5).double()
    equal_in_training(ours, model, x)
    name = "silu" if "silu" in outcome(ours)["norm"][1].lower() else "relu"
    assert calls_of_norm(ours, x) == [("addition" in outcome(ours)["norm"][1], name)]


def test_one_of_two_normalizations_that_are_added():
    ours, model = pair(sum_of_two, other=nn.BatchNorm2d(3))
    assert fused(ours) == ["norm"]
    assert "added to another normalization" in outcome(ours)["other"][1]
    assert type(ours.other) is nn.BatchNorm2d
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


@pytest.mark.parametrize(
    ("residual", "is_one"),
    [
        (tensor(4, 3, 5, 5), True),
        (tensor(4, 3, 1, 1), False),
        (tensor(2, 4, 3, 5, 5), False),
        (tensor(4, 3, 5, 5).double(), False),
        (torch.ones(4, 3, 5, 5, dtype=torch.int32), False),
    ],
)
def test_a_sum_of_other_shapes_or_dtypes_stays_a_sum(residual, is_one):
    class Two(Net):
        def forward(self, x, y):
            return self.relu(self.norm(self.conv(x)) + y)

    torch.manual_seed(0)
    model = Two(None)
    ours = bt.fuse(copy.deepcopy(model))
    x = tensor(4, 3, 5, 5)
    alike(ours(x, residual), model(x, residual), 1e-5)
    assert calls_of_norm(ours, x, residual) == [(True, "relu") if is_one else (False, None)]


def test_sequentials():
    def block(channels, *after):
        return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), *after)

    model = nn.Sequential(
        block(3, nn.ReLU()), nn.Sequential(block(3), nn.SiLU()), block(3), nn.ReLU(), block(4)
    ).double()
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["0.1", "1.0.1", "2.1"]
    assert len(ours) == 5
    assert type(ours[2][1]) is bt.BatchNorm2d
    x = tensor(4, 3, 5, 5).double()
    equal_in_training(ours, model, x)
    for each in (ours, model):  # a Sequential that has grown since
        each.append(nn.Tanh())
        each[2].append(nn.Tanh())
    equal_in_training(ours, model, x)
    seen = []
    ours[2].register_forward_hook(lambda *_: seen.append(1))
    ours(x)
    assert seen == [1]


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Conv2dNormActivation(nn.Sequential):
    """As torchvision's."""

    def __init__(self, channels, act):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), act(inplace=True))


def test_blocks_of_timm_and_torchvision():
    model = nn.Sequential(
        Conv2dNormActivation(3, nn.ReLU),
        nn.Conv2d(3, 3, 1),
        BatchNormAct2d(3, nn.ReLU(inplace=True)),
        Conv2dNormActivation(3, nn.SiLU),
        nn.Conv2d(3, 3, 1),
        BatchNormAct2d(3, nn.GELU()),
        Conv2dNormActivation(3, nn.ReLU6),
    ).double()
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["0.1", "2", "3.1"]
    assert outcome(ours)["5"][1].startswith("it calls modules of its own")
    assert outcome(ours)["6.1"][1] == "what follows is the ReLU6 '2', and no relu or silu"
    assert type(ours[5]) is BatchNormAct2d
    assert ours[2].activation == "relu"
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())
    assert outcome(bt.fuse(ours))["2"] == ("left", "it applies its relu itself")


# ---- what stays as it is


def used_elsewhere(net, x):
    y = normalized(net, x)
    return net.relu(y) + y


def sum_used_elsewhere(net, x):
    y = normalized(net, x) + x
    return F.relu(y, inplace=True) + y


def sum_in_place_with_another_name(net, x):
    z = y = net.conv(x)
    y += net.norm(x)
    return net.relu(y) * z


def another_name_of_the_norm(net, x):
    z = y = normalized(net, x)
    y += x
    return net.relu(y) * z


def input_changed_between(net, x):
    z = 2 * net.conv(x)
    y = net.norm(z)
    z.add_(1)
    return net.relu(y + z)


def residual_changed_later(net, x):
    z = 2 * x
    y = net.relu(normalized(net, x) + z)
    return y + z.add_(1)


def statistics_read_between(net, x):
    y = normalized(net, x)
    return net.relu(y + net.conv(x) * net.norm.running_mean.sum())


def weight_changed_between(net, x):
    y = normalized(net, x)
    net.norm.weight.data.clamp_(max=0.5)
    return net.relu(y + x)


def twice(net, x):
    return net.relu(net.norm(net.relu(normalized(net, x))))


LEFT = {
    "its output goes to more than one place": used_elsewhere,
    "its sum with another tensor goes to more than one place": sum_used_elsewhere,
    "it is added in place to a tensor": sum_in_place_with_another_name,
    "its output goes to more": another_name_of_the_norm,
    "the function add_, called in between, may change its input": input_changed_between,
    "the function add_ may change what is added": residual_changed_later,
    "norm.running_mean is read in the same forward": statistics_read_between,
    "norm.weight is read in the same forward": weight_changed_between,
    "more than one call uses it": twice,
    "what follows is the function gelu": lambda net, x: F.gelu(normalized(net, x)),
    "what follows is the Hardswish 'act'": lambda net, x: net.act(normalized(net, x)),
    "what is added is no other": lambda net, x: net.relu(normalized(net, x) + 1),
    "or is weighted": lambda net, x: F.relu(torch.add(normalized(net, x), x, alpha=2)),
    "nothing that could be traced calls it": lambda net, x: net.relu(net.conv(x)),
}


@pytest.mark.parametrize(("why", "after"), LEFT.items(), ids=LEFT)
def test_what_is_left(why, after):
    ours, model = pair(after, act=nn.Hardswish())
    assert [each.what for each in bt.changes(ours)] == ["left"]
    assert why in bt.changes(ours)[0].why
    assert type(ours.norm) is nn.BatchNorm2d
    assert "forward" not in vars(ours)
    if after is not input_changed_between:  # which autograd refuses
        equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


def decides_by_values(net, x):
    return net.relu(normalized(net, x)) if x.sum() > -1e9 else x


def decides_by_a_mode_of_a_child(net, x):
    return net.relu(normalized(net, x)) * (2 if net.conv.training else 1)


def without_gradients(net, x):
    with torch.no_grad():
        y = net.relu(normalized(net, x))
    return y + net.conv(x)


def counts(net, x):
    net.calls += 1
    return net.relu(normalized(net, x)) * net.calls


def keeps(net, x):
    net.kept.append(net.relu(normalized(net, x)))
    return net.kept.pop(0) if len(net.kept) > 1 else net.kept[0]


def remembers(net, x):
    net.calls = net.relu(normalized(net, x))
    return net.calls


def notes(net, x):
    net.kept.append("called")
    return net.relu(normalized(net, x))


def draws_without_use(net, x):
    random.random()
    return net.relu(normalized(net, x))


def moves_a_buffer(net, x):
    net.moved += 1
    return net.relu(normalized(net, x)) * net.moved


def moves_a_tensor(net, x):
    net.steps += 1
    return net.relu(normalized(net, x)) * net.steps


def keeps_deeper(net, x):
    net.seen["outputs"].append(net.relu(normalized(net, x)).sum())
    return sum(net.seen["outputs"])


def lets_a_child_change_a_list(net, x):
    found = [net.relu(normalized(net, x))]
    net.appending(found)
    return found[-1]


def asks_for_what_no_tensor_has(net, x):
    x = x.tensors if hasattr(x, "tensors") else x
    return net.relu(normalized(net, x))


def asks_for_the_type_of_an_attribute(net, x):
    y = net.relu(normalized(net, x))
    return y * 2 if isinstance(y.data, torch.Tensor) else y


def without_autocast(net, x):
    with torch.autocast("cpu", enabled=False):
        return net.relu(normalized(net, x))


def asks_for_autocast(net, x):
    return net.relu(normalized(net, x)) * (2 if torch.is_autocast_enabled("cpu") else 1)


def draws(net, x):
    return net.relu(normalized(net, x)) * torch.rand(1)


def draws_by_python(net, x):
    return net.relu(normalized(net, x)) * (1 if random.random() < 0.5 else 2)


def draws_by_a_generator_of_python(net, x):
    return net.relu(normalized(net, x)) * (1 if net.generators[0].random() < 2 else 2)


def draws_by_a_generator_of_numpy(net, x):
    return net.relu(normalized(net, x)) * (1 if net.generators[1].random() < 2 else 2)


def draws_by_a_generator_of_torch(net, x):
    is_small = torch.rand((), generator=net.generators[2]).item() < 2
    return net.relu(normalized(net, x)) * (1 if is_small else 2)


def draws_by_an_old_generator_of_numpy(net, x):
    return net.relu(normalized(net, x)) * (1 if net.generators[3].rand() < 2 else 2)


def asks_for_types(net, x):
    y = net.relu(normalized(net, x))
    return y * 2 if isinstance(y, torch.Tensor) else y


def asks_for_the_type_of_its_input(net, x):
    return net.relu(normalized(net, x if isinstance(x, torch.Tensor) else torch.cat(x, 1)))


def checkpointed(net, x):
    return checkpoint(lambda x: net.relu(normalized(net, x)), x, use_reentrant=False)


def checkpointed_as_of_old(net, x):
    return checkpoint(lambda x: net.relu(normalized(net, x)), x, use_reentrant=True)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def with_a_function_of_autograd(net, x):
    return net.relu(normalized(net, Doubled.apply(x)))


UNTRACEABLE = [
    *(decides_by_values, decides_by_a_mode_of_a_child, without_gradients, counts, keeps),
    *(remembers, notes, moves_a_buffer, draws, draws_by_python, draws_without_use),
    *(asks_for_types, asks_for_the_type_of_its_input, with_a_function_of_autograd),
    *(checkpointed, checkpointed_as_of_old, without_autocast, asks_for_autocast),
    *(moves_a_tensor, keeps_deeper, lets_a_child_change_a_list),
    *(
        asks_for_what_no_tensor_has,
        asks_for_the_type_of_an_attribute,
        draws_by_a_generator_of_python,
    ),
    *(draws_by_a_generator_of_numpy, draws_by_an_old_generator_of_numpy),
    draws_by_a_generator_of_torch,
]


class Appending(nn.Module):
    def forward(self, values):
        values.append(values[-1] * 2)


def states(generators):
    of_python, of_numpy, of_torch, old = generators
    states = of_python.getstate(), of_numpy.bit_generator.state, of_torch.get_state().tolist()
    return repr((*states, old.get_state()))


@pytest.mark.parametrize("after", UNTRACEABLE, ids=lambda each: each.__name__)
def test_a_forward_that_would_be_recorded_wrongly_stays(after):
    torch.manual_seed(0)
    random.seed(0)
    model = Net(after).double()
    model.calls, model.kept, model.seen, model.steps = 0, [], {"outputs": []}, torch.zeros(())
    model.appending = Appending()
    model.generators = [
        *(random.Random(0), np.random.default_rng(0), torch.Generator()),
        np.random.RandomState(0),
    ]
    model.register_buffer("moved", torch.zeros(()))
    ours = copy.deepcopy(model)
    random_before = random.getstate(), torch.get_rng_state()
    before = copy.deepcopy({name: repr(each) for name, each in vars(ours).items()})
    bt.fuse(ours)
    assert {name: repr(each) for name, each in vars(ours).items()} == before
    assert states(ours.generators) == states(model.generators)
    assert random.getstate() == random_before[0]
    same(torch.get_rng_state(), random_before[1])
    assert [each.what for each in bt.changes(ours)] == ["left"]
    assert "can't be traced" in bt.changes(ours)[0].why
    x = tensor(4, 3, 5, 5).double().requires_grad_()
    random.seed(1), torch.manual_seed(1)
    y = ours(x)
    random.seed(1), torch.manual_seed(1)
    alike(y, model(x), 0)


def hooked(path):
    def change(net):
        net.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)

    return change


def with_a_forward(net):
    net.forward = lambda x: net.relu(normalized(net, x)) + 1


@pytest.mark.parametrize("change", [hooked("norm"), hooked("relu"), with_a_forward])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_hold(change, when):
    torch.manual_seed(0)
    model = Net(FUSED["a sum"]).double()
    ours = copy.deepcopy(model)
    change(model)
    if when == "before":
        change(ours)
    bt.fuse(ours)
    assert fused(ours) == ([] if when == "before" else ["norm"])
    if when == "after":
        change(ours)
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


def test_hooks_on_others_hold():
    ours, model = pair(FUSED["a sum"])
    for each in (ours, model):
        hooked("conv")(each)
        each.register_forward_hook(lambda module, args, output: output + 1)
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


# PyTorch says that of all of torch.jit; programs made by it are still about.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_programs_of_torch_jit_are_called_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.ReLU()), nn.BatchNorm2d(3), nn.ReLU()).double()
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["1"]
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


# Lazy modules say of themselves that they are a new feature.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_are_left():
    class Own(nn.BatchNorm2d):
        pass

    kinds = {
        "it is lazy: call the model once": nn.LazyBatchNorm2d(),
        "Own, which may do something of its own": Own(3),
        "it applies its silu itself": bt.BatchNorm2d(3, activation="silu"),
    }
    for why, layer in kinds.items():
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU())
        assert why in outcome(bt.fuse(model))["1"][1]
        assert model[1] is layer
        model(tensor(2, 3, 4, 4))


# ---- what holds


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(3, 4), nn.BatchNorm1d(4), 2.0

    def forward(self, x, shift=None, *, is_raw=False):
        y = self.norm(self.linear(x))
        if is_raw:
            return y
        y = F.dropout(F.relu(y), 0.5, self.training)
        return self.scale * (y if shift is None else y + shift)

    def other(self, x):
        return self.norm(x)


def test_a_forward_that_reads_its_mode_is_traced_in_both():
    torch.manual_seed(0)
    model = Dropping().double()
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["norm"]
    x = tensor(6, 3).double()
    equal_in_training(ours, model, x)
    for each in (ours, model):
        each.eval()
    alike(ours(x), model(x), 1e-12)
    alike(ours(x, torch.ones(4)), model(x, torch.ones(4)), 1e-12)
    alike(ours(x, None), model(x, shift=None), 1e-12)
    alike(ours(x=x), model(x), 1e-12)
    alike(ours(x, is_raw=True), model(x, is_raw=True), 1e-12)
    alike(ours.other(model.linear(x)), model.other(model.linear(x)), 1e-12)
    ours.scale = model.scale = 3.0
    alike(ours(x), model(x), 1e-12)
    with pytest.raises(TypeError, match=r"Dropping\.forward\(\) missing 1 required positional"):
        ours()


class Joining(Net):
    def forward(self, x, y):
        x = self.conv(torch.cat([*x] if type(x) is list else [x], 1))
        return self.relu(self.norm(x) if y is None else self.norm(x) + y)


def test_arguments_that_are_no_tensors_are_for_the_forward_itself():
    torch.manual_seed(0)
    model = Joining(None)
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["norm"]
    x, y = tensor(4, 3, 5, 5), tensor(4, 3, 5, 5, seed=1)
    for arguments in ((x, y), (x, None), ([x[:, :1], x[:, 1:]], y), ([x], None)):
        alike(ours(*arguments), model(*arguments), 1e-5)
    for arguments, named in (((x, y), {}), ((x,), {"y": y}), ((), {"y": y, "x": x})):
        assert calls_of_norm(ours, *arguments, **named) == [(True, "relu")]
        alike(ours(*arguments, **named), model(*arguments, **named), 1e-5)
    with pytest.raises(TypeError, match="got multiple values for argument 'x'"):
        ours(x, y, x=x)
    assert calls_of_norm(ours, [x], y) == [(False, None)]


class Block(nn.Module):
    """At the top of this file, where pickle finds it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x, change=lambda y: y):
        out = self.norm(self.conv(x))
        out += change(x)
        return self.act(torch.cat([self.act(out).flatten(1), x.flatten(1).to(x.dtype)], 1))


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies(way):
    torch.manual_seed(0)
    model = nn.Sequential(Block()).double()
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["0.norm"]
    copied = way(ours)
    assert type(copied[0]) is Block
    assert vars(copied[0])["forward"].owner is copied[0]
    x = tensor(4, 3, 5, 5).double()
    with torch.no_grad():
        for parameter in ours.parameters():  # of which the copy has others
            parameter.zero_()
    assert calls_of_norm(copied, x, path="0.norm") == [(True, "silu")]
    copied = way(bt.fuse(copy.deepcopy(model)))
    equal_in_training(copied, model, x)


def test_compiled():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(150, 4), nn.BatchNorm1d(4), nn.ReLU())
    ours = bt.fuse(copy.deepcopy(model))
    assert fused(ours) == ["0.norm", "3"]
    x = tensor(4, 3, 5, 5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training), compiled.train(training)
        alike(step(compiled, x), step(model, x), 1e-4)


def test_distributed():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(Block())
        ours = nn.parallel.DistributedDataParallel(bt.fuse(copy.deepcopy(model)))
        assert fused(ours) == ["module.0.norm"]
        x = tensor(4, 3, 5, 5)
        for each in (ours, model):
            each(x).sum().backward()
        gradients = [[one.grad for one in each.parameters()] for each in (ours, model)]
        alike(*gradients, 1e-4)
    finally:
        dist.destroy_process_group()


def test_traced_exported_and_in_functional_calls():
    torch.manual_seed(0)
    model = nn.Sequential(Block()).eval()
    ours = bt.fuse(copy.deepcopy(model))
    x = tensor(2, 3, 5, 5)
    alike(torch.fx.symbolic_trace(ours)(x), model(x), 1e-5)
    alike(torch.export.export(ours, (x,)).module()(x), model(x), 1e-5)
    doubled = {name: 2 * each for name, each in model.named_parameters()}
    got, wanted = (torch.func.functional_call(each, doubled, x) for each in (ours, model))
    alike(got, wanted, 1e-4)


def test_reverting_converting_and_fusing_again():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
    before = repr(model)
    model[0].forward_before = None
    ours = bt.fuse(copy.deepcopy(model))
    changes = bt.changes(ours)
    assert bt.changes(bt.fuse(ours)) == changes
    bt.convert(ours, sync=True)
    assert type(ours[0].norm) is bt.SyncBatchNorm
    alike(ours[0](tensor(4, 3, 5, 5)), model[0](tensor(4, 3, 5, 5)), 1e-5)
    bt.revert(ours)
    assert repr(ours) == before
    assert vars(ours[0]).keys() == vars(model[0]).keys()


def test_identities_are_seen_through_while_they_are_some():
    ours, model = pair(with_identities, path=nn.Identity())
    assert fused(ours) == ["norm"]
    x = tensor(4, 3, 5, 5).double()
    assert calls_of_norm(ours, x) == [(True, "relu")]
    model(x)
    equal_in_training(ours, model, x)
    for each in (ours, model):
        each.path = nn.Tanh()
    equal_in_training(ours, model, x)
    for each in (ours, model):
        each.path = nn.Identity()
        hooked("path")(each)
    equal_in_training(ours, model, x)


def test_an_identity_that_a_child_calls_may_go():
    def after(net, x):
        return net.relu(normalized(net, net.inner(x)))

    inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Identity())
    ours, model = pair(after, inner=inner)
    assert fused(ours) == ["norm", "inner.0"]
    for each in (ours, model):
        del each.inner[2]
    x = tensor(4, 3, 5, 5).double()
    assert calls_of_norm(ours, x) == [(False, "relu")]
    model(x)
    equal_in_training(ours, model, x)


def test_children_that_are_replaced_count():
    ours, model = pair(FUSED["a module"])
    for each in (ours, model):
        each.relu = nn.GELU()
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())
    for each in (ours, model):
        each.norm = nn.Identity()
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double())


class Configured(nn.Module):
    """One whose settings are in containers, and are functions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.scales, self.pair, self.names = [1.0, [2.0]], (1.0, 2.0), {"shift": 0.0, "where": {1}}
        self.between, self.dtype = torch.tanh, torch.float64
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1)])
        self.heads = nn.ModuleDict({"one": nn.ModuleList([nn.Identity()])})
        self.shift, self.log = torch.zeros(1), logging.getLogger("batchnorm.test")

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        y = self.between(F.relu(self.norm(self.conv(x))) + self.shift).to(self.dtype).double()
        y = y * (self.scales[0] + self.scales[1][0] + self.pair[1]) + self.names["shift"]
        y = y if 1 in self.names["where"] else -y
        return sum(head(y) for heads in self.heads.values() for head in heads)


SETTINGS = {
    "none": lambda model: None,
    "a list": lambda model: operator.setitem(model.scales, 0, 3.0),
    "a list within": lambda model: operator.setitem(model.scales[1], 0, 3.0),
    "a tuple": lambda model: setattr(model, "pair", (1.0, 3.0)),
    "a dict": lambda model: operator.setitem(model.names, "shift", 3.0),
    "a set": lambda model: model.names["where"].clear(),
    "a function": lambda model: setattr(model, "between", torch.sin),
    "a dtype": lambda model: setattr(model, "dtype", torch.float16),
    "a tensor": lambda model: setattr(model, "shift", torch.ones(1)),
    "one more block": lambda model: model.blocks.append(nn.Tanh()),
    "another block": lambda model: operator.setitem(model.blocks, 0, nn.Tanh()),
    "a block less": lambda model: operator.delitem(model.blocks, 0),
    "one more head": lambda model: model.heads["one"].append(nn.Tanh()),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_change_count(change):
    torch.manual_seed(0)
    model = Configured().double()
    ours = pickle.loads(pickle.dumps(copy.deepcopy(bt.fuse(copy.deepcopy(model)))))
    for each in (ours, model):
        change(each)
    equal_in_training(ours, model, tensor(4, 3, 5, 5).double(), steps=1)
    is_served = change in [SETTINGS[name] for name in ("none", "a tensor", "another block")]
    assert calls_of_norm(ours, tensor(4, 3, 5, 5).double()) == [
        (False, "relu" if is_served else None)
    ]
    if is_served:
        compiled = torch.compile(ours.eval(), backend="eager", fullgraph=True)
        alike(
            compiled(tensor(2, 3, 5, 5).double()), model.eval()(tensor(2, 3, 5, 5).double()), 1e-9
        )


class Locked(Block):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: each for name, each in super().__getstate__().items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_a_module_does_not_copy_is_no_setting(way):
    torch.manual_seed(0)
    model = Locked().double()
    model.compile(backend="eager")
    copied = way(bt.fuse(model))
    assert calls_of_norm(copied, tensor(4, 3, 5, 5).double()) == [(True, "silu")]


def test_what_a_forward_asks_of_its_parameters_is_asked_in_each_call():
    def after(net, x):
        x = x.to(next(net.parameters()).dtype)
        return net.relu(normalized(net, x))

    ours, model = pair(after)
    assert fused(ours) == ["norm"]
    alike(ours.float()(tensor(4, 3, 5, 5)), model.float()(tensor(4, 3, 5, 5)), 1e-5)


class Named(OrderedDict):
    pass


@pytest.mark.parametrize(
    ("kind", "is_fused"),
    [(dict, True), (OrderedDict, True), (Named, False), (partial(defaultdict, list), False)],
)
def test_dicts_stay_of_their_class(kind, is_fused):
    ours, model = pair(lambda net, x: kind(out=net.relu(normalized(net, x))))
    assert fused(ours) == ["norm"] * is_fused
    x = tensor(4, 3, 5, 5).double()
    assert type(ours(x)) is type(model(x))
    alike(dict(ours(x)), dict(model(x)), 1e-9)


# ---- what can't be


def test_what_is_no_model():
    for function in (bt.fuse, bt.changes):
        with pytest.raises(TypeError, match=r"^model must be an instance of torch\.nn\.modules"):
            function("a model")
    with pytest.raises(ValueError, match=r"^Nothing is known of this Linear: model must be"):
        bt.changes(nn.Linear(2, 2))


def test_a_model_without_normalizations():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(UserWarning, match="^fuse found no batch normalization in this Sequential"):
        assert bt.fuse(model) is model
    assert bt.changes(model) == []


def test_a_model_is_never_half_fused(monkeypatch):
    """Where a second block fails in a way that nobody has foreseen."""
    model = nn.Sequential(Block(), Block())
    before = repr(model), [dict(vars(each)) for each in model.modules()]
    monkeypatch.setattr("batchnorm.torch.fusion.Program", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bt.fuse(model)
    assert (repr(model), [dict(vars(each)) for each in model.modules()]) == before
