"""All that the door uses of PyTorch without a promise that it stays.

Each use says what it is for, what would break it, and what to do then. tests/test_torch_compat.py
has a test by the name of each, which fails when a version of PyTorch has changed it.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed._functional_collectives as _functional_collectives
from torch import Tensor
from torch.autograd import forward_ad

# The base of torch.nn's batch norms, for isinstance and to inherit their state. Were it renamed,
# _NormBase has it; or the common base of BatchNorm1d and BatchNorm2d.
BatchNormBase = torch.nn.modules.batchnorm._BatchNorm

# Which inputs torch.nn.SyncBatchNorm takes, in its words: those of two or more axes.
check_input_of_sync = torch.nn.SyncBatchNorm._check_input_dim

# A sum over processes that torch.compile can trace; its replacement is whatever Dynamo makes of
# torch.distributed.all_reduce.
traceable_all_reduce = _functional_collectives.all_reduce

_PLAIN = {Tensor, torch.nn.Parameter}


def is_watched(x: Tensor) -> bool:
    """Whether anything but autograd looks at the operations on x.

    Each is asked where PyTorch itself keeps it: torch.compile (public), torch.func, modes of
    __torch_dispatch__, torch.jit.trace, forward-mode derivatives; a subclass of Tensor has its say
    as well. Were one gone, its users would see the kernels as no operation at all: look for the new
    place, or let all of them see plain operations.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or type(x) not in _PLAIN
    )


def is_transformed() -> bool:
    """Whether a transformation of torch.func is at work, which allows no side effects.

    Without it, an update of running statistics could not say what to do instead.
    """
    return torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether torch.jit.trace, or the older exporter to ONNX, looks on.

    torch.jit.is_tracing is public, and goes with torch.jit.
    """
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_in_backward_pass() -> bool:
    """Whether a backward pass runs: a forward one within is checkpointing's second.

    Were it gone, checkpointing would count a batch twice, as it does in torch.nn's layers.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("batchnorm::kept", mutates_args=())
def kept(tensor: Tensor) -> Tensor:
    """A copy that torch.compile keeps for the backward pass, for it knows no way to make it again.

    Of a copy that it knows, it keeps the original, whatever that is changed to in the same program.
    """
    return tensor.clone()


@kept.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether anything is to happen when the module is called, beside its forward.

    Were a kind of hooks elsewhere, they would not be called for an activation that is fused, and
    twice for a layer that torch.fx traces.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_as_its_class(module: torch.nn.Module) -> bool:
    """Whether a call of it is the forward of its class, and nothing else."""
    return not has_hooks(module) and "forward" not in vars(module)


def is_batch_of_autograd(tensor: Tensor) -> bool:
    """Whether it is one of the batches of torch.autograd's own vmap (is_grads_batched).

    Such a tensor has no memory. Were it gone, so would be these batches: return False.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """Function.apply without what it does for torch.func, which is not at work here.

    That saves a third of a small call. Were it gone, `function.apply` does the same.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def check_dense(name: str, tensor: Tensor) -> None:
    """That it is dense, and its storage not given back, as FSDP does between uses.

    Operations on such a storage would crash. What has no storage of its own (a batched tensor, say)
    says so by a NotImplementedError. Were that another one, such tensors would be refused with it:
    add it here. A storage of a symbolic size is there; to compare that size would leave the
    comparison in the program that is traced. Were nested or masked tensors, which are prototypes,
    no longer told by these, operations would refuse them in words of their own.
    """
    what = None
    if isinstance(tensor, torch.masked.MaskedTensor):
        what = "a masked tensor"
        advice = f"Pass {name}.get_data(), and a mask for the statistics."
    elif tensor.is_nested:
        what = f"a nested tensor, of the layout {tensor.layout}"
        advice = f"Pass torch.nested.to_padded_tensor({name}, 0.0), and a mask for the statistics."
    elif tensor.layout is not torch.strided:
        what, advice = f"of the layout {tensor.layout}", f"Pass {name}.to_dense()."
    if what is not None:
        raise TypeError(f"{name} must be a dense tensor, but it is {what}. {advice}")
    if torch.compiler.is_compiling():  # of what will be there later
        return
    try:
        size = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return
    if isinstance(size, int) and size == 0 and tensor.numel() > 0:
        raise RuntimeError(
            f"{name} has no memory: its shape is {tuple(tensor.shape)}, but its storage has been "
            "freed, as FSDP frees parameters between uses. Call the model as a whole, or gather "
            "them first."
        )


def operations_library() -> str:
    """The library of PyTorch's operations, which brings the threads that they run on.

    Of it, csrc/faces/python.cc takes GOMP_parallel and at::get_num_threads. Were one elsewhere, the
    kernels would run on the pool's threads, and wait for PyTorch's now and then.
    """
    return str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
