"""The stages on tensors, native on the CPU and the definition's elsewhere, and their derivatives.

Autograd sees one function with a backward pass of its own, `_BatchNorm`. Whatever else looks into a
computation sees the definition's plain ATen operations, which have derivatives of every order:
torch.compile, torch.export, torch.func, forward-mode derivatives, tracing, subclasses of Tensor;
and autograd, where the backward pass is itself differentiated.

The statistics of a batch are one tensor of shape (3, *feature shape): mean, var and count. Given
ones, which normalize without being the batch's own, have no count: (2, *feature shape).
"""

import ctypes
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import definition
from ..definition import Statistics
from ..native import _cpu
from ._sync import Sync

__all__ = [
    "Inputs",
    "Problem",
    "batch_norm",
    "batch_statistics",
    "is_watched",
    "move_running",
    "wide",
]

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


def batch_norm(
    problem: Problem, inputs: Inputs, given: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Any]:
    """y and the statistics that normalized it: the batch's own, or a given mean and variance."""
    weights = inputs.weights
    if problem.watched or (weights is not None and weights.requires_grad):
        return _by_definition(problem, inputs, given)
    mean, var = given or (None, None)
    if not torch.is_grad_enabled() or not (
        inputs.x.requires_grad
        or any(each is not None and each.requires_grad for each in (*inputs, mean, var))
    ):
        return _forward(problem, inputs, given)
    results = _apply(problem, inputs, *inputs, mean, var)
    return (results, results.grad_fn.statistics) if problem.is_layer else results


def batch_statistics(problem: Problem, inputs: Inputs) -> Tensor:
    if problem.watched or (torch.is_grad_enabled() and inputs.x.requires_grad):
        return batch_norm(problem, inputs)[1]
    statistics = _stages(problem, inputs).statistics()
    return statistics if problem.sync is None else problem.sync.pooled(statistics)


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


# ---- plain ATen operations


def _by_definition(
    problem: Problem, inputs: Inputs, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if problem.sync is not None and given is None:
        return _over_processes(problem, problem.sync, inputs)
    dtype = inputs.x.dtype
    x, scale, bias, residual, weights = (
        None if each is None else each.to(wide(dtype)) for each in inputs
    )
    options: Any = {
        "features": problem.features,
        "eps": problem.eps,
        "residual": residual,
        "activation": problem.activation,
    }
    if given is not None:
        mean, var = (each.to(wide(dtype)) for each in given)
        y = definition.normalize(x, mean, var, scale, bias, **options)
        return y.to(dtype), torch.stack((mean, var))
    y, (count, mean, var) = definition.batch_norm(
        x, scale, bias, weights=weights, constant=Tensor.detach, **options
    )
    return y.to(dtype), torch.stack((mean, var, count))


def _over_processes(problem: Problem, sync: Sync, inputs: Inputs) -> tuple[Tensor, Tensor]:
    shape = inputs.x.shape
    if 0 in shape:
        inputs = _one_that_does_not_count(inputs)
    valid = None
    if inputs.weights is not None:
        valid = (inputs.weights > 0) | inputs.x.isfinite()
        inputs = inputs._replace(x=torch.where(valid, inputs.x, 0.0))
    stages = _Definition(problem, inputs)
    statistics = sync.pooled(stages.statistics())
    y = stages.normalize(statistics[0], statistics[1])
    if valid is not None:
        y = torch.where(valid, y, math.nan)
    return y[tuple(slice(size) for size in shape)], statistics


def _one_that_does_not_count(inputs: Inputs) -> Inputs:
    """For an empty part of a batch: one element of each feature, its weight 0.

    With it, x has a part in every sum over the processes, forward and backward.
    """
    x, residual = inputs.x, inputs.residual
    padding = [each for size in reversed(x.shape) for each in (0, int(size == 0))]
    return inputs._replace(
        x=F.pad(x, padding),
        residual=None if residual is None else F.pad(residual, padding),
        weights=x.new_zeros([1] * x.ndim),
    )


# ---- for autograd


def _forward(
    problem: Problem, inputs: Inputs, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Any]:
    stages = _stages(problem, inputs)
    if given is not None:
        return stages.normalize(*given), given
    if problem.sync is None:
        return stages.batch_norm()
    statistics = problem.sync.pooled(stages.statistics())
    return stages.normalize(statistics[0], statistics[1]), statistics


class _BatchNorm(torch.autograd.Function):
    """`_forward` with a derivative; what it keeps for that is x, and nothing else of its size.

    (Unless there are an activation and a residual: the activation's slope depends on both.)
    """

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, inputs: Inputs, *tensors: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        # One by one as well, for autograd to see them.
        x, scale, bias, residual, weights, mean, var = tensors
        y, statistics = _forward(problem, inputs, None if mean is None else (mean, var))
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        if problem.activation is None:
            residual = None
        if mean is not None:
            # Running statistics may have moved on when the backward pass comes.
            statistics = torch.stack(statistics).to(_statistics_dtype(x))
            if not any(ctx.needs_input_grad[-2:]):
                mean = var = None
        ctx.problem, ctx.statistics = problem, statistics
        ctx.save_for_backward(x, scale, bias, residual, weights, mean, var)
        # An output that its own node held would never be freed.
        return y if problem.is_layer else (y, statistics.detach())

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dstatistics: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        values: Any
        *values, mean, _ = ctx.saved_tensors
        inputs, statistics = Inputs(*values), ctx.statistics
        if torch.is_grad_enabled() or dstatistics is not None or mean is not None:
            return None, None, *_differentiable_gradients(ctx, dy, dstatistics)
        if dy is None:
            return (None,) * 9
        problem: Problem = ctx.problem
        stages = _stages(problem, inputs, dy)
        if problem.sync is None or not _is_of_batch(statistics):
            dscale, dbias, dx, g = stages.gradients(statistics, dy, ctx.has_residual)
        else:
            sums = stages.gradient_sums(statistics, dy)
            dx, g = stages.input_gradient(statistics, problem.sync.sum(sums), dy, ctx.has_residual)
            dscale, dbias = inputs.parameter_gradients(sums)
        return None, None, dx, dscale, dbias, g, None, None, None


# What Function.apply does besides is for torch.func, which is not at work here.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def _differentiable_gradients(
    ctx: Any, dy: Tensor | None, dstatistics: Tensor | None
) -> list[Tensor | None]:
    """The backward pass by operations that autograd can differentiate again."""
    statistics = ctx.statistics
    tensors: list[Any]
    with torch.enable_grad():
        # Each of its own, so that a tensor that came twice has two gradients.
        tensors = [None if each is None else each.view_as(each) for each in ctx.saved_tensors]
        inputs, mean, var = Inputs(*tensors[:5]), *tensors[5:]
        given = None if _is_of_batch(statistics) else tuple(statistics[:2])
        outputs = _by_definition(ctx.problem, inputs, given if mean is None else (mean, var))
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, (dy, dstatistics), strict=True)
        if cotangent is not None and output.requires_grad
    ]
    moving = [each for each in tensors if each is not None and each.requires_grad]
    found: Iterator[Tensor | None] = iter(())
    if pairs and moving:
        outputs, cotangents = zip(*pairs, strict=True)
        create_graph = torch.is_grad_enabled()
        found = iter(
            torch.autograd.grad(
                outputs, moving, cotangents, create_graph=create_graph, allow_unused=True
            )
        )
    gradients = [
        next(found, None) if each is not None and each.requires_grad else None for each in tensors
    ]
    if ctx.has_residual and inputs.residual is None:
        gradients[3] = dy
        if dy is not None and inputs.weights is not None:
            gradients[3] = torch.where((inputs.weights > 0) | inputs.x.isfinite(), dy, 0.0)
    return gradients


def _is_of_batch(statistics: Tensor) -> bool:
    return statistics.shape[0] == 3


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """Wide enough for a mean that is not rounded, where the device has that."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _stages(problem: Problem, inputs: Inputs, dy: Tensor | None = None) -> "_Native | _Definition":
    x = inputs.x
    watched = dy is not None and (is_watched(x) or not _has_memory(dy))
    if x.is_cpu and x.dtype in _CODES and not watched:
        layout = _layout(x.shape, x.stride(), problem.features)
        if layout is None or x.is_neg():  # gaps, or a view that negates what is in memory
            inputs = inputs._replace(x=x.clone())
            layout = _layout(x.shape, inputs.x.stride(), problem.features)
        if layout is not None:
            return _Native(problem, inputs, layout)
    return _Definition(problem, inputs)


class _Definition:
    """The stages in `batchnorm.definition`'s words.

    x is moved to the coordinate (x - pivot) / unit, about its mean and in units of its standard
    deviation: a float32 pivot subtracts exactly, and what it lacks of the mean is subtracted after.
    """

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.given, self.dtype = problem, inputs, inputs.x.dtype
        dtype = wide(self.dtype)
        tensors: Any = (None if each is None else each.to(dtype) for each in inputs)
        self.inputs = Inputs(*tensors)
        self.statistics_dtype = _statistics_dtype(inputs.x)

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
        count = statistics[2].to(u.dtype) if _is_of_batch(statistics) else torch.ones_like(mean)
        sums = sums.to(u.dtype) if _is_of_batch(statistics) else torch.zeros_like(statistics)
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


class _Native:
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
