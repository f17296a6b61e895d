"""The stages on tensors: native on the CPU, the definition's elsewhere.

The statistics of a batch are one tensor of shape (3, *feature shape): mean, var and count. Given
ones, which normalize without being the batch's own, have no count: (2, *feature shape).
"""

import ctypes
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import definition
from ..definition import Statistics
from ..native import _cpu
from ._sync import Sync

# torch.compile can't look into what this finds out, but can into the dict that keeps it.
for _kind in (Tensor, torch.nn.Parameter):
    definition._namespace(_kind(torch.empty(0)))


class Problem(NamedTuple):
    """What is not a tensor. Without `sync`, the batch is that of this process.

    `watched` is `is_watched(x)`. With `is_layer`, the statistics have no derivative, which saves
    time in a small call.
    """

    features: tuple[int, ...]
    eps: float
    watched: bool
    activation: str | None = None
    sync: Sync | None = None
    is_layer: bool = False


class Inputs(NamedTuple):
    """scale and bias are of the feature shape, residual like x; weights broadcast, in wide(x)."""

    x: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    weights: Tensor | None = None

    def parameter_gradients(self, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of scale and bias, in their dtypes, from Σ g and Σ g·x̂."""
        sum_g, sum_g_x_hat = sums.unbind(0)
        return (
            None if self.scale is None else sum_g_x_hat.to(self.scale.dtype),
            None if self.bias is None else sum_g.to(self.bias.dtype),
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_PLAIN = {Tensor, torch.nn.Parameter}


def is_watched(x: Tensor) -> bool:
    """Whether anything but autograd looks at the operations on x."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or type(x) not in _PLAIN
    )


def is_of_batch(statistics: Tensor) -> bool:
    return statistics.shape[0] == 3


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Wide enough for a mean that is not rounded, where the device has that."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def stages_of(problem: Problem, inputs: Inputs, dy: Tensor | None = None) -> "Native | Definition":
    x = inputs.x
    watched = dy is not None and (is_watched(x) or not _has_memory(dy))
    if x.is_cpu and x.dtype in _CODES and not watched:
        layout = _layout(x.shape, x.stride(), problem.features)
        if layout is None or x.is_neg():  # gaps, or a view that negates what is in memory
            inputs = inputs._replace(x=x.clone())
            layout = _layout(x.shape, inputs.x.stride(), problem.features)
        if layout is not None:
            return Native(problem, inputs, layout)
    return Definition(problem, inputs)


class Definition:
    """The stages in `batchnorm.definition`'s words.

    x is moved to the coordinate (x - pivot) / unit, about its mean and in units of its standard
    deviation: a float32 pivot subtracts exactly, and what it lacks of the mean is subtracted after.
    """

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.given, self.dtype = problem, inputs, inputs.x.dtype
        dtype = wide(self.dtype)
        tensors: Any = (None if each is None else each.to(dtype) for each in inputs)
        self.inputs = Inputs(*tensors)
        self.statistics_dtype = statistics_dtype(inputs.x)

    def batch_norm(self) -> tuple[Tensor, Tensor]:
        statistics = self.statistics()
        return self.normalize(statistics[0], statistics[1]), statistics

    def statistics(self) -> Tensor:
        count, pivot, unit, offset, var = (
            each.to(self.statistics_dtype)
            for each in definition.moments(
                self.inputs.x,
                features=self.problem.features,
                weights=self.inputs.weights,
                constant=Tensor.detach,
            )
        )
        return torch.stack((pivot + unit * offset, unit * unit * var, count))

    def normalize(self, mean: Tensor, var: Tensor) -> Tensor:
        dtype = self.statistics_dtype
        u, mean, var, _ = self.standard(mean.to(dtype), var.to(dtype))
        options = self.options()
        del options["weights"]
        y: Tensor = definition.normalize(
            u, mean, var, self.inputs.scale, self.inputs.bias, **options
        )
        return y.to(self.dtype)

    def gradients(
        self, statistics: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        sums = self.gradient_sums(statistics, dy)
        dx, g = self.input_gradient(statistics, sums, dy, with_g)
        return *self.given.parameter_gradients(sums), dx, g

    def gradient_sums(self, statistics: Tensor, dy: Tensor) -> Tensor:
        u, mean, var, _ = self.standard(statistics[0], statistics[1])
        sums = definition.gradient_sums(
            dy.to(u.dtype), u, mean, var, self.inputs.scale, self.inputs.bias, **self.options()
        )
        return torch.stack(sums).to(self.statistics_dtype)

    def input_gradient(
        self, statistics: Tensor, sums: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor, Tensor | None]:
        u, mean, var, unit = self.standard(statistics[0], statistics[1])
        count = statistics[2].to(u.dtype) if is_of_batch(statistics) else torch.ones_like(mean)
        sums = sums.to(u.dtype) if is_of_batch(statistics) else torch.zeros_like(statistics)
        du, g = definition.input_gradient(
            dy.to(u.dtype),
            u,
            Statistics(count, mean, var),
            tuple(sums.to(u.dtype)),
            self.inputs.scale,
            self.inputs.bias,
            **self.options(),
        )
        return (du / unit).to(self.dtype), g.to(self.dtype) if with_g else None

    def standard(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, its mean, and its variance plus eps, of the feature shape; and the unit along x."""
        x, features = self.inputs.x, self.problem.features
        var = var + self.problem.eps
        pivot, unit = mean.detach().to(x.dtype), var.detach().sqrt().to(x.dtype)
        along = [size if axis in features else 1 for axis, size in enumerate(x.shape)]
        u = (x - pivot.reshape(along)) / unit.reshape(along)
        return (
            u,
            ((mean - pivot) / unit).to(x.dtype),
            (var / unit.to(var.dtype) ** 2).to(x.dtype),
            unit.reshape(along),
        )

    def options(self) -> dict[str, Any]:
        return {
            "features": self.problem.features,
            "eps": 0.0,  # it is part of the variance of u
            "weights": self.inputs.weights,
            "residual": self.inputs.residual,
            "activation": self.problem.activation,
        }


class Native:
    """The stages as kernels on memory, the arguments of which csrc/batch_norm.h explains."""

    def __init__(self, problem: Problem, inputs: Inputs, layout: "_Layout") -> None:
        x, scale, bias, residual, weights = inputs
        self.given, self.x, self.order = inputs, x, layout.order
        self.feature_shape = layout.feature_shape
        weight_channels = 0
        if weights is not None:
            per_feature = any(weights.shape[each] != 1 for each in problem.features)
            weight_channels = layout.channels if per_feature else 1
            shape = [
                1 if axis in problem.features and not per_feature else size
                for axis, size in enumerate(x.shape)
            ]
            weights = self.in_order(weights.expand(shape))
        if residual is not None:
            residual = self.in_order(residual)
        # In that dtype the kernels write the gradients of scale and bias as well.
        self.parameter_dtype, self.scale, self.bias = _parameters(scale, bias)
        self.held = (residual, weights)  # as long as their addresses are in use
        self.arguments = (
            layout.outer,
            layout.channels,
            layout.inner,
            _CODES[x.dtype],
            _cpu.ACTIVATIONS[problem.activation],
            problem.eps,
            x.data_ptr(),
            _address(residual),
            _CODES[self.parameter_dtype],
            _address(self.scale),
            _address(self.bias),
            _address(weights),
            weight_channels,
            _TEAM,
        )

    def in_order(self, tensor: Tensor) -> Tensor:
        """The tensor, its elements in the order in memory that those of x have."""
        if self.order is not None:
            tensor = tensor.permute(self.order)
        return tensor.contiguous().resolve_neg()

    def batch_norm(self) -> tuple[Tensor, Tensor]:
        y, statistics = torch.empty_like(self.x), self.per_feature(3)
        _cpu.batch_norm(*self.arguments, *_addresses(statistics), y.data_ptr())
        return y, statistics

    def statistics(self) -> Tensor:
        statistics = self.per_feature(3)
        _cpu.statistics(*self.arguments, *_addresses(statistics))
        return statistics

    def normalize(self, mean: Tensor, var: Tensor) -> Tensor:
        y = torch.empty_like(self.x)
        dtype, first, second = _parameters(mean, var)
        _cpu.normalize(
            *self.arguments, _CODES[dtype], _address(first), _address(second), y.data_ptr()
        )
        return y

    def gradients(
        self, statistics: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        dy, dx = self.in_order(dy), torch.empty_like(self.x)
        g = torch.empty_like(self.x) if with_g else None
        dscale = None if self.scale is None else torch.empty_like(self.scale)
        dbias = None if self.bias is None else torch.empty_like(self.bias)
        _cpu.batch_norm_gradients(
            *self.arguments,
            *_addresses(statistics),
            dy.data_ptr(),
            _address(dbias),
            _address(dscale),
            dx.data_ptr(),
            _address(g),
        )
        if self.parameter_dtype == torch.float64:  # of a parameter that may be narrower
            given: Any = self.given
            dscale = None if dscale is None else dscale.to(given.scale.dtype)
            dbias = None if dbias is None else dbias.to(given.bias.dtype)
        return dscale, dbias, dx, g

    def gradient_sums(self, statistics: Tensor, dy: Tensor) -> Tensor:
        dy, sums = self.in_order(dy), self.per_feature(2)
        _, mean, var = _addresses(statistics)
        _cpu.gradient_sums(*self.arguments, mean, var, dy.data_ptr(), *_addresses(sums)[1:])
        return sums

    def input_gradient(
        self, statistics: Tensor, sums: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor, Tensor | None]:
        dy, dx = self.in_order(dy), torch.empty_like(self.x)
        g = torch.empty_like(self.x) if with_g else None
        _cpu.input_gradient(
            *self.arguments,
            *_addresses(statistics),
            *_addresses(sums)[1:],
            dy.data_ptr(),
            dx.data_ptr(),
            _address(g),
        )
        return dx, g

    def per_feature(self, number: int) -> Tensor:
        return self.x.new_empty(number, *self.feature_shape, dtype=torch.float64)


def move_running(
    problem: Problem,
    running: tuple[Tensor, Tensor],
    batches: Tensor | None,
    statistics: Tensor,
    rate: float | Tensor,
    *,
    may_be_empty: bool = True,
) -> None:
    """Move running statistics in place towards those of a batch, the variance with correction 1.

    `batches` counts those that have any element.
    """
    running_mean, running_var = running
    if (
        _cpu is not None
        and type(rate) is float
        and not problem.watched
        and _is_in_native_memory(running_mean)
        and _is_in_native_memory(running_var)
        and statistics.dtype == torch.float64
        and running_mean.dtype == running_var.dtype
        and (
            batches is None or (_is_in_native_memory(batches, (torch.int64,)) and batches.ndim == 0)
        )
    ):
        _cpu.update_running(
            running_mean.numel(),
            *_addresses(statistics),
            rate,
            1.0,
            _CODES[running_mean.dtype],
            running_mean.data_ptr(),
            running_var.data_ptr(),
            _address(batches),
        )
        return
    mean, var, count = statistics.detach()
    dtype = statistics.dtype
    new_mean, new_var = definition.update_running(
        running_mean.to(dtype),
        running_var.to(dtype),
        Statistics(count, mean, var),
        rate=rate,
        correction=1,
    )
    running_mean.copy_(new_mean)
    running_var.copy_(new_var)
    if batches is not None:
        batches.add_((count > 0).any() if may_be_empty else 1)


def _team() -> int:
    """The way into the OpenMP runtime of PyTorch's own operations, 0 where they have none.

    Its threads go on looking for work for a while after each operation, and another pool's would
    wait for them (csrc/parallel.h).
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


_TEAM = _team()
_CODES = {} if _cpu is None else {getattr(torch, name): code for name, code in _cpu.DTYPES.items()}


def _has_memory(dy: Tensor) -> bool:
    """Autograd may hand on zeros that are none in memory, and batches of autograd's own vmap."""
    is_batch = torch._C._functorch.is_legacy_batchedtensor(dy)
    return type(dy) is Tensor and not is_batch and not dy._is_zerotensor()


def _parameters(
    first: Tensor | None, second: Tensor | None
) -> tuple[torch.dtype, Tensor | None, Tensor | None]:
    """Two parameters as the kernels read them: in float32 where both are, else in float64."""
    for each in (first, second):
        if each is not None and (
            each.dtype != torch.float32 or not each.is_contiguous() or each.is_neg()
        ):
            break
    else:
        return torch.float32, first, second
    first, second = (
        None if each is None else each.to(torch.float64).contiguous().resolve_neg()
        for each in (first, second)
    )
    return torch.float64, first, second


class _Layout(NamedTuple):
    """x in memory; `order`: its axes from the outermost to the innermost, None for C order."""

    outer: int
    channels: int
    inner: int
    order: tuple[int, ...] | None
    feature_shape: tuple[int, ...]


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], features: tuple[int, ...]
) -> _Layout | None:
    """None if x has gaps or overlaps, or its feature axes do not lie side by side, in order."""
    in_order = tuple(range(len(shape)))
    by_stride = tuple(sorted(in_order, key=lambda axis: -strides[axis]))
    for order in (in_order, by_stride):
        step = 1
        for axis in reversed(order):
            if shape[axis] > 1 and strides[axis] != step:
                break
            step *= shape[axis]
        else:
            break
    else:
        return None
    axes = [axis for axis in order if shape[axis] != 1]
    begin = next((i for i, axis in enumerate(axes) if axis in features), 0)
    wanted = [axis for axis in features if shape[axis] != 1]
    end = begin + len(wanted)
    if axes[begin:end] != wanted:
        return None
    outer, channels, inner = (
        math.prod(shape[axis] for axis in part) for part in (axes[:begin], wanted, axes[end:])
    )
    return _Layout(
        outer,
        channels,
        inner,
        None if order == in_order else order,
        tuple(shape[axis] for axis in features),
    )


def _address(tensor: Tensor | None) -> int:
    """Where the first element is; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(rows: Tensor) -> tuple[int, int, int]:
    """Of count (0 if there is none), mean and var: of the rows 2, 0 and 1."""
    first, number = rows.data_ptr(), rows.shape[0]
    size = rows.nbytes // number
    return first + 2 * size if number == 3 else 0, first, first + size


def _is_in_native_memory(
    buffer: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
) -> bool:
    return (
        type(buffer) is Tensor
        and buffer.is_cpu
        and buffer.dtype in dtypes
        and buffer.is_contiguous()
        and not buffer.is_neg()
    )
