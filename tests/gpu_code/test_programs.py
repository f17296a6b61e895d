"""The kernels' programs: which serve whom, in whatever order, and beyond 2³¹ elements."""

import math
import mmap
import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
import truth
from cases import GOOD, Good
from compare import ROUNDING, near, same
from doors import DOORS, FLOAT16
from gpu_code.interpreter import launches, programs

import batchnorm.torch

DOOR = DOORS[0]


SERVED = [case for case in GOOD if case.name != "feature axes apart"]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_kernels_serve(case: Good):
    dy, x, scale, bias, keywords = case.arrays(np.float32)
    with launches() as launched:
        DOOR.batch_norm_gradients(dy, x, scale, bias, **keywords)
    assert {"forward_kernel", "normalize_kernel"} & {*launched}
    assert {"backward_kernel", "input_gradient_kernel"} & {*launched}


@pytest.mark.parametrize("shape", [(1200, 40), (40, 5, 500), (300, 8, 49)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.7

    def step():
        layer = batchnorm.torch.BatchNorm1d(shape[1], activation="relu")
        inputs = [x.requires_grad_(), *layer.parameters()]
        with launches() as launched:
            y = layer(x, mask=mask)
            gradients = torch.autograd.grad(y, inputs, dy)
        assert len(launched) >= 6
        return [y.detach(), *gradients, *layer.buffers()]

    wanted = step()
    for seed in range(2):
        shuffled = random.Random(seed)
        with programs(lambda kernel, n, shuffled=shuffled: shuffled.sample(range(n), n)):
            for one, other in zip(step(), wanted, strict=True):
                same(one, other)


# ---- more elements than 32 bits count, in memory of which only the end is ever touched


def sparse(shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of float16, whose memory is taken as it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).view(shape)


NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 does not know
empty_like = torch.empty_like


def test_a_count_beyond_32_bits():
    x = sparse((2**31 + 3_000_017, 1))
    with (
        programs(lambda kernel, number: range(number if kernel.startswith("merge") else 1)),
        patch("torch.empty", torch.zeros),
    ):
        count, _, _ = batchnorm.torch.batch_statistics(x)
    same(count, torch.tensor([float(len(x))]))


def at_the_end(kernel: str, number: int) -> range:
    """The program that has the end of x: the first of those that write, of others the last."""
    writes = kernel in ("normalize_kernel", "input_gradient_kernel")
    return range(1) if writes else range(number - 1, number)


@pytest.mark.parametrize("shape", [(2**31 // 64 + 4096, 64), (2**31 // 2**18 + 8, 64, 4096)])
def test_beyond_32_bits(shape):
    x, dy = sparse(shape), sparse(shape)
    assert x.numel() > 2**31
    rows, places = slice(-4, None), 1 if len(shape) == 2 else 20  # of the last channel
    random = np.random.default_rng(0)
    for each in (x, dy):
        each[rows] = torch.from_numpy(random.normal(1, 1, each[rows].shape))
    mask = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool)
    mask[-3:, ..., -places:] = True
    x.requires_grad_()
    scale, bias = (torch.ones(64, requires_grad=True) for _ in range(2))
    with (
        programs(at_the_end),
        launches() as launched,
        # Nothing is in the sums of programs that do not run.
        patch("torch.empty", torch.zeros),
        patch("torch.Tensor.new_empty", torch.Tensor.new_zeros),
        patch("torch.empty_like", lambda each: sparse(shape) if each is x else empty_like(each)),
    ):
        y, _ = batchnorm.torch.batch_norm(x, scale, bias, axis=1, mask=mask, activation="relu")
        gradients = torch.autograd.grad(y, [x, scale, bias], dy)
    assert len(launched) == 6
    given = [each.detach()[rows].numpy() for each in (dy, x)]
    keywords = {"axis": 1, "mask": mask[rows].numpy(), "activation": "relu"}
    parameters = scale.detach().numpy(), bias.detach().numpy()
    wanted = truth.batch_norm(given[1], *parameters, **keywords).y
    near(
        y.detach()[rows].flatten(1)[:, -places:],
        wanted.reshape(4, -1)[:, -places:],
        ROUNDING[FLOAT16],
    )
    wanted = truth.batch_norm_gradients(*given, *parameters, **keywords)
    dx = gradients[0][rows].flatten(1)
    near(dx[:, -places:], wanted["x"].reshape(4, -1)[:, -places:], ROUNDING[FLOAT16])
    near(gradients[1][-1:], wanted["scale"][-1:], ROUNDING[FLOAT16])
    near(gradients[2][-1:], wanted["bias"][-1:], ROUNDING[FLOAT16])


@pytest.mark.parametrize("channels", [slice(0, 4), slice(1, 8, 2)])
def test_a_part_of_an_image_keeps_its_memory_format(channels: slice):
    x = torch.randn(3, 8, 5, 6).to(memory_format=torch.channels_last)[:, channels]
    y = batchnorm.torch.BatchNorm2d(4)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    near(y.detach(), truth.batch_norm(x.numpy(), axis=1).y, 1e-6)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
@pytest.mark.parametrize("size", [1e38, 3e38])
def test_weights_whose_sum_overflows(door, size: float):
    dy, x = np.random.default_rng(0).normal(size=(2, 300, 5)).astype(np.float32)
    weights = np.where(np.arange(300)[:, None] % 3 > 0, np.float32(size), 0)
    x[weights[:, 0] == 0] = 1e4
    for each in (x, np.full_like(x, 3.0)):
        near(door.batch_norm(each, mask=weights)[0], truth.batch_norm(each, mask=weights > 0).y)
        found = door.batch_norm_gradients(dy, each, None, None, mask=weights)["x"]
        near(found, truth.batch_norm_gradients(dy, each, mask=weights > 0)["x"], 1e-3)
