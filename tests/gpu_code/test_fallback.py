"""Where kernels can't serve: operations do, with the same results, and it is said once why."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import pytest
import test_torch_memory as memory
import torch
import truth
from compare import near
from gpu_code.cutting import cut
from gpu_code.interpreter import launches
from torch.autograd.graph import saved_tensors_hooks

import batchnorm.torch
from batchnorm.torch import _gpu
from batchnorm.torch._gpu import kernels, launching, plans, stages

# Those of a training step, where a channel fits one program and where not; `running_kernel` is
# launched where a batch may be empty, by a mask.
IN_ONE = ("forward_kernel", "running_kernel", "backward_kernel")
IN_THREE = (
    *("moments_kernel", "merge_moments_kernel", "running_kernel", "normalize_kernel"),
    *("gradient_sums_kernel", "merge_sums_kernel", "input_gradient_kernel"),
)
BY_GIVEN = ("coefficients_kernel", "normalize_kernel")
ROWS, CHANNELS, RATE, EPS = 6, 4, 0.25, 1e-5


@pytest.fixture(autouse=True)
def _as_before_any_call():
    def forget():
        plans.plan_of.cache_clear()
        _gpu._stages.cache_clear()
        _gpu.warn.cache_clear()

    forget()
    with patch.object(_gpu._Trouble, "reason", None), patch.dict(launching._loaded, clear=True):
        yield
    forget()


# ---- steps, and the truth of each


@dataclass
class Step:
    """A layer's call, and its gradients. `moves`: how often running statistics move."""

    training: bool
    mask: bool = False

    def run(self) -> tuple[batchnorm.torch.BatchNorm1d, list[torch.Tensor]]:
        values = self.values()
        layer = batchnorm.torch.BatchNorm1d(CHANNELS, EPS, RATE, activation="silu")
        layer.load_state_dict({**layer.state_dict(), **{n: values[n] for n in STATE}})
        layer.train(self.training)
        x = values["x"].requires_grad_()
        y = layer(x, mask=values["mask"])
        return layer, [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], values["dy"])]

    def values(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(ROWS, CHANNELS, 5, generator=generator) for _ in range(2))
        weight, bias, mean = (torch.randn(CHANNELS, generator=generator) for _ in range(3))
        mask = torch.rand(ROWS, 1, 5, generator=generator) < 0.7 if self.mask else None
        var = torch.rand(CHANNELS, generator=generator) + 0.5
        return {
            **{"x": 3 + 2 * x, "dy": dy, "mask": mask, "weight": weight, "bias": bias},
            **{"running_mean": mean, "running_var": var},
        }

    def check(self, layer: batchnorm.torch.BatchNorm1d, found: list[torch.Tensor]) -> None:
        values = {
            name: None if each is None else each.double().numpy()
            for name, each in self.values().items()
        }
        arguments = [values[name] for name in ("x", "weight", "bias")]
        keywords = {"axis": 1, "eps": EPS, "activation": "silu", "mask": values["mask"]}
        running = values["running_mean"], values["running_var"]
        if not self.training:
            keywords["given"] = running
        wanted = truth.batch_norm(*arguments, **keywords)
        gradients = truth.batch_norm_gradients(values["dy"], *arguments, **keywords)
        near(found, [wanted.y, *(gradients[each] for each in ("x", "scale", "bias"))])
        if self.training:
            unbiased = wanted.var * wanted.count / (wanted.count - 1)
            pairs = zip(running, (wanted.mean, unbiased), strict=True)
            running = [(1 - RATE) * old + RATE * new for old, new in pairs]
        near([layer.running_mean, layer.running_var], list(running))
        assert layer.num_batches_tracked == self.training


STATE = ("weight", "bias", "running_mean", "running_var")


@contextmanager
def warned(*reasons: str):
    """That each of these is said once, and nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [each.category for each in caught] == [RuntimeWarning] * len(reasons), caught
    for each, reason in zip(caught, reasons, strict=True):
        assert str(each.message).startswith(f"batchnorm's kernels for GPUs can't serve: {reason}")


# ---- no Triton; a kernel that can't be compiled


def test_triton_that_is_broken():
    step, broken = Step(training=True), ImportError("libtriton.so: undefined symbol")
    with patch.object(_gpu, "import_module", side_effect=broken), launches() as launched:
        with warned("Triton can't be imported (ImportError: libtriton.so: undefined symbol)"):
            step.check(*step.run())
            step.check(*step.run())
        assert "can't be imported" in _gpu._report()
    assert launched == []


def fails(*arguments, **keywords):
    raise ValueError("no ptxas")


def failing(name: str):
    return patch.object(getattr(kernels, name), "run", fails)


@pytest.mark.parametrize(
    ("name", "way", "step"),
    [
        *((name, nullcontext, Step(True, mask=name == "running_kernel")) for name in IN_ONE),
        *((name, cut, Step(True, mask=name == "running_kernel")) for name in IN_THREE),
        *((name, nullcontext, Step(False)) for name in BY_GIVEN),
    ],
    ids=str,
)
def test_a_kernel_that_can_not_be_compiled(name: str, way: Callable, step: Step):
    with way(), failing(name), launches() as launched:
        with warned(f"{name} can't be compiled (ValueError: no ptxas)"):
            step.check(*step.run())
        before = len(launched)
        with warned():
            step.check(*step.run())
        assert len(launched) == before
        assert f"{name} can't be compiled" in _gpu._report()
    assert name not in launched


def test_the_steps_launch_all_these_kernels():
    """Else the test above would see no kernel fail."""
    for way, step, names in (
        *((nullcontext, Step(True, mask), IN_ONE) for mask in (False, True)),
        *((cut, Step(True, mask), IN_THREE) for mask in (False, True)),
        (nullcontext, Step(False), BY_GIVEN),
    ):
        with way(), launches() as launched:
            step.check(*step.run())
        assert {*names} - {*launched} <= ({"running_kernel"} if not step.mask else set())


# ---- a graph that is captured before anything is loaded


@contextmanager
def capturing(until: str = ""):
    """As in torch.cuda.graph, up to the first kernel of this name."""
    is_over = False

    def run(device, given):
        nonlocal is_over
        given = list(given)
        names = {each.programs.kernel.fn.__name__ for each in given}
        is_over = is_over or until in names
        return launching.run(torch.device("cpu" if is_over else "cuda"), given)

    with (
        patch.object(stages, "run", run),
        patch("torch.cuda.is_current_stream_capturing", lambda: True),
    ):
        yield


IN_CAPTURE = "a kernel can't be loaded while a graph is captured"


@pytest.mark.parametrize("way", [nullcontext, cut])
def test_a_capture_before_anything_is_loaded(way: Callable):
    step = Step(training=True)
    with way(), launches() as launched:
        with warned(IN_CAPTURE), capturing():
            step.check(*step.run())
        assert launched == []
        with warned():
            step.check(*step.run())
        assert launched
        assert "kernels in Triton" in _gpu._report()


@pytest.mark.parametrize("way", [nullcontext, cut])
@pytest.mark.parametrize("mask", [False, True])
def test_operations_forward_and_kernels_backward(way: Callable, mask: bool):
    step = Step(training=True, mask=mask)
    backward = "backward_kernel" if way is nullcontext else "gradient_sums_kernel"
    with way(), launches() as launched, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with capturing(until=backward):
            step.check(*step.run())
    assert launched[:2] == ["coefficients_kernel", backward]


# ---- what has lost its memory, or is not what it was; tests/test_torch_memory.py has the cases


def outcomes(do: Callable, cases: list) -> list[str]:
    return memory.outcomes([partial(do, *case) for case in cases])


@pytest.mark.parametrize("kind", memory.FREED)
def test_freed_storage_is_an_error_by_name(kind: str):
    spoken = {"input": "x", "weight": "scale", "running_mean": "mean", "running_var": "var"}
    cases = [case for case in memory.TABLES["of_freed"] if (case[0], case[-1]) == (kind, "kernels")]
    for case, outcome in zip(cases, outcomes(memory.of_freed, cases), strict=True):
        way, name = case[1:3]
        wanted = spoken.get(name, name) if way in ("functions", "normalize") else name
        assert outcome.startswith(f"{wanted} has no memory: its shape is "), (case, outcome)


@pytest.mark.parametrize("how", memory.SAVED)
def test_what_is_kept_for_the_backward_pass_and_changes(how: str):
    cases = [each for each in memory.TABLES["of_saved"] if each[0] == how]
    message = (
        "has no memory" if how == "freed" else "What batch normalization kept for its backward"
    )
    for case, outcome in zip(cases, outcomes(memory.of_saved, cases), strict=True):
        assert message in outcome, (case, outcome)


LARGER = {
    "more rows": lambda each: torch.cat((each, each)),
    "more channels": lambda each: torch.cat((each, each), 1),
    "other order": lambda each: each.mT.contiguous().mT,
    "float16": lambda each: each.half(),
    "with gaps": lambda each: torch.stack((each, each), -1)[..., 0],
}


@pytest.mark.parametrize("way", [nullcontext, cut])
@pytest.mark.parametrize("change", LARGER)
@pytest.mark.parametrize("name", ["x", "residual", "mask"])
def test_a_hook_that_gives_back_something_else(name: str, change: str, way: Callable):
    """What fits is taken as it is; the rest is refused, and never read beyond its end."""
    generator = torch.Generator().manual_seed(0)
    of = {each: torch.randn(ROWS, CHANNELS, generator=generator) for each in ("x", "residual")}
    of["mask"] = torch.rand(ROWS, CHANNELS, generator=generator) + 0.5
    dy = torch.randn(ROWS, CHANNELS, generator=generator)
    leaf = of["x"].clone().requires_grad_()
    of["x"] = leaf * 1
    address = of[name].data_ptr()

    def unpack(tensor):
        return LARGER[change](tensor.detach()) if tensor.data_ptr() == address else tensor

    is_refused = change.startswith("more") or (change == "float16" and name != "mask")
    refusal = pytest.raises(RuntimeError, match="What batch normalization kept")
    with way(), launches() as launched:
        with saved_tensors_hooks(lambda each: each, unpack):
            y, _ = batchnorm.torch.batch_norm(
                *(of["x"], None, None),
                **{"axis": 1, "mask": of["mask"], "residual": of["residual"], "activation": "silu"},
            )
        before = len(launched)
        with refusal if is_refused else nullcontext():
            (found,) = torch.autograd.grad(y, leaf, dy)
        assert (len(launched) == before) == is_refused
    if not is_refused:
        arrays = {each: value.detach().double().numpy() for each, value in of.items()}
        x = arrays.pop("x")
        wanted = truth.batch_norm_gradients(dy.numpy(), x, axis=1, activation="silu", **arrays)
        near(found, wanted["x"], 2e-3 if change == "float16" else 1e-5)
