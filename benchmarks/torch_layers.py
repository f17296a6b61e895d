"""Time batchnorm.torch's layers beside torch.nn's, and beside torch.nn's under torch.compile."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import torch
from measure import LAST, Work

import batchnorm
import batchnorm.torch
from batchnorm.native import kernels

TEAM = kernels.team(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@dataclass(frozen=True)
class Call:
    """What a layer is asked for: in evaluation, autograd may look on or not."""

    name: str
    training: bool = True
    gradients: bool = False
    activation: str | None = None
    dtype: torch.dtype = torch.float32


CALLS = (
    Call("forward"),
    Call("forward + backward", gradients=True),
    Call("forward + backward, relu", gradients=True, activation="relu"),
    Call("forward + backward, bfloat16", gradients=True, dtype=torch.bfloat16),
    Call("evaluation", training=False),
    Call("evaluation, gradients enabled", training=False, gradients=True),
    Call("evaluation, bfloat16", training=False, dtype=torch.bfloat16),
)


def calls(each: Work, layout: str, call: Call) -> measure.Calls:
    dimensions = max(len(each.shape) - 2, 1)
    name = f"BatchNorm{dimensions}d"
    ours = getattr(batchnorm.torch, name)(each.shape[1], activation=call.activation)
    theirs: torch.nn.Module = getattr(torch.nn, name)(each.shape[1])
    if call.activation is not None:
        theirs = torch.nn.Sequential(theirs, torch.nn.ReLU())
    x, dy = (_tensor(each, layout, call.dtype, seed) for seed in range(2))
    x.requires_grad_(call.gradients)
    compiled = torch.compile(theirs, dynamic=False)

    def timed(layer: torch.nn.Module) -> Callable[[], object]:
        layer.train(call.training)

        def run() -> object:
            with torch.set_grad_enabled(call.gradients):
                y = layer(x)
                if not (call.gradients and call.training):
                    return y
                return torch.autograd.grad(y, [x, *layer.parameters()], dy)

        return run

    bits = x.detach().view({2: torch.int16, 4: torch.int32}[x.itemsize])  # NumPy has no bfloat16
    return {
        "batchnorm.torch": timed(ours),
        "torch.nn": timed(theirs),
        "torch.nn, compiled": timed(compiled),
        **measure.copies_of(bits.numpy(), team=TEAM),
    }


def _tensor(each: Work, layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    tensor = torch.from_numpy(random.standard_normal(each.shape_in(layout), np.float32)).to(dtype)
    return tensor.movedim(-1, 1) if layout == LAST and len(each.shape) > 2 else tensor


def main() -> None:
    arguments = measure.options(__doc__)
    torch.set_num_threads(measure.THREADS)
    torch._dynamo.config.recompile_limit = 1000
    found = []
    for each, layout in measure.work(arguments.quick):
        for call in CALLS:
            sides = calls(each, layout, call)
            found += measure.results(
                "PyTorch", each, layout, call.name, sides, quick=arguments.quick
            )
        torch._dynamo.reset()
    title = f"PyTorch {torch.__version__}, float32 unless said. {batchnorm.native_status()}"
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
