"""Compiled kernels, and how they are launched.

Triton finds the compiled kernel for a call by looking at each argument, which takes longer than a
small kernel runs. Here a dictionary does, by what a compilation depends on: dtypes, alignment to 16
bytes, constants. Nothing is ever dropped (a graph that was captured may hold a kernel), measured or
tuned: what runs depends on the arguments alone.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import give_up, warn

_IS_AMD = torch.version.hip is not None  # where Triton looks at the size of the memory, too
_ALIGNED = 16  # bytes, of which Triton makes wide loads
_LARGEST_OFFSET = 1 << 40  # in a storage; hardly any address is as low
_loaded: dict[Any, Any] = {}


class Programs:
    """Those of a kernel, and what of its arguments is no tensor."""

    __slots__ = ("constants", "found", "kernel", "kinds", "number", "numbers", "threads")

    def __init__(
        self,
        kernel: Any,
        number: int,
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        threads: int = 128,
    ) -> None:
        self.kernel, self.number, self.threads = kernel, number, threads
        self.numbers, self.constants = numbers, constants
        # What Triton compiles anew for: 64 bits, 1, multiples of 16.
        self.kinds = tuple([(each >= 2**31, each == 1, each % 16 == 0) for each in numbers])
        self.found: dict[Any, Any] = {}  # of `_loaded`, for these

    def on(self, *tensors: Tensor | None, numbers: tuple[float, ...] = ()) -> "Launch":
        """The tensors of a call, and numbers that belong to it alone."""
        return Launch(self, tensors, numbers)


class Launch(NamedTuple):
    programs: Programs
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]


def has_memory(tensor: Tensor, pointer: int) -> bool:
    """Whether its storage has not been freed: then the pointer is the offset in it."""
    return pointer >= _LARGEST_OFFSET or (pointer > 0 and tensor.untyped_storage().nbytes() > 0)


def run(device: torch.device, launches: Iterable[Launch]) -> bool:
    """Launch all on the current stream, or none, where one can't be."""
    with _current(device):
        ready = []
        for launch in launches:
            kernel = _kernel(device, launch)
            if kernel is None:
                return False
            ready.append((kernel, launch))
        for kernel, (programs, tensors, numbers) in ready:
            kernel[programs.number, 1, 1](
                *tensors, *numbers, *programs.numbers, *programs.constants
            )
    return True


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton compiles for, and launches on, the current device."""
    if device.index is None or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def _kernel(device: torch.device, launch: Launch) -> Any:
    """The compiled kernel, launched by a grid as its index; None where there can't be one now."""
    programs, tensors, _ = launch
    kinds: Any = [device]
    for each in tensors:
        if each is None:
            kinds.append(None)
            continue
        try:
            pointer = each.data_ptr()
        except RuntimeError:  # of a tensor without a storage
            return None
        if not has_memory(each, pointer):
            return None
        kind = each.dtype if pointer % _ALIGNED == 0 else (each.dtype, "unaligned")
        kinds.append((kind, each.untyped_storage().nbytes() >= 2**31) if _IS_AMD else kind)
    kinds = tuple(kinds)
    kernel = programs.found.get(kinds)
    if kernel is None:
        key = (programs.kernel, programs.constants, programs.threads, programs.kinds, kinds)
        kernel = _loaded.get(key) or _load(device, launch)
        if kernel is not None:
            programs.found[kinds] = _loaded[key] = kernel
    return kernel


def _load(device: torch.device, launch: Launch) -> Any:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        warn(
            "a kernel can't be loaded while a graph is captured; call the model once, forward and "
            "backward, before the capture"
        )
        return None
    programs, tensors, numbers = launch
    try:
        threads_of_warp = 32
        if isinstance(programs.kernel, triton.JITFunction):  # and not interpreted
            threads_of_warp = triton.runtime.driver.active.get_current_target().warp_size
        compiled = programs.kernel.run(
            *(*tensors, *numbers, *programs.numbers, *programs.constants),
            grid=(programs.number, 1, 1),
            warmup=True,
            num_warps=max(1, programs.threads // threads_of_warp),
            enable_fp_fusion=False,  # as the interpreter computes; what is to be fused says so
        )
        if compiled is None:  # interpreted
            return programs.kernel
        compiled.run  # noqa: B018  loads it
    except Exception as error:  # of Triton's, its backend's, the C compiler's or the driver's
        name = programs.kernel.fn.__name__
        give_up(f"{name} can't be compiled ({type(error).__name__}: {error})")
        return None
    return compiled


_NOTHING = nullcontext()
