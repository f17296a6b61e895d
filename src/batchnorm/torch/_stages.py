"""The stages on tensors: native on the CPU, the definition's elsewhere.

The statistics of a batch are one tensor of shape (3, *feature shape): mean, var and count. Given
ones, which normalize without being the batch's own, have no count: (2, *feature shape).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import definition
from ..definition import Statistics
from ..native import kernels as _cpu
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
        for x in (x, x.clone()):
            if not x.is_neg() and _cpu.layout(x.shape, problem.features, x.stride()) is not None:
                return Native(problem, inputs._replace(x=x))
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
    """The stages as kernels on memory; native/_cpu.pyi states what they take."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.given = problem, inputs
        x, scale, bias, residual, weights = inputs
        if weights is not None:
            per_feature = any(weights.shape[each] != 1 for each in problem.features)
            shape = [
                1 if axis in problem.features and not per_feature else size
                for axis, size in enumerate(x.shape)
            ]
            weights = weights.expand(shape)
        self.arrays = {
            "x": x,
            "scale": scale,
            "bias": bias,
            "residual": residual,
            "weights": weights,
        }
        self.arrays = {
            name: each.resolve_neg() if each is not None else None
            for name, each in self.arrays.items()
        }
        self.x = x

    def call(self, kernel: Any, **arrays: Any) -> None:
        """What lies wrong in memory is copied into the layout of x."""
        problem = self.problem
        arrays = {**self.arrays, **arrays}
        if kernel is not _cpu.statistics:
            arrays.update(eps=problem.eps, activation=problem.activation)
        else:
            arrays = {name: arrays[name] for name in ("x", "weights", "statistics")}
        if kernel is _cpu.normalize:
            del arrays["weights"]
        options: Any = {"features": problem.features, "team": _TEAM}
        while (name := kernel(**arrays, **options)) is not None:
            copy = torch.empty_like(self.x, dtype=arrays[name].dtype)
            if arrays[name].shape != self.x.shape:
                copy = copy[
                    tuple(slice(1 if size == 1 else None) for size in arrays[name].shape)
                ].clone()
            arrays[name] = copy.copy_(arrays[name])

    def batch_norm(self) -> tuple[Tensor, Tensor]:
        y, statistics = torch.empty_like(self.x), self.per_feature(3)
        self.call(_cpu.batch_norm, statistics=statistics, y=y)
        return y, statistics.roll(-1, 0)

    def statistics(self) -> Tensor:
        statistics = self.per_feature(3)
        self.call(_cpu.statistics, statistics=statistics)
        return statistics.roll(-1, 0)

    def normalize(self, mean: Tensor, var: Tensor) -> Tensor:
        y = torch.empty_like(self.x)
        self.call(_cpu.normalize, mean=mean.resolve_neg(), var=var.resolve_neg(), y=y)
        return y

    def gradients(
        self, statistics: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        dx = torch.empty_like(self.x)
        g = torch.empty_like(self.x) if with_g else None
        scale, bias = self.arrays["scale"], self.arrays["bias"]
        dscale = None if scale is None else torch.empty_like(scale)
        dbias = None if bias is None else torch.empty_like(bias)
        self.call(
            _cpu.batch_norm_gradients,
            **_given(statistics),
            dy=dy.resolve_neg(),
            dx=dx,
            dscale=dscale,
            dbias=dbias,
            dresidual=g,
        )
        return dscale, dbias, dx, g

    def gradient_sums(self, statistics: Tensor, dy: Tensor) -> Tensor:
        sums = self.per_feature(2)
        self.call(_cpu.gradient_sums, **_given(statistics), dy=dy.resolve_neg(), sums=sums)
        return sums

    def input_gradient(
        self, statistics: Tensor, sums: Tensor, dy: Tensor, with_g: bool
    ) -> tuple[Tensor, Tensor | None]:
        dx = torch.empty_like(self.x)
        g = torch.empty_like(self.x) if with_g else None
        self.call(
            _cpu.input_gradient,
            **_given(statistics),
            sums=sums,
            dy=dy.resolve_neg(),
            dx=dx,
            dresidual=g,
        )
        return dx, g

    def per_feature(self, number: int) -> Tensor:
        shape = [self.x.shape[axis] for axis in self.problem.features]
        return self.x.new_empty(number, *shape, dtype=torch.float64)


def _given(statistics: Tensor) -> dict[str, Tensor]:
    if is_of_batch(statistics):
        return {"statistics": statistics.roll(1, 0)}
    return {"mean": statistics[0], "var": statistics[1]}


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
            statistics=statistics.detach().roll(1, 0),
            running_mean=running_mean,
            running_var=running_var,
            batches=batches,
            rate=rate,
            correction=1.0,
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


# The way into the OpenMP runtime of PyTorch's own operations, None where they have none: its threads
# go on looking for work for a while after each operation, and another pool's would wait for them
# (csrc/system/parallel.h).
_TEAM = (
    None
    if _cpu is None
    else _cpu.team(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
)
_CODES = set()
# From PyTorch 2.10 on tensors say where they lie in memory.
if _cpu is not None and all(map(_cpu.register_tensor, _PLAIN)):
    _CODES = {getattr(torch, name) for name in _cpu.DTYPES}


def _has_memory(dy: Tensor) -> bool:
    """Autograd may hand on zeros that are none in memory, and batches of autograd's own vmap."""
    is_batch = torch._C._functorch.is_legacy_batchedtensor(dy)
    return type(dy) is Tensor and not is_batch and not dy._is_zerotensor()


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
