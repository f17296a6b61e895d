"""Batch normalization with derivatives, by the stages on tensors.

Autograd sees one function with a backward pass of its own, `_BatchNorm`. Whatever else looks into a
computation sees the definition's plain ATen operations, which have derivatives of every order:
torch.compile, torch.export, torch.func, forward-mode derivatives, tracing, subclasses of Tensor;
and autograd, where the backward pass is itself differentiated.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import definition
from ._stages import (
    Definition,
    Inputs,
    Problem,
    is_of_batch,
    stages_of,
    statistics_dtype,
    wide,
)
from ._sync import Sync


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
    statistics = stages_of(problem, inputs).statistics()
    return statistics if problem.sync is None else problem.sync.pooled(statistics)


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
    stages = Definition(problem, inputs)
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
    stages = stages_of(problem, inputs)
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
            statistics = torch.stack(statistics).to(statistics_dtype(x))
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
        stages = stages_of(problem, inputs, dy)
        if problem.sync is None or not is_of_batch(statistics):
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
        given = None if is_of_batch(statistics) else tuple(statistics[:2])
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
