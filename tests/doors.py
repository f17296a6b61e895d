"""The doors under test: one row each. A framework that is missing is an error, not a skip.

Every test of what all doors share takes the `door` fixture and speaks NumPy: a Door turns arrays
into its framework's and back, and names what differs.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import torch
from compare import as_numpy

import batchnorm.jax
import batchnorm.mlx
import batchnorm.native
import batchnorm.numpy
import batchnorm.torch

FLOAT64, FLOAT32, FLOAT16 = np.dtype("float64"), np.dtype("float32"), np.dtype("float16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@contextmanager
def without_native():
    """As it is where no native module was built: for what is called, and lowered, meanwhile."""
    with patch.object(batchnorm.native, "kernels", None):
        yield


@dataclass(eq=False)
class Door:
    """One way into batchnorm.

    Attributes
    ----------
    functions : the module or object with batch_norm, normalize, batch_statistics, update_running
    array : to the framework's array
    numpy : back
    gradients : (function, dy, arrays) -> the gradients of sum(function(*arrays) * dy)
    looks_at_values : whether bad values, and not only shapes and dtypes, are found
    native : whether native kernels may serve
    """

    name: str
    functions: Any
    array: Callable[[Any], Any]
    gradients: Callable[..., list[np.ndarray]]
    dtypes: tuple[np.dtype, ...] = (FLOAT32, FLOAT16, BFLOAT16)
    looks_at_values: bool = False
    native: bool = True
    context: Callable[[], Any] | None = None  # for a call; else as `native` says

    def numpy(self, array) -> np.ndarray:
        return as_numpy(array)

    def batch_norm(self, x, scale=None, bias=None, **keywords):
        y, statistics = self.call("batch_norm", x, scale, bias, **keywords)
        return self.numpy(y), type(statistics)(*map(self.numpy, statistics))

    def normalize(self, *arrays, **keywords):
        return self.numpy(self.call("normalize", *arrays, **keywords))

    def batch_statistics(self, x, **keywords):
        statistics = self.call("batch_statistics", x, **keywords)
        return type(statistics)(*map(self.numpy, statistics))

    def update_running(self, mean, var, statistics, **keywords):
        with self.kernels():
            return self.functions.update_running(mean, var, statistics, **keywords)

    def call(self, function, *arrays, **keywords):
        """`function` of this door with NumPy arrays, its result in the framework's arrays."""
        for name in ("mask", "residual"):
            if keywords.get(name) is not None:
                keywords[name] = self.array(keywords[name])
        arrays = [None if array is None else self.array(array) for array in arrays]
        with self.kernels():
            return getattr(self.functions, function)(*arrays, **keywords)

    def batch_norm_gradients(self, dy, x, scale, bias, *, residual=None, **keywords):
        """Gradients of sum(batch_norm(...)[0] * dy), as a dict by the argument's name."""
        arrays = {"x": x, "scale": scale, "bias": bias, "residual": residual}
        arrays = {name: value for name, value in arrays.items() if value is not None}
        if "mask" in keywords and keywords["mask"] is not None:
            keywords["mask"] = self.array(keywords["mask"])
        with self.kernels():
            return self.gradients(self, dy, arrays, keywords)

    def kernels(self):
        if self.context is not None:
            return self.context()
        return nullcontext() if self.native else without_native()


def _numpy_gradients(door, dy, arrays, keywords):
    arguments = {"scale": arrays.get("scale"), "bias": arrays.get("bias"), **keywords}
    residual = arrays.get("residual")
    _, statistics = door.functions.batch_norm(arrays["x"], residual=residual, **arguments)
    arguments.pop("allow_one_value", None)  # which gradients do not ask
    gradients = door.functions.batch_norm_gradients(
        dy, arrays["x"], statistics, residual=residual, **arguments
    )
    return {name: getattr(gradients, name) for name in arrays}


def _mlx_array(value):
    value = np.asarray(value)
    if value.dtype == BFLOAT16:
        return mx.array(value.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(value.astype(np.float32) if value.dtype == np.float64 else value)


def _mlx_gradients(door, dy, arrays, keywords):
    names, dy = list(arrays), door.array(dy)

    def loss(*values):
        arguments = dict(zip(names, values, strict=True))
        y, _ = door.functions.batch_norm(**arguments, **keywords)
        return (y * dy).astype(mx.float32).sum()

    values = [door.array(arrays[name]) for name in names]
    _, gradients = mx.value_and_grad(loss, argnums=tuple(range(len(names))))(*values)
    gradients = [gradients] if len(names) == 1 else gradients
    return {name: door.numpy(g) for name, g in zip(names, gradients, strict=True)}


def _jax_array(value):
    value = np.asarray(value)
    return jnp.asarray(value.astype(np.float32) if value.dtype == np.float64 else value)


def _jax_gradients(door, dy, arrays, keywords):
    def loss(arrays):
        y, _ = door.functions.batch_norm(**arrays, **keywords)
        return (y * door.array(dy)).astype(jnp.float32).sum()

    arrays = {name: door.array(value) for name, value in arrays.items()}
    gradients = jax.jit(jax.grad(loss))(arrays)
    return {name: door.numpy(gradient) for name, gradient in gradients.items()}


def _torch_array(value):
    value = np.array(value)  # a copy: PyTorch warns of read-only memory
    if value.dtype == BFLOAT16:
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _torch_gradients(door, dy, arrays, keywords):
    if arrays["x"].dtype == FLOAT64:  # A gradient is no wider than its parameter.
        arrays = {name: value.astype(FLOAT64) for name, value in arrays.items()}
    arrays = {name: door.array(value).requires_grad_() for name, value in arrays.items()}
    y, _ = door.functions.batch_norm(**arrays, **keywords)
    gradients = torch.autograd.grad(y, list(arrays.values()), door.array(dy))
    return {name: door.numpy(g) for name, g in zip(arrays, gradients, strict=True)}


NUMPY = Door(
    name="numpy",
    functions=batchnorm.numpy,
    array=np.asarray,
    gradients=_numpy_gradients,
    dtypes=(FLOAT64, FLOAT32, FLOAT16, BFLOAT16),
    looks_at_values=True,
)
MLX = Door(
    name="mlx",
    functions=batchnorm.mlx,
    array=_mlx_array,
    gradients=_mlx_gradients,
)
JAX = Door(
    name="jax",
    functions=batchnorm.jax,
    array=_jax_array,
    gradients=_jax_gradients,
)
TORCH = Door(
    name="torch",
    functions=batchnorm.torch,
    array=_torch_array,
    gradients=_torch_gradients,
    dtypes=(FLOAT64, FLOAT32, FLOAT16, BFLOAT16),
)
# Triton's own variable, with which `make test-gpu-code` starts: in every test, PyTorch's tensors go
# through the kernels for GPUs, interpreted (conftest.py).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DOORS = [
    NUMPY,
    replace(NUMPY, name="numpy-without-native", native=False),
    MLX,
    replace(MLX, name="mlx-without-native", native=False),
    JAX,
    TORCH,
    replace(TORCH, name="torch-without-native", native=False),
]
if torch.cuda.is_available():
    DOORS.append(replace(TORCH, name="torch-cuda", array=lambda value: _torch_array(value).cuda()))


@contextmanager
def _in_three_kernels():
    """As large tensors are served: by kernels that leave sums to others."""
    plan_of = import_module("batchnorm.torch._gpu.plans").plan_of
    plan_of.cache_clear()
    try:
        with patch("batchnorm.torch._gpu.tiles.whole", lambda *arguments: None):
            yield
    finally:
        plan_of.cache_clear()


if INTERPRETED:
    DOORS = [
        replace(TORCH, name="torch-triton"),
        replace(TORCH, name="torch-triton-three-kernels", context=_in_three_kernels),
    ]


class _Lowered:
    """batchnorm.jax, lowered by itself: what was lowered with kernels is not met again."""

    def __getattr__(self, name):
        def call(*arrays, **keywords):
            traced = {key: each for key, each in keywords.items() if isinstance(each, jax.Array)}
            fixed = {key: each for key, each in keywords.items() if key not in traced}
            return _lowered(name, tuple(fixed.items()))(arrays, traced)

        return call


@cache
def _lowered(name, fixed):
    function = partial(getattr(batchnorm.jax, name), **dict(fixed))
    return jax.jit(lambda arrays, traced: function(*arrays, **traced))


@contextmanager
def _by_as_many_operations_as_large_arrays():
    with without_native(), patch("batchnorm.mlx._operations.SMALL", 0):
        yield


@contextmanager
def _compiled_sooner():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with without_native():
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextmanager
def _as_on_a_gpu():
    with without_native(), patch("batchnorm.torch._eager._BY_SUMS", set()):
        yield


# Where DOORS are served by kernels, or in a small array by fewer operations, or as on a CPU.
BY_DEFINITION = [
    replace(MLX, name="mlx-by-definition", context=_by_as_many_operations_as_large_arrays),
    replace(JAX, name="jax-without-native", functions=_Lowered(), context=_compiled_sooner),
    replace(TORCH, name="torch-as-on-a-gpu", context=_as_on_a_gpu),
]
if INTERPRETED:
    BY_DEFINITION = []
