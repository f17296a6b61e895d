"""What one framework says of itself and computes, in a process of its own.

`python -m batchnorm.tools.probes NAME` prints lines of JSON, the attributes of doctor's Row, with a
mark, as frameworks print, too. Frameworks are imported when their probe is called, and numbers come
and go as NumPy's.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

EPS = 1e-5
SHAPE = (32, 56, 56, 64)  # of what is timed
_ROUNDS = 7
Forward = Callable[[np.ndarray], np.ndarray]  # x of shape (rows, features) -> y, in training


class Input(NamedTuple):
    """An input on which an obvious way to compute fails, and within how much of the truth y is."""

    values: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    tolerance: float
    dtype: str = "float32"


INPUTS = {
    "large mean": Input(lambda random, shape: 1e4 + 0.01 * random.standard_normal(shape), 5e-3),
    "constant": Input(lambda random, shape: np.full(shape, 1234.567), 1e-3),
    "float16, 300 to 400": Input(
        lambda random, shape: random.uniform(300, 400, shape), 2e-3, "float16"
    ),
    "float16, squares overflow": Input(
        lambda random, shape: 300 * random.standard_normal(shape), 3e-3, "float16"
    ),
    "1e30": Input(lambda random, shape: 1e30 * random.standard_normal(shape), 1e-3),
}
MARK = "batchnorm: "
NOT_FINITE = 1e300  # an error that JSON can hold
_ROWS = 200_000


@dataclass(frozen=True)
class Sides:
    """What a framework computes.

    `steps`: ours and its own, forward and backward of an array of SHAPE, and nothing is returned
    before it is done.
    """

    served: dict[str, str]
    ours: Forward
    theirs: Forward | None = None
    steps: Callable[[], tuple[Callable[[], object], Callable[[], object]]] | None = None


@dataclass(frozen=True)
class Probe:
    packages: tuple[str, ...]
    door: str
    sides: Callable[[], Sides]
    environment: dict[str, str] = field(default_factory=dict)


def _of_kinds(
    served: dict[str, str],
    kinds: tuple[Any, Any],
    forward: Callable[[Any], Forward],
    step: Callable[[Any], Callable[[], object]],
) -> Sides:
    """Of two classes of layers, ours and the framework's."""
    ours, theirs = kinds
    return Sides(served, forward(ours), forward(theirs), lambda: (step(ours), step(theirs)))


def _native(name: str = "") -> str:
    """How the CPU's arrays are served: as native_status has it for a door."""
    from .. import native

    if native.kernels is None:
        return "plain operations, as there are no native kernels"
    said = {part.partition(":")[0]: part for part in native.native_status().split(". ")}
    state = said.get(name, ":served").partition(":")[2].strip(" .")
    return "native kernels" if state.startswith("served") else f"plain operations, {state}"


def _arrays() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal(SHAPE, np.float32) for _ in range(2))
    return x, dy


def _of_numpy() -> Sides:
    from .. import numpy as door

    return Sides({"cpu": _native()}, lambda x: door.batch_norm(x, eps=EPS)[0])


def _of_mlx() -> Sides:
    import mlx.core as mx

    from .. import mlx as door

    nn: Any = importlib.import_module("mlx.nn")  # which is typed in parts

    def forward(kind: Any) -> Forward:
        def call(x: np.ndarray) -> np.ndarray:
            layer = kind(x.shape[1], eps=EPS, affine=False)
            return np.array(layer(mx.array(x)).astype(mx.float32))

        return call

    def step(kind: Any) -> Callable[[], object]:
        x, dy = map(mx.array, _arrays())
        layer = kind(SHAPE[-1])
        loss = nn.value_and_grad(layer, lambda x: (layer(x) * dy).sum())

        def call() -> None:
            mx.eval(loss(x), layer.state)

        return call

    gpu = "plain operations"
    devices = {"cpu": _native("MLX")} if mx.default_device() == mx.cpu else {"gpu": gpu}
    return _of_kinds(devices, (door.BatchNorm, nn.BatchNorm), forward, step)


def _of_jax() -> Sides:
    from .. import jax as door

    return Sides(_devices_of_jax(), lambda x: np.asarray(door.batch_norm(x, eps=EPS)[0]))


def _devices_of_jax() -> dict[str, str]:
    import jax

    from .. import jax as _  # noqa: F401, which registers its report

    def how(device: Any) -> str:
        return _native("JAX") if device.platform == "cpu" else "plain operations"

    return {str(device): how(device) for device in jax.devices()}


def _step_of_jax(
    layer: Callable[[Any, Any], Any], parameters: Any, *, moved: bool = False
) -> Callable[[], object]:
    """`layer(parameters, x)`: a jitted step, channels first if `moved`."""
    import jax

    order = (0, 3, 1, 2) if moved else (0, 1, 2, 3)
    x, dy = (jax.numpy.asarray(each.transpose(order)) for each in _arrays())

    @jax.jit
    def step(parameters: Any, x: Any, dy: Any) -> Any:
        y, backward = jax.vjp(layer, parameters, x)
        return y, backward(dy)

    return lambda: jax.block_until_ready(step(parameters, x, dy))  # type: ignore[no-untyped-call]


def _of_flax() -> Sides:
    import flax.linen
    import jax

    from ..flax import linen

    def forward(kind: Any) -> Forward:
        def call(x: np.ndarray) -> np.ndarray:
            layer = kind(False, epsilon=EPS, use_bias=False, use_scale=False)
            y, _ = layer.init_with_output(jax.random.key(0), x)
            return np.asarray(y)

        return call

    def step(kind: Any) -> Callable[[], object]:
        layer = kind(False)
        parameters = layer.init(jax.random.key(0), np.ones((2, SHAPE[-1]), np.float32))

        def call(parameters: Any, x: Any) -> Any:
            return layer.apply(parameters, x, mutable=["batch_stats"])[0]

        return _step_of_jax(call, parameters)

    kinds = linen.BatchNorm, flax.linen.BatchNorm
    return _of_kinds(_devices_of_jax(), kinds, forward, step)


def _of_equinox() -> Sides:
    import equinox as eqx
    import jax

    from .. import equinox as door

    def mapped(layer: Any, state: Any, x: Any) -> Any:
        one = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return one(x, state)[0]

    def made(kind: Any, channels: int, **settings: Any) -> Any:
        make = eqx.nn.make_with_state(kind)
        return make(channels, "batch", eps=EPS, mode="batch", **settings)

    def forward(kind: Any) -> Forward:
        def call(x: np.ndarray) -> np.ndarray:
            layer, state = made(kind, x.shape[1], channelwise_affine=False)
            return np.asarray(jax.jit(lambda x: mapped(layer, state, x))(x))

        return call

    def step(kind: Any) -> Callable[[], object]:
        layer, state = made(kind, SHAPE[-1])
        parameters, rest = eqx.partition(layer, eqx.is_inexact_array)

        def call(parameters: Any, x: Any) -> Any:
            return mapped(eqx.combine(parameters, rest), state, x)

        return _step_of_jax(call, parameters, moved=True)

    kinds = door.BatchNorm, eqx.nn.BatchNorm
    return _of_kinds(_devices_of_jax(), kinds, forward, step)


def _of_keras() -> Sides:
    import keras

    from .. import keras as door

    on_jax = keras.backend.backend() == "jax"

    def forward(kind: Any) -> Forward:
        def call(x: np.ndarray) -> np.ndarray:
            policy = "mixed_float16" if x.dtype == np.float16 else None
            layer = kind(epsilon=EPS, center=False, scale=False, dtype=policy)
            return np.asarray(keras.ops.convert_to_numpy(layer(x, training=True)))

        return call

    def step(kind: Any) -> Callable[[], object]:
        layer = kind(epsilon=EPS)
        layer.build(SHAPE)
        if on_jax:
            state = [each.value for each in layer.non_trainable_variables]

            def call(parameters: Any, x: Any) -> Any:
                return layer.stateless_call(parameters, state, x, training=True)[0]

            return _step_of_jax(call, [each.value for each in layer.trainable_variables])
        import torch

        x, dy = map(torch.from_numpy, _arrays())
        return lambda: layer(x.requires_grad_(), training=True).backward(dy)

    kinds = door.BatchNormalization, keras.layers.BatchNormalization
    served = _devices_of_jax() if on_jax else _devices_of_torch()
    return _of_kinds(served, kinds, forward, step)


def _of_torch() -> Sides:
    import torch

    from .. import torch as door

    def forward(kind: Any) -> Forward:
        def call(x: np.ndarray) -> np.ndarray:
            layer = kind(x.shape[1], eps=EPS, affine=False)
            return np.asarray(layer(torch.from_numpy(x)))

        return call

    def step(kind: Any) -> Callable[[], object]:
        x, dy = (torch.from_numpy(each).movedim(-1, 1) for each in _arrays())
        layer = kind(SHAPE[-1])
        return lambda: layer(x.requires_grad_()).backward(dy)

    return Sides(
        _devices_of_torch(),
        forward(door.BatchNorm1d),
        forward(torch.nn.BatchNorm1d),
        lambda: (step(door.BatchNorm2d), step(torch.nn.BatchNorm2d)),
    )


def _devices_of_torch() -> dict[str, str]:
    import torch

    devices = {"cpu": _native()}
    for kind in ("cuda", "mps", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            devices[kind] = "plain operations"
    return devices


PROBES = {
    "NumPy": Probe(("numpy",), "numpy", _of_numpy),
    "MLX": Probe(("mlx",), "mlx", _of_mlx),
    "JAX": Probe(("jax",), "jax", _of_jax),
    "Flax": Probe(("flax", "jax"), "flax.linen", _of_flax),
    "Equinox": Probe(("equinox", "jax"), "equinox", _of_equinox),
    "Keras on jax": Probe(("keras", "jax"), "keras", _of_keras, {"KERAS_BACKEND": "jax"}),
    "Keras on torch": Probe(("keras", "torch"), "keras", _of_keras, {"KERAS_BACKEND": "torch"}),
    "PyTorch": Probe(("torch",), "torch", _of_torch),
}


def examine(name: str, quick: bool) -> Iterator[dict[str, Any]]:
    """What is known of a framework: nothing yet, once it is imported; and in the end."""
    probe = PROBES[name]
    try:
        for package in probe.packages:
            importlib.import_module(package)
    except Exception as error:
        yield {"error": _text(error), "is_of_framework": True}
        return
    yield {}
    try:
        importlib.import_module(f"batchnorm.{probe.door}")
        sides = probe.sides()
        found: dict[str, Any] = {"served": sides.served, "accuracy": _accuracy(sides)}
        if not quick and sides.steps is not None:
            found["ratio"] = _ratio(*sides.steps())
    except Exception as error:
        found = {"error": _text(error)}
    yield found


def _text(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _accuracy(sides: Sides) -> dict[str, dict[str, float | None]]:
    """How far the outputs are from those of float64, on each input; NOT_FINITE if they are not."""
    return {
        name: {"ours": _error(sides.ours, each), "theirs": _error(sides.theirs, each)}
        for name, each in INPUTS.items()
    }


def _error(forward: Forward | None, each: Input) -> float | None:
    if forward is None:
        return None
    x = each.values(np.random.default_rng(0), (_ROWS, 2)).astype(each.dtype)
    wide = x.astype(np.float64)
    centered = wide - wide.mean(0)
    centered -= centered.mean(0)  # what rounding the mean has left
    wanted = centered / np.sqrt(np.square(centered).mean(0) + EPS)
    with np.errstate(all="ignore"):
        worst = float(np.abs(np.asarray(forward(x), np.float64) - wanted).max())
    return worst if np.isfinite(worst) else NOT_FINITE


def _ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Their time over ours: the median of rounds, after one to warm up."""
    ratios = []
    for _ in range(_ROUNDS + 1):
        seconds = []
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])


if __name__ == "__main__":
    for _found in examine(sys.argv[1], "--quick" in sys.argv):
        print(MARK + json.dumps(_found), flush=True)
