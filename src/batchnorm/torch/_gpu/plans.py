"""What each kernel is given that is no tensor, in the order in which it takes that."""

from functools import cache, cached_property, lru_cache
from typing import Any

import torch
import triton.language as tl

from ...layout import Axes
from . import kernels, tiles
from .kernels import arithmetic, places
from .launching import Programs
from .layout import Layout, layout_of
from .tiles import Sums, Whole, Writes

_ACTIVATIONS = {
    None: arithmetic.NONE.value,
    "relu": arithmetic.RELU.value,
    "silu": arithmetic.SILU.value,
}
UNWEIGHTED, BY_ROW, BY_ROW_AND_PLACE, BY_ELEMENT = (
    each.value
    for each in (places.UNWEIGHTED, places.BY_ROW, places.BY_ROW_AND_PLACE, places.BY_ELEMENT)
)
# In which no square of a float32, or of a float64, overflows.
_UNIT, _UNIT_OF_FLOAT64 = 2.0**-80, 2.0**-540


class Plan:
    """For all calls on tensors of one layout and dtype: the programs of each kernel."""

    def __init__(
        self,
        layout: Layout,
        features: Axes,
        dtype: torch.dtype,
        activation: str | None,
        weighting: int,
    ) -> None:
        self.given = (layout, features, dtype, activation)
        self.layout, self._features = layout, features
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32  # of arithmetic
        self.channels = layout.shape.channels
        self.whole = tiles.whole(layout.shape, weighting != UNWEIGHTED)
        self._itemsize = dtype.itemsize
        self._weighting, self._activation = weighting, _ACTIVATIONS[activation]
        self._F = tl.float64 if dtype == torch.float64 else tl.float32
        self._unit = _UNIT_OF_FLOAT64 if dtype == torch.float64 else _UNIT
        outer, channels, inner = layout.shape
        self._sizes = (outer, layout.shape.width, inner, channels)
        self.input_gradient = cache(self._input_gradient)  # freed with the plan

    def with_weights(self, weighting: int) -> "Plan":
        return _weighted(self, weighting)

    def is_of(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
        """Whether a tensor of x's shape lies in memory as x does."""
        return layout_of(sizes, strides, self._features) == self.layout

    # ---- one kernel each way

    @cached_property
    def forward(self) -> Programs:
        assert self.whole is not None
        constants = (self._F, self.whole.runs, self._weighting, self._activation, self._unit)
        return self._programs(kernels.forward_kernel, self.whole, self._sizes, constants)

    @cached_property
    def backward(self) -> Programs:
        return self._backward(True)

    @cached_property
    def backward_by_given(self) -> Programs:
        return self._backward(False)

    def _backward(self, of_batch: bool) -> Programs:
        assert self.whole is not None
        constants = (self._F, of_batch, self.whole.runs, self._weighting, self._activation)
        return self._programs(kernels.backward_kernel, self.whole, self._sizes, constants)

    # ---- stage by stage

    @cached_property
    def moments(self) -> Programs:
        sums, (outer, width, inner, _) = self._sums, self._sizes
        numbers = (outer, width, inner, sums.blocks, sums.splits, *sums.cut)
        constants = (self._F, sums.runs, self._weighting, self._unit)
        return self._programs(kernels.moments_kernel, sums, numbers, constants)

    @cached_property
    def merge_moments(self) -> Programs:
        sums, (outer, _, inner, channels) = self._sums, self._sizes
        merge = tiles.merge(channels, self._sets)
        return Programs(
            kernels.merge_moments_kernel,
            merge.programs,
            (channels, self._sets, sums.splits, outer, inner, *sums.cut),
            (self._F, sums.runs, self._weighting, self._unit, merge.channels, merge.sets),
        )

    @cached_property
    def coefficients(self) -> Programs:
        merge = tiles.merge(self.channels, 1)
        numbers, constants = (self.channels,), (self._F, merge.channels)
        return Programs(kernels.coefficients_kernel, merge.programs, numbers, constants)

    @cached_property
    def running(self) -> Programs:
        at_once = min(1024, tiles.power_of_two(self.channels))
        return Programs(kernels.running_kernel, 1, (self.channels,), (at_once,))

    @cached_property
    def normalize(self) -> Programs:
        constants = (self._F, self._activation, self._weighting != UNWEIGHTED)
        return self._writing(kernels.normalize_kernel, constants)

    @cached_property
    def gradient_sums(self) -> Programs:
        sums = self._sums
        numbers = (*self._sizes, sums.blocks, sums.splits, *sums.cut)
        constants = (self._F, sums.runs, self._weighting, self._activation)
        return self._programs(kernels.gradient_sums_kernel, sums, numbers, constants)

    @cached_property
    def merge_sums(self) -> Programs:
        merge = tiles.merge(self.channels, self._sets)
        constants = (self._weighting, merge.channels, merge.sets)
        numbers = (self.channels, self._sets)
        return Programs(kernels.merge_sums_kernel, merge.programs, numbers, constants)

    @cached_property
    def shares(self) -> Programs:
        merge = tiles.merge(self.channels, 1)
        numbers, constants = (self.channels,), (self._weighting, merge.channels)
        return Programs(kernels.shares_kernel, merge.programs, numbers, constants)

    def _input_gradient(self, of_g: bool, are_scaled: bool) -> Programs:
        """`of_g`: of what has been through the activation."""
        activation = _ACTIVATIONS[None] if of_g else self._activation
        constants = (self._F, self._weighting, activation, are_scaled)
        return self._writing(kernels.input_gradient_kernel, constants)

    @property
    def holds_g(self) -> bool:
        """Whether dy, once it has been through the activation, is not rounded in x's dtype."""
        return self._itemsize >= 4 or self._activation != _ACTIVATIONS["silu"]

    # ---- their sizes

    def partial_sums(self, planes: int) -> tuple[int, int, int]:
        """The shape of what programs that sum leave to those that merge."""
        return planes, self._columns, self._sums.splits

    @cached_property
    def _sums(self) -> Sums:
        return tiles.sums(self.layout.shape, self._itemsize, self._weighting != UNWEIGHTED)

    @property
    def _columns(self) -> int:
        return self.channels if self._sums.runs else self.layout.shape.width

    @property
    def _sets(self) -> int:
        """Of partial sums, for each channel."""
        return self._columns // self.channels * self._sums.splits

    def _writing(self, kernel: Any, constants: tuple[Any, ...]) -> Programs:
        writes = tiles.writes(self.layout.shape, self._itemsize)
        numbers = (*self._sizes, writes.blocks, writes.rows_each)
        return self._programs(kernel, writes, numbers, constants)

    def _programs(
        self,
        kernel: Any,
        grid: Whole | Sums | Writes,
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> Programs:
        """Of a kernel over x, the last constants of which are VECTOR, WIDE, ROWS and COLUMNS."""
        shape = self.layout.shape
        vector = tiles.vector(shape.inner if grid.runs else shape.width, self._itemsize)
        is_wide = tiles.is_wide(shape, grid.rows)
        constants = (*constants, vector, is_wide, grid.rows, grid.columns)
        return Programs(kernel, grid.programs, numbers, constants, grid.threads)


@lru_cache(maxsize=4096)
def _weighted(plan: Plan, weighting: int) -> Plan:
    return Plan(*plan.given, weighting)


@lru_cache(maxsize=4096)
def plan_of(
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    features: Axes,
    dtype: torch.dtype,
    activation: str | None,
) -> Plan | None:
    """None where x has no layout that kernels know."""
    layout = layout_of(sizes, strides, features)
    return None if layout is None else Plan(layout, features, dtype, activation, UNWEIGHTED)
