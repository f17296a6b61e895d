"""What a CUDA graph replays, without CUDA: all operations and launches of a step, done once more.

A graph holds operations and kernels with the addresses of their tensors, and nothing that the host
has computed. A tape does: it notes both in the order in which they come, and plays them again on
the same memory, with another batch in x.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from compare import same
from gpu_code.cutting import cut
from gpu_code.interpreter import launches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batchnorm.torch
from batchnorm.torch._gpu import launching, stages

# Of values for the host, for which a graph can't wait.
HOST = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.for_host: list[str] = []
        self.launched = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in HOST:
            self.for_host.append(name)
        outputs = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]

        def again() -> None:
            results = tree_leaves(function(*args, **kwargs))
            results = [each for each in results if isinstance(each, torch.Tensor)]
            for to, result in zip(outputs, results, strict=True):
                if to.data_ptr() != result.data_ptr():
                    to.copy_(result)

        self.steps.append(again)
        return found

    @contextmanager
    def recording(self):
        """Without that anything but autograd seems to look on."""

        def run(device, given):
            given = list(given)
            self.launched += len(given)
            self.steps.append(lambda: launching.run(device, given))
            return launching.run(device, given)

        with (
            self,
            patch("torch._C._len_torch_dispatch_stack", lambda: 0),
            patch.object(stages, "run", run),
        ):
            yield

    def play(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()


def step(layer, x, dy, mask, residual) -> list[torch.Tensor]:
    y = layer(x, mask=mask, residual=residual)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


KINDS = {
    "momentum": {"momentum": 0.1},
    "average": {"momentum": None},
    "NaN is skipped": {"momentum": 0.1, "skip_nonfinite": True},
    "NaN is skipped, average": {"momentum": None, "skip_nonfinite": True},
    "activation": {"activation": "silu"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", [nullcontext, cut])
def test_a_replay_is_a_step(kind: str, masked: bool, way: Callable):
    generator = torch.Generator().manual_seed(0)

    def batch(number: int) -> dict[str, torch.Tensor | None]:
        x, dy, residual = (torch.randn(8, 4, 5, generator=generator) for _ in range(3))
        mask = torch.rand(8, 1, 5, generator=generator) < 0.7 if masked else None
        x = x * 2 + number
        if number == 4 and KINDS[kind].get("skip_nonfinite"):
            x[0, 0, 0], mask = (
                torch.nan,
                None if mask is None else mask.index_fill_(0, torch.tensor(0), True),
            )
        return {"x": x.requires_grad_(), "dy": dy, "mask": mask, "residual": residual}

    batches = [batch(number) for number in range(7)]
    layers = [batchnorm.torch.BatchNorm1d(4, **KINDS[kind]) for _ in range(2)]
    replayed, eager = layers
    static = batch(0)
    tape = Tape()
    with way():
        for each in batches[:2]:
            wanted = step(eager, **each)
        step(replayed, **batches[0])  # as before a capture
        fill(static, batches[1])
        with tape.recording(), launches() as launched:
            found = step(replayed, **static)
        same(found, wanted)
        assert tape.launched == len(launched) >= 2
        for each in batches[2:]:
            fill(static, each)
            tape.play()
            wanted = step(eager, **each)
            if each["x"].isfinite().all():
                same(found, wanted)
            same(dict(replayed.named_buffers()), dict(eager.named_buffers()))
    assert tape.for_host == []
    skipped = KINDS[kind].get("skip_nonfinite", False)
    assert replayed.num_batches_tracked == 7 - skipped


def fill(static: dict, batch: dict) -> None:
    for name, each in static.items():
        if each is not None:
            each.data.copy_(batch[name])


def test_a_tape_sees_what_is_for_the_host():
    with Tape() as tape:
        torch.ones(()).item()
    assert tape.for_host == ["_local_scalar_dense"]
