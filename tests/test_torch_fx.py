"""torch.fx and what is built on it: a model's layers of ours are recorded as torch.nn's are."""

import copy
import importlib
import pickle

import pytest
import torch
from compare import alike
from torch import fx, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.distributed.pipelining import SplitPoint, pipeline

import batchnorm.torch as bt


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = bt.BatchNorm2d(4, activation="relu", momentum=None)
        self.rest = nn.Sequential(bt.BatchNorm2d(4).freeze(), nn.ReLU(), bt.SyncBatchNorm(4))
        self.register_buffer("constant", tensor(2, 4, 5, 5))

    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x, residual=x, mask=x[:, :1] > 0)
        return self.rest(self.norm(self.constant, residual=x))


class Own(bt.BatchNorm2d):
    def forward(self, input):
        return super().forward(2 * input, mask=input[:, :1] > 0) + 1


WAYS = {
    "symbolic_trace": fx.symbolic_trace,
    "traced twice": lambda model: fx.symbolic_trace(fx.symbolic_trace(model)),
    "pickled": lambda model: pickle.loads(pickle.dumps(fx.symbolic_trace(model))),
    "copied": lambda model: copy.deepcopy(fx.symbolic_trace(model)),
    "transformed": lambda model: fx.Transformer(fx.symbolic_trace(model)).transform(),
    "a subgraph": lambda model: fx.symbolic_trace(nn.Sequential(fx.symbolic_trace(model))),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", [Block, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Own(4))])
def test_what_is_traced_does_as_the_model(kind, way):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    traced = way(copy.deepcopy(model))
    alike(model.state_dict(), before, 0)  # tracing computes nothing
    assert not any(isinstance(each, bt.BatchNorm1d) for each in traced.modules())
    for step, training in enumerate((True, True, False)):
        x = tensor(2, 3, 5, 5, seed=step)
        alike(traced.train(training)(x), model.train(training)(x), 0)
        alike([*traced.buffers()], [*model.buffers()], 0)


def test_a_call_of_ours_is_recorded_as_one_of_torch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    theirs = fx.symbolic_trace(model)
    ours = fx.symbolic_trace(bt.convert(copy.deepcopy(model)))
    assert ours.code == theirs.code
    ours.graph.lint()
    assert [str(node) for node in ours.graph.nodes] == [str(node) for node in theirs.graph.nodes]
    x = tensor(2, 3, 5, 5)
    alike(fx.Interpreter(ours).run(x), theirs(x), 1e-5)


def by_functions(x, mean, var):
    y, statistics = bt.batch_norm(x, axis=1, activation="relu")
    mean, var = bt.update_running(mean, var, statistics, rate=0.1)
    same = bt.Statistics(statistics.count, statistics.mean, statistics.var)
    mean, var = bt.update_running(mean, var, same, rate=0.1)
    shift = bt.batch_statistics(x, axis=1).mean
    z = bt.normalize(y, mean - shift, var, axis=1)
    return bt.functional.batch_norm(z, mean, var) + statistics.mean[:, None, None]


def test_calls_of_functions_are_recorded():
    arguments = tensor(2, 4, 5, 5), torch.zeros(4), torch.ones(4)
    traced = fx.symbolic_trace(by_functions)
    for program in (traced, pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        alike(program(*arguments), by_functions(*arguments), 0)
    targets = [node.target for node in traced.graph.nodes]
    for name in ("batch_norm", "update_running", "batch_statistics", "normalize"):
        assert getattr(bt, name) in targets
    assert bt.functional.batch_norm in targets


# The module makes a torch.jit function when it is imported, whatever it is asked to fuse.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_fusion_leaves_ours_as_they_are():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        bt.BatchNorm2d(4, activation="relu"),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )
    model(tensor(2, 3, 5, 5))
    fused = importlib.import_module("torch.fx.experimental.optimization").fuse(model.eval())
    x = tensor(2, 3, 5, 5, seed=1)
    alike(fused(x), model(x), 1e-5)


# PyTorch's quantization says these of itself, of its observers' settings and of the tensors that it
# makes, whatever the model; users have it in old programs, and it must not be misled by ours.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range")
@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other"
)
def test_quantization_leaves_ours_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bt.BatchNorm2d(4, activation="relu")).eval()
    x = tensor(2, 3, 5, 5)
    mapping = get_default_qconfig_mapping()
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    assert any(type(each) is bt.BatchNorm2d for each in quantized.modules())
    alike(quantized(x), model(x), 0.1)


# PyTorch's own tracing copies what PyTorch calls deprecated.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_pipelining_traces_ours():
    model = nn.Sequential(nn.Linear(3, 4), bt.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2))
    x = tensor(6, 3)
    pipe = pipeline(model.eval(), (x,), split_spec={"1": SplitPoint.BEGINNING})
    alike(pipe(x)[0], model(x), 1e-5)


def hooked(register):
    model = nn.Sequential(bt.BatchNorm2d(3))
    getattr(model[0], register)(lambda *arguments: None)
    return model


# torch.nn's own lazy layers say so, from which ours derive.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bt.BatchNorm2d(3), "the model is this BatchNorm2d itself. Trace torch.nn.Seq"),
        (lambda: nn.Sequential(bt.LazyBatchNorm2d()), "before its first input"),
        (lambda: hooked("register_forward_hook"), "The BatchNorm2d '0' has hooks"),
        (lambda: hooked("register_forward_pre_hook"), "The BatchNorm2d '0' has hooks"),
    ],
)
def test_what_can_not_be_traced_says_why(model, message):
    with pytest.raises(TypeError, match=message):
        fx.symbolic_trace(model())


def test_leaf_layers_keep_their_hooks():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, bt.BatchNorm2d) or super().is_leaf_module(module, name)

    model = hooked("register_forward_hook")
    x = tensor(2, 3, 4, 4)
    alike(fx.GraphModule(model, Tracer().trace(model))(x), model(x), 1e-6)
