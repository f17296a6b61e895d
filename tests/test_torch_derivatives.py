"""Derivatives of the PyTorch door, and whatever else computes with its computations."""

import copy
import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import truth
from compare import alike
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bt

# PyTorch's own forward-mode derivatives are compiled by its own deprecated means.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def tensor(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def variables(*shapes):
    return [tensor(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


close = partial(alike, tolerance=1e-10)


def differentiable(function, *arguments):
    """By finite differences: every order and every mode, one at a time and in batches."""
    assert gradcheck(
        function,
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(function, arguments, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_batch_norm(activation):
    def function(x, scale, bias, residual):
        return bt.batch_norm(x, scale, bias, axis=1, activation=activation, residual=residual)[0]

    differentiable(function, *variables((3, 2, 2), (2,), (2,), (3, 2, 1)))


def test_batch_norm_with_a_mask():
    mask = torch.tensor([1, 1, 0, 1, 1]).bool()[:, None]

    def function(x, scale, bias):
        return bt.batch_norm(x, scale, bias, mask=mask, activation="silu")[0]

    differentiable(function, *variables((5, 2), (2,), (2,)))


def test_batch_norm_by_its_weights():
    x, scale, bias = variables((5, 2), (2,), (2,))
    weights = (tensor(5, 1).abs() + 0.5).requires_grad_()
    differentiable(
        lambda x, scale, bias, weights: bt.batch_norm(x, scale, bias, mask=weights)[0],
        *(x, scale, bias, weights),
    )


def test_statistics():
    def function(x):
        _, statistics = bt.batch_norm(x)
        return statistics.mean, statistics.var

    differentiable(function, *variables((5, 2)))
    differentiable(lambda x: tuple(bt.batch_statistics(x)[1:]), *variables((5, 2)))
    differentiable(
        lambda x, z: tuple(bt.batch_statistics(x).merge(bt.batch_statistics(z))[1:]),
        *variables((5, 2), (3, 2)),
    )


def test_output_and_statistics_in_one_loss():
    def function(x, scale):
        y, (_, mean, var) = bt.batch_norm(x, scale, activation="silu")
        return (y * var + mean).sum()

    differentiable(function, *variables((4, 2), (2,)))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_normalize(activation):
    def function(x, mean, var, scale, bias, residual):
        return bt.normalize(
            x, mean, var.exp(), scale, bias, activation=activation, residual=residual
        )

    differentiable(function, *variables((3, 2), (2,), (2,), (2,), (2,), (3, 2)))


def test_update_running():
    def function(mean, var, x):
        return bt.update_running(mean, var, bt.batch_statistics(x), rate=0.3, correction=1)

    differentiable(function, *variables((2,), (2,), (4, 2)))


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_and_the_same_tensor_twice(training):
    layer = bt.BatchNorm1d(2, activation="silu", dtype=torch.float64).train(training)
    layer.freeze(normalize_by=None)
    differentiable(lambda x: layer(x, residual=x), *variables((4, 2)))


@pytest.mark.parametrize("memory", ["channels last", "gaps", "expanded", "transposed"])
def test_second_order_of_any_layout(memory):
    def loss(x, norm):
        return norm(x).pow(3).sum()

    x = tensor(4, 3, 2, 5)
    x = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "gaps": tensor(4, 3, 2, 10)[..., ::2],
        "expanded": x[:, :, :1].expand(4, 3, 2, 5),
        "transposed": x.transpose(0, 2),
    }[memory].requires_grad_()
    results = []
    for kind in (bt.BatchNorm2d, nn.BatchNorm2d):
        norm = kind(3, track_running_stats=False, dtype=torch.float64)
        (first,) = torch.autograd.grad(loss(x, norm), x, create_graph=True)
        second = torch.autograd.grad(first.pow(2).sum(), (x, norm.weight))
        results.append((first, *second))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)


# ---- torch.func and the like

NORM = bt.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
PEER = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)

TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](tensor())[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (tensor(*x.shape, seed=2),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacfwd of jacfwd": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "jacfwd of jacrev": lambda f, x: torch.func.jacfwd(torch.func.jacrev(f))(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x * 2])),
    "vmap, in_dims": lambda f, x: torch.vmap(f, in_dims=2)(torch.stack([x, x * 2], 2)),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x * 2])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x[None]).sum())(x),
    "hessian, vectorized": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "hessian, forward": lambda f, x: torch.autograd.functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}


def plainly(x):
    """(And not torch.nn's, whose forward-mode derivative of second order is wrong in 2.13.)"""
    centered = x - x.mean(0)
    return centered / (centered.square().mean(0) + 1e-5).sqrt()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    x, weights = tensor(4, 3), tensor(4, 3, seed=1)
    results = [
        TRANSFORMS[transform](lambda x, norm=norm: (norm(x).sigmoid() * weights).sum(), x)
        for norm in (NORM, plainly)
    ]
    close(*results)


@pytest.mark.parametrize("batched", [(0, None, None), (0, 0, None), (None, 0, 0), (1, 0, 0)])
def test_vmap_of_any_argument(batched):
    """An argument without a batch, and all of them as one tensor each."""
    sizes = [(4, 3), (3,), (3,)]
    arguments = [
        tensor(*size, seed=i) if dim is None else tensor(*size[:dim], 5, *size[dim:], seed=i)
        for i, (size, dim) in enumerate(zip(sizes, batched, strict=True))
    ]
    got = torch.vmap(lambda *each: bt.batch_norm(*each)[0], in_dims=batched)(*arguments)
    for i in range(5):
        one = [
            each if dim is None else each.select(dim, i)
            for each, dim in zip(arguments, batched, strict=True)
        ]
        close(got[i], nn.functional.batch_norm(one[0], None, None, *one[1:], training=True))


def test_batches_of_gradients():
    x = tensor(4, 3).requires_grad_()
    for norm in (NORM, bt.BatchNorm1d(3, activation="silu", dtype=torch.float64)):
        y = norm(x)
        directions = tensor(5, 4, 3, seed=1)
        (got,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
        wanted = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in directions]
        close(got, torch.stack(wanted))


def test_an_ensemble():
    models = [bt.BatchNorm1d(3, skip_nonfinite=True, dtype=torch.float64) for _ in range(3)]
    for i, model in enumerate(models):
        nn.init.constant_(model.weight, i + 1)
    parameters, buffers = torch.func.stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), tensor(3, 5, 3)

    def call(parameters, buffers, x):
        y = torch.func.functional_call(base, (parameters, buffers), (x,))
        return y, buffers

    y, moved = torch.vmap(call)(parameters, buffers, x)
    for i, model in enumerate(models):
        close(y[i], model(x[i]))
        for name, each in model.named_buffers():
            close(moved[name][i], each)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_escapes_from_vmap(momentum):
    models = [bt.BatchNorm1d(3, momentum=momentum, dtype=torch.float64) for _ in range(2)]
    state = torch.func.stack_module_state(models)
    base, x = copy.deepcopy(models[0]), tensor(2, 5, 3)
    base(x[0])  # of no consequence for the others
    for _ in range(2):
        torch.vmap(lambda state, x: torch.func.functional_call(base, state, (x,)))(state, x)
    close(state[1]["running_mean"][0], (0.19 if momentum else 1) * x[0].mean(0))
    base(x[0])
    close(base.running_mean, (0.19 if momentum else 1) * x[0].mean(0))


def test_vmap_of_running_statistics_over_one_counter():
    """As torch.nn's, where the number of batches is the same for all."""
    x = tensor(4, 5, 3)

    def moved(layer):
        def call(mean, var, x):
            buffers = {"running_mean": mean, "running_var": var}
            buffers["num_batches_tracked"] = torch.tensor(0)
            y = torch.func.functional_call(layer, {**dict(layer.named_parameters()), **buffers}, x)
            return y, mean, var

        zeros, ones = torch.zeros(4, 3, dtype=x.dtype), torch.ones(4, 3, dtype=x.dtype)
        return torch.vmap(call)(zeros, ones, x)

    for got, wanted in zip(
        moved(bt.BatchNorm1d(3).double()), moved(torch.nn.BatchNorm1d(3).double()), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_layer_that_tracks_says_so_in_a_transform(transform, momentum, skip_nonfinite):
    layer = bt.BatchNorm1d(3, momentum=momentum, skip_nonfinite=skip_nonfinite).double()
    before = copy.deepcopy(list(layer.buffers()))
    x = tensor(2, 5, 3)[0] if transform != "vmap" else tensor(5, 3)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d can't update .*stack_module_state"):
        TRANSFORMS[transform](lambda x: layer(x).pow(2).sum(), x)
    assert all(map(torch.equal, layer.buffers(), before))
    # Nor does any count of elements go on from there.
    later, fresh = copy.deepcopy(layer), bt.BatchNorm1d(3, momentum=momentum).double()
    for each in (later, fresh):
        each(tensor(5, 3, seed=1))
    close([later.running_mean, later.running_var], [fresh.running_mean, fresh.running_var])
    # The ways that the message names.
    layer.freeze(normalize_by="batch")
    results = [TRANSFORMS[transform](lambda x, f=f: f(x).pow(3).sum(), x) for f in (layer, plainly)]
    close(*results)
    layer.unfreeze().eval()
    TRANSFORMS[transform](lambda x: layer(x).sum(), x)


# ---- what is kept for the backward pass


def bytes_kept(function, *arguments):
    kept = {}

    def pack(each):
        kept[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        result = function(*arguments)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_one_tensor_like_x_is_kept(activation, training):
    layer = bt.BatchNorm2d(8, activation=activation).train(training)
    for form in (torch.contiguous_format, torch.channels_last):
        x = tensor(4, 8, 16, 16, dtype=torch.float32).contiguous(memory_format=form)
        x.requires_grad_()
        small = 8 * 8 * 5  # scale, bias, mean, var and count, in no more than 8 bytes each
        assert bytes_kept(layer, x) <= x.nbytes + small
        assert bytes_kept(lambda x: nn.functional.relu(nn.BatchNorm2d(8)(x)), x) > x.nbytes + small
        if activation is None:
            kept = bytes_kept(lambda x, z: layer(x, residual=z), x, torch.ones_like(x))
            assert kept <= x.nbytes + small


def test_saved_tensors_may_come_back_elsewhere_in_memory():
    layer = bt.BatchNorm2d(3, activation="relu", dtype=torch.float64)
    x = tensor(4, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each, torch.Tensor.contiguous):
        y = layer(x)
    wanted = torch.autograd.grad(layer(x).pow(2).sum(), x)
    close(torch.autograd.grad(y.pow(2).sum(), x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_statistics_may_be_overwritten(dtype):
    x, dy = tensor(6, 3, dtype=dtype).requires_grad_(), tensor(6, 3, dtype=dtype, seed=1)
    gradients = []
    for changed in (False, True):
        y, statistics = bt.batch_norm(x)
        if changed:
            with torch.no_grad():
                for each in statistics:
                    each.detach().add_(7)
        gradients.append(torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(*gradients)


def test_the_output_may_be_overwritten():
    x, z = variables((4, 3), (4, 3))
    wanted = torch.autograd.grad(NORM(x).add(1).relu().sum(), x)
    close(torch.autograd.grad(NORM(x).add_(1).relu_().sum(), x), wanted)
    y = NORM(z * 1)
    with torch.no_grad():
        z.add_(1)
    torch.autograd.grad(y.sum(), z)


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen", "frozen, updating"])
def test_two_forwards_and_one_backward(mode):
    layer = bt.BatchNorm1d(3, dtype=torch.float64).train(mode == "training")
    if mode.startswith("frozen"):
        layer.freeze(update_running=mode.endswith("updating"))
    x, z = variables((4, 3), (5, 3))
    separate = [torch.autograd.grad(copy.deepcopy(layer)(x).pow(3).sum(), x)]
    first = layer(x)
    with torch.no_grad():  # as DistributedDataParallel does, when it hands out rank 0's buffers
        for each in layer.buffers():
            each.copy_(each.clone())
    (first.pow(3).sum() + layer(z).sum()).backward()
    close((x.grad,), separate[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_once(use_reentrant, momentum):
    models = [
        nn.Sequential(nn.Linear(3, 3), bt.BatchNorm1d(3, momentum=momentum, skip_nonfinite=True))
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(2):
        x = tensor(5, 3, dtype=torch.float32).requires_grad_()
        checkpoint(models[0], x, use_reentrant=use_reentrant).pow(2).sum().backward()
        models[1](x).pow(2).sum().backward()
    for got, wanted in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(got, wanted)
    assert models[0][1].num_batches_tracked == 2
    for got, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(got.grad, wanted.grad, tolerance=1e-5)
    models[0][1].freeze(update_running=True)
    checkpoint(models[0], x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert models[0][1].num_batches_tracked == 3


# ---- tensors that are not what they look like


def test_negative_bits_and_zero_tensors():
    values = torch.complex(tensor(5, 3), tensor(5, 3, seed=1))
    for negative in (values.conj().imag, torch._neg_view(tensor(5, 3))):
        assert negative.is_neg()
        x, dy = negative.resolve_neg(), negative
        close(NORM(negative), PEER(x))
        close(NORM(x, residual=negative), PEER(x) + x)
        x.requires_grad_()
        close(torch.autograd.grad(NORM(x), x, dy), torch.autograd.grad(PEER(x), x, dy))
    zeros = torch._efficientzerotensor((5, 3), dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(NORM(x), x, zeros)[0], torch.zeros(5, 3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_with_negative_bits(dtype):
    x, parameter = tensor(5, 3).to(dtype), torch.tensor([0.5, 1, 2], dtype=dtype)
    negative = torch._neg_view(-parameter)
    assert negative.is_neg()
    close(bt.normalize(x, *[negative] * 4), bt.normalize(x, *[parameter] * 4))
    close(bt.batch_norm(x, negative, negative)[0], bt.batch_norm(x, parameter, parameter)[0])


def test_a_mode_that_looks_at_operations():
    graph = make_fx(NORM)(tensor(5, 3))
    x = tensor(5, 3, seed=1)
    close(graph(x), PEER(x))


def test_some_arguments_alone_require_gradients():
    x, w, b, z = tensor(5, 3), tensor(3, seed=1), tensor(3, seed=2), tensor(5, 3, seed=3)
    arguments = {"x": x, "scale": w, "bias": b, "residual": z}
    for name in arguments:
        given = {**arguments, name: arguments[name].clone().requires_grad_()}
        y, _ = bt.batch_norm(**given)
        peer = nn.functional.batch_norm(given["x"], None, None, given["scale"], given["bias"], True)
        peer = peer + given["residual"]
        for power in (2, 3):
            got, wanted = (
                torch.autograd.grad(each.pow(power).sum(), given[name], retain_graph=True)
                for each in (y, peer)
            )
            close(got, wanted)
    with torch.no_grad():
        assert not bt.batch_norm(x.requires_grad_())[0].requires_grad


@pytest.mark.parametrize("call", [lambda x: bt.batch_norm(x)[0], bt.BatchNorm1d(3)])
def test_a_graph_goes_with_its_output(call):
    class Mark:
        pass

    gc.collect()
    gc.disable()  # which would find a cycle, late
    try:
        y = call(torch.randn(4, 3, requires_grad=True))
        y.grad_fn.mark = Mark()
        mark = weakref.ref(y.grad_fn.mark)
        del y
        assert mark() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("x", [1e8 + np.arange(1000.0) / 1000, 1e200 * np.arange(1000.0)])
def test_gradients_of_doubles_know_what_a_mean_and_a_variance_leave_out(x):
    x, dy = x[:, None], np.random.default_rng(0).normal(size=(1000, 1))
    wanted = truth.batch_norm_gradients(dy, x.astype(np.longdouble), [2.0])
    inputs = torch.tensor(x, requires_grad=True)
    layer = bt.BatchNorm1d(1, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, 2.0)
    layer(inputs).backward(torch.tensor(dy))
    for got, exact in ((inputs.grad, wanted["x"]), (layer.weight.grad, wanted["scale"])):
        assert np.abs(got.numpy() - exact).max() <= 1e-14 * np.abs(exact).max()


class Ignoring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("training", [False, True])
def test_no_gradient_stays_none(training):
    """A zero would let an optimizer move what nothing depends on."""
    for layer in (torch.nn.BatchNorm1d(3), bt.BatchNorm1d(3)):
        x = torch.randn(4, 3, requires_grad=True)
        Ignoring.apply(layer.train(training)(x)).sum().backward()
        assert x.grad is None
        assert layer.weight.grad is None
