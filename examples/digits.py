"""What the digits examples share, so that every framework trains the same network on the same data.

scikit-learn's handwritten digits, the initial weights of a small convolutional network and the
order of its batches, in NumPy and for the same seed always the same; the loop over the batches; and
the options.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits

TRAIN, TEST = 1347, 450
CLASSES = 10
CHANNELS = (16, 32, 64)  # of the outputs of the three convolutions
# A faster descent blows up what frameworks round differently until the losses part.
LEARNING_RATE, MOMENTUM = 0.03, 0.9


class Digits(NamedTuple):
    """Images of shape (number, 8, 8, 1) within [0, 1], float32, and labels 0 to 9, int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(seed: int) -> Digits:
    """All digits, shuffled: three quarters to train on, and the others held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    return Digits(images[TEST:], labels[TEST:], images[:TEST], labels[:TEST])


def initial_weights(seed: int) -> dict[str, np.ndarray]:
    """Float32 weights by name: random normal, scaled for ReLU as by He et al. (2015).

    Those of a convolution have the shape (channels out, height, width, channels in), those of the
    last layer (out, in). Convolutions have no bias.
    """
    random = np.random.default_rng(seed)
    weights = {}
    for index, (channels_in, channels) in enumerate(pairwise((1, *CHANNELS))):
        shape = (channels, 3, 3, channels_in)
        weights[f"convolutions.{index}.weight"] = random.normal(
            0, np.sqrt(2 / (3 * 3 * channels_in)), shape
        )
    channels = CHANNELS[-1]
    weights["output.weight"] = random.normal(0, np.sqrt(1 / channels), (CLASSES, channels))
    weights["output.bias"] = np.zeros(CLASSES)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def batches(
    data: Digits, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of one epoch, in an order that seed and epoch decide.

    Every batch is full: the few digits that are left over come in another epoch's order.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data.train_labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield data.train_images[chosen], data.train_labels[chosen]


class Training(Protocol):
    """A network, what trains it, and how that went: a loss and a time for each step."""

    losses: list[float]
    seconds: list[float]
    accuracy: float  # on the held-out digits, as of the last test

    def step(self, images: np.ndarray, labels: np.ndarray) -> None: ...

    def test(self, data: Digits) -> None: ...


def train(
    trainings: dict[str, Training], data: Digits, options: argparse.Namespace, shown: bool = True
) -> None:
    columns = (
        TextColumn("{task.description:27}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
    )
    epochs = 1 if options.quick else options.epochs
    steps = epochs * (TRAIN // options.batch_size)
    with Progress(*columns, disable=not shown) as progress:
        tasks = {
            name: progress.add_task(name, total=steps, loss="", accuracy="") for name in trainings
        }
        for epoch in range(epochs):
            # Step by step in turn, so that what else the machine does slows all of them alike.
            for images, labels in batches(data, options.batch_size, options.seed, epoch):
                for name, training in trainings.items():
                    training.step(images, labels)
                    progress.update(tasks[name], advance=1, loss=f"{training.losses[-1]:.4f}")
            for name, training in trainings.items():
                training.test(data)
                progress.update(tasks[name], accuracy=f"{training.accuracy:.1%}")
            if not progress.console.is_terminal:  # where bars are drawn at the end alone
                accuracies = [f"{training.accuracy:.1%}" for training in trainings.values()]
                line = f"Epoch {epoch + 1} of {epochs}: accuracy {', '.join(accuracies)}"
                progress.console.print(line, highlight=False, soft_wrap=True)


def main(description: str, trainings: Callable[[int], dict[str, Training]]) -> None:
    """Run a program that trains what `trainings` makes for a seed, and does nothing else."""
    options = command_line(description).parse_args()
    train(trainings(options.seed), load(options.seed), options)


def command_line(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=integer_within(1),
        default=10,
        metavar="N",
        help="how often to go through the training digits (default: %(default)s)",
    )
    length.add_argument(
        "--quick", action="store_true", help="one epoch only, to see whether everything runs"
    )
    parser.add_argument(
        "--batch-size",
        type=integer_within(1, TRAIN),
        default=64,
        metavar="N",
        help="digits in a training step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer_within(0),
        default=0,
        metavar="N",
        help="decides which digits are held out, the initial weights and the batches "
        "(default: %(default)s)",
    )
    return parser


def integer_within(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < smallest or (largest is not None and value > largest):
            most = "" if largest is None else f" and at most {largest}"
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {smallest}{most}, but got {text!r}"
            )
        return value

    return parse
