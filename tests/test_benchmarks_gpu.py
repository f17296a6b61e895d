"""What the benchmarks for a GPU compute, where there is none: numbers known from elsewhere."""

import copy
import math
import warnings
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from batchnorm import native

# As at a user's without a compiler; `make test` requires native kernels.
if native.kernels is None:
    pytest.skip("benchmarks need the native module", allow_module_level=True)

with warnings.catch_warnings():
    # PyTorch's Inductor itself uses torch.jit when it is imported.
    warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated")
    import gpu
    import inductor
import resnet50
import traffic
from measure import FIRST, LAST, Result, Work, results_of

PAGES = Path(__file__).parents[1] / "docs"


# ---- ResNet-50


def test_resnet50_has_the_parameters_that_are_known():
    with torch.device("meta"):
        models = [resnet50.ResNet50(), resnet50.FusedResNet50()]
    for model in models:
        assert sum(each.numel() for each in model.parameters()) == 25_557_032


def test_the_set_is_what_resnet50_normalizes():
    found, variants = Counter(), Counter()

    def record(layer, inputs, others, y):
        variant = (others.get("residual") is not None, others.get("activation"))
        found[tuple(y.shape)] += 1
        variants[tuple(y.shape), variant] += 1

    with torch.device("meta"):
        model, images = resnet50.FusedResNet50(), torch.empty(traffic.BATCH, 3, 224, 224)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.register_forward_hook(record, with_kwargs=True)
        model(images)
    assert found == {each.shape: each.times for each in traffic.SET}
    names = {
        traffic.PLAIN: (False, None),
        traffic.RELU: (False, "relu"),
        traffic.RESIDUAL_RELU: (True, "relu"),
    }
    assert variants == {
        (each.shape, names[variant]): times
        for each in traffic.SET
        for variant, times in traffic.variants(each).items()
    }


def test_models_compute_the_same():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    state = resnet50.ResNet50().double().state_dict()
    found = {}
    for name, make in resnet50.MODELS.items():
        with torch.device("meta"):
            model = make().double()
        model.load_state_dict(copy.deepcopy(state), assign=True)
        y = model(images)
        gradients = torch.autograd.grad(y.square().mean(), [*model.parameters()])
        found[name] = [y.detach(), *gradients, *model.buffers()]
    expected = found.pop(resnet50.TORCH_NN)
    for ours in found.values():
        for mine, other in zip(ours, expected, strict=True):
            largest = other.abs().max().item()
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9 * largest)


# ---- by the bytes


def test_roofline():
    """206 MB at 3.35 TB/s, 61 µs a pass; the set, 2.83 GB in bfloat16, 8 passes."""
    first, h100 = traffic.SET[0], traffic.DEVICES[0]
    assert first.shape == (128, 64, 112, 112)
    assert round(traffic.microseconds(first, 3, h100)) == 184
    assert round(traffic.microseconds(first, 5, h100)) == 307
    of_set = [
        traffic.milliseconds_of_set(traffic.OURS, "plain", device) for device in traffic.DEVICES
    ]
    assert [f"{each:.1f}" for each in of_set] == ["6.8", "11.2"]
    assert f"{traffic.milliseconds_of_set(traffic.TORCH_NN, None, h100):.1f}" == "11.7"


def test_the_estimate_stands_on_the_page():
    for page in ("performance.md", "benchmarks-gpu.md"):
        assert traffic.estimate() in (PAGES / page).read_text(), "copy it there anew"


# ---- passes of torch.compile


def many_operations(layer, x, residual):
    """More than Inductor takes as one: tensors in between, which a kernel keeps in registers."""
    for _ in range(40):
        x = x.sin() + 1.0
    return x


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda layer, x, residual: x * 2.0, (2, 2)),
        (many_operations, (2, 3)),
        (lambda layer, x, residual: x * residual, (3, 5)),
        # Twice through x, in one kernel or two; the mean of 8 is an eighth, written and read.
        (lambda layer, x, residual: x - x.mean((2, 3), keepdim=True), (3, 3)),
        (lambda layer, x, residual: x - x.mean(0, keepdim=True), (3.25, 3.25)),
        (lambda layer, x, residual: layer(x), (3, 5)),
    ],
)
def test_passes_of_what_is_compiled(function, expected):
    x = torch.randn(8, 16, 12, 12)
    layer = torch.nn.BatchNorm2d(16)
    found = inductor.passes(layer, x, torch.randn_like(x), function)
    assert found == pytest.approx(expected, abs=0.1)


def test_signs_of_relu_are_bytes():
    x = torch.randn(8, 16, 12, 12, dtype=torch.bfloat16)
    function = partial(gpu.apply, variant=traffic.RELU)
    found = inductor.passes(torch.nn.BatchNorm2d(16), x, None, function)
    assert found == pytest.approx((3.5, 6), abs=0.1)


# ---- the page


def record(**parts):
    empty = {"machine": "", "counted_on": "a CPU", "passes": [], "results": [], "kernels": []}
    return {**empty, **parts}


def results_of_set(forward, copied):
    """Of two shapes in bfloat16, channels last, forward, plain: seconds of two rounds."""
    return [
        result
        for each in (Work((128, 64, 112, 112), 1), Work((128, 64, 56, 56), 6))
        for result in results_of(
            "bfloat16",
            each,
            LAST,
            "forward, plain",
            {gpu.OURS: forward, gpu.TORCH_NN: [2 * time for time in forward], "copy": copied},
        )
    ]


def test_page_without_a_gpu():
    page = gpu.page(record())
    assert "nothing has been timed" in page.splitlines()[0]
    assert traffic.estimate() in page
    assert "The set" not in page


def test_page_of_a_gpu():
    found = results_of_set([2e-3, 2e-3], [1e-3, 1e-3])
    found += results_of(
        "launch", gpu.SMALL, LAST, "forward, plain", {gpu.OURS: [2e-5], gpu.TORCH_NN: [1e-5]}
    )
    step = Work((128, 3, 224, 224))
    found += results_of("step", step, LAST, "a step", {"torch.nn": [0.1], "convert": [0.08]})
    page = gpu.page(record(machine="A GPU, driver 1", results=[asdict(each) for each in found]))
    assert page.startswith("# On a GPU: A GPU, driver 1\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    # Three passes in twice the time of a copy, which is two.
    assert ["bfloat16", "forward, plain", LAST, "75%", "75%", "75%"] in rows
    assert ["forward, plain", LAST, "14.0", "2.00", "2.00"] in rows
    assert ["(128, 64, 112, 112)", "411"] in rows  # GB/s
    assert ["forward, plain", gpu.OURS, "20.0", "2.00"] in rows
    assert ["a step", "convert", "80.0", "1600", "0.800"] in rows


def test_passes_of_ours():
    small = Work((128, 512, 7, 7))
    assert traffic.passes(small, FIRST, "plain") == (2, 3)
    assert traffic.passes(small, LAST, "plain") == (3, 5)
    assert traffic.passes(Work((128, 256, 14, 14)), FIRST, "residual and relu") == (4, 7)


def test_what_is_measured_again_takes_its_place():
    def results(milliseconds, *dtypes):
        return [
            asdict(Result(each, LAST, (16, 32), 1, "forward", "", milliseconds, 1, math.nan))
            for each in dtypes
        ]

    kernels = [[dtype, LAST, "torch.nn", "old", "1"] for dtype in ("float16", "float32")]
    old = record(machine="A", results=results(1.0, "float16", "float32"), kernels=kernels)
    served = [["float32", LAST, "torch.nn", "new", "1"]]
    new = record(machine="A", results=results(2.0, "float32"), kernels=served)
    found = gpu.merged(old, new)
    times = [(each["framework"], each["milliseconds"]) for each in found["results"]]
    assert times == [("float16", 1.0), ("float32", 2.0)]
    assert found["kernels"] == [kernels[0], *served]
    elsewhere = {**new, "machine": "B"}
    assert gpu.merged(old, elsewhere) == elsewhere


def test_names_of_kernels():
    name = "void at::native::(anonymous namespace)::sums<float, at::Op<(int)3>, 4>(float*, int)"
    assert gpu.short(name) == "at::native::sums"
    assert gpu.short("_normalize_0d1d2d") == "_normalize_0d1d2d"


def test_sides_are_called_as_they_are_named():
    for call in gpu.CALLS:
        sides = gpu.calls(Work((4, 8, 3, 3)), LAST, torch.float32, call, "cpu")
        ours, theirs = (
            [*each] if call.gradients else [each]
            for each in (sides[gpu.OURS](), sides[gpu.TORCH_NN]())
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    with gpu.context(gpu.NO_CUDNN):
        assert not torch.backends.cudnn.enabled
    with gpu.context(gpu.PLAIN_OPERATIONS):
        sides[gpu.PLAIN_OPERATIONS]()
