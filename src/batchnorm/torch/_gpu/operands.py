"""The inputs of a call as kernels take them, and the launches of each stage on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import TABLE_ROWS
from .launching import Launch
from .plans import Plan


class Moving(NamedTuple):
    """Running statistics that a kernel moves, or none; the variance has correction 1."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    rate: float = 0.0


class Operands(NamedTuple):
    """All in memory in the order of x, which is without gaps."""

    plan: Plan
    x: Tensor
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    weights: Tensor | None
    eps: float

    # ---- what kernels write

    def new_statistics(self, number: int) -> Tensor:
        """Rows of the feature shape, in float64."""
        shape = (number, *self.plan.layout.feature_shape)
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)

    def new_table(self, rows: int = TABLE_ROWS) -> Tensor:
        shape = (rows, self.plan.channels)
        return torch.empty(shape, dtype=self.plan.dtype, device=self.x.device)

    def new_partial_sums(self, planes: int) -> Tensor:
        shape = self.plan.partial_sums(planes)
        return torch.empty(shape, dtype=self.plan.dtype, device=self.x.device)

    # ---- the stages

    def forward(
        self, y: Tensor, statistics: Tensor | None, table: Tensor, moving: Moving
    ) -> list[Launch]:
        if self.plan.whole is None:
            return [*self.moments(statistics, table, moving), self.normalize(table, y)]
        *running, rate = moving
        return [
            self.plan.forward.on(
                *(self.x, self.residual, self.weights, self.scale, self.bias),
                *(y, statistics, table, *running),
                numbers=(rate, self.eps),
            )
        ]

    def moments(
        self, statistics: Tensor | None, table: Tensor | None, moving: Moving
    ) -> list[Launch]:
        partial_sums = self.new_partial_sums(3 if self.weights is None else 4)
        *running, rate = moving
        return [
            self.plan.moments.on(self.x, self.weights, partial_sums),
            self.plan.merge_moments.on(
                *(partial_sums, statistics, table, *running, self.scale, self.bias),
                numbers=(rate, self.eps),
            ),
        ]

    def table_of(self, table: Tensor, mean: Tensor, var: Tensor, count: Tensor | None) -> Launch:
        return self.plan.coefficients.on(
            mean, var, count, table, self.scale, self.bias, numbers=(self.eps,)
        )

    def normalize(self, table: Tensor, y: Tensor) -> Launch:
        return self.plan.normalize.on(self.x, self.residual, table, y)

    def gradients(
        self,
        dy: Tensor,
        table: Tensor,
        of_batch: bool,
        dx: Tensor,
        dresidual: Tensor | None,
        of_parameters: tuple[Tensor | None, Tensor | None],
    ) -> list[Launch]:
        """`of_batch`: whether the statistics in the table depend on x."""
        needs_no_sums = not of_batch and all(each is None for each in (dresidual, *of_parameters))
        if self.plan.whole is None and needs_no_sums:
            return [self.input_gradient(dy, table, None, dx, None)]
        if self.plan.whole is None:
            shares = self.new_table(2) if of_batch else None
            outputs = (None, *of_parameters, shares)
            return [
                *self.gradient_sums(dy, table, dresidual, outputs),
                self.input_gradient(dy, table, shares, dx, dresidual),
            ]
        programs = self.plan.backward if of_batch else self.plan.backward_by_given
        inputs = (self.x, dy, self.residual, self.weights, table)
        return [programs.on(*inputs, dx, dresidual, *of_parameters)]

    def gradient_sums(
        self,
        dy: Tensor,
        table: Tensor,
        dresidual: Tensor | None,
        outputs: tuple[Tensor | None, ...],
    ) -> list[Launch]:
        """outputs: sums, dscale, dbias, shares"""
        partial_sums = self.new_partial_sums(2)
        inputs = (self.x, dy, self.residual, self.weights, table)
        return [
            self.plan.gradient_sums.on(*inputs, dresidual, partial_sums),
            self.plan.merge_sums.on(partial_sums, table, *outputs),
        ]

    def shares_of(self, sums: Tensor, table: Tensor, shares: Tensor) -> Launch:
        return self.plan.shares.on(sums, table, shares)

    def input_gradient(
        self,
        dy: Tensor,
        table: Tensor,
        shares: Tensor | None,
        dx: Tensor,
        g: Tensor | None,
        *,
        are_scaled: bool = False,
    ) -> Launch:
        """By g in the place of dy, if the sums have left it.

        `are_scaled`: the sums are of scale·g, as those of several processes.
        """
        plan, residual = self.plan, self.residual
        of_g = g is not None and plan.holds_g
        if g is not None and of_g:
            dy, residual = g, None
        programs = plan.input_gradient(of_g, are_scaled)
        return programs.on(self.x, dy, residual, self.weights, table, shares, dx)
