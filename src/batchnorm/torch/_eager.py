"""The stages by operations that nothing looks at, in few passes over memory.

They write over tensors that are read no more, so what they compute can't be differentiated. All is
computed from u = (x − pivot) / unit, whose pivot is near the mean, and whose unit is a power of two
near √(var + eps): u is rounded once, is as large as x̂, and no factor that it meets is out of range.

What goes with x is not copied to a wider dtype: an operation on a GPU casts what it reads.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import activate, through_activation
from ..definition import Inputs
from ..layout import Axes, along, per_feature, reduced_axes
from ..moments import Moments
from ._operations import By, Call, Operations, statistics_dtype, wide
from ._running import Running, rounded

# The bits of a number that are its exponent.
_EXPONENT = {torch.float32: (torch.int32, 0x7F8 << 20), torch.float64: (torch.int64, 0x7FF << 52)}

# Where var_mean takes longer than sums: it divides for every element.
_BY_SUMS = {"cpu"}


def serves(call: Call, inputs: Inputs) -> bool:
    """Masks are left to the definition, and so is where there is nothing to add up."""
    x, is_reduced = inputs.x, len(call.problem.features) < inputs.x.ndim
    return inputs.weights is None and is_reduced and x.numel() > 0


class _Coordinate(NamedTuple):
    """x̂ = (u − offset) / deviation; all of the feature shape."""

    pivot: Tensor
    unit: Tensor
    offset: Tensor
    deviation: Tensor


class Eager(Operations):
    """The stages of one call for which this `serves`."""

    __slots__ = ()

    def forward(self, running: Running | None, with_statistics: bool) -> tuple[Tensor, Any]:
        u, moments = self.centered()
        _, pivot, unit, offset, _ = moments
        coordinate = _Coordinate(pivot, unit, offset, self.deviation(moments))
        y, statistics = self.output(coordinate, u), self.statistics_of(moments)
        if running is not None:
            running.move(statistics, watched=True)
        return y, statistics

    def statistics(self) -> Tensor:
        return rounded(self.statistics_of(self.centered()[1]))

    def normalize(self, by: By) -> Tensor:
        self.check_inputs()
        coordinate = self.coordinate(self.moments_of(by))
        return self.output(coordinate, self.in_coordinate(coordinate.pivot, coordinate.unit))

    def gradients(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        coordinate, count, u, g = self.backward_operands(by, dy)
        sums = self.sums(coordinate, u, g)
        dx = self.from_sums(coordinate, count, u, g, sums, are_scaled=False)
        dresidual = g.to(dx.dtype) if with_dresidual else None
        return *self.parameter_gradients(sums), dx, dresidual

    def gradient_sums(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        coordinate, _, u, g = self.backward_operands(by, dy)
        return self.sums(coordinate, u, g), None

    def input_gradient(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool, dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        coordinate, count, u, g = self.backward_operands(by, dy)
        dx = self.from_sums(coordinate, count, u, g, sums, are_scaled=True)
        return dx, g.to(dx.dtype) if with_dresidual else None

    # ---- along x

    def centered(self) -> tuple[Tensor, Moments]:
        """u and its moments.

        A first mean and variance, in the dtype of x, are good enough for the pivot and the unit.
        """
        self.check_inputs()
        x, features = self.inputs.x, self.problem.features
        axes, dtype = reduced_axes(features, x.ndim), wide(x.dtype)
        found = _var_mean(x, axes, may_overflow=x.dtype == torch.float64)
        var, mean = (per_feature(features, each).to(dtype) for each in found)
        pivot = torch.where(mean.isfinite(), mean, 0.0)
        # In this unit, neither do squares overflow nor do they vanish that did overflow.
        large = torch.finfo(x.dtype).max ** 0.75
        deviation = torch.where(var.isfinite(), torch.sqrt(var + self.problem.eps), large)
        unit = _unit_near(deviation, pivot)
        u = self.in_coordinate(pivot, unit)
        var, offset = (per_feature(features, each) for each in _var_mean(u, axes))
        count = torch.full_like(pivot, x.numel() // pivot.numel())
        return u, Moments(count, pivot, unit, offset, var)

    def in_coordinate(self, pivot: Tensor, unit: Tensor) -> Tensor:
        """u = (x − pivot) / unit."""
        x, inverse = self.inputs.x, 1.0 / unit
        # With a place for its result, it is left alone by autocast, which would copy x.
        u = torch.empty_like(x, dtype=wide(x.dtype))
        return torch.addcmul(self.along(-pivot * inverse), x, self.along(inverse), out=u)

    def output(self, coordinate: _Coordinate, u: Tensor) -> Tensor:
        """act(x̂ · scale + bias + residual), in the place of u."""
        x, _, _, residual, _ = self.inputs
        activation = self.problem.activation
        # relu may as well follow the rounding to the dtype of x.
        out = self.place_for_result(u) if activation in {None, "relu"} else u
        z = self.affine(coordinate, u, out if residual is None else u)
        if residual is not None:
            z = torch.add(z, residual, out=out)
        if activation == "relu":
            return torch.relu_(z.to(x.dtype))
        return activate(z, activation).to(x.dtype)

    def affine(self, coordinate: _Coordinate, u: Tensor, out: Tensor | None) -> Tensor:
        """x̂ · scale + bias."""
        slope, bias = self.slope(coordinate.deviation), self.inputs.bias
        shift = -coordinate.offset * slope
        if bias is not None:
            shift = shift + bias.to(u.dtype)
        return torch.addcmul(self.along(shift), u, self.along(slope), out=out)

    def backward_operands(
        self, by: By, dy: Tensor
    ) -> tuple[_Coordinate, Tensor | None, Tensor, Tensor]:
        """The coordinate, the count, u and g = dy · act′."""
        self.check_inputs()
        self.check("dy", dy)
        moments = self.moments_of(by)
        coordinate = self.coordinate(moments)
        u = self.in_coordinate(coordinate.pivot, coordinate.unit)
        if self.problem.activation is None:
            return coordinate, moments.count, u, dy
        z = self.affine(coordinate, u, None)
        if self.inputs.residual is not None:
            z += self.inputs.residual
        return coordinate, moments.count, u, through_activation(dy, z, self.problem.activation)

    def sums(self, coordinate: _Coordinate, u: Tensor, g: Tensor) -> Tensor:
        """Σ g and Σ g·x̂."""
        axes = reduced_axes(self.problem.features, u.ndim)
        sum_g = torch.sum(g, axes, dtype=u.dtype)
        sum_g_u = torch.sum(g * u, axes)
        sum_g_x_hat = (sum_g_u - coordinate.offset * sum_g) / coordinate.deviation
        return torch.stack((sum_g, sum_g_x_hat)).to(statistics_dtype(u))

    def from_sums(
        self,
        coordinate: _Coordinate,
        count: Tensor | None,
        u: Tensor,
        g: Tensor,
        sums: Tensor,
        *,
        are_scaled: bool,
    ) -> Tensor:
        """dx, in the place of u; `are_scaled`: whether the sums are of scale·g."""
        out, dtype = self.place_for_result(u), self.inputs.x.dtype
        deviation = coordinate.deviation * coordinate.unit
        deviation = deviation.clamp(max=torch.finfo(u.dtype).max)
        # dx may be finite where slope·g is not; of half precision only if next to nothing.
        unit = _power_of_two(deviation) if dtype == u.dtype else None
        if unit is not None:
            deviation = deviation / unit
        slope = self.slope(deviation)
        if count is None:
            dx = torch.mul(g, self.along(slope), out=out)
        else:
            factor = -1.0 / deviation if are_scaled else -slope
            mean_g, mean_g_x_hat = (sums.to(u.dtype) / count).unbind(0)
            of_u = mean_g_x_hat / coordinate.deviation
            of_1 = mean_g - coordinate.offset * of_u
            of_u, of_1 = (self.along(factor * each) for each in (of_u, of_1))
            share = torch.addcmul(of_1, u, of_u, out=u)
            dx = torch.addcmul(share, g, self.along(slope), out=out)
        return dx.to(dtype) if unit is None else dx.mul_(self.along(1.0 / unit))

    def place_for_result(self, u: Tensor) -> Tensor:
        """Where the last operation writes, which rounds to the dtype of x.

        On Apple's GPUs an operation may round before it computes (in PyTorch 2.10 to 2.13), so that
        there the rounding is one more.
        """
        x = self.inputs.x
        return u if x.dtype == u.dtype or x.device.type == "mps" else torch.empty_like(x)

    def along(self, parameter: Tensor) -> Tensor:
        reshaped: Tensor = along(self.problem.features, parameter, self.inputs.x)
        return reshaped

    # ---- for each feature

    def coordinate(self, moments: Moments) -> _Coordinate:
        _, pivot, unit, offset, _ = moments
        deviation = self.deviation(moments)
        if unit is None:
            unit, offset = torch.ones_like(deviation), torch.zeros_like(deviation)
        near = _unit_near(deviation * unit, pivot)
        ratio = unit / near
        return _Coordinate(pivot, near, offset * ratio, deviation * ratio)

    def deviation(self, moments: Moments) -> Tensor:
        """√(var + eps), in units of unit."""
        deviation = torch.sqrt(moments.var_plus(self.problem.eps))
        if moments.unit is None:
            return deviation
        # The square of the latter may vanish.
        return torch.maximum(deviation, math.sqrt(self.problem.eps) / moments.unit)

    def slope(self, deviation: Tensor) -> Tensor:
        scale = self.inputs.scale
        return 1.0 / deviation if scale is None else scale.to(deviation.dtype) / deviation


def _var_mean(x: Tensor, axes: Axes, *, may_overflow: bool = False) -> tuple[Tensor, Tensor]:
    """`may_overflow`: whether a sum in float64 may, of elements that do not."""
    if x.device.type not in _BY_SUMS or may_overflow:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return var, mean
    dtype = wide(x.dtype)
    mean = torch.mean(x, axes, keepdim=True, dtype=torch.float64).to(dtype)
    squares = (x - mean).square_()
    return torch.mean(squares, axes, keepdim=True, dtype=torch.float64).to(dtype), mean


def _unit_near(deviation: Tensor, pivot: Tensor) -> Tensor:
    """A power of two near the deviation, in which the pivot, and so a constant, is finite."""
    largest = torch.finfo(pivot.dtype).max
    near = torch.maximum(deviation, pivot.abs() / math.sqrt(largest))
    return _power_of_two(near.clamp(4 / largest, largest / 4))


def _power_of_two(positive: Tensor) -> Tensor:
    """The one at or below a number, exactly."""
    kind, exponent = _EXPONENT[positive.dtype]
    return (positive.view(kind) & exponent).view(positive.dtype)
