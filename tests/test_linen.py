"""BatchNorm of batchnorm.flax.linen: in the place of Linen's, and what it has beyond that."""

import dataclasses
import pickle
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import truth
from cases import LARGE_MEAN
from compare import near, same
from flax import nnx, serialization, traverse_util
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_jax_devices import DEVICES, GROUPS, finish, start

from batchnorm.flax.linen import BatchNorm

KEY = jax.random.PRNGKey(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (8, 5, 4)).astype(np.float32)
DY = RANDOM.normal(size=X.shape).astype(np.float32)
MASK = RANDOM.uniform(size=X.shape) < 0.6
WEIGHTS = RANDOM.uniform(0.5, 2, (8, 5, 1)).astype(np.float32) * MASK[..., :1]
TRAINING = {"use_running_average": False}
RANDOM_INIT = {"scale_init": nn.initializers.uniform(2.0), "bias_init": nn.initializers.normal(0.5)}
Linens = partial(nn.BatchNorm, use_fast_variance=False)


def variables_of(layer, x=X, seed=0):
    """Those of a layer after some training."""
    random = np.random.default_rng(seed)
    variables = layer.init(KEY, x)
    moved = {
        "mean": lambda shape: random.normal(size=shape),
        "var": lambda shape: random.uniform(0.5, 2, shape),
    }
    stats = {
        path: moved[path[-1]](each.shape).astype(each.dtype)
        for path, each in traverse_util.flatten_dict(variables["batch_stats"]).items()
    }
    return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}


def trained(layer, variables, x=X, dy=DY, **keywords):
    """y, the averages then, and gradients of sum(y * dy)."""
    stats = variables["batch_stats"]

    def loss(params, x):
        given = {"params": params, "batch_stats": stats}
        y, updates = layer.apply(given, x, mutable=["batch_stats"], **keywords)
        return (y * dy).sum(), (y, updates["batch_stats"])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, (y, stats) = gradient(variables.get("params", {}), x)
    return {"y": y, "stats": stats, "params": gradients[0], "x": gradients[1]}


def averages(old, wanted, momentum=0.99):
    old = {name: np.float64(each) for name, each in old.items()}
    return {
        "mean": momentum * old["mean"] + (1 - momentum) * wanted.mean,
        "var": momentum * old["var"] + (1 - momentum) * wanted.var,
    }


def error_of(function, *arguments, **keywords):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*arguments, **keywords)
    return type(caught.value), str(caught.value)


class Network(nn.Module):
    """Two layers, with the names that Linen gives."""

    norm: type[nn.Module] | partial

    @nn.compact
    def __call__(self, x):
        x = self.norm(use_running_average=False)(nn.Dense(4)(x))
        return self.norm(use_running_average=False)(nn.relu(x))


# ---- what a layer is


def test_a_layer_is_one_of_linen():
    assert isinstance(BatchNorm(), nn.BatchNorm)
    ours = {each.name: each.default for each in dataclasses.fields(BatchNorm)}
    assert ours.pop("activation") is None
    theirs = {each.name: each.default for each in dataclasses.fields(nn.BatchNorm)}
    assert list(ours.items()) == list(theirs.items())
    assert BatchNorm(False, 1, 0.9).momentum == 0.9
    assert BatchNorm(momentum=0.5).clone(axis=1) == BatchNorm(momentum=0.5, axis=1)
    assert hash(BatchNorm(axis=1)) == hash(BatchNorm(axis=1)) != hash(BatchNorm(axis=2))
    assert pickle.loads(pickle.dumps(BatchNorm(activation="relu"))) == BatchNorm(activation="relu")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"axis": 1},
        {"axis": (2, 1)},
        {"axis": [-1, 0]},
        {"use_bias": False},
        {"use_scale": False},
        {"use_bias": False, "use_scale": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16},
        {"param_dtype": "bfloat16", "dtype": "float32"},
        {"param_dtype": jnp.bfloat16, "force_float32_reductions": False},
        {"axis_name": "nowhere", "axis_index_groups": [[0]]},
    ],
    ids=str,
)
def test_variables_are_those_of_linen(arguments):
    for x in (X, jnp.ones_like(X, jnp.bfloat16)):
        theirs, ours = (
            each(**TRAINING, **RANDOM_INIT, **arguments).init(KEY, x)
            for each in (nn.BatchNorm, BatchNorm)
        )
        same(ours, theirs)
        assert [list(each) for each in ours.values()] == [list(each) for each in theirs.values()]


def test_random_keys_and_names_are_those_of_linen():
    classes = iter((BatchNorm, nn.BatchNorm))
    theirs, ours, mixed = (
        Network(lambda each=each, **keywords: each()(**RANDOM_INIT, **keywords)).init(KEY, X)
        for each in (lambda: nn.BatchNorm, lambda: BatchNorm, lambda: next(classes))
    )
    same(ours, theirs)
    same(mixed, theirs)
    assert list(ours["params"]) == ["Dense_0", "BatchNorm_0", "BatchNorm_1"]


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_dtypes_are_those_of_linen(dtype):
    parameters = [{"param_dtype": each} for each in ("bfloat16", "float32")]
    parameters += [{"use_scale": False, "use_bias": False}, {"use_scale": False}]
    for arguments in parameters:
        for of_x in ("float16", "bfloat16", "float32", "int32", "uint8", "bool"):
            x = jax.ShapeDtypeStruct(X.shape, of_x)
            theirs, ours = (
                [
                    jax.eval_shape(layer(**arguments, dtype=dtype).init_with_output, KEY, x),
                    jax.eval_shape(
                        partial(layer(**arguments, dtype=dtype).apply, mutable=["batch_stats"]),
                        layer(**arguments).init(KEY, X),
                        x,
                    ),
                ]
                for layer in (partial(nn.BatchNorm, False), partial(BatchNorm, False))
            )
            assert ours == theirs, (arguments, of_x)
            evaluated = (
                jax.eval_shape(
                    layer(True, **arguments, dtype=dtype).apply,
                    layer(True, **arguments).init(KEY, X),
                    x,
                )
                for layer in (nn.BatchNorm, BatchNorm)
            )
            assert len(set(evaluated)) == 1


def test_float64_is_kept():
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True):
        x = np.random.default_rng(1).normal(1e3, 1, (50, 3))
        for dtype in (None, np.float64):
            layer = BatchNorm(**TRAINING, dtype=dtype)
            variables = layer.init(KEY, x)
            assert variables["batch_stats"]["mean"].dtype == np.float32
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
            wanted = truth.batch_norm(x, eps=1e-5)
            assert y.dtype == updates["batch_stats"]["var"].dtype == np.float64
            near(y, wanted.y, 1e-10)
            near(updates["batch_stats"], averages(variables["batch_stats"], wanted), 1e-10)


# ---- numbers


@pytest.mark.parametrize(
    ("arguments", "mask"),
    [
        ({}, None),
        ({"axis": (2, 1), "momentum": 0.9, "epsilon": 1e-3}, None),
        ({"axis": 1, "use_scale": False}, MASK),
        ({"use_bias": False, "momentum": 0.0}, MASK[:, :, :1]),
        ({"momentum": 1.0}, MASK[0, :, :1]),
        ({"use_bias": False, "use_scale": False, "use_fast_variance": True}, None),
        ({"param_dtype": jnp.float16, "force_float32_reductions": False}, None),
    ],
)
def test_training_is_as_in_linen_and_in_truth(arguments, mask):
    arguments = {**TRAINING, **RANDOM_INIT, **arguments}
    layer = BatchNorm(**arguments)
    variables = variables_of(layer)
    got = trained(layer, variables, mask=mask)
    half = "param_dtype" in arguments
    tolerance = 2e-3 if half else 1e-5
    theirs = trained(
        nn.BatchNorm(**{**arguments, "use_fast_variance": False}), variables, mask=mask
    )
    near(got, theirs, tolerance)

    params, old = variables.get("params", {}), variables["batch_stats"]
    scale, bias = params.get("scale"), params.get("bias")
    keywords = {"axis": layer.axis, "eps": layer.epsilon, "mask": mask}
    wanted = truth.batch_norm(X, scale, bias, **keywords)
    near(got["y"], wanted.y, tolerance)
    near(got["stats"], averages(old, wanted, layer.momentum), tolerance)
    gradients = truth.batch_norm_gradients(DY, X, scale, bias, **keywords)
    near(got["x"], gradients["x"], tolerance)
    near(got["params"], {name: gradients[name] for name in params}, tolerance)


@pytest.mark.parametrize("arguments", [{}, {"axis": (0, 2), "use_bias": False, "epsilon": 0.1}])
def test_evaluation_is_as_in_linen_and_in_truth(arguments):
    layer = BatchNorm(**RANDOM_INIT, **arguments)
    variables = variables_of(layer.clone(**TRAINING))
    y = layer.apply(variables, X, use_running_average=True)
    near(y, nn.BatchNorm(True, **arguments).apply(variables, X))
    params, stats = variables["params"], variables["batch_stats"]
    wanted = truth.batch_norm(
        X,
        params["scale"],
        params.get("bias"),
        axis=layer.axis,
        eps=layer.epsilon,
        given=(stats["mean"], stats["var"]),
    )
    near(y, wanted.y)
    y, updates = layer.apply(variables, X, True, mask=MASK, mutable=["batch_stats"])
    near(y, wanted.y)
    same(updates["batch_stats"], stats)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype):
    x = X.astype(dtype)
    for to in (None, dtype):
        layer = BatchNorm(**TRAINING, dtype=to)
        variables = variables_of(layer)
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        wanted = truth.batch_norm(x)
        near(y, wanted.y, 1e-5 if to is None else jnp.finfo(dtype).eps)
        near(updates["batch_stats"], averages(variables["batch_stats"], wanted), 1e-6)


def test_integers_are_taken():
    x = np.arange(24).reshape(6, 4) ** 2 % 17
    for array in (x, x > 8, x.tolist(), np.float64(x)):
        y, _ = BatchNorm(**TRAINING).init_with_output(KEY, array)
        assert y.dtype == jnp.float32
        near(y, truth.batch_norm(array).y)


def test_a_large_mean():
    x = LARGE_MEAN.x(2000, 3)
    y, _ = BatchNorm(**TRAINING).init_with_output(KEY, x)
    near(y, truth.batch_norm(x).y, LARGE_MEAN.tolerance)


def test_one_value_of_each_feature():
    layer = BatchNorm(**TRAINING)
    x = jnp.ones((1, 4))
    for mask in (None, jnp.ones((1, 1), bool)):
        y, variables = layer.init_with_output(KEY, x, mask=mask)
        near(y, np.zeros((1, 4)))
        y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        near(y, np.zeros((1, 4)))
        near(updates["batch_stats"], {"mean": np.full(4, 0.01), "var": np.full(4, 0.99)})


# ---- masks, and what Linen's layer does not have


@pytest.mark.parametrize(
    "mask", [MASK, MASK.astype(int), WEIGHTS, WEIGHTS[0], WEIGHTS[0, :, 0, None]]
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_masks_weights_residual_and_activation(mask, activation):
    layer = BatchNorm(**TRAINING, **RANDOM_INIT, activation=activation)
    variables = variables_of(layer)
    scale, bias = (variables["params"][name] for name in ("scale", "bias"))
    got = trained(layer, variables, mask=mask, residual=DY)
    keywords = {"mask": mask, "residual": DY, "activation": activation}
    wanted = truth.batch_norm(X, scale, bias, **keywords)
    near(got["y"], wanted.y)
    near(got["stats"], averages(variables["batch_stats"], wanted))
    near(got["x"], truth.batch_norm_gradients(DY, X, scale, bias, **keywords)["x"])


def test_a_mask_that_is_nowhere_true_leaves_the_averages():
    layer = BatchNorm(**TRAINING)
    variables = variables_of(layer)
    _, updates = layer.apply(variables, X, mask=np.zeros(X.shape, bool), mutable=["batch_stats"])
    same(updates["batch_stats"], {k: jnp.asarray(v) for k, v in variables["batch_stats"].items()})
    one = MASK & (np.arange(4) > 0)
    _, updates = layer.apply(variables, X, mask=one, mutable=["batch_stats"])
    assert updates["batch_stats"]["var"][0] == variables["batch_stats"]["var"][0]
    assert (updates["batch_stats"]["var"] != variables["batch_stats"]["var"])[1:].all()


def test_evaluation_with_residual_and_activation():
    layer = BatchNorm(activation="relu")
    variables = variables_of(layer.clone(**TRAINING))
    y = layer.apply(variables, X, True, residual=DY[0])
    stats = variables["batch_stats"]
    given = stats["mean"], stats["var"]
    near(y, truth.batch_norm(X, residual=DY[0], activation="relu", given=given).y)


def test_traced_momentum_and_epsilon():
    variables = variables_of(BatchNorm(**TRAINING))

    @jax.jit
    def step(momentum, epsilon):
        layer = BatchNorm(**TRAINING, momentum=momentum, epsilon=epsilon)
        return layer.apply(variables, X, mutable=["batch_stats"])

    for momentum, epsilon in ((0.25, 0.5), (0.75, 1e-3)):
        y, updates = step(momentum, epsilon)
        wanted = truth.batch_norm(X, eps=epsilon)
        near(y, wanted.y)
        near(updates["batch_stats"], averages(variables["batch_stats"], wanted, momentum))
    y, updates = step(1.5, -1.0)
    assert np.isnan([*y.ravel(), *updates["batch_stats"]["mean"]]).all()


@pytest.mark.parametrize("name", ["momentum", "epsilon"])
def test_momentum_and_epsilon_may_be_numpys(name):
    variables = variables_of(BatchNorm(**TRAINING))
    for number in (np.float32(0.5), np.array(0.5)):
        layer = BatchNorm(**TRAINING, **{name: number})
        y, updates = layer.apply(variables, X, mutable=["batch_stats"])
        wanted = truth.batch_norm(X, eps=float(layer.epsilon))
        near(y, wanted.y)
        momentum = float(layer.momentum)
        near(updates["batch_stats"], averages(variables["batch_stats"], wanted, momentum))


# ---- collections and initialization


def test_use_running_average_is_given_once():
    for arguments, keywords in (
        ((None,), {}),
        ((False,), {"use_running_average": False}),
        ((True,), {"use_running_average": False}),
    ):
        theirs, ours = (
            error_of(each(*arguments).init, KEY, X, **keywords)
            for each in (nn.BatchNorm, BatchNorm)
        )
        assert ours == theirs
    same(BatchNorm().init(KEY, X, False), BatchNorm(False).init(KEY, X))


@pytest.mark.parametrize("keywords", [{}, {"mutable": ["params"]}, {"mutable": False}])
def test_averages_move_only_where_they_may(keywords):
    variables = variables_of(BatchNorm(**TRAINING))
    theirs, ours = (
        error_of(each(**TRAINING).apply, variables, X, **keywords)
        for each in (nn.BatchNorm, BatchNorm)
    )
    assert ours == theirs
    assert "immutable" in ours[1]
    BatchNorm(True).apply(variables, X, **keywords)


@pytest.mark.parametrize("missing", ["params", "batch_stats"])
def test_variables_that_are_missing_are_missed_as_by_linen(missing):
    variables = variables_of(BatchNorm(**TRAINING))
    del variables[missing]
    theirs, ours = (error_of(each(True).apply, variables, X) for each in (nn.BatchNorm, BatchNorm))
    assert ours == theirs


def test_initializing_moves_nothing():
    layer = BatchNorm(**TRAINING, **RANDOM_INIT, axis_name="nowhere")
    for x in (X, X[0, :1]):
        y, variables = layer.init_with_output(KEY, x)
        same(variables["batch_stats"], {"mean": jnp.zeros(4), "var": jnp.ones(4)})
        near(y, truth.batch_norm(x, variables["params"]["scale"], variables["params"]["bias"]).y)
    shapes = jax.eval_shape(layer.init, KEY, X)
    assert shapes["batch_stats"]["mean"] == jax.ShapeDtypeStruct((4,), jnp.float32)
    lazily = layer.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    same(lazily, variables)
    with pytest.raises(NameError, match="nowhere"):
        layer.apply(variables, X, mutable=["batch_stats"])


def test_variables_of_any_kind():
    layer = BatchNorm(**TRAINING)
    variables = variables_of(layer)
    wanted = truth.batch_norm(X)
    narrow = jax.tree.map(lambda each: np.asarray(each, jnp.bfloat16), variables)
    for given in (variables, freeze(variables), jax.tree.map(np.asarray, variables), narrow):
        theirs, ours = (
            each(**TRAINING).apply(given, X, mutable=["batch_stats"])
            for each in (Linens, BatchNorm)
        )
        near(ours[0], wanted.y)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert jax.tree.map(jnp.result_type, ours) == jax.tree.map(jnp.result_type, theirs)
        near(dict(ours[1]["batch_stats"]), dict(theirs[1]["batch_stats"]))


def test_averages_keep_their_dtype_in_a_loop():
    """Of steps, that is: `lax.scan` refuses a carry whose dtype changes."""
    layer = BatchNorm(
        **TRAINING, momentum=0.75, param_dtype=jnp.bfloat16, force_float32_reductions=False
    )
    variables = layer.init(KEY, X)

    def step(stats, x):
        given = {**variables, "batch_stats": stats}
        return layer.apply(given, x, mutable=["batch_stats"])[1]["batch_stats"], None

    stats, _ = jax.lax.scan(step, variables["batch_stats"], np.stack([X, X + 2]))
    assert stats["mean"].dtype == jnp.bfloat16
    near(stats["mean"], 0.4375 * X.mean((0, 1)) + 0.5, 2e-2)


def test_checkpoints_are_those_of_linen():
    theirs, ours = (Network(partial(each, **RANDOM_INIT)) for each in (nn.BatchNorm, BatchNorm))
    wanted, blank = variables_of(theirs), ours.init(jax.random.PRNGKey(1), X)
    restored = serialization.from_bytes(blank, serialization.to_bytes(wanted))
    near(restored, wanted, 0)
    back = serialization.from_bytes(wanted, serialization.to_bytes(restored))
    near(back, wanted, 0)
    assert serialization.to_bytes(restored) == serialization.to_bytes(wanted)
    y, _ = ours.apply(restored, X, mutable=["batch_stats"])
    near(y, theirs.apply(wanted, X, mutable=["batch_stats"])[0])


def test_partitioned_parameters():
    box = partial(nn.with_partitioning, names=("model",))
    arguments = {name: box(each) for name, each in RANDOM_INIT.items()}
    theirs, ours = (each(**TRAINING, **arguments).init(KEY, X) for each in (Linens, BatchNorm))
    assert nn.get_partition_spec(ours) == nn.get_partition_spec(theirs)
    assert nn.get_partition_spec(ours)["params"]["scale"] == P("model")
    same(nn.unbox(ours), nn.unbox(theirs))
    y, _ = BatchNorm(**TRAINING).apply(ours, X, mutable=["batch_stats"])
    near(y, Linens(**TRAINING).apply(theirs, X, mutable=["batch_stats"])[0])


def test_what_linen_tells_of_a_model():
    theirs, ours = (Network(each) for each in (nn.BatchNorm, BatchNorm))
    tables = [each.tabulate(KEY, X, console_kwargs={"width": 200}) for each in (ours, theirs)]
    assert tables[0] == tables[1]
    variables = theirs.init(KEY, X)
    captured = [
        each.apply(
            variables, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True
        )
        for each in (ours, theirs)
    ]
    near(captured[0][1], captured[1][1])
    bound = BatchNorm(True).bind(variables_of(BatchNorm(**TRAINING)))
    assert bound(X).shape == X.shape
    assert bound.variables["batch_stats"]["mean"].shape == (4,)


# ---- models and lifted transformations


class Block(nn.Module):
    norm: type[nn.Module] | partial

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(self.norm()(nn.Dense(4)(x))), None


class InSetup(nn.Module):
    norm: type[nn.Module] | partial

    def setup(self):
        self.norms = [self.norm(), self.norm()]
        self.by_name = {"last": self.norm()}

    def __call__(self, x):
        for each in self.norms:
            x = each(x) * x
        return self.by_name["last"](x)


class Shared(nn.Module):
    norm: type[nn.Module] | partial

    @nn.compact
    def __call__(self, x):
        norm = self.norm()
        return norm(norm(x) * x)


def _sequential(norm):
    return nn.Sequential([nn.Dense(4), norm(), nn.relu, norm()])


def _scanned(norm):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            split = {"params": True}
            return nn.scan(Block, variable_axes=axes, split_rngs=split, length=3)(norm)(x, None)[0]

    return Model()


def _vmapped(norm, **keywords):
    lifted = nn.vmap(norm.func, split_rngs={"params": True}, **keywords)
    return lifted(**norm.keywords)


def _each_with_its_own(norm):
    return _vmapped(norm, variable_axes={"params": 0, "batch_stats": 0})


def _vmapped_over_a_batch(norm):
    """Averages that all examples share, since they have one mean."""
    norm = partial(norm, axis_name="batch")
    lifted = nn.vmap(
        norm.func,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="batch",
    )
    return lifted(**norm.keywords)


def _remat(norm):
    return Network(partial(nn.remat(norm.func), **_without_flag(norm)))


def _jitted(norm):
    return Network(partial(nn.jit(norm.func), **_without_flag(norm)))


def _without_flag(norm):
    return {name: each for name, each in norm.keywords.items() if name != "use_running_average"}


def _mapped_variables(norm):
    """Parameters that are doubled before they are used."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.map_variables(
                norm.func,
                "params",
                lambda variables: jax.tree.map(lambda each: each * 2, variables),
                init=self.is_initializing(),
            )
            return lifted(**norm.keywords)(x)

    return Model()


MODELS = [
    *(InSetup, Shared, Block, _sequential, _scanned, _each_with_its_own),
    *(_vmapped_over_a_batch, _remat, _jitted, _mapped_variables),
]


@pytest.mark.parametrize("model", MODELS)
def test_models_and_lifted_transformations(model):
    theirs, ours = (
        model(partial(each, use_running_average=False, momentum=0.75, **RANDOM_INIT))
        for each in (Linens.func, BatchNorm)
    )
    variables = ours.init(KEY, X)
    same(variables, theirs.init(KEY, X))

    def first(y):
        return y[0] if isinstance(y, tuple) else y

    results = []
    for each in (ours, theirs):

        @jax.jit
        def step(variables, each=each):
            def loss(params):
                given = {**variables, "params": params}
                y, updates = each.apply(given, X, mutable=["batch_stats"])
                return (first(y) * DY).sum(), (first(y), updates)

            return jax.value_and_grad(loss, has_aux=True)(variables["params"])

        results.append(step(variables))
    near(results[0], results[1], 1e-4)
    updates = results[0][0][1][1]["batch_stats"]
    moved = jax.tree.map(lambda old, new: (old != new).any(), variables["batch_stats"], updates)
    assert all(jax.tree.leaves(moved))


def test_a_layer_that_is_called_twice_moves_twice():
    layer = Shared(partial(BatchNorm, use_running_average=False, momentum=0.75))
    _, updates = layer.apply(layer.init(KEY, X), X, mutable=["batch_stats"])
    first = truth.batch_norm(X)
    second = truth.batch_norm(first.y * X)
    near(
        updates["batch_stats"]["BatchNorm_0"]["mean"],
        0.75 * 0.25 * first.mean + 0.25 * second.mean,
    )


def test_a_train_state():
    """One that is donated, of a network that learns; then the network in evaluation."""

    class Trained(TrainState):
        batch_stats: dict

    class Classifier(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.relu(self.norm()(nn.Dense(6)(x), use_running_average=not train))
            return nn.Dense(1)(x)

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, wanted):
        def loss(params):
            y, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            return ((y - wanted) ** 2).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"])

    x, wanted = X.reshape(40, 4), X.reshape(40, 4)[:, :1] ** 2
    results = []
    for norm in (Linens, BatchNorm):
        model = Classifier(partial(norm, momentum=0.75))
        state = Trained.create(
            apply_fn=model.apply, tx=optax.sgd(0.01), **model.init(KEY, x, train=False)
        )
        for _ in range(5):
            state = step(state, x, wanted)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        results.append((variables, model.apply(variables, x, train=False)))
    near(results[1], results[0], 1e-4)


def test_a_mapped_batch_is_one_batch():
    layer = BatchNorm(**TRAINING, axis_name="batch", momentum=0.75)
    variables = layer.init(KEY, X[0])
    step = partial(layer.apply, variables, mutable=["batch_stats"])
    y, updates = jax.vmap(step, axis_name="batch", out_axes=(0, None))(X)
    wanted = truth.batch_norm(X)
    near(y, wanted.y)
    near(updates["batch_stats"], averages(variables["batch_stats"], wanted, 0.75))
    of_vectors = jax.vmap(step, axis_name="batch", out_axes=(0, None))
    near(of_vectors(X[:, 0])[0], truth.batch_norm(X[:, 0]).y)


def test_an_ensemble():
    """Layers whose variables are mapped, outside of Flax."""
    results = []
    for norm in (Linens, BatchNorm):
        layer = norm(**TRAINING, **RANDOM_INIT)
        many = jax.vmap(layer.init, in_axes=(0, None))(jax.random.split(KEY, 3), X)

        @jax.jit
        @jax.vmap
        def gradient(variables, layer=layer):
            def loss(variables):
                y, updates = layer.apply(variables, X, mutable=["batch_stats"])
                return (y * DY).sum(), updates

            return jax.grad(loss, has_aux=True)(variables)

        gradients, updates = gradient(many)
        results.append((gradients["params"], updates))
    near(results[1], results[0])


class Renamed(BatchNorm):
    momentum: float = 0.75


def test_a_subclass_has_defaults_of_its_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Renamed()(x, use_running_average=False)

    _, updates = Model().apply(Model().init(KEY, X), X, mutable=["batch_stats"])
    near(updates["batch_stats"]["Renamed_0"]["mean"], X.mean((0, 1)) / 4)


def test_a_layer_within_nnx():
    layer = nnx.bridge.ToNNX(BatchNorm(**TRAINING, momentum=0.75), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(layer, X)
    near(layer(X, mutable=["batch_stats"]), truth.batch_norm(X).y)
    near(layer.mean[...], X.mean((0, 1)) / 4)


def test_derivatives_in_forward_mode():
    layer = BatchNorm(**TRAINING)
    variables = layer.init(KEY, X)

    def through(layer, x):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    results = [
        jax.jvp(partial(through, each), (X,), (DY,))[1] for each in (layer, Linens(**TRAINING))
    ]
    near(results[0], results[1])


# ---- wrong arguments


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (TypeError, "x must be .*complex64", {}, {"x": X + 1j}),
        (TypeError, "x must be an array", {}, {"x": None}),
        (TypeError, "masked array", {}, {"x": np.ma.masked_array(X, MASK)}),
        (ValueError, r"x must have at least one axis", {}, {"x": np.float32(1)}),
        (ValueError, r"axis must be within \[-3, 2\]", {"axis": 3}, {}),
        (ValueError, "axis must not name an axis of x twice", {"axis": (-1, 2)}, {}),
        (TypeError, "axis must be an integer", {"axis": 1.0}, {}),
        (ValueError, "momentum must be within", {"momentum": 1.5}, {}),
        (TypeError, "momentum must be a number", {"momentum": "0.9"}, {}),
        (ValueError, "momentum must be .* without axes", {"momentum": jnp.ones(4)}, {}),
        (ValueError, "epsilon must be positive", {"epsilon": 0.0}, {}),
        (TypeError, "epsilon must be a positive number", {"epsilon": None}, {}),
        (ValueError, "dtype must be None or a real", {"dtype": jnp.int32}, {}),
        (ValueError, "dtype must be None or a real", {"dtype": jnp.complex64}, {}),
        (ValueError, "activation must be", {"activation": "gelu"}, {}),
        (ValueError, "mask must broadcast", {}, {"mask": MASK[:3]}),
        (TypeError, "mask must be", {}, {"mask": MASK + 1j}),
        (ValueError, "residual must broadcast", {}, {"residual": X[:3]}),
        (TypeError, "residual must be", {}, {"residual": X + 1j}),
        (NameError, "nowhere", {"axis_name": "nowhere"}, {}),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_change_nothing(error, message, arguments, keywords):
    class Catching(nn.Module):
        @nn.compact
        def __call__(self, x, **keywords):
            with pytest.raises(error, match=message):
                BatchNorm(**TRAINING, **arguments, name="norm")(x, **keywords)
            return x

    variables = {name: {"norm": each} for name, each in variables_of(BatchNorm(False)).items()}
    _, updates = Catching().apply(variables, **{"x": X, **keywords}, mutable=["batch_stats"])
    same(updates["batch_stats"], variables["batch_stats"])


def test_variables_of_another_shape_are_refused():
    layer = BatchNorm(**TRAINING)
    variables = variables_of(layer)
    with pytest.raises(Exception, match=r"shape.*\(2,\)"):
        layer.apply(variables, X[..., :2], mutable=["batch_stats"])
    without = layer.clone(use_scale=False, use_bias=False)
    with pytest.raises(ValueError, match=r"mean must have the shape \(2,\)"):
        without.apply(variables, X[..., :2], mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"mean must have the feature shape \(2,\)"):
        without.clone(use_running_average=True).apply(variables, X[..., :2])


# ---- several devices, in a process of its own


def in_mapped_functions() -> None:
    x = np.random.default_rng(0).normal(3, 2, (DEVICES, 6, 4)).astype(np.float32)
    x += np.arange(DEVICES, dtype=np.float32)[:, None, None]
    masks = (
        np.random.default_rng(1).uniform(size=x.shape) < np.array([0.9, 0.2, 0.5, 0])[:, None, None]
    )
    variables = variables_of(BatchNorm(**TRAINING))
    old = variables["batch_stats"]

    def step(layer, x, mask=None):
        y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    layer = BatchNorm(**TRAINING, axis_name="i")
    everywhere = averages(old, truth.batch_norm(x))
    y, stats = jax.pmap(partial(step, layer), axis_name="i")(x)
    near(y, truth.batch_norm(x).y)
    near(jax.tree.map(lambda each: each[3], stats), everywhere)
    theirs = jax.pmap(partial(step, Linens(**TRAINING, axis_name="i")), axis_name="i")(x)
    near((y, stats), theirs)

    y, stats = jax.pmap(partial(step, layer), axis_name="i")(x, masks)
    wanted = truth.batch_norm(x, mask=masks)
    near(y, wanted.y)
    near(jax.tree.map(lambda each: each[3], stats), averages(old, wanted))

    in_groups = layer.clone(axis_index_groups=GROUPS)
    y, stats = jax.pmap(partial(step, in_groups), axis_name="i")(x)
    for group in map(np.array, GROUPS):
        wanted = truth.batch_norm(x[group])
        near(y[group], wanted.y)
        near(jax.tree.map(lambda each, at=group[1]: each[at], stats), averages(old, wanted))

    mesh = Mesh(np.array(jax.devices()), "i")
    specs = {"in_specs": P("i"), "out_specs": (P("i"), P())}
    y, stats = jax.jit(jax.shard_map(partial(step, layer), mesh=mesh, **specs))(x)
    near(y, truth.batch_norm(x).y)
    near(stats, everywhere)

    sharded = jax.device_put(x, NamedSharding(mesh, P("i")))
    y, stats = jax.jit(partial(step, BatchNorm(**TRAINING)))(sharded)
    near(y, truth.batch_norm(x).y)
    near(stats, everywhere)
    assert y.sharding.is_equivalent_to(sharded.sharding, x.ndim)


def test_several_devices():
    finish(start("in_mapped_functions", module="test_linen", quickly_compiled=True))
