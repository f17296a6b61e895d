"""The stages, by the native operation where it serves, else by MLX's own operations.

Arrays come as they are; y is in the dtype of x or in the one of computation, statistics in that.
"""

from typing import Any

import mlx.core as mx

from .. import definition
from ..definition import Inputs, Problem
from ..moments import Statistics
from . import _native, _operations
from ._native import Operands


def batch_norm(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> tuple[mx.array, Statistics]:
    if group is None and _native.serves(problem, inputs):
        y, found = _native.batch_norm(problem, inputs)
        return y, _narrow(found)
    return _operations.batch_norm(problem, inputs, group)


def training_step(
    problem: Problem,
    inputs: Inputs,
    mean: mx.array,
    var: mx.array,
    *,
    rate: float | mx.array,
    correction: int,
) -> tuple[mx.array, ...]:
    """y, and the running mean and variance moved by the statistics of x."""
    if _native.serves(problem, inputs):
        y, found = _native.batch_norm(problem, inputs)
        if isinstance(rate, float):
            new = _native.update_running(mean, var, found, rate=rate, correction=correction)
        else:
            found = _narrow(found)
            new = definition.update_running(mean, var, found, rate=rate, correction=correction)
        return y, *new
    return _operations.training_step(problem, inputs, mean, var, rate=rate, correction=correction)


def normalize(problem: Problem, inputs: Inputs, mean: mx.array, var: mx.array) -> mx.array:
    """As in evaluation, where weights say only what takes no part in a gradient."""
    if _native.serves(problem, inputs):
        return _native.normalize(problem, inputs, mean, var)
    return _operations.normalize(problem, inputs, mean, var)


def statistics(
    problem: Problem, inputs: Inputs, group: mx.distributed.Group | None = None
) -> Statistics:
    if group is None and _native.serves(problem, inputs):
        return _narrow(_native.statistics(problem, inputs))
    return _operations.statistics(problem, inputs, group)


def _narrow(statistics: Statistics) -> Statistics:
    return Statistics(*[each.astype(mx.float32) for each in statistics])


def _wide(statistics: Statistics) -> list[mx.array]:
    return [each.astype(mx.float64) for each in statistics]


# ---- derivatives of the native operation that are no stage


def _by_operations(
    kind: str,
    operands: tuple[mx.array | None, ...],
    features: tuple[int, ...],
    eps: float,
    activation: str,
    rate: float,
    correction: float,
) -> tuple[mx.array, ...]:
    """What the native operation computes, by MLX's own operations, which have derivatives."""
    problem = Problem(features, eps, activation or None)
    given: Any = Operands(*operands)  # of which those are arrays that the stage has
    if kind == "gradients":
        return _gradients(problem, given)
    if kind == "update_running":
        of_batch = Statistics(given.count, given.mean, given.var)
        means = given.running_mean, given.running_var
        new = definition.update_running(*means, of_batch, rate=rate, correction=int(correction))
        return tuple([each.astype(old.dtype) for each, old in zip(new, means, strict=True)])
    inputs = Inputs(given.x, given.scale, given.bias, given.residual, given.weights)
    if kind == "statistics":
        return tuple(_wide(_operations.statistics(problem, inputs)))
    if kind == "normalize":
        y = _operations.normalize(problem, inputs, given.mean, given.var)
        return (y.astype(given.x.dtype),)
    y, found = _operations.batch_norm(problem, inputs)
    return y.astype(given.x.dtype), *_wide(found)


def _gradients(problem: Problem, given: Any) -> tuple[mx.array, ...]:
    is_of_batch = given.count is not None
    names = ["x", "scale", "bias", "residual", *([] if is_of_batch else ["mean", "var"])]
    names = [name for name in names if getattr(given, name) is not None]

    def forward(*arrays: mx.array) -> list[mx.array]:
        operands = given._replace(**dict(zip(names, arrays, strict=True)))
        kind = "batch_norm" if is_of_batch else "normalize"
        options = problem.features, problem.eps, problem.activation or ""
        y, *found = _by_operations(kind, operands, *options, 0.0, 0)
        return [y, *found[1:]]  # nothing goes through the count

    cotangents = [given.dy, given.dmean, given.dvar] if is_of_batch else [given.dy]
    _, gradients = mx.vjp(forward, [getattr(given, name) for name in names], cotangents)
    return tuple(gradients)


_native.set_definition(_by_operations)
