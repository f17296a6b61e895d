"""What the PyTorch door uses of PyTorch without a promise: one test by the name of each.

A test that fails here says which entry of batchnorm/torch/_compat.py a new version has changed.
"""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.torch import _compat


def test_batch_norm_base():
    for kind in (torch.nn.BatchNorm1d, torch.nn.LazyBatchNorm2d, torch.nn.SyncBatchNorm):
        assert issubclass(kind, _compat.BatchNormBase)
    assert not issubclass(torch.nn.InstanceNorm1d, _compat.BatchNormBase)


def test_check_input_of_sync():
    layer = torch.nn.SyncBatchNorm(3)
    _compat.check_input_of_sync(layer, torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least 2D"):
        _compat.check_input_of_sync(layer, torch.ones(3))


@pytest.mark.parametrize(
    "register",
    [
        torch.nn.Module.register_forward_pre_hook,
        torch.nn.Module.register_forward_hook,
        torch.nn.Module.register_full_backward_pre_hook,
        torch.nn.Module.register_full_backward_hook,
    ],
)
def test_has_hooks(register):
    module = torch.nn.ReLU()
    assert not _compat.has_hooks(module)
    handle = register(module, lambda *_: None)
    assert _compat.has_hooks(module)
    handle.remove()
    assert not _compat.has_hooks(module)


def test_traceable_all_reduce(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        group = torch.distributed.group.WORLD

        @torch.compile(backend="eager", fullgraph=True)
        def total(x):
            return _compat.traceable_all_reduce(x, "sum", group) + 0

        assert torch.equal(total(torch.ones(3)), torch.ones(3))
    finally:
        torch.distributed.destroy_process_group()


def test_is_watched():
    x, seen = torch.ones(3), []

    def look(x):
        seen.append(_compat.is_watched(x))
        return x * 1

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    look(x)
    look(torch.nn.Parameter(x))
    assert seen == [False, False]
    with Mode():
        look(x)
    with forward_ad.dual_level():
        look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(look, x, check_trace=False)
    look(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    torch.compile(look, backend="eager")(x)
    assert seen[2:] == [True] * 7


def test_is_transformed():
    seen = []
    torch.func.vmap(lambda x: seen.append(_compat.is_transformed()) or x)(torch.ones(3))
    assert seen == [True]
    assert not _compat.is_transformed()


def test_is_traced():
    seen = []
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(
            lambda x: seen.append(_compat.is_traced()) or x + 1, torch.ones(3), check_trace=False
        )
    assert seen == [True]
    assert not _compat.is_traced()


def test_is_in_backward_pass():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_compat.is_in_backward_pass())
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(_compat.is_in_backward_pass())
            return dy

    Identity.apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert seen == [False, True]


def test_is_batch_of_autograd():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(_compat.is_batch_of_autograd(dy))
            return dy

    x = torch.ones(3, requires_grad=True)
    y = Identity.apply(x)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert seen == [True, False]


def test_apply_of():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.by = 2
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.by

    x = torch.ones(3, requires_grad=True)
    y = _compat.apply_of(Double)(x)
    assert y.grad_fn.name() == "DoubleBackward"
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


def test_kept():
    """In a program that changes what it made a copy of."""

    def double(x, state):
        y = x * _compat.kept(state).exp()
        state.mul_(2)
        return y

    x, state = torch.ones(3, requires_grad=True), torch.ones(3)
    torch.compile(double, backend="aot_eager", fullgraph=True)(x, state).sum().backward()
    assert torch.equal(x.grad, torch.ones(3).exp())
    assert torch.equal(state, torch.full((3,), 2.0))


def test_check_dense():
    x = torch.ones(3)
    batched = []
    torch.vmap(lambda x: batched.append(_compat.check_dense("x", x)) or x)(x)
    assert batched == [None]
    for each in (x, x.to("meta"), x[:0], torch.zeros_like(x).expand(2, 3)):
        _compat.check_dense("x", each)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"x has no memory: its shape is \(3,\)"):
        _compat.check_dense("x", x)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch's threads are not sought")
def test_operations_library():
    path = _compat.operations_library()
    assert Path(path).is_file()
    library = ctypes.CDLL(path)
    assert hasattr(library, "GOMP_parallel")
    assert library["omp_get_thread_num"]() == 0
    assert library["_ZN2at15get_num_threadsEv"]() == torch.get_num_threads()
