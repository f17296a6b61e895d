"""`fold`: a copy for evaluation, whose convolutions do what the normalizations after them did."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import alike, near
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import batchnorm.torch as bt


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(model):
    """With statistics and parameters that are not those of a new model."""
    generator = torch.Generator().manual_seed(0)
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if each.is_floating_point():
            with torch.no_grad():
                each.copy_(torch.rand(each.shape, generator=generator) + ("var" in name) - 0.3)
    return model.eval()


def outcome(model):
    return {each.path: (each.what, each.why) for each in bt.changes(model)}


def has_norms(model):
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm | FrozenBatchNorm2d
    return any(isinstance(each, kinds) for each in model.modules())


def alike_in_evaluation(folded, model, *inputs):
    with torch.no_grad():
        near(folded(*inputs), copy.deepcopy(model).double().eval()(*doubled(inputs)), 1e-5)


def doubled(inputs):
    return [each.double() for each in inputs]


# ---- each pair of layers


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=2), nn.BatchNorm3d, (2, 4, 4, 4, 4)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), nn.BatchNorm2d, (2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d, (2, 4, 5, 5)),
    **{
        f"padded, {mode}": (
            lambda mode=mode: nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode),
            nn.BatchNorm2d,
            (2, 4, 5, 5),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "padded, same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d, (2, 4, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, bias=False),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d,
        (2, 4, 5, 5),
    ),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (3, 4)),
    "linear, sync": (lambda: nn.Linear(4, 6), nn.SyncBatchNorm, (3, 4)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS.values(), ids=LAYERS)
def test_each_pair(layer, norm, shape, is_ours, affine):
    before = layer()
    channels = getattr(before, "out_channels", None) or before.out_features
    model = nn.Sequential(before, norm(channels, affine=affine, eps=1e-2))
    model = filled(bt.convert(model) if is_ours else model)
    x = tensor(*shape)
    state = copy.deepcopy(model.state_dict())
    folded = bt.fold(model.train(), x.double())
    assert model.training
    alike(dict(model.state_dict()), dict(state), 0)
    assert bt.changes(folded) == [("1", "folded", f"into the {type(before).__name__} '0'")]
    assert not has_norms(folded)
    assert not folded.training
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert type(folded[0]) is type(before)
    alike_in_evaluation(folded, model, x)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: bt.BatchNorm2d(6, activation="relu"),
        lambda: bt.BatchNorm2d(6, activation="silu").freeze(),
        lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Hardswish()),
    ],
)
def test_activations_are_kept(norm):
    model = filled(nn.Sequential(nn.Conv2d(4, 6, 3), norm()))
    x = tensor(2, 4, 5, 5)
    folded = bt.fold(model, x)
    assert not has_norms(folded)
    alike_in_evaluation(folded, model, x)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, channels, drop, act):
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 0.0
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + bias[:, None, None]


FrozenBatchNorm2d.__module__ = "torchvision.ops.misc"


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (lambda: FrozenBatchNorm2d(6), nn.Identity),
        (lambda: BatchNormAct2d(6, nn.Identity(), nn.ReLU()), nn.ReLU),
        (lambda: BatchNormAct2d(6, nn.Identity(), nn.GELU()), nn.GELU),
        (lambda: BatchNormAct2d(6, nn.Hardtanh(), nn.ReLU()), nn.Sequential),
        (lambda: BatchNormAct2d(6, nn.Identity(), nn.Identity()), nn.Identity),
    ],
)
def test_layers_of_timm_and_torchvision(norm, kind, is_ours):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), norm())
    model = filled(bt.convert(model) if is_ours else model)
    x = tensor(2, 4, 5, 5)
    folded = bt.fold(model, x)
    assert type(folded[1]) is kind
    alike_in_evaluation(folded, model, x)


# ---- models


class Block(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), norm(3)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(3, 3, 1), norm(3))

    def forward(self, x, scale=1.0):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return scale * self.relu(y)


class WithResidual(Block):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(y), residual=self.down(x)) + 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(Block(), Block(bt.BatchNorm2d)),
        lambda: bt.fuse(nn.Sequential(Block(), Block(bt.BatchNorm2d))),
        lambda: WithResidual(lambda channels: bt.BatchNorm2d(channels, activation="silu")),
        lambda: WithResidual(bt.BatchNorm2d),
    ],
    ids=["blocks", "fused", "residual and activation", "residual"],
)
def test_models(model):
    model = filled(model())
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert {each.what for each in bt.changes(folded)} == {"folded"}
    assert not has_norms(folded)
    assert [path for path, _ in folded.named_children()] == [p for p, _ in model.named_children()]
    alike_in_evaluation(folded, model, x)
    alike_in_evaluation(pickle.loads(pickle.dumps(folded)), model, x)
    assert not any("forward" in vars(each) for each in folded.modules())
    traced = torch.fx.symbolic_trace(folded)
    alike_in_evaluation(traced, model, x)
    if isinstance(folded, nn.Sequential):
        alike(folded[0](x, scale=2.0), 2 * folded[0](x), 1e-6)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.norm(self.conv(self.body(x)))


def test_sequentials_of_what_can_not_be_traced():
    model = filled(Untraceable())
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["body.1"] == ("folded", "into the Conv2d 'body.0'")
    what, why = outcome(folded)["norm"]
    assert what == "left"
    assert why.startswith("the forward of the model, a Untraceable, can't be traced: TraceError")
    alike_in_evaluation(folded, model, x)


def test_a_pair_in_two_modules():
    body, norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
    model = filled(nn.Sequential(body, norm, nn.ReLU()))
    folded = bt.fold(model)
    assert outcome(folded) == {"1": ("folded", "into the Conv2d '0.1'")}
    alike_in_evaluation(folded, model, tensor(2, 3, 6, 6))


class Head(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.norm = body, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.body(x))


class Around(nn.Module):
    """Which calls the body a second time, and can't be traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.head = Head(self.body)

    def forward(self, x):
        return self.body(x) + self.head(x) if x.sum() < 1e9 else x


def test_a_sequential_that_something_unknown_may_call_too():
    model = filled(Around())
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["head.norm"][0] == "left"
    assert outcome(bt.fold(model.head))["norm"] == ("folded", "into the Conv2d 'body.0'")
    alike_in_evaluation(folded, model, x)


# ---- what must not be folded, or is folded although it looks as if it must not


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.called = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.called(self, x)


def used_elsewhere(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def with_its_weight(net, x):
    return F.conv2d(net.norm(net.conv(x)), net.conv.weight)


LEFT = {
    "a conv before two norms": (
        lambda net, x: net.norm(net.conv(x)) + net.other(net.conv(x + 1)),
        "the output of the Conv2d before it goes elsewhere, too",
    ),
    "a conv with and without": (
        lambda net, x: net.norm(net.conv(x)) + net.conv(x + 1),
        "the output of the Conv2d before it goes elsewhere, too",
    ),
    "an output used elsewhere": (
        used_elsewhere,
        "the output of the Conv2d before it goes elsewhere, too",
    ),
    "a norm after two": (
        lambda net, x: net.norm(net.conv(x)) + net.norm(x),
        "what comes before it is the input of the forward that calls it",
    ),
    "a norm before a conv": (
        lambda net, x: net.conv(net.norm(x)),
        "what comes before it is the input of the forward that calls it",
    ),
    "something between": (
        lambda net, x: net.norm(F.relu(net.conv(x))),
        "what comes before it is the function relu",
    ),
    "an input by name": (
        lambda net, x: net.norm(input=net.conv(x)),
        "it is called with its input by name",
    ),
    "a weight used elsewhere": (with_its_weight, "its parameters, or those of the layer before"),
}


@pytest.mark.parametrize(("forward", "why"), LEFT.values(), ids=LEFT)
def test_what_is_left(forward, why):
    model = filled(Net(forward))
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["norm"][0] == "left"
    assert outcome(folded)["norm"][1].startswith(why)
    alike_in_evaluation(folded, model, x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), bt.BatchNorm2d(3, activation="silu")])
def test_a_layer_that_is_called_by_another_name(norm):
    model = filled(Net(lambda net, x: net.layers[1](net.layers[0](x)), norm=norm))
    model.layers = [model.conv, model.norm]
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["norm"] == ("folded", "into the Conv2d 'conv'")
    assert folded.layers[1] is folded.norm
    alike_in_evaluation(folded, model, x)


class MayHaveResidual(Net):
    def forward(self, x, residual=None):
        return self.norm(self.conv(x), residual)


def test_a_residual_that_may_be_none():
    model = filled(MayHaveResidual(None, norm=bt.BatchNorm2d(3, activation="relu")))
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["norm"][0] == "folded"
    alike_in_evaluation(folded, model, x)
    alike_in_evaluation(folded, model, x, tensor(2, 3, 6, 6, seed=1))


def test_asking_for_a_dtype_or_a_device_reads_nothing():
    def forward(net, x):
        x = x.to(next(net.parameters()).device, net.conv.weight.dtype)
        return net.norm(net.conv(x))

    model = filled(Net(forward))
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["norm"][0] == "folded"
    alike_in_evaluation(folded, model, x)


def test_a_pair_that_is_called_twice():
    model = filled(Net(lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(x + 1))))
    x = tensor(2, 3, 6, 6)
    folded = bt.fold(model, x)
    assert outcome(folded)["norm"][0] == "folded"
    alike_in_evaluation(folded, model, x)


def test_a_convolution_that_two_modules_share():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(
        nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3))
    )
    folded = bt.fold(filled(model), tensor(2, 3, 4, 4))
    assert {each.what for each in bt.changes(folded)} == {"left"}
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.ReLU()))
    folded = bt.fold(filled(shared), tensor(2, 3, 4, 4))
    assert {each.what for each in bt.changes(folded)} == {"left"}


def test_a_weight_that_two_modules_share():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    folded = bt.fold(filled(model), tensor(2, 3, 4, 4))
    assert outcome(folded) == {"1": ("folded", "into the Conv2d '0'")}
    assert folded[0].weight is not folded[2].weight
    alike_in_evaluation(folded, model, tensor(2, 3, 4, 4))


class Own(nn.BatchNorm2d):
    pass


class OwnConv(nn.Conv2d):
    pass


def changed(number, change):
    def make():
        model = nn.Sequential(nn.Conv2d(3, 3, 1), bt.BatchNorm2d(3))
        change(model[number])
        return model

    return make


def hook(module):
    module.register_forward_hook(lambda *_: None)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Doubled())


HOOKED = "it, or the layer before it, has hooks or a forward of its own"
KINDS = {
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "it normalizes by the batch in evaluation, too",
    ),
    "frozen to the batch": (
        changed(1, lambda layer: layer.freeze(normalize_by="batch")),
        "it normalizes by the batch in evaluation, too",
    ),
    "moving": (
        changed(1, lambda layer: layer.freeze(update_running=True)),
        "it moves its running statistics in evaluation, too",
    ),
    "hooked": (changed(1, hook), HOOKED),
    "a hooked convolution": (changed(0, hook), HOOKED),
    "a forward of its own": (changed(1, lambda each: setattr(each, "forward", F.relu)), HOOKED),
    "a subclass": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Own(3)), "convert knows the batch"),
    "after a subclass": (
        lambda: nn.Sequential(OwnConv(3, 3, 1), nn.BatchNorm2d(3)),
        "what comes before it is the OwnConv '0'",
    ),
    "weight norm": (
        changed(0, parametrizations.weight_norm),
        "what comes before it is the ParametrizedConv2d '0'",
    ),
    "parametrized": (changed(1, parametrized), "convert knows the batch normalizations of torch"),
    "linear before images": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm2d(3)),
        "it normalizes another axis than the last",
    ),
    "meta": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to("meta"),
        "the weight before it has no values yet",
    ),
}


@pytest.mark.parametrize(("make", "why"), KINDS.values(), ids=KINDS)
def test_layers_that_are_left(make, why):
    model = make()
    folded = bt.fold(model)
    assert outcome(folded)["1"][0] == "left"
    assert outcome(folded)["1"][1].startswith(why)
    assert type(folded[1]) is type(model[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), bt.BatchNorm2d(4))).to(dtype)
    x = tensor(2, 3, 5, 5).to(dtype)
    folded = bt.fold(model, x)
    assert {each.dtype for each in folded.parameters()} == {dtype}
    with torch.no_grad():
        near(folded(x), copy.deepcopy(model).double()(x.double()), 3 * torch.finfo(dtype).eps)


def test_a_fold_that_would_overflow_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-20)).half()
    model[1].running_var.zero_()
    folded = bt.fold(model)
    assert outcome(folded)["1"] == (
        "left",
        "what it would be folded into is not finite in torch.float16",
    )
    alike(dict(folded[0].state_dict()), dict(model[0].state_dict()), 0)


def test_memory_format_and_freezing_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    folded = bt.fold(filled(model.to(memory_format=torch.channels_last)))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(each.requires_grad for each in folded.parameters())


# ---- examples


def test_a_linear_layer_on_three_axes_is_refused_by_an_example():
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    bt.fold(model, tensor(3, 4))
    with pytest.raises(
        ValueError, match=r"in float64, by .* of the largest output, more than 1e-06"
    ):
        bt.fold(model, tensor(3, 4, 4))


class Twice(nn.Module):
    """Of which tracing sees the half."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x, y, others):
        conv, norm = self.pair
        if x.sum() > 1e9:
            return self.pair(x)
        return {"one": [norm(conv(x)), conv(y) + others["three"]]}


def test_an_example_sees_what_tracing_can_not():
    model = filled(Twice())
    x, y = tensor(2, 3, 4, 4), tensor(2, 3, 4, 4, seed=1)
    assert outcome(bt.fold(model))["pair.1"][0] == "folded"
    with pytest.raises(ValueError, match="A forward may use a layer in a way that can't be seen"):
        bt.fold(model, (x, y, {"three": x}))
    assert has_norms(model)


def test_an_output_without_tensors_can_not_be_compared():
    model = Net(lambda net, x: "nothing")
    with pytest.raises(TypeError, match=r"^fold compares tensors, in tuples, lists"):
        bt.fold(model, tensor(2, 3, 4, 4))


# ---- what can't be


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"^model must be an instance of torch\.nn\.modules"):
        bt.fold("a model")


def test_a_model_without_normalizations():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(UserWarning, match="^fold found no batch normalization in this Sequential"):
        folded = bt.fold(model)
    assert folded is not model
    assert not folded.training
    assert bt.changes(folded) == []


# Lazy modules say of themselves that they are a new feature.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(3, 1), lambda: bt.LazyBatchNorm2d()])
def test_lazy_models_are_to_be_called_once(lazy):
    model = nn.Sequential(lazy(), nn.LazyBatchNorm2d())
    with pytest.raises(TypeError, match=r"^fold needs to know all parameters, but '0' is lazy\."):
        bt.fold(model)
    model(tensor(2, 3, 4, 4))
