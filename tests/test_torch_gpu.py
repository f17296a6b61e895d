"""The kernels on a GPU, where there is one. test_doors.py tests the door to it, with the others.

What can be known without a GPU is tested in gpu_code/: values, by Triton's interpreter, and machine
code. Left to be seen here: that Triton's kernels are launched, where, and in a captured graph, and
what a GPU's own approximations are worth.
"""

import copy
from contextlib import contextmanager
from importlib import import_module
from unittest.mock import patch

import numpy as np
import pytest
import torch
import truth
from cases import GOOD, HARD, Good, Hard
from compare import ROUNDING, close, near, same
from doors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import batchnorm.torch as bt
from batchnorm import native_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here"),
]
DTYPES = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}
LAST = torch.channels_last


@contextmanager
def served():
    """That kernels are launched, and no operations in their place."""
    stages, found = import_module("batchnorm.torch._gpu.stages"), []
    run = stages.run

    def listened(device, launches):
        found.append(run(device, launches))
        return found[-1]

    with patch.object(stages, "run", listened):
        yield
    assert found
    assert all(found)


@contextmanager
def by_operations():
    with patch("batchnorm.torch._gpu.DEVICES", set()):
        yield


def normal(*shape: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def step(layer, x: torch.Tensor, dy: torch.Tensor, **keywords) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x, **keywords)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def truth_of_step(layer, x: torch.Tensor, dy: torch.Tensor, **keywords) -> list[np.ndarray]:
    arrays = [each.detach().double().cpu().numpy() for each in (dy, x, layer.weight, layer.bias)]
    keywords |= {"axis": 1, "eps": 1e-5, "activation": layer.activation}
    gradients = truth.batch_norm_gradients(*arrays, **keywords)
    y = truth.batch_norm(*arrays[1:], **keywords).y
    return [y, *(gradients[name] for name in ("x", "scale", "bias"))]


# ---- who serves

SERVED = [case for case in GOOD if case.name != "feature axes apart"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_kernels_serve(case: Good, dtype: torch.dtype):
    arrays = case.arrays(np.float32)
    keywords = dict(arrays[-1])
    dy, x, scale, bias = (torch.from_numpy(each).cuda() for each in arrays[:-1])
    dy, x = dy.to(dtype), x.to(dtype).requires_grad_()
    for name in ("mask", "residual"):
        if name in keywords:
            keywords[name] = torch.from_numpy(keywords[name]).cuda()
    with served():
        y, statistics = bt.batch_norm(x, scale.requires_grad_(), bias.requires_grad_(), **keywords)
        torch.autograd.grad(y, [x, scale, bias], dy)
        bt.batch_statistics(x.detach(), axis=case.axis)
    if "mask" not in keywords:
        with served():
            bt.normalize(x, *statistics[1:], scale, bias, **keywords)
    assert "kernels in Triton" in native_status()


# ---- values, of several programs a channel and of one

SHAPES = [(64, 64, 56, 56), (16, 48, 28, 28), (8, 512, 7, 7), (3, 33, 45, 67)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_step_of_training(shape, dtype, order, activation):
    layer = bt.BatchNorm2d(shape[1], activation=activation, device="cuda")
    if dtype == torch.float64:
        layer.double()
    x, dy, residual = (
        (2 * normal(*shape, seed=seed) + seed).to(dtype).to(memory_format=order)
        for seed in range(3)
    )
    with served():
        found = step(layer, x, dy, residual=residual)
    wanted = truth_of_step(layer, x, dy, residual=residual.double().cpu().numpy())
    near(found, wanted, 2 * ROUNDING[DTYPES[dtype]])


@pytest.mark.parametrize("hard", HARD, ids=str)
@pytest.mark.parametrize("rows", [300, 100_000])
def test_hard_inputs(hard: Hard, rows: int):
    """In one kernel, and in three."""
    x = hard.x(rows)
    wanted = truth.batch_norm(x, eps=hard.eps)
    with served():
        y, statistics = bt.batch_norm(torch.tensor(x, device="cuda"), eps=hard.eps)
    close(y, wanted.y, rtol=0, atol=hard.tolerance)
    close(statistics.mean, wanted.mean, rtol=1e-6, atol=1e-6 * np.sqrt(wanted.var.max()))


@pytest.mark.parametrize("rows", [300, 100_000])
def test_gradients_of_a_large_mean(rows: int):
    random = np.random.default_rng(0)
    x = (1e4 + 0.01 * random.standard_normal((rows, 4))).astype(np.float32)
    dy = random.standard_normal(x.shape).astype(np.float32)
    on_gpu = torch.tensor(x, device="cuda", requires_grad=True)
    with served():
        y, _ = bt.batch_norm(on_gpu)
        (found,) = torch.autograd.grad(y, on_gpu, torch.tensor(dy, device="cuda"))
    wanted = truth.batch_norm_gradients(dy, x)["x"]
    size = np.abs(wanted).max()
    # What every door promises of such an x; peers are off by up to 2.2.
    close(found.double() / size, wanted / size, rtol=0, atol=1e-2)


def test_silu_by_the_exponential_of_a_gpu():
    z = torch.linspace(-100, 100, 200_001, device="cuda")[:, None].requires_grad_()
    mean, var = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")
    with served():
        y = bt.normalize(z, mean, var, eps=1e-30, activation="silu")
        (slope,) = torch.autograd.grad(y.sum(), z)
    wide = z.detach().double().cpu().numpy()
    sigmoid = 1 / (1 + np.exp(-wide))
    close(y, wide * sigmoid, rtol=2e-6, atol=1e-30)
    close(slope, sigmoid + wide * sigmoid * (1 - sigmoid), rtol=0, atol=2e-6)


def test_the_reciprocal_root_of_a_gpu():
    """Of one kernel, which takes it in float32."""
    random = np.random.default_rng(0)
    sizes = 10.0 ** np.linspace(-14, 14, 4096)
    x = (random.standard_normal((64, 4096)) * sizes).astype(np.float32)
    with served():
        y, _ = bt.batch_norm(torch.tensor(x, device="cuda"), eps=1e-30)
    near(y, truth.batch_norm(x, eps=1e-30).y, 2e-6)


def test_twice_the_same():
    layer = bt.BatchNorm2d(64, activation="silu", device="cuda")
    x, dy = (normal(64, 64, 56, 56, seed=seed) for seed in range(2))
    same(step(layer, x, dy), step(layer, x, dy))


@pytest.mark.parametrize("name", ["slices", "transposed", "expanded gradient", "negated"])
def test_what_is_not_contiguous(name: str):
    x, dy = normal(40, 16, 30), normal(40, 16, 30, seed=1)
    if name == "slices":
        x = normal(40, 16, 60)[..., ::2]
    elif name == "transposed":
        x, dy = normal(16, 40, 30).transpose(0, 1), normal(30, 16, 40).transpose(0, 2)
    elif name == "expanded gradient":
        dy = normal(1, 16, 1).expand(40, 16, 30)
    else:
        x, dy = torch._neg_view(x), torch._neg_view(dy)
    layer = bt.BatchNorm1d(16, device="cuda")
    with served():
        found = step(layer, x, dy)
    near(found, truth_of_step(layer, x.resolve_neg(), dy.resolve_neg()), 1e-5)


# ---- where, and in which stream


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="there is one GPU here")
def test_a_device_that_is_not_the_current_one():
    layer = bt.BatchNorm2d(8, device="cuda:1")
    x, dy = (normal(4, 8, 5, 5, seed=seed, device="cuda:1") for seed in range(2))
    with torch.cuda.device(0), served():
        found = step(layer, x, dy)
        assert torch.cuda.current_device() == 0
    assert {str(each.device) for each in found} == {"cuda:1"}
    near(found, truth_of_step(layer, x, dy), 1e-5)


def test_another_stream():
    layer = bt.BatchNorm2d(64, device="cuda")
    x, dy = (normal(64, 64, 56, 56, seed=seed) for seed in range(2))
    wanted = step(copy.deepcopy(layer), x, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    same(found, wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"skip_nonfinite": True}, {"activation": "silu"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 16, 5, 5), (64, 16, 56, 56)], ids=str)
def test_a_captured_graph(options: dict, shape: tuple[int, ...]):
    captured, eager = (bt.BatchNorm2d(shape[1], device="cuda", **options) for _ in range(2))
    x, dy = normal(*shape), normal(*shape, seed=1)

    def capture_step():
        x.grad = None
        return step(captured, x, dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        capture_step()  # which loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    step(eager, x, dy)
    graph = torch.cuda.CUDAGraph()
    with served(), torch.cuda.graph(graph):
        found = capture_step()
    for number in range(4):
        batch = normal(*shape, seed=number + 2) + number
        if number == 2 and "skip_nonfinite" in options:
            batch[0, 0, 0, 0] = torch.nan
        x.copy_(batch)
        graph.replay()
        wanted = step(eager, batch, dy)
        if batch.isfinite().all():
            same(found, wanted)
        same(dict(captured.named_buffers()), dict(eager.named_buffers()))
    assert captured.num_batches_tracked == 5 - ("skip_nonfinite" in options)


# ---- more elements than 32 bits count


@pytest.mark.parametrize("shape", [(2**31 // 64 + 4096, 64), (2**31 // 2**18 + 8, 64, 4096)])
def test_beyond_32_bits(shape: tuple[int, ...]):
    needed = 5 * 2 * 2**31  # x, y, dy and dx of float16, and some more
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"less than {needed / 2**30:.0f} GiB of the GPU's memory are free")
    rows, places = slice(-4, None), slice(-20, None)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_(generator=generator)
    dy = torch.zeros_like(x)
    dy[rows] = 1
    with served():
        y, statistics = bt.batch_norm(x.requires_grad_(), axis=1)
        (dx,) = torch.autograd.grad(y, x, dy)
    # Of numbers like these; the ends are compared with what the statistics make of them.
    along = [1, 64, 1][: len(shape)]
    mean, rstd = statistics.mean.view(along), (statistics.var + 1e-5).rsqrt().view(along)
    # Drawn: 33 million values a feature are within 1e-3 of what they are drawn from.
    close(statistics.mean, np.zeros(64), rtol=0, atol=1e-2)
    close(statistics.var, np.ones(64), rtol=0, atol=1e-2)
    for part in (slice(4), rows):
        x_hat = (x.detach()[part].double() - mean) * rstd
        near(y[part][..., places], x_hat[..., places], ROUNDING[FLOAT16])
    near(dx[rows][..., places], rstd.expand(x_hat.shape)[..., places], 1e-2)
    near(dx[:4], np.zeros(x_hat.shape), 1e-2)
