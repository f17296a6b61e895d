"""The mends of interpreter.py; each test fails without its own."""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_code.interpreter import launches, programs

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@triton.jit
def copy(x, y, size, N: tl.constexpr):
    lanes = tl.arange(0, N)
    kept = lanes < size
    tl.store(y + lanes, tl.load(x + lanes, mask=kept).to(y.dtype.element_ty), mask=kept)


@triton.jit
def total(x, y, ROWS: tl.constexpr):
    columns = tl.arange(0, 2)
    tile = tl.load(x + tl.arange(0, ROWS)[:, None] * 2 + columns[None, :])
    tl.store(y + columns, tl.sum(tile, 0))


@triton.jit
def greater(x, y, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(y + lanes, tl.maximum(tl.load(x + lanes), 0.0))


@triton.jit
def greatest(x, y, N: tl.constexpr):
    tl.store(y, tl.max(tl.load(x + tl.arange(0, N))))


@triton.jit
def number(y, narrow, wide: tl.float64, named: "fp64"):  # noqa: F821, a type of Triton's
    tl.store(y, narrow.to(tl.float64))
    tl.store(y + 1, wide.to(tl.float64))
    tl.store(y + 2, named.to(tl.float64))


@triton.jit
def sequence(y, counter):
    tl.store(y + tl.program_id(0), tl.load(counter))
    tl.store(counter, tl.load(counter) + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_to_bfloat16(dtype):
    values = np.random.default_rng(0).normal(size=4096) * 10.0 ** np.linspace(-42, 36, 4096)
    values[:6] = 0, -0.0, np.inf, -np.inf, np.nan, 3.4e38
    x, y = torch.from_numpy(values).to(dtype), torch.empty(4096, dtype=torch.bfloat16)
    copy[(1,)](x, y, 4096, N=4096)
    wanted = x.float().numpy().astype(BFLOAT16)
    np.testing.assert_array_equal(y.float().numpy(), wanted.astype(np.float32))
    back = torch.empty_like(x)
    copy[(1,)](y, back, 4096, N=4096)
    np.testing.assert_array_equal(
        back.numpy(), wanted.astype(np.float64).astype(back.numpy().dtype)
    )


def test_a_sum_is_a_tree():
    x = np.random.default_rng(0).uniform(size=(1 << 16, 2)).astype(np.float32)
    y = torch.empty(2)
    total[(1,)](torch.from_numpy(x), y, ROWS=len(x))
    np.testing.assert_allclose(y.numpy(), x.sum(0, dtype=np.float64), rtol=3e-7)


def test_a_maximum_drops_nan():
    x, y = torch.tensor([torch.nan, -1, 2, torch.nan]), torch.empty(4)
    greater[(1,)](x, y, N=4)
    assert y.tolist() == [0, 0, 2, 0]
    greatest[(1,)](x, y, N=4)
    assert y[0].item() == 2
    greatest[(1,)](torch.full((4,), torch.nan), y, N=4)
    assert y[0].isnan()


def test_a_number_has_the_dtype_of_compiled_code():
    y = torch.empty(3, dtype=torch.float64)
    number[(1,)](y, 0.1, 0.1, 0.1)
    assert y.tolist() == [float(np.float32(0.1)), 0.1, 0.1]


def test_overflow_is_silent():
    x, y = torch.full((4,), 1e300, dtype=torch.float64), torch.empty(4)
    copy[(1,)](x, y, 4, N=4)
    assert y.isinf().all()


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)])
def test_no_access_beyond_the_arguments(sizes):
    x, y = (torch.zeros(size) for size in sizes)
    copy[(1,)](x, y, 4, N=8)
    with pytest.raises(IndexError, match="beyond the memory"):
        copy[(1,)](x, y, 8, N=8)


def test_chosen_programs_in_a_chosen_order():
    y, counter = torch.full((5,), -1), torch.zeros(1, dtype=torch.int64)
    with programs(lambda kernel, n: [n - 1, 1]), launches() as launched:
        sequence[(5,)](y, counter)
    assert y.tolist() == [-1, 1, -1, -1, 0]
    assert launched == ["sequence"]
    counter.zero_()
    sequence[(5,)](y, counter)
    assert y.tolist() == [0, 1, 2, 3, 4]
