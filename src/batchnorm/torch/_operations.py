"""The stages as the definition on tensors: where kernels can't serve, and wherever else looks on.

The statistics of a batch are one tensor, float64 where the device has that, so that a mean is not
rounded: its rows are those of `Statistics`, (3, *feature shape). Those that `forward` finds of
doubles have two more, for what of the mean and the variance a double does not hold (`StatisticsOf`
in csrc/stages/batch_norm.h). The sums of a backward pass are the rows Σ g and Σ g·x̂, (2, *feature
shape).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, definition
from ..arrays import namespace
from ..definition import Inputs, Problem
from ..layout import feature_shape
from ..moments import Moments, Statistics
from ._compat import check_dense
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
# Operands that go with x in shape and dtype; that are of the feature shape.
LIKE_X = ("residual", "dy")
BY_FEATURE = ("scale", "bias", "mean", "var")
_OF_ONE_DEVICE = ("weights", "x", *LIKE_X, *BY_FEATURE)


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


class Coefficients(NamedTuple):
    """What kernels of a GPU have made of the batch's statistics and of the parameters.

    And the statistics themselves, where they were asked for.
    """

    statistics: Tensor | None
    table: Tensor


# What an output is normalized by: the batch's statistics, or given ones.
By = Tensor | Coefficients | Given


def statistics_by(by: Tensor | Coefficients) -> Tensor:
    """Count, mean and variance."""
    if isinstance(by, Coefficients):
        assert by.statistics is not None
        return by.statistics
    return rounded(by)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def as_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as weights of this dtype, NaN where they are negative."""
    weights = mask.to(dtype)
    return weights if mask.dtype == torch.bool else torch.where(weights < 0, math.nan, weights)


class Operations:
    """The stages of one call. What they compute can be differentiated.

    scale and bias are of the feature shape and of any dtype, residual is like x, weights broadcast
    and are a mask as it came: of bools, or of numbers.
    """

    __slots__ = ("inputs", "names", "problem")

    def __init__(self, call: Call, inputs: Inputs) -> None:
        self.names, self.problem, self.inputs = call.names, call.problem, inputs

    def forward(self, running: Running | None, with_statistics: bool) -> tuple[Tensor, Any]:
        """y, and what it is normalized by; running statistics move, too.

        `with_statistics`: whether `statistics_by` is to be asked of the latter.
        """
        inputs = self.wide_inputs()
        y, moments = definition.batch_norm(self.problem, inputs, Tensor.detach)
        statistics = self.statistics_of(moments)
        if running is not None:
            running.move(statistics, watched=True)
        return y.to(self.inputs.x.dtype), statistics

    def statistics(self) -> Tensor:
        moments = definition.moments(self.problem, self.wide_inputs(), Tensor.detach)
        return rounded(self.statistics_of(moments))

    def prepared(self, statistics: Tensor, running: Running | None) -> Any:
        """What to normalize by, of several processes' statistics; running ones move, too."""
        if running is not None:
            running.move(statistics, watched=True)
        return statistics

    def normalize(self, by: By) -> Tensor:
        inputs, moments = self.wide_inputs(), self.moments_of(by)
        return definition.normalize(self.problem, inputs, moments).to(self.inputs.x.dtype)

    def gradients(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Of scale, bias, x and residual."""
        sums, _ = Operations.gradient_sums(self, by, dy, False)
        dx, dresidual = self.input_gradient_by_definition(by, sums, dy, with_dresidual)
        return *self.parameter_gradients(sums), dx, dresidual

    def gradient_sums(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """And the residual's gradient, where it is found on the way."""
        self.check("dy", dy)
        inputs, moments = self.wide_inputs(), self.moments_of(by)
        dy = dy.to(inputs.x.dtype)
        found = definition.gradient_sums(self.problem, inputs, moments, dy)
        return torch.stack(found).to(statistics_dtype(inputs.x)), None

    def input_gradient(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool, dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """By sums of scale·g, which those of several processes are; `dresidual` if it is found."""
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
        if name in LIKE_X and (operand.shape, operand.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{spoken} must have the shape {tuple(x.shape)} and the dtype {x.dtype} of "
                f"{x_name}, but it has {tuple(operand.shape)} and {operand.dtype}."
            )
        if name in _OF_ONE_DEVICE and operand.device != x.device:
            raise ValueError(
                f"{spoken} must be on the device {x.device} of {x_name}, but it is on "
                f"{operand.device}."
            )
        if name in BY_FEATURE:
            expected = feature_shape(self.problem.features, x.shape)
            checks.feature_shape(spoken, operand.shape, expected, x.shape, x_name)
        if name == "weights":
            checks.broadcasts(spoken, operand.shape, x.shape, x_name)

    def check_inputs(self) -> None:
        for name, each in zip(Inputs._fields, self.inputs, strict=True):
            self.check(name, each)

    def wide_inputs(self) -> Inputs:
        self.check_inputs()
        dtype, weights = wide(self.inputs.x.dtype), self.inputs.weights
        x, scale, bias, residual = (
            None if each is None else each.to(dtype) for each in self.inputs[:4]
        )
        return Inputs(
            x, scale, bias, residual, None if weights is None else as_weights(weights, dtype)
        )

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
        if isinstance(by, Coefficients):  # of a forward pass by kernels that can't serve now
            by = self.statistics() if by.statistics is None else by.statistics
        if not isinstance(by, Given) and len(by) == 5:
            count, mean, var, mean_low, unit = by.unbind(0)
            return Moments(count, mean, unit, mean_low / unit, var)
        statistics = Statistics(None, *by) if isinstance(by, Given) else Statistics(*by.unbind(0))
        if statistics.mean.dtype == torch.float64 != dtype:
            return Moments.about(statistics, lambda each: each.to(dtype), Tensor.detach)
        count, mean, var = statistics
        return Moments(count, mean.to(dtype), None, None, var.to(dtype))
