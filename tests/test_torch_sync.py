"""Statistics over processes: three of them, and groups of theirs, compared with plain formulas.

Run as a program, this file is one of the processes. It does the checks below in order, all
processes the same, and writes down what became of each.
"""

import copy
import datetime
import json
import os
import subprocess
import sys
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import LARGE_MEAN
from compare import close, near
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bt

PROCESSES, CHANNELS, LENGTH = 3, 3, 2
CHECKS = {}


def in_processes(check):
    CHECKS[check.__name__] = check
    return check


# ---- the truth: the definition as it is written, of the joined batch


def plain(x, scale, bias, mask=None, residual=None, activation=None, eps=1e-5):
    """y, count, mean, var; derivatives of any order are autograd's."""
    weights = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand(x.shape)
    valid = (weights > 0) | x.isfinite()
    x = torch.where(valid, x, 0.0)
    axes, along = (0, 2), (1, -1, 1)
    count = weights.sum(axes)
    divisor = count.clamp(min=1e-30)
    mean = (weights * x).sum(axes) / divisor
    var = (weights * (x - mean.reshape(along)) ** 2).sum(axes) / divisor
    z = (x - mean.reshape(along)) / (var + eps).sqrt().reshape(along)
    z = z * scale.reshape(along) + bias.reshape(along)
    z = z if residual is None else z + residual
    y = {None: lambda: z, "relu": z.relu, "silu": lambda: z * z.sigmoid()}[activation]()
    return torch.where(valid, y, torch.nan), count, mean, var


# How many rows each process has, what mask there is, and an activation with a residual sum.
CASES = {
    "even": ((4, 4, 4), None, None),
    "uneven": ((7, 2, 1), None, "silu"),
    "one empty": ((5, 0, 2), None, "silu"),
    "two empty": ((0, 0, 4), None, None),
    "long": ((900, 300, 1), None, "relu"),
    "masked": ((5, 4, 3), "bool", "silu"),
    "weighed": ((4, 0, 3), "weights", None),
    "one masked out": ((3, 4, 2), "last out", None),
    "one with a mask": ((3, 4, 2), "first only", "silu"),
    "NaN in padding": ((3, 4, 0), "NaN", None),
}


class Batch:
    """Tensors of the whole batch, of one process (`part`), or as leaves for derivatives."""

    def __init__(self, name, dtype, ranks):
        sizes, kind, self.activation = CASES[name]
        generator = torch.Generator().manual_seed(list(CASES).index(name))
        self.sizes, self.ranks = [sizes[rank] for rank in ranks], ranks
        shape = (sum(self.sizes), CHANNELS, LENGTH)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        x, self.dy, self.v, self.residual = (normal(*shape) for _ in range(4))
        x[: self.sizes[0]] += 20  # the processes' own means lie apart
        self.scale, self.bias = normal(CHANNELS), normal(CHANNELS)
        self.mask = None
        if kind is not None:
            self.mask = torch.rand(shape[0], 1, LENGTH, generator=generator) > 0.3
        if kind == "weights":
            self.mask = self.mask * torch.rand(self.mask.shape, generator=generator).to(dtype)
        if kind == "last out":
            self.mask[-self.sizes[-1] :] = False
        if kind == "first only":
            self.mask[self.sizes[0] :] = True
        if kind == "NaN":
            x = torch.where(self.mask, x, torch.nan)
        self.x, self.kind = x, kind

    def part(self, tensor, rank):
        start = sum(self.sizes[: self.ranks.index(rank)])
        return tensor[start : start + self.sizes[self.ranks.index(rank)]]

    def arguments(self, rank=None):
        """x, scale, bias, residual, mask, dy, v: all, or those of a process."""
        tensors = [self.x, self.residual, self.mask, self.dy, self.v]
        if rank is not None:
            tensors = [None if each is None else self.part(each, rank) for each in tensors]
        x, residual, mask, dy, v = tensors
        if rank not in (None, self.ranks[0]) and self.kind == "first only":
            mask = None
        leaves = [x, self.scale, self.bias, residual]
        leaves = [each.detach().clone().requires_grad_() for each in leaves]
        return *leaves, mask, dy, v


def derivatives(function, x, scale, bias, residual, mask, dy, v, share=1.0):
    """What is like x, what is added up over the processes, and what is the same in all."""
    y, *statistics = function(x, scale, bias, mask, residual)
    leaves = (x, scale, bias, residual)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    plainly = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(first[0], (x, scale), v, create_graph=True)
    third = torch.autograd.grad(second[0], x, v)
    _, _, mean, var = function(x, scale, bias, mask, residual)
    of_statistics = torch.autograd.grad(share * (mean.sum() + (var**2).sum()), x)
    like_x = [y, first[0], first[3], plainly[0], plainly[3], second[0], *third, *of_statistics]
    sums = [*first[1:3], *plainly[1:3], second[1]]
    return [[each.detach() for each in group] for group in (like_x, sums, statistics)]


# Derivatives of higher order grow like powers of the standard deviation's inverse.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def do_as_one(name, dtype, group, ranks):
    rank, batch = dist.get_rank(), Batch(name, dtype, ranks)
    wide = Batch(name, torch.float64, ranks)
    for attribute in ("x", "dy", "v", "residual", "scale", "bias"):
        setattr(wide, attribute, getattr(batch, attribute).double())

    def theirs(x, scale, bias, mask, residual):
        return plain(x, scale, bias, mask, residual, batch.activation)

    def ours(x, scale, bias, mask, residual):
        y, statistics = bt.batch_norm(
            x,
            scale,
            bias,
            axis=1,
            mask=mask,
            residual=residual,
            activation=batch.activation,
            sync=group,
        )
        return y, *statistics

    expected = derivatives(theirs, *wide.arguments())
    actual = derivatives(ours, *batch.arguments(rank), share=1 / len(ranks))
    for place, (ours_, theirs_) in enumerate(zip(actual[0], expected[0], strict=True)):
        near(ours_, batch.part(theirs_, rank), TOLERANCE[dtype], f"{name}, like x {place}")
    for place, (ours_, theirs_) in enumerate(zip(actual[1], expected[1], strict=True)):
        dist.all_reduce(ours_, group=None if group is True else group)
        near(ours_, theirs_, TOLERANCE[dtype], f"{name}, sum {place}")
    x, _, _, _, mask, _, _ = batch.arguments(rank)
    alone = bt.batch_statistics(x.detach(), axis=1, mask=mask, sync=group)
    for place, theirs_ in enumerate(expected[2]):
        near(actual[2][place], theirs_, TOLERANCE[dtype], f"{name}, statistics {place}")
        near(alone[place], theirs_, TOLERANCE[dtype], f"{name}, statistics alone {place}")


@in_processes
def three_do_as_one(groups):
    for name in CASES:
        do_as_one(name, torch.float64, True, [0, 1, 2])
    for name in ("uneven", "one empty", "long", "weighed", "NaN in padding"):
        do_as_one(name, torch.float32, True, [0, 1, 2])


@in_processes
def two_do_as_one_and_the_third_alone(groups):
    ranks = [0, 1] if dist.get_rank() < 2 else [2]
    for name in ("uneven", "one empty", "masked", "NaN in padding"):
        if ranks == [0, 1] or CASES[name][0][2] > 1:
            do_as_one(name, torch.float64, groups["own"], ranks)


@in_processes
def layers_do_as_one(groups):
    for group, ranks in ((None, [0, 1, 2]), (groups["own"], groups["ranks"])):
        for name in ("uneven", "one empty", "masked"):
            for momentum in (0.3, None):
                if len(ranks) > 1:
                    layer_does_as_one(group, ranks, name, momentum)


def layer_does_as_one(group, ranks, name, momentum):
    batch, rank = Batch(name, torch.float64, ranks), dist.get_rank()
    options = {"momentum": momentum, "activation": "silu", "dtype": torch.float64}
    ours = bt.SyncBatchNorm(CHANNELS, process_group=group, **options)
    theirs = bt.BatchNorm1d(CHANNELS, **options)
    for step in (1.0, 3.0):
        outputs = []
        for layer, where in ((ours, rank), (theirs, None)):
            x, _, _, residual, mask, dy, _ = batch.arguments(where)
            layer.zero_grad()
            y = layer(step * x, residual=residual, mask=mask)
            y.backward(dy)
            outputs.append((y.detach(), x.grad, residual.grad))
        for place, (actual, expected) in enumerate(zip(*outputs, strict=True)):
            near(actual, batch.part(expected, rank), TOLERANCE[torch.float64], f"{name} {place}")
        for parameter in (ours.weight.grad, ours.bias.grad):
            dist.all_reduce(parameter, group=group)
        near(ours.weight.grad, theirs.weight.grad, TOLERANCE[torch.float64], "weight")
        near(ours.bias.grad, theirs.bias.grad, TOLERANCE[torch.float64], "bias")
    near(ours.running_mean, theirs.running_mean, TOLERANCE[torch.float64], "running mean")
    near(ours.running_var, theirs.running_var, TOLERANCE[torch.float64], "running var")
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
    ours.eval(), theirs.eval()
    near(ours(batch.x), theirs(batch.x), TOLERANCE[torch.float64], "in evaluation")


@in_processes
def a_nan_in_one_process_is_skipped_by_all(groups):
    layer = bt.SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    layer(torch.randn(2 + dist.get_rank(), CHANNELS))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(4, CHANNELS)
    if dist.get_rank() == 1:
        x[0, 0] = torch.nan
    layer(x)
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 1)


@in_processes
def nobody_has_data(groups):
    layer = bt.SyncBatchNorm(CHANNELS)
    x = torch.zeros(0, CHANNELS, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    assert layer.num_batches_tracked == 0


def collectives(function):
    """Number of elements of each collective of gloo that a function starts, by its profile."""
    with torch.profiler.profile(record_shapes=True) as profile:
        result = function()
    events = [event for event in profile.events() if event.name.startswith("gloo:")]
    assert all(event.name == "gloo:all_reduce" for event in events)
    return [torch.Size(event.input_shapes[0]).numel() for event in events], result


@in_processes
def a_step_has_one_collective_forward_and_one_backward(groups):
    forward, backward = [(3 * CHANNELS + 3) * PROCESSES], [2 * CHANNELS]
    layer = bt.SyncBatchNorm(CHANNELS, activation="relu")
    for rows in (4, 4 * (dist.get_rank() > 0)):
        x = torch.randn(rows, CHANNELS, LENGTH, requires_grad=True)
        mask = torch.rand(rows, 1, LENGTH) > 0.5
        found, y = collectives(lambda x=x, mask=mask: layer(x, residual=x, mask=mask))
        assert found == forward
        assert collectives(y.sum().backward)[0] == backward
    assert collectives(lambda: bt.batch_statistics(x, axis=1, sync=True))[0] == forward
    gradient, v = torch.ones_like(x, requires_grad=True), torch.randn_like(x)
    (g,) = torch.autograd.grad(layer(x), x, gradient, create_graph=True)
    assert len(collectives(lambda: torch.autograd.grad(g, gradient, v))[0]) == 1
    layer.eval()
    found, y = collectives(lambda: layer(x))
    assert not found
    assert not collectives(y.sum().backward)[0]
    assert not collectives(lambda: layer.train().freeze()(x).sum().backward())[0]


@in_processes
def parameters_alone_are_trained(groups):
    """One process's x requires no gradient, and one's y has none to the loss of."""
    layer = bt.SyncBatchNorm(CHANNELS, dtype=torch.float64)
    x = Batch("even", torch.float64, [0, 1, 2]).arguments(dist.get_rank())[0]
    layer(x.requires_grad_(dist.get_rank() != 0)).square().sum().backward()
    everything = Batch("even", torch.float64, [0, 1, 2]).arguments()[0]
    alone = bt.BatchNorm1d(CHANNELS, dtype=torch.float64)
    alone(everything).square().sum().backward()
    dist.all_reduce(layer.weight.grad)
    near(layer.weight.grad, alone.weight.grad, TOLERANCE[torch.float64], "weight")
    if dist.get_rank() != 0:
        mine = Batch("even", torch.float64, [0, 1, 2]).part(everything.grad, dist.get_rank())
        near(x.grad, mine, TOLERANCE[torch.float64], "x")
    # A forward pass serves, whoever keeps a graph for the backward one.
    with torch.set_grad_enabled(dist.get_rank() == 1):
        y = layer(x.detach())
    assert y.requires_grad == (dist.get_rank() == 1)


@in_processes
def dtypes_may_differ(groups):
    batch, rank = Batch("uneven", torch.float64, [0, 1, 2]), dist.get_rank()
    rounded = [batch.x.to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    parts = [batch.part(x, each).double() for each, x in enumerate(rounded)]
    statistics = bt.batch_statistics(batch.part(rounded[rank], rank), axis=1, sync=True)
    expected = plain(torch.cat(parts), batch.scale, batch.bias)[1:]
    for actual, each in zip(statistics, expected, strict=True):
        near(actual, each, TOLERANCE[torch.float32], "statistics")


@in_processes
def large_means_are_not_rounded(groups):
    batch, rank = Batch("long", torch.float64, [0, 1, 2]), dist.get_rank()
    x = torch.tensor(LARGE_MEAN.x(len(batch.v) * LENGTH, CHANNELS))
    x = x.reshape(-1, LENGTH, CHANNELS).transpose(1, 2).contiguous()
    expected = batch.part(plain(x.double(), batch.scale, batch.bias)[0], rank)

    def ours(x):
        return bt.batch_norm(x, batch.scale.float(), batch.bias.float(), axis=1, sync=True)[0]

    for y in (ours(batch.part(x, rank)), torch.func.vjp(ours, batch.part(x, rank))[0]):
        close(y, expected, rtol=0, atol=1e-3)


@in_processes
def scales_of_their_own(groups):
    """The loss of each process depends on the whole batch by its own scale, which may be 0."""
    ranks = range(dist.get_world_size())
    for dtype in (torch.float64, torch.float32):
        batch = Batch("uneven", dtype, [*ranks])
        scales = [batch.scale * each for each in (0, 1, -3, 2)]

        def loss(normalize, x, dy, rank, scales=scales, batch=batch):
            return (normalize(x, scales[rank], batch.bias) * dy).sum()

        def ours(x, scale, bias):
            return bt.batch_norm(x, scale, bias, axis=1, sync=True)[0]

        x, _, _, _, _, dy, _ = batch.arguments(dist.get_rank())
        got = torch.autograd.grad(loss(ours, x, dy, dist.get_rank()), x)[0]
        whole = batch.x.detach().double().requires_grad_()
        total = sum(
            loss(
                lambda x, *parameters, rank=rank, batch=batch: batch.part(
                    plain(x, *(each.double() for each in parameters))[0], rank
                ),
                whole,
                batch.part(batch.dy, rank),
                rank,
            )
            for rank in ranks
        )
        wanted = batch.part(torch.autograd.grad(total, whole)[0], dist.get_rank())
        near(got, wanted, TOLERANCE[dtype], str(dtype))


@in_processes
def transformations_of_functions(groups):
    batch = Batch("uneven", torch.float64, [0, 1, 2])
    rank = dist.get_rank()

    def both(function):
        """function(normalize, x, dy, v) with ours in a process, and its part of the truth."""

        def ours(x):
            return bt.batch_norm(x, batch.scale, batch.bias, axis=1, sync=True)[0]

        def theirs(x):
            return plain(x, batch.scale, batch.bias)[0]

        x, _, _, _, _, dy, v = (
            None if each is None else each.detach() for each in batch.arguments(rank)
        )
        whole = function(theirs, batch.x, batch.dy, batch.v)
        near(
            function(ours, x, dy, v),
            batch.part(whole, rank),
            TOLERANCE[torch.float64],
            function.__name__,
        )

    def grad(normalize, x, dy, v):
        return torch.func.grad(lambda x: (normalize(x) * dy).sum())(x)

    def jvp(normalize, x, dy, v):
        return torch.func.jvp(normalize, (x,), (v,))[1]

    def jvp_of_grad(normalize, x, dy, v):
        gradient = torch.func.grad(lambda x: (normalize(x) * dy).sum())
        return torch.func.jvp(gradient, (x,), (v,))[1]

    def vmap(normalize, x, dy, v):
        return torch.vmap(normalize, 1, 1)(torch.stack((x, v * 2, dy), 1))

    def vmap_of_grad(normalize, x, dy, v):
        gradient = torch.func.grad(lambda x, dy: (normalize(x) * dy).sum())
        return torch.vmap(gradient, 1, 1)(torch.stack((x, v), 1), torch.stack((dy, x), 1))

    for function in (grad, jvp, jvp_of_grad, vmap, vmap_of_grad):
        both(function)


@in_processes
def evaluation_and_frozen_layers_share_nothing(groups):
    for rows in (4, 0):
        for layer in (bt.SyncBatchNorm(CHANNELS).eval(), bt.SyncBatchNorm(CHANNELS).freeze()):
            x = torch.randn(rows, CHANNELS, requires_grad=True)
            if dist.get_rank() == 0:  # the others would be missed
                (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
                g.sum().backward()
                near(g, 2 / (1 + vars(layer)["eps"]) * x, TOLERANCE[torch.float32], "frozen")
                assert x.grad.shape == x.shape
    if dist.get_rank() == 0:
        x = torch.empty(4, CHANNELS, device="meta")
        assert bt.SyncBatchNorm(CHANNELS, device="meta").eval()(x).shape == x.shape


@in_processes
def recomputing_activations_updates_once(groups):
    for reentrant in (True, False):
        layer, again = (bt.SyncBatchNorm(CHANNELS) for _ in range(2))
        x = torch.randn(4, CHANNELS, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        gradient, x.grad = x.grad, None
        again(x).square().sum().backward()
        assert torch.equal(gradient, x.grad)
        assert torch.equal(layer.running_mean, again.running_mean)
        assert layer.num_batches_tracked == 1


@in_processes
def distributed_data_parallel(groups):
    """Two forwards and one backward, with default flags; gradients are averages."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    ours = bt.convert(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    ours.double().load_state_dict(alone.state_dict())
    bt.convert(ours, sync=True)
    parallel = nn.parallel.DistributedDataParallel(ours)
    sizes = (5, 2, 1)
    for _ in range(2):
        batches = torch.randn(2, sum(sizes), 4, dtype=torch.float64)
        parts = batches.split(sizes, dim=1)[dist.get_rank()]
        for model, (first, second) in ((parallel, parts), (alone, batches)):
            model.zero_grad()
            (model(first) * model(second)).sum().backward()
        for (name, one), other in zip(ours.named_parameters(), alone.parameters(), strict=True):
            near(one.grad * PROCESSES, other.grad, TOLERANCE[torch.float64], name)
        for one, other in zip(ours.buffers(), alone.buffers(), strict=True):
            near(one, other, TOLERANCE[torch.float64], "buffer")


def parts_of_processes():
    """Batches of each process: of unlike number and size, and none."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 5, 2), (30,), ())
    parts = [[torch.randn(each, CHANNELS, generator=generator) for each in own] for own in sizes]
    return [[each + rank for each in own] for rank, own in enumerate(parts)]


@in_processes
def statistics_are_recalibrated_over_processes(groups):
    """To the same bits in all, however their batches are shared out."""
    parts = parts_of_processes()
    for normalize_by in ("batch", "running"):
        alone = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 3), nn.BatchNorm1d(3))
        ours = bt.convert(copy.deepcopy(alone), sync=True)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        everything = [batch for own in parts for batch in own]
        bt.recalibrate(alone, everything, normalize_by=normalize_by, sync=False)
        for model in (ours, parallel):
            bt.recalibrate(model, parts[dist.get_rank()], normalize_by=normalize_by)
            for buffer, expected in zip(model.buffers(), alone.buffers(), strict=True):
                near(buffer, expected, 1e-6, normalize_by)
                everywhere = [torch.empty_like(buffer) for _ in range(PROCESSES)]
                dist.all_gather(everywhere, buffer)
                assert all(torch.equal(each, buffer) for each in everywhere)
        assert alone[0].num_batches_tracked == 4


@in_processes
def who_fails_to_recalibrate_fails_for_all(groups):
    parts, rank = parts_of_processes(), dist.get_rank()
    for normalize_by, last in (("batch", 0), ("running", 1)):
        model = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS))
        before = copy.deepcopy(model.state_dict())
        calls = []

        def forward(model, batch, calls=calls, last=last):
            calls.append(batch)
            if rank == 1 and len(calls) > last:
                raise ArithmeticError("on purpose")
            return model(batch)

        kind, message = RuntimeError, "in process 1: ArithmeticError: on purpose"
        if rank == 1:
            kind, message = ArithmeticError, "on purpose"
        with pytest.raises(kind, match=message):
            bt.recalibrate(model, parts[rank], normalize_by=normalize_by, forward=forward)
        for name, each in model.state_dict().items():
            assert torch.equal(each, before[name]), name
    for batches in (3 if rank == 0 else parts[rank], [], iter([])):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="batches"):
            bt.recalibrate(model, batches, normalize_by="running")


@in_processes
def groups_and_their_refusal(groups):
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS))
    x = torch.randn(4, CHANNELS)
    if dist.get_rank() == 2:
        message = "a process group that this process is in, but rank 2 is not"
        with pytest.raises(ValueError, match=message):
            bt.convert(model, sync=groups["pair"])
        assert type(model[0]) is nn.BatchNorm1d
        with pytest.raises(ValueError, match=message):
            bt.batch_norm(x, sync=groups["pair"])
        with pytest.raises(ValueError, match=message):
            bt.SyncBatchNorm(CHANNELS, process_group=groups["pair"])(x)
    else:
        bt.convert(model, sync=groups["pair"])
        assert model[0].process_group is groups["pair"]
        layer = nn.SyncBatchNorm(CHANNELS, process_group=groups["pair"])
        assert bt.convert(layer).process_group is groups["pair"]
        assert bt.revert(bt.convert(layer)).process_group is groups["pair"]
    for sync in (0, "gloo", [0, 1]):
        with pytest.raises(TypeError, match="sync must be True, False, None or a"):
            bt.batch_norm(x, sync=sync)


@in_processes
def a_group_of_one_is_alone(groups):
    if dist.get_rank() == 2:
        layer, other = bt.SyncBatchNorm(CHANNELS, process_group=groups["own"]), nn.BatchNorm1d(3)
        x = torch.randn(4, CHANNELS)
        assert not collectives(lambda: layer(x))[0]
        near(layer(x), other(x), TOLERANCE[torch.float32], "y")
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(x[:1])


@in_processes
def one_value_in_all_is_refused_by_all(groups):
    """Whichever process has it, before anything has changed; as torch.nn's layers refuse it."""
    rank = dist.get_rank()
    mask = torch.ones(4, 1) if rank == 0 else torch.zeros(4, 1)
    keywords = [{}, {"momentum": None}, {"skip_nonfinite": True}, {"affine": False}]
    for holder, one in zip((0, 1, 2, 0), keywords, strict=True):
        layer = bt.SyncBatchNorm(CHANNELS, **one)
        x = torch.randn(int(rank == holder), CHANNELS, requires_grad=True)
        before = {name: each.clone() for name, each in layer.named_buffers()}
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when train"):
            layer(x)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when train"):
            layer.freeze(normalize_by="batch").eval()(x)
        for name, each in layer.named_buffers():
            assert torch.equal(each, before[name]), name
        with pytest.raises(ValueError, match=r"more than one value .* allow_one_value=True"):
            bt.batch_norm(x, sync=True)
        y, statistics = bt.batch_norm(x, sync=True, allow_one_value=True)
        assert torch.equal(y, torch.zeros_like(x))
        assert torch.equal(statistics.count, torch.ones(CHANNELS))
        assert torch.equal(bt.batch_statistics(x, sync=True).count, torch.ones(CHANNELS))
        assert layer.unfreeze().eval()(x).shape == x.shape
        layer.freeze(update_running=True)(x)  # which normalizes by the running ones
        assert bt.batch_norm(x[:, :0], sync=True)[0].shape == (len(x), 0)
    # Of four values one counts: that is another matter, as it is in one process.
    bt.SyncBatchNorm(CHANNELS)(torch.randn(4, CHANNELS), mask=mask * torch.eye(4)[:, :1])
    bt.SyncBatchNorm(CHANNELS)(torch.randn(int(rank < 2), CHANNELS))  # two values


@in_processes
def what_is_not_dense_is_refused_before_the_others_know(groups):
    for name in ("weight", "bias", "running_mean", "running_var"):
        layer = bt.SyncBatchNorm(CHANNELS)
        delattr(layer, name)
        setattr(layer, name, torch.ones(CHANNELS).to_sparse())
        before = [each.clone() for each in layer.buffers() if not each.is_sparse]

        def call(layer=layer, name=name):
            with pytest.raises(TypeError, match=f"^{name} must be a dense tensor"):
                layer(torch.randn(4, CHANNELS))

        assert not collectives(call)[0]
        for each, value in zip(
            (b for b in layer.buffers() if not b.is_sparse), before, strict=True
        ):
            assert torch.equal(each, value)


@in_processes
def one_value_in_all_is_nan_in_compiled_code(groups):
    x = torch.randn(int(dist.get_rank() == 1), CHANNELS)
    layer = bt.SyncBatchNorm(CHANNELS)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.isnan().all()
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))


@in_processes
def compiled(groups):
    batch, rank = Batch("one empty", torch.float64, [0, 1, 2]), dist.get_rank()
    layers = [bt.SyncBatchNorm(CHANNELS, activation="silu").double() for _ in range(2)]
    run = [torch.compile(layers[0], fullgraph=True, backend="aot_eager"), layers[1]]
    results = []
    for layer, function in zip(layers, run, strict=True):
        x, _, _, residual, _, dy, _ = batch.arguments(rank)
        function(x, residual=residual).backward(dy)  # compiles
        x.grad = None
        forward, y = collectives(lambda f=function, x=x, r=residual: f(x, residual=r))
        backward, _ = collectives(lambda y=y, dy=dy: y.backward(dy))
        assert (len(forward), len(backward)) == (1, 1)
        results.append((y, x.grad, residual.grad, layer.weight.grad, layer.running_var))
    for place, (actual, expected) in enumerate(zip(*results, strict=True)):
        near(actual, expected, TOLERANCE[torch.float64], place)


@in_processes
def another_eps_or_layer_is_found_by_all(groups):
    rank = dist.get_rank()
    x = torch.randn(4, CHANNELS)

    def refused(model, message):
        before = {name: each.clone() for name, each in model.named_buffers()}
        with pytest.raises(RuntimeError, match=message):
            model(x)
        for name, each in model.named_buffers():
            assert torch.equal(each, before[name]), name

    eps = ", ".join(["1e-05", "1e-05", "0.001"])
    model = nn.Sequential(nn.Identity(), bt.SyncBatchNorm(CHANNELS))
    model(x)
    model[1].eps = 1e-3 if rank == 2 else 1e-5
    message = rf"SyncBatchNorm '1' \(after 1 batches\) must have the same eps .* eps is {eps}\."
    refused(model, message)
    with pytest.raises(RuntimeError, match=f"batch_norm must have the same eps .* eps is {eps}"):
        bt.batch_norm(x, eps=model[1].eps, sync=True)

    layers = [bt.SyncBatchNorm(CHANNELS) for _ in range(2)]
    model = nn.Sequential(*layers)
    model(x)
    for order in ((0, 1), (1, 0), (0, 1)):
        layer = layers[order[0] if rank == 1 else 0]
        if order == (0, 1):
            layer(x)
        else:
            refused(layer, "met another layer in another process")


@in_processes
def another_eps_is_nan_to_those_who_cannot_look(groups):
    x = torch.randn(4, CHANNELS)
    for eps, is_right in ((1e-5, True), (1e-3 if dist.get_rank() == 0 else 1e-5, False)):
        for each in (eps, torch.tensor(eps)):
            y = torch.vmap(lambda x, eps=each: bt.batch_norm(x, eps=eps, sync=True)[0])(x[None])
            assert y.isfinite().all() == is_right


@in_processes
def an_absent_process_is_found(groups):
    """Of two groups with a short timeout: the one without rank 2 forward, the other backward."""
    store, rank = groups["store"], dist.get_rank()
    messages = []
    for step, group in enumerate(groups["impatient"][:2]):
        layer = bt.SyncBatchNorm(CHANNELS, process_group=group, track_running_stats=step > 0)
        model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Sequential(layer))
        x = torch.randn(4, CHANNELS)
        y = model(x) if step > 0 else None
        if rank != 2:
            with pytest.raises(RuntimeError) as error:
                (model(x) if y is None else y).sum().backward()
            messages.append(str(error.value))
        store.set(f"{rank} through {step}", "")
        through = [f"{each} through {step}" for each in range(PROCESSES)]
        store.wait(through, datetime.timedelta(seconds=30))
    whereabouts = ["SyncBatchNorm '1.0'", "SyncBatchNorm '1.0' (after 1 batches)"]
    for message, where in zip(messages, whereabouts, strict=rank != 2):
        assert message.startswith(f"{where} could not add up its statistics with the other")


@in_processes
def an_absent_process_is_found_in_distributed_data_parallel(groups):
    """By the layer, where no buffers are broadcast before it."""
    store, rank, group = groups["store"], dist.get_rank(), groups["impatient"][2]
    layer = bt.SyncBatchNorm(CHANNELS, process_group=group)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(CHANNELS, CHANNELS), layer),
        process_group=group,
        forward_sync_buffers=False,
    )
    x = torch.randn(4, CHANNELS)
    for _ in range(2):
        model(x).sum().backward()
    if rank != 2:
        with pytest.raises(
            RuntimeError, match=r"SyncBatchNorm 'module.1' \(after 2 batches\) could"
        ):
            model(x)
    store.set(f"{rank} through parallel", "")
    through = [f"{each} through parallel" for each in range(PROCESSES)]
    store.wait(through, datetime.timedelta(seconds=30))


# ---- starting the processes


def process(folder, rank):
    warnings.simplefilter("error")
    # PyTorch's own use of what it has deprecated, the first time that it needs forward mode.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    own, ranks = (pair, [0, 1]) if rank < 2 else (single, [2])
    timeout = datetime.timedelta(seconds=1)
    impatient = [dist.new_group(timeout=timeout) for _ in range(3)]
    groups = {"pair": pair, "own": own, "ranks": ranks, "impatient": impatient, "store": store}
    outcomes = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            check(groups)
            outcomes[name] = f"passed in {time.perf_counter() - start:.1f} s"
        except BaseException:
            outcomes[name] = traceback.format_exc()
        with open(f"{folder}/rank{rank}.json", "w") as file:
            json.dump(outcomes, file)
        if not outcomes[name].startswith("passed"):
            sys.exit(1)  # The others can't know, and find their connection closed.
    dist.barrier()
    dist.destroy_process_group()


def run(folder, argument, processes):
    """Start this file as processes, and wait for all of them; their outputs."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, argument, str(folder), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        return [each.communicate(timeout=200)[0] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    outputs = run(folder, "process", PROCESSES)
    files = [folder / f"rank{rank}.json" for rank in range(PROCESSES)]
    return [json.loads(each.read_text()) if each.exists() else {} for each in files], outputs


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(outcomes, name):
    found, outputs = outcomes
    for rank, each in enumerate(found):
        outcome = each.get(name, f"did not run\n{outputs[rank]}")
        assert outcome.startswith("passed"), f"rank {rank}: {outcome}"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [True, False])
def test_without_torch_distributed_a_process_is_alone(device, training):
    layer, other = bt.SyncBatchNorm(3, device=device), bt.BatchNorm1d(3, device=device)
    x = torch.randn(4, 3, device=device)
    y, expected = (each.train(training)(x) for each in (layer, other))
    assert y.device == x.device
    shared, _ = bt.batch_norm(x, sync=True)
    if device == "cpu":
        assert torch.equal(y, expected)
        assert torch.equal(shared, bt.batch_norm(x)[0])
        assert torch.equal(layer.running_mean, other.running_mean)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
