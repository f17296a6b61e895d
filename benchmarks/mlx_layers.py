"""Time batchnorm.mlx.BatchNorm beside mlx.nn.BatchNorm, as they are and compiled.

Of a layer alone, also with a relu, and in whole training steps of two networks, compiled: the one
that the demo trains, and the ResNet-20 of He et al., "Deep Residual Learning for Image Recognition"
(2015), section 4.2, on batches of 64.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import measure
import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
from measure import LAST, Work

import batchnorm
import batchnorm.mlx

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import digits
import digits_mlx

Call = Callable[[mx.array], object]
OURS, THEIRS = batchnorm.mlx.BatchNorm, mlx.nn.BatchNorm
CALLS = ("forward", "forward + backward", "forward + backward, relu", "evaluation")


def forward(layer: mlx.nn.Module) -> Call:
    return lambda x: layer(x)


def with_gradients(layer: mlx.nn.Module, dy: mx.array, relu: bool) -> Call:
    def call(x: mx.array) -> object:
        weight, bias = layer.weight, layer.bias

        def function(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
            layer.weight, layer.bias = weight, bias
            y = layer(x)
            return [mlx.nn.relu(y) if relu else y]

        results = mx.vjp(function, [x, weight, bias], [dy])
        layer.weight, layer.bias = weight, bias
        return results

    return call


def calls(each: Work, call: str) -> measure.Calls:
    """Each call computes everything that a training step would evaluate."""
    shape = each.shape_in(LAST)
    random = np.random.default_rng(0)
    x, dy = (mx.array(random.standard_normal(shape, np.float32)) for _ in range(2))
    mx.eval(x, dy)
    relu = call.endswith("relu")

    def timed(cls: type[mlx.nn.Module], compiled: bool) -> Callable[[], object]:
        activation = {"activation": "relu"} if relu and cls is OURS else {}
        layer = cls(shape[-1], **activation).train(call != "evaluation")
        mx.eval(layer.parameters())
        function = forward(layer)
        if call.startswith("forward + backward"):
            function = with_gradients(layer, dy, relu and cls is THEIRS)
        if compiled:
            function = mx.compile(function, inputs=layer.state, outputs=layer.state)
        return lambda: mx.eval(function(x), layer.running_mean, layer.running_var)

    return {
        "batchnorm.mlx": timed(OURS, False),
        "batchnorm.mlx, compiled": timed(OURS, True),
        "mlx.nn": timed(THEIRS, False),
        "mlx.nn, compiled": timed(THEIRS, True),
        **measure.copies_of(np.array(x)),
    }


# ---- training steps


class Block(mlx.nn.Module):
    """Two convolutions, each normalized, beside a shortcut without parameters."""

    def __init__(self, channels_in: int, channels: int, normalization: digits_mlx.Normalization):
        super().__init__()
        self.stride = 1 if channels_in == channels else 2
        options = {"kernel_size": 3, "padding": 1, "bias": False}
        self.first = mlx.nn.Conv2d(channels_in, channels, stride=self.stride, **options)
        self.second = mlx.nn.Conv2d(channels, channels, **options)
        self.normalizations = [normalization(channels) for _ in range(2)]
        self.more_channels = channels - channels_in

    def __call__(self, x: mx.array) -> mx.array:
        y = mlx.nn.relu(self.normalizations[0](self.first(x)))
        y = self.normalizations[1](self.second(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        shortcut = mx.pad(shortcut, [(0, 0)] * 3 + [(0, self.more_channels)])
        return mlx.nn.relu(y + shortcut)


class ResNet20(mlx.nn.Module):
    def __init__(self, normalization: digits_mlx.Normalization):
        super().__init__()
        self.first = mlx.nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.normalization = normalization(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = [Block(before, after, normalization) for before, after in pairwise(widths)]
        self.output = mlx.nn.Linear(64, 10)

    def __call__(self, images: mx.array) -> mx.array:
        x = mlx.nn.relu(self.normalization(self.first(images)))
        for block in self.blocks:
            x = block(x)
        return self.output(mx.mean(x, axis=(1, 2)))


def digits_network(normalization: digits_mlx.Normalization) -> mlx.nn.Module:
    return digits_mlx.Network(normalization, {})


NETWORKS = {
    "step of the digits network": (digits_network, (64, 8, 8, 1)),
    "step of ResNet-20": (ResNet20, (64, 32, 32, 3)),
}


def steps(name: str) -> tuple[Work, measure.Calls]:
    network_of, shape = NETWORKS[name]
    random = np.random.default_rng(0)
    images = mx.array(random.standard_normal(shape, np.float32))
    labels = mx.array(random.integers(0, digits.CLASSES, shape[0]))

    def timed(normalization: digits_mlx.Normalization) -> Callable[[], object]:
        network = network_of(normalization)
        optimizer = mlx.optimizers.SGD(1e-3, 0.9)
        loss_and_gradients = mlx.nn.value_and_grad(network, digits_mlx.loss_of)
        state = [network.state, optimizer.state]

        def step(images: mx.array, labels: mx.array) -> mx.array:
            loss, gradients = loss_and_gradients(network, images, labels)
            optimizer.update(network, gradients)
            return loss

        compiled = mx.compile(step, inputs=state, outputs=state)
        return lambda: mx.eval(compiled(images, labels), state)

    n, height, width, channels = shape
    return Work((n, channels, height, width)), {
        "batchnorm.mlx, compiled": timed(OURS),
        "mlx.nn, compiled": timed(THEIRS),
        "no normalization, compiled": timed(mlx.nn.Identity),
        **measure.copies_of(np.array(images)),
    }


def rows(quick: bool) -> Iterator[tuple[Work, str, measure.Calls]]:
    for each, layout in measure.work(quick):
        if layout == LAST:  # mlx.nn has no other
            for call in CALLS:
                yield each, call, calls(each, call)
    for name in list(NETWORKS)[: 1 if quick else None]:
        each, sides = steps(name)
        yield each, name, sides


def main() -> None:
    arguments = measure.options(__doc__)
    found = []
    for each, call, sides in rows(arguments.quick):
        found += measure.results("MLX", each, LAST, call, sides, quick=arguments.quick)
    title = f"MLX {mx.__version__} on {mx.default_device()}, float32. {batchnorm.native_status()}"
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
