"""What a batch normalization must move through memory on a GPU, in tensors like x: its passes.

A pass is one reading or one writing of a tensor of x's size. Bytes over the bandwidth of a device's
data sheet are an estimate of time: the least that so many passes can take where no cache serves.
"""

import math
from dataclasses import dataclass
from itertools import groupby

from measure import FIRST, RESNET50, Work
from tabulate import tabulate

PLAIN, RELU, RESIDUAL_RELU = VARIANTS = ("plain", "relu", "residual and relu")
OURS, TORCH_NN, LEAST = "batchnorm.torch", "torch.nn", "least possible"

# Forward and backward. Of ours in three kernels each way: the sums, what is computed once a
# channel, the output. The gradient of the residual is written with the sums, and read in its place.
PASSES = {
    OURS: {PLAIN: (3, 5), RELU: (3, 5), RESIDUAL_RELU: (4, 7)},
    TORCH_NN: {PLAIN: (3, 5), RELU: (5, 8), RESIDUAL_RELU: (8, 8)},  # each operation for itself
    LEAST: {PLAIN: (2, 3), RELU: (2, 3), RESIDUAL_RELU: (3, 4)},  # relu's signs as bits
}
# Where a channel fits into one program of ours, one kernel reads x once.
IN_ONE_KERNEL = {PLAIN: (2, 3), RELU: (2, 3), RESIDUAL_RELU: (3, 5)}
LARGEST_CHANNEL = 2**14  # elements, channels first; channels last no shape of the set fits

BATCH = 128
SET = [Work((BATCH, *each.shape[1:]), each.times) for each in RESNET50]


@dataclass(frozen=True)
class Device:
    name: str
    terabytes_per_second: float


# Of the data sheets.
DEVICES = (Device("H100 SXM", 3.35), Device("A100 80 GB SXM", 2.04))


def passes(each: Work, layout: str, variant: str) -> tuple[int, int]:
    """Of ours, forward and backward."""
    n, _, *space = each.shape
    fits = layout == FIRST and n * math.prod(space) <= LARGEST_CHANNEL
    return (IN_ONE_KERNEL if fits else PASSES[OURS])[variant]


def variants(each: Work) -> dict[str, int]:
    """How often each variant comes in the set; a shape is one of the set.

    Of the outputs of a stage's blocks, whose channels × side are 256 × 56, one is a shortcut's, and
    plain; the others are added to a shortcut. All else is followed by relu.
    """
    _, channels, side, _ = each.shape
    if channels * side == 256 * 56:
        return {PLAIN: 1, RESIDUAL_RELU: each.times - 1}
    return {RELU: each.times}


def microseconds(each: Work, passes: float, device: Device, itemsize: int = 2) -> float:
    return passes * math.prod(each.shape) * itemsize / device.terabytes_per_second / 1e6


def milliseconds_of_set(side: str, variant: str | None, device: Device) -> float:
    """Forward and backward, bfloat16; variant None: each shape as the network has it."""
    total = 0.0
    for each in SET:
        counts = variants(each) if variant is None else {variant: each.times}
        for name, times in counts.items():
            total += times * microseconds(each, sum(PASSES[side][name]), device)
    return total / 1e3


def estimate() -> str:
    """The roofline, as it stands on pages."""
    bandwidths = " and ".join(
        f"{device.terabytes_per_second} TB/s ({device.name})" for device in DEVICES
    )
    return f"""An estimate, not a measurement: bytes over the bandwidth of the data sheets,
{bandwidths}. The 53 batch normalizations of
ResNet-50 at batch {BATCH} in bfloat16 (float32: twice the time), in passes, each one reading or
writing of a tensor of x's size; our kernels make 3 forward and 5 backward:

{_of_shapes()}

The whole set, forward and backward. torch.nn normalizes, adds and applies relu in a call each.
{_counts()}

{_of_set()}

What a cache serves is faster. But no device reaches its data sheet, a copy neither; small tensors
wait for launches; and sums in parts, which are merged, come on top."""


def _of_shapes() -> str:
    rows = []
    ordered = sorted(SET, key=lambda each: -math.prod(each.shape))
    for size, group in groupby(ordered, key=lambda each: math.prod(each.shape)):
        shapes = [*group]
        names = [f"{each.shape[1]}, {each.shape[2]} ({each.times})" for each in shapes]
        row = ["; ".join(names), f"{2 * size / 1e6:.3g}"]
        for device in DEVICES:
            forward, backward = (
                microseconds(shapes[0], number, device) for number in PASSES[OURS][PLAIN]
            )
            row.append(f"{forward:.0f} + {backward:.0f}")
        rows.append(row)
    titles = [f"{device.name}, µs" for device in DEVICES]
    return _table(rows, ["C, side (times)", "x, MB", *titles])


def _of_set() -> str:
    rows = []
    for variant in (*VARIANTS, None):
        passes = ["{} + {}".format(*PASSES[side][variant]) if variant else "–" for side in PASSES]
        times = [
            [milliseconds_of_set(side, variant, device) for side in PASSES] for device in DEVICES
        ]
        cells = [" / ".join(f"{each:.1f}" for each in of_device) for of_device in times]
        ratio = f"{times[0][1] / times[0][0]:.2f}"
        rows.append([variant or "as the network has them", " / ".join(passes), *cells, ratio])
    titles = [f"{device.name}, ms" for device in DEVICES]
    sides = " / ".join(PASSES)
    return _table(rows, ["", f"passes: {sides}", *titles, f"{TORCH_NN}: × ours"])


def _counts() -> str:
    total = dict.fromkeys((RELU, RESIDUAL_RELU, PLAIN), 0)
    for each in SET:
        for variant, times in variants(each).items():
            total[variant] += times
    counts = ", ".join(f"{times} {name}" for name, times in total.items())
    return f"The network has {counts}."


def _table(rows: list[list[str]], headings: list[str]) -> str:
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)
