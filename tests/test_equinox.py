"""equinox.BatchNorm: as Equinox' own layer, but for what that has wrong."""

import copy
import io
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from compare import close, near, same
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_jax import operations
from test_jax_devices import DEVICES, finish, start

from batchnorm.equinox import BatchNorm, convert, revert

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (8, 4, 5, 6)).astype(np.float32)
DY = RANDOM.normal(size=X.shape).astype(np.float32)
SHAPES = [(8, 4), (8, 4, 5), (8, 4, 5, 6)]
make = eqx.nn.make_with_state(BatchNorm)
make_theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)


def batched(layer, state, x, mask=None, residual=None):
    """y and the new state, of examples along the first axis."""

    def one(x, mask, residual):
        given = {"mask": mask, "residual": residual}
        return layer(x, state, **{name: each for name, each in given.items() if each is not None})

    return jax.vmap(one, out_axes=(0, None), axis_name="batch")(x, mask, residual)


def trained(made, x, steps=1):
    layer, state = made
    for step in range(steps):
        y, state = eqx.filter_jit(batched)(layer, state, x * (1 + step))
    return y, state


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("affine", [True, False])
def test_leaves_are_theirs(mode, affine):
    arguments = {"channelwise_affine": affine, "mode": mode}
    ours, theirs = make(4, "batch", **arguments), make_theirs(4, "batch", **arguments)
    paths = [[path for path, _ in jax.tree.leaves_with_path(each)] for each in (ours, theirs)]
    assert list(map(str, paths[0])) == list(map(str, paths[1]))
    for one, other in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        if eqx.is_array(one):
            same(one, other)
        else:
            assert one == other
    if mode == "batch":  # with "ema", the first averages may be anything
        same(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]))
    assert isinstance(ours[0], eqx.nn.BatchNorm)


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_is_as_theirs(mode, shape):
    x, dy = (each.reshape(8, 4, -1)[:, :, : np.prod(shape[2:], dtype=int)] for each in (X, DY))
    x, dy = x.reshape(shape), dy.reshape(shape)
    found = []
    for made in (make, make_theirs):
        layer, state = made(4, "batch", mode=mode, momentum=0.6)

        @eqx.filter_jit
        @partial(eqx.filter_grad, has_aux=True)
        def step(arguments, state):
            layer, x = arguments
            y, state = batched(layer, state, x)
            return (jnp.sin(y) * dy).sum(), (y, state)

        for _ in range(3):
            gradients, (y, state) = step((layer, jnp.asarray(x)), state)
        of_layer = (gradients[0].weight, gradients[0].bias, gradients[1])
        found.append((y, of_layer, jax.tree.leaves(state)))
    near(*found, 2e-5)


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_inference_after_few_steps_is_by_the_average_of_the_batches(steps):
    layer, state = make(4, "batch", mode="batch")
    x = [X * scale for scale in np.linspace(0.1, 2, steps)]
    for each in x:
        _, state = eqx.filter_jit(batched)(layer, state, each)
    weights = 0.99 ** np.arange(steps)[::-1]
    batches = [truth.batch_norm(each, axis=1) for each in x]
    mean = np.average([batch.mean for batch in batches], axis=0, weights=weights)
    var = np.average([batch.var for batch in batches], axis=0, weights=weights)
    y, unchanged = batched(eqx.nn.inference_mode(layer), state, X)
    near(y, truth.batch_norm(X, axis=1, given=(mean, var)).y, 5e-5)
    same(jax.tree.leaves(unchanged), jax.tree.leaves(state))


def test_inference_of_theirs_is_for_whoever_needs_its_numbers():
    layer, state = make(4, "batch", mode="batch")
    _, state = batched(layer, state, X)
    theirs = eqx.nn.inference_mode(revert(layer))
    y, _ = batched(theirs, state, X)
    assert 0.05 < y.std() < 0.25, "a variance that is 99 too large"


def test_inference_before_any_step_is_by_the_first_averages():
    layer, state = make(4, "batch", mode="batch")
    y, _ = layer(X[0], state, inference=True)
    near(y, X[0] / np.sqrt(1 + 1e-5))


def test_inference_is_of_one_example_as_of_many():
    layer, state = make(4, "batch", mode="ema")
    _, state = trained((layer, state), X)
    layer = eqx.nn.inference_mode(layer)
    y, _ = batched(layer, state, X)
    near(layer(X[0], state)[0], y[0])
    near(layer(X[0], state, inference=True)[0], y[0])


@pytest.mark.parametrize("names", [("batch", "row"), ["batch", "row"]], ids=str)
def test_several_axes_and_vectors(names):
    x = np.moveaxis(X, 1, 3)  # features last, as vectors of a batch of three axes
    layer, state = make(4, (*names, "column"), mode="batch")
    one = partial(layer, state=state)
    for name in ("column", *reversed(names)):
        one = jax.vmap(one, out_axes=(0, None), axis_name=name)
    y, new = jax.jit(one)(x)
    wanted = truth.batch_norm(x)
    near(y, wanted.y)
    near(new.get(layer.batch_state_index), (0.01 * wanted.mean, 0.99 + 0.01 * wanted.var))


in_one = jax.__version_info__ >= (0, 8)  # see test_jax


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_is_one_call_without_a_copy(shape):
    layer, state = make(4, "batch", mode="batch")

    def step(x):
        y, new = batched(layer, state, x)
        return (y**3).sum(), (y, new)

    found = operations(jax.grad(step, has_aux=True), jnp.ones(shape))
    for name in [*(["batch_norm"] if in_one else ["statistics", "normalize"]), "gradients"]:
        ((operands, results),) = found[f"batch_norm_{name}"]
        assert {each.shape for each in (*operands, *results)} <= {shape, (4,)}
    assert "transpose" not in found


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_a_batch_in_which_nothing_counts_is_not_counted(mode):
    layer, state = make(4, "batch", mode=mode)
    _, state = batched(layer, state, X, np.zeros((8, 1, 1, 1)))
    y, state = batched(layer, state, X)
    wanted = truth.batch_norm(X, axis=1).y
    near(y, wanted)
    near(batched(eqx.nn.inference_mode(layer), state, X)[0], wanted, 5e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inference_of_narrow_averages(dtype):
    layer, state = make(4, "batch", mode="batch", dtype=dtype)
    for _ in range(20):
        _, state = eqx.filter_jit(batched)(layer, state, X)
    y, _ = batched(eqx.nn.inference_mode(layer), state, X)
    near(y, truth.batch_norm(X, axis=1).y, 0.1 if dtype == "bfloat16" else 0.02)


def test_masks_and_residuals():
    mask = RANDOM.uniform(size=(8, 1, 5, 1)) < 0.6
    layer, state = make(4, "batch", mode="batch", activation="silu")
    y, new = batched(layer, state, np.where(mask, X, np.nan), mask, DY)
    wanted = truth.batch_norm(X, axis=1, mask=mask, residual=DY, activation="silu")
    near(jnp.where(mask, y, 0), np.where(mask, wanted.y, 0))
    near(new.get(layer.batch_state_index), (0.01 * wanted.mean, 0.99 + 0.01 * wanted.var))


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_theirs(x_dtype, dtype):
    x, found = jnp.asarray(X).astype(x_dtype), []
    for made in (make, make_theirs):
        layer, state = made(4, "batch", mode="batch", dtype=dtype)
        evaluated, _ = batched(eqx.nn.inference_mode(layer), state, x)
        if dtype == x_dtype or dtype == "float32":  # else theirs can't keep its averages
            y, new = batched(layer, state, x)
            found.append([each.dtype for each in (y, evaluated, *jax.tree.leaves(new))])
    assert found[:1] == found[1:]


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("x_dtype", ["float16", "float32", "int32"])
def test_averages_keep_their_dtype(mode, x_dtype):
    layer, state = make(4, "batch", mode=mode, dtype="bfloat16")
    y, state = batched(layer, state, jnp.asarray(X).astype(x_dtype))
    averages = state.get(layer.batch_state_index or layer.ema_state_index)
    assert {str(each.dtype) for each in averages} == {"bfloat16"}
    near(y, truth.batch_norm(X.astype(x_dtype), axis=1).y, 2e-2)


def test_statistics_of_a_large_mean():
    x = np.random.default_rng(0).normal(1e4, 0.01, (1000, 4, 10)).astype(np.float32)
    y, _ = trained(make(4, "batch", mode="batch"), x)
    close(y, truth.batch_norm(x, axis=1).y, rtol=0, atol=5e-3)


def test_checkpoints_go_both_ways():
    x = jnp.asarray(X)
    for one, other in ((make, make_theirs), (make_theirs, make)):
        layer, state = one(4, "batch", mode="batch")
        _, state = batched(layer, state, x)
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, (layer, state))
        file.seek(0)
        loaded = eqx.tree_deserialise_leaves(file, other(4, "batch", mode="batch"))
        same(jax.tree.leaves(loaded[1]), jax.tree.leaves(state))


def test_legacy_is_ema_and_warns():
    with pytest.warns(UserWarning, match="defaults to"):
        layer = BatchNorm(4, "batch")
    assert layer.mode == "ema"


class Net(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch", momentum=0.7)
        self.layers = [eqx.nn.Conv2d(4, 4, 3, key=key), eqx.nn.BatchNorm(4, "batch", mode="ema")]

    def __call__(self, x, state):
        y, state = self.norm(x, state)
        return self.layers[1](self.layers[0](y), state)


def test_convert_and_revert():
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    ours = convert(model)
    assert type(ours.norm) is type(ours.layers[1]) is BatchNorm
    assert type(model.norm) is eqx.nn.BatchNorm, "a model is not changed in place"
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(model), strict=True):
        assert one is other
    again = jax.tree.map(lambda each: each, state)  # a state is used once
    y, new = batched(ours, state, X)
    wanted, wanted_state = batched(model, again, X)
    near(y, wanted, 1e-4)
    near(jax.tree.leaves(new), jax.tree.leaves(wanted_state))
    assert jax.tree.structure(revert(ours)) == jax.tree.structure(model)
    assert type(convert(model.norm)) is BatchNorm
    assert convert(ours).norm.activation is None
    assert copy.deepcopy(ours.norm).eps == pickle.loads(pickle.dumps(ours.norm)).eps


class Other(eqx.nn.BatchNorm):
    pass


class Own(BatchNorm):
    pass


def test_what_convert_and_revert_refuse():
    layers = {"norm": [Other(4, "batch", mode="batch")]}
    with pytest.raises(TypeError, match=r"\['norm'\]\[0\] is of test_equinox.Other, a subclass of"):
        convert(layers)
    own = Own(4, "batch", mode="batch")
    assert convert([own])[0] is own
    with pytest.raises(TypeError, match=r"\[0\] is of test_equinox.Own, a subclass of batchnorm"):
        revert([own])
    with pytest.raises(ValueError, match=r"\[0\] has activation='relu', which equinox.nn"):
        revert([BatchNorm(4, "batch", mode="batch", activation="relu")])


@pytest.mark.parametrize(
    ("arguments", "x", "error", "message"),
    [
        ({"mode": "other"}, X, ValueError, "Invalid mode"),
        ({"activation": "gelu"}, X, ValueError, "activation must be None"),
        ({"eps": -1.0}, X, ValueError, "eps must be positive"),
        ({"momentum": 2.0}, X, ValueError, r"momentum must be within \[0, 1\]"),
        ({}, X[:, :3], ValueError, "x must have input_size=4 channels, but it has 3"),
        ({}, X[:, 0, 0, 0], ValueError, "x must have at least one axis"),
        ({}, X.astype(np.complex64), TypeError, "real floating-point numbers, .* complex64"),
    ],
)
def test_refused(arguments, x, error, message):
    def call():
        layer, state = make(4, "batch", **{"mode": "batch", **arguments})
        return batched(layer, state, x)

    with pytest.raises(error, match=message):
        call()


def test_what_is_refused_leaves_the_state_usable():
    layer, state = make(4, "batch", mode="batch")
    with pytest.raises(ValueError, match="mask must broadcast"):
        batched(layer, state, X, np.ones((8, 3)))
    batched(layer, state, X)


def test_an_axis_that_is_not_mapped_is_a_name_error():
    layer, state = make(4, "batch", mode="batch")
    with pytest.raises(NameError, match="axis_name must name axes that are mapped here"):
        layer(X[0], state)
    with pytest.raises(NameError, match="'batch'"):
        jax.vmap(partial(layer, state=state), out_axes=(0, None), axis_name="other")(X)


# ---- several devices


def in_devices() -> None:
    """Each device has from 0 to all of its elements; all together are normalized as one batch."""
    random = np.random.default_rng(0)
    x = random.normal(2, 3, (DEVICES, 6, 4, 5)).astype(np.float32)
    dy = random.normal(size=x.shape).astype(np.float32)
    here = np.array([0.9, 0.3, 0.6, 0.0])[:, None, None, None]
    mask = random.uniform(size=(DEVICES, 6, 1, 5)) < here
    layer, state = make(4, ("device", "batch"), mode="batch", momentum=0.75)

    def step(state, x, dy, mask):
        def loss(layer, x):
            y, new = batched(layer, state, x, mask)
            return (y * dy).sum(), (y, new)

        def of_both(arguments):
            return loss(*arguments)

        (of_layer, dx), (y, new) = eqx.filter_grad(of_both, has_aux=True)((layer, x))
        parameters = jax.lax.psum((of_layer.weight, of_layer.bias), "device")
        return parameters, new.get(layer.batch_state_index), y, dx

    joined = [each.reshape(-1, *each.shape[2:]) for each in (x, dy, mask)]
    forward = truth.batch_norm(joined[0], axis=1, mask=joined[2])
    ones, zeros = np.ones(4), np.zeros(4)
    back = truth.batch_norm_gradients(joined[1], joined[0], ones, zeros, axis=1, mask=joined[2])
    averages = 0.25 * forward.mean, 0.75 + 0.25 * forward.var
    wanted = ((back["scale"], back["bias"]), averages, forward.y, back["x"])
    split = jax.shard_map(
        step,
        mesh=Mesh(np.array(jax.devices()), "device"),
        in_specs=(P(), P("device"), P("device"), P("device")),
        out_specs=(P(), P(), P("device"), P("device")),
        check_vma=False,  # with which JAX sums over no axis of vmap
    )
    near(jax.jit(split)(state, *joined), wanted)
    mapped = jax.pmap(
        step, axis_name="device", in_axes=(None, 0, 0, 0), out_axes=(None, None, 0, 0)
    )
    by_pmap = mapped(state, x, dy, mask)
    y, dx = (each.reshape(-1, *each.shape[2:]) for each in by_pmap[2:])
    near((*by_pmap[:2], y, dx), wanted)


def test_devices():
    finish(start("in_devices", module="test_equinox", quickly_compiled=True))
