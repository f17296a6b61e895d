"""Time batchnorm.torch's layers beside torch.nn's, and beside torch.nn's under torch.compile."""

from pathlib import Path

import measure
import numpy as np
import torch
from measure import LAST, Work

import batchnorm
import batchnorm.torch
from batchnorm.native import kernels

TEAM = kernels.team(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def calls(each: Work, layout: str, backward: bool, activation: str | None) -> measure.Calls:
    dimensions = max(len(each.shape) - 2, 1)
    name = f"BatchNorm{dimensions}d"
    ours = getattr(batchnorm.torch, name)(each.shape[1], activation=activation)
    theirs: torch.nn.Module = getattr(torch.nn, name)(each.shape[1])
    if activation is not None:
        theirs = torch.nn.Sequential(theirs, torch.nn.ReLU())
    x, dy = (_tensor(each, layout, seed) for seed in range(2))
    x.requires_grad_(backward)

    def step(layer: torch.nn.Module) -> object:
        y = layer(x)
        if not backward:
            return y
        return torch.autograd.grad(y, [x, *layer.parameters()], dy)

    def ours_or_theirs(layer: torch.nn.Module) -> object:
        with torch.set_grad_enabled(backward):
            return step(layer)

    compiled = torch.compile(theirs, dynamic=False)
    return {
        "batchnorm.torch": lambda: ours_or_theirs(ours),
        "torch.nn": lambda: ours_or_theirs(theirs),
        "torch.nn, compiled": lambda: ours_or_theirs(compiled),
        **measure.copies_of(x.detach().numpy(), team=TEAM),
    }


def _tensor(each: Work, layout: str, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    tensor = torch.from_numpy(random.standard_normal(each.shape_in(layout), np.float32))
    return tensor.movedim(-1, 1) if layout == LAST and len(each.shape) > 2 else tensor


def main() -> None:
    arguments = measure.options(__doc__)
    torch.set_num_threads(measure.THREADS)
    torch._dynamo.config.recompile_limit = 1000
    found = []
    for each, layout in measure.work(arguments.quick):
        for call, backward, activation in (
            ("forward", False, None),
            ("forward + backward", True, None),
            ("forward + backward, relu", True, "relu"),
        ):
            found += measure.results(
                "PyTorch",
                each,
                layout,
                call,
                calls(each, layout, backward, activation),
                quick=arguments.quick,
            )
        torch._dynamo.reset()
    title = f"PyTorch {torch.__version__}, float32. {batchnorm.native_status()}"
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
