"""PyTorch's own test inputs for batch normalization, given to batchnorm.torch as well."""

import sys
import unittest
from types import SimpleNamespace

import pytest
import torch
from compare import alike

import batchnorm.torch as bt

LAYERS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture(scope="module")
def internal():
    """What torch.testing._internal says of modules and of operators."""
    # Its own tests are derived from a class of a package that nothing else needs.
    stand_in = SimpleNamespace(TestCase=unittest.TestCase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "expecttest", stand_in)
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db

        return {**{info.name: info for info in reversed(op_db)}, **{i.name: i for i in module_db}}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inputs_of_modules(internal, name, training, dtype):
    kinds = [getattr(bt, name), getattr(torch.nn, name)]
    info = internal[f"nn.{name}"]
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert len(inputs) >= 6
    for each in inputs:
        results = []
        for kind in kinds:
            construction = each.constructor_input
            layer = kind(*construction.args, **construction.kwargs).to(dtype).train(training)
            x = each.forward_input.args[0].detach().requires_grad_()
            y = layer(x)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=dtype).reshape(y.shape))
            gradients = {name: each.grad for name, each in layer.named_parameters()}
            results.append([y, x.grad, gradients, dict(layer.named_buffers())])
        if 0 in x.shape and layer.track_running_stats:
            for result in results:  # An empty batch counts as one with torch.nn.
                del result[3]["num_batches_tracked"]
        alike(*results, TOLERANCE[dtype])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs_of_modules(internal, name, training):
    info = internal[f"nn.{name}"]
    inputs = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    assert len(inputs) >= 1
    for each in inputs:
        construction = each.module_error_input.constructor_input
        call = each.module_error_input.forward_input

        def made_and_called(construction=construction, call=call):
            layer = getattr(bt, name)(*construction.args, **construction.kwargs).train(training)
            layer(*call.args, **call.kwargs)

        with pytest.raises(each.error_type, match=each.error_regex):
            made_and_called()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_inputs_of_the_function(internal, dtype):
    calls = refused = 0
    for sample in internal["nn.functional.batch_norm"].sample_inputs(
        "cpu", dtype, requires_grad=True
    ):
        results = []
        rate = sample.kwargs.get("momentum", 0.1)
        training = sample.kwargs.get("training", False)
        if sample.input.ndim < 2 or (training and not 0 <= rate <= 1):
            with pytest.raises(ValueError, match=r"at least 2D input|momentum must be within"):
                bt.functional.batch_norm(sample.input, *sample.args, **sample.kwargs)
            refused += 1
            continue
        for call in (bt.functional.batch_norm, torch.nn.functional.batch_norm):
            tensors = [
                each if each is None else each.detach().clone().requires_grad_(each.requires_grad)
                for each in (sample.input, *sample.args)
            ]
            y = call(*tensors, **sample.kwargs)
            moving = [each for each in tensors if each is not None and each.requires_grad]
            dy = torch.linspace(-1, 2, y.numel()).to(dtype).reshape(y.shape)
            results.append([y, *torch.autograd.grad(y, moving, dy), *tensors[1:3]])
        assert results[0][0].stride() == results[1][0].stride()
        for got, wanted in zip(*results, strict=True):
            if wanted is None:
                assert got is None
            else:
                alike(got, wanted, TOLERANCE[dtype])
        calls += 1
    # What ours refuses are inputs without channels, and a momentum of -1.
    assert calls >= 8
    assert refused == 3
