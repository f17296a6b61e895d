"""Batch normalization with derivatives, by the stages on tensors.

Autograd sees a function with a backward pass of its own, `_Output`. Whatever else looks into a
computation sees the definition's plain operations, which have derivatives of every order:
torch.compile, torch.export, torch.func, forward-mode derivatives, tracing, subclasses of Tensor;
and autograd, where the backward pass is itself differentiated.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..definition import Inputs, takes_part
from . import _compat
from ._operations import Call, Given, statistics_by
from ._running import Running
from ._stages import stages_of


def forward(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y and the batch's statistics, both of which can be differentiated."""
    watched = _needs_operations(call, inputs)
    if watched or not _requires_grad(inputs):
        y, by = _forward(call, inputs, watched=watched, with_statistics=True)
        return y, statistics_by(by)
    y, statistics = _apply_with_statistics(call, inputs, None, None, *inputs)
    return y, statistics


def training_step(call: Call, inputs: Inputs, running: Running | None) -> Tensor:
    """y; and running statistics move."""
    watched = _needs_operations(call, inputs)
    if watched or not _requires_grad(inputs):
        return _forward(call, inputs, running=running, watched=watched)[0]
    y: Tensor = _apply(call, inputs, None, running, *inputs)
    return y


def normalize(call: Call, inputs: Inputs, given: Given) -> Tensor:
    """y, normalized by a given mean and variance, which have derivatives, too."""
    watched = _needs_operations(call, inputs)
    moving = given if _requires_grad(given) else ()
    if not watched and (moving or _requires_grad(inputs)):
        y: Tensor = _apply(call, inputs, given, None, *inputs, *moving)
        return y
    return stages_of(call, inputs, watched=watched).normalize(given)


def batch_statistics(call: Call, inputs: Inputs) -> Tensor:
    if call.watched or _requires_grad(inputs[:1]):
        return forward(call, inputs)[1]
    stages = stages_of(call, inputs, watched=False)
    return call.processes.pooled(stages.statistics(), call.problem.eps)


def _needs_operations(call: Call, inputs: Inputs) -> bool:
    return call.watched or (inputs.weights is not None and inputs.weights.requires_grad)


def _requires_grad(tensors: Any) -> bool:
    if torch.is_grad_enabled():
        for each in tensors:
            if each is not None and each.requires_grad:
                return True
    return False


def _forward(
    call: Call,
    inputs: Inputs,
    given: Given | None = None,
    running: Running | None = None,
    *,
    watched: bool,
    with_statistics: bool = False,
) -> tuple[Tensor, Any]:
    """y and what it is normalized by; by plain operations where something else looks on."""
    stages = stages_of(call, inputs, watched=watched)
    if given is not None:
        return stages.normalize(given), given
    if not call.processes.is_shared:
        return stages.forward(running, with_statistics)
    shape = inputs.x.shape
    is_padded = watched and 0 in shape
    if is_padded:
        stages = stages_of(call, _one_that_does_not_count(inputs), watched=True)
    statistics = call.processes.pooled(stages.statistics(), call.problem.eps)
    by = stages.prepared(statistics, running)
    y = stages.normalize(by)
    return y[tuple(slice(size) for size in shape)] if is_padded else y, by


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


class _Output(torch.autograd.Function):
    """`_forward` with a derivative; what it keeps for that is x, and nothing else of its size.

    (Unless there are an activation and a residual: the activation's slope depends on both.)
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _kept_forward(ctx, *arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstatistics: Tensor | None = None) -> Any:
        try:
            return _gradients(ctx, dy, dstatistics)
        except ValueError as error:  # of what was right in the forward pass
            raise RuntimeError(
                "What batch normalization kept for its backward pass is no longer what it was in "
                "the forward pass. Do not assign to the data of an input or parameter in between, "
                "and let hooks for saved tensors give back the shape and dtype that they were "
                f"given. ({error})"
            ) from error


class _OutputAndStatistics(_Output):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        y = _kept_forward(ctx, *arguments, with_statistics=True)
        # An output that its own node held would never be freed.
        return y, statistics_by(ctx.by).detach()


def _kept_forward(
    ctx: Any,
    call: Call,
    inputs: Inputs,
    given: Given | None,
    running: Running | None,
    *tensors: Any,
    with_statistics: bool = False,
) -> Tensor:
    """y; `tensors` are the inputs, and a given mean and variance that have derivatives.

    One by one as well, that is, for autograd to see them.
    """
    x, scale, bias, residual, weights = inputs
    settings: Any = {"watched": False, "with_statistics": with_statistics}
    y, ctx.by = _forward(call, inputs, given, running, **settings)
    if given is not None:
        # Running statistics may have moved on when the backward pass comes.
        ctx.by = Given(given.mean.clone(), given.var.clone())
    ctx.call, ctx.has_residual = call, residual is not None
    ctx.dtypes = scale if scale is None else scale.dtype, bias if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    if call.problem.activation is None:
        residual = None
    ctx.save_for_backward(x, scale, bias, residual, weights, *tensors[5:])
    return y


_apply = _compat.apply_of(_Output)
_apply_with_statistics = _compat.apply_of(_OutputAndStatistics)


def _gradients(ctx: Any, dy: Tensor | None, dstatistics: Tensor | None) -> Any:
    """Of the arguments of `_kept_forward`."""
    x, scale, bias, residual, weights, *moving = ctx.saved_tensors
    inputs, by, call = Inputs(x, scale, bias, residual, weights), ctx.by, ctx.call
    dtypes = scale if scale is None else scale.dtype, bias if bias is None else bias.dtype
    if dtypes != ctx.dtypes:
        raise ValueError(
            f"{call.names.get('scale', 'scale')} and bias had the dtypes {ctx.dtypes}, but they "
            f"have {dtypes}."
        )
    if torch.is_grad_enabled() or dstatistics is not None or moving:
        return None, None, None, None, *_differentiable_gradients(ctx, dy, dstatistics)
    if dy is None:
        return (None,) * 9
    watched = _compat.is_watched(x) or _compat.is_batch_of_autograd(dy)
    stages = stages_of(call, inputs, watched=watched)
    if call.processes.is_shared and not isinstance(by, Given):
        own, found = stages.gradient_sums(by, dy, ctx.has_residual)
        sums = call.processes.sum(own if scale is None else own * scale.to(own.dtype))
        dx, g = stages.input_gradient(by, sums, dy, ctx.has_residual, found)
        dscale, dbias = stages.parameter_gradients(own)
    else:
        dscale, dbias, dx, g = stages.gradients(by, dy, ctx.has_residual)
    return None, None, None, None, dx, dscale, dbias, g, None


def _differentiable_gradients(
    ctx: Any, dy: Tensor | None, dstatistics: Tensor | None
) -> list[Tensor | None]:
    """The backward pass by operations that autograd can differentiate again."""
    tensors: list[Any]
    with torch.enable_grad():
        # Each of its own, so that a tensor that came twice has two gradients.
        tensors = [None if each is None else each.view_as(each) for each in ctx.saved_tensors]
        inputs, given = Inputs(*tensors[:5]), None
        if isinstance(ctx.by, Given):
            given = Given(*(tensors[5:] or ctx.by))
        stages_of(ctx.call, inputs, watched=True).check("dy", dy)
        outputs = _forward(ctx.call, inputs, given, watched=True, with_statistics=True)
        if given is None:
            outputs = outputs[0], statistics_by(outputs[1])
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
            gradients[3] = torch.where(takes_part(inputs.x, inputs.weights), dy, 0.0)
    return gradients
