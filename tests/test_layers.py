"""What all layers for JAX's libraries share, once."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import truth
from cases import HARD
from compare import ROUNDING, close, near
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from layers import EPS, LAYERS, MOMENTUM
from test_jax_devices import DEVICES, finish, start

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (6, 5, 3)).astype(np.float32)
DY = RANDOM.normal(size=X.shape).astype(np.float32)
SCALE, BIAS = (RANDOM.uniform(0.5, 2, 3).astype(np.float32) for _ in range(2))
MASK = RANDOM.uniform(size=X.shape[:-1]) < 0.7
ONES, ZEROS = jnp.ones(2), jnp.zeros(2)

layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
masked_layers = pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer.takes_masks], ids=lambda layer: layer.name
)


def moved(old, new):
    return MOMENTUM * old + (1 - MOMENTUM) * new


@layers
@pytest.mark.parametrize("hard", HARD, ids=str)
def test_hard_inputs(layer, hard):
    x = hard.x()
    wanted = truth.batch_norm(x, eps=EPS)
    y, mean, _ = jax.jit(layer.train)(jnp.asarray(x), ONES, ZEROS)
    assert y.dtype == x.dtype
    tolerance = hard.tolerance if hard.eps == EPS else 1e-3
    close(y, wanted.y, rtol=0, atol=tolerance)
    close(mean, moved(0, wanted.mean), rtol=1e-6, atol=1e-6 * np.sqrt(wanted.var.max()))


@masked_layers
def test_what_a_mask_leaves_out_may_be_anything(layer):
    x = np.where(MASK[..., None], X, np.nan)

    def loss(x, scale, bias):
        y, *averages = layer.train(x, scale, bias, mask=MASK)
        return (jnp.where(MASK[..., None], y, 0) * DY).sum(), averages

    got, (mean, var) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, SCALE, BIAS)
    dy = np.where(MASK[..., None], DY, 0)
    wanted = truth.batch_norm_gradients(dy, x, SCALE, BIAS, mask=MASK[..., None])
    near(got, (wanted["x"], wanted["scale"], wanted["bias"]))
    forward = truth.batch_norm(x, SCALE, BIAS, mask=MASK[..., None])
    near((mean, var), (moved(0, forward.mean), moved(1, forward.var)))


@masked_layers
def test_weights_count_elements_more_than_once(layer):
    weights = RANDOM.integers(0, 3, MASK.shape).astype(np.float32)
    y, mean, var = layer.train(X, SCALE, BIAS, mask=jnp.asarray(weights))
    wanted = truth.batch_norm(X, SCALE, BIAS, mask=weights[..., None])
    near((y, mean, var), (wanted.y, moved(0, wanted.mean), moved(1, wanted.var)))


@masked_layers
def test_a_mask_that_is_nowhere_true_moves_nothing(layer):
    y, mean, var = layer.train(X, SCALE, BIAS, mask=np.zeros_like(MASK))
    assert np.isfinite(y).all()
    close((mean, var), (np.zeros(3), np.ones(3)), rtol=0, atol=0)


@layers
def test_an_empty_batch_moves_nothing(layer):
    y, mean, var = layer.train(jnp.zeros((0, 5, 3)), SCALE, BIAS)
    assert y.shape == (0, 5, 3)
    close((mean, var), (np.zeros(3), np.ones(3)), rtol=0, atol=0)


@layers
def test_one_value_of_each_feature_is_its_bias(layer):
    y, mean, var = layer.train(X[:1, 0], SCALE, BIAS)
    close(y, BIAS[None], rtol=0, atol=1e-7)
    near((mean, var), (moved(0, X[0, 0]), moved(1, np.zeros(3))))


@layers
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
def test_half_precision_is_computed_in_float32(layer, dtype):
    x = X.astype(dtype)
    y, mean, var = layer.train(x, SCALE, BIAS)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == np.float32
    wanted = truth.batch_norm(x, SCALE, BIAS)
    near(y, wanted.y, ROUNDING[np.dtype(dtype)])
    near((mean, var), (moved(0, wanted.mean), moved(1, wanted.var)))
    far = np.float32(300) + np.zeros(3, np.float32)
    y, *_ = layer.evaluate((X + 300).astype(dtype), SCALE, BIAS, far + 0.3, np.full(3, 4.0))
    wanted = truth.batch_norm(
        (X + 300).astype(dtype), SCALE, BIAS, given=(far + 0.3, np.full(3, 4))
    )
    near(y, wanted.y, ROUNDING[np.dtype(dtype)])


@layers
def test_evaluation_is_by_the_averages_which_stay(layer):
    mean, var = np.arange(3.0, dtype=np.float32), np.arange(1.0, 4.0, dtype=np.float32)
    y, *same = layer.evaluate(X, SCALE, BIAS, jnp.asarray(mean), jnp.asarray(var))
    near(y, truth.batch_norm(X, SCALE, BIAS, given=(mean, var)).y)
    close(same, [mean, var], rtol=0, atol=0)


def plainly(x, scale, bias):
    """In plain operations, for well-conditioned data alone."""
    mean = x.mean((0, 1))
    var = jnp.square(x - mean).mean((0, 1))
    return (x - mean) / jnp.sqrt(var + EPS) * scale + bias, moved(0, mean), moved(1, var)


@layers
def test_derivatives_of_second_order(layer):
    def loss(call, x, scale, bias):
        y, *_ = call(x, scale, bias)
        return (jnp.sin(y) * DY).sum()

    def second(call):
        gradient = jax.grad(partial(loss, call), argnums=(0, 1, 2))
        return jax.jvp(gradient, (X, SCALE, BIAS), (DY, BIAS, SCALE))

    near(jax.jit(partial(second, layer.train))(), jax.jit(partial(second, plainly))(), 1e-4)


@masked_layers
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activation_and_residual(layer, activation):
    call = partial(layer.train, activation=activation)
    y, *_ = call(X, SCALE, BIAS, mask=MASK, residual=DY)
    options = {"mask": MASK[..., None], "residual": DY, "activation": activation}
    near(y, truth.batch_norm(X, SCALE, BIAS, **options).y)
    y, *_ = layer.evaluate(X, SCALE, BIAS, 0 * BIAS, SCALE, residual=DY, activation=activation)
    options = {"given": (0 * BIAS, SCALE), "residual": DY, "activation": activation}
    near(y, truth.batch_norm(X, SCALE, BIAS, **options).y)


# ---- several devices


def in_layers() -> None:
    """Each device has from 0 to all of its elements; all together are normalized as one batch."""
    random = np.random.default_rng(0)
    x = random.normal(2, 3, (DEVICES, 6, 5, 3)).astype(np.float32)
    x += np.arange(DEVICES, dtype=np.float32)[:, None, None, None]
    dy = random.normal(size=x.shape).astype(np.float32)
    here = np.array([0.9, 0.3, 0.6, 0.0])[:, None, None]
    some = random.uniform(size=x.shape[:-1]) < here
    mesh = Mesh(np.array(jax.devices()), "i")
    for layer in LAYERS:
        masks = [None, some] if layer.takes_masks else [None]
        for mask in masks:

            def step(scale, bias, x, dy, *masks, layer=layer, axis_name=None):
                def loss(scale, bias, x):
                    mask = masks[0] if masks else None
                    y, *averages = layer.train(x, scale, bias, mask=mask, axis_name=axis_name)
                    return (y * dy).sum(), (y, averages)

                gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
                (*of_parameters, dx), (y, averages) = gradient(scale, bias, x)
                return of_parameters, averages, y, dx

            arrays = [x, dy] if mask is None else [x, dy, mask]
            arrays = [each.reshape(-1, *each.shape[2:]) for each in arrays]
            if layer.has_devices:

                def on_a_device(*arrays, step=step):
                    of_parameters, *rest = step(*arrays, axis_name="i")
                    return jax.lax.psum(of_parameters, "i"), *rest

                split = jax.shard_map(
                    on_a_device,
                    mesh=mesh,
                    in_specs=(P(), P(), *[P("i")] * len(arrays)),
                    out_specs=(P(), P(), P("i"), P("i")),
                    check_vma=False,
                )
            else:
                sharded = jax.NamedSharding(mesh, P("i"))
                arrays, split = [jax.device_put(each, sharded) for each in arrays], step
            got = jax.jit(split)(SCALE, BIAS, *arrays)
            weights = None if mask is None else arrays[2][..., None]
            forward = truth.batch_norm(arrays[0], SCALE, BIAS, mask=weights)
            back = truth.batch_norm_gradients(arrays[1], arrays[0], SCALE, BIAS, mask=weights)
            averages = [moved(0, forward.mean), moved(1, forward.var)]
            wanted = ([back["scale"], back["bias"]], averages, forward.y, back["x"])
            near(got, wanted, 1e-5, layer.name)


def test_devices():
    finish(start("in_layers", module="test_layers", quickly_compiled=True))
