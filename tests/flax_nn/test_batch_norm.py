"""nn.BatchNorm: what the original gave, where it was not accurate, and what it refuses."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from cases import LARGE_MEAN
from compare import close, near, same
from doors import JAX

from batchnorm.flax import nn

GOLDEN = Path(__file__).parents[1] / "golden" / "flax_nn"
CASES = json.loads((GOLDEN / "index.json").read_text())
KEY = jax.random.PRNGKey(0)
X = np.random.default_rng(0).normal(3, 2, (8, 5, 4)).astype(np.float32)


def golden(name: str):
    """The arrays of a case, and the Network, with one layer "bn", that the original ran."""
    arguments = dict(CASES[name]["arguments"])
    if arguments.pop("random_init", False):
        arguments["scale_init"] = nn.initializers.uniform(2.0)
        arguments["bias_init"] = nn.initializers.normal(0.5)
    arguments["dtype"] = jnp.dtype(arguments.get("dtype", "float32"))

    class Network(nn.Module):
        def apply(self, x, **keywords):
            return nn.BatchNorm(x, name="bn", **arguments, **keywords)

    return dict(np.load(GOLDEN / f"{name}.npz")), Network


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "steps" in case])
def test_golden(name: str):
    wanted, network = golden(name)
    with nn.stateful() as state:
        y, params = network.init(jax.random.PRNGKey(CASES[name]["seed"]), wanted["x0"])
    assert str(y.dtype) == CASES[name]["output_dtype"]
    drawn = {f"params['bn']['{key}']": value for key, value in params.get("bn", {}).items()}
    assert drawn.keys() == {key for key in wanted if key.startswith("params")}
    for key, value in drawn.items():
        np.testing.assert_array_equal(value, wanted[key])

    for step in range(CASES[name]["steps"]):
        with nn.stateful(state) as state:
            y = network.call(params, wanted[f"x{step}"])
        near(y, wanted[f"y{step}"])
        near(state["/bn"]["mean"], wanted[f"mean{step}"])
        near(state["/bn"]["var"], wanted[f"var{step}"])
    with nn.stateful(state, mutable=False):
        near(network.call(params, wanted["x_eval"], use_running_average=True), wanted["y_eval"])

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            with nn.stateful(state):
                return jnp.sum(network.call(params, x).astype(jnp.float32) * wanted["w"])

        return jax.grad(loss, argnums=(0, 1))(params, x)

    of_params, of_x = gradients(params, wanted["x0"])
    near(of_x, wanted["grad_x"])
    for key, value in of_params.get("bn", {}).items():
        near(value, wanted[f"grad_params['bn']['{key}']"])


def test_the_arguments_are_those_of_the_original():
    arguments = inspect.signature(nn.BatchNorm.apply).parameters
    assert {name: each.default for name, each in list(arguments.items())[2:]} == {
        "batch_stats": None,
        "use_running_average": False,
        "axis": -1,
        "momentum": 0.99,
        "epsilon": 1e-5,
        "dtype": jnp.float32,
        "bias": True,
        "scale": True,
        "bias_init": nn.initializers.zeros,
        "scale_init": nn.initializers.ones,
        "axis_name": None,
        "axis_index_groups": None,
    }
    assert list(arguments)[:4] == ["self", "x", "batch_stats", "use_running_average"]
    assert list(arguments)[-2:] == ["axis_name", "axis_index_groups"]


def test_parameters_are_scale_and_bias():
    _, params = nn.BatchNorm.init(KEY, X)
    assert list(params) == ["scale", "bias"]
    _, params = nn.BatchNorm.init(KEY, X, scale=False)
    assert list(params) == ["bias"]
    _, params = nn.BatchNorm.init(KEY, X, scale=False, bias=False)
    assert not params


def test_axes_are_in_the_order_of_the_dimensions():
    for axis in ((1, 2), (2, 1), [-1, 1]):
        y, params = nn.BatchNorm.init(KEY, X, axis=axis)
        assert params["scale"].shape == (5, 4)
        near(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5))


def test_state_exists_where_it_is_asked_for():
    _, params = nn.BatchNorm.init(KEY, X)
    nn.BatchNorm.call(params, X)
    given = nn.Collection()
    with nn.stateful() as state, given.mutate() as given:
        nn.BatchNorm.init(KEY, X, batch_stats=given)
    assert not state.as_dict()
    np.testing.assert_array_equal(given["/"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(given["/"]["var"], np.ones(4))
    with given.mutate() as given:
        nn.BatchNorm.call(params, X, batch_stats=given, momentum=0.75)
    near(given["/"]["mean"], 0.25 * X.mean((0, 1)))
    near(given["/"]["var"], 0.75 + 0.25 * X.var((0, 1)))
    y = nn.BatchNorm.call(params, X, batch_stats=given, use_running_average=True)
    near(y, (X - given["/"]["mean"]) / np.sqrt(given["/"]["var"] + 1e-5))


def test_initialization_may_have_one_value_and_no_devices():
    y, params = nn.BatchNorm.init(KEY, X[0, :1], axis_name="nowhere")
    np.testing.assert_array_equal(y, np.zeros((1, 4)))
    y = nn.BatchNorm.call(params, X[0, :1])
    np.testing.assert_array_equal(y, np.zeros((1, 4)))


def test_by_shape_and_under_jit():
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init_by_shape(KEY, [((8, 5, 4), jnp.float32)])
    assert params["scale"].shape == (4,)

    @jax.jit
    def step(params, state, x):
        with nn.stateful(state) as new_state:
            y = nn.BatchNorm.call(params, x)
        return y, new_state

    y, new_state = step(params, state, X)
    near(y, (X - X.mean((0, 1))) / np.sqrt(X.var((0, 1)) + 1e-5))
    near(new_state["/"]["mean"], 0.01 * X.mean((0, 1)))
    assert "batchnorm_batch_norm" in step.lower(params, state, X).as_text()


@pytest.mark.parametrize("dtype", JAX.dtypes, ids=str)
def test_output_dtype(dtype):
    y, params = nn.BatchNorm.init(KEY, X.astype(dtype), dtype=dtype)
    assert y.dtype == dtype
    assert params["scale"].dtype == jnp.float32
    whole, _ = nn.BatchNorm.init(KEY, X.astype(dtype))
    assert whole.dtype == jnp.float32
    same(y, whole.astype(dtype))


def test_output_of_integers():
    y, _ = nn.BatchNorm.init(KEY, np.arange(12).reshape(6, 2))
    near(y.mean(0), np.zeros(2))


def test_float64_is_computed_in_float64():
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True):
        x = np.random.default_rng(0).normal(3, 2, (8, 4))
        with nn.stateful() as state:
            _, params = nn.BatchNorm.init(KEY, x)
        with nn.stateful(state):
            y = nn.BatchNorm.call(params, x, dtype=jnp.float64)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-12)
        np.testing.assert_array_equal(nn.BatchNorm.call(params, x), np.float32(y))


def test_accurate_where_the_original_was_not():
    x = LARGE_MEAN.x(1000, 8)
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, x)
    with nn.stateful(state) as state:
        y = nn.BatchNorm.call(params, x, momentum=0.0)
    wanted = truth.batch_norm(x)
    close(y, wanted.y, rtol=0, atol=1e-3)
    close(state["/"]["var"], wanted.var, rtol=1e-3, atol=0)


def test_an_empty_batch_changes_nothing():
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, X)
    with nn.stateful(state) as new_state:
        assert nn.BatchNorm.call(params, X[:0]).shape == (0, 5, 4)
    np.testing.assert_array_equal(new_state["/"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(new_state["/"]["var"], np.ones(4))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"use_running_average": True}, ValueError, "^when use_running_averages is True"),
        ({"axis": 3}, ValueError, r"axis must be within \[-3, 2\]"),
        ({"axis": (1, -2)}, ValueError, "axis must not name an axis of x twice"),
        ({"axis": 1.0}, TypeError, "axis must be an integer"),
        ({"x": X.astype(np.complex64)}, ValueError, "x must hold real numbers"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"epsilon": jnp.ones(3)}, ValueError, "epsilon must be a number or an array without axes"),
        ({"momentum": jnp.ones(3)}, ValueError, "momentum must be a number or an array without"),
        ({"momentum": jnp.array(True)}, TypeError, "momentum must be a real number"),
        ({"axis_name": "i"}, ValueError, "axis_name must name axes that are mapped"),
        ({"axis_index_groups": [[0]]}, ValueError, "axis_index_groups needs an axis_name"),
    ],
)
def test_refused(keywords, error, message):
    _, params = nn.BatchNorm.init(KEY, X)
    with pytest.raises(error, match=message):
        nn.BatchNorm.call(params, **{"x": X, **keywords})


@pytest.mark.parametrize(
    ("momentum", "error", "message"),
    [
        (1.5, ValueError, r"momentum must be within \[0, 1\], but got 1.5"),
        ("slow", TypeError, r"momentum must be a number within \[0, 1\], but got 'slow'"),
    ],
)
def test_momentum_is_refused(momentum, error, message):
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, X)
    with nn.stateful(state), pytest.raises(error, match=message):
        nn.BatchNorm.call(params, X, momentum=momentum)
    with nn.stateful(), pytest.raises(error, match=message):
        nn.BatchNorm.init(KEY, X, momentum=momentum)


def test_momentum_and_epsilon_of_a_schedule():
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, X)

    def step(momentum, epsilon):
        with nn.stateful(state) as new_state:
            y = nn.BatchNorm.call(params, X, momentum=momentum, epsilon=epsilon)
        return y, new_state.as_dict()

    compiled = jax.jit(step)
    for momentum, epsilon in ((0.9, 1e-5), (0.5, 0.1)):
        got, wanted = compiled(momentum, epsilon), step(momentum, epsilon)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_state_of_an_inner_transformation_is_refused():
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, X)
    with nn.stateful(state), pytest.raises(ValueError, match="transform"):
        jax.vmap(lambda x: nn.BatchNorm.call(params, x))(X)


def test_averages_kept_in_bfloat16_move_on():
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, X)
    state = jax.tree.map(lambda average: average.astype(jnp.bfloat16), state)
    for _ in range(300):
        with nn.stateful(state) as state:
            nn.BatchNorm.call(params, X, momentum=0.97)
    for name, wanted in (("mean", X.mean((0, 1))), ("var", X.var((0, 1)))):
        assert state["/"][name].dtype == jnp.float32
        np.testing.assert_allclose(state["/"][name], wanted, rtol=1e-3)


def test_a_masked_array_is_refused():
    with pytest.raises(TypeError, match=r"x must not be a masked array.* mask=~x\.mask"):
        nn.BatchNorm.init(KEY, np.ma.masked_less(X, 0))
