"""examples/old_flax_nn.py, the file for the place of the old flax.nn: its layers and functions.

They are compared with those of flax.linen, on the same parameters.
"""

import hashlib
import inspect

import flax.linen
import flax.training.dynamic_scale
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import old_flax_nn as nn
import optax
import pytest

KEY = jax.random.PRNGKey(0)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def like(params):
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda each: numbers.normal(size=each.shape).astype(np.float32), params)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Names and arguments


LAYER = "bias, dtype, precision, kernel_init, bias_init"
NORMALIZATION = "epsilon, dtype, bias, scale, bias_init, scale_init"
CELL = "carry, inputs, gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Dense", f"inputs, features, {LAYER}"),
        (
            "DenseGeneral",
            "inputs, features, axis, batch_dims, bias, dtype, kernel_init, bias_init, precision",
        ),
        (
            "Conv",
            "inputs, features, kernel_size, strides, padding, input_dilation, kernel_dilation,"
            f" feature_group_count, {LAYER}",
        ),
        (
            "ConvTranspose",
            f"inputs, features, kernel_size, strides, padding, kernel_dilation, {LAYER}",
        ),
        ("Embed", "inputs, num_embeddings, features, embedding_init"),
        ("LayerNorm", f"x, {NORMALIZATION}"),
        ("GroupNorm", f"x, num_groups, group_size, {NORMALIZATION}"),
        ("LSTMCell", CELL),
        ("OptimizedLSTMCell", CELL),
        ("GRUCell", CELL),
        ("max_pool", "inputs, window_shape, strides, padding"),
        ("avg_pool", "inputs, window_shape, strides, padding"),
        ("stochastic", "rng"),
        ("dropout", "inputs, rate, deterministic, rng"),
    ],
)
def test_arguments_have_the_old_names_and_order(name, arguments):
    assert ", ".join(inspect.signature(getattr(nn, name)).parameters) == arguments


# Layers


X = (2, 6, 5, 4)
DENSE = flax.linen.Dense
GENERAL = flax.linen.DenseGeneral
CONV = flax.linen.Conv
TRANSPOSE = flax.linen.ConvTranspose


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "linen"),
    [
        ("Dense", X, {"features": 3}, DENSE(3)),
        ("Dense", (4,), {"features": 3, "bias": False}, DENSE(3, use_bias=False)),
        ("DenseGeneral", X, {"features": 3}, GENERAL(3)),
        ("DenseGeneral", X, {"features": (2, 3)}, GENERAL((2, 3))),
        ("DenseGeneral", X, {"features": 3, "axis": (1, -1)}, GENERAL(3, axis=(1, -1))),
        (
            "DenseGeneral",
            X,
            {"features": (2, 3), "axis": (-2, -1), "batch_dims": 0},
            GENERAL((2, 3), axis=(-2, -1), batch_dims=(0,)),
        ),
        (
            "DenseGeneral",
            X,
            {"features": 3, "batch_dims": (0, 1), "bias": False},
            GENERAL(3, batch_dims=(0, 1), use_bias=False),
        ),
        ("Conv", X, {"features": 3, "kernel_size": (3, 2)}, CONV(3, (3, 2))),
        ("Conv", X[1:], {"features": 3, "kernel_size": (3, 3)}, CONV(3, (3, 3))),
        ("Conv", X[1:], {"features": 3, "kernel_size": 3}, CONV(3, (3,))),
        ("Conv", X[2:], {"features": 3, "kernel_size": 3}, CONV(3, (3,))),
        ("Conv", (2, *X), {"features": 2, "kernel_size": (1, 3, 2)}, CONV(2, (1, 3, 2))),
        (
            "Conv",
            X,
            {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2, "bias": False},
            CONV(6, (3, 3), feature_group_count=2, use_bias=False),
        ),
        (
            "Conv",
            X,
            {"features": 3, "kernel_size": (2, 3), "strides": (2, 1), "padding": "VALID"},
            CONV(3, (2, 3), strides=(2, 1), padding="VALID"),
        ),
        (
            "Conv",
            X,
            {"features": 3, "kernel_size": (2, 2), "padding": [(0, 1), (2, 0)]},
            CONV(3, (2, 2), padding=[(0, 1), (2, 0)]),
        ),
        (
            "Conv",
            X,
            {
                "features": 3,
                "kernel_size": (2, 2),
                "input_dilation": (1, 2),
                "kernel_dilation": (2, 1),
                "padding": [(1, 0), (0, 2)],
            },
            CONV(
                3,
                (2, 2),
                input_dilation=(1, 2),
                kernel_dilation=(2, 1),
                padding=[(1, 0), (0, 2)],
            ),
        ),
        (
            "ConvTranspose",
            X,
            {"features": 3, "kernel_size": (3, 2), "strides": (2, 3)},
            TRANSPOSE(3, (3, 2), strides=(2, 3)),
        ),
        (
            "ConvTranspose",
            X[1:],
            {"features": 3, "kernel_size": (3, 3), "padding": "VALID", "kernel_dilation": (1, 2)},
            TRANSPOSE(3, (3, 3), padding="VALID", kernel_dilation=(1, 2)),
        ),
        (
            "ConvTranspose",
            X[1:],
            {"features": 3, "kernel_size": 2, "bias": False},
            TRANSPOSE(3, (2,), use_bias=False),
        ),
        ("LayerNorm", X, {}, flax.linen.LayerNorm()),
        (
            "LayerNorm",
            X,
            {"epsilon": 0.1, "bias": False},
            flax.linen.LayerNorm(epsilon=0.1, use_bias=False),
        ),
        ("LayerNorm", (4,), {"scale": False}, flax.linen.LayerNorm(use_scale=False)),
        ("GroupNorm", X, {"num_groups": 2}, flax.linen.GroupNorm(2)),
        ("GroupNorm", (3, 64), {}, flax.linen.GroupNorm(use_fast_variance=False)),
        (
            "GroupNorm",
            X[1:],
            {"num_groups": None, "group_size": 1, "epsilon": 0.1},
            flax.linen.GroupNorm(None, group_size=1, epsilon=0.1),
        ),
    ],
)
def test_a_layer_computes_what_that_of_linen_does(name, shape, arguments, linen):
    x = random(*shape) + 1
    layer = getattr(nn, name).partial(**arguments)
    in_linen = like(jax.eval_shape(linen.init, KEY, x)["params"])
    params = in_linen
    if name == "GroupNorm":  # whose parameters had the axes of x
        params = {name: each.reshape(*(1,) * (x.ndim - 1), -1) for name, each in params.items()}
    y = layer.call(params, x)
    close(y, linen.apply({"params": in_linen}, x))
    assert y.dtype == jnp.float32
    in_half = jax.eval_shape(lambda: layer.call(params, x, dtype=jnp.float16))
    assert (in_half.shape, in_half.dtype) == (y.shape, jnp.float16)


def test_a_general_dense_layer_contracts_axes_in_their_order():
    x, kernel = random(*X), random(4, 6, 3)
    y = nn.DenseGeneral.call({"kernel": kernel}, x, 3, axis=(-1, 1), bias=False)
    close(y, np.einsum("abcd,dbf->acf", x, kernel))
    kernel, bias = random(6, 3), random(3)
    y = nn.DenseGeneral.call({"kernel": kernel, "bias": bias}, x, 3, axis=1)
    close(y, np.einsum("abcd,bf->acdf", x, kernel) + bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 4}, "num_groups must divide the 6 channels of x, got 4."),
        ({}, "num_groups must divide the 6 channels of x, got 32."),
        ({"num_groups": 0}, "num_groups must divide the 6 channels of x, got 0."),
        ({"num_groups": None, "group_size": 4}, "group_size must divide the 6 channels of x, got"),
        ({"num_groups": None, "group_size": 0}, "group_size must divide the 6 channels of x, got"),
        ({"num_groups": None, "group_size": -3}, "group_size must divide the 6 channels of x, got"),
        ({"num_groups": 2, "group_size": 3}, "give num_groups or group_size, got 2 and 3."),
        ({"num_groups": None}, "give num_groups or group_size, got None and None."),
    ],
)
def test_groups_divide_the_channels(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        nn.GroupNorm.init(KEY, random(2, 6), **arguments)


def test_embedding():
    words = jnp.array([[1, 2, 1], [0, 4, 3]])
    linen = flax.linen.Embed(5, 3)
    model = nn.Model(nn.Embed, {"embedding": random(5, 3)})
    y = model(words, num_embeddings=5, features=3)
    np.testing.assert_array_equal(y, linen.apply({"params": model.params}, words))
    close(model.attend(y), linen.apply({"params": model.params}, y, method="attend"))
    with pytest.raises(ValueError, match=r"^inputs must be integers, but their dtype is float32"):
        model(y, num_embeddings=5, features=3)


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell"])
def test_recurrent_cells(name):
    cell, linen = getattr(nn, name), getattr(flax.linen, name)(features=3)
    zeros = cell.initialize_carry(KEY, (2,), 3)
    assert jax.tree.map(jnp.shape, zeros) == jax.tree.map(lambda _: (2, 3), zeros)
    assert not any(jax.tree.leaves(jax.tree.map(jnp.any, zeros)))
    series = random(5, 2, 4)
    params = like(jax.eval_shape(linen.init, KEY, zeros, series[0])["params"])
    carry, ys = jax.lax.scan(nn.Model(cell, params), zeros, series)
    expected = jax.lax.scan(lambda c, x: linen.apply({"params": params}, c, x), zeros, series)
    jax.tree.map(close, (carry, ys), expected)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_recurrent_cells_are_initialized_within_a_scan(name):
    cell = getattr(nn, name)

    class Network(nn.Module):
        def apply(self, x):
            named, shared = cell.partial(name="named"), cell.shared(name="shared")
            zeros = cell.initialize_carry(KEY, (2,), 3)
            _, ys = jax.lax.scan(named, zeros, x)
            return jax.lax.scan(shared, zeros, jax.lax.scan(shared, zeros, ys)[1])[1]

    class OneStep(nn.Module):
        def apply(self, x):
            zeros = cell.initialize_carry(KEY, (2,), 3)
            return cell(zeros, cell(zeros, x[0], name="named")[1], name="shared")

    x = random(5, 2, 4)
    _, expected = OneStep.init(KEY, x)
    y, params = Network.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    in_jit, params = jax.jit(Network.init)(KEY, x)
    jax.tree.map(close, (in_jit, params), (y, expected))


@pytest.mark.parametrize("padding", ["VALID", "SAME", [(1, 0), (0, 2)]])
@pytest.mark.parametrize("strides", [None, (2, 1)])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_pooling(name, strides, padding):
    x = random(*X)
    y = getattr(nn, name)(x, (2, 3), strides, padding)
    close(y, getattr(flax.linen, name)(x, (2, 3), strides, padding))


def initial(parameter, initializer, shape):
    """What the old flax.nn made: with a key from the name's SHA-1."""
    digest = hashlib.sha1(parameter.encode()).digest()
    return initializer(jax.random.fold_in(KEY, int.from_bytes(digest[:4], "big")), shape)


def test_initial_values_of_a_general_dense_layer():
    """Those of a matrix, the same for each element of the batch dimensions."""
    _, params = nn.DenseGeneral.init(KEY, random(*X), (2, 3), axis=(2, 3), batch_dims=(0,))
    matrix = initial("kernel", jax.nn.initializers.lecun_normal(), (20, 6))
    assert params["kernel"].shape == (2, 5, 4, 2, 3)
    np.testing.assert_array_equal(params["kernel"].reshape(2, 20, 6), np.stack([matrix, matrix]))
    np.testing.assert_array_equal(params["bias"], np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"^batch_dims must be the first dimensions, got \(1,\)"):
        nn.DenseGeneral.init(KEY, random(*X), 3, batch_dims=1)


def test_initializers_of_a_general_dense_layer_get_a_dtype_once_for_each_matrix():
    calls = []

    def initializer(rng, shape, dtype):
        calls.append((shape, dtype))
        return jnp.full(shape, len(calls), dtype)

    _, params = nn.DenseGeneral.init(
        KEY, random(2, 3, 4), 5, batch_dims=(0, 1), kernel_init=initializer, bias_init=initializer
    )
    assert calls == [((4, 5), jnp.float32)] * 6 + [((5,), jnp.float32)] * 6
    numbers = np.arange(1, 7).reshape(2, 3)
    np.testing.assert_array_equal(params["kernel"], np.broadcast_to(numbers.T, (5, 4, 3, 2)).T)
    np.testing.assert_array_equal(params["bias"], np.broadcast_to(numbers.T + 6, (5, 3, 2)).T)
    _, params = nn.DenseGeneral.init(KEY, random(0, 4), 5, batch_dims=0)
    assert (params["kernel"].shape, params["bias"].shape) == ((0, 4, 5), (0, 5))


@pytest.mark.parametrize("name", ["Dense", "Conv", "ConvTranspose", "LSTMCell", "GRUCell"])
def test_initial_values_are_made_as_those_of_a_general_dense_layer(name):
    ours, other = (
        inspect.signature(each).parameters for each in (getattr(nn, name), nn.DenseGeneral)
    )
    for argument in ("kernel_init", "bias_init"):
        assert ours[argument].default is other[argument].default


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [("LayerNorm", {}, (4,)), ("GroupNorm", {"num_groups": 2}, (1, 1, 1, 4))],
)
def test_initial_values_of_a_normalization(name, arguments, shape):
    _, params = getattr(nn, name).init(KEY, random(*X), **arguments)
    np.testing.assert_array_equal(params["scale"], np.ones(shape))
    np.testing.assert_array_equal(params["bias"], np.zeros(shape))
    assert params["scale"].shape == params["bias"].shape == shape


def test_initial_values_of_an_embedding():
    _, params = nn.Embed.init(KEY, jnp.arange(3), 50, 400)
    assert abs(float(params["embedding"].std()) * 20 - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "with_bias"),
    [("LSTMCell", {"hi", "hf", "hg", "ho"}), ("GRUCell", {"ir", "iz", "in", "hn"})],
)
def test_initial_values_of_a_cell(name, with_bias):
    cell = getattr(nn, name)
    numbers = {"kernel_init": 1.0, "recurrent_kernel_init": 2.0, "bias_init": 3.0}
    filled = {
        argument: lambda rng, shape, number=number: np.full(shape, number, np.float32)
        for argument, number in numbers.items()
    }
    _, params = cell.init(KEY, cell.initialize_carry(KEY, (), 4), random(4), **filled)
    assert {gate for gate, each in params.items() if "bias" in each} == with_bias
    for gate, each in params.items():
        np.testing.assert_array_equal(each["kernel"], np.full((4, 4), 1.0 + (gate[0] == "h")))
        np.testing.assert_array_equal(each.get("bias", 3.0), 3.0)
    square = inspect.signature(cell).parameters["recurrent_kernel_init"].default(KEY, (4, 4))
    close(square @ square.T, np.eye(4))


# Randomness


def test_keys_follow_from_the_key_that_is_given():
    def keys(rng):
        with nn.stochastic(rng):
            assert nn.is_stochastic()
            first = nn.make_rng()
            with nn.stochastic(jax.random.PRNGKey(5)):
                inner = nn.make_rng()
            return first, nn.make_rng(), inner

    fold_in = jax.random.fold_in
    expected = fold_in(KEY, 1), fold_in(KEY, 2), fold_in(jax.random.PRNGKey(5), 1)
    jax.tree.map(np.testing.assert_array_equal, keys(KEY), expected)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(keys)(KEY), expected)
    assert not nn.is_stochastic()
    with pytest.raises(ValueError, match=r"^make_rng and dropout without rng belong inside of"):
        nn.make_rng()
    with pytest.raises(ArithmeticError), nn.stochastic(KEY):
        raise ArithmeticError
    assert not nn.is_stochastic()


@pytest.mark.parametrize(
    "transformed",
    [
        lambda: jax.jit(nn.make_rng)(),
        lambda: jax.lax.scan(lambda carry, _: (carry, nn.make_rng()), None, length=2),
        lambda: jax.lax.cond(jnp.ones(()) > 0, nn.make_rng, nn.make_rng),
        lambda: jax.checkpoint(nn.make_rng)(),
        lambda: jax.jit(lambda: nn.dropout(jnp.ones(3), 0.5))(),
        lambda: nn.module(jax.jit(lambda x: nn.dropout(x, 0.5))).init_by_shape(KEY, [(3,)]),
    ],
    ids=["jit", "scan", "cond", "checkpoint", "dropout in jit", "jit in init_by_shape"],
)
def test_a_key_from_outside_is_not_built_into_a_program(transformed):
    with nn.stochastic(KEY):
        nn.make_rng()
        with pytest.raises(ValueError, match=r"^Enter nn.stochastic\(rng\) inside of the function"):
            transformed()
        nn.make_rng()


def test_stochastic_with_a_key_that_is_not_traced_inside_of_what_is():
    def keys(rng=KEY):
        with nn.stochastic(rng):
            return nn.make_rng(), nn.make_rng()

    expected = keys()
    jax.tree.map(np.testing.assert_array_equal, jax.jit(keys)(), expected)
    steps = jax.lax.scan(lambda carry, _: (carry, keys()), None, length=2)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, jnp.stack([b, b])), steps, expected)
    mapped = jax.vmap(keys)(jnp.stack([KEY, KEY]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), mapped, expected)
    with nn.stochastic(KEY):
        outside = nn.module(lambda x: (nn.make_rng(), x)).init_by_shape(KEY, [(3,)])[0][0]
        gradient = jax.grad(lambda x: jnp.sum(nn.dropout(x, 0.5)))(jnp.ones(3))
    np.testing.assert_array_equal(outside, expected[0])
    assert set(gradient.tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("rng", ["no key", None, jnp.ones(2)])
def test_a_key_that_is_none_is_an_error(rng):
    with pytest.raises((TypeError, ValueError), match="key"), nn.stochastic(rng):
        pass
    assert not nn.is_stochastic()


def test_dropout():
    x = random(1000) + 10
    with nn.stochastic(KEY):
        first, second = nn.dropout(x, 0.25), nn.dropout(x, rate=0.25)
        assert nn.dropout(x, 0.0) is nn.dropout(x, 0.5, deterministic=True) is x
    assert not np.array_equal(first, second)
    for y in (first, second):
        close(y[y != 0], (x / 0.75)[y != 0])
        assert 0.2 < float(jnp.mean(y == 0)) < 0.3
    given = nn.dropout(x, 0.25, rng=jax.random.fold_in(KEY, 1))
    np.testing.assert_array_equal(given, first)


# What Optax and Flax make of a Model in the place of the old optimizers


def dense_model():
    model = nn.Model(nn.Dense.partial(features=2), {"kernel": random(3, 2), "bias": random(2)})
    return model, lambda model: jnp.sum(model(random(4, 3)) ** 2)


def test_an_optimizer_for_each_part_of_a_model():
    model, loss = dense_model()

    def labels(model):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "a" if "bias" in jax.tree_util.keystr(path) else "b", model
        )

    optimizer = optax.multi_transform({"a": optax.sgd(1.0), "b": optax.sgd(0.0)}, labels)
    gradient = jax.grad(loss)(model)
    updates, _ = optimizer.update(gradient, optimizer.init(model), model)
    changed = optax.apply_updates(model, updates).params
    np.testing.assert_array_equal(changed["kernel"], model.params["kernel"])
    close(changed["bias"], model.params["bias"] - gradient.params["bias"])


def test_a_dynamic_scale_takes_a_model():
    model, loss = dense_model()

    @jax.jit
    def step(scale, model):
        return scale.value_and_grad(loss)(model)

    _, is_finite, value, gradient = step(flax.training.dynamic_scale.DynamicScale(), model)
    assert is_finite
    jax.tree.map(close, (value, gradient), jax.value_and_grad(loss)(model))


def test_a_traversal_takes_the_parameters_of_a_model():
    model, _ = dense_model()
    with pytest.warns(DeprecationWarning, match="Traversal"):
        traversal = flax.traverse_util.ModelParamTraversal(lambda path, _: path == "/bias")
    (bias,) = traversal.iterate(model.params)
    np.testing.assert_array_equal(bias, model.params["bias"])
    changed = model.replace(params=traversal.update(jnp.zeros_like, model.params))
    jax.tree.map(
        np.testing.assert_array_equal, changed.params, {**model.params, "bias": jnp.zeros(2)}
    )


# A program of that time


def test_a_program_of_that_time_trains():
    class Network(nn.Module):
        def apply(self, x, num_classes, train=True):
            x = nn.Conv(x, features=8, kernel_size=(3, 3), bias=False)
            x = nn.BatchNorm(x, use_running_average=not train, momentum=0.9)
            x = nn.relu(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
            x = x.reshape((x.shape[0], -1))
            x = nn.dropout(x, 0.1, deterministic=not train)
            x = nn.Dense(x, features=num_classes)
            return nn.log_softmax(x)

    def batch(seed):
        numbers = np.random.default_rng(seed)
        labels = numbers.integers(4, size=32)
        images = numbers.normal(scale=0.5, size=(32, 8, 8, 1))
        images[range(32), 2 * labels] += 1
        return images.astype(np.float32), labels

    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def train_step(model, optimizer_state, state, key, images, labels):
        def loss_fn(model):
            with nn.stateful(state) as new_state, nn.stochastic(key):
                log_probabilities = model(images)
            chosen = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)
            return -jnp.mean(chosen), new_state

        (loss, new_state), gradient = jax.value_and_grad(loss_fn, has_aux=True)(model)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(model, updates), optimizer_state, new_state, loss

    module = Network.partial(num_classes=4)
    with nn.stateful() as state, nn.stochastic(KEY):
        _, params = module.init_by_shape(KEY, [((1, 8, 8, 1), jnp.float32)])
    model = nn.Model(module, params)
    assert params.keys() == {"Conv_0", "BatchNorm_1", "Dense_2"}
    optimizer_state = optimizer.init(model)
    for seed in range(30):
        model, optimizer_state, state, loss = train_step(
            model, optimizer_state, state, jax.random.PRNGKey(seed), *batch(seed)
        )
    assert loss < 0.2

    images, labels = batch(seed=30)
    with nn.stateful(state, mutable=False):
        predictions = np.argmax(model(images, train=False), axis=1)
    assert np.mean(predictions == labels) > 0.9
