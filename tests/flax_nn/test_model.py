"""Model: a module with its parameters; and looking at the outputs inside of it."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from small_modules import Bias, Dense, Sum

from batchnorm.flax import nn

pytestmark = pytest.mark.filterwarnings("error")

KEY = jax.random.PRNGKey(0)
X = jnp.array([1.0])


class Nested(nn.Module):
    def apply(self, x):
        x = Bias(x, name="bias_0")
        return Bias(x, name="bias_1")


class Methods(Bias):
    attribute = 3

    @nn.module_method
    def norm(self, power=2):
        return jnp.sum(self.get_param("bias") ** power)


def bias_model(value=1.0):
    return nn.Model(Bias, {"bias": jnp.array([value])})


# The model as an object


def test_a_model_is_called_like_a_function():
    model = bias_model()
    assert model(X) == model(x=X) == 2.0
    assert model.module is Bias
    assert model.params == {"bias": jnp.array([1.0])}


def test_a_model_is_frozen_and_replaced():
    model = bias_model()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.params = {}
    other = model.replace(params={"bias": jnp.array([5.0])})
    assert (other(X), model(X)) == (6.0, 2.0)
    assert model.replace(module=Methods).norm() == 1.0


def test_models_hash_by_identity():
    params = {"bias": jnp.array([1.0])}
    a, b = nn.Model(Bias, params), nn.Model(Bias, params)
    assert len({a, a, b}) == 2
    assert a == a
    assert a != b


def test_parameters_are_the_very_objects_that_were_given():
    tree = {"a": [1.0]}

    class Tree(nn.Module):
        def apply(self):
            return self.param("tree", None, lambda rng, shape: tree), self.get_param("tree")

    (declared, got), params = Tree.init(KEY)
    assert declared is got is params["tree"] is tree
    model = nn.Model(Tree, params)
    assert model.params is params
    assert model.replace(module=Bias).params is params
    params["tree"] = other = {"b": [2.0]}
    for declared, got in (model(), Tree.call(params), Tree.partial().call(params)):
        assert declared is got is other


def test_methods_of_a_model():
    model = nn.Model(Methods, {"bias": jnp.array([1.0, 2.0])})
    assert model.norm() == 5.0
    assert model.norm(power=3) == model.norm(3) == 9.0


@pytest.mark.parametrize("name", ["nothing", "attribute", "init", "__name__", "_private"])
def test_another_attribute_does_not_exist(name):
    with pytest.raises(AttributeError, match=rf'^No attribute named "{name}"\.'):
        getattr(nn.Model(Methods, {}), name)


@pytest.mark.parametrize("module", [3, dict, lambda x: x])
def test_a_model_wants_a_module(module):
    with pytest.raises(TypeError, match=r"^module must be a subclass of nn\.Module, got"):
        nn.Model(module, {})


def test_models_are_copied_and_pickled():
    model = bias_model()
    for twin in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin is not model
        assert twin(X) == 2.0


# The model and JAX


def test_a_model_is_a_pytree_over_its_parameters():
    model = bias_model()
    assert [float(leaf[0]) for leaf in jax.tree.leaves(model)] == [1.0]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert isinstance(doubled, nn.Model)
    assert (doubled.module, doubled(X)) == (Bias, 3.0)
    assert jax.tree.structure(model) != jax.tree.structure(model.replace(module=Methods))


def test_jit_of_a_model_and_with_a_model():
    model = bias_model()
    assert jax.jit(model)(X) == 2.0
    assert jax.jit(bias_model(5.0))(X) == 6.0

    traced = []

    @jax.jit
    def run(model, x):
        traced.append(None)
        return model(x)

    assert run(model, X) == 2.0
    assert run(bias_model(5.0), X) == 6.0
    assert len(traced) == 1


def test_the_gradient_by_a_model_is_a_model():
    model = nn.Model(Dense.partial(features=1), {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)})
    x = jnp.array([[2.0, 3.0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda model: (model(x) ** 2).sum()))(model)
    assert value == 36.0
    assert isinstance(gradient, nn.Model)
    assert gradient.module is model.module
    np.testing.assert_array_equal(gradient.params["kernel"], [[24.0], [36.0]])
    np.testing.assert_array_equal(gradient.params["bias"], [12.0])


def test_vmap_over_inputs_and_over_models():
    models = nn.Model(Bias, {"bias": jnp.array([[1.0], [2.0], [3.0]])})
    xs = jnp.array([[1.0], [10.0], [100.0]])
    np.testing.assert_array_equal(jax.vmap(bias_model())(xs), xs + 1)
    run = jax.vmap(lambda model, x: model(x))
    np.testing.assert_array_equal(run(models, xs), [[2.0], [12.0], [103.0]])
    ensemble = jax.vmap(lambda rng: Dense.create(rng, jnp.ones((1, 2)), features=3)[1])
    assert ensemble(jax.random.split(KEY, 4)).params["kernel"].shape == (4, 2, 3)


# Models inside of modules


def inside(model, name=None, times=1):
    @nn.module
    def network(x):
        x = Bias(x)
        for _ in range(times):
            x = model(x, name=name)
        return Bias(x)

    return network


@pytest.mark.parametrize(("name", "path"), [("inner", "/inner"), (None, "/Bias:0")])
def test_a_model_inside_of_a_module(name, path):
    network = inside(bias_model(10.0), name)
    y, params = network.init(KEY, X)
    assert y == network.call(params, X) == 13.0
    assert params.keys() == {"Bias_0", "Bias_1"}  # without the model, which takes no number
    with nn.capture_module_outputs() as outputs:
        network.call(params, X)
    assert outputs.as_dict() == {"/": [13.0], "/Bias_0": [2.0], path: [12.0], "/Bias_1": [13.0]}


@pytest.mark.parametrize(("name", "path"), [("inner", "/inner"), (None, "/Sum:0")])
def test_a_stateful_model_inside_of_a_module(name, path):
    network = inside(nn.Model(Sum, {}), name)
    with nn.stateful() as state:
        _, params = network.init(KEY, X)
    assert state.as_dict() == {path: {"total": 0.0}}
    for expected in (2.0, 4.0):
        with nn.stateful(state) as state:
            network.call(params, X)
        assert state.as_dict() == {path: {"total": expected}}


def test_unnamed_models_inside_of_a_module_are_kept_apart_and_those_of_a_name_are_not():
    x = jnp.array([3.0])
    with nn.stateful() as state:
        _, params = inside(nn.Model(Sum, {}), times=2).init(KEY, x)
    assert state.as_dict().keys() == {"/Sum:0", "/Sum:1"}
    network = inside(nn.Model(Sum, {}), "sum", times=2)
    with nn.stateful() as state:
        network.init(KEY, x)
    with nn.stateful(state) as state:
        network.call(params, x)
    assert state.as_dict() == {"/sum": {"total": 8.0}}


def test_init_around_a_trained_model_keeps_its_state():
    trained = nn.Collection({"/Sum:0": {"total": X}})
    network = inside(nn.Model(Sum, {}))
    with nn.stateful(trained) as state:
        network.init(KEY, X)
    assert state.as_dict() == {"/Sum:0": {"total": 1.0}}


def test_an_unnamed_model_below_the_module_that_made_the_collection():
    @nn.module
    def network(x):
        with nn.stateful(nn.Collection({"/": {"total": 1.0}})) as state:
            nn.Model(Sum, {})(x)
        return state.as_dict()

    assert network.call({}, 2.0) == {"/": {"total": 3.0}}


# The outputs inside of a model


def nested_model():
    return Nested.create(KEY, X)[1]


def test_capturing_the_outputs_of_all_modules():
    model = nested_model()
    with nn.capture_module_outputs() as outputs:
        model(X)
    expected = {"/": [3.0], "/bias_0": [2.0], "/bias_1": [3.0]}
    assert outputs.as_dict() == expected
    model(X)
    assert outputs.as_dict() == expected


def test_a_shared_module_has_an_output_for_each_use():
    @nn.module
    def network(x):
        bias = Bias.shared(name="bias")
        return bias(bias(x))

    with nn.capture_module_outputs() as outer, nn.capture_module_outputs() as inner:
        network.init(KEY, X)
    assert outer.as_dict() == inner.as_dict() == {"/": [3.0], "/bias": [2.0, 3.0]}


def test_the_outputs_of_a_module_stay_in_one_list():
    twice = nn.Model(nn.module(lambda x: 2 * x), {})
    with nn.capture_module_outputs() as outputs:
        twice(1, name="twice")
        listed = outputs.as_dict()["/twice"]
        twice(2, name="twice")
        with pytest.raises(ValueError, match=r"^Stateful operations are not allowed"):
            jax.vmap(lambda x: twice(x, name="twice"))(X)
        assert listed == [2, 4]
        listed.remove(2)
        twice(3, name="twice")
    assert outputs["/twice"] is listed
    assert listed == [4, 6]


def test_capturing_inside_of_jit():
    @jax.jit
    def run(model, x):
        with nn.capture_module_outputs() as outputs:
            model(x)
        return outputs

    assert run(nested_model(), X).as_dict() == {"/": [3.0], "/bias_0": [2.0], "/bias_1": [3.0]}


def test_truncating_at_paths():
    model = nested_model()
    assert model.truncate_at("/bias_0")(X) == [2.0]
    assert model.truncate_at(["/bias_0", "/"])(X) == [[2.0], [3.0]]
    assert model.truncate_at({"a": "/bias_1"})(X) == {"a": [3.0]}
    assert jax.jit(model.truncate_at("/bias_0"))(X)[0] == 2.0
    assert model.truncate_at("/bias_0").params is model.params


def test_truncating_what_is_truncated():
    assert nested_model().truncate_at("/bias_0").truncate_at("/bias_1")(X) == [3.0]


def test_truncating_at_a_path_that_no_module_has():
    truncated = nested_model().truncate_at("/bias_2")
    with pytest.raises(KeyError, match=r"Nothing is stored under '/bias_2'\. Paths: .*'/bias_1'"):
        truncated(X)


def test_truncating_wants_its_arguments():
    with pytest.raises(ValueError, match=r"^`wrapped_module` and `truncate_path` are required"):
        nested_model().truncate_at(None)(X)


def test_truncating_a_model_with_a_transformation_inside():
    @nn.module
    def network(x):
        x = Bias(x, name="before")
        return jax.checkpoint(lambda x: Bias(x, name="inside"))(x)

    _, model = network.create(KEY, X)
    assert model.truncate_at(["/before", "/"])(X) == [[2.0], [3.0]]
    with pytest.raises(KeyError, match=r"Nothing is stored under '/inside'"):
        model.truncate_at("/inside")(X)


def test_truncating_a_stateful_model():
    network = nn.module(lambda x: Sum(Bias(x, name="bias"), name="sum") + 1)
    with nn.stateful() as state:
        _, model = network.create(KEY, X)
    with nn.stateful(state) as state:
        assert model.truncate_at("/sum")(X) == [2.0]
    assert state.as_dict() == {"/sum": {"total": 2.0}}


# Saving


def test_saving_a_model_with_flax():
    saved = serialization.to_bytes(bias_model(5.0))
    restored = serialization.from_bytes(bias_model(), saved)
    assert isinstance(restored, nn.Model)
    assert restored(X) == 6.0
    with pytest.raises(ValueError, match=r"^A saved Model has the entry params alone, got \['a'\]"):
        serialization.from_state_dict(bias_model(), {"a": 1})
