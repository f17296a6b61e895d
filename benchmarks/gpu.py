"""Time the PyTorch door on a GPU beside torch.nn, and write docs/benchmarks-gpu.md.

All sides take turns, round after round in another order; ratios are formed in a round. The clock is
the GPU's own. Before each call the GPU reads memory of several times its cache, so that no side
finds x there, for longer than the host takes to launch the slowest side: so none waits for it.

Without a GPU, the page has what can be known without: the passes over memory, and an estimate. A
part that is measured again takes the place of what the record (--json) has of it, if that is of
the same machine and day. With --quick there are few shapes, and the page is written into build/.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import inductor
import resnet50
import torch
import torch.nn.functional as F
from measure import FIRST, LAST, Calls, Result, Work, results_of
from report import by, shapes, slower, summary
from tabulate import tabulate
from torch import Tensor, nn
from traffic import BATCH, PLAIN, RESIDUAL_RELU, SET, VARIANTS, estimate, passes

import batchnorm.torch

OURS, TORCH_NN, NO_CUDNN = "batchnorm.torch", "torch.nn", "torch.nn without cuDNN"
COMPILED, PLAIN_OPERATIONS = "torch.nn, compiled", "batchnorm.torch, plain operations"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = {LAST: torch.channels_last, FIRST: torch.contiguous_format}
SMALL = Work((16, 32))
LAUNCH, STEP = "launch", "step"  # in the place of a dtype in their results
PARTS = ("set", LAUNCH, STEP)
KERNELS = "batchnorm.torch._gpu"  # the room of our kernels for a GPU


def plain_operations() -> AbstractContextManager[object]:
    """Our layers without their kernels for a GPU."""
    if importlib.util.find_spec(KERNELS) is None:
        return nullcontext()
    return mock.patch(f"{KERNELS}.DEVICES", frozenset())


def context(side: str) -> AbstractContextManager[object]:
    if side == NO_CUDNN:
        return torch.backends.cudnn.flags(enabled=False)
    return plain_operations() if side == PLAIN_OPERATIONS else nullcontext()


# ---- the calls


@dataclass(frozen=True)
class Call:
    variant: str
    gradients: bool

    @property
    def name(self) -> str:
        return f"forward{' + backward' * self.gradients}, {self.variant}"


CALLS = [Call(*each) for each in product(VARIANTS, (False, True))]


def apply(layer: nn.Module, x: Tensor, residual: Tensor | None, *, variant: str) -> Tensor:
    """A normalization, and what follows it: one call of our layers, or several of torch.nn's."""
    activation = None if variant == PLAIN else "relu"
    if isinstance(layer, (batchnorm.torch.BatchNorm1d, batchnorm.torch.BatchNorm2d)):
        y: Tensor = layer(x, residual=residual, activation=activation)
        return y
    y = layer(x)
    if residual is not None:
        y += residual
    return y if activation is None else F.relu(y, inplace=True)


def calls(each: Work, layout: str, dtype: torch.dtype, call: Call, device: str) -> Calls:
    """The sides of one comparison, ours first, and a copy of x."""

    def tensor() -> Tensor:
        values = torch.randn(each.shape, dtype=dtype, device=device)
        if values.ndim < 4:
            return values
        return values.contiguous(memory_format=FORMATS[layout])

    x, dy = tensor().requires_grad_(call.gradients), tensor()
    residual = tensor().requires_grad_(call.gradients) if call.variant == RESIDUAL_RELU else None
    name = "BatchNorm2d" if len(each.shape) == 4 else "BatchNorm1d"
    ours, theirs = (
        getattr(module, name)(each.shape[1], device=device) for module in (batchnorm.torch, nn)
    )
    function = partial(apply, variant=call.variant)
    compiled = torch.compile(function, dynamic=False)

    def timed(layer: nn.Module, function: Callable[..., Tensor] = function) -> Callable[[], object]:
        inputs = [value for value in (x, residual) if value is not None]

        def run() -> object:
            with torch.set_grad_enabled(call.gradients):
                y = function(layer, x, residual)
                if not call.gradients:
                    return y
                return torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)

        return run

    out = torch.empty_like(x)
    return {
        OURS: timed(ours),
        TORCH_NN: timed(theirs),
        NO_CUDNN: timed(theirs),
        COMPILED: timed(theirs, compiled),
        PLAIN_OPERATIONS: timed(ours),
        "copy": lambda: out.copy_(x.detach()),
    }


# ---- the clocks


def gpu_seconds(calls: Calls, rounds: int, *, head_start: bool = True) -> dict[str, list[float]]:
    """By the events of the GPU; without a head start, with what the host takes to launch."""
    for name, call in [*calls.items()] * 3:
        with context(name):
            call()
    ahead, clear = 0, _clear_cache()
    if head_start:
        launching = max(_launch_seconds(name, call, 1) for name, call in calls.items())
        ahead = 1 + math.ceil(1.5 * launching / min(_event_seconds(clear) for _ in range(5)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, random = list(calls), Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            with context(name):
                for _ in range(ahead):
                    clear()
                times[name].append(_event_seconds(calls[name]))
    return times


def launch_seconds(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """What the host takes for a call, without waiting for the GPU in between."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, random = list(calls), Random(0)
    for number in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            seconds = _launch_seconds(name, calls[name], 100)
            if number:  # the first is for warming up
                times[name].append(seconds)
    return times


def _clear_cache() -> Callable[[], object]:
    properties = torch.cuda.get_device_properties()
    size = max(4 * properties.L2_cache_size, 2**28)
    return torch.zeros(size // 4, device="cuda").sum  # reading leaves nothing to be written back


def _event_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _launch_seconds(side: str, call: Callable[[], object], times: int) -> float:
    with context(side):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        seconds = (time.perf_counter() - start) / times
        torch.cuda.synchronize()
    return seconds


# ---- the parts


def of_set(
    dtype: torch.dtype, layout: str, quick: bool, served: dict[tuple[str, ...], int]
) -> list[Result]:
    """The set in one dtype and layout; `served` counts the shapes that a kernel served."""
    found = []
    for each in SET[1:9:7] if quick else SET:
        for call in CALLS:
            sides = calls(each, layout, dtype, call, "cuda")
            times = gpu_seconds(sides, 5 if quick else 30)
            found += results_of(_name(dtype), each, layout, call.name, times)
            if call.variant == PLAIN and call.gradients:
                for side in (OURS, TORCH_NN, NO_CUDNN):
                    for kernel in kernels_of(side, sides[side]):
                        key = _name(dtype), layout, side, kernel
                        served[key] = served.get(key, 0) + 1
            torch._dynamo.reset()
    return found


def kernels_of(side: str, call: Callable[[], object]) -> set[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with context(side), torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = {each.name for each in profile.events() if each.device_type.name == "CUDA"}
    return {short(name) for name in names if not name.startswith(("Memcpy", "Memset"))}


def short(kernel: str) -> str:
    """The name of a kernel without its arguments, those of templates too."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth, kept = 0, ""
    for letter in name:
        if letter == "(" and not depth:
            break
        depth += letter == "<"
        kept += letter if not depth else ""
        depth -= letter == ">"
    return kept


def launches(quick: bool) -> list[Result]:
    found = []
    for gradients in (False, True):
        call = Call(PLAIN, gradients)
        sides = calls(SMALL, LAST, torch.float32, call, "cuda")
        times = launch_seconds(sides, 3 if quick else 20)
        found += results_of(LAUNCH, SMALL, LAST, call.name, times)
    return found


def steps(quick: bool) -> list[Result]:
    """Of the whole ResNet-50, torch.nn first."""
    torch.backends.cudnn.benchmark = True
    each = Work((8 if quick else BATCH, 3, 224, 224))
    images = torch.randn(each.shape, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, each.shape[:1], device="cuda")
    found = []
    for compiled in (False, True):
        sides: Calls = {
            name: resnet50.training_step(name, images, labels, compiled=compiled)
            for name in resnet50.MODELS
        }
        if not compiled:
            sides[PLAIN_OPERATIONS] = resnet50.training_step(resnet50.CONVERTED, images, labels)
        times = gpu_seconds(sides, 3 if quick else 20, head_start=False)
        call = "a step, compiled" if compiled else "a step"
        found += results_of(STEP, each, LAST, call, times)
        torch._dynamo.reset()
    torch.backends.cudnn.benchmark = False
    return found


def counted(quick: bool, device: str) -> list[list[Any]]:
    """Rows of passes in what torch.compile makes of our layer, and of torch.nn's."""
    rows = []
    for dtype, layout in [*product((torch.float32, torch.bfloat16), (LAST, FIRST))][
        : 1 if quick else 4
    ]:
        values = torch.randn(32, 64, 28, 28, dtype=dtype, device=device)
        x = values.contiguous(memory_format=FORMATS[layout])
        for variant in VARIANTS:
            residual = torch.randn_like(x) if variant == RESIDUAL_RELU else None
            of_layers = [
                inductor.passes(
                    module.BatchNorm2d(64, device=device),
                    x,
                    residual,
                    partial(apply, variant=variant),
                )
                for module in (batchnorm.torch, nn)
            ]
            cells = [f"{each:.3g}" for pair in of_layers for each in pair]
            rows.append([_name(dtype), layout, variant, *cells])
    return rows


# ---- the page


def machine() -> str:
    """What is measured, and today."""
    if not torch.cuda.is_available():
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    has_triton = importlib.util.find_spec("triton") is not None
    triton = importlib.import_module("triton").__version__ if has_triton else "none"
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, {platform}, "
        f"cuDNN {torch.backends.cudnn.version()}, PyTorch {torch.__version__}, Triton {triton}, "
        f"{date.today():%d %B %Y}"
    )


NOTHING_TIMED = """# On a GPU: nothing has been timed yet

`make bench-gpu` writes this page. Where there is no GPU, as where this one was written, it has what
can be known without: passes counted, and an estimate."""

MEASURED = f"""# On a GPU: {{machine}}

`make bench-gpu` has made this page, by `benchmarks/gpu.py`: all sides take turns, round after round
in another order, by the clock of the GPU. Times are medians; a ratio is formed in each round, and
its median given. The unit is a copy of x on the GPU: 1 read and 1 write. Before each call the GPU
reads several times what its cache holds, for longer than the host needs to launch the call: x comes
from memory, and no side waits for the host.

"The set" is the 53 batch normalizations of ResNet-50 at batch {BATCH}, each shape counted as often
as the network has it. torch.nn adds a residual and applies relu in calls of their own, in place;
with torch.compile, in what that makes of all."""


def page(record: dict[str, Any]) -> str:
    """`record` is what `main` writes: the machine, "" for none, and what each part has found."""
    found = [Result(**{**each, "shape": tuple(each["shape"])}) for each in record["results"]]
    machine = record["machine"]
    parts = [MEASURED.format(machine=machine) if machine else NOTHING_TIMED]
    of_part = {name: [each for each in found if each.framework == name] for name in (LAUNCH, STEP)}
    of_dtypes = [each for each in found if each.framework not in of_part]
    if of_dtypes:
        parts += ["## Bandwidth of a copy, GB/s", copies(of_dtypes)]
        parts += ["## What of a copy's bandwidth our passes reach", SHARES, shares(of_dtypes)]
    for (name,), group in by(of_dtypes, "framework"):
        parts += [f"## The set, {name}", summary(group), slower(group)]
    if record["kernels"]:
        headings = ["dtype", "layout", "side", "kernel", "shapes"]
        parts += ["## Which kernels served forward + backward, plain"]
        parts += [_table(record["kernels"], headings)]
    if of_part[LAUNCH]:
        parts += [f"## Launching, {SMALL.shape}, float32", LAUNCHING, launching(of_part[LAUNCH])]
    if of_part[STEP]:
        parts += ["## A training step of ResNet-50", STEPS, whole_steps(of_part[STEP])]
    parts += ["## Passes in what torch.compile makes", COUNTED.format(device=record["counted_on"])]
    parts += [_table(record["passes"], COUNTED_HEADINGS)]
    parts += ["## By the bytes, an estimate", estimate()]
    for (name, call), group in by(of_dtypes, "framework", "call"):
        parts += [f"## Every shape, {name}, {call}", shapes(group)]
    return "\n\n".join(parts) + "\n"


def copies(found: Iterable[Result]) -> str:
    """Of every shape, for each dtype, channels last."""
    of_copies = [each for each in found if (each.side, each.layout) == ("copy", LAST)]
    names = [name for (name,), _ in by(of_copies, "framework")]
    rows = []
    for _, group in by(of_copies, "shape"):
        speeds = {each.framework: _moved(each) / each.milliseconds / 1e6 for each in group}
        rows.append(
            [
                str(group[0].shape),
                *(f"{speeds[name]:.0f}" if name in speeds else "–" for name in names),
            ]
        )
    return _table(rows, ["N, C, …", *names])


def _moved(copy: Result) -> int:
    return 2 * math.prod(copy.shape) * getattr(torch, copy.framework).itemsize


SHARES = """The passes that our kernels make, each one reading or writing of a tensor of x's size,
in the time that copies take for as many: over the set, and where it is least and most."""


def shares(found: list[Result]) -> str:
    rows = []
    for (dtype, name, layout), group in by(found, "framework", "call", "layout"):
        call = next(each for each in CALLS if each.name == name)
        ours, least, copied = 0.0, [], 0.0
        of_sides = {(each.side, each.shape): each for each in group}
        for (side, shape), each in of_sides.items():
            if side != OURS:
                continue
            forward, backward = passes(Work(shape, each.times), layout, call.variant)
            number = forward + backward * call.gradients
            least.append(number / 2 / each.copies)
            ours += each.times * each.milliseconds
            copied += each.times * number / 2 * of_sides["copy", shape].milliseconds
        cells = [f"{share:.0%}" for share in (copied / ours, min(least), max(least))]
        rows.append([dtype, name, layout, *cells])
    return _table(rows, ["dtype", "call", "layout", "the set", "least", "most"])


LAUNCHING = "What the host takes for a call, in µs, without waiting for the GPU in between."


def launching(found: list[Result]) -> str:
    rows = []
    for _, group in by(found, "call"):
        torch_nn = next(each for each in group if each.side == TORCH_NN)
        rows += [
            [
                each.call,
                each.side,
                f"{1e3 * each.milliseconds:.1f}",
                f"{each.ratio / torch_nn.ratio:.2f}",
            ]
            for each in group
        ]
    return _table(rows, ["call", "side", "µs", f"× {TORCH_NN}"])


STEPS = f"""Forward, backward and an update by SGD with momentum: batch {BATCH}, 224 × 224, bfloat16
autocast, channels last, convolutions chosen by cuDNN's benchmark. `benchmarks/resnet50.py` has the
model, and its blocks with activation and residual given to our layers. Under torch.compile, our
layers are plain operations in the graph."""


def whole_steps(found: list[Result]) -> str:
    rows = [
        [
            each.call,
            each.side,
            f"{each.milliseconds:.1f}",
            f"{1e3 * each.shape[0] / each.milliseconds:.0f}",
            f"{each.ratio:.3f}",
        ]
        for each in found
    ]
    return _table(rows, ["", "model", "ms", "images/s", f"× {TORCH_NN}"])


COUNTED = """Tensors of x's size that are read or written, by `benchmarks/inductor.py`: bytes over
those of x, in the kernels that torch.compile makes for {device} of layers in training, x being
(32, 64, 28, 28). It sees ours as plain operations, computed in float32 at least."""
COUNTED_HEADINGS = [
    *("dtype", "layout", "variant", f"{OURS}, forward", "backward"),
    *(f"{TORCH_NN}, forward", "backward"),
]


def _table(rows: list[list[Any]], headings: list[str]) -> str:
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the record


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is new, and of the same machine and day what is old and was not measured again."""
    if old["machine"] != new["machine"]:
        return new
    again = {(each["framework"], each["layout"]) for each in new["results"]}
    results = [each for each in old["results"] if (each["framework"], each["layout"]) not in again]
    kernels = [each for each in old["kernels"] if tuple(each[:2]) not in again]
    results += new["results"]
    return {**new, "results": results, "kernels": kernels + new["kernels"]}


def main() -> None:
    root = Path(__file__).parent.parent
    build = root / "build" / "benchmarks"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    parser.add_argument("--part", action="append", choices=PARTS, help="of what is timed; all")
    names = [_name(each) for each in DTYPES]
    parser.add_argument("--dtype", action="append", choices=names, help="of the set; all")
    parser.add_argument("--layout", action="append", choices=list(FORMATS), help="of the set; both")
    parser.add_argument("--json", type=Path, metavar="PATH", help="the record")
    parser.add_argument("--page", type=Path, metavar="PATH", help="where to write the page")
    arguments = parser.parse_args()
    quick, folder = arguments.quick, build if arguments.quick else root / "docs"
    path = arguments.json or build / f"gpu{'-quick' * quick}.json"
    page_path = arguments.page or folder / "benchmarks-gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)

    torch._dynamo.config.recompile_limit = 1000
    named = machine()
    device = "cuda" if named else "cpu"
    record: dict[str, Any] = {"machine": named, "results": [], "kernels": []}
    record["counted_on"] = "this GPU" if named else "a CPU"
    record["passes"] = counted(quick, device)

    def keep(results: list[Result], served: dict[tuple[str, ...], int] | None = None) -> None:
        """At once, so that a run that ends early has not been for nothing."""
        record["results"] = [asdict(each) for each in results]
        record["kernels"] = [[*key, str(times)] for key, times in (served or {}).items()]
        old = json.loads(path.read_text()) if path.exists() else record
        path.write_text(json.dumps(merged(old, record), indent=1))
        page_path.write_text(page(merged(old, record)))

    keep([])
    parts = (arguments.part or PARTS) if named else ()
    if STEP in parts:
        keep(steps(quick))
    if LAUNCH in parts:
        keep(launches(quick))
    if "set" in parts:
        for name in arguments.dtype or names[: 1 if quick else None]:
            for layout in arguments.layout or FORMATS:
                served: dict[tuple[str, ...], int] = {}
                keep(of_set(getattr(torch, name), layout, quick, served), served)
    print(f"Written: {page_path}")


if __name__ == "__main__":
    main()
