"""The stages on tensors: kernels on the CPU where they can serve, the definition elsewhere.

The statistics of a batch are one tensor, float64 where the device has that, so that a mean is not
rounded: its rows are those of `Statistics`, (3, *feature shape). Those that `forward` finds of
doubles have two more, for what of the mean and the variance a double does not hold (`StatisticsOf`
in csrc/stages/batch_norm.h). The sums of a backward pass are the rows Σ g and Σ g·x̂, (2, *feature
shape).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, definition, native
from ..arrays import namespace
from ..definition import Inputs, Problem
from ..layout import feature_shape, weights_shape
from ..moments import Moments, Statistics
from ._compat import check_dense, operations_library
from ._running import Running, rounded
from ._sync import Alone

# torch.compile can't look into what this finds out, but can into the dict that keeps it.
for _kind in (Tensor, torch.nn.Parameter):
    namespace(_kind(torch.empty(0)))


# What users of functions, and of layers, call an operand that has another name here.
OF_FUNCTIONS = {"weights": "mask"}
OF_LAYERS = {
    **OF_FUNCTIONS,
    "x": "input",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "batches": "num_batches_tracked",
}


class Call(NamedTuple):
    """What is not a tensor; `watched` is `_compat.is_watched(x)`."""

    problem: Problem
    processes: Alone
    watched: bool
    names: dict[str, str] = OF_FUNCTIONS


class Given(NamedTuple):
    """A mean and a variance that do not depend on x: running statistics."""

    mean: Tensor
    var: Tensor


By = Tensor | Given  # what an output is normalized by: the batch's statistics, or given ones


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


class Stages:
    """The stages of one call. What is computed by the definition can be differentiated.

    scale and bias are of the feature shape and of any dtype, residual is like x, weights broadcast.
    """

    __slots__ = ("inputs", "is_native", "names", "problem")

    def __init__(self, call: Call, inputs: Inputs, *, watched: bool) -> None:
        x, self.names = inputs.x, call.names
        self.is_native = (
            native.kernels is not None and not watched and x.is_cpu and x.dtype in _DTYPES
        )
        self.problem, self.inputs = call.problem, inputs

    def forward(self, running: Running | None = None) -> tuple[Tensor, Tensor]:
        """y, and the statistics that it is normalized by; running statistics move, too."""
        x = self.inputs.x
        if self.is_native:
            y, statistics = torch.empty_like(x), self.rows(5 if x.dtype == torch.float64 else 3)
            operands: dict[str, Any] = {"statistics": statistics, "y": y}
            moving = None if running is None else running.operands()
            rate = None
            if moving is not None:
                tensors, rate = moving
                operands |= tensors
            if self.runs(native.kernels.batch_norm, operands, rate=rate):
                if running is not None and moving is None:
                    running.move(statistics, watched=True)
                return y, statistics
            if running is not None:  # perhaps in no memory that a kernel can change
                y, statistics = self.forward()
                running.move(statistics, watched=True)
                return y, statistics
        y, moments = definition.batch_norm(self.problem, self.wide_inputs(), Tensor.detach)
        statistics = self.statistics_of(moments)
        if running is not None:
            running.move(statistics, watched=True)
        return y.to(x.dtype), statistics

    def statistics(self) -> Tensor:
        if self.is_native:
            statistics = self.rows(3)
            if self.runs(native.kernels.statistics, {"statistics": statistics}):
                return statistics
        moments = definition.moments(self.problem, self.wide_inputs(), Tensor.detach)
        return rounded(self.statistics_of(moments))

    def normalize(self, by: By) -> Tensor:
        x = self.inputs.x
        if self.is_native:
            y = torch.empty_like(x)
            if self.runs(native.kernels.normalize, {"y": y}, by):
                return y
        inputs = self.wide_inputs()
        return definition.normalize(self.problem, inputs, self.moments_of(by)).to(x.dtype)

    def gradients(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Of scale, bias, x and residual."""
        x, scale, bias = self.inputs[:3]
        if self.is_native:
            dscale = None if scale is None else torch.empty_like(scale)
            dbias = None if bias is None else torch.empty_like(bias)
            dx = torch.empty_like(x)
            dresidual = torch.empty_like(x) if with_dresidual else None
            operands = {"dscale": dscale, "dbias": dbias, "dx": dx, "dresidual": dresidual}
            if self.runs(native.kernels.batch_norm_gradients, {"dy": dy, **operands}, by):
                return dscale, dbias, dx, dresidual
        sums = self.gradient_sums(by, dy)
        dx, dresidual = self.input_gradient_by_definition(by, sums, dy, with_dresidual)
        return *self.parameter_gradients(sums), dx, dresidual

    def gradient_sums(self, by: By, dy: Tensor) -> Tensor:
        if self.is_native:
            sums = self.rows(2)
            if self.runs(native.kernels.gradient_sums, {"dy": dy, "sums": sums}, by):
                return sums
        self.check("dy", dy)
        inputs, moments = self.wide_inputs(), self.moments_of(by)
        dy = dy.to(inputs.x.dtype)
        found = definition.gradient_sums(self.problem, inputs, moments, dy)
        return torch.stack(found).to(statistics_dtype(inputs.x))

    def input_gradient(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """By sums of scale·g, which those of several processes are."""
        x = self.inputs.x
        if self.is_native:
            dx = torch.empty_like(x)
            dresidual = torch.empty_like(x) if with_dresidual else None
            operands = {"dy": dy, "sums": sums, "dx": dx, "dresidual": dresidual}
            if self.runs(native.kernels.input_gradient, operands, by):
                return dx, dresidual
        return self.input_gradient_by_definition(by, sums, dy, with_dresidual, are_scaled=True)

    def input_gradient_by_definition(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool, *, are_scaled: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        x = self.inputs.x
        self.check("dy", dy)
        inputs, moments = self.wide_inputs(), self.moments_of(by)
        dtype = inputs.x.dtype
        dx, g = definition.input_gradient(
            self.problem,
            inputs,
            moments,
            dy.to(dtype),
            *sums.to(dtype).unbind(0),
            are_scaled=are_scaled,
        )
        return dx.to(x.dtype), g.to(x.dtype) if with_dresidual else None

    def parameter_gradients(self, sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of scale and bias, in their dtypes."""
        sum_g, sum_g_x_hat = sums.unbind(0)
        scale, bias = self.inputs.scale, self.inputs.bias
        return (
            None if scale is None else sum_g_x_hat.to(scale.dtype),
            None if bias is None else sum_g.to(bias.dtype),
        )

    # ---- for the definition

    def check(self, name: str, operand: Tensor | None) -> None:
        """What a kernel looks at itself: an operand that goes with x, in shape and dtype."""
        if operand is None:
            return
        spoken, x_name = self.names.get(name, name), self.names.get("x", "x")
        check_dense(spoken, operand)
        x = self.inputs.x
        if name in _LIKE_X and (operand.shape, operand.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{spoken} must have the shape {tuple(x.shape)} and the dtype {x.dtype} of "
                f"{x_name}, but it has {tuple(operand.shape)} and {operand.dtype}."
            )
        if name in _COPIED and operand.device != x.device:
            raise ValueError(
                f"{spoken} must be on the device {x.device} of {x_name}, but it is on "
                f"{operand.device}."
            )
        if name in _BY_FEATURE:
            expected = feature_shape(self.problem.features, x.shape)
            checks.feature_shape(spoken, operand.shape, expected, x.shape, x_name)
        if name == "weights":
            checks.broadcasts(spoken, operand.shape, x.shape, x_name)

    def wide_inputs(self) -> Inputs:
        for name, each in zip(Inputs._fields, self.inputs, strict=True):
            self.check(name, each)
        dtype = wide(self.inputs.x.dtype)
        x, *others = (None if each is None else each.to(dtype) for each in self.inputs)
        return Inputs(x, *others)

    def statistics_of(self, moments: Moments) -> Tensor:
        dtype = statistics_dtype(self.inputs.x)
        wider = Moments(*(each.to(dtype) for each in moments))
        if self.inputs.x.dtype != torch.float64:
            return torch.stack(tuple(wider.statistics()))
        count, pivot, unit, offset, var = wider
        mean = pivot + unit * offset
        return torch.stack((count, mean, var, (pivot - mean) + unit * offset, unit))

    def moments_of(self, by: By) -> Moments:
        if isinstance(by, Given):
            self.check("mean", by.mean)
            self.check("var", by.var)
        dtype = wide(self.inputs.x.dtype)
        if not isinstance(by, Given) and len(by) == 5:
            count, mean, var, mean_low, unit = by.unbind(0)
            return Moments(count, mean, unit, mean_low / unit, var)
        statistics = Statistics(None, *by) if isinstance(by, Given) else Statistics(*by.unbind(0))
        if statistics.mean.dtype == torch.float64 != dtype:
            return Moments.about(statistics, lambda each: each.to(dtype), Tensor.detach)
        count, mean, var = statistics
        return Moments(count, mean.to(dtype), None, None, var.to(dtype))

    # ---- for the kernels

    def rows(self, number: int) -> Tensor:
        shape = self.inputs.x.shape
        return _FLOAT64.new_empty(number, *[shape[axis] for axis in self.problem.features])

    def runs(
        self,
        kernel: Any,
        operands: dict[str, Any],
        by: By | None = None,
        rate: float | None = None,
    ) -> bool:
        """Let the kernel do it, and say whether it could; native/_cpu.pyi says what each takes.

        An operand that it can't take as it lies in memory is copied for it, if it is in memory.
        """
        x, scale, bias, residual, weights = self.inputs
        features, eps, activation, _ = self.problem
        if weights is not None:
            weights = weights.expand(weights_shape(features, weights.shape, x.shape))
        has_parameters = kernel is not native.kernels.statistics
        operands["x"], operands["weights"] = x, weights
        if has_parameters:
            operands["scale"], operands["bias"], operands["residual"] = scale, bias, residual
        if isinstance(by, Given):
            operands["mean"], operands["var"] = by
        elif by is not None:
            operands["statistics"] = by
        for name, each in operands.items():
            # What the record of a tensor does not say: some views negate what is in memory.
            if each is not None and each.is_neg():
                check_dense(self.names.get(name, name), each)
                operands[name] = each.resolve_neg()
        operands["features"], operands["team"] = features, _TEAM
        if has_parameters:
            operands["eps"], operands["activation"] = eps, activation
        if rate is not None:
            operands["rate"] = rate
        given = operands
        while (name := kernel(**operands)) is not None:
            self.check(name, given[name])
            if name not in _COPIED or operands[name] is not given[name]:
                return False
            if name == "x" and native.kernels.layout(x.shape, features) is None:
                return False  # whatever copy
            operands = {**operands, name: _COPIED[name](operands["x"], given[name])}
        return True


def fit(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether they surely go with the channels, axis 1; a kernel knows sooner than PyTorch says."""
    return native.kernels is not None and native.kernels.fit(x, *parameters)


def _like(x: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(tensor)


def _weights_like(x: Tensor, weights: Tensor) -> Tensor:
    """A copy with one weight for each row, or for each element, in the order of x in memory."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda axis: -strides[axis])
    back = sorted(range(x.ndim), key=order.__getitem__)
    return weights.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _own(x: Tensor, tensor: Tensor) -> Tensor:
    return tensor.clone()


_LIKE_X = ("residual", "dy")
_BY_FEATURE = ("scale", "bias", "mean", "var")
# What a kernel only reads, and how to copy it.
_COPIED = {
    "weights": _weights_like,
    **dict.fromkeys(_LIKE_X, _like),
    **dict.fromkeys(("x", *_BY_FEATURE), _own),
}
_FLOAT64 = torch.empty(0, dtype=torch.float64, device="cpu")  # to make others like it
_DTYPES: set[torch.dtype] = set()
_TEAM = None
if native.kernels is not None:
    if all(map(native.kernels.register_tensor, (Tensor, torch.nn.Parameter))):
        _DTYPES = {getattr(torch, name) for name in native.kernels.DTYPES}
    # The threads of PyTorch's own operations: they go on looking for work for a while after each,
    # and another pool's would wait for them (csrc/system/parallel.h).
    _TEAM = native.kernels.team(operations_library())


def _report() -> str:
    if not _DTYPES:
        return "not served, as this PyTorch has no DLPack exchange table; 2.10 and newer have"
    if _TEAM is None:
        return "served on the pool's threads, as PyTorch's own were not found"
    return "served on PyTorch's own threads"


native.register_report("PyTorch", _report)
