"""`batchnorm.keras`: what Keras' own layer promises, in its backends jax and torch.

Keras has one backend a process. Here it is jax; one test runs this file again with torch. Run as
a program, the file is one of two processes of torch.distributed.
"""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import truth
from cases import LARGE_MEAN
from compare import ROUNDING, as_numpy, close, near, same
from keras import ops

from batchnorm.keras import BatchNormalization, convert, revert

BACKEND = keras.backend.backend()
THEIRS = keras.layers.BatchNormalization
EPS = 1e-3
X = np.random.default_rng(0).normal(3, 2, (8, 5, 4)).astype(np.float32)
DY = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
KEPT = np.arange(5) < np.array([5, 3, 1, 4, 2, 5, 5, 3])[:, None]  # a mask of X

# Keras 3.15 calls np.array of its own Variables, to save or copy a model, and of PyTorch's tensors,
# to predict: neither's __array__ takes the `copy` that NumPy 2 asks for. No call of ours is on the
# way.
arrays_of_keras = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="of JAX alone")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")


def values(layer):
    return {each.name: np.array(as_numpy(each.value)) for each in layer.weights}


def built(kind, shape=X.shape, seed=2, **keywords):
    """A layer with gamma, beta and moving statistics that are not those of the start."""
    layer = kind(**keywords)
    layer.build(shape)
    random = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(random.uniform(0.5, 2, variable.shape))
    return layer


def call(layer, x, dy=None, training=True, **keywords):
    """The outputs; with dy also the gradients of sum(y·dy), by the name of the argument."""
    arguments = {"training": training, **keywords}
    if dy is None:
        return as_numpy(layer(x, **arguments))
    names = ["x", *(variable.name for variable in layer.trainable_variables)]
    if BACKEND == "jax":
        import jax

        def loss(x, *variables):
            others = [each.value for each in layer.non_trainable_variables]
            y, others = layer.stateless_call(variables, others, x, **arguments)
            return ops.sum(y.astype("float32") * dy), (y, others)

        arrays = (ops.convert_to_tensor(x), *(each.value for each in layer.trainable_variables))
        function = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))
        found, (y, others) = function(*arrays)
        for variable, value in zip(layer.non_trainable_variables, others, strict=True):
            variable.assign(value)
    else:
        import torch

        leaf = torch.tensor(np.asarray(x)).requires_grad_()
        y = layer(leaf, **arguments)
        leaves = [leaf, *(each.value for each in layer.trainable_variables)]
        found = torch.autograd.grad(y, leaves, torch.tensor(dy, dtype=y.dtype))
    return as_numpy(y), dict(zip(names, map(as_numpy, found), strict=True))


def fresh(program, backend=BACKEND, **environment):
    """What a program prints, as JSON, in a process of its own."""
    environment = {**os.environ, "KERAS_BACKEND": backend, **environment}
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- what it is made of


ALL = {
    "axis": 1,
    "momentum": 0.9,
    "epsilon": 1e-2,
    "center": True,
    "scale": True,
    "beta_initializer": keras.initializers.RandomNormal(seed=1),
    "gamma_initializer": keras.initializers.RandomUniform(1, 2, seed=2),
    "moving_mean_initializer": keras.initializers.RandomNormal(seed=3),
    "moving_variance_initializer": keras.initializers.RandomUniform(1, 2, seed=4),
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_regularizer": keras.regularizers.L1(0.2),
    "beta_constraint": keras.constraints.MaxNorm(2),
    "gamma_constraint": keras.constraints.NonNeg(),
    "renorm": True,
    "renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 3.0},
    "renorm_momentum": 0.8,
    "name": "norm",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


@pytest.mark.parametrize("keywords", [{"name": "norm"}, ALL], ids=["defaults", "all"])
def test_the_configuration_is_that_of_keras(keywords):
    ours, theirs = BatchNormalization(**keywords), THEIRS(**keywords)
    assert ours.get_config() == theirs.get_config()
    assert BatchNormalization.from_config(theirs.get_config()).get_config() == ours.get_config()
    assert THEIRS.from_config(ours.get_config()).get_config() == theirs.get_config()
    assert isinstance(ours, THEIRS)


def test_the_arguments_are_shown():
    theirs = inspect.signature(THEIRS).parameters
    ours = inspect.signature(BatchNormalization).parameters
    assert {*ours} == {*theirs, "activation"}
    assert ours["synchronized"].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(ours[name] == theirs[name] for name in theirs if name != "synchronized")


def test_arguments_by_position():
    *positional, last = [value for name, value in ALL.items()][:16]
    ours = BatchNormalization(*positional, renorm_momentum=last, name="norm")
    theirs = THEIRS(*positional, last, name="norm")
    assert ours.get_config() == theirs.get_config()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("synchronized", [False, True])
def test_what_is_new_is_in_the_configuration(activation, synchronized):
    layer = BatchNormalization(activation=activation, synchronized=synchronized)
    for other in (
        BatchNormalization.from_config(layer.get_config()),
        keras.layers.deserialize(keras.layers.serialize(layer)),
    ):
        assert type(other) is BatchNormalization
        assert (other.activation, other.synchronized) == (activation, synchronized)
        assert other.get_config() == layer.get_config()


@pytest.mark.parametrize(
    "keywords",
    [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}, ALL],
    ids=["all", "no beta", "no gamma", "neither", "renorm"],
)
def test_weights_are_those_of_keras(keywords):
    ours, theirs = BatchNormalization(**keywords), THEIRS(**keywords)
    ours.build(X.shape), theirs.build(X.shape)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        assert (one.name, one.dtype, one.trainable) == (other.name, other.dtype, other.trainable)
        assert (one.regularizer, one.constraint) == (other.regularizer, other.constraint)
        same(one.value, other.value)


def test_a_symbolic_call():
    inputs = keras.Input((None, None, 4))
    layer = BatchNormalization(activation="relu")
    outputs = layer(inputs, residual=keras.layers.Dense(4)(inputs))
    assert outputs.shape == layer.compute_output_shape(inputs.shape) == (None, None, None, 4)
    assert layer.input_spec.ndim == 4
    assert layer.input_spec.axes == {-1: 4}
    spec = BatchNormalization(dtype="mixed_float16").compute_output_spec(inputs)
    assert (spec.shape, spec.dtype) == ((None, None, None, 4), "float16")
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        layer(X[None, ..., :3])


# ---- what it computes


CASES = {
    "last": (X.shape, {}, {}),
    "axis 1": ((4, 3, 5, 2), {"axis": 1}, {}),
    "images": ((4, 5, 3, 6), {"momentum": 0.5, "epsilon": 0.1}, {}),
    "without beta": (X.shape, {"center": False}, {}),
    "without gamma": (X.shape, {"scale": False}, {}),
    "with neither": (X.shape, {"center": False, "scale": False}, {}),
    "mask": (X.shape, {}, {"mask": KEPT}),
    "mask of axis 1": ((8, 5, 4), {"axis": 1}, {"mask": KEPT}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_keras_and_true(name, training):
    shape, keywords, arguments = CASES[name]
    random = np.random.default_rng(3)
    x, dy = (random.normal(size=shape).astype(np.float32) for _ in range(2))
    ours, theirs = (built(kind, shape, **keywords) for kind in (BatchNormalization, THEIRS))
    before = values(ours)
    got = call(ours, x, dy, training, **arguments)
    near(got, call(theirs, x, dy, training, **arguments))
    near(values(ours), values(theirs))

    options = {"axis": keywords.get("axis", -1), "eps": keywords.get("epsilon", EPS)}
    if "mask" in arguments and training:
        options["mask"] = arguments["mask"][..., None]
    if not training:
        options["given"] = before["moving_mean"], before["moving_variance"]
    gamma, beta = before.get("gamma"), before.get("beta")
    wanted = truth.batch_norm(x, gamma, beta, **options)
    gradients = truth.batch_norm_gradients(dy, x, gamma, beta, **options)
    names = {"x": "x", "gamma": "scale", "beta": "bias"}
    near(got, (wanted.y, {each: gradients[names[each]] for each in got[1]}))
    momentum = keywords.get("momentum", 0.99) if training else 1
    for each, new in (("moving_mean", wanted.mean), ("moving_variance", wanted.var)):
        near(values(ours)[each], momentum * before[each] + (1 - momentum) * new)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [X.shape, (1, 5, 1)], ids=["whole", "broadcast"])
def test_activation_and_residual(training, activation, shape):
    layer = built(BatchNormalization, activation=activation)
    residual = DY[: shape[0], :, : shape[2]]
    before = values(layer)
    y, gradients = call(layer, X, DY, training, residual=residual)
    given = None if training else (before["moving_mean"], before["moving_variance"])
    options = {"eps": EPS, "activation": activation, "residual": residual, "given": given}
    arguments = X, before["gamma"], before["beta"]
    near(y, truth.batch_norm(*arguments, **options).y)
    wanted = truth.batch_norm_gradients(DY, *arguments, **options)
    near(gradients, {"x": wanted["x"], "gamma": wanted["scale"], "beta": wanted["bias"]})


def test_the_gradient_of_the_residual():
    residual = keras.Variable(DY)

    class Added(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.residual, self.norm = residual, BatchNormalization(activation="silu")

        def build(self, shape):
            self.norm.build(shape)

        def call(self, inputs, training=None):
            return self.norm(inputs, residual=self.residual, training=training)

    _, gradients = call(built(Added), X, DY)
    weights = values(built(Added))
    wanted = truth.batch_norm_gradients(
        DY,
        X,
        weights["gamma"],
        weights["beta"],
        eps=EPS,
        activation="silu",
        residual=weights[residual.name],
    )
    near(gradients[residual.name], wanted["residual"])


def test_second_derivatives_are_those_of_keras():
    """Of a penalty on the gradient, as for critics of generative networks."""

    def penalty(kind):
        layer = built(kind)
        if BACKEND == "jax":
            import jax

            others = [each.value for each in layer.non_trainable_variables]
            variables = [each.value for each in layer.trainable_variables]

            def output(x):
                y, _ = layer.stateless_call(variables, others, x, training=True)
                return ops.sum(y**3)

            return jax.jit(jax.grad(lambda x: ops.sum(jax.grad(output)(x) ** 2)))(X)
        import torch

        x = torch.tensor(X, requires_grad=True)
        (first,) = torch.autograd.grad((layer(x, training=True) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    near(penalty(BatchNormalization), as_numpy(penalty(THEIRS)), 1e-4)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.bool_])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_integers(kind, training):
    x = np.random.default_rng(4).integers(0, 2, (8, 4)).astype(kind)
    ours, theirs = (built(each, x.shape) for each in (BatchNormalization, THEIRS))
    y = call(ours, x, training=training)
    assert y.dtype == np.float32
    near(y, call(theirs, x, training=training))
    near(values(ours), values(theirs))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("policy", "variables"),
    [
        ("float32", "float32"),
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_policies(policy, variables, training):
    layer = built(BatchNormalization, dtype=policy, momentum=0.0, activation="silu")
    assert {variable.dtype for variable in layer.weights} == {variables}
    before = {name: each.astype(np.float64) for name, each in values(layer).items()}
    x, residual = (as_numpy(ops.cast(each, layer.compute_dtype)) for each in (X, DY))
    y = call(layer, x, training=training, residual=residual)
    given = None if training else (before["moving_mean"], before["moving_variance"])
    options = {"eps": EPS, "activation": "silu", "residual": residual, "given": given}
    wanted = truth.batch_norm(x, before["gamma"], before["beta"], **options)
    assert str(y.dtype) == layer.compute_dtype
    near(y, wanted.y, ROUNDING[y.dtype])
    moved = values(layer)
    near(moved["moving_mean"], wanted.mean, ROUNDING[moved["moving_mean"].dtype])
    near(moved["moving_variance"], wanted.var, ROUNDING[moved["moving_variance"].dtype])


def test_float64():
    def check():
        layer = built(BatchNormalization, dtype="float64", momentum=0.0)
        x = X.astype(np.float64) + 1e6
        y = call(layer, x)
        assert y.dtype == values(layer)["moving_mean"].dtype == np.float64
        before = values(built(THEIRS, dtype="float64"))
        wanted = truth.batch_norm(x, before["gamma"], before["beta"], eps=EPS)
        close(y, wanted.y, 0, 1e-9)
        close(values(layer)["moving_variance"], wanted.var, 1e-9, 0)
        y = call(built(BatchNormalization, autocast=False), x)
        assert y.dtype == np.float32
        close(y, wanted.y, 0, 1e-5)

    if BACKEND == "jax":
        import jax

        enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
        with enable_x64(True):
            check()
    else:
        check()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_accurate_with_a_large_mean(masked):
    x = LARGE_MEAN.x(1000, 8).reshape(100, 10, 8)
    mask = np.arange(10) < np.arange(1, 101)[:, None] if masked else None
    layer = BatchNormalization(momentum=0.0, epsilon=1e-5)
    y = call(layer, x, mask=mask)
    wanted = truth.batch_norm(x, mask=None if mask is None else mask[..., None])
    close(y, wanted.y, rtol=0, atol=1e-3)
    close(values(layer)["moving_variance"], wanted.var, rtol=1e-3, atol=0)
    close(values(layer)["moving_mean"], wanted.mean, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (0, 5, 4), (8, 0, 4)])
def test_an_empty_batch_changes_nothing(shape):
    layer = built(BatchNormalization, shape)
    before = values(layer)
    assert call(layer, np.zeros(shape, np.float32)).shape == shape
    same(values(layer), before)


def test_one_value_of_each_feature():
    layer = built(BatchNormalization, momentum=0.0)
    beta = values(layer)["beta"]
    near(call(layer, X[:1, :1]), np.broadcast_to(beta, (1, 1, 4)))
    near(values(layer)["moving_mean"], X[0, 0])
    same(values(layer)["moving_variance"], np.zeros(4, np.float32))


# ---- training or not


def test_without_training_there_is_evaluation():
    layer = built(BatchNormalization)
    before = values(layer)
    wanted = call(layer, X, training=False)
    same(as_numpy(layer(X)), wanted)
    near(wanted, call(built(THEIRS), X, training=False))
    same(values(layer), before)


def test_a_layer_that_is_not_trainable_is_in_inference():
    layer = built(BatchNormalization, activation="relu")
    layer.trainable = False
    before = values(layer)
    same(call(layer, X, residual=DY), call(layer, X, training=False, residual=DY))
    same(values(layer), before)
    layer.trainable = True
    call(layer, X)
    assert not np.array_equal(values(layer)["moving_mean"], before["moving_mean"])


def test_a_model_hands_on_whether_it_trains():
    model = keras.Sequential([keras.Input((5, 4)), BatchNormalization(momentum=0.0)])
    model(X)
    same(values(model.layers[0])["moving_mean"], np.zeros(4, np.float32))
    model(X, training=True)
    near(values(model.layers[0])["moving_mean"], X.mean((0, 1)))


# ---- masks


@pytest.mark.parametrize("weigh", [False, True], ids=["bools", "weights"])
@pytest.mark.parametrize("renorm", [False, True])
def test_what_is_masked_is_not_looked_at(weigh, renorm):
    mask = KEPT * DY[..., 0] ** 2 if weigh else KEPT
    layer = built(BatchNormalization, momentum=0.0, renorm=renorm)
    before = values(layer)
    y, gradients = call(layer, np.where(KEPT[..., None], X, np.nan), DY, mask=mask)
    wanted = truth.batch_norm(X, before["gamma"], before["beta"], eps=EPS, mask=mask[..., None])
    near(values(layer)["moving_mean"], wanted.mean)
    near(values(layer)["moving_variance"], wanted.var)
    assert np.isfinite(gradients["gamma"]).all()
    assert (np.isfinite(y) == KEPT[..., None]).all()
    if not renorm:
        near(y[KEPT], wanted.y[KEPT])


@pytest.mark.parametrize("renorm", [False, True])
def test_a_mask_that_is_nowhere_true_changes_nothing(renorm):
    layer = built(BatchNormalization, renorm=renorm)
    call(layer, X)
    before = values(layer)
    assert np.isfinite(call(layer, X, mask=np.zeros_like(KEPT))).all()
    near(values(layer), before, 1e-6)


@pytest.mark.parametrize("x", [X, X[:0]], ids=["masked", "empty"])
def test_renorm_of_nothing_changes_nothing_at_the_start(x):
    layer = BatchNormalization(renorm=True)
    call(layer, x, mask=np.zeros(x.shape[:2], bool))
    same(values(layer)["moving_variance"], np.ones(4, np.float32))


def test_a_mask_on_one_feature():
    layer = BatchNormalization(momentum=0.0)
    call(layer, X[..., :1], mask=KEPT)
    near(values(layer)["moving_mean"], X[KEPT][:, :1].mean(0))


def test_a_mask_of_another_rank_is_refused_by_keras():
    for kind in (BatchNormalization, THEIRS):
        with pytest.raises(ValueError, match="mask provided should be one dimension less"):
            call(kind(), X, mask=KEPT[0])


def padded():
    return np.where(KEPT[..., None], X, np.float32(0))


def functional(*layers):
    inputs = outputs = keras.Input((None, 4))
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def sequential(*layers):
    return keras.Sequential([keras.Input((None, 4)), *layers])


@pytest.mark.parametrize("model_with", [functional, sequential])
def test_the_mask_of_a_masking_layer(model_with):
    layer = BatchNormalization(momentum=0.0)
    pooled = keras.layers.GlobalAveragePooling1D()  # which takes the mask that the layer hands on
    y = as_numpy(model_with(keras.layers.Masking(), layer, pooled)(padded(), training=True))
    wanted = truth.batch_norm(X, eps=EPS, mask=KEPT[..., None])
    near(values(layer)["moving_mean"], wanted.mean)
    near(values(layer)["moving_variance"], wanted.var)
    near(y, np.average(wanted.y, 1, np.broadcast_to(KEPT[..., None], X.shape)))


def test_the_mask_of_a_masking_layer_beside_a_residual():
    layer, inputs = BatchNormalization(momentum=0.0), keras.Input((None, 4))
    outputs = layer(keras.layers.Masking()(inputs), residual=inputs)
    keras.Model(inputs, outputs)(padded(), training=True)
    near(values(layer)["moving_mean"], X[KEPT].mean(0))


# ---- batch renormalization


def renormalized(x, state, clipping, momentum, renorm_momentum, eps=EPS):
    """Algorithm 1 of Ioffe (2017) in float64: y, and the new state; r and d; x̂."""
    x = x.astype(np.float64)
    mean, stddev = x.mean((0, 1)), np.sqrt(x.var((0, 1)) + eps)
    r = stddev / np.maximum(state["renorm_stddev"], np.sqrt(eps))
    d = (mean - state["renorm_mean"]) / np.maximum(state["renorm_stddev"], np.sqrt(eps))
    r = np.clip(r, clipping.get("rmin", 0), clipping.get("rmax", np.inf))
    d = np.clip(d, -clipping.get("dmax", np.inf), clipping.get("dmax", np.inf))
    x_hat = (x - mean) / stddev
    moving_stddev = momentum * state["moving_stddev"] + (1 - momentum) * stddev
    state = {
        **state,
        "moving_mean": momentum * state["moving_mean"] + (1 - momentum) * mean,
        "moving_stddev": moving_stddev,
        "moving_variance": np.maximum(moving_stddev**2 - eps, 0),
        "renorm_mean": renorm_momentum * state["renorm_mean"] + (1 - renorm_momentum) * mean,
        "renorm_stddev": renorm_momentum * state["renorm_stddev"] + (1 - renorm_momentum) * stddev,
    }
    return (x_hat * r + d) * state.get("gamma", 1) + state.get("beta", 0), state, r, d, x_hat


CLIPPINGS = [
    {},
    {"rmax": 1.2},
    {"rmin": 0.9, "rmax": 1.1, "dmax": 0.5},
    {"rmin": 3.0},
    {"dmax": 0.0},
]


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_renorm(clipping, affine):
    keywords = {"renorm": True, "renorm_clipping": clipping, "center": affine, "scale": affine}
    keywords |= {"momentum": 0.9, "renorm_momentum": 0.7}
    ours, theirs = (built(kind, **keywords) for kind in (BatchNormalization, THEIRS))
    state = values(ours)
    for step in range(3):
        x, gamma = X * (1 + step) - step, state.get("gamma", np.ones(4))
        wanted, state, r, d, x_hat = renormalized(x, state, clipping, 0.9, 0.7)
        if step < 2:
            y = call(ours, x)
        else:
            y, gradients = call(ours, x, DY)
            # r and d are constants: the gradient is that of a scale r·gamma.
            near(gradients["x"], truth.batch_norm_gradients(DY, x, r * gamma, eps=EPS)["x"])
            if affine:
                near(gradients["gamma"], (DY * (x_hat * r + d)).sum((0, 1)))
                near(gradients["beta"], DY.sum((0, 1)))
        near(y, wanted)
        near(values(ours), state)
        near(y, call(theirs, x), 2e-5)
    near(values(ours), values(theirs), 2e-5)
    near(call(ours, X, training=False), call(theirs, X, training=False), 2e-5)


def test_renorm_with_a_deviation_that_has_vanished():
    layer = built(BatchNormalization, renorm=True)
    layer.renorm_stddev.assign(np.zeros(4))
    wanted, *_ = renormalized(X, values(layer), {}, 0.99, 0.99)
    near(call(layer, X), wanted)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_renorm_in_half_precision(policy):
    layer = built(BatchNormalization, renorm=True, dtype=policy)
    x = as_numpy(ops.cast(X, layer.compute_dtype))
    wanted, state, *_ = renormalized(x, values(layer), {}, 0.99, 0.99)
    y = call(layer, x)
    near(y, wanted, ROUNDING[y.dtype])
    near(values(layer), state)


# ---- what is refused


@pytest.mark.parametrize(
    ("keywords", "arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, {}, ValueError, "epsilon must be positive"),
        ({"epsilon": float("nan")}, {}, ValueError, "epsilon must be positive and finite"),
        ({"momentum": 1.5}, {}, ValueError, r"momentum must be within \[0, 1\], but got 1.5"),
        ({"momentum": -0.1}, {"training": False}, ValueError, r"momentum must be within \[0, 1\]"),
        ({}, {"mask": np.ones((8, 3), bool)}, ValueError, r"mask must broadcast to the shape"),
        ({}, {"mask": KEPT.astype(np.complex64)}, TypeError, "mask must be an array of real"),
        ({}, {"residual": X[:, :3]}, ValueError, "residual must broadcast to the shape"),
        ({}, {"residual": X[None]}, ValueError, "residual must broadcast to the shape"),
        ({}, {"residual": X.astype(np.complex64)}, TypeError, "residual must be an array of real"),
        ({}, {"inputs": X.astype(np.complex64)}, TypeError, "inputs must be an array of real"),
        ({"renorm": True, "renorm_momentum": 1.5}, {}, ValueError, r"renorm_momentum must be with"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_has_changed(keywords, arguments, error, message):
    layer = built(BatchNormalization, **keywords)
    before = values(layer)
    with pytest.raises(error) as raised:
        layer(**{"inputs": X, "training": True, **arguments})
    same(values(layer), before)
    raised.match(message)


@pytest.mark.parametrize("value", ["gelu", keras.activations.relu, True])
def test_an_activation_that_is_not_there(value):
    with pytest.raises(ValueError, match='activation must be None, "relu" or "silu", but got'):
        BatchNormalization(activation=value)


@pytest.mark.parametrize(
    "keywords",
    [
        {"renorm": True, "renorm_clipping": {"rmaximum": 1}},
        {"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}},
        {"renorm": True, "renorm_clipping": {"dmax": -1}},
        {"fused": True},
        {"gamma_initializer": "nowhere"},
    ],
)
def test_what_keras_refuses_is_refused_in_its_words(keywords):
    with pytest.raises(ValueError, match=r".") as theirs:
        THEIRS(name="norm", **keywords)
    with pytest.raises(ValueError, match=r".") as ours:
        BatchNormalization(name="norm", **keywords)
    assert str(ours.value) == str(theirs.value)


# ---- models: files, copies, training


def network(kind=THEIRS, **keywords):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5, 4)),
            keras.layers.Dense(6),
            kind(momentum=0.5, **keywords),
            keras.layers.Activation("relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
            kind(center=False, gamma_regularizer="l2", gamma_constraint="non_neg"),
        ]
    )


def trained(model, steps=2, optimizer="adam", **keywords):
    model.compile(optimizer, "mse", **keywords)
    history = model.fit(X, X[:, 0, :3], batch_size=4, epochs=steps, shuffle=False, verbose=0)
    return history.history["loss"]


def weights(model):
    return [np.array(as_numpy(variable.value)) for variable in model.weights]


RENORM = {"renorm": True, "renorm_clipping": {"rmax": 2.0}}
TRAINERS = {
    "jax": [({}, {"jit_compile": True}), (RENORM, {"steps_per_execution": 2})],
    "torch": [({}, {}), (RENORM, {"run_eagerly": True})],
}[BACKEND]


@arrays_of_keras
@pytest.mark.parametrize(("keywords", "compiling"), TRAINERS)
def test_fit_evaluate_and_predict_as_keras(keywords, compiling):
    ours, theirs = network(BatchNormalization, **keywords), network(**keywords)
    ours.set_weights(weights(theirs))
    losses = [trained(model, 3, "sgd", **compiling) for model in (ours, theirs)]
    near(*map(np.array, losses), 1e-4)
    near(weights(ours), weights(theirs), 1e-4)
    near(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), 1e-4)
    evaluated = [model.evaluate(X, X[:, 0, :3], verbose=0) for model in (ours, theirs)]
    np.testing.assert_allclose(*evaluated, rtol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(policy):
    model = network(BatchNormalization, dtype=policy)
    losses = trained(model, 20)
    assert losses[-1] < losses[0]
    assert all(np.isfinite(each).all() for each in weights(model))


def test_regularizers_and_constraints():
    layer = built(BatchNormalization, gamma_regularizer="l2", beta_regularizer="l1")
    before = values(layer)
    call(layer, X)
    wanted = 0.01 * (before["gamma"] ** 2).sum(), 0.01 * np.abs(before["beta"]).sum()
    close([as_numpy(each) for each in layer.losses], [np.array(each) for each in wanted])
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(gamma_constraint="non_neg")])
    model.compile(keras.optimizers.SGD(100.0), "mse")
    model.fit(X[:, 0], -(X[:, 0] ** 3), verbose=0)
    gamma = values(model.layers[0])["gamma"]
    assert (gamma >= 0).all()
    assert (gamma == 0).any()


@arrays_of_keras
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_weights_in_files_are_read_both_ways(suffix, tmp_path):
    for one, other in ((BatchNormalization, THEIRS), (THEIRS, BatchNormalization)):
        saved, loaded = network(one, renorm=True), network(other, renorm=True)
        saved(X, training=True)
        path = tmp_path / f"{one.__module__}{suffix}"
        saved.save(path) if suffix == ".keras" else saved.save_weights(path)
        loaded.load_weights(path)
        same(weights(loaded), weights(saved))
        near(as_numpy(loaded(X)), as_numpy(saved(X)))


@arrays_of_keras
def test_a_saved_model_goes_on(tmp_path):
    model = network(BatchNormalization)
    trained(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(each) for each in loaded.layers] == [type(each) for each in model.layers]
    for each in (model, loaded):
        each.fit(X, X[:, 0, :3], epochs=2, shuffle=False, verbose=0)
    near(weights(loaded), weights(model))


@arrays_of_keras
@on_jax
def test_a_saved_model_in_a_new_process(tmp_path):
    inputs = keras.Input((None, 4))
    layer = BatchNormalization(activation="silu", synchronized=True, name="norm")
    ours = keras.Model(inputs, layer(keras.layers.Dense(4)(inputs), residual=inputs))
    plain = convert(network())
    ours.save(tmp_path / "ours.keras")
    revert(plain).save(tmp_path / "theirs.keras")
    np.save(tmp_path / "x.npy", X)
    got = fresh(
        f"""
        import json, os, sys
        import keras, numpy as np
        folder = {str(tmp_path)!r}
        x = np.load(folder + "/x.npy")
        theirs = keras.models.load_model(folder + "/theirs.keras")
        assert "batchnorm" not in sys.modules
        import batchnorm.keras
        ours = keras.models.load_model(folder + "/ours.keras")
        layer = ours.get_layer("norm")
        assert type(layer) is batchnorm.keras.BatchNormalization
        assert (layer.activation, layer.synchronized) == ("silu", True)
        print(json.dumps([model.predict(x, verbose=0).tolist() for model in (theirs, ours)]))
        """
    )
    near(np.array(got[0]), plain.predict(X, verbose=0))
    near(np.array(got[1]), ours.predict(X, verbose=0))


@arrays_of_keras
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))],
    ids=["deepcopy", "pickle"],
)
def test_copies(copied):
    model = network(BatchNormalization, activation="relu")
    model(X, training=True)
    other = copied(model)
    assert type(other.layers[1]) is BatchNormalization
    assert other.layers[1].activation == "relu"
    same(weights(other), weights(model))
    before = weights(model)
    other(X, training=True)
    assert not np.array_equal(values(other.layers[1])["moving_mean"], before[4])
    same(weights(model), before)
    layer = copied(model.layers[1])
    same(values(layer), values(model.layers[1]))


def test_a_layer_in_two_places_moves_twice():
    ours, theirs = BatchNormalization(momentum=0.5), THEIRS(momentum=0.5)
    for layer in (ours, theirs):
        inputs = keras.Input((5, 4))
        keras.Model(inputs, layer(layer(inputs) * 2.0))(X, training=True)
    near(values(ours), values(theirs))
    near(values(ours)["moving_mean"], 0.25 * X.mean((0, 1)))


def test_a_subclass_with_a_call_of_its_own():
    class Doubled(BatchNormalization):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training=training)

    near(call(built(Doubled), X), 2 * call(built(THEIRS), X))


def test_inside_of_a_layer_of_ones_own():
    class Block(keras.layers.Layer):
        def __init__(self, kind):
            super().__init__()
            self.dense, self.norm = keras.layers.Dense(4), kind(momentum=0.5)

        def call(self, inputs):
            return self.norm(self.dense(inputs))

    found = []
    for kind in (BatchNormalization, THEIRS):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([Block(kind), keras.layers.Flatten(), keras.layers.Dense(3)])
        losses = trained(model, optimizer="sgd")
        found.append([*map(as_numpy, losses), *weights(model)])
    near(*found, 1e-4)


# ---- devices and processes


@on_jax
def test_stateless_call_leaves_the_layer_as_it_was():
    import jax

    layer = built(BatchNormalization)
    before = values(layer)
    trainable = [each.value for each in layer.trainable_variables]
    others = [each.value for each in layer.non_trainable_variables]

    @jax.jit
    def step(*arguments):
        return layer.stateless_call(*arguments, training=True)

    y, moved = step(trainable, others, X)
    wanted = truth.batch_norm(X, before["gamma"], before["beta"], eps=EPS)
    near(y, wanted.y)
    near(moved[0], 0.99 * before["moving_mean"] + 0.01 * wanted.mean)
    near(moved[1], 0.99 * before["moving_variance"] + 0.01 * wanted.var)
    same(values(layer), before)


@on_jax
def test_a_batch_over_devices_is_one_batch():
    got = fresh(
        """
        import json
        import keras, numpy as np
        from batchnorm.keras import BatchNormalization

        devices = keras.distribution.list_devices()
        assert len(devices) == 4
        layouts = keras.distribution.LayoutMap(
            keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        )
        layouts["dense/kernel"] = (None, "model")
        layouts["norm/(gamma|beta|moving.*)"] = ("model",)
        found = []
        for distribution in (
            keras.distribution.DataParallel(),
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
        ):
            keras.distribution.set_distribution(distribution)
            layer = BatchNormalization(momentum=0.0, name="norm")
            dense = keras.layers.Dense(4, kernel_initializer="identity", name="dense")
            model = keras.Sequential([keras.Input((4,)), dense, layer])
            model.compile(keras.optimizers.SGD(0.0), "mse")
            x = np.arange(64, dtype=np.float32).reshape(16, 4) ** 2 / 100
            loss = model.fit(x, x, batch_size=16, verbose=0).history["loss"][0]
            moved = [np.array(each).tolist() for each in layer.non_trainable_variables]
            found.append([loss, moved])
        print(json.dumps(found))
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    x = np.arange(64.0).reshape(16, 4) ** 2 / 100
    wanted = truth.batch_norm(x, eps=EPS)
    for loss, moved in got:
        near(np.array(moved), np.array([wanted.mean, wanted.var]))
        np.testing.assert_allclose(loss, ((wanted.y - x) ** 2).mean(), rtol=1e-5)


@on_torch
def test_synchronized_processes_share_their_statistics(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [each.communicate(timeout=100)[0] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert [each.returncode for each in started] == [0, 0], outputs
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    before = values(built(BatchNormalization))
    arguments = X, before["gamma"], before["beta"]
    wanted = truth.batch_norm(*arguments, eps=EPS)
    near(np.concatenate([each["y"] for each in parts]), wanted.y)
    gradients = truth.batch_norm_gradients(DY, *arguments, eps=EPS)
    near(np.concatenate([each["x"] for each in parts]), gradients["x"])
    near(sum(each["gamma"] for each in parts), gradients["scale"])
    renormed, *_ = renormalized(X, values(built(BatchNormalization, renorm=True)), {}, 0.99, 0.99)
    near(np.concatenate([each["renormed"] for each in parts]), renormed)
    for rank, each in enumerate(parts):
        near(each["mean"], wanted.mean)
        near(each["var"], wanted.var)
        near(each["own mean"], (X[:3], X[3:])[rank].mean((0, 1)))


def process(folder, rank):
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, None)
    layer = built(BatchNormalization, synchronized=True, momentum=0.0)
    y, gradients = call(layer, X[part], DY[part])
    own = built(BatchNormalization, momentum=0.0)
    call(own, X[part])
    renormed = built(BatchNormalization, synchronized=True, renorm=True)
    np.savez(
        f"{folder}/{rank}.npz",
        y=y,
        **gradients,
        mean=values(layer)["moving_mean"],
        var=values(layer)["moving_variance"],
        renormed=call(renormed, X[part]),
        **{"own mean": values(own)["moving_mean"]},
    )
    dist.barrier()
    dist.destroy_process_group()


def test_synchronized_changes_nothing_in_one_process():
    layer = built(BatchNormalization, synchronized=True)
    near(call(layer, X, DY), call(built(THEIRS), X, DY))


@on_jax
def test_with_the_backend_torch():
    """Everything in this file, once more."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@on_jax
def test_with_another_backend_keras_own_layer_serves():
    got = fresh(
        """
        import json
        import keras, numpy as np
        from batchnorm.keras import BatchNormalization
        x = np.arange(12, dtype=np.float32).reshape(4, 3) ** 2
        found = []
        for kind in (BatchNormalization, keras.layers.BatchNormalization):
            layer = kind(momentum=0.5)
            y = layer(x, training=True)
            found.append([y.tolist(), np.array(layer.moving_variance).tolist()])
        messages = []
        for keywords, arguments in (({"activation": "relu"}, {}), ({}, {"residual": x})):
            try:
                BatchNormalization(**keywords)(x, **arguments)
            except ValueError as error:
                messages.append(str(error))
        try:
            BatchNormalization(synchronized=True)
        except ValueError as error:
            messages.append(str(error))
        print(json.dumps([found, messages]))
        """,
        backend="numpy",
    )
    (ours, theirs), messages = got
    assert ours == theirs
    of_activation, of_residual, of_synchronized = messages
    assert "activation must be None with Keras' backend 'numpy'" in of_activation
    assert "residual must be None with Keras' backend 'numpy'" in of_residual
    assert "only supported with the TensorFlow backend" in of_synchronized


# ---- convert and revert


def nested():
    inner = keras.Sequential([keras.Input((5, 4)), THEIRS(name="a"), keras.layers.Dense(4)])
    inputs = keras.Input((5, 4))
    middle = keras.Model(inputs, THEIRS(name="b", axis=1)(inner(inputs)))
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, THEIRS(name="c", renorm=True)(middle(inputs) + inputs))


def shared():
    layer, inputs = THEIRS(momentum=0.5), keras.Input((5, 4))
    return keras.Model(inputs, layer(keras.layers.Dense(4)(layer(inputs))))


def called_first():
    model = keras.Sequential([keras.layers.Dense(4), THEIRS()])
    model(X)
    return model


def with_a_mask():
    return keras.Sequential([keras.Input((5, 4)), keras.layers.Masking(), THEIRS(momentum=0.5)])


def always_training():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, THEIRS(momentum=0.5)(inputs, training=True))


def norms(model):
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += norms(layer)
        elif isinstance(layer, THEIRS):
            found.append(layer)
    return found


@pytest.mark.parametrize(
    "make",
    [network, nested, shared, called_first, with_a_mask, always_training],
    ids=lambda each: each.__name__,
)
def test_convert_and_revert(make):
    theirs = make()
    for variable in theirs.weights:
        variable.assign(np.random.default_rng(5).uniform(0.5, 2, variable.shape))
    before = weights(theirs)
    ours = convert(theirs)
    back = revert(ours)
    assert {type(each) for each in norms(ours)} == {BatchNormalization}
    assert {type(each) for each in norms(back)} == {THEIRS}
    for model in (ours, back):
        assert [each.get_config() for each in norms(model)] == [
            each.get_config() for each in norms(theirs)
        ]
        same(weights(model), before)
    same(weights(theirs), before)
    for training in (True, False):
        wanted = as_numpy(theirs(X, training=training))
        near(as_numpy(ours(X, training=training)), wanted, 1e-4)
        same(as_numpy(back(X, training=training)), wanted)
    near(weights(ours), weights(theirs), 1e-4)


def test_a_shared_layer_stays_one():
    assert len(norms(convert(shared()))) == 1
    assert len(weights(convert(shared()))) == 6


def test_calls_keep_their_arguments():
    inputs, mask = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    model = convert(keras.Model([inputs, mask], THEIRS(momentum=0.0)(inputs, mask=mask)))
    model([X, KEPT], training=True)
    near(values(norms(model)[0])["moving_mean"], X[KEPT].mean(0))
    residual = keras.Model(inputs, BatchNormalization(activation="relu")(inputs, residual=inputs))
    same(as_numpy(convert(residual)(X)), as_numpy(residual(X)))


def test_what_is_ours_already_is_kept():
    class Mine(BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), Mine(activation="silu"), THEIRS()])
    assert [type(each) for each in convert(model).layers] == [Mine, BatchNormalization]
    assert convert(model).layers[0].activation == "silu"


def test_trainable_flags_stay():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), THEIRS(name="a")])
    inner.trainable = False
    inputs = keras.Input((4,))
    frozen = THEIRS(name="b", trainable=False)
    model = keras.Model(inputs, THEIRS(name="c")(frozen(inner(inputs))))
    for other in (convert(model), revert(convert(model))):
        assert [each.trainable for each in norms(other)] == [False, False, True]
        assert [each.path for each in other.trainable_variables] == ["c/gamma", "c/beta"]


def test_a_frozen_functional_model_stays_frozen():
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, THEIRS(name="a")(keras.layers.Dense(4)(inputs)), name="inner")
    inner.trainable = False
    inner.get_layer("a").trainable = True
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    other = convert(model)
    assert other.get_layer("inner").trainable is False
    assert [each.trainable for each in other.variables] == [
        each.trainable for each in model.variables
    ]
    assert not other.get_layer("inner").trainable_variables


def test_a_layer_that_has_adapted_to_data_keeps_what_it_knows():
    adapted = keras.layers.Normalization()
    adapted.adapt(X)
    model = keras.Sequential([keras.Input((5, 4)), adapted, THEIRS()])
    near(as_numpy(convert(model)(X)), as_numpy(model(X)))


@pytest.mark.parametrize("change", [convert, revert])
@pytest.mark.parametrize("loss", ["mse", lambda one, other: ops.mean((one - other) ** 2)])
def test_what_comes_back_is_not_compiled(change, loss):
    model = network(BatchNormalization)
    model.compile("adam", loss)
    assert not change(model).compiled
    assert model.compiled


class Sub(THEIRS):
    pass


class Holder(keras.layers.Layer):
    def __init__(self, kind=THEIRS, name="holder"):
        super().__init__(name=name)
        self.parts = {"norms": [kind(name="hidden")]}

    def get_config(self):
        return {"kind": type(self.parts["norms"][0]), "name": self.name}

    def build(self, shape):
        self.parts["norms"][0].build(shape)

    def call(self, inputs):
        return self.parts["norms"][0](inputs)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Sub(name="mine"), r"^mine is of .*Sub, which can't be replaced"),
        (Holder, r"^hidden is of keras\..*BatchNormalization, within holder of Holder"),
        (lambda: keras.layers.TimeDistributed(THEIRS(name="each")), "^each is of .*TimeDistrib"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(layer, message):
    model = keras.Sequential([keras.Input((5, 4)), layer(), THEIRS()])
    before = weights(model)
    for each in (model, keras.Sequential([keras.Input((5, 4)), model])):
        with pytest.raises(TypeError, match=message):
            convert(each)
    same(weights(model), before)


def test_a_layer_that_holds_one_of_ours_is_converted():
    model = keras.Sequential(
        [keras.Input((5, 4)), keras.layers.TimeDistributed(BatchNormalization()), THEIRS()]
    )
    assert type(convert(model).layers[1]) is BatchNormalization


class SubclassedModel(keras.Model):
    pass


@pytest.mark.parametrize(
    "value", [SubclassedModel(), THEIRS(), "model"], ids=["model", "layer", ""]
)
@pytest.mark.parametrize("change", [convert, revert])
def test_what_can_not_be_cloned_is_refused(change, value):
    with pytest.raises(TypeError, match="model must be a Functional or Sequential one, but got"):
        change(value)


def test_a_mask_that_does_not_fit_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"mask must broadcast to the shape \(8, 5\).*\(8, 4\)"):
        call(BatchNormalization(), X, mask=np.ones((8, 4)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"activation": "relu"}, "^norm has activation='relu'"),
        ({"synchronized": True}, "norm .*synchronized"),
    ],
)
def test_what_keras_has_not_is_not_reverted(keywords, message):
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(name="norm", **keywords)])
    with pytest.raises(ValueError, match=message):
        revert(model)


def test_a_residual_is_not_reverted():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, BatchNormalization(name="norm")(inputs, residual=inputs))
    with pytest.raises(ValueError, match=r"norm .*residual"):
        revert(model)


def test_what_is_hidden_is_not_reverted():
    model = keras.Sequential([keras.Input((5, 4)), Holder(BatchNormalization)])
    with pytest.raises(TypeError, match="hidden"):
        revert(model)


@arrays_of_keras
@on_torch
def test_a_network_of_keras_applications():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
    x = np.random.default_rng(6).normal(size=(4, 32, 32, 3)).astype(np.float32)
    ours = convert(model)
    assert len(norms(ours)) == 52
    near(ours.predict(x, verbose=0), model.predict(x, verbose=0))


if __name__ == "__main__":
    process(sys.argv[1], int(sys.argv[2]))
