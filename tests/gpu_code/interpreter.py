"""Triton's interpreter, mended where it computes otherwise than compiled code, and hastened.

It interprets where TRITON_INTERPRET=1 is in the environment before triton is first imported, as
triton's own helpers, tl.sum among them, are decorated then. `mend` repairs, in triton 3.7.1:

- To bfloat16 it truncates, and from float64 makes garbage: `_cast` rounds to the nearest, even.
- tl.sum adds a tile's rows one after the other: `_sum` adds them as a tree.
- tl.maximum and tl.minimum keep a NaN, which compiled ones do not, unless told to; and NumPy warns
  of a maximum over NaN alone.
- A float that comes as an argument stays Python's and has no dtype: `_argument` gives it the one
  that compiled code has, float32 if the kernel does not say otherwise.
- All that NumPy warns of, overflow for one, is silent on a device.
- A load or store beyond the memory of the arguments reads and writes what it meets: `_check_place`
  raises IndexError.

Not mended: tl.fma rounds twice; tl.rsqrt, tl.exp and division are exact; the variable of a loop is
Python's; arithmetic on bfloat16 acts on the bits, so that kernels have to cast first.

The rest is speed, some four times of it: triton.language is patched once and not at each call, the
types of tiles are made once for each shape, and integers are not checked for overflow, for which
every sum and product of offsets would be computed again in int64 and compared. `programs` says
which programs of a grid run, and in which order; `launches` lists what has run.
"""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import RLock
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("TRITON_INTERPRET must be 1 before triton is imported; it is not.")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter, jit


def _all(kernel: str, number: int) -> Iterable[int]:
    return range(number)


_order = _all
_one_at_a_time = RLock()  # of all threads' launches: what runs is kept in one place
_launches: list[str] = []
_memory: list[tuple[int, int]] = []


@contextmanager
def programs(order: Callable[[str, int], Iterable[int]]) -> Iterator[None]:
    """Let run, of a kernel's n programs, those that order(kernel, n) names, one after the other."""
    global _order
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


def mend() -> None:
    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceOps
    builder.cast_impl = _cast
    builder.create_maxnumf = lambda self, one, other: self.binary_op(one, other, np.fmax)
    builder.create_minnumf = lambda self, one, other: self.binary_op(one, other, np.fmin)
    builder.create_masked_load = _checked(builder.create_masked_load, mask_at=1)
    builder.create_masked_store = _checked(builder.create_masked_store, mask_at=2)
    reductions.sum = _sum
    interpreter.GridExecutor.__call__ = _launch

    for languages in ({"tl": tl}, {"core": tl.core}):
        interpreter._patch_lang(SimpleNamespace(__globals__=languages))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _broadcast
    semantic.binary_op_type_checking_impl = partial(
        _operands, semantic.binary_op_type_checking_impl
    )
    interpreter._get_np_dtype = _numpy_dtype
    interpreter.TensorHandle.__post_init__ = lambda self: None
    tl.block_type.__init__ = _make_block_type
    tl.tensor.__init__ = _make_tensor


# ---- what a launch does


def _launch(self, *arguments, **keywords):
    """GridExecutor.__call__ on the arguments' own memory."""
    names = inspect.signature(self.fn).parameters
    keywords = {name: value for name, value in keywords.items() if name in names}
    given = {
        name: value if name in self.constexprs else _argument(value, names[name].annotation)
        for name, value in inspect.getcallargs(self.fn, *arguments, **keywords).items()
    }
    with _one_at_a_time, np.errstate(all="ignore"), warnings.catch_warnings():
        # Of tl.max over NaN alone, which a device says nothing of.
        warnings.filterwarnings("ignore", "All-NaN")
        _launches.append(self.fn.__name__)
        storages = [each.untyped_storage() for each in arguments if hasattr(each, "data_ptr")]
        _memory[:] = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages]
        grid = self.grid(given) if callable(self.grid) else self.grid
        x, y, z = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(x, y, z)
        for each in _order(self.fn.__name__, x * y * z):
            interpreter.interpreter_builder.set_grid_idx(each % x, each // x % y, each // (x * y))
            self.fn(**given)


def _argument(value, annotation):
    if isinstance(value, float):
        name = jit._normalize_ty(str(annotation).strip("'"))
        dtype = tl.float64 if name == "fp64" else tl.float32
        data = np.array([value], _numpy_dtype(dtype))
        return tl.tensor(interpreter.TensorHandle(data, dtype), dtype)
    return interpreter._implicit_cvt(value)


def _checked(access, mask_at):
    def checked(self, pointers, *operands):
        _check_place(pointers, (pointers, *operands)[mask_at].data)
        return access(self, pointers, *operands)

    return checked


def _check_place(pointers, mask):
    used = pointers.data[mask]
    if used.size:
        first, last = used.min(), used.max()
        for start, stop in _memory:
            if start <= first and last < stop:
                return
        raise IndexError("A program reads or writes beyond the memory of every argument.")


# ---- arithmetic


def _cast(self, source, to):
    kind, to = source.dtype.scalar, to.scalar
    data = source.data
    if kind == tl.bfloat16 and to != tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    if to == tl.bfloat16 and kind != tl.bfloat16:
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(data), np.uint32(0x7FC0), rounded)
    return interpreter.TensorHandle(data.astype(_numpy_dtype(to)), to)


def _sum(self, tile):
    data = tile.handle.data
    rows = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + rows[half:]
    total = rows[0]
    if self.keep_dims:
        axes = tuple(range(data.ndim)) if self.axis is None else self.axis
        total = np.expand_dims(total, axes)
    return self.to_tensor(total, tile.dtype)


def _operands(otherwise, one, other, *arguments, **keywords):
    """Those of equal types, which are all but few, need no more than one shape."""
    are_tensors = isinstance(one, tl.tensor) and isinstance(other, tl.tensor)
    if are_tensors and one.dtype is other.dtype and one.dtype in _COMPUTED:
        return _broadcast(one, other)
    return otherwise(one, other, *arguments, **keywords)


def _broadcast(one, other):
    shape = _common_shape(_sizes(one), _sizes(other))
    return _spread(one, shape), _spread(other, shape)


def _spread(value, shape):
    if shape == _sizes(value):
        return value
    dtype = value.type.scalar
    handle = interpreter.TensorHandle(np.broadcast_to(value.handle.data, shape), dtype)
    return tl.tensor(handle, tl.block_type(dtype, shape))


def _sizes(value):
    return value.type.shape.sizes if value.type.is_block() else ()


_COMPUTED = {tl.float32, tl.float64, tl.int1, tl.int32, tl.int64}
_common_shape = cache(np.broadcast_shapes)


# ---- types


_DTYPES = {
    **{tl.dtype(name).name: np.dtype(name) for name in tl.dtype.SINT_TYPES},
    **{name: np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
    **{"int1": np.dtype(bool), "bf16": np.dtype(np.uint16)},
    **{"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32), "fp64": np.dtype(np.float64)},
}


def _numpy_dtype(dtype):
    dtype = dtype.scalar
    return np.dtype(np.uint64) if dtype.is_ptr() else _DTYPES[dtype.name]


class _Shape(tl.tuple):
    """A type's shape, which is of integers; `of_tensor` is of constants."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.sizes, self.numel = sizes, math.prod(sizes)
        self.of_tensor = tl.tuple([tl.constexpr(size) for size in sizes])
        self.numel_of_tensor = tl.constexpr(self.numel)
        tl.core.validate_block_shape(sizes)


_shape = cache(_Shape)
_OF_SCALAR = _shape(())


def _make_block_type(self, element_ty, shape):
    if not isinstance(shape, _Shape):
        shape = _shape(tuple([getattr(size, "value", size) for size in shape]))
    self.element_ty, self.shape, self.numel = element_ty, shape, shape.numel
    self.name = f"<{shape.sizes}, {element_ty.name}>"


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    shape = type.shape if type.is_block() else _OF_SCALAR
    self.shape, self.numel = shape.of_tensor, shape.numel_of_tensor
