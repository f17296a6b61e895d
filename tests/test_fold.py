"""`fold` of MLX and NNX: one layer of two, compared with NumPy in float64."""

import copy

import jax.numpy as jnp
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from compare import as_numpy, near, same
from flax import nnx

import batchnorm.flax.nnx
import batchnorm.mlx

RANDOM = np.random.default_rng(0)


def normalized(y, mean, var, scale, bias, eps):
    """The formula, in float64."""
    y = (as_numpy(y).astype(np.float64) - mean) / np.sqrt(var + eps)
    return y if scale is None else y * scale + bias


def values(channels):
    """Statistics and parameters that are not those of a new layer."""
    mean, scale, bias = RANDOM.normal(size=(3, channels)).astype(np.float32)
    return mean, RANDOM.uniform(0.5, 2, channels).astype(np.float32), scale, bias


# ---- MLX


MLX_LAYERS = {
    "conv1d": (lambda: mlx.nn.Conv1d(4, 6, 3), (2, 8, 4)),
    "conv2d": (lambda: mlx.nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 5, 5, 4)),
    "conv2d, grouped": (lambda: mlx.nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 7, 7, 4)),
    "conv3d": (lambda: mlx.nn.Conv3d(4, 6, 2), (2, 3, 3, 3, 4)),
    "transposed 1d": (lambda: mlx.nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 5, 4)),
    "transposed 2d": (
        lambda: mlx.nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False),
        (2, 5, 5, 4),
    ),
    "transposed 3d": (lambda: mlx.nn.ConvTranspose3d(4, 6, 2), (2, 3, 3, 3, 4)),
    "linear": (lambda: mlx.nn.Linear(4, 6), (2, 3, 4)),
    "linear, no bias": (lambda: mlx.nn.Linear(4, 6, bias=False), (3, 4)),
}


def mlx_norm(kind, channels=6, affine=True, **settings):
    layer = kind(channels, eps=1e-2, affine=affine, **settings)
    layer.running_mean, layer.running_var, scale, bias = map(mx.array, values(channels))
    if affine:
        layer.weight, layer.bias = scale, bias
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [mlx.nn.BatchNorm, batchnorm.mlx.BatchNorm])
@pytest.mark.parametrize(("make", "shape"), MLX_LAYERS.values(), ids=MLX_LAYERS)
def test_mlx(make, shape, kind, affine):
    layer, norm = make(), mlx_norm(kind, affine=affine)
    x = mx.array(RANDOM.normal(size=shape).astype(np.float32))
    before = {name: np.array(each) for name, each in layer.parameters().items()}
    folded = batchnorm.mlx.fold(layer, norm)
    assert type(folded) is type(layer)
    same({name: np.array(each) for name, each in layer.parameters().items()}, before)
    statistics = (np.array(norm.running_mean), np.array(norm.running_var))
    parameters = (np.array(norm.weight), np.array(norm.bias)) if affine else (None, None)
    near(folded(x), normalized(layer(x), *statistics, *parameters, 1e-2), 1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_mlx_dtypes_and_freezing(dtype):
    layer, norm = mlx.nn.Linear(4, 6, bias=False), mlx_norm(batchnorm.mlx.BatchNorm)
    layer.set_dtype(dtype)
    layer.freeze()
    folded = batchnorm.mlx.fold(layer, norm)
    assert {each.dtype for each in folded.parameters().values()} == {dtype}
    assert folded.trainable_parameters() == {}
    x = mx.array(RANDOM.normal(size=(3, 4)).astype(np.float32)).astype(dtype)
    wanted = norm.eval()(layer(x).astype(mx.float32))
    near(folded(x).astype(mx.float32), wanted, 3e-2 if dtype == mx.bfloat16 else 5e-3)
    assert batchnorm.mlx.fold(mlx.nn.Linear(4, 6), norm).trainable_parameters().keys() == {
        *("weight", "bias")
    }


class OwnLinear(mlx.nn.Linear):
    pass


class OwnNorm(batchnorm.mlx.BatchNorm):
    pass


def complex_linear():
    layer = mlx.nn.Linear(4, 6)
    layer.weight = layer.weight.astype(mx.complex64)
    return layer


def without_variance():
    norm = mlx_norm(batchnorm.mlx.BatchNorm)
    norm.running_var = mx.full((6,), np.nan)
    return norm


@pytest.mark.parametrize(
    ("layer", "norm", "error", "message"),
    [
        (lambda: OwnLinear(4, 6), lambda: mlx.nn.BatchNorm(6), TypeError, r"^layer must be .*OwnL"),
        (lambda: "a layer", lambda: mlx.nn.BatchNorm(6), TypeError, r"^layer must be .*\.str\.$"),
        (lambda: mlx.nn.Linear(4, 6), lambda: OwnNorm(6), TypeError, r"^normalization must .*OwnN"),
        (
            lambda: mlx.nn.Linear(4, 6),
            lambda: batchnorm.mlx.BatchNorm(6, activation="relu"),
            ValueError,
            r"activation='relu'.* call mlx\.nn\.relu after the layer",
        ),
        (
            lambda: mlx.nn.Linear(4, 6),
            lambda: mlx.nn.BatchNorm(6, track_running_stats=False),
            ValueError,
            "^normalization must have running statistics",
        ),
        (
            lambda: mlx.nn.Linear(4, 6),
            lambda: mlx.nn.BatchNorm(7),
            ValueError,
            "num_features=7 channels, but it has 6",
        ),
        (
            complex_linear,
            lambda: mlx.nn.BatchNorm(6),
            TypeError,
            r"^layer\.weight must be an array of real .* dtype is mlx\.core\.complex64",
        ),
        (
            lambda: mlx.nn.Linear(4, 6),
            without_variance,
            ValueError,
            "^The folded layer's parameters are not finite in mlx",
        ),
    ],
)
def test_what_mlx_refuses(layer, norm, error, message):
    with pytest.raises(error, match=message):
        batchnorm.mlx.fold(layer(), norm())


# ---- NNX


NNX_LAYERS = {
    "linear": (lambda rngs: nnx.Linear(4, 6, rngs=rngs), (2, 3, 4)),
    "linear, no bias": (lambda rngs: nnx.Linear(4, 6, use_bias=False, rngs=rngs), (3, 4)),
    "conv1d": (lambda rngs: nnx.Conv(4, 6, 3, rngs=rngs), (2, 8, 4)),
    "conv2d": (
        lambda rngs: nnx.Conv(4, 6, (3, 3), padding="CIRCULAR", use_bias=False, rngs=rngs),
        (2, 5, 5, 4),
    ),
    "conv2d, grouped": (
        lambda rngs: nnx.Conv(
            4, 6, (3, 3), kernel_dilation=2, feature_group_count=2, padding="VALID", rngs=rngs
        ),
        (2, 7, 7, 4),
    ),
    "conv2d, masked": (
        lambda rngs: nnx.Conv(4, 6, (1, 1), mask=jnp.eye(4, 6)[None, None], rngs=rngs),
        (2, 3, 3, 4),
    ),
    "transposed": (
        lambda rngs: nnx.ConvTranspose(4, 6, (3, 3), strides=2, rngs=rngs),
        (2, 3, 3, 4),
    ),
    "transposed, turned": (
        lambda rngs: nnx.ConvTranspose(
            4, 6, (3, 3), transpose_kernel=True, use_bias=False, rngs=rngs
        ),
        (2, 3, 3, 4),
    ),
}


def nnx_norm(kind, channels=6, affine=True, **settings):
    layer = kind(
        channels, epsilon=1e-2, use_bias=affine, use_scale=affine, rngs=nnx.Rngs(0), **settings
    )
    mean, var, scale, bias = map(jnp.asarray, values(channels))
    layer.mean[...], layer.var[...] = mean, var
    if affine:
        layer.scale[...], layer.bias[...] = scale, bias
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nnx.BatchNorm, batchnorm.flax.nnx.BatchNorm])
@pytest.mark.parametrize(("make", "shape"), NNX_LAYERS.values(), ids=NNX_LAYERS)
def test_nnx(make, shape, kind, affine):
    layer, norm = make(nnx.Rngs(0)), nnx_norm(kind, affine=affine)
    x = jnp.asarray(RANDOM.normal(size=shape).astype(np.float32))
    before = copy.deepcopy(nnx.to_pure_dict(nnx.state(layer)))
    folded = batchnorm.flax.nnx.fold(layer, norm)
    assert type(folded) is type(layer)
    same(nnx.to_pure_dict(nnx.state(layer)), before)
    statistics = (np.asarray(norm.mean[...]), np.asarray(norm.var[...]))
    parameters = (
        (np.asarray(norm.scale[...]), np.asarray(norm.bias[...])) if affine else (None,) * 2
    )
    wanted = normalized(layer(x), *statistics, *parameters, 1e-2)
    near(folded(x), wanted, 1e-5)


def test_nnx_in_a_program():
    layer, x = nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    folded = batchnorm.flax.nnx.fold(layer, nnx_norm(nnx.BatchNorm))
    near(nnx.jit(lambda folded, x: folded(x))(folded, x), folded(x), 1e-6)


def test_nnx_dtypes():
    layer = nnx.Linear(4, 6, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    folded = batchnorm.flax.nnx.fold(layer, nnx_norm(nnx.BatchNorm))
    assert folded.kernel[...].dtype == folded.bias[...].dtype == jnp.bfloat16


class OwnNnxLinear(nnx.Linear):
    pass


class OwnNnxNorm(batchnorm.flax.nnx.BatchNorm):
    pass


def without_nnx_variance():
    norm = nnx_norm(nnx.BatchNorm)
    norm.var[...] = jnp.full(6, jnp.nan)
    return norm


def linear(dtype=jnp.float32):
    return nnx.Linear(4, 6, param_dtype=dtype, rngs=nnx.Rngs(0))


def complex_nnx_linear():
    return linear(jnp.complex64)


OURS = batchnorm.flax.nnx.BatchNorm


@pytest.mark.parametrize(
    ("layer", "norm", "error", "message"),
    [
        (
            lambda: OwnNnxLinear(4, 6, rngs=nnx.Rngs(0)),
            lambda: nnx_norm(OURS),
            TypeError,
            r"^layer must be an nnx\.Conv, .*OwnNnxLinear",
        ),
        (linear, lambda: nnx_norm(OwnNnxNorm), TypeError, r"^normalization must be .*OwnNnxNorm"),
        (
            linear,
            lambda: nnx_norm(OURS, activation="silu"),
            ValueError,
            r"activation='silu'.* call flax\.nnx\.silu after the layer",
        ),
        (linear, lambda: nnx_norm(OURS, axis=1), ValueError, "over axis -1.* its axis is 1"),
        (linear, lambda: nnx_norm(OURS, 7), ValueError, "num_features=7 channels, but it has 6"),
        (
            complex_nnx_linear,
            lambda: nnx_norm(OURS),
            TypeError,
            r"^layer\.kernel must be an array of real .* dtype is complex64",
        ),
        (linear, without_nnx_variance, ValueError, "^The folded layer's parameters are not fin"),
    ],
)
def test_what_nnx_refuses(layer, norm, error, message):
    with pytest.raises(error, match=message):
        batchnorm.flax.nnx.fold(layer(), norm())
