"""Time the native kernels, through the NumPy door, beside oneDNN's where it is installed.

Outputs are allocated beforehand. "forward" takes new statistics, "evaluation" given ones. The
variants are measured against plain float32 on all threads. Where oneDNN is there, all sides run on
the threads of its OpenMP runtime, which go on spinning after each of its calls, in others' way.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import measure
import ml_dtypes
import numpy as np
from measure import LAST, THREADS, Work

import batchnorm
from batchnorm.native import kernels as native
from batchnorm.numpy import batch_norm

# From 0.8 MB to 1.6 GB.
SIZES = [Work((n, 64, 56, 56)) for n in (1, 8, 128, 512, 2048)]
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": np.dtype(ml_dtypes.bfloat16)},
    "float16": {"dtype": np.dtype(np.float16)},
    "float64": {"dtype": np.dtype(np.float64)},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "residual": {"residual": True},
    "mask": {"mask": True},
}


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins with a cache line, as the tensors of PyTorch and JAX do."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def forward_and_backward(
    each: Work,
    layout: str,
    *,
    dtype: np.dtype[Any] = np.dtype(np.float32),  # noqa: B008
    activation: str | None = None,
    residual: bool = False,
    mask: bool = False,
) -> tuple[dict[str, Callable[[], object]], np.ndarray]:
    """Calls that allocate nothing like x; and x."""
    random, shape = np.random.default_rng(0), each.shape_in(layout)
    axis = -1 if layout == LAST else 1

    def normal() -> np.ndarray:
        return aligned(random.standard_normal(shape, np.float32).astype(dtype))

    def bits(array: np.ndarray) -> np.ndarray:  # of bfloat16, which has no buffer
        return array.view("V2") if array.dtype.kind == "V" else array

    x, dy, y, dx = (bits(normal()) for _ in range(4))
    features = (axis % len(shape),)
    inputs: dict[str, Any] = {"x": x, "features": features, "eps": 1e-5, "activation": activation}
    inputs |= {"scale": np.ones(shape[axis]), "bias": np.zeros(shape[axis]), "team": team()}
    statistics, sums = np.empty((3, shape[axis])), np.empty((2, shape[axis]))
    gradients = {"dy": dy, "dx": dx, "dscale": sums[1], "dbias": sums[0]}
    if residual:
        inputs["residual"], gradients["dresidual"] = bits(normal()), bits(normal())
    weights = None
    if mask:
        weights = random.random([s if i not in features else 1 for i, s in enumerate(shape)])
        weights = (weights < 0.8).astype(np.float64 if dtype == np.float64 else np.float32)

    def forward() -> None:
        run(native.batch_norm, **inputs, weights=weights, statistics=statistics, y=y)

    def backward() -> None:
        kernel = native.batch_norm_gradients
        run(kernel, **inputs, weights=weights, statistics=statistics, **gradients)

    def evaluation() -> None:
        run(native.normalize, **inputs, mean=statistics[1], var=statistics[2], y=y)

    def run(kernel: Callable[..., str | None], **operands: Any) -> None:
        assert kernel(**operands) is None

    forward()
    return {"forward": forward, "backward": backward, "evaluation": evaluation}, x


@cache
def compiled_onednn() -> ctypes.CDLL | None:
    return measure.library("onednn", "benchmarks/onednn.cc", link="dnnl")


def team() -> Any:
    """See csrc/system/parallel.h; None without oneDNN."""
    compiled_onednn()
    return native.team(str(measure.library_path("onednn")))


def onednn(each: Work, layout: str) -> dict[str, Callable[[], object]]:
    """oneDNN's calls, none where it is not installed or has not this shape."""
    compiled = compiled_onednn()
    if compiled is None or len(each.shape) != 4:
        return {}
    compiled.onednn_new.restype = ctypes.c_void_p
    channels, shape = each.shape[1], each.shape_in(layout)
    sizes = map(ctypes.c_int64, each.shape)
    handle = ctypes.c_void_p(compiled.onednn_new(*sizes, int(layout == LAST), ctypes.c_float(1e-5)))
    random = np.random.default_rng(0)
    x, dy, y, dx = (aligned(random.standard_normal(shape, np.float32)) for _ in range(4))
    scale, bias, mean, var, dscale, dbias = (np.ones(channels, np.float32) for _ in range(6))

    def pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(array.ctypes.data) for array in arrays]

    to_forward = pointers(x, scale, bias, mean, var, y)
    to_backward = pointers(x, scale, bias, mean, var, dy, dx, dscale, dbias)
    held = (x, dy, y, dx, scale, bias, mean, var, dscale, dbias)
    return {
        "forward": lambda: (compiled.onednn_forward(handle, *to_forward), held),
        "backward": lambda: compiled.onednn_backward(handle, *to_backward),
    }


def kernels(arguments: Any) -> Iterator[measure.Result]:
    for each, layout in measure.work(arguments.quick):
        ours, x = forward_and_backward(each, layout)
        theirs = onednn(each, layout)
        for call in ours:
            sides = {"kernels": ours[call]}
            if call in theirs:
                sides["oneDNN"] = theirs[call]
            calls = sides | measure.copies_of(x, team=team())
            yield from measure.results("Kernels", each, layout, call, calls, quick=arguments.quick)
    for each in SIZES[: 2 if arguments.quick else None]:
        for layout in (LAST, measure.FIRST):
            ours, x = forward_and_backward(each, layout)
            for call in ("forward", "backward"):
                calls = {"kernels": ours[call]} | measure.copies_of(x, team=team())
                found = measure.results("Kernels", each, layout, call, calls, quick=arguments.quick)
                yield from (dataclasses.replace(one, call=f"growth, {call}") for one in found)


def variants(arguments: Any) -> Iterator[measure.Result]:
    """Forward and backward in one time."""

    def both(calls: dict[str, Callable[[], object]]) -> Callable[[], object]:
        return lambda: (calls["forward"](), calls["backward"]())

    def on_one_thread(call: Callable[[], object]) -> Callable[[], object]:
        def alone() -> None:
            batchnorm.set_num_threads(1)
            call()
            batchnorm.set_num_threads(THREADS)

        return alone

    for each in (Work((32, 64, 56, 56)), Work((32, 256, 14, 14))):
        for layout in (LAST, measure.FIRST):
            calls = {}
            for name, keywords in VARIANTS.items():
                one, x = forward_and_backward(each, layout, **keywords)
                calls[name] = both(one)
                if name == "float32":
                    calls["float32, one thread"] = on_one_thread(calls[name])
                    copies = measure.copies_of(x, team=team())
            yield from measure.results(
                "Variants",
                each,
                layout,
                "forward + backward",
                calls | copies,
                quick=arguments.quick,
            )


def growth_of_memory(call: Callable[[], object]) -> int:
    """KiB by which the resident memory grows while the call runs, at the most (Linux)."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def main() -> None:
    arguments = measure.options(__doc__)
    batchnorm.set_num_threads(THREADS)
    x, scale = np.ones((16, 32), np.float32), np.ones(32, np.float32)
    seconds = measure.measure({"call": lambda: batch_norm(x, scale, scale)}, 0.2)["call"]
    memory = {
        shape: max(map(growth_of_memory, forward_and_backward(Work(shape), LAST)[0].values()))
        for shape in ((32, 64, 56, 56), (4, 8_000_000))
    }
    title = (
        f"{batchnorm.native_status()} batchnorm.numpy.batch_norm on (16, 32): "
        f"{1e6 * sorted(seconds)[len(seconds) // 2]:.1f} µs a call. "
        f"Memory beyond the arrays, KiB: {memory}."
    )
    measure.show([*kernels(arguments), *variants(arguments)], title, arguments.json)


if __name__ == "__main__":
    main()
