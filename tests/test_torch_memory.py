"""Tensors whose memory is not what it seems, given to batchnorm.torch in every place of a call.

Run as a program with the name of a table, this file does each of its cases in a process of its own,
as some would crash, and prints what became of it.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import truth
from compare import near
from doors import without_native
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import batchnorm.torch as bt

ROWS, CHANNELS = 6, 4


def tensors():
    """What a call takes, by name."""
    random = np.random.default_rng(0)

    def some(*shape):
        return torch.from_numpy(random.normal(size=shape) + 2).float()

    mask = (some(ROWS, 1) > 1.5).float()
    return {
        "input": some(ROWS, CHANNELS),
        "weight": some(CHANNELS),
        "bias": some(CHANNELS),
        "running_mean": some(CHANNELS),
        "running_var": some(CHANNELS).abs() + 0.5,
        "num_batches_tracked": torch.tensor(3),
        "residual": some(ROWS, CHANNELS),
        "mask": mask.index_fill(0, torch.tensor([0, 1]), 1.0),
        "dy": some(ROWS, CHANNELS),
    }


OPERANDS = list(tensors())
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
WAYS = ["layer in training", "layer in evaluation", "functional", "functions", "normalize"]
TAKEN_BY = {
    "layer in training": OPERANDS,
    "layer in evaluation": [each for each in OPERANDS if each != "num_batches_tracked"],
    "functional": ["input", "weight", "bias", "running_mean", "running_var", "dy"],
    "functions": ["input", "weight", "bias", "residual", "mask", "dy"],
    "normalize": ["input", "weight", "bias", "running_mean", "running_var", "residual", "dy"],
}
PAIRS = [(way, name) for way in WAYS for name in TAKEN_BY[way]]


def call(way, of, name):
    """y, of a call with the tensors; with residual and mask where it is one of these."""
    added = {each: of[each] for each in ("residual", "mask") if each == name}
    if way == "functions":
        return bt.batch_norm(of["input"], of["weight"], of["bias"], axis=1, **added)[0]
    running, parameters = [of[each] for each in RUNNING], [of["weight"], of["bias"]]
    if way == "normalize":
        return bt.normalize(of["input"], *running[:2], *parameters, axis=1, **added)
    if way == "functional":
        return bt.functional.batch_norm(of["input"], *running[:2], *parameters, training=True)
    layer = bt.BatchNorm1d(CHANNELS).train(way == "layer in training")
    for place, each in zip(RUNNING, running, strict=True):
        setattr(layer, place, each)
    for place, each in zip(("weight", "bias"), parameters, strict=True):
        delattr(layer, place)
        setattr(layer, place, each)
    return layer(of["input"], **added)


def with_gradients(way, of, name):
    """y, and the gradients of input, weight and bias."""
    leaves = [of[each] for each in ("input", "weight", "bias")]
    for each in leaves:
        each.requires_grad_(each.is_leaf)
    y = call(way, of, name)
    return [y, *torch.autograd.grad(y, leaves, of["dy"])]


def expected(way, of, name):
    """The same, by plain formulas."""
    values = {each: value.detach().double().numpy() for each, value in of.items()}
    arguments = [values[each] for each in ("input", "weight", "bias")]
    added = {each: values[each] for each in ("residual", "mask") if each == name}
    if way in ("layer in training", "functional", "functions"):
        y = truth.batch_norm(*arguments, axis=1, **added).y
        gradients = truth.batch_norm_gradients(values["dy"], *arguments, axis=1, **added)
        return [y, *(gradients[each] for each in ("x", "scale", "bias"))]
    x, scale, bias = arguments
    rstd = 1 / np.sqrt(values["running_var"] + 1e-5)
    x_hat, dy = (x - values["running_mean"]) * rstd, values["dy"]
    y = x_hat * scale + bias + added.get("residual", 0)
    return [y, dy * scale * rstd, (dy * x_hat).sum(0), dy.sum(0)]


# ---- cases in processes of their own


def outcome(case):
    try:
        return str(case())
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def outcomes(cases):
    """What becomes of cases in a process of their own; of each alone, if one has ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(30)
        os.write(writing, json.dumps(list(map(outcome, cases))).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        found = file.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return json.loads(found)
    if len(cases) == 1:
        return [f"ended with the status {status}"]
    return [found for case in cases for found in outcomes([case])]


def outcomes_of(table):
    done = subprocess.run(
        [sys.executable, __file__, table],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def freed(tensor):
    """Without its storage, as FSDP leaves parameters between uses."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_at_an_offset(tensor):
    """A piece of a flat tensor, whose address then is not even 0."""
    flat = torch.cat((torch.zeros(7, dtype=tensor.dtype), tensor.flatten()))
    tensor = flat[7:].view(tensor.shape)
    flat.untyped_storage().resize_(0)
    return tensor


FREED = {each.__name__: each for each in (freed, freed_at_an_offset)}
CONTEXTS = {
    "kernels": contextlib.nullcontext,
    "no kernels": without_native,
    "forward mode": forward_ad.dual_level,
}
SAVED = {
    "fewer": lambda each: each[:2].clone(),
    "one": lambda each: each[:1].clone(),
    "none": lambda each: each[:0].clone(),
    "channels": lambda each: each[..., :2].clone(),
    "of one more axis": lambda each: each[None].clone(),
    "a scalar": lambda each: each.sum(),
    "float64": lambda each: each.double(),
    "on meta": lambda each: each.to("meta"),
    "freed": freed,
}


def of_freed(kind, way, name, grad, context):
    of = tensors()
    if name in RUNNING:  # of which the others must not move
        before = {each: of[each].clone() for each in RUNNING if each != name}
    of[name] = FREED[kind](of[name])
    with CONTEXTS[context](), torch.set_grad_enabled(grad):
        try:
            with_gradients(way, of, name) if grad else call(way, of, name)
        except RuntimeError as error:
            if name in RUNNING:
                for each, value in before.items():
                    assert torch.equal(of[each], value), f"{each} has moved"
            return error


def of_saved(how, name, way, order, by_hooks):
    of = tensors()
    leaf = of["input"].clone().requires_grad_()
    of["input"] = leaf * 1
    for each in ("weight", "bias"):
        of[each].requires_grad_()
    address = of[name].data_ptr()

    def unpack(tensor):
        return SAVED[how](tensor.detach()) if tensor.data_ptr() == address else tensor

    with saved_tensors_hooks(lambda each: each, unpack) if by_hooks else contextlib.nullcontext():
        y = call(way, of, name)
    if not by_hooks:
        of[name].data = SAVED[how](of[name].data)
    leaves = [leaf, of["weight"], of["bias"]]
    try:
        first = torch.autograd.grad(y, leaves, of["dy"], create_graph=order > 1)
        if order > 1:
            torch.autograd.grad(first[0].square().sum(), leaf)
    except RuntimeError as error:
        return error


TABLES = {
    "of_freed": [
        (kind, way, name, grad, context)
        for kind, (way, name), grad, context in itertools.product(
            FREED, PAIRS, (False, True), CONTEXTS
        )
        if (grad or name != "dy") and (context == "kernels" or kind == "freed")
        if grad or (context == "kernels" and kind == "freed")
        if not (name == "dy" and context == "forward mode")
    ],
    "of_saved": [
        (how, name, way, order, by_hooks)
        for how, name, way, order, by_hooks in itertools.product(
            SAVED,
            ("input", "weight", "bias"),
            ("layer in training", "normalize"),
            (1, 2),
            (True, False),
        )
        if (order == 1 or by_hooks) and not (how == "channels" and name != "input")
        if not (how == "on meta" and not by_hooks)  # which PyTorch itself refuses
    ],
}


@pytest.fixture(scope="module")
def found():
    with ThreadPoolExecutor() as pool:
        return dict(zip(TABLES, pool.map(outcomes_of, TABLES), strict=True))


@pytest.mark.parametrize(
    ("kind", "context"), sorted({(each[0], each[-1]) for each in TABLES["of_freed"]})
)
def test_freed_storage_is_an_error_by_name(found, kind, context):
    spoken = {"input": "x", "weight": "scale", "running_mean": "mean", "running_var": "var"}
    cases = [each for each in TABLES["of_freed"] if (each[0], each[-1]) == (kind, context)]
    for case in cases:
        way, name = case[1:3]
        wanted = spoken.get(name, name) if way in ("functions", "normalize") else name
        outcome = found["of_freed"][str(case)]
        assert outcome.startswith(f"{wanted} has no memory: its shape is "), (case, outcome)


@pytest.mark.parametrize("how", SAVED)
def test_what_is_kept_for_the_backward_pass_and_changes(found, how):
    cases = [each for each in TABLES["of_saved"] if each[0] == how]
    message = (
        "has no memory" if how == "freed" else "What batch normalization kept for its backward"
    )
    for case in cases:
        assert message in found["of_saved"][str(case)], (case, found["of_saved"][str(case)])


# ---- what has memory, or is no business of the kernels


class Wrapper(torch.Tensor):
    """Holds a tensor, has no memory itself, and lets operations be done on that tensor."""

    @staticmethod
    def __new__(cls, tensor):
        self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001, PyTorch's own way to make one
            cls, tensor.shape, dtype=tensor.dtype
        )
        self.wrapped = tensor
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            if isinstance(value, (tuple, list)):
                return type(value)(map(unwrapped, value))
            return value.wrapped if isinstance(value, cls) else value

        keywords = {name: unwrapped(value) for name, value in (kwargs or {}).items()}
        return function(*unwrapped(args), **keywords)


def unaligned(tensor):
    memory = bytearray(1) + bytearray(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


def in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


KINDS = {
    "wrapper": Wrapper,
    "of zeros": lambda each: torch._efficientzerotensor(each.shape, dtype=each.dtype),
    "copied on write": torch._lazy_clone,  # noqa: SLF001, the operator alone gives one
    "with gaps": lambda each: torch.stack((each, each), -1)[..., 0],
    "unaligned": unaligned,
    "negated": lambda each: torch._neg_view(-each),
}


@pytest.mark.parametrize(
    ("kind", "way", "name"),
    [
        (kind, way, name)
        for kind, (way, name) in itertools.product(KINDS, PAIRS)
        if (kind, name) != ("negated", "num_batches_tracked")  # no integers are
    ],
)
def test_any_tensor_in_any_place(kind, way, name):
    of = tensors()
    plain = torch.zeros_like(of[name]) if kind == "of zeros" else of[name].clone()
    moves = way in ("layer in training", "functional")
    of[name] = KINDS[kind](of[name])
    if kind == "of zeros" and name in RUNNING and moves:
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            call(way, of, name)
        return
    found = [getattr(each, "wrapped", each) for each in with_gradients(way, of, name)]
    near(found, expected(way, {**of, name: plain}, name), 1e-5)
    if name in RUNNING and moves:
        wanted = {**tensors(), name: plain}
        call(way, wanted, name)
        for each in RUNNING:
            near(getattr(of[each], "wrapped", of[each]), wanted[each], 1e-6, each)


NO_NUMBERS = {
    "meta": lambda each: each.to("meta"),
    "sparse": lambda each: each.to_sparse(),
    "quantized": lambda each: torch.quantize_per_tensor(each.float(), 0.1, 0, torch.quint8),
}


# PyTorch warns of the only function that makes a quantized tensor; it is no warning of ours.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize(
    ("way", "name", "grad"),
    [
        (way, name, grad)
        for (way, name), grad in itertools.product(PAIRS, (True, False))
        if name != "num_batches_tracked" and (grad or name != "dy")
    ],
)
def test_tensors_that_are_refused_change_nothing(kind, way, name, grad):
    of = tensors()
    before = {each: of[each].clone() for each in RUNNING}
    of[name] = NO_NUMBERS[kind](of[name])
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, TypeError, ValueError)):
        with_gradients(way, of, name) if grad else call(way, of, name)
    for each, value in before.items():
        if each != name and name != "dy":
            assert torch.equal(of[each], value), each


# PyTorch itself scripts its derivatives at the first tangent of a process, and warns of that.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean"])
def test_a_tangent_of_a_parameter_alone(name):
    of = tensors()
    with forward_ad.dual_level():
        of[name] = forward_ad.make_dual(of[name], torch.ones(CHANNELS))
        tangent = forward_ad.unpack_dual(call("normalize", of, name)).tangent
    rstd = 1 / (of["running_var"].double() + 1e-5).sqrt()
    x_hat = (of["input"] - tensors()["running_mean"]) * rstd
    weight = tensors()["weight"]
    of_each = {"weight": x_hat, "bias": torch.ones(ROWS, CHANNELS), "running_mean": -weight * rstd}
    near(tangent, of_each[name].expand(ROWS, CHANNELS), 1e-5)


def test_a_sharded_layer_by_itself(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        of = tensors()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        net = torch.nn.Sequential(bt.BatchNorm1d(CHANNELS), torch.nn.Identity())
        with torch.no_grad():
            net[0].weight.copy_(of["weight"]), net[0].bias.copy_(of["bias"])
        fully_shard(net, mesh=mesh)
        y = net(of["input"])
        near(y, expected("functions", of, None)[0])
        net.reshard()
        for training, grad in itertools.product((True, False), (True, False)):
            before = net[0].running_mean.clone()
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="DTensor"):
                net[0].train(training)(of["input"])
            assert torch.equal(net[0].running_mean, before)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_without_memory_nothing_changes():
    program = """
import resource, torch
import batchnorm.torch as bt
torch.set_num_threads(1)
def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
x = torch.randn(8, 500_000)
dtypes = (torch.float32, torch.float64)
layers = [bt.BatchNorm1d(500_000, dtype=dtype, momentum=momentum, skip_nonfinite=momentum is None)
          for dtype in dtypes for momentum in (0.1, None)]
inputs = {dtype: x.to(dtype) for dtype in dtypes}
bt.BatchNorm1d(2)(torch.randn(4, 2))  # loads what it needs while there is memory
def state(layer):
    return {name: each.clone() for name, each in layer.named_buffers()}
failures = successes = 0
for layer in layers:
    before = state(layer)
    for limit in range(1 << 20, 1 << 28, 8 << 20):
        resource.setrlimit(resource.RLIMIT_AS, (size() + limit, resource.RLIM_INFINITY))
        try:
            layer(inputs[layer.weight.dtype])
        except (MemoryError, RuntimeError):
            failed = True
        else:
            failed = False
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        if not failed:
            successes += 1
            break
        failures += 1
        for name, value in state(layer).items():
            assert torch.equal(value, before[name]), (name, limit)
        assert layer._tracked is None
assert successes == 4 and failures >= 8, (successes, failures)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    do = globals()[sys.argv[1]]
    table = TABLES[do.__name__]
    together = 16
    found = []
    for start in range(0, len(table), together):
        part = table[start : start + together]
        found += outcomes([lambda case=case: do(*case) for case in part])
    print(json.dumps(dict(zip(map(str, table), found, strict=True))))
