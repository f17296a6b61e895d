"""The activations by name: their values and their slopes."""

from collections.abc import Callable
from typing import NamedTuple

from .arrays import Array, namespace


class _Activation(NamedTuple):
    value: Callable[[Array], Array]
    through: Callable[[Array, Array], Array]  # (dy, z): dy · act′(z)


def _relu(z: Array) -> Array:
    return namespace(z).where(z <= 0, 0.0, z)


def _through_relu(dy: Array, z: Array) -> Array:
    return namespace(z).where(z <= 0, 0.0, dy)


# silu is z·σ(z), beyond ±80 its limits: neither it nor a derivative is ∞ · 0 there.
def _silu(z: Array) -> Array:
    xp = namespace(z)
    is_far = _is_far(z)
    near = xp.where(is_far, 0.0, z)
    return xp.where(is_far, _relu(z), near * _sigmoid(near))


def _through_silu(dy: Array, z: Array) -> Array:
    xp = namespace(z)
    is_far = _is_far(z)
    near = xp.where(is_far, 0.0, z)
    sigmoid = _sigmoid(near)
    slope = sigmoid * (1 + near * (1 - sigmoid))
    return xp.where(is_far, _through_relu(dy, z), dy * slope)


def _is_far(z: Array) -> Array:
    """|z| > 80. In a program of MLX for any size, abs has no second derivative."""
    return namespace(z).logical_or(z < -80.0, z > 80.0)


def _sigmoid(z: Array) -> Array:
    return 0.5 + 0.5 * namespace(z).tanh(0.5 * z)


ACTIVATIONS = {
    "relu": _Activation(_relu, _through_relu),
    "silu": _Activation(_silu, _through_silu),
}

*_names, _last = (f'"{name}"' for name in ACTIVATIONS)
CHOICES = f"{', '.join(['None', *_names])} or {_last}"  # as a reader is told


def activate(z: Array, activation: str | None) -> Array:
    return z if activation is None else ACTIVATIONS[activation].value(z)


def through_activation(dy: Array, z: Array, activation: str | None) -> Array:
    """dy · act′(z)."""
    return dy if activation is None else ACTIVATIONS[activation].through(dy, z)
