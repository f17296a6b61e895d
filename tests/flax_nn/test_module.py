"""Module: names, parameters, shared and partial modules, the ways to initialize."""

import hashlib
import inspect
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_modules import Bias, Dense, Sum

from batchnorm.flax import nn

pytestmark = pytest.mark.filterwarnings("error")

GOLDEN = Path(__file__).parents[1] / "golden" / "flax_nn"
KEY = jax.random.PRNGKey(0)


def derived(rng, *names):
    """The key of a parameter, by the names on the way to it."""
    for name in names:
        word = hashlib.sha1(name.encode()).digest()[:4]
        # What the original folds in is signed; JAX takes the same bits unsigned.
        number = int.from_bytes(word, "big", signed=True) % 2**32
        rng = jax.random.fold_in(rng, number)
    return rng


def outside(apply):
    """A module whose `apply` is a function of the instance alone."""
    return type("Outside", (nn.Module,), {"apply": apply})


# How a module runs


def test_constructing_inside_another_module_runs_it_and_gives_the_output():
    @nn.module
    def network(x):
        y = Bias(x)
        assert isinstance(y, jax.Array)
        return 2 * y

    y, params = network.init(KEY, jnp.array([1.0]))
    assert y == jnp.array([4.0])
    assert params == {"Bias_0": {"bias": jnp.array([1.0])}}
    assert network.call({"Bias_0": {"bias": jnp.array([5.0])}}, jnp.array([1.0])) == 12.0


def test_constructing_outside_of_a_module_is_an_error():
    with pytest.raises(ValueError, match=r"^A Module should only be instantiated directly inside"):
        Bias(jnp.ones(2))


def test_init_gives_output_and_parameters_and_call_the_output():
    x = jnp.array([1.0, 2.0])
    y, params = Bias.init(KEY, x)
    np.testing.assert_array_equal(y, [2.0, 3.0])
    assert list(params) == ["bias"]
    np.testing.assert_array_equal(params["bias"], [1.0, 1.0])
    np.testing.assert_array_equal(Bias.call(params, x), y)
    np.testing.assert_array_equal(Bias.call(params=params, x=x), y)


@pytest.mark.parametrize("rng", [None, 0, jnp.ones(3), "key"])
def test_init_wants_a_random_key_first(rng):
    with pytest.raises(TypeError, match=r"^rng must be a JAX random key, .* and come first, got"):
        Bias.init(rng, jnp.ones(3))


def test_init_takes_new_style_keys_and_numpy_ones():
    old = Dense.init(KEY, jnp.ones((1, 2)), 3)[1]
    new = Dense.init(jax.random.key(0), jnp.ones((1, 2)), 3)[1]
    numpy = Dense.init(np.asarray(KEY), jnp.ones((1, 2)), 3)[1]
    np.testing.assert_array_equal(old["kernel"], new["kernel"])
    np.testing.assert_array_equal(old["kernel"], numpy["kernel"])


def test_arguments_of_apply_may_have_the_names_that_init_and_call_use():
    class Odd(nn.Module):
        def apply(self, rng, input_specs, cls=3):
            return rng, input_specs, cls

    assert Odd.init(KEY, rng=1, input_specs=2)[0] == (1, 2, 3)
    assert Odd.call({}, rng=1, input_specs=2) == (1, 2, 3)


@pytest.mark.parametrize("params", [None, jnp.ones(2), [1], nn.Model(Bias, {})])
def test_call_wants_parameters_as_a_dict(params):
    with pytest.raises(TypeError, match=r'^params of the module "/" must be a dict by name'):
        Bias.call(params, jnp.ones(2))


def test_parameters_of_a_submodule_that_are_no_dict():
    network = nn.module(lambda x: Bias(x, name="inner"))
    with pytest.raises(TypeError, match=r'^params of the module "/inner" must be a dict by name'):
        network.call({"inner": jnp.ones(2)}, jnp.ones(2))


def test_module_itself_is_abstract():
    with pytest.raises(TypeError, match=r"abstract class Module"):
        nn.Module.init(KEY)
    with pytest.raises(TypeError, match=r"abstract class Module"):
        outside(lambda self: nn.Module()).init(KEY)


def test_a_subclass_may_have_a_new_apply():
    class Twice(Bias):
        def apply(self, x):
            return 2 * super().apply(x)

    y, params = Twice.init(KEY, jnp.ones(1))
    assert y == jnp.array([4.0])
    assert params == {"bias": jnp.array([1.0])}


def test_signature_and_docstring_are_those_of_apply():
    class Documented(nn.Module):
        """The class."""

        def apply(self, x, *, scale=2):
            """The function."""

    class Abstract(nn.Module):
        """The base."""

    class Plain(nn.Module):
        """The class."""

        def apply(self, x):
            return x

    assert str(inspect.signature(Documented)) == "(x, *, scale=2)"
    assert Documented.__doc__ == "The function."
    assert str(inspect.signature(Plain)) == "(x)"
    assert Plain.__doc__ == "The class."
    assert Abstract.__doc__ == "The base."
    assert str(inspect.signature(Documented.partial(scale=3))) == "(x, *, scale=2)"
    assert Documented.partial(scale=3).__doc__ == "The function."
    assert nn.Module.__doc__.startswith("A function with parameters")


def test_using_modules_warns_of_nothing():
    _, model = Bias.create(KEY, jnp.ones(1))  # a warning would be an error here
    Bias.create_by_shape(KEY, [(1,)])
    model(jnp.ones(1))


# Names


def test_automatic_names_have_one_counter_for_all_classes():
    @nn.module
    def network(x):
        x = Bias(x)
        x = Dense(x, 2)
        x = Bias(x, name="named")
        Bias.shared(name="also_named")(x)
        Bias.shared()(x)
        return Bias(x)

    _, params = network.init(KEY, jnp.ones((1, 2)))
    assert set(params) == {"Bias_0", "Dense_1", "named", "also_named", "2", "Bias_3"}
    network.call(params, jnp.ones((1, 2)))


def test_each_module_counts_for_itself():
    inner = nn.module(lambda x: Bias(Bias(x)))
    network = nn.module(lambda x: inner(inner(x, name="a"), name="b"))
    _, params = network.init(KEY, jnp.ones(1))
    assert params.keys() == {"a", "b"}
    assert params["a"].keys() == params["b"].keys() == {"Bias_0", "Bias_1"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (3, r"^Name must be a string\. Got 3, a int"),
        ("a/b", r"^Name should not contain slashes or colons\. Got \"a/b\""),
        ("a:b", r"^Name should not contain slashes or colons\."),
        ("", r"^Name should not be empty\."),
    ],
)
def test_bad_names(name, message):
    x = jnp.ones(1)
    attempts = [
        lambda: nn.module(lambda: Bias(x, name=name)).init(KEY),
        lambda: nn.module(lambda: Bias.shared(name=name)).init(KEY),
        lambda: Bias.partial(name=name),
        lambda: Bias.init(KEY, x, name=name),
        lambda: Bias.init_by_shape(KEY, [x], name=name),
        lambda: Bias.call({"bias": x}, x, name=name),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=message):
            attempt()


def test_parameter_names_must_be_strings():
    with pytest.raises(ValueError, match=r"^Name must be a string\. Got 3"):
        outside(lambda self: self.param(3, (), nn.initializers.ones)).init(KEY)


def unshared():
    Bias(jnp.ones(1), name="d")


def shared():
    Bias.shared(name="d")(jnp.ones(1))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (unshared, unshared, r'^A module with named "d" already exists\.'),
        (shared, shared, r'^Shared module named "d" already exists\.'),
        (shared, unshared, r'^The name "d" is used for both a shared and unshared module\.'),
        (unshared, shared, r'^The name "d" is used for both a shared and unshared module\.'),
    ],
)
def test_names_that_clash(first, second, message):
    def both():
        first()
        second()

    with pytest.raises(ValueError, match=message):
        nn.module(both).init(KEY)
    with pytest.raises(ValueError, match=message):
        nn.module(both).call({"d": {"bias": jnp.ones(1)}})


def test_a_parameter_and_a_submodule_of_one_name_clash():
    def parameter_first(self):
        self.param("d", (), nn.initializers.ones)
        unshared()

    def module_first(self):
        unshared()
        self.param("d", (), nn.initializers.ones)

    with pytest.raises(ValueError, match=r"^Name 'd' was already used for a parameter"):
        outside(parameter_first).init(KEY)
    with pytest.raises(ValueError, match=r"^Name 'd' was already used for another parameter\."):
        outside(module_first).init(KEY)


def test_a_submodule_that_fails_leaves_nothing_behind():
    class Picky(nn.Module):
        def apply(self, x):
            y = self.param("bias", (), nn.initializers.ones)
            if x < 0:
                raise ArithmeticError
            return y

    @nn.module
    def network(x):
        for value in (-x, x):
            try:
                Picky(value)
                Picky(value, name="named")
            except ArithmeticError:
                pass

    _, params = network.init(KEY, 1.0)
    assert params.keys() == {"Picky_0", "named"}


def test_a_submodule_that_init_did_not_create():
    @nn.module
    def network(x, more):
        Bias(x)
        if more:
            Bias(x, name="more")

    _, params = network.init(KEY, jnp.ones(1), False)
    with pytest.raises(ValueError, match=r"^No module named more was created during init"):
        network.call(params, jnp.ones(1), True)


# Parameters


def test_the_key_of_a_parameter_comes_from_the_names_on_the_way_to_it():
    inner = nn.module(lambda x: Dense(x, 3, name="dense"))
    network = nn.module(lambda x: inner(x, name="inner"))
    _, params = network.init(KEY, jnp.ones((1, 2)), name="ignored")
    for name, shape, initializer in [
        ("kernel", (2, 3), nn.initializers.lecun_normal()),
        ("bias", (3,), nn.initializers.normal(0.1)),
    ]:
        expected = initializer(derived(KEY, "inner", "dense", name), shape)
        np.testing.assert_array_equal(params["inner"]["dense"][name], expected)


def test_a_state_variable_splits_the_key_of_its_module():
    class Both(nn.Module):
        def apply(self):
            state = self.state("state", (4,), nn.initializers.normal())
            return state.value, self.param("param", (4,), nn.initializers.normal())

    network = nn.module(lambda: Both(name="both"))
    with nn.stateful():
        (state, param), _ = network.init(KEY)
    rest, key = jax.random.split(derived(KEY, "both"))
    np.testing.assert_array_equal(state, nn.initializers.normal()(key, (4,)))
    np.testing.assert_array_equal(param, nn.initializers.normal()(derived(rest, "param"), (4,)))


def test_parameters_outputs_and_state_of_a_network_equal_those_of_the_original():
    class Block(nn.Module):
        def apply(self, x, features):
            return jax.nn.relu(nn.BatchNorm(Dense(x, features=features), momentum=0.9))

    class Network(nn.Module):
        def apply(self, x):
            x = Block(x, 7, name="stem")
            twice = Dense.shared(features=7, name="twice")
            return Dense(Block(twice(x) + twice(x), 5), 3)

    golden = dict(np.load(GOLDEN / "module_tree.npz"))
    about = json.loads((GOLDEN / "index.json").read_text())["module_tree"]
    x = golden.pop("x")
    assert list(x.shape) == about["input"]
    with nn.stateful() as state:
        y, params = Network.init(jax.random.PRNGKey(about["seed"]), x)
    np.testing.assert_allclose(y, golden.pop("y"), rtol=1e-5, atol=2e-6)
    for variables in state.as_dict().values():
        np.testing.assert_array_equal(variables["mean"], 0 * variables["mean"])
        np.testing.assert_array_equal(variables["var"], 0 * variables["var"] + 1)
    with nn.stateful(state) as new_state:
        y = Network.call(params, x)
    np.testing.assert_allclose(y, golden.pop("y_call"), rtol=1e-5, atol=2e-6)

    ours = {
        kind + jax.tree_util.keystr(path): leaf
        for kind, tree in [("params", params), ("state", new_state.as_dict())]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert ours.keys() == golden.keys()
    for name, expected in golden.items():
        if name.startswith("params"):  # from the same keys: the same bits
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)
        else:
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_initializers_run_at_once_under_transformations():
    seen = []

    def initializer(rng, shape):
        seen.append(jax.random.normal(rng, shape))
        return seen[-1]

    class Module(nn.Module):
        def apply(self, x):
            state = self.state("state", (2,), initializer)
            return x + state.value + self.param("param", (2,), initializer)

    def run(x):
        with nn.stateful():
            return nn.module(lambda: Module(x)).init(KEY)[0]

    expected = run(jnp.ones(2))
    transformed = [
        jax.jit(run)(jnp.ones(2)),
        jax.vmap(run)(jnp.ones((3, 2)))[0],
        jax.jvp(run, [jnp.ones(2)], [jnp.ones(2)])[0],
    ]
    assert len(seen) == 8
    assert not any(isinstance(value, jax.core.Tracer) for value in seen)
    for y in transformed:
        np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_init_under_transformations_of_the_key():
    def kernel(rng):
        return nn.module(lambda: Dense(jnp.ones((1, 2)), 3)).init(rng)[1]["Dense_0"]["kernel"]

    keys = jax.random.split(KEY, 4)
    expected = np.stack([kernel(key) for key in keys])
    np.testing.assert_allclose(jax.vmap(kernel)(keys), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(kernel)(keys[0]), expected[0], rtol=1e-6)


def in_scan(module, x):
    return jax.lax.scan(lambda carry, row: (carry, module(row)), None, x)[1]


def in_cond(module, x):
    return jax.lax.cond(x.sum() > 0, module, lambda x: -x, x)


TRANSFORMED = {
    "scan": in_scan,
    "cond": in_cond,
    "checkpoint": lambda module, x: jax.checkpoint(module)(x),
    "jit": lambda module, x: jax.jit(lambda x: module(x))(x),
    "vmap": lambda module, x: jax.vmap(lambda x: module(x))(x),
    "scan in scan": lambda module, x: in_scan(lambda row: in_scan(module, row), x),
    "cond in scan": lambda module, x: in_scan(lambda row: in_cond(module, row), x),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_what_is_made_inside_of_a_transformation_is_what_is_made_outside(transformed):
    class Parts(nn.Module):
        def apply(self, x, shared):
            total = self.state("total", (2,), nn.initializers.normal())
            scale = self.param("scale", (2,), nn.initializers.normal())
            return scale * shared(Dense(x.reshape(-1, 2), 2, name="dense") + total.value)

    class Network(nn.Module):
        def apply(self, x, apart=lambda module, x: module(x)):
            shared = Dense.shared(features=2, name="shared")
            parts = Parts.partial(name="parts", shared=shared)
            apart(lambda x: parts(x).sum(-1).reshape(x.shape[:-1]).repeat(2).reshape(x.shape), x)
            return Bias(x)

    def made(module, key, by_shape=False):
        with nn.stateful() as state:
            if by_shape:
                _, params = module.init_by_shape(key, [(3, 2, 2)])
            else:
                _, params = module.init(key, jnp.ones((3, 2, 2)))
        return params, state.as_dict()

    inside = Network.partial(apart=transformed)
    expected = made(Network, KEY)
    jax.tree.map(np.testing.assert_array_equal, made(inside, KEY), expected)
    for by_shape in (False, True):
        concrete = jax.jit(lambda by_shape=by_shape: made(inside, KEY, by_shape))()
        jax.tree.map(np.testing.assert_array_equal, concrete, expected)
        traced = jax.jit(lambda key, by_shape=by_shape: made(inside, key, by_shape))(KEY)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced, expected)


def test_an_initializer_may_use_the_input():
    class Centre(nn.Module):
        def apply(self, x):
            return x - self.param("mean", (), lambda rng, shape: x.mean())

    _, params = Centre.init(KEY, jnp.array([1.0, 5.0]))
    assert params["mean"] == 3.0
    _, params = jax.jit(Centre.init)(KEY, jnp.array([1.0, 5.0]))
    assert params["mean"] == 3.0
    rows = jnp.array([[1.0, 5.0], [2.0, 4.0]])
    for init in (Centre.init, jax.jit(jax.vmap(Centre.init, (None, 0)))):
        means = jax.jit(lambda key, init=init: init(key, rows)[1]["mean"])(KEY)
        np.testing.assert_array_equal(means, 3.0)


def test_a_parameter_of_a_transformation_inside_of_init_is_an_error():
    class Inside(nn.Module):
        def apply(self, x):
            return jax.vmap(lambda row: self.param("row", None, lambda rng, shape: row))(x)

    class Row(nn.Module):
        def apply(self, row):
            return self.param("row", None, lambda rng, shape: row)

    for module in (Inside, nn.module(lambda x: jax.vmap(Row)(x))):
        with pytest.raises(ValueError, match=r"^Parameter 'row' belongs to a Jax transformation"):
            module.init(KEY, jnp.ones((3, 2)))


def test_a_parameter_name_used_twice():
    def apply(self):
        self.param("a", (), nn.initializers.ones)
        self.param("a", (), nn.initializers.ones)

    with pytest.raises(ValueError, match=r"^Name 'a' was already used for another parameter\."):
        outside(apply).init(KEY)


def test_a_parameter_that_does_not_exist():
    message = r"^Parameter with name 'bias' does not exist\. The parameters have: \['other'\]"
    with pytest.raises(ValueError, match=message):
        Bias.call({"other": 1}, jnp.ones(1))
    with pytest.raises(ValueError, match=r"^Parameter with name 'x' does not exist\."):
        outside(lambda self: self.get_param("x")).init(KEY)


def test_a_parameter_of_another_shape():
    with pytest.raises(
        ValueError, match=r"^Existing shape \(3,\) differs from requested shape \(2,\)"
    ):
        Bias.call({"bias": jnp.ones(3)}, jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"^Existing shape \(1,\) differs from requested shape \(2,\)"
    ):
        outside(lambda self: self.param("a", (2,), lambda rng, shape: jnp.ones(1))).init(KEY)


def test_without_a_shape_a_parameter_may_be_any_tree():
    tree = {"a": [jnp.ones(2), 3.0], "b": None}
    module = outside(lambda self: self.param("tree", None, lambda rng, shape: tree))
    y, params = module.init(KEY)
    assert y is tree
    assert params["tree"] is tree
    assert module.call({"tree": "anything"}) == "anything"


def test_more_parameters_than_asked_for_are_ignored():
    params = {"bias": jnp.ones(1), "more": 1, "Module_0": {}}
    assert Bias.call(params, jnp.ones(1)) == 2.0
    assert params.keys() == {"bias", "more", "Module_0"}


def test_get_param_and_is_initializing():
    class Probe(nn.Module):
        def apply(self):
            before = self.is_initializing()
            self.param("a", (), nn.initializers.ones)
            return before, self.get_param("a")

    _, params = Probe.init(KEY)
    assert Probe.init(KEY)[0] == (True, 1.0)
    assert Probe.call(params) == (False, 1.0)


def test_is_initializing_holds_for_all_that_init_runs():
    probe = outside(lambda self: self.is_initializing())

    @nn.module
    def network():
        use = probe.shared()
        return probe(), use(), use(), probe.call({}), probe.init(KEY)[0]

    y, params = network.init(KEY)
    assert y == (True,) * 5
    assert network.call(params) == (False, False, False, False, True)


def test_is_initializing_belongs_inside_of_apply():
    class Escape(nn.Module):
        def apply(self):
            return self

    escaped, _ = Escape.init(KEY)
    with pytest.raises(ValueError, match=r"^is_initializing should only be used inside a module"):
        escaped.is_initializing()


# init_by_shape and create


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (((4, 3), jnp.bfloat16), jnp.bfloat16),
        ((4, 3), jnp.float32),
        ([4, 3], jnp.float32),
        (jax.ShapeDtypeStruct((4, 3), jnp.float16), jnp.float16),
    ],
)
def test_init_by_shape_computes_what_does_not_depend_on_the_inputs(spec, dtype):
    class Module(nn.Module):
        def apply(self, x, factor, *, text):
            assert x.shape == (4, 3)
            bias = self.param("bias", (3,), nn.initializers.normal())
            copy = self.param("copy", (4, 3), lambda rng, shape: x)
            return x + bias, copy, factor * jnp.cos(bias), jax.jit(jnp.sin)(1.0), text, None

    y, params = Module.init_by_shape(KEY, [spec], 2.0, text="text")
    expected = Module.init(KEY, jnp.ones((4, 3), dtype), 2.0, text="text")
    assert jax.tree.structure((y, params)) == jax.tree.structure(expected)
    for abstract in (y[0], y[1], params["copy"]):
        assert isinstance(abstract, jax.ShapeDtypeStruct)
        assert abstract.shape == (4, 3)
    assert y[1].dtype == params["copy"].dtype == dtype
    np.testing.assert_array_equal(params["bias"], expected[1]["bias"])
    np.testing.assert_array_equal(y[2], expected[0][2])
    np.testing.assert_array_equal(y[3], expected[0][3])
    assert y[4:] == ("text", None)


def test_init_by_shape_may_name_its_specs_and_takes_more_inputs():
    module = nn.module(lambda a, b: a @ b)
    y, params = module.init_by_shape(KEY, input_specs=[(2, 3), ((3, 5), jnp.int32)])
    assert (y.shape, y.dtype, params) == ((2, 5), jnp.float32, {})


@pytest.mark.parametrize("specs", [(2, 3), None, [None], [((2,), "no such dtype")]])
def test_init_by_shape_says_what_specs_it_wants(specs):
    with pytest.raises(TypeError, match=r"^input_specs must be a sequence with a \(shape, dtype\)"):
        Bias.init_by_shape(KEY, specs)


def test_init_by_shape_under_transformations_of_the_key():
    def init(rng):
        with nn.stateful() as state:
            network = nn.module(lambda x: Sum(Dense(x, 3)))
            _, params = network.init_by_shape(rng, [(2, 2)])
        assert isinstance(params["Dense_0"]["kernel"], jax.Array)
        return params["Dense_0"]["kernel"], state["/Sum_1"]["total"]

    keys = jax.random.split(KEY, 3)
    expected, total = init(keys[0])
    assert not isinstance(expected, jax.core.Tracer)
    for kernel, state in (
        jax.jit(init)(keys[0]),
        jax.tree.map(lambda a: a[0], jax.vmap(init)(keys)),
    ):
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
        np.testing.assert_array_equal(state, total)


def test_init_by_shape_evaluates_functions_with_their_own_derivative():
    module = outside(lambda self, x: jax.nn.relu(jnp.array([-1.0, 2.0])))
    np.testing.assert_array_equal(module.init_by_shape(KEY, [(2,)])[0], [0.0, 2.0])


def test_init_by_shape_makes_state_too():
    with nn.stateful() as state:
        _, params = Sum.init_by_shape(KEY, [(2,)])
    np.testing.assert_array_equal(state["/"]["total"], [0.0, 0.0])
    assert params == {}


def test_create_and_create_by_shape_give_a_model():
    x = jnp.array([1.0])
    y, model = Bias.create(KEY, x, name="bias")
    assert (y, type(model), model.module) == (jnp.array([2.0]), nn.Model, Bias)
    assert model(x) == 2.0
    y, model = Bias.create_by_shape(KEY, [((1,), jnp.float32)])
    assert (y.shape, type(model), model.module) == ((1,), nn.Model, Bias)
    assert model(x) == 2.0


# partial and shared


def test_partial_is_a_subclass_of_the_same_name():
    partial = Bias.partial(x=jnp.ones(1))
    assert issubclass(partial, Bias)
    assert partial.__name__ == "Bias"
    assert partial.__qualname__ == Bias.__qualname__
    assert partial.__module__ == Bias.__module__
    y, params = partial.init(KEY)
    assert y == partial.call(params) == jnp.array([2.0])


def test_which_of_several_keywords_wins():
    gather = nn.module(lambda **kwargs: kwargs)
    partial = gather.partial(a=1, b=1, c=1).partial(b=2, c=2)
    assert partial.call({}, c=3) == {"a": 1, "b": 2, "c": 3}
    assert gather.call({}) == {}
    network = nn.module(lambda: partial(c=3))
    assert network.init(KEY)[0] == {"a": 1, "b": 2, "c": 3}


def test_which_of_several_names_wins():
    partial = Bias.partial(name="inner").partial(x=jnp.ones(1))
    assert nn.module(lambda: partial()).init(KEY)[1].keys() == {"inner"}
    assert nn.module(lambda: partial(name="call")).init(KEY)[1].keys() == {"call"}
    assert nn.module(lambda: partial.partial(name="outer")()).init(KEY)[1].keys() == {"outer"}
    with nn.capture_module_outputs() as outputs:
        partial.init(KEY)
    assert outputs.as_dict().keys() == {"/inner"}


def test_a_shared_module_has_one_set_of_parameters():
    @nn.module
    def network(x):
        bias = Bias.shared(name="bias")
        assert bias.__name__ == "Bias"
        return bias(bias(x))

    y, params = network.init(KEY, jnp.zeros(1))
    assert y == jnp.array([2.0])
    assert params == {"bias": {"bias": jnp.array([1.0])}}
    assert network.call({"bias": {"bias": jnp.array([5.0])}}, jnp.zeros(1)) == 10.0


def test_a_shared_module_lives_where_it_was_made():
    user = nn.module(lambda use: use(jnp.ones(1)))

    @nn.module
    def network():
        bias = Bias.shared(name="shared")
        return user(bias, name="user")

    y, params = network.init(KEY)
    assert params == {"shared": {"bias": jnp.array([1.0])}, "user": {}}
    assert network.call(params) == y == 2.0


def test_shared_arguments():
    @nn.module
    def network(x):
        dense = Dense.shared(features=2)
        return dense(dense(x)), dense(x, features=2)

    _, params = network.init(KEY, jnp.ones((1, 2)))
    assert jax.tree.map(jnp.shape, params) == {"0": {"kernel": (2, 2), "bias": (2,)}}


def test_shared_outside_of_a_module():
    with pytest.raises(ValueError, match=r"^The shared module should be used during Module appl"):
        Bias.shared()


def test_a_shared_module_keeps_its_name():
    message = r'^Cannot override the name of a shared module: it is "d", got "e"\.'
    for rename in (
        lambda module: module(jnp.ones(1), name="e"),
        lambda module: module.partial(name="e"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.module(lambda rename=rename: rename(Bias.shared(name="d"))).init(KEY)


def test_a_shared_module_ends_with_the_module_that_made_it():
    maker = nn.module(lambda: Bias.shared(name="d"))

    @nn.module
    def network():
        maker()(jnp.ones(1))

    with pytest.raises(ValueError, match=r"^The shared module should be used during .* returned"):
        network.init(KEY)


# State


def test_state_without_a_collection_names_stateful():
    for attempt in (lambda: Sum.init(KEY, 1.0), lambda: Sum.call({}, 1.0), nn.get_state):
        with pytest.raises(ValueError, match=r"^Use the flax\.nn\.stateful context manager"):
            attempt()


def test_a_state_variable_that_does_not_exist():
    with (
        nn.stateful(),
        pytest.raises(ValueError, match=r"^No state variable named `total` exists\."),
    ):
        Sum.call({}, 1.0)


def test_state_without_initializer_gets_no_first_value():
    def apply(self):
        variable = self.state("a")
        assert variable.name == "a"
        with pytest.raises(ValueError, match=r"^No state variable named `a` exists\."):
            variable.value  # noqa: B018
        variable.value = 3
        return variable.value

    with nn.stateful() as state:
        assert outside(apply).init(KEY)[0] == 3
    assert state["/"] == {"a": 3}


def test_state_in_a_collection_that_is_passed():
    with nn.Collection().mutate() as state:
        Sum.init(KEY, 5.0, state)
    assert state.as_dict() == {"/": {"total": 0.0}}
    with nn.stateful() as other, state.mutate() as new_state:
        assert Sum.call({}, 5.0, new_state) == 5.0
    assert new_state.as_dict() == {"/": {"total": 5.0}}
    assert state.as_dict() == {"/": {"total": 0.0}}
    assert other.as_dict() == {}
    with pytest.raises(TypeError, match=r"^collection must be a Collection or None, got dict"):
        Sum.call({}, 5.0, {})


def test_state_of_several_modules():
    network = nn.module(lambda x: (Sum(x), Sum(2 * x, name="second")))
    with nn.stateful() as state:
        _, params = network.init(KEY, 1.0)
    with nn.stateful(state) as state:
        assert network.call(params, 1.0) == (1.0, 2.0)
    with nn.stateful(state) as state:
        assert network.call(params, 1.0) == (2.0, 4.0)
    assert state.as_dict() == {"/Sum_0": {"total": 2.0}, "/second": {"total": 4.0}}


def test_a_state_variable_belongs_to_the_module_that_declared_it():
    def apply(self):
        variable = self.state("a", (), nn.initializers.zeros)
        nn.module(lambda: setattr(variable, "value", 7))(name="inner")

    with nn.stateful() as state:
        outside(apply).init(KEY)
    assert state.as_dict() == {"/": {"a": 7}}


def test_state_variables_do_not_mix_with_stored_values():
    def apply(self):
        nn.get_state().store(3)
        self.state("a").value = 1

    with (
        nn.stateful() as state,
        pytest.raises(
            ValueError, match=r"^State variable `a` cannot be kept .* stored a int there"
        ),
    ):
        outside(apply).init(KEY)
    assert state.as_dict() == {"/": 3}


def test_init_of_a_shared_module_with_state_does_not_update_it():
    @nn.module
    def network(x):
        total = Sum.shared(name="total")
        return total(x), total(x)

    with nn.stateful() as state:
        y, params = network.init(KEY, 1.0)
    assert y == (0.0, 0.0)
    assert state.as_dict() == {"/total": {"total": 0.0}}
    with nn.stateful(state) as state:
        assert network.call(params, 1.0) == (1.0, 2.0)
    assert state.as_dict() == {"/total": {"total": 2.0}}


def test_init_gives_state_anew_and_is_refused_where_it_cannot():
    with nn.stateful(nn.Collection({"/": {"total": 9.0}})) as state:
        Sum.init(KEY, 1.0)
    assert state.as_dict() == {"/": {"total": 0.0}}
    with (
        nn.stateful(mutable=False),
        pytest.raises(ValueError, match=r"^Collection is not mutable\."),
    ):
        Sum.init(KEY, 1.0)


# Functions as modules, further methods, transparent modules


def test_a_function_becomes_a_module_of_its_name():
    @nn.module
    def Network(x, scale=2):  # noqa: N802
        """The function."""
        return scale * Bias(x)

    assert issubclass(Network, nn.Module)
    assert (Network.__name__, Network.__doc__) == ("Network", "The function.")
    assert Network.__qualname__.endswith("<locals>.Network")
    assert Network.__module__ == __name__
    assert str(inspect.signature(Network)) == "(x, scale=2)"
    y, params = Network.init(KEY, jnp.ones(1))
    assert y == jnp.array([4.0])
    assert Network.call(params, jnp.ones(1), scale=3) == 6.0


class Methods(nn.Module):
    def apply(self, x, factor=1):
        return factor * x + self.param("bias", x.shape, nn.initializers.ones)

    @nn.module_method
    def norm(self, power=2, **kwargs):
        """The norm of the bias."""
        return jnp.sum(self.get_param("bias") ** power)

    @nn.module_method
    def state_of(self, x):
        return Sum(x)


def test_methods_of_a_module():
    assert Methods.norm.__name__ == "norm"
    assert Methods.norm.__qualname__ == "Methods.norm"
    assert Methods.norm.__doc__ == "The norm of the bias."
    assert str(inspect.signature(Methods.norm)) == "(power=2, **kwargs)"
    assert issubclass(Methods.norm, Methods)
    assert Methods.norm is Methods.norm
    assert Methods.norm.call({"bias": jnp.array([1.0, 3.0])}) == 10.0
    partial = Methods.partial(power=3, factor=2)
    assert partial.norm.call({"bias": jnp.array([1.0, 3.0])}) == 28.0
    assert partial.norm is not Methods.norm


def test_methods_of_a_shared_module():
    @nn.module
    def network(x):
        layer = Methods.shared(name="layer")
        y = layer(x)
        return y, layer.norm(), layer.norm(power=3)

    (y, square, cube), params = network.init(KEY, 2 * jnp.ones(2))
    np.testing.assert_array_equal(y, [3.0, 3.0])
    assert (square, cube) == (2.0, 2.0)
    assert params.keys() == {"layer"}
    assert network.call({"layer": {"bias": 2 * jnp.ones(2)}}, jnp.ones(2))[1:] == (8.0, 16.0)


def test_a_method_before_the_parameters_exist():
    network = nn.module(lambda: Methods.shared().norm())
    with pytest.raises(ValueError, match=r"^Parameter with name 'bias' does not exist\."):
        network.init(KEY)


def transparent(*names):
    class Transparent(nn.TransparentModule):
        def apply(self, x):
            for name in names:
                x = Bias(x, name=name)
            return x

    return Transparent


def test_a_transparent_module_shows_neither_in_parameters_nor_in_paths():
    module = transparent("0")
    with nn.capture_module_outputs() as outputs:
        y, params = module.init(KEY, jnp.ones(1))
    assert y == jnp.array([2.0])
    assert params == {"bias": jnp.array([1.0])}
    assert outputs.as_dict() == {"/": [y, y]}
    assert module.call({"bias": jnp.array([3.0])}, jnp.ones(1)) == 4.0


def test_a_transparent_module_inside_of_another():
    @nn.module
    def network(x):
        return transparent("0")(x, name="t")

    with nn.capture_module_outputs() as outputs:
        y, params = network.init(KEY, jnp.ones(1))
    assert params == {"t": {"bias": jnp.array([1.0])}}
    assert outputs.as_dict().keys() == {"/", "/t"}
    assert network.call(params, jnp.ones(1)) == y == 2.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"^Transparent modules should have exactly one child\. Got \[\]"),
        (("0", "1"), r"^Transparent modules should have exactly one child\."),
        (("a",), r"^Transparent modules should contain an unnamed child\. Got \['a'\]"),
    ],
)
def test_what_a_transparent_module_may_hold(names, message):
    with pytest.raises(ValueError, match=message):
        transparent(*names).init(KEY, jnp.ones(1))


# The stacks


def test_a_thread_has_its_own_stacks():
    errors, states = [], []

    def other_thread():
        try:
            Bias(jnp.ones(1))
        except ValueError as error:
            errors.append(str(error))
        assert not nn.is_stateful()
        with nn.stateful() as inner:
            Sum.init(KEY, 5.0)
        states.append(inner.as_dict())

    @nn.module
    def network():
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()

    with nn.stateful() as state, nn.capture_module_outputs() as captured:
        network.init(KEY)
    assert errors[0].startswith("A Module should only be instantiated directly inside")
    assert state.as_dict() == {}
    assert captured.as_dict() == {"/": [None]}
    assert states == [{"/": {"total": 0.0}}]


def test_many_threads_at_once():
    network = nn.module(lambda x: Sum(Bias(x)))
    with nn.stateful() as state:
        _, params = network.init(KEY, jnp.zeros(1))
    results = {}
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        own = state
        for _ in range(20):
            with nn.stateful(own) as own:
                network.call(params, jnp.full(1, float(i)))
        results[i] = float(own["/Sum_1"]["total"][0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: 20.0 * (i + 1) for i in range(8)}


def test_the_stacks_unwind_on_exceptions():
    def failing():
        with nn.stateful(), nn.capture_module_outputs():
            raise ArithmeticError

    network = nn.module(lambda: nn.module(failing)())
    with pytest.raises(ArithmeticError):
        network.init(KEY)
    assert not nn.is_stateful()
    with pytest.raises(ValueError, match=r"^A Module should only be instantiated"):
        Bias(jnp.ones(1))
    with nn.stateful() as state:
        with pytest.raises(ArithmeticError):
            network.init(KEY)
        assert nn.get_state() is state
