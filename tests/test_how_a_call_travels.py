"""A call passes through few files of ours on its way to a kernel, and comes back to none of them.

What is counted are the files of the package on the Python stack, where a kernel is called, and for
JAX where the call is lowered; for MLX where the operation is put into the graph, whose derivatives
are no longer in Python, or, without it, where the first sum is taken.
"""

import sys
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from traceback import walk_stack
from unittest.mock import patch

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch
from doors import without_native

import batchnorm.jax
import batchnorm.mlx
import batchnorm.native
import batchnorm.numpy
import batchnorm.torch
from batchnorm.flax import linen, nn

PACKAGE = Path(batchnorm.__file__).parent
KERNELS = batchnorm.native.kernels
NAMES = (
    "batch_norm",
    "statistics",
    "normalize",
    "batch_norm_gradients",
    "gradient_sums",
    "input_gradient",
)
X = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)


def files_on_the_stack() -> list[str]:
    """Those of ours, the first to be called first; calls inside of a file are one."""
    paths = [Path(frame.f_code.co_filename) for frame, _ in walk_stack(None)]
    ours = [str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE)]
    return [file for file, _ in groupby(reversed(ours))]


def spy(function, stacks):
    def called(*arguments, **keywords):
        stacks.append(files_on_the_stack())
        return function(*arguments, **keywords)

    return called


@contextmanager
def kernels_are_called(stacks):
    with ExitStack() as patches:
        for name in NAMES:
            function = spy(getattr(KERNELS, name), stacks)
            patches.enter_context(patch.object(KERNELS, name, function))
        yield


@contextmanager
def kernels_are_lowered(stacks):
    with patch("jax.ffi.ffi_call", spy(jax.ffi.ffi_call, stacks)):
        yield


@contextmanager
def operations_are_called(stacks):
    module = batchnorm.mlx._native._module  # noqa: SLF001
    with patch.object(module, "call", spy(module.call, stacks)):
        yield


@contextmanager
def sums_are_taken(stacks):
    def look(frame, event, _):
        if event == "call" and frame.f_code.co_name == "total":
            stacks.append(files_on_the_stack())

    sys.setprofile(look)
    try:
        with without_native():
            yield
    finally:
        sys.setprofile(None)


def numpy(look):
    with look():
        _, statistics = batchnorm.numpy.batch_norm(X, axis=1)
    with look():
        batchnorm.numpy.batch_norm_gradients(X, X, statistics, axis=1)


def torch_by(function):
    def call(look):
        x = torch.tensor(X, requires_grad=True)
        with look():
            y = function(x)
        with look():
            y.sum().backward()

    return call


def jax_by(function):
    def call(look):
        jax.clear_caches()  # What was lowered once is not lowered again.
        with look():
            function(X)
        with look():
            jax.grad(lambda x: function(x).sum())(X)
        jax.clear_caches()

    return call


def mlx_by(function):
    def call(look):
        x = mx.array(np.tile(X, (2000, 1, 1)))  # A small one is summed in fewer operations.
        with look():
            function(x)
        with look():
            mx.grad(lambda x: function(x).sum())(x)

    return call


PARAMS = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
FUNCTIONAL = batchnorm.torch.functional.batch_norm
CALLS = {
    "numpy": (numpy, kernels_are_called, 4),
    "torch functions": (
        torch_by(lambda x: batchnorm.torch.batch_norm(x, axis=1)[0]),
        kernels_are_called,
        4,
    ),
    "torch functional": (
        torch_by(lambda x: FUNCTIONAL(x, None, None, training=True)),
        kernels_are_called,
        4,
    ),
    "torch layers": (torch_by(batchnorm.torch.BatchNorm1d(4)), kernels_are_called, 4),
    "jax": (jax_by(lambda x: batchnorm.jax.batch_norm(x)[0]), kernels_are_lowered, 4),
    "flax.nn": (
        jax_by(lambda x: nn.BatchNorm.call(PARAMS, x)),
        kernels_are_lowered,
        6,
    ),
    "flax.linen": (
        jax_by(lambda x: linen.BatchNorm(False).init_with_output(jax.random.key(0), x)[0]),
        kernels_are_lowered,
        5,
    ),
    "mlx functions": (
        mlx_by(lambda x: batchnorm.mlx.batch_norm(x)[0]),
        operations_are_called,
        3,
    ),
    "mlx layers": (mlx_by(batchnorm.mlx.BatchNorm(5)), operations_are_called, 3),
    "mlx functions without native": (
        mlx_by(lambda x: batchnorm.mlx.batch_norm(x)[0]),
        sums_are_taken,
        5,
    ),
    "mlx layers without native": (mlx_by(batchnorm.mlx.BatchNorm(5)), sums_are_taken, 5),
}


def stacks_of(name: str) -> list[list[list[str]]]:
    """Of the forward and of the backward call."""
    call, looker, _ = CALLS[name]
    found = []

    def look():
        found.append([])
        return looker(found[-1])

    call(look)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_few_files_and_each_once(name: str):
    forward, backward = stacks_of(name)
    at_most = CALLS[name][2]
    assert forward, "no kernel was called forward"
    assert backward, "no kernel was called backward"
    for stack in (*forward, *backward):
        assert stack, "a kernel was called from elsewhere"
        assert len(stack) <= at_most, stack
        assert len(set(stack)) == len(stack), f"a file is come back to: {stack}"


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("mlx")])
def test_without_native_kernels_none_is_called(name: str):
    assert stacks_of(name) == [[], []]
