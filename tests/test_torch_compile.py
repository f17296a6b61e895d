"""The PyTorch layers as programs: torch.compile, torch.export, ONNX."""

import copy
import io
from functools import partial

import compare
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import truth
from cases import HARD, LARGE_MEAN
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bt


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3


close = partial(compare.alike, tolerance=1e-5)


def trained_a_little(layer):
    with torch.no_grad():
        for i, each in enumerate((layer.weight, layer.bias, layer.running_mean, layer.running_var)):
            each.copy_(torch.rand(each.shape, generator=torch.Generator().manual_seed(i)) + 0.5)
    return layer


# ---- torch.compile


@pytest.mark.parametrize(
    ("keywords", "call"),
    [
        ({}, ()),
        ({"activation": "relu", "skip_nonfinite": True}, ("mask",)),
        ({"activation": "silu", "momentum": None}, ("residual",)),
    ],
    ids=str,
)
def test_compiled_training_and_evaluation(keywords, call):
    counter = CompileCounterWithBackend("aot_eager")
    eager = bt.BatchNorm2d(4, **keywords)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step, n in enumerate((5, 6, 7, 9, 8)):
        training = step < 4
        values = []
        for module, function in ((layer, compiled), (eager, eager)):
            module.train(training).zero_grad()
            x = tensor(n, 4, 3, 5, seed=step).requires_grad_()
            others = {
                "mask": (tensor(n, 1, 3, 5) > 2).float(),
                "residual": tensor(n, 4, 3, 5, seed=9),
            }
            y = function(x, **{name: others[name] for name in call})
            y.pow(3).mean().backward()
            values.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for got, wanted in zip(*values, strict=True):
            close(got, wanted, tolerance=2e-5)
    assert layer.num_batches_tracked == 4
    # One batch size, any batch size, evaluation; with momentum=None also before and after a batch.
    assert counter.frame_count <= (4 if keywords.get("momentum", 0.1) is None else 3)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 3), bt.BatchNorm1d(3, activation="relu"))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once_where_it_is_compiled(use_reentrant):
    model = Checkpointed(use_reentrant)
    plain = copy.deepcopy(model.block)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x = tensor(6, 4, seed=step).requires_grad_()
        results = []
        for module, called in ((model, compiled), (plain, plain)):
            module.zero_grad()
            (gradient,) = torch.autograd.grad(called(x).square().sum(), x)
            results.append([gradient, *module.buffers()])
        for got, wanted in zip(*results, strict=True):
            close(got, wanted, tolerance=2e-5)
    assert model.block[1].num_batches_tracked == 3


# Inductor itself uses it.
inductor = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")


@inductor
def test_training_by_inductor_at_a_large_mean():
    layer = bt.BatchNorm1d(4, momentum=0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x = LARGE_MEAN.x(1000, 4)
    wanted = truth.batch_norm(x)
    dy = np.float32(np.random.default_rng(1).standard_normal(x.shape))
    variable = torch.tensor(x, requires_grad=True)
    for direction in (dy, dy + 1, dy + np.float32(wanted.y)):
        y = compiled(variable)
        np.testing.assert_allclose(y.detach(), wanted.y, rtol=0, atol=5e-3)
        (got,) = torch.autograd.grad(y, variable, torch.from_numpy(direction))
        gradient = truth.batch_norm_gradients(direction, x)["x"]
        assert np.linalg.norm(got.numpy() - gradient) <= 1e-2 * np.linalg.norm(gradient)
    np.testing.assert_allclose(layer.running_mean, wanted.mean * 7 / 8, rtol=1e-6)
    unbiased = wanted.var * 1000 / 999
    np.testing.assert_allclose(layer.running_var, (1 + 7 * unbiased) / 8, rtol=1e-5)
    assert layer.num_batches_tracked == 3


@inductor
def test_inductor_is_as_accurate():
    compiled = torch.compile(lambda x, eps: bt.batch_norm(x, axis=1, eps=eps)[0], fullgraph=True)
    for hard in HARD:
        x = hard.x(250_000)
        y = compiled(torch.tensor(x), hard.eps)
        wanted = truth.batch_norm(x, eps=hard.eps).y
        compare.close(y, wanted, rtol=0, atol=hard.tolerance, what=str(hard))


def test_compiled_functions():
    def loss(x, scale, mask):
        y, statistics = bt.batch_norm(x, scale, axis=1, mask=mask, activation="silu")
        pooled = statistics.merge(bt.batch_statistics(x * 2, axis=1))
        mean, var = bt.update_running(scale, scale, pooled, rate=0.1, correction=1)
        z = bt.normalize(x, mean, var, scale, axis=1, residual=y)
        functional = bt.functional.batch_norm(x, None, None, scale, training=True)
        return (z * functional).sum()

    arguments = [tensor(6, 3).double().requires_grad_(), tensor(3).double().requires_grad_()]
    arguments.append(tensor(6, 1) > 2)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss):
        value = function(*arguments)
        results.append((value, *torch.autograd.grad(value, arguments[:2])))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted, tolerance=1e-10)


def test_compiled_transformations():
    layer = bt.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)

    def gradients(x):
        return torch.vmap(torch.func.grad(lambda x: layer(x).pow(3).sum()))(x)

    x = tensor(2, 5, 3).double()
    close(
        torch.compile(gradients, backend="eager", fullgraph=True)(x), gradients(x), tolerance=1e-10
    )


def test_compiled_in_two_dtypes_and_frozen():
    layer = trained_a_little(bt.BatchNorm1d(3)).freeze(update_running=True)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = tensor(7, 3).bfloat16()
    y, wanted = compiled(x), eager(x)
    assert y.dtype == torch.bfloat16
    close(y, wanted, tolerance=0.02)
    for got, wanted in zip(layer.buffers(), eager.buffers(), strict=True):
        close(got, wanted, tolerance=1e-3)


@inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("keywords", [{}, {"momentum": None, "activation": "silu"}], ids=str)
def test_compiled_gradients_are_of_the_statistics_before_they_moved(backend, keywords):
    layer = trained_a_little(bt.BatchNorm1d(3, **keywords)).freeze(update_running=True)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for step in range(2):
        x = tensor(7, 3, seed=step).requires_grad_()
        outputs = [each(x) for each in (compiled, eager)]
        got, wanted = ([y, *torch.autograd.grad(y.pow(3).sum(), x)] for y in outputs)
        close(got, wanted, tolerance=2e-5)
        close(list(layer.buffers()), list(eager.buffers()))


def test_compiled_refuses_as_eager_does():
    layer = bt.BatchNorm1d(3)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(ValueError, match="num_features=3 channels, but it has 4"):
        compiled(tensor(5, 4))
    assert layer.num_batches_tracked == 0


def with_numbers(x, momentum, eps):
    mean, var = torch.zeros(3), torch.ones(3)
    z = bt.functional.batch_norm(x, mean, var, training=True, momentum=momentum, eps=eps)
    y, statistics = bt.batch_norm(x, axis=1, eps=eps, activation="silu")
    moved = bt.update_running(mean, var, statistics, rate=momentum)
    return y + z + bt.normalize(x, *moved, axis=1, eps=eps), mean, var


def test_programs_take_numbers_as_tensors():
    x, arguments = tensor(6, 3), (torch.tensor(0.25), torch.tensor(0.5))
    wanted = with_numbers(x, 0.25, 0.5)
    assert torch.allclose(wanted[1], 0.25 * x.mean(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_numbers, backend=counter, fullgraph=True)
    for program in (
        with_numbers,
        compiled,
        make_fx(with_numbers, tracing_mode="symbolic")(x, torch.tensor(0.1), torch.tensor(0.1)),
    ):
        close(list(program(x, *arguments)), list(wanted), tolerance=1e-5)
    other = with_numbers(x, 0.75, 2.0)
    close(compiled(x, torch.tensor(0.75), torch.tensor(2.0)), other, tolerance=1e-5)
    assert counter.frame_count == 1

    mapped = torch.vmap(lambda eps: bt.batch_norm(x, eps=eps)[0])(torch.tensor([0.5, 2.0]))
    close(mapped, torch.stack([bt.batch_norm(x, eps=eps)[0] for eps in (0.5, 2.0)]))

    def loss(eps):
        return with_numbers(x, 0.25, eps)[0].pow(3).sum()

    step = 1e-3
    wanted = (loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    close(torch.func.grad(loss)(arguments[1]), wanted, tolerance=1e-2)
    eps = arguments[1].clone().requires_grad_()
    close(torch.autograd.grad(loss(eps), eps)[0], wanted, tolerance=1e-2)


@pytest.mark.parametrize("keywords", [{}, {"skip_nonfinite": True}], ids=str)
def test_programs_of_layers_with_numbers_as_tensors(keywords):
    layer = bt.BatchNorm1d(3, torch.tensor(0.5), torch.tensor(0.25), **keywords)
    wanted = bt.BatchNorm1d(3, 0.5, 0.25, **keywords)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(layer), backend=counter, fullgraph=True)
    program = torch.export.export(copy.deepcopy(layer), (tensor(6, 3),)).module()
    x = tensor(6, 3, seed=1)
    y = wanted(x)
    for each in (layer, compiled, program):
        close(each(x), y)
        close(list(each.buffers()), list(wanted.buffers()))
    layer.eval(), wanted.eval()
    for each in (layer, torch.export.export(layer, (x,)).module()):
        close(each(x), wanted(x))
    assert counter.frame_count == 1


# ---- torch.export and tracing


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_evaluation(strict):
    layer = trained_a_little(bt.BatchNorm2d(4, activation="relu")).eval()
    x = tensor(3, 4, 5, 6)
    batch = torch.export.Dim("batch", min=1, max=99)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert operators(program) == ["aten.batch_norm.default", "aten.relu.default"]
    x = tensor(7, 4, 5, 6, seed=1)
    close(program.module()(x), layer(x))


def test_export_with_residual_and_silu_of_a_frozen_layer():
    layer = trained_a_little(bt.BatchNorm1d(4, activation="silu")).freeze()
    x, residual = tensor(3, 4), tensor(4)
    program = torch.export.export(layer, (x,), {"residual": residual})
    assert operators(program)[0] == "aten.batch_norm.default"
    close(program.module()(x, residual=residual), layer(x, residual=residual))


# torch.jit.trace, one of the ways here, says so of itself; its programs are still in use.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_programs_of_narrow_layers(dtype):
    layer = trained_a_little(bt.BatchNorm1d(4, activation="relu")).to(dtype).eval()
    x = tensor(7, 4).to(dtype)
    for program in (
        torch.export.export(layer, (x,)).module(),
        torch.jit.trace(layer, (x,)),
        torch.compile(layer, backend="aot_eager"),
        lambda x: torch.func.functional_call(layer, dict(layer.named_buffers()), x),
    ):
        close(program(x), layer(x), tolerance=0.02)


@pytest.mark.parametrize("freezing", [None, {"update_running": True}])
def test_export_of_training_is_training(freezing):
    layer = trained_a_little(bt.BatchNorm1d(3))
    if freezing:
        layer.freeze(**freezing)
    program = torch.export.export(copy.deepcopy(layer), (tensor(5, 3),)).module()
    x = tensor(5, 3, seed=2)
    close(program(x), layer(x))
    for name, wanted in layer.named_buffers():
        close(program.get_buffer(name), wanted)


def test_tracing():
    layer = trained_a_little(bt.BatchNorm1d(3, activation="relu")).eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        traced = torch.jit.trace(layer, (tensor(5, 3),))
    close(traced(tensor(7, 3, seed=1)), layer(tensor(7, 3, seed=1)))


# ---- sizes that a program does not know


class Masked(nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.norm = bt.BatchNorm2d(3, **keywords)

    def forward(self, x):
        return self.norm(x, mask=x[:, :1] > 2, residual=x)


def by_functions(x):
    statistics = bt.batch_statistics(x, axis=1)
    moved = bt.update_running(statistics.mean, statistics.var, statistics, rate=0.1, correction=1)
    y = bt.functional.batch_norm(x, None, None, training=True)
    return bt.normalize(x, *moved, axis=1, activation="silu") + y


UNSIZED_FUNCTIONS = {
    "batch_norm": lambda x: bt.batch_norm(x, axis=1)[0],
    "mask": lambda x: bt.batch_norm(x, axis=1, mask=x[:, :1] > 2)[0],
    "residual": lambda x: bt.batch_norm(x, axis=1, residual=x[:1], activation="silu")[0],
    "two axes": lambda x: bt.batch_norm(x, axis=(1, 2))[0][:, :, 0],
    "statistics": lambda x: bt.batch_statistics(x, axis=1).merge(bt.batch_norm(x, axis=1)[1]).var,
    "functions": by_functions,
}
IMAGES = ((4, 3, 5, 5), (1, 3, 5, 5), (700, 3, 5, 5), (7, 3, 2, 9), (150, 3, 16, 16))


def first_derivative(function, how):
    def loss(x):
        return function(x).pow(3).mean()

    def by_autograd(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    return torch.func.grad(loss) if how == "func" else by_autograd


@pytest.mark.parametrize("derivative", [None, "func", "autograd"])
@pytest.mark.parametrize("function", UNSIZED_FUNCTIONS.values(), ids=UNSIZED_FUNCTIONS)
def test_graph_of_functions_for_any_size(function, derivative):
    if derivative:
        function = first_derivative(function, derivative)
    graph = make_fx(function, tracing_mode="symbolic")(tensor(*IMAGES[0]))
    for shape in IMAGES:
        x = tensor(*shape, seed=1)
        close(graph(x), function(x), tolerance=2e-5)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_graph_of_functions_for_one_size(mode):
    function, x = first_derivative(by_functions, "autograd"), tensor(*IMAGES[0])
    close(make_fx(function, tracing_mode=mode)(x)(x), function(x), tolerance=2e-5)


@pytest.mark.parametrize("function", UNSIZED_FUNCTIONS.values(), ids=UNSIZED_FUNCTIONS)
def test_export_of_functions_for_any_size(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Model(), (tensor(*IMAGES[0]),), dynamic_shapes=(sizes,)).module()
    for shape in IMAGES[:1] + IMAGES[2:]:
        x = tensor(*shape, seed=1)
        close(program(x), function(x), tolerance=2e-5)


def unsized_layers():
    return {
        "tracked": bt.BatchNorm2d(3),
        "untracked": bt.BatchNorm2d(3, track_running_stats=False).eval(),
        "by batch": bt.BatchNorm2d(3).freeze(normalize_by="batch").eval(),
        "moved": bt.BatchNorm2d(3).freeze(update_running=True),
        "skips": bt.BatchNorm2d(3, skip_nonfinite=True, activation="silu"),
        "momentum=None": bt.BatchNorm2d(3, momentum=None),
        "synced": bt.SyncBatchNorm(3),
        "masked": Masked(activation="relu"),
    }


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", unsized_layers())
def test_export_for_any_size(name, strict):
    layer = unsized_layers()[name]
    sizes = {axis: torch.export.Dim(f"size{axis}", min=1) for axis in (0, 2, 3)}
    program = torch.export.export(
        copy.deepcopy(layer), (tensor(*IMAGES[0]),), dynamic_shapes=(sizes,), strict=strict
    ).module()
    if name == "momentum=None":  # whose counts no program keeps: batches weigh as in torch.nn
        layer = nn.BatchNorm2d(3, momentum=None)
    for step, shape in enumerate(IMAGES):
        x = tensor(*shape, seed=step)
        close(program(x), layer(x), tolerance=2e-5)
    for key, moved in program.named_buffers():
        close(moved, layer.get_buffer(key), tolerance=2e-5)


@pytest.mark.parametrize("name", unsized_layers())
# torch.jit.trace says so of itself, as above. Its tracer warns of every look at a size from Python,
# as checks of arguments take, and torch.nn's layers, too: that nothing of them is left in the
# program is what is tested.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_of_training(name):
    layer = unsized_layers()[name]
    if name == "momentum=None":
        layer(tensor(9, 3, 5, 5))
    traced = torch.jit.trace(copy.deepcopy(layer), (tensor(*IMAGES[0]),), check_trace=False)
    for key, value in traced.named_buffers():  # which tracing, a step of training, has moved
        value.copy_(layer.get_buffer(key))
    if name == "momentum=None":
        layer = bt.revert(layer)
    for step, shape in enumerate(IMAGES):
        x = tensor(*shape, seed=step)
        close(traced(x), layer(x), tolerance=2e-5)
    for key, moved in traced.named_buffers():
        close(moved, layer.get_buffer(key), tolerance=2e-5)


@pytest.mark.parametrize("name", ["tracked", "masked", "torch.nn"])
def test_one_graph_for_any_batch(name):
    counter = CompileCounterWithBackend("aot_eager")
    layer = {**unsized_layers(), "torch.nn": nn.BatchNorm2d(3)}[name].train()
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    graphs = set()
    for rows in (8, 16, 100, 1000, 10_000, 33_000, 300_000, 1_000_000):
        x = tensor(rows // 2, 3, 2, 1).requires_grad_()
        y = compiled(x)
        y.mean().backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    if name == "tracked":
        wanted = truth.batch_norm(x.detach().numpy(), axis=1, eps=layer.eps).y
        compare.close(y, wanted, rtol=0, atol=1e-5)


# ---- ONNX

# Of the exporters themselves.
ignoring = pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export",
    "ignore:The feature will be removed",
    "ignore:Exporting a model while it is in training mode",
    "ignore:It is recommended that constant folding be turned off",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


class Apart(nn.Module):
    """A norm that no convolution can take up."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.exp())


def exported(model, x, dynamo, **keywords):
    if dynamo:
        return torch.onnx.export(model, (x,), dynamo=True, verbose=False, **keywords).model_proto
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, **keywords)
    return onnx.load_from_string(file.getvalue())


def run(program, x):
    session = onnxruntime.InferenceSession(program.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@ignoring
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_onnx_of_evaluation(dynamo, activation):
    model = Apart(trained_a_little(bt.BatchNorm2d(4, activation=activation))).eval()
    x = tensor(2, 4, 5, 6) * 0.1
    program = exported(model, x, dynamo)
    kinds = [node.op_type for node in program.graph.node]
    assert kinds == ["Exp", "BatchNormalization", *(["Relu"] if activation else [])]
    np.testing.assert_allclose(run(program, x), model(x).detach(), rtol=1e-5, atol=1e-5)


@ignoring
def test_onnx_of_a_layer_alone():
    layer = trained_a_little(bt.BatchNorm2d(4, activation="relu")).eval()
    x = tensor(2, 4, 5, 6)
    for arguments in ((x,), (x, x)):  # residual, too
        file = io.BytesIO()
        torch.onnx.export(layer, arguments, file, dynamo=False)
        program = onnx.load_from_string(file.getvalue())
        session = onnxruntime.InferenceSession(program.SerializeToString())
        names = [each.name for each in session.get_inputs()]
        (y,) = session.run(None, dict.fromkeys(names, x.numpy()))
        np.testing.assert_allclose(y, layer(*arguments).detach(), rtol=1e-5, atol=1e-5)


def without_statistics(layer):
    layer.running_mean = layer.running_var = None


NOT_EXPORTED = {
    "training": ({}, True, lambda _: None, r"in training mode; call eval\(\) on the model"),
    "by batch": (
        {},
        False,
        lambda layer: layer.freeze(normalize_by="batch"),
        "normalize_by='batch'",
    ),
    "moved": ({}, False, lambda layer: layer.freeze(update_running=True), "update_running=True"),
    "moved in training": (
        {},
        True,
        lambda layer: layer.freeze(update_running=None),
        r"in training mode; call eval\(\)",
    ),
    "untracked": ({"track_running_stats": False}, False, lambda _: None, "no running statistics"),
    "taken away": ({}, False, without_statistics, "no running statistics"),
}


@ignoring
@pytest.mark.parametrize(
    ("keywords", "training", "change", "message"), NOT_EXPORTED.values(), ids=NOT_EXPORTED
)
def test_the_older_exporter_says_what_it_can_not_take(keywords, training, change, message):
    model = Apart(bt.BatchNorm2d(4, **keywords)).train(training)
    change(model.norm)
    before = copy.deepcopy(list(model.buffers()))
    with pytest.raises(RuntimeError, match=f"stay as they are, but .*{message}.* dynamo=True"):
        exported(model, tensor(2, 4, 5, 6), False, training=torch.onnx.TrainingMode.PRESERVE)
    assert all(map(torch.equal, model.buffers(), before))


@ignoring
@pytest.mark.parametrize("name", ["BatchNorm1d", "SyncBatchNorm", "LazyBatchNorm2d"])
def test_scripting_says_what_to_do(name):
    norm = getattr(bt, name)(*([4] if "Lazy" not in name else []))
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"norm": norm}))
    kinds = [type(each) for each in model.modules()]
    for scripted in (model, norm):
        with pytest.raises(TypeError, match=rf"{name} of batchnorm.torch. Give it a copy .*revert"):
            torch.jit.script(scripted)
    assert [type(each) for each in model.modules()] == kinds
    if name == "BatchNorm1d":
        model = nn.Sequential(nn.Linear(3, 4), norm).eval()
        scripted = torch.jit.script(bt.revert(copy.deepcopy(model)))
        x = tensor(6, 3)
        close(scripted(x), model(x), tolerance=1e-5)


@ignoring
def test_onnx_of_training_is_right_by_the_newer_exporter():
    model = Apart(trained_a_little(bt.BatchNorm2d(4))).train()
    x = tensor(2, 4, 5, 6) * 0.1
    program = exported(model, x, True)
    np.testing.assert_allclose(run(program, x), model(x).detach(), rtol=1e-5, atol=1e-5)


@ignoring
@pytest.mark.parametrize("name", ["untracked", "by batch", "masked"])
def test_onnx_of_batch_statistics_for_any_size(name):
    layer = unsized_layers()[name]
    if name == "masked":
        layer.norm.freeze(normalize_by="batch")
    sizes = {axis: torch.export.Dim(f"size{axis}", min=1) for axis in (0, 2, 3)}
    program = exported(layer.eval(), tensor(*IMAGES[0]), True, dynamic_shapes=(sizes,))
    for step, shape in enumerate(IMAGES):
        x = tensor(*shape, seed=step)
        np.testing.assert_allclose(run(program, x), layer(x).detach(), rtol=1e-4, atol=1e-4)
    x = LARGE_MEAN.x(1000, 3).reshape(10, 10, 10, 3).transpose(0, 3, 1, 2)
    if name != "masked":
        wanted = truth.batch_norm(x, axis=1).y
        got = run(program, torch.tensor(x))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=LARGE_MEAN.tolerance)
