"""The stages of one call by kernels."""

from typing import Any

import torch
from torch import Tensor

from ...definition import Inputs
from ...layout import weights_shape
from .._operations import By, Call, Coefficients, Given, Operations
from .._running import Running, rounded
from .launching import Launch, has_memory, run
from .layout import are_neighbours
from .operands import Moving, Operands
from .plans import BY_ELEMENT, BY_ROW, BY_ROW_AND_PLACE, Plan, plan_of

_NOTHING = Moving()


class Kernels(Operations):
    """The stages by kernels; by operations where none can take an operand.

    All tensors of a stage are there before its first kernel is launched, and of its kernels all are
    launched or none, so that operations find everything as it was.
    """

    __slots__ = ("_operands",)

    def __init__(self, call: Call, inputs: Inputs, x: Tensor, plan: Plan) -> None:
        """`x` is that of the inputs, or a copy of it with this plan."""
        super().__init__(call, inputs)
        self._operands = self._looked_at(x, plan)

    def forward(self, running: Running | None, with_statistics: bool) -> tuple[Tensor, Any]:
        given = self._operands
        moving = None
        if running is not None and not running.may_be_empty:
            moving = _moving(running, given)
        moves_later = running is not None and moving is None
        statistics = given.new_statistics(3) if with_statistics or moves_later else None
        y, table = torch.empty_like(given.x), given.new_table()
        if not run(given.x.device, given.forward(y, statistics, table, moving or _NOTHING)):
            return super().forward(running, with_statistics)
        if running is not None and statistics is not None and moves_later:
            self._move(running, statistics)
        return y, Coefficients(statistics, table)

    def statistics(self) -> Tensor:
        given = self._operands
        statistics = given.new_statistics(3)
        if run(given.x.device, given.moments(statistics, None, _NOTHING)):
            return statistics
        return super().statistics()

    def prepared(self, statistics: Tensor, running: Running | None) -> Any:
        given = self._operands
        if running is not None:
            self._move(running, statistics)
        table, launches = self._table(given, statistics)
        return Coefficients(statistics, table) if run(given.x.device, launches) else statistics

    def normalize(self, by: By) -> Tensor:
        given = self._operands
        if _fit(by, given):
            table, launches = self._table(given, by)
            y = torch.empty_like(given.x)
            if run(given.x.device, [*launches, given.normalize(table, y)]):
                return y
        return super().normalize(by)

    def gradients(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        given = self._operands
        if not _fit(by, given):
            return super().gradients(by, dy, with_dresidual)
        for name, each in (("scale", given.scale), ("bias", given.bias)):
            if each is not None and not has_memory(each, each.data_ptr()):  # which no kernel reads
                self.check(name, each)
        table, launches = self._table(given, by)
        dx = torch.empty_like(given.x)
        dresidual = torch.empty_like(dx) if with_dresidual else None
        dscale = None if given.scale is None else torch.empty_like(given.scale)
        dbias = None if given.bias is None else torch.empty_like(given.bias)
        launches += given.gradients(
            *(self._like("dy", dy, given.x, given.plan), table, not isinstance(by, Given)),
            *(dx, dresidual, (dscale, dbias)),
        )
        if run(given.x.device, launches):
            return dscale, dbias, dx, dresidual
        return super().gradients(by, dy, with_dresidual)

    def gradient_sums(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        given = self._operands
        if _fit(by, given):
            table, launches = self._table(given, by)
            sums = given.new_statistics(2)
            dresidual = torch.empty_like(given.x) if with_dresidual else None
            like_x = self._like("dy", dy, given.x, given.plan)
            launches += given.gradient_sums(like_x, table, dresidual, (sums, None, None, None))
            if run(given.x.device, launches):
                return sums, dresidual
        return super().gradient_sums(by, dy, with_dresidual)

    def input_gradient(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool, dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        given = self._operands
        if _fit(by, given) and with_dresidual == (dresidual is not None):
            table, launches = self._table(given, by)
            shares, dx = given.new_table(2), torch.empty_like(given.x)
            like_x = self._like("dy", dy, given.x, given.plan)
            launches.append(given.shares_of(sums.contiguous(), table, shares))
            launches.append(
                given.input_gradient(like_x, table, shares, dx, dresidual, are_scaled=True)
            )
            if run(given.x.device, launches):
                return dx, dresidual
        return super().input_gradient(by, sums, dy, with_dresidual, dresidual)

    def _table(self, given: Operands, by: By) -> tuple[Tensor, list[Launch]]:
        """And what is to be launched for it."""
        if isinstance(by, Coefficients):
            return by.table, []
        count, mean, var = (None, *by) if isinstance(by, Given) else rounded(by)
        mean = self._by_feature("mean", mean, given.plan)
        var = self._by_feature("var", var, given.plan)
        table = given.new_table()
        return table, [given.table_of(table, mean, var, count)]

    def _move(self, running: Running, statistics: Tensor) -> None:
        """By one program, which judges the batch as a whole."""
        given = self._operands
        if (moving := _moving(running, given)) is not None:
            *tensors, rate = moving
            skipped = running.skipped
            launch = given.plan.running.on(statistics, *tensors, skipped, numbers=(rate,))
            if run(given.x.device, [launch]):
                return
        running.move(statistics, watched=True)

    # ---- operands are looked at, and copied where they lie otherwise

    def _looked_at(self, x: Tensor, plan: Plan) -> Operands:
        _, scale, bias, residual, weights = self.inputs
        if weights is not None:
            weights, weighting = self._weights(weights, plan)
            plan = plan.with_weights(weighting)
        if scale is not None:
            scale = self._by_feature("scale", scale, plan)
        if bias is not None:
            bias = self._by_feature("bias", bias, plan)
        if residual is not None:
            residual = self._like("residual", residual, x, plan)
        return Operands(plan, x, scale, bias, residual, weights, self.problem.eps)

    def _like(self, name: str, tensor: Tensor, x: Tensor, plan: Plan) -> Tensor:
        if (
            (tensor.shape, tensor.dtype) == (x.shape, x.dtype)
            and tensor.get_device() == x.get_device()
            and (tensor.stride() == x.stride() or plan.is_of(tensor.shape, tensor.stride()))
            and not tensor.is_neg()
        ):
            return tensor
        self.check(name, tensor)
        return torch.empty_like(x).copy_(tensor)

    def _by_feature(self, name: str, tensor: Tensor, plan: Plan) -> Tensor:
        if _is_usable(tensor, plan.layout.feature_shape, self.inputs.x.get_device()):
            return tensor
        self.check(name, tensor)
        return tensor.contiguous().resolve_neg()

    def _weights(self, weights: Tensor, plan: Plan) -> tuple[Tensor, int]:
        """One for each row and place in it, or for each element, in the order of x in memory."""
        self.check("weights", weights)
        x, features = self.inputs.x, self.problem.features
        sizes = weights_shape(features, weights.shape, x.shape)
        if any(sizes[axis] > 1 for axis in features):
            weighting = BY_ELEMENT
        else:
            weighting = BY_ROW if plan.layout.shape.inner == 1 else BY_ROW_AND_PLACE
        if weights.dtype == torch.bool:
            weights = weights.view(torch.uint8)
        elif not weights.is_floating_point():
            weights = weights.to(torch.float64)
        order = plan.layout.order
        order = (*(axis for axis in range(x.ndim) if axis not in order), *order)
        return weights.expand(sizes).permute(order).contiguous().resolve_neg(), weighting


def stages_by_kernels(call: Call, inputs: Inputs) -> Kernels | None:
    """None where kernels can't take x, however it were copied."""
    x, (features, _, activation, _) = inputs.x, call.problem

    def plan_for(x: Tensor) -> Plan | None:
        return plan_of(x.shape, x.stride(), features, x.dtype, activation)

    plan = None if x.is_neg() else plan_for(x)  # a view may negate what is in memory
    if plan is None:
        if not are_neighbours(features, x.shape):
            return None
        Operations(call, inputs).check("x", x)
        x = torch.empty_like(x).copy_(x)  # its axes in the order that they have
        if (plan := plan_for(x)) is None:
            x = x.contiguous()
            plan = plan_for(x)
    return None if plan is None else Kernels(call, inputs, x, plan)


def _fit(by: By, given: Operands) -> bool:
    """Whether it is of as many features, and of the dtype, that x has now."""
    if isinstance(by, Coefficients):
        return by.table.shape[1] == given.plan.channels and by.table.dtype == given.plan.dtype
    return isinstance(by, Given) or by[0].numel() == given.plan.channels


def _moving(running: Running, given: Operands) -> Moving | None:
    """For a kernel; None where only operations can move them."""
    mean, var, batches, rate, *_ = running
    if type(rate) is not float:
        return None
    device, shape = given.x.get_device(), given.plan.layout.feature_shape
    if not (_is_usable(mean, shape, device) and _is_usable(var, shape, device)):
        return None
    for each in (batches, running.skipped):
        if not (each is None or _is_usable(each, (), device)):
            return None
    return Moving(mean, var, batches, rate)


def _is_usable(tensor: Tensor, shape: tuple[int, ...], device: int) -> bool:
    """Whether a kernel can take it as it is."""
    return (
        tensor.shape == shape
        and tensor.get_device() == device
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )
