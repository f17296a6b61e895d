"""Train a small network on handwritten digits in MLX and in JAX, and compare how that went.

The same network from the same initial weights and on the same batches: in MLX normalized by
batchnorm.mlx.BatchNorm, by mlx.nn.BatchNorm, and not at all; in JAX by
batchnorm.flax.nn.BatchNorm. The picture shows their losses, and how wrong the trained network gets
when a large constant is added to features that are normalized next, which should change nothing.
Last, a report on the network of mlx.nn and on digits that are brighter than those of its training.

    pip install ".[demo]"
    python examples/demo.py
"""

import argparse
import sys
from pathlib import Path

import digits
import digits_jax
import digits_mlx
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich import box
from rich.console import Console
from rich.table import Table

import batchnorm.mlx
from batchnorm.tools import Report

OURS, MLX, NONE, JAX = digits_mlx.OURS, digits_mlx.MLX, digits_mlx.NONE, digits_jax.OURS
ENOUGH = 0.97
BRIGHTER = 0.5  # where 0 is black, and 1 white
CONSTANTS = [10.0**power for power in range(7)]
COLORS = {OURS: "#0072b2", MLX: "#e69f00", NONE: "#777777", JAX: "#000000"}
# Where losses are the same, the narrower line shows on the wider one, and gaps in it show others.
LINES = {
    NONE: {"linewidth": 2},
    MLX: {"linewidth": 9},
    OURS: {"linewidth": 4},
    JAX: {"linewidth": 1.5, "linestyle": (0, (4, 4))},
}


def table_of(trainings: dict[str, digits.Training]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
        caption="Normalizing, in MLX: the median of how much longer a step took than the same step "
        "without normalization, times the number of steps. JAX's seconds include compiling.",
    )
    table.add_column("\nNetwork with", no_wrap=True)
    for heading in ("First\nloss", "Last\nloss", "Held-out\naccuracy", "Training\nseconds"):
        table.add_column(heading, justify="right")
    table.add_column("Of which\nnormalizing", justify="right")
    for name, training in trainings.items():
        normalizing = "–"
        if name in (OURS, MLX):
            longer = np.subtract(training.seconds, trainings[NONE].seconds)
            normalizing = f"{np.median(longer) * len(longer):.2f}"
        table.add_row(
            name,
            f"{training.losses[0]:.4f}",
            f"{training.losses[-1]:.4f}",
            f"{training.accuracy:.1%}",
            f"{sum(training.seconds):.2f}",
            normalizing,
        )
    return table


def report_of(network: digits_mlx.Network, data: digits.Digits) -> Report:
    """What `inspect` finds when held-out digits are brighter than those of training."""
    batches = np.array_split(data.test_images + BRIGHTER, 9)
    return batchnorm.mlx.inspect(network, [mx.array(each) for each in batches])


def draw(
    trainings: dict[str, digits.Training], shifted: dict[str, list[tuple[float, float]]], path: Path
) -> None:
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, line in LINES.items():
        losses = np.array(trainings[name].losses)
        window = min(20, 1 + len(losses) // 10)
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, len(losses) + 1)
        left.plot(steps, means, color=COLORS[name], label=name, **line)
    left.set_title("Training on handwritten digits")
    left.set_xlabel("training step")
    left.set_ylabel(f"cross-entropy (nats), mean of {window} steps")
    left.set_yscale("log")

    for name, results in shifted.items():
        errors, accuracies = zip(*results, strict=True)
        right.plot(CONSTANTS, errors, "o-", color=COLORS[name], label=name, linewidth=2)
        right.annotate(
            f"{accuracies[-1]:.0%} of held-out digits right",
            (CONSTANTS[-1], errors[-1]),
            xytext=(0, 10),
            textcoords="offset points",
            horizontalalignment="right",
        )
    right.set_title("Error of the trained network when features are shifted")
    right.set_xlabel("constant added to the features before the first normalization")
    right.set_ylabel("largest error of an output (logits)")
    right.set_xscale("log")
    right.set_yscale("log")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


def picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, but got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, but got {text!r}")
    return path


def main() -> int:
    parser = digits.command_line(
        f"Train a small network on handwritten digits in MLX, with {OURS}, with {MLX}, and with "
        f"{NONE}, and in JAX with {JAX}. Print a table and write a picture that compare them.",
        f"The exit status is 1 if the network with {OURS} or that with {JAX} gets less than "
        f"{100 * ENOUGH:.0f}% of the held-out digits right, except with --quick.",
    )
    parser.add_argument(
        "--picture",
        type=picture_path,
        default="demo.png",
        metavar="PATH",
        help="where to write the picture (default: %(default)s)",
    )
    options = parser.parse_args()
    data = digits.load(options.seed)
    trainings = {**digits_mlx.trainings(options.seed), **digits_jax.trainings(options.seed)}
    digits.train(trainings, data, options)
    Console().print(table_of(trainings))

    parameters = tree_flatten(trainings[OURS].network.parameters())
    weights = {name: np.array(parameter) for name, parameter in parameters}
    shifted = {
        name: [
            digits_mlx.error_when_shifted(digits_mlx.NORMALIZATIONS[name], weights, data, constant)
            for constant in CONSTANTS
        ]
        for name in (OURS, MLX)
    }
    print(f"With {CONSTANTS[-1]:,.0f} added to the features before the first normalization:")
    for name, results in shifted.items():
        error, right = results[-1]
        print(f"  {name:23}  outputs off by {error:.2g}, {right:.1%} of held-out digits right")
    draw(trainings, shifted, options.picture)
    print(f"Picture: {options.picture}")
    print(f"\nThe network with {MLX}, inspected with digits that are brighter by {BRIGHTER}:")
    Console().print(report_of(trainings[MLX].network, data))

    failed = [name for name in (OURS, JAX) if trainings[name].accuracy < ENOUGH]
    if failed and not options.quick:
        print(f"{' and '.join(failed)}: below {ENOUGH:.0%} held-out accuracy.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
