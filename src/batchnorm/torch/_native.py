"""The stages by kernels on the CPU, for what these can take as it lies in memory."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..layout import weights_shape
from ._compat import check_dense, operations_library
from ._operations import BY_FEATURE, LIKE_X, By, Given, Operations, as_weights, wide
from ._running import Running


def serves(x: Tensor) -> bool:
    return native.kernels is not None and x.is_cpu and x.dtype in _DTYPES


class Native(Operations):
    """The stages of one call; by operations where no kernel can take an operand."""

    __slots__ = ()

    def forward(self, running: Running | None, with_statistics: bool) -> tuple[Tensor, Any]:
        x = self.inputs.x
        y, statistics = torch.empty_like(x), self.rows(5 if x.dtype == torch.float64 else 3)
        operands: dict[str, Any] = {"statistics": statistics, "y": y}
        moving = None
        if running is not None and running.skipped is None:
            moving = running.operands()
        rate = None
        if moving is not None:
            tensors, rate = moving
            operands |= tensors
        if self.runs(native.kernels.batch_norm, operands, rate=rate):
            if running is not None and moving is None:
                running.move(statistics, watched=False)
            return y, statistics
        if running is None:
            return super().forward(None, with_statistics)
        # Running statistics are perhaps in no memory that a kernel can change.
        y, statistics = self.forward(None, with_statistics)
        running.move(statistics, watched=True)
        return y, statistics

    def statistics(self) -> Tensor:
        statistics = self.rows(3)
        if self.runs(native.kernels.statistics, {"statistics": statistics}):
            return statistics
        return super().statistics()

    def prepared(self, statistics: Tensor, running: Running | None) -> Any:
        if running is not None:
            running.move(statistics, watched=False)
        return statistics

    def normalize(self, by: By) -> Tensor:
        y = torch.empty_like(self.inputs.x)
        return y if self.runs(native.kernels.normalize, {"y": y}, by) else super().normalize(by)

    def gradients(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        x, scale, bias = self.inputs[:3]
        dscale = None if scale is None else torch.empty_like(scale)
        dbias = None if bias is None else torch.empty_like(bias)
        dx = torch.empty_like(x)
        dresidual = torch.empty_like(x) if with_dresidual else None
        operands = {"dscale": dscale, "dbias": dbias, "dx": dx, "dresidual": dresidual}
        if self.runs(native.kernels.batch_norm_gradients, {"dy": dy, **operands}, by):
            return dscale, dbias, dx, dresidual
        return super().gradients(by, dy, with_dresidual)

    def gradient_sums(
        self, by: By, dy: Tensor, with_dresidual: bool
    ) -> tuple[Tensor, Tensor | None]:
        sums = self.rows(2)
        if self.runs(native.kernels.gradient_sums, {"dy": dy, "sums": sums}, by):
            return sums, None
        return super().gradient_sums(by, dy, with_dresidual)

    def input_gradient(
        self, by: By, sums: Tensor, dy: Tensor, with_dresidual: bool, dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dx = torch.empty_like(self.inputs.x)
        dresidual = torch.empty_like(dx) if with_dresidual else None
        operands = {"dy": dy, "sums": sums, "dx": dx, "dresidual": dresidual}
        if self.runs(native.kernels.input_gradient, operands, by):
            return dx, dresidual
        return super().input_gradient(by, sums, dy, with_dresidual, dresidual)

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
            weights = as_weights(weights, wide(x.dtype))
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


# What a kernel only reads, and how to copy it.
_COPIED = {
    "weights": _weights_like,
    **dict.fromkeys(LIKE_X, _like),
    **dict.fromkeys(("x", *BY_FEATURE), _own),
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
