"""Compile for a GPU what a training step launches, and say of each kernel what its code is like.

    cd tests; python -m gpu_code.compiled sm_90 all

A program of its own, since Triton compiles only where it does not interpret. It prints JSON: a list
of the fields of `Code`.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from gpu_code import absent_gpu, faulty

import batchnorm.torch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Case:
    """A step of one layer; `wide` where rows and runs are multiples of 16 bytes."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    training: bool = True

    @property
    def wide(self) -> bool:
        return self.shape in (SPLIT, WHOLE)

    def run(self) -> None:
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        x, residual, dy = (
            torch.empty(self.shape, dtype=getattr(torch, self.dtype)).to(memory_format=order)
            for _ in range(3)
        )
        mask = torch.empty(len(x), 1, *x.shape[2:], dtype=torch.bool) if self.mask else None
        layer = batchnorm.torch.BatchNorm2d(x.shape[1], activation=self.activation)
        layer.train(self.training)
        residual = residual.requires_grad_() if self.residual else None
        layer(x.requires_grad_(), residual=residual, mask=mask).backward(dy)


# Of several programs a channel, and of one.
SPLIT, WHOLE = (32, 64, 32, 32), (4, 64, 16, 16)
# Of the ResNets: the largest tile that one program takes, and runs of an odd length.
LARGEST, ODD = (64, 64, 14, 14), (512, 64, 7, 7)
FUSED = {"activation": "relu", "residual": True}
LAYOUTS = (True, False)


def all_cases() -> Iterator[Case]:
    for shape, dtype, last in product((SPLIT, WHOLE), ("float32", "bfloat16"), LAYOUTS):
        for fused in ({}, {"activation": "relu"}, FUSED, {"mask": True}):
            yield Case(shape, dtype, last, **fused)
    for shape, dtype in product((LARGEST, ODD), ("float32", "bfloat16")):
        yield Case(shape, dtype, False, **FUSED)
    for shape in (SPLIT, WHOLE):
        yield Case(shape, "float32", True, activation="silu")
    yield Case(SPLIT, "float32", True, training=False)


def some_cases() -> Iterator[Case]:
    """Those that take the most registers: with all that is fused, the largest tile, a mask."""
    for last in LAYOUTS:
        yield Case(SPLIT, "bfloat16", last, **FUSED)
        yield Case(SPLIT, "float32", last, mask=True)
    for dtype in ("float32", "bfloat16"):
        yield Case(WHOLE, dtype, True, **FUSED)
        yield Case(LARGEST, dtype, False, **FUSED)


@dataclass(frozen=True)
class Faulty:
    wide = True

    def run(self) -> None:
        faulty.launch()


@dataclass
class Code:
    """Of one kernel, compiled. `operations` counts its instructions by name.

    `spilled` is what was put into memory for want of registers, in bytes; `loads` and `stores` are
    how many accesses of 16 bytes a thread needs for its part of all tiles, 0 where the case is not
    wide.
    """

    target: str
    kernel: str
    case: str
    registers: int
    spilled: int
    operations: dict[str, int]
    loads: float
    stores: float


class Listener:
    """What Triton calls with each kernel that it has compiled."""

    def __init__(self, target: str) -> None:
        self.target, self.case, self.codes = target, Faulty(), []

    def __call__(self, *, src, metadata, metadata_group, times, cache_hit) -> None:
        files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        registers, spilled, operations = (_of_amd if ".amdgcn" in files else _of_nvidia)(files)
        threads = metadata["num_warps"] * metadata["target"].warp_size
        text = files[".ttgir"].read_text() if self.case.wide else ""
        loads, stores = (_accesses(text, kind) / threads for kind in ("load", "store"))
        self.codes.append(
            Code(
                *(self.target, src.fn.__name__, str(self.case)),
                *(registers, spilled, operations, loads, stores),
            )
        )


def _of_nvidia(files: dict[str, Path]) -> tuple[int, int, dict[str, int]]:
    command = [TOOLS / "cuobjdump", "-res-usage", "-sass", files[".cubin"]]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    )
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
    return registers, stack + local, dict(Counter(operations))


def _of_amd(files: dict[str, Path]) -> tuple[int, int, dict[str, int]]:
    text = files[".amdgcn"].read_text()
    registers, private, spilled = (
        int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.M)[1])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, private + spilled, dict(Counter(re.findall(r"^\t([a-z]\w+)", text, re.M)))


def _accesses(text: str, kind: str) -> float:
    """Of 16 bytes, for all tiles of floating-point numbers that Triton's own code has."""
    found = 0.0
    for line in re.findall(rf"^.*\b(?:tt\.{kind}|buffer_{kind})\b.*$", text, re.M):
        for rows, columns, bits in re.findall(r"<(\d+)x(\d+)x(?:!tt\.ptr<)?b?f(\d+)", line)[-1:]:
            if int(rows) > 1 and int(columns) > 1:
                found += int(rows) * int(columns) * int(bits) / 8 / 16
    return found


CASES = {"all": all_cases, "some": some_cases, "faulty": lambda: [Faulty()]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=absent_gpu.TARGETS)
    parser.add_argument("cases", choices=CASES)
    given = parser.parse_args()
    listener = Listener(given.target)
    with tempfile.TemporaryDirectory() as folder, absent_gpu.absent_gpu(given.target):
        os.environ["TRITON_CACHE_DIR"] = folder
        triton.knobs.compilation.listener = listener
        for listener.case in CASES[given.cases]():
            listener.case.run()
    print(json.dumps([asdict(each) for each in listener.codes]))


if __name__ == "__main__":
    main()
