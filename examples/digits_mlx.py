"""Train a small network on handwritten digits in MLX, with batch normalization and without.

The same network three times, from the same initial weights and on the same batches: normalized by
batchnorm.mlx.BatchNorm, by mlx.nn.BatchNorm, and not at all.

    pip install ".[demo]"
    python examples/digits_mlx.py
"""

import time
from collections.abc import Callable
from itertools import pairwise

import digits
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

import batchnorm.mlx

Normalization = Callable[[int], nn.Module]

OURS, MLX, NONE = "batchnorm.mlx.BatchNorm", "mlx.nn.BatchNorm", "no normalization"
NORMALIZATIONS: dict[str, Normalization] = {
    OURS: batchnorm.mlx.BatchNorm,
    MLX: nn.BatchNorm,
    NONE: nn.Identity,
}


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
        self.optimizer = optim.SGD(digits.LEARNING_RATE, digits.MOMENTUM)
        self.loss_and_gradients = nn.value_and_grad(self.network, loss_of)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy = 0.0

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        start = time.perf_counter()
        loss, gradients = self.loss_and_gradients(self.network, mx.array(images), mx.array(labels))
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


def trainings(seed: int) -> dict[str, Training]:
    return {
        name: Training(normalization, digits.initial_weights(seed))
        for name, normalization in NORMALIZATIONS.items()
    }


if __name__ == "__main__":
    digits.main(__doc__.splitlines()[0], trainings)
