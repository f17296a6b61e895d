"""Train a small network on handwritten digits in JAX, as a program for Flax before Linen.

Of such a program two things change: the import of nn, which is old_flax_nn.py beside this file, and
the optimizer.

    pip install ".[demo]"
    python examples/digits_jax.py
"""

import time

import digits
import jax
import jax.numpy as jnp
import numpy as np
import old_flax_nn as nn

OURS = "batchnorm.flax.nn.BatchNorm"


class Network(nn.Module):
    """Three convolutions, each normalized, the mean over the image, and a linear layer."""

    def apply(self, images, train=True):
        x = images
        normalization = nn.BatchNorm.partial(use_running_average=not train, momentum=0.9)
        for index, channels in enumerate(digits.CHANNELS):
            if index > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            # A bias would do nothing: the normalization that follows subtracts it with the mean.
            x = nn.Conv(x, channels, kernel_size=(3, 3), bias=False, name=f"convolution_{index}")
            x = nn.relu(normalization(x, name=f"normalization_{index}"))
        return nn.Dense(jnp.mean(x, axis=(1, 2)), digits.CLASSES, name="output")


def loss_of(logits, labels):
    return -jnp.mean(jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=1))


@jax.jit
def training_step(model, velocity, state, images, labels):
    def loss_and_state(model):
        with nn.stateful(state) as new_state:
            logits = model(images)
        return loss_of(logits, labels), new_state

    (loss, state), gradient = jax.value_and_grad(loss_and_state, has_aux=True)(model)
    velocity = jax.tree.map(lambda v, g: digits.MOMENTUM * v + g, velocity, gradient)
    model = jax.tree.map(lambda p, v: p - digits.LEARNING_RATE * v, model, velocity)
    return model, velocity, state, loss


@jax.jit
def prediction(model, state, images):
    with nn.stateful(state, mutable=False):
        return jnp.argmax(model(images, train=False), axis=1)


class Training:
    """A network, what trains it, and how that went."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        with nn.stateful() as self.state:
            _, model = Network.create_by_shape(jax.random.PRNGKey(0), [(1, 8, 8, 1)])
        self.model = model.replace(params=with_weights(model.params, weights))
        self.velocity = jax.tree.map(jnp.zeros_like, self.model)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy = 0.0

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        start = time.perf_counter()
        self.model, self.velocity, self.state, loss = jax.block_until_ready(
            training_step(self.model, self.velocity, self.state, images, labels)
        )
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def test(self, data: digits.Digits) -> None:
        right = prediction(self.model, self.state, data.test_images) == data.test_labels
        self.accuracy = float(np.mean(right))


def with_weights(params: dict, weights: dict[str, np.ndarray]) -> dict:
    """Put the weights that all frameworks share in the place of initial parameters."""
    params = {name: dict(parameters) for name, parameters in params.items()}
    for index in range(len(digits.CHANNELS)):
        weight = weights[f"convolutions.{index}.weight"]
        params[f"convolution_{index}"]["kernel"] = jnp.array(np.moveaxis(weight, 0, -1))
    params["output"]["kernel"] = jnp.array(weights["output.weight"].T)
    params["output"]["bias"] = jnp.array(weights["output.bias"])
    return params


def trainings(seed: int) -> dict[str, Training]:
    return {OURS: Training(digits.initial_weights(seed))}


if __name__ == "__main__":
    digits.main(__doc__.splitlines()[0], trainings)
