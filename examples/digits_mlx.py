"""Train a small network on handwritten digits in MLX, with batch normalization and without.

The same network three times, from the same initial weights and on the same batches: normalized by
batchnorm.mlx.BatchNorm, by mlx.nn.BatchNorm, and not at all. A table compares them. A picture shows
their losses, and how wrong the trained network gets when a large constant is added to features that
are normalized next, which should change nothing.

    pip install "batchnorm[demo]"
    python examples/digits_mlx.py
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import digits
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import batchnorm.mlx

Normalization = Callable[[int], nn.Module]

OURS, MLX, NONE = "batchnorm.mlx.BatchNorm", "mlx.nn.BatchNorm", "no normalization"
NORMALIZATIONS: dict[str, Normalization] = {
    OURS: batchnorm.mlx.BatchNorm,
    MLX: nn.BatchNorm,
    NONE: nn.Identity,
}
ENOUGH = 0.97
CONSTANTS = [10.0**power for power in range(7)]
COLORS = {OURS: "#0072b2", MLX: "#e69f00", NONE: "#777777"}


class Network(nn.Module):
    """Three convolutions, each normalized, the mean over the image, and a linear layer."""

    def __init__(self, normalization: Normalization, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        # A bias would do nothing: the normalization that follows subtracts it with the mean.
        self.convolutions = [
            nn.Conv2d(channels_in, channels, kernel_size=3, padding=1, bias=False)
            for channels_in, channels in pairwise((1, *digits.CHANNELS))
        ]
        self.normalizations = [normalization(channels) for channels in digits.CHANNELS]
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.output = nn.Linear(digits.CHANNELS[-1], digits.CLASSES)
        # Not strict, since a new normalization keeps its own weights: scale 1 and bias 0.
        arrays = [(name, mx.array(weight)) for name, weight in weights.items()]
        self.load_weights(arrays, strict=False)

    def __call__(self, images: mx.array) -> mx.array:
        x = images
        for index, convolution in enumerate(self.convolutions):
            if index > 0:
                x = self.pool(x)
            x = nn.relu(self.normalizations[index](convolution(x)))
        return self.output(mx.mean(x, axis=(1, 2)))


class Training:
    """A network, what trains it, and how that went."""

    def __init__(self, normalization: Normalization, weights: dict[str, np.ndarray]) -> None:
        self.network = Network(normalization, weights)
        self.optimizer = optim.SGD(learning_rate=0.05, momentum=0.9)
        self.loss_and_gradients = nn.value_and_grad(self.network, loss_of)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy = 0.0

    def step(self, images: mx.array, labels: mx.array) -> None:
        start = time.perf_counter()
        loss, gradients = self.loss_and_gradients(self.network, images, labels)
        self.optimizer.update(self.network, gradients)
        # MLX is lazy: all of the step is computed here. Running statistics are in the network's
        # state, though not among the gradients. (mx.compile would fuse the step, but on a CPU
        # compiling it takes longer than it saves here.)
        mx.eval(loss, self.network.state, self.optimizer.state)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def test(self, data: digits.Digits) -> None:
        self.network.eval()  # Normalizes by the running statistics, each digit for itself.
        outputs = self.network(mx.array(data.test_images))
        self.network.train()  # Normalizes by the batch's statistics, and moves the running ones.
        self.accuracy = share_right(outputs, data.test_labels)


def loss_of(network: Network, images: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(network(images), labels, reduction="mean")


def share_right(outputs: mx.array, labels: np.ndarray) -> float:
    return float(np.mean(np.array(mx.argmax(outputs, axis=1)) == labels))


def train(options: argparse.Namespace, data: digits.Digits) -> dict[str, Training]:
    trainings = {
        name: Training(normalization, digits.initial_weights(options.seed))
        for name, normalization in NORMALIZATIONS.items()
    }
    columns = (
        TextColumn("{task.description:23}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
    )
    steps = options.epochs * (digits.TRAIN // options.batch_size)
    with Progress(*columns) as progress:
        tasks = {
            name: progress.add_task(name, total=steps, loss="", accuracy="") for name in trainings
        }
        for epoch in range(options.epochs):
            # Step by step in turn, so that what else the machine does slows all of them alike.
            for images, labels in digits.batches(data, options.batch_size, options.seed, epoch):
                for name, training in trainings.items():
                    training.step(mx.array(images), mx.array(labels))
                    progress.update(tasks[name], advance=1, loss=f"{training.losses[-1]:.4f}")
            for name, training in trainings.items():
                training.test(data)
                progress.update(tasks[name], accuracy=f"{training.accuracy:.1%}")
    return trainings


def error_when_shifted(
    normalization: Normalization,
    weights: dict[str, np.ndarray],
    data: digits.Digits,
    constant: float,
) -> tuple[float, float]:
    """Add a constant to the features before the first normalization, in training.

    Returns the largest error of the network's outputs, and the share of held-out digits that it
    still gets right. The addition rounds the features to float32. The outputs are compared with
    those for the same rounded features normalized in float64, so that the error is that of the
    normalization alone.
    """
    network = Network(normalization, weights)
    images = mx.array(data.test_images)
    layer = network.normalizations[0]
    network.normalizations[0] = lambda features: layer(features + constant)
    outputs = network(images)
    network.normalizations[0] = lambda features: in_float64(layer, features + constant)
    error = mx.max(mx.abs(outputs - network(images)))
    return error.item(), share_right(outputs, data.test_labels)


def in_float64(layer: nn.Module, features: mx.array) -> mx.array:
    x, weight, bias = (np.array(each, np.float64) for each in (features, layer.weight, layer.bias))
    axes = (0, 1, 2)
    y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + layer.eps) * weight + bias
    return mx.array(y.astype(np.float32))


def table_of(trainings: dict[str, Training]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption_justify="left",
        caption="Normalizing: the median of how much longer a step took than the same step without "
        "normalization, times the number of steps.",
    )
    table.add_column("\nNetwork with", no_wrap=True)
    for heading in ("First\nloss", "Last\nloss", "Held-out\naccuracy", "Training\nseconds"):
        table.add_column(heading, justify="right")
    table.add_column("Of which\nnormalizing", justify="right")
    for name, training in trainings.items():
        longer = np.subtract(training.seconds, trainings[NONE].seconds)
        table.add_row(
            name,
            f"{training.losses[0]:.4f}",
            f"{training.losses[-1]:.4f}",
            f"{training.accuracy:.1%}",
            f"{sum(training.seconds):.2f}",
            "–" if name == NONE else f"{np.median(longer) * len(longer):.2f}",
        )
    return table


def draw(
    trainings: dict[str, Training], shifted: dict[str, list[tuple[float, float]]], path: Path
) -> None:
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    # Where two losses are the same, the narrow line shows on the wide one.
    widths = {NONE: 2, MLX: 6, OURS: 2}
    for name, width in widths.items():
        losses = np.array(trainings[name].losses)
        window = min(20, 1 + len(losses) // 10)
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, len(losses) + 1)
        left.plot(steps, means, color=COLORS[name], label=name, linewidth=width)
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
        f"{NONE}. Print a table and write a picture that compare them.",
        f"The exit status is 1 if the network with {OURS} gets less than {100 * ENOUGH:.0f}% of "
        "the held-out digits right, except with --quick.",
    )
    parser.add_argument(
        "--picture",
        type=picture_path,
        default="demo.png",
        metavar="PATH",
        help="where to write the picture (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.quick:
        options.epochs = 1

    data = digits.load(options.seed)
    trainings = train(options, data)
    Console().print(table_of(trainings))

    parameters = tree_flatten(trainings[OURS].network.parameters())
    weights = {name: np.array(parameter) for name, parameter in parameters}
    shifted = {
        name: [
            error_when_shifted(NORMALIZATIONS[name], weights, data, constant)
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

    if trainings[OURS].accuracy < ENOUGH and not options.quick:
        print(f"{OURS} is below {ENOUGH:.0%} held-out accuracy.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
