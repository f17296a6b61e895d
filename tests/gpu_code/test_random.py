"""Random calls through the kernels, drawn, made and compared as random_calls.py does for a CPU.

Shapes, layouts, dtypes, masks, parameters and layers are those of `make fuzz`; each call goes one
of three ways: a channel in one program, in several kernels, and in these cut into small tiles.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import random_calls
import torch
import truth
from compare import close
from gpu_code.cutting import SMALL, cut
from gpu_code.interpreter import launches
from random_cases import Case, Placed

import batchnorm.torch

WAYS = {"one kernel": nullcontext, "three kernels": cut, "small tiles": lambda: cut(**SMALL)}
FUNCTIONS = [
    *(random_calls.torch_batch_norm, random_calls.torch_normalize, random_calls.torch_statistics),
    *(random_calls.torch_functional, random_calls.torch_layer),
]
MOST = 3000  # elements, beyond which the interpreter takes seconds


@dataclass(frozen=True)
class Drawn:
    function: Callable
    number: int

    def call(self) -> random_calls.Call:
        return self.function(np.random.default_rng([0, self.number]))


def is_fair(case: Case) -> bool:
    """Whether the interpreter is done in time, and no product of two numbers is lost."""
    size = np.abs(np.nan_to_num(case.values["x"].astype(np.longdouble)))
    info = ml_dtypes.finfo(np.float64 if case.dtype == np.float64 else np.float32)
    largest = size.max(initial=0)
    return np.prod(case.shape) <= MOST and (
        largest == 0 or float(info.tiny) * 1e4 < largest < float(info.max) / 1e4
    )


def run(drawn: Drawn) -> list[str]:
    """The kernels that it launches; None where it is not fair."""
    call = drawn.call()
    if not is_fair(call.case):
        return []
    with launches() as launched:
        try:
            call.run()
        except Exception as error:
            error.add_note(f"in {drawn}: {call}")
            raise
    return launched


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_random_calls(function: Callable, way: str):
    start = list(WAYS).index(way)
    with WAYS[way]():
        served = [bool(run(Drawn(function, number))) for number in range(start, 120, 3)]
    assert sum(served) >= 20


def negated(placed: Placed) -> torch.Tensor:
    tensor = tensor_of(placed)
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


tensor_of = Placed.tensor


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
def test_views_that_negate(function: Callable):
    with patch.object(Placed, "tensor", negated):
        served = [bool(run(Drawn(function, number))) for number in range(200, 215)]
    assert sum(served) >= 7


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_gradient_that_cancels(way: str, activation: str | None):
    """Of two rows, of which next to nothing is left: g is not rounded on the way."""
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(2, 64, generator=generator).bfloat16() for _ in range(3))
    given = {"axis": 1, "activation": activation}
    with WAYS[way]():
        leaves = [x.requires_grad_(), residual.requires_grad_()]
        y, _ = batchnorm.torch.batch_norm(x, residual=residual, **given)
        found, _ = torch.autograd.grad(y, leaves, dy)
    arrays = [each.detach().double().numpy() for each in (dy, x, residual)]
    wanted = truth.batch_norm_gradients(*arrays[:2], residual=arrays[2], **given)["x"]
    rstd = 1 / np.sqrt(arrays[1].var(0) + 1e-5)
    close(found.double().numpy() / rstd, wanted / rstd, rtol=2.0**-8, atol=1e-5)
