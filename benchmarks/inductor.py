"""How often what torch.compile makes reads and writes tensors of x's size, counted as it is made.

torch.compile's backend, Inductor, cuts a program into kernels, each of which has one loop over x or
more: another after each reduction whose result it needs. What a kernel reads it reads once a loop;
what it writes, and no other kernel needs, it keeps in registers. Bytes are counted in those of x.
Nothing is run, so that this needs no GPU: but then Inductor cuts as it does for a CPU.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.virtualized import V


class _CountedError(Exception):
    """Ends a compilation once its kernels are known."""


def passes(
    layer: nn.Module, x: Tensor, residual: Tensor | None, call: Callable[..., Tensor]
) -> tuple[float, float]:
    """Of call(layer, x, residual) and of its backward pass."""
    size = x.numel() * x.itemsize
    found: list[float] = []

    def count(kernels: list[Any]) -> Any:
        found.append(sum(map(_bytes_of, kernels)) / size)
        raise _CountedError

    def inner(graph: Any, inputs: Any, **settings: Any) -> Any:
        kept = copy.deepcopy(graph)
        before = len(found)
        try:
            compile_fx_inner(graph, inputs, **settings)
        except Exception:  # `_CountedError`, in whatever Inductor has wrapped it
            if len(found) == before:
                raise
        return make_boxed_func(kept)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    tensors = [each for each in (x, residual) if each is not None]
    tensors = [each.detach().requires_grad_() for each in tensors]
    with torch._inductor.config.patch(_post_fusion_custom_pass=count):
        compiled = torch.compile(call, backend=backend, dynamic=False, fullgraph=True)
        y = compiled(layer, tensors[0], tensors[1] if residual is not None else None)
        moving = [*tensors, *layer.parameters()]
        torch.autograd.grad(y, moving, torch.ones_like(y), allow_unused=True)
    torch._dynamo.reset()
    forward, backward = found
    return forward, backward


def _bytes_of(kernel: Any) -> int:
    nodes = kernel.get_nodes()
    inside = {node.get_name() for node in nodes}
    loop_of: dict[str, int] = {}  # in which a buffer of this kernel is written
    loop_after: dict[str, int] = {}  # in which it can be read
    read: dict[tuple[str, int], int] = {}
    written: dict[str, int] = {}
    for node in nodes:
        reads, writes = node.read_writes.reads, node.read_writes.writes
        loop = max((loop_after.get(each.name, 0) for each in reads), default=0)
        for each in reads:
            if loop_of.get(each.name) != loop:
                read[each.name, loop] = _size(each)
        for each in writes:
            loop_of[each.name] = loop
            loop_after[each.name] = loop + node.is_reduction()
            users = node.scheduler.name_to_buf[each.name].users
            if any(user.node.get_name() not in inside for user in users):
                written[each.name] = _size(each)
    for name, loop in read:
        if name in loop_of:  # in an earlier loop
            written[name] = read[name, loop]
    return sum(read.values()) + sum(written.values())


def _size(access: Any) -> int:
    return access.numel_hint() * V.graph.get_dtype(access.name).itemsize
