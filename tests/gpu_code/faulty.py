"""Kernels that have what test_compiled.py forbids, one fault each."""

import torch
import triton
import triton.language as tl


@triton.jit
def atomic(x, y, N: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, N))))


@triton.jit
def double(x, y, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(y + lanes, (tl.load(x + lanes).to(tl.float64) * 1.1 + 0.3).to(tl.float32))


@triton.jit
def crowded(x, y, N: tl.constexpr):
    """All of a tile is kept until its last sum."""
    lanes = tl.arange(0, N)[:, None] * 64 + tl.arange(0, 64)[None, :]
    v = tl.load(x + lanes)
    w = tl.load(x + N * 64 + lanes)
    u = v - tl.sum(v * w) * w
    u -= tl.sum(u * w) * v
    tl.store(y + lanes, u * tl.sum(u * u) + v * w)


@triton.jit
def narrow(x, y, N: tl.constexpr):
    """What lies side by side is not known to."""
    rows = tl.arange(0, N)[:, None]
    lanes = rows * 64 + tl.arange(0, 64)[None, :] % tl.load(y).to(tl.int32)
    tl.store(y + lanes, tl.load(x + lanes))


def launch() -> None:
    x, y = torch.empty(1 << 20), torch.empty(1 << 20)
    for kernel, size in ((atomic, 512), (double, 512), (narrow, 32)):
        kernel[(1,)](x, y, N=size)
    crowded[(1,)](x, y, N=128)
    crowded[(1,)](x, y, N=1024)  # more than any GPU has registers for
