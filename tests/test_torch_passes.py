"""How often the operations of torch/_eager.py go through memory on a GPU that no kernels serve.

A pass is a read or a write of a tensor as large as the input, in units of the input's bytes: a
float32 tensor beside a bfloat16 input counts twice, one of bools beside a float32 input a quarter.
Operations are taken to cast what they read and write, except a sum to float64 of another dtype,
which makes a copy first. Tensors of the device "meta" stand for those of a GPU.
"""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm.torch as bt

SHAPE = (4, 8, 6, 6)
NO_PASS = (torch.ops.aten.empty_like, torch.ops.aten.detach)  # beside views
# Forward, backward: of an input of float32, and of one of half precision.
MOST = {
    None: ((6, 14), (9, 19)),
    "relu": ((8, 19.5), (11, 28)),
    "residual, relu": ((11, 22.5), (16, 33)),
}


class Passes(TorchDispatchMode):
    """The bytes of large tensors that are read and written while it is on."""

    def __init__(self, x):
        super().__init__()
        self.x, self.bytes = x, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operation = function.overloadpacket
        if function.is_view or operation in NO_PASS:
            return result
        read = [*args, *(value for name, value in kwargs.items() if name != "out")]
        written = result if isinstance(result, tuple) else (result,)
        for each in (*read, *written):
            if isinstance(each, torch.Tensor) and each.numel() == self.x.numel():
                self.bytes += each.nbytes
        if operation is torch.ops.aten.sum and result.dtype == torch.float64 != args[0].dtype:
            self.bytes += 2 * args[0].numel() * result.itemsize
        return result

    @property
    def number(self):
        return self.bytes / self.x.nbytes


@pytest.fixture
def unseen():
    """What is done for a tensor that nothing looks at, though a dispatch mode does."""
    with (
        patch("batchnorm.torch._arguments.is_watched", lambda x: False),
        patch("batchnorm.torch._compat.is_watched", lambda x: False),
    ):
        yield


@pytest.mark.parametrize("what", MOST)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes(unseen, dtype, memory_format, what):
    def some():
        return torch.empty(SHAPE, dtype=dtype, device="meta").to(memory_format=memory_format)

    x = some().requires_grad_()
    residual = some().requires_grad_() if what == "residual, relu" else None
    layer = bt.BatchNorm2d(SHAPE[1], activation=None if what is None else "relu", device="meta")
    leaves = [each for each in (x, residual, *layer.parameters()) if each is not None]
    with Passes(x) as forward:
        y = layer(x, residual)
    dy = some()
    with Passes(x) as backward:
        gradients = torch.autograd.grad(y, leaves, dy)
    assert y.is_contiguous(memory_format=memory_format)
    assert gradients[0].is_contiguous(memory_format=memory_format)
    most_forward, most_backward = MOST[what][x.dtype != torch.float32]
    assert forward.number <= most_forward
    assert backward.number <= most_backward
