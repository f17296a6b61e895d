"""BatchNorm of batchnorm.flax.nnx: in the place of NNX's, what it has beyond, and conversion."""

import copy
import inspect
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import truth
from cases import LARGE_MEAN
from compare import near, same
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_jax_devices import DEVICES, GROUPS, finish, start

from batchnorm.flax.nnx import BatchNorm, convert, revert

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (8, 5, 4)).astype(np.float32)
DY = RANDOM.normal(size=X.shape).astype(np.float32)
MASK = RANDOM.uniform(size=X.shape) < 0.6
WEIGHTS = RANDOM.uniform(0.5, 2, (8, 5, 1)).astype(np.float32) * MASK[..., :1]
RANDOM_INIT = {
    "scale_init": nnx.initializers.uniform(2.0),
    "bias_init": nnx.initializers.normal(0.5),
}
CLASSES = [partial(nnx.BatchNorm, use_fast_variance=False), BatchNorm]
TheirList = getattr(nnx, "List", list)


def needs(argument):
    is_there = argument in inspect.signature(nnx.BatchNorm.__init__).parameters
    return pytest.mark.skipif(not is_there, reason=f"this Flax has no {argument}")


def made(norm=BatchNorm, features=4, **keywords):
    """A layer after some training."""
    random = np.random.default_rng(0)
    layer = norm(features, **{**RANDOM_INIT, **keywords}, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.asarray(random.normal(size=features), jnp.float32)
    layer.var[...] = jnp.asarray(random.uniform(0.5, 2, features), jnp.float32)
    return layer


def values(layer):
    """Of the Variables, by their path."""
    return {path: np.asarray(each[...]) for path, each in nnx.to_flat_state(nnx.state(layer))}


def parameters(layer):
    return [None if each is None else each[...] for each in (layer.scale, layer.bias)]


def averages(old, wanted, momentum=0.99):
    return {
        ("mean",): momentum * np.float64(old["mean",]) + (1 - momentum) * wanted.mean,
        ("var",): momentum * np.float64(old["var",]) + (1 - momentum) * wanted.var,
    }


def moved(layer):
    return {path: each for path, each in values(layer).items() if path[-1] in ("mean", "var")}


def error_of(function, *arguments, **keywords):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*arguments, **keywords)
    return type(caught.value), str(caught.value)


class Network(nnx.Module):
    """Of which two layers are one."""

    def __init__(self, norm, rngs):
        norm = partial(norm, **RANDOM_INIT, momentum=0.75, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norms = TheirList([norm(4), norm(4, use_scale=False)])
        self.shared = self.norms[0]

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.dense(x)))
        return self.shared(self.norms[1](x) * x)


def networks():
    return [Network(norm, nnx.Rngs(0)) for norm in CLASSES]


# ---- what a layer is


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_bias": False},
        {"use_scale": False},
        {"use_bias": False, "use_scale": False},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.float16},
        {"use_running_average": True, "axis": 1, "momentum": 0.9, "epsilon": 1e-3},
        {"use_running_average": None, "axis_name": "nowhere", "axis_index_groups": ((0,),)},
        pytest.param(
            {"scale_metadata": {"tag": "scale"}, "bias_metadata": {"tag": "bias"}},
            marks=needs("scale_metadata"),
        ),
    ],
    ids=str,
)
def test_state_and_attributes_are_those_of_nnx(arguments):
    theirs, ours = (
        norm(4, **RANDOM_INIT, **arguments, rngs=nnx.Rngs(0)) for norm in (nnx.BatchNorm, BatchNorm)
    )
    assert isinstance(ours, nnx.BatchNorm)
    flat = [nnx.to_flat_state(nnx.state(each)) for each in (ours, theirs)]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    for (_, one), (_, other) in zip(*flat, strict=True):
        assert type(one) is type(other)
        assert one.get_metadata() == other.get_metadata()
        same(one[...], other[...])
    attributes = [
        {name: each for name, each in vars(layer).items() if not name.startswith("_")}
        for layer in (ours, theirs)
    ]
    assert attributes[0].pop("activation") is None
    assert list(attributes[0]) == list(attributes[1])
    for name, each in attributes[0].items():
        if not isinstance(each, nnx.Variable):
            assert each == attributes[1][name]


def test_arguments_are_named_as_by_nnx():
    for arguments, keywords in (
        ((4,), {}),
        ((), {"rngs": nnx.Rngs(0)}),
        ((4,), {"rngs": nnx.Rngs(0), "eps": 1e-3}),
    ):
        theirs, ours = (
            error_of(each, *arguments, **keywords) for each in (nnx.BatchNorm, BatchNorm)
        )
        assert ours == theirs
    with pytest.raises(TypeError, match="positional"):
        BatchNorm(4, False, rngs=nnx.Rngs(0))
    theirs, ours = (error_of(made(each, use_running_average=None), X) for each in CLASSES)
    assert ours == theirs


def test_state_is_exchanged_with_nnx():
    theirs, ours = networks()
    theirs(X)
    nnx.update(ours, nnx.state(theirs))
    near(values(ours), values(theirs), 0)
    near(ours(X), theirs(X))
    nnx.update(theirs, nnx.state(ours))
    theirs.eval()
    ours.eval()
    near(theirs(X), ours(X), 1e-4)


# ---- numbers


@pytest.mark.parametrize(
    ("arguments", "mask"),
    [
        ({}, None),
        ({"axis": 1, "features": 5, "epsilon": 1e-2}, MASK),
        ({"use_bias": False, "momentum": 0.0}, MASK[:, :, :1]),
        ({"use_bias": False, "use_scale": False, "momentum": 1.0}, MASK[0, :, :1]),
        ({"use_fast_variance": True, "use_scale": False}, None),
    ],
)
def test_training_is_as_in_nnx_and_in_truth(arguments, mask):
    def gradients(layer, x):
        def loss(layer, x):
            y = layer(x, mask=mask)
            return (y * DY).sum(), y

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    results = []
    for norm in (nnx.BatchNorm, BatchNorm):
        layer = made(norm, **{**arguments, "use_fast_variance": False})
        old = values(layer)
        (of_layer, of_x), y = nnx.jit(gradients)(layer, jnp.asarray(X))
        results.append((y, of_x, values(of_layer), values(layer)))
    near(results[1], results[0])
    y, of_x, of_parameters, new = results[1]

    scale, bias = parameters(layer)
    keywords = {"axis": layer.axis, "eps": layer.epsilon, "mask": mask}
    wanted = truth.batch_norm(X, scale, bias, **keywords)
    near(y, wanted.y)
    near(new, {**old, **averages(old, wanted, layer.momentum)})
    exact = truth.batch_norm_gradients(DY, X, scale, bias, **keywords)
    near(of_x, exact["x"])
    near(of_parameters, {path: exact[path[0]] for path in of_parameters})


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_dtypes_are_those_of_nnx(dtype):
    for arguments in ({}, {"param_dtype": jnp.bfloat16}, {"use_scale": False, "use_bias": False}):
        for of_x in ("float16", "bfloat16", "float32", "int32", "bool"):
            dtypes = []
            for norm in CLASSES:
                layer = norm(4, **arguments, dtype=dtype, rngs=nnx.Rngs(0))
                x = jax.ShapeDtypeStruct(X.shape, of_x)
                for flag in (False, True):
                    y = nnx.eval_shape(partial(layer_call, flag=flag), layer, x)
                    dtypes.append(y.dtype)
            assert dtypes[2:] == dtypes[:2], (arguments, of_x)


def layer_call(layer, x, flag):
    return layer(x, flag)


def test_evaluation_in_half_precision_is_accurate():
    """Running statistics are not rounded: a large mean would not survive it."""
    layer = made(dtype=jnp.bfloat16, use_running_average=True, use_scale=False, use_bias=False)
    x = (100 + np.arange(32).reshape(8, 4) / 2).astype(jnp.bfloat16)
    layer.mean[...] = jnp.full(4, 107.875)
    layer.var[...] = jnp.full(4, 21.3, jnp.float32)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    given = np.full(4, 107.875), np.full(4, np.float32(21.3))
    near(y, truth.batch_norm(x, given=given).y, 2**-8)
    narrow = made(dtype=jnp.bfloat16)
    old = values(narrow)
    narrow(x)
    near(moved(narrow), averages(old, truth.batch_norm(x)), 1e-6)


@needs("promote_dtype")
def test_strict_promotion_of_dtypes():
    x = X.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        theirs, ours = (
            norm(4, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))(x)
            for norm in CLASSES
        )
    near(ours, theirs, 2**-8)


@needs("promote_dtype")
def test_promote_dtype_is_called_as_by_nnx():
    def seen_by(norm):
        seen = []

        def promote(arrays, *, dtype):
            seen.append(
                [each if each is None else (each.shape, str(each.dtype)) for each in arrays]
            )
            seen.append(dtype)
            return tuple(None if each is None else jnp.asarray(each, dtype) for each in arrays)

        layer = made(norm, promote_dtype=promote, use_scale=False, dtype=jnp.float16)
        for flag in (False, True):
            assert layer(X, use_running_average=flag).dtype == jnp.float16
            assert layer.mean.dtype == jnp.float32
        return seen

    assert seen_by(BatchNorm) == seen_by(nnx.BatchNorm) != []


def test_a_large_mean():
    x = LARGE_MEAN.x(2000, 3)
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    near(layer(x), truth.batch_norm(x).y, LARGE_MEAN.tolerance)


def test_integers_and_one_value_of_each_feature():
    x = np.arange(24).reshape(6, 4) ** 2 % 17
    for array in (x, x > 8, x.tolist()):
        near(BatchNorm(4, rngs=nnx.Rngs(0))(array), truth.batch_norm(array).y)
    for x in (jnp.ones((1, 4)), jnp.ones(4)):
        layer = BatchNorm(4, rngs=nnx.Rngs(0))
        near(layer(x), np.zeros(x.shape))
        near(layer.mean[...], np.full(4, 0.01))
        near(layer.var[...], np.full(4, 0.99))


@pytest.mark.parametrize(
    "mask", [MASK, MASK.astype(int), WEIGHTS, WEIGHTS[0], WEIGHTS[0, :, 0, None]]
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_masks_weights_residual_and_activation(mask, activation):
    layer = made(activation=activation)
    old = values(layer)
    y = layer(X, mask=mask, residual=DY)
    wanted = truth.batch_norm(X, *parameters(layer), mask=mask, residual=DY, activation=activation)
    near(y, wanted.y)
    near(moved(layer), averages(old, wanted))
    given = layer.mean[...], layer.var[...]
    wanted = truth.batch_norm(
        X, *parameters(layer), residual=DY[0], activation=activation, given=given
    )
    near(layer(X, True, mask=mask, residual=DY[0]), wanted.y)


def test_a_mask_that_is_nowhere_true_leaves_the_averages():
    layer = made()
    old = values(layer)
    layer(X, mask=np.zeros(X.shape, bool))
    same(values(layer), old)


def test_traced_momentum_and_epsilon():
    @jax.jit
    def step(momentum, epsilon):
        layer = made(momentum=momentum, epsilon=epsilon, use_scale=False, use_bias=False)
        return layer(X), layer.mean[...], layer.var[...]

    old = values(made())
    for momentum, epsilon in ((0.25, 0.5), (0.75, 1e-3)):
        y, mean, var = step(momentum, epsilon)
        wanted = truth.batch_norm(X, eps=epsilon)
        near(y, wanted.y)
        near({("mean",): mean, ("var",): var}, averages(old, wanted, momentum))


# ---- modes, views and copies


def test_modes():
    theirs, ours = networks()
    for model in (theirs, ours):
        model.eval()
        old = values(model)
        model(X)
        same(values(model), old)
    near(ours(X), theirs(X))
    for model in (theirs, ours):
        model.train()
        model(X)
    near(values(ours), values(theirs))
    ours.set_attributes(use_running_average=None)
    old = values(ours)
    ours.norms[0](X, use_running_average=True)
    same(values(ours), old)
    ours.set_attributes(BatchNorm, activation="relu")
    assert ours.shared.activation == "relu"
    assert (ours.shared(X, False) >= 0).all()


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_a_view_has_the_same_variables():
    theirs, ours = networks()
    view = nnx.view(ours, use_running_average=True)
    assert isinstance(view.shared, BatchNorm)
    assert view.shared.mean is ours.shared.mean
    near(view(X), nnx.view(theirs, use_running_average=True)(X))
    assert not ours.shared.use_running_average
    assert nnx.view_info(made()).replace("batchnorm.flax", "flax") == nnx.view_info(
        made(nnx.BatchNorm)
    ).replace("nnx.nn.normalization", "nnx")


COPIES = [copy.deepcopy, nnx.clone, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("copied", COPIES)
def test_copies(copied):
    layer = BatchNorm(4, activation="silu", momentum=0.5, rngs=nnx.Rngs(0))
    old = values(layer)
    other = copied(layer)
    assert type(other) is BatchNorm
    near(other(X), layer(X))
    near(values(other), values(layer))
    other(X)
    assert (values(other)["mean",] != values(layer)["mean",]).all()
    assert (old["mean",] != values(layer)["mean",]).all()


def test_what_is_shown_of_a_layer(capsys):
    layer = made(activation="relu")
    nnx.display(layer)
    assert "activation" in capsys.readouterr().out
    assert "activation='relu'" in repr(layer)
    tables = [nnx.tabulate(each, X, console_kwargs={"width": 150}) for each in networks()]
    assert tables[0] == tables[1]


def test_filters_of_state():
    graphdef, params, stats = nnx.split(Network(BatchNorm, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    names = {path[-1] for path, _ in nnx.to_flat_state(stats)}
    assert names == {"mean", "var"}
    assert {path[-1] for path, _ in nnx.to_flat_state(params)} == {"scale", "bias", "kernel"}
    assert type(nnx.merge(graphdef, params, stats).shared) is BatchNorm


# ---- transformations


def _jit(model, x):
    nnx.jit(lambda model, x: model(x))(model, x)
    return nnx.jit(lambda model, x: model(x))(model, x)


def _value_and_grad(model, x):
    def loss(model):
        return (model(x) ** 3).sum()

    loss, gradients = nnx.value_and_grad(loss)(model)
    return loss / 100, values(gradients)


def _through_averages(model, x):
    def loss(model):
        model(x)
        model.eval()
        y = model(x)
        model.train()
        return (y**2).mean()

    return values(nnx.grad(loss)(model))


def _remat(model, x):
    def loss(model):
        return (nnx.remat(lambda model, x: model(x))(model, x) ** 3).sum()

    return values(nnx.grad(loss)(model))


def _split(model, x):
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    y, state = step(state, x)
    nnx.update(model, state)
    return y


def _cond(model, x):
    def branch(model, x):
        return model(x)

    return nnx.cond(x.sum() > 0, branch, lambda model, x: model(x + 1), model, x)


def _loop(model, x):
    def step(number, carry):
        model, x = carry
        return model, model(x) + number

    return nnx.fori_loop(0, 3, step, (model, x))[1]


@pytest.mark.parametrize(
    "transformed",
    [
        *(_jit, _value_and_grad, _remat, _split, _cond, _loop),
        pytest.param(
            _through_averages,
            marks=pytest.mark.skipif(
                not hasattr(nnx, "view"), reason="this Flax differentiates its averages"
            ),
        ),
    ],
)
def test_transformations(transformed):
    models = networks()
    theirs, ours = (transformed(model, jnp.asarray(X)) for model in models)
    near(ours, theirs, 1e-3)
    near(values(models[1]), values(models[0]), 1e-4)
    assert models[1].shared is models[1].norms[0]
    start = values(Network(BatchNorm, nnx.Rngs(0)))
    assert (values(models[1])["norms", 1, "var"] != start["norms", 1, "var"]).any()


def _vmapped_states(norm):
    """Of one layer, for each example averages of its own."""
    layer = made(norm, momentum=0.5)
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: 0})
    for name in ("mean", "var"):
        one = getattr(layer, name)[...]
        setattr(layer, name, nnx.BatchStat(jnp.broadcast_to(one, (8, 4))))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0))(layer, X)
    return y, values(layer)


def _vmapped_layers(norm):
    @nnx.vmap
    def create(key):
        return norm(4, **RANDOM_INIT, rngs=nnx.Rngs(key))

    layers = create(jax.random.split(jax.random.key(0), 8))
    return nnx.vmap(lambda layer, x: layer(x))(layers, X), values(layers)


def _scanned(norm):
    @nnx.vmap
    def create(key):
        return norm(4, **RANDOM_INIT, rngs=nnx.Rngs(key))

    layers = create(jax.random.split(jax.random.key(0), 3))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return nnx.relu(layer(x) * x)

    return forward(jnp.asarray(X), layers), values(layers)


def _mapped_batch(norm):
    layer = made(norm, axis_name="batch")
    axes = nnx.StateAxes({...: None})
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="batch")
    return mapped(layer, X), values(layer)


@pytest.mark.parametrize("mapped", [_vmapped_states, _vmapped_layers, _scanned, _mapped_batch])
def test_mapped_layers(mapped):
    theirs, ours = map(mapped, CLASSES)
    near(ours, theirs, 1e-4)


def test_a_mapped_batch_is_one_batch():
    y, new = _mapped_batch(BatchNorm)
    layer = made()
    wanted = truth.batch_norm(X, *parameters(layer))
    near(y, wanted.y)
    near(new, {**values(layer), **averages(values(layer), wanted)})


def test_an_optimizer_moves_the_parameters():
    results = []
    for model in networks():
        optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return ((model(X) - DY) ** 2).mean()

            gradients = nnx.grad(loss)(model)
            optimizer.update(model, gradients)

        for _ in range(3):
            step(model, optimizer)
        model.eval()
        results.append((values(model), model(X)))
    near(results[1], results[0], 1e-3)


def test_a_layer_within_linen():
    layer = nnx.bridge.to_linen(BatchNorm, 4, momentum=0.75)
    variables = layer.init(jax.random.key(0), X)
    y, updates = layer.apply(variables, X, mutable=["batch_stats"])
    near(y, truth.batch_norm(X).y)
    near(updates["batch_stats"]["mean"], X.mean((0, 1)) / 4)


# ---- conversion


def _model(norm=nnx.BatchNorm):
    return Network(norm, nnx.Rngs(0))


def test_conversion_keeps_objects_and_variables():
    model = _model()
    theirs = _model()
    layers = [*model.norms]
    variables = [layer.mean for layer in layers] + [layer.bias for layer in layers]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    assert convert(model) is model
    assert [*model.norms] == layers
    assert all(one is other for one, other in zip(model.norms, layers, strict=True))
    assert all(type(each) is BatchNorm and each.activation is None for each in layers)
    assert model.shared is layers[0]
    kept = [layer.mean for layer in layers] + [layer.bias for layer in layers]
    assert all(one is other for one, other in zip(kept, variables, strict=True))
    assert type(model.dense) is nnx.Linear
    near(model(X), theirs(X), 1e-4)
    near(values(model), values(theirs), 1e-4)

    gradients = nnx.grad(lambda model: (model(X) ** 3).sum())(model)
    old = values(model)
    optimizer.update(model, gradients)
    assert (values(model)["norms", 0, "scale"] != old["norms", 0, "scale"]).any()


def test_a_converted_model_is_as_one_that_was_built():
    """Such that the two have one treedef, say in `jax.tree.map`, and one compiled function."""
    model = convert(_model())
    built = Network(BatchNorm, nnx.Rngs(0))
    assert nnx.split(model)[0] == nnx.split(built)[0]


def test_reverting_undoes_a_conversion():
    model = convert(_model())
    layers = [*model.norms]
    assert revert(model) is model
    assert all(type(each) is nnx.BatchNorm for each in layers)
    assert model.shared is model.norms[0] is layers[0]
    assert not hasattr(layers[0], "activation")
    near(model(X), _model()(X))
    assert nnx.split(model)[0] == nnx.split(_model())[0]
    assert type(revert(made())) is nnx.BatchNorm


def test_converting_twice_keeps_the_activation():
    model = nnx.Sequential(made(activation="relu"), made(nnx.BatchNorm))
    convert(convert(model))
    assert [each.activation for each in model.layers] == ["relu", None]


@pytest.mark.parametrize("momentum", [0.75, np.float32(0.75), 0, 1])
def test_conversion_sets_what_is_given(momentum):
    model = convert(_model(), axis_name="i", axis_index_groups=[[0, 1]], momentum=momentum)
    for layer in model.norms:
        assert layer.axis_name == "i"
        assert layer.axis_index_groups == [[0, 1]]
        assert layer.momentum == momentum
    convert(model, axis_name=None)
    assert model.shared.axis_name is None
    assert model.shared.axis_index_groups == [[0, 1]]


def test_conversion_sets_a_momentum_that_is_an_array():
    model = convert(_model(), momentum=jnp.float32(0.75))
    old = values(model.shared)
    model.shared(X)
    near(moved(model.shared), averages(old, truth.batch_norm(X), 0.75))


@pytest.mark.parametrize("momentum", [1.5, "0.9", None])
def test_a_wrong_momentum_changes_nothing(momentum):
    model = _model()
    with pytest.raises((TypeError, ValueError), match="momentum must be"):
        convert(model, momentum=momentum, axis_name="i")
    assert type(model.shared) is nnx.BatchNorm
    assert model.shared.axis_name is None


def test_conversion_of_containers_and_of_a_layer():
    layer = made(nnx.BatchNorm)
    assert convert(layer) is layer
    assert type(layer) is BatchNorm
    for several in ([_model(), made(nnx.BatchNorm)], {"a": _model(), "b": made(nnx.BatchNorm)}):
        assert convert(several) is several
        model, layer = several.values() if isinstance(several, dict) else several
        assert type(model.shared) is type(layer) is BatchNorm
    assert convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0))).use_bias


def test_conversion_of_an_abstract_model():
    model = convert(nnx.eval_shape(_model))
    assert type(model.shared) is BatchNorm
    graphdef, _ = nnx.split(model)
    near(nnx.merge(graphdef, nnx.state(_model()))(X), _model()(X), 1e-4)


class Theirs(nnx.BatchNorm):
    pass


class Ours(BatchNorm):
    def __init__(self, features, *, rngs):
        super().__init__(features, rngs=rngs)
        self.before = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.before(x) ** 2)


def test_a_subclass_is_refused_by_name():
    model = nnx.Sequential(made(nnx.BatchNorm), nnx.Sequential(made(Theirs)))
    with pytest.raises(TypeError, match=r"layers\.1\.layers\.0 is of test_nnx\.Theirs"):
        convert(model, momentum=0.5)
    assert type(model.layers[0]) is nnx.BatchNorm
    assert model.layers[0].momentum == 0.99
    with pytest.raises(TypeError, match=r"the model is of test_nnx\.Theirs"):
        convert(made(Theirs))


def test_subclasses_of_ours_stay():
    layer = Ours(4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer)
    convert(model, momentum=0.5)
    assert model.layers[0] is layer
    assert type(layer) is Ours
    assert type(layer.before) is BatchNorm
    assert layer.momentum == layer.before.momentum == 0.5
    near(layer(X), truth.batch_norm(truth.batch_norm(X).y ** 2).y)
    with pytest.raises(TypeError, match=r"^layers.0 is of test_nnx.Ours, a subclass of batchnorm"):
        revert(model)
    assert type(layer.before) is BatchNorm
    revert(layer.before)
    assert type(layer.before) is nnx.BatchNorm


def test_layers_within_a_layer_are_converted():
    layer = convert(Ours(4, rngs=nnx.Rngs(0)))
    assert type(layer.before) is BatchNorm


def test_an_activation_cannot_be_reverted():
    model = nnx.Sequential(made(), made(activation="silu"))
    with pytest.raises(ValueError, match=r"layers\.1 has activation='silu'.*flax\.nnx\.silu"):
        revert(model)
    assert all(type(each) is BatchNorm for each in model.layers)
    with pytest.raises(ValueError, match="the model has activation"):
        revert(made(activation="relu"))


def test_conversion_keeps_metadata():
    init = nnx.with_metadata(nnx.initializers.ones, tag="kept")
    model = convert(nnx.Sequential(made(nnx.BatchNorm, scale_init=init)))
    assert model.layers[0].scale.get_metadata()["tag"] == "kept"


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_what_was_converted(copied):
    model = copied(convert(nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))))
    assert type(model.layers[0]) is BatchNorm
    near(model(X), truth.batch_norm(X).y)
    near(model.layers[0].mean[...], X.mean((0, 1)) / 100)


# ---- wrong arguments


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (TypeError, "x must be .*complex64", {}, {"x": X + 1j}),
        (TypeError, "x must be an array", {}, {"x": None}),
        (ValueError, r"x must have num_features=4 channels, but it has 2", {}, {"x": X[..., :2]}),
        (ValueError, "x must have num_features=1 channels", {"features": 1}, {}),
        (ValueError, r"axis must be within \[-3, 2\]", {"axis": 3}, {}),
        (ValueError, "momentum must be within", {"momentum": 1.5}, {}),
        (TypeError, "momentum must be a number", {"momentum": None}, {}),
        (ValueError, "epsilon must be positive", {"epsilon": 0.0}, {}),
        (ValueError, "mask must broadcast", {}, {"mask": MASK[:3]}),
        (ValueError, "residual must broadcast", {}, {"residual": X[:3]}),
        (TypeError, "residual must be", {}, {"residual": X + 1j}),
        (NameError, "nowhere", {"axis_name": "nowhere"}, {}),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_change_nothing(error, message, arguments, keywords):
    layer = made(**arguments)
    old = values(layer)
    with pytest.raises(error, match=message):
        layer(**{"x": X, **keywords})
    same(values(layer), old)


def test_a_wrong_activation_is_refused_at_once():
    with pytest.raises(ValueError, match="activation must be"):
        made(activation="gelu")


# ---- several devices, in a process of its own


def in_mapped_functions() -> None:
    x = np.random.default_rng(0).normal(3, 2, (DEVICES, 6, 4)).astype(np.float32)
    x += np.arange(DEVICES, dtype=np.float32)[:, None, None]
    mask = np.random.default_rng(1).uniform(size=(DEVICES, 6, 1)) < 0.6
    mask[3] = False
    layer = made(axis_name="i")
    old, params = values(layer), parameters(layer)
    mesh = Mesh(np.array(jax.devices()), "i")

    def stepped(layer, x, mask):
        return layer(x, mask=mask)

    def in_a_copy(layer, x):
        return nnx.clone(layer)(x)

    axes = nnx.StateAxes({...: None})
    mapped = nnx.pmap(stepped, in_axes=(axes, 0, 0), axis_name="i")
    wanted = truth.batch_norm(x, *params, mask=mask)
    near(mapped(layer, x, mask), wanted.y)
    near(moved(layer), averages(old, wanted))

    layer = made(axis_name="i")
    specs = {"in_specs": (nnx.StateSharding({...: P()}), P("i"), P("i")), "out_specs": P("i")}
    mapped = nnx.jit(nnx.shard_map(stepped, mesh=mesh, **specs))
    near(mapped(layer, x, mask), wanted.y)
    near(moved(layer), averages(old, wanted))

    layer = convert(made(nnx.BatchNorm), axis_name="i", axis_index_groups=GROUPS)
    y = nnx.pmap(in_a_copy, in_axes=(axes, 0), axis_name="i")(layer, x)
    for group in map(np.array, GROUPS):
        near(y[group], truth.batch_norm(x[group], *params).y)

    layer = made(nnx.BatchNorm)
    by_features = NamedSharding(mesh, P("i"))
    for each in (layer.mean, layer.var, layer.scale, layer.bias):
        each[...] = jax.device_put(each[...], by_features)
    convert(layer)
    assert layer.mean[...].sharding == layer.scale[...].sharding == by_features
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, None, "i")))
    y = nnx.jit(lambda layer, x: layer(x))(layer, sharded)
    wanted = truth.batch_norm(x, *params)
    near(y, wanted.y)
    near(moved(layer), averages(old, wanted))
    assert y.sharding.is_equivalent_to(sharded.sharding, x.ndim)


def test_several_devices():
    finish(start("in_mapped_functions", module="test_nnx", quickly_compiled=True))


def test_the_arguments_are_shown():
    theirs = inspect.signature(nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(BatchNorm.__init__).parameters
    assert [*ours] == [*theirs, "activation"]
    assert all(ours[name] == theirs[name] for name in theirs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"momentum": 2.0}, ValueError, r"momentum must be within \[0, 1\]"),
        ({"momentum": jnp.ones(3)}, ValueError, "momentum must be a number or an array without"),
        ({"momentum": "fast"}, TypeError, "momentum must be a number"),
        ({"axis_index_groups": [[0]]}, ValueError, "axis_index_groups needs an axis_name"),
    ],
)
def test_settings_that_convert_refuses(settings, error, message):
    model = [nnx.BatchNorm(4, rngs=nnx.Rngs(0))]
    with pytest.raises(error, match=message):
        convert(model, **settings)
    assert type(model[0]) is nnx.BatchNorm


def test_groups_may_go_with_an_axis_that_a_layer_has():
    layer = convert(nnx.BatchNorm(4, axis_name="i", rngs=nnx.Rngs(0)), axis_index_groups=[[0, 1]])
    assert (layer.axis_name, layer.axis_index_groups) == ("i", [[0, 1]])


def test_a_momentum_of_numpys_is_a_number():
    assert convert(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), momentum=np.array(0.5)).momentum == 0.5
