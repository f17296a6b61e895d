"""Collection and stateful: where values are kept, and who may store them when."""

import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from small_modules import Store, Sum

from batchnorm.flax import nn

pytestmark = pytest.mark.filterwarnings("error")

KEY = jax.random.PRNGKey(0)

TRANSFORMED = (
    r"^Stateful operations are not allowed when the Collection is created outside of the"
    r" current Jax transformation"
)


class Loop(nn.Module):
    def apply(self, x, collection):
        store = Store.shared(collection=collection, name="store")
        for i in range(2):
            store(x + i)


# stateful


def test_stateful_yields_a_copy():
    with nn.stateful() as state:
        assert state.as_dict() == {}
        Sum.init(KEY, 1.0)
    with nn.stateful(state) as new_state:
        assert new_state.as_dict() == {"/": {"total": 0.0}}
        Sum.call({}, 3.0)
        assert new_state.as_dict() == {"/": {"total": 3.0}}
    assert new_state.as_dict() == {"/": {"total": 3.0}}
    assert state.as_dict() == {"/": {"total": 0.0}}


def test_the_innermost_stateful_wins():
    assert not nn.is_stateful()
    with nn.stateful() as outer:
        assert nn.is_stateful()
        with nn.stateful() as inner:
            assert nn.get_state() is inner
            Sum.init(KEY, 1.0)
        assert nn.get_state() is outer
    assert not nn.is_stateful()
    assert inner.as_dict() == {"/": {"total": 0.0}}
    assert outer.as_dict() == {}


def test_stateful_that_is_not_mutable_can_be_read():
    class Read(nn.Module):
        def apply(self):
            assert self.is_stateful()
            return self.state("total", (), nn.initializers.zeros).value

    state = nn.Collection({"/": {"total": 5.0}})
    with nn.stateful(state, mutable=False) as same:
        assert Read.call({}) == 5.0
        assert Read.call({}) == 5.0
        with pytest.raises(ValueError, match=r"^Collection is not mutable\. Use the `mutate`"):
            Sum.call({}, 1.0)
        assert same is nn.get_state() is state
        same["/"]["total"] = 7.0
        assert Read.call({}) == 7.0
    assert state.as_dict() == {"/": {"total": 7.0}}
    with (
        nn.stateful(state) as mutable,
        nn.stateful(mutable, mutable=False) as frozen,
    ):
        with pytest.raises(ValueError, match=r"^Collection is not mutable\."):
            Sum.call({}, 1.0)
        assert frozen.state is mutable.state
        mutable["/"]["total"] = 8.0
        assert Read.call({}) == 8.0
    assert state.as_dict() == {"/": {"total": 7.0}}


@pytest.mark.parametrize("state", [{}, {"/": {"total": 1.0}}, 3])
def test_stateful_wants_a_collection(state):
    with (
        pytest.raises(TypeError, match=r"^state must be a Collection or None, got (dict|int)"),
        nn.stateful(state),
    ):
        pass
    assert not nn.is_stateful()


# Collection


def test_store_returns_what_it_replaces_and_retrieve_what_is_stored():
    class Probe(nn.Module):
        def apply(self, collection):
            return (
                collection.retrieve(),
                collection.retrieve(default=5),
                collection.store(1),
                collection.retrieve(default=5),
                collection.store(2),
            )

    with nn.Collection().mutate() as collection:
        assert Probe.call({}, collection) == (None, 5, None, 1, 1)
    assert collection["/"] == 2


def test_mutate_makes_a_copy_that_is_mutable_for_a_while():
    original = nn.Collection({"/": [1]})
    with original.mutate() as copy:
        found = Store.call({}, 2, copy)
        assert found == [1]
        found.append(3)
    assert (original["/"], copy["/"]) == ([1], 2)
    for frozen in (original, copy):
        with pytest.raises(ValueError, match=r"^Collection is not mutable\. Use the `mutate`"):
            Store.call({}, 3, frozen)
    assert (original["/"], copy["/"]) == ([1], 2)
    with pytest.raises(ArithmeticError), original.mutate() as copy:
        raise ArithmeticError
    with pytest.raises(ValueError, match=r"^Collection is not mutable\."):
        Store.call({}, 3, copy)


def test_as_dict_is_a_copy_of_the_outer_dict_alone():
    collection = nn.Collection({"/": {"a": 1}})
    copy = collection.as_dict()
    copy["/"]["a"] = 2
    copy["/b"] = 3
    assert collection.as_dict() == collection.state == {"/": {"a": 2}}
    assert repr(collection) == "Collection({'/': {'a': 2}})"


@pytest.mark.parametrize("mutable", [nn.Collection.mutate, nn.stateful])
def test_what_is_written_into_a_mutable_copy_counts(mutable):
    original = nn.Collection({path: {"mean": 0.0, "list": [1]} for path in ("/a", "/b")})
    with mutable(original) as new:
        for variables in new.as_dict().values():
            variables.update(mean=5.0)
            variables["list"].append(2)
        new.state["/c"] = {"mean": 7.0}
        new["/a"]["var"] = 3.0
    assert new.as_dict() == {
        "/a": {"mean": 5.0, "list": [1, 2], "var": 3.0},
        "/b": {"mean": 5.0, "list": [1, 2]},
        "/c": {"mean": 7.0},
    }
    assert original.as_dict() == {path: {"mean": 0.0, "list": [1]} for path in ("/a", "/b")}


def test_virtual_batches_are_synchronized_by_writing_into_as_dict():
    batches = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])
    with nn.stateful() as state:
        _, params = nn.BatchNorm.init(KEY, batches[0])

    @jax.jit
    def step(state, batches):
        def of_one(x):
            with nn.stateful(state) as new_state:
                nn.BatchNorm.call(params, x, momentum=0.5)
            return new_state

        with jax.vmap(of_one)(batches).mutate() as new_state:
            for variables in new_state.as_dict().values():
                variables.update(jax.tree.map(lambda each: each.mean(axis=0), variables))
        return new_state

    synchronized = step(state, batches)
    assert synchronized["/"] == {"mean": jnp.array([2.0]), "var": jnp.array([1.0])}
    assert state["/"] == {"mean": jnp.array([0.0]), "var": jnp.array([1.0])}


def test_a_collection_holds_the_very_objects_that_it_is_given():
    first, second = object(), {"a": [1]}
    given = {"/": first}
    collection = nn.Collection(given)
    assert collection.state is given
    assert collection["/"] is first
    assert collection.as_dict()["/"] is first

    @nn.module
    def exchange(into):
        return into.retrieve(), into.store(second), into.retrieve()

    with collection.mutate() as copy:
        before, replaced, after = exchange.call({}, copy)
    assert before is replaced is first
    assert after is copy["/"] is second


def test_a_state_variable_is_written_where_it_stands():
    class Swap(nn.Module):
        def apply(self, x):
            variable = self.state("x")
            found, variable.value = variable.value, x
            return found

    first, second = [1], [2]
    original = nn.Collection({"/swap": {"x": first, "y": 3}})
    with nn.stateful(original) as state:
        variables = state.as_dict()["/swap"]
        variables["x"] = first
        assert Swap.call({}, second, name="swap") is first
        assert variables is state["/swap"]
        assert variables["x"] is second
        variables["x"] = first
        assert Swap.call({}, second, name="swap") is first
    assert variables == {"x": [2], "y": 3}
    assert original["/swap"] == {"x": [1], "y": 3}


def test_a_state_variable_that_is_refused_changes_nothing():
    original = nn.Collection({"/": {"total": 5.0}})
    with nn.stateful(original, mutable=False) as state:
        variables = state["/"]
        with pytest.raises(ValueError, match=r"^Collection is not mutable\."):
            Sum.call({}, 1.0)
    assert variables is original["/"]
    assert variables == {"total": 5.0}


def test_a_missing_path_is_a_key_error():
    with pytest.raises(KeyError, match=r"Nothing is stored under '/b'\. Paths: \['/a'\]"):
        nn.Collection({"/a": 1})["/b"]


def test_an_empty_collection_is_true():
    assert nn.Collection()


def test_a_collection_is_made_from_a_dict():
    with pytest.raises(TypeError, match=r"^state must be a dict from paths to values, got list"):
        nn.Collection([])


def test_store_and_retrieve_outside_of_a_module():
    with nn.Collection().mutate() as collection:
        with pytest.raises(ValueError, match=r"^store should only be used inside a module's"):
            collection.store(1)
        with pytest.raises(ValueError, match=r"^retrieve should only be used inside a module's"):
            collection.retrieve()


# Paths


def test_keys_are_paths():
    @nn.module
    def inner(collection):
        Store(2, collection)
        Store(3, collection, name="b")

    @nn.module
    def outer(collection):
        collection.store(1)
        inner(collection, name="a")

    with nn.Collection().mutate() as collection:
        outer.init(KEY, collection)
    assert collection.as_dict() == {"/": 1, "/a/Store_0": 2, "/a/b": 3}
    with nn.Collection().mutate() as collection:
        outer.init(KEY, collection, name="root")
    assert collection.as_dict() == {"/root": 1, "/root/a/Store_0": 2, "/root/a/b": 3}


def test_a_shared_module_stores_where_it_was_made():
    with nn.Collection().mutate() as collection:
        Loop.init(KEY, 5, collection)
    assert collection.as_dict() == {"/store": 6}


def test_paths_begin_at_the_module_in_which_the_collection_was_made():
    @nn.module
    def nested(x):
        with nn.Collection().mutate() as collection:
            Loop(x, collection, name="a")
            Loop(2 * x, collection, name="b")
        return collection

    @nn.module
    def network(x):
        return nested(x, name="nested")

    for collection, _ in (nested.init(KEY, 5), nested.init(KEY, 5, name="n"), network.init(KEY, 5)):
        assert collection.as_dict() == {"/a/store": 6, "/b/store": 11}


def test_two_roots_need_names():
    message = r"^When multiple top-level module calls use a Collection each top-level module shoul"
    for first, second in [({}, {}), ({"name": "a"}, {}), ({}, {"name": "b"})]:
        with nn.Collection().mutate() as collection:
            Store.call({}, 1, collection, **first)
            with pytest.raises(ValueError, match=message):
                Store.call({}, 2, collection, **second)
        assert list(collection.as_dict().values()) == [1]
    with nn.Collection().mutate() as collection:
        Store.call({}, 1, collection, name="a")
        Store.call({}, 2, collection, name="b")
        assert Store.call({}, 3, collection, name="a") == 1
    assert collection.as_dict() == {"/a": 3, "/b": 2}


def test_unnamed_roots_may_read():
    state = nn.Collection({"/": {"total": 5.0}})
    read = type(
        "Read",
        (nn.Module,),
        {"apply": lambda self, state: self.state("total", collection=state).value},
    )
    with state.mutate() as state:
        assert [read.call({}, state), read.call({}, state)] == [5.0, 5.0]


def test_the_module_that_made_a_collection_does_not_store_in_it():
    for use in (lambda c: c.store(1), lambda c: c.retrieve()):

        @nn.module
        def network(use=use):
            with nn.Collection().mutate() as collection:
                use(collection)

        with pytest.raises(ValueError, match=r"^State should be stored from within a module"):
            network.init(KEY)


def test_a_shared_module_from_outside_does_not_store():
    collections = []

    @nn.module
    def inner(store):
        with nn.Collection().mutate() as collection:
            collections.append(collection)
            store(1, collection)

    @nn.module
    def network():
        inner(Store.shared())

    with pytest.raises(ValueError, match=r"^Trying to capture state outside the scope"):
        network.init(KEY)
    assert collections[0].as_dict() == {}


# Collections and JAX


def test_a_collection_is_a_pytree():
    state = nn.Collection({"/": {"total": jnp.array(5.0)}})
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    assert isinstance(doubled, nn.Collection)
    assert doubled["/"]["total"] == 10.0
    assert [float(leaf) for leaf in jax.tree.leaves(state)] == [5.0]
    assert jax.tree.structure(state) == jax.tree.structure(doubled)
    assert jax.tree.unflatten(jax.tree.structure(state), [None])["/"] == {"total": None}


def test_state_through_jit_and_scan():
    traced = []

    @jax.jit
    def step(state, x):
        traced.append(None)
        with nn.stateful(state) as new_state:
            return new_state, Sum.call({}, x)

    with nn.stateful() as state:
        Sum.init(KEY, 1.0)
    first, y = step(state, 2.0)
    second, z = step(first, 3.0)
    assert (float(y), float(z), float(second["/"]["total"])) == (2.0, 5.0, 5.0)
    assert len(traced) == 1
    total, ys = jax.lax.scan(step, state, jnp.arange(4.0))
    np.testing.assert_array_equal(ys, [0.0, 1.0, 3.0, 6.0])
    assert total["/"]["total"] == 6.0


def test_state_through_vmap():
    def step(state, x):
        with nn.stateful(state) as new_state:
            Sum.call({}, x)
        return new_state

    state = nn.Collection({"/": {"total": jnp.zeros(3)}})
    state = jax.vmap(step)(state, jnp.arange(3.0))
    np.testing.assert_array_equal(state["/"]["total"], [0.0, 1.0, 2.0])


def test_state_beside_a_gradient():
    def loss(x, state):
        with nn.stateful(state) as new_state:
            y = Sum.call({}, x)
        return y**2, new_state

    state = nn.Collection({"/": {"total": jnp.array(1.0)}})
    gradient, new_state = jax.grad(loss, has_aux=True)(2.0, state)
    assert gradient == 6.0
    assert new_state["/"]["total"] == 3.0
    assert not isinstance(new_state["/"]["total"], jax.core.Tracer)


def test_a_mutable_collection_does_not_go_through_jit():
    with (
        nn.Collection().mutate() as collection,
        pytest.raises(ValueError, match=r"A mutable collection should not be transformed by Jax\."),
    ):
        jax.jit(lambda collection: collection)(collection)
    jax.jit(lambda collection: collection)(collection)


def test_a_collection_keeps_its_place_when_it_goes_through_jit():
    @nn.module
    def inner(state, x):
        @jax.jit
        def step(state, x):
            with nn.stateful(state) as new_state:
                Sum(x, name="sum")
            return new_state

        return step(state, x)

    @nn.module
    def network(x):
        state = nn.Collection({"/inner/sum": {"total": 1.0}})
        return inner(state, x, name="inner").as_dict()

    state, _ = network.init(KEY, 2.0, name="network")
    assert state == {"/inner/sum": {"total": 0.0}}
    state = network.call({"inner": {"sum": {}}}, 2.0, name="network")
    assert state == {"/inner/sum": {"total": 3.0}}


def test_a_collection_does_not_keep_a_transformation_alive():
    kept = []

    @jax.jit
    def run(x):
        with nn.stateful() as state:
            Store.call({}, 3, state)
            kept.extend([state, weakref.ref(state.mutation.trace)])
        return x

    run(1.0)
    gc.collect()
    state, trace = kept
    assert state.as_dict() == {"/": 3}
    assert trace() is None


@pytest.mark.parametrize(
    "transformation",
    [jax.jit, jax.vmap, jax.checkpoint, lambda f: lambda x: jax.jvp(f, [x], [x]), jax.jacrev],
    ids=["jit", "vmap", "checkpoint", "jvp", "jacrev"],
)
def test_a_value_of_an_inner_transformation_is_refused(transformation):
    x = jnp.ones(2)
    with nn.stateful(nn.Collection({"/": {"total": x[0]}})) as state:
        with pytest.raises(ValueError, match=TRANSFORMED):
            transformation(lambda x: Sum.call({}, x))(x)
        assert state.as_dict() == {"/": {"total": x[0]}}
    with nn.capture_module_outputs() as outputs:
        with pytest.raises(ValueError, match=TRANSFORMED):
            transformation(lambda x: nn.module(lambda: 2 * x).call({}))(x)
        assert outputs.as_dict() == {}


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.vmap, jax.grad])
def test_values_of_the_same_and_of_outer_transformations_are_stored(outer):
    class Nested(nn.Module):
        def apply(self, state, outermost, y):
            def inner(x):
                state.store(1.0)
                state.store({"a": y, "b": outermost})
                with pytest.raises(ValueError, match=TRANSFORMED):
                    state.store({"a": y, "b": x})
                return x

            jax.vmap(inner)(jnp.ones(2))
            jax.jit(inner)(jnp.ones(2))

    def run(x):
        @jax.checkpoint
        def nested(y):
            with nn.Collection().mutate() as state:
                Nested.call({}, state, x, y)
            return state["/"]["a"] + state["/"]["b"]

        return nested(2 * x)

    x = jnp.ones(1) if outer is jax.vmap else 1.0
    assert outer(run)(x) == 3.0  # by chance also the derivative


def test_constants_are_stored_from_inside_of_a_transformation():
    with nn.stateful() as state:
        jax.jit(lambda x: Sum.init(KEY, x))(jnp.ones(2))
    np.testing.assert_array_equal(state["/"]["total"], [0.0, 0.0])


def test_no_tracer_outlives_its_transformation():
    @nn.module
    def network(x):
        with nn.Collection().mutate() as collection:
            store = Store.shared(name="store")
            store(x, collection)
            store(Sum(x), collection)
        return collection, nn.Model(Sum, {})(x)

    @jax.jit
    def step(params, state, x):
        with nn.stateful(state) as new_state, nn.capture_module_outputs() as outputs:
            network.call(params, x)
            with pytest.raises(ValueError, match=TRANSFORMED):
                jax.vmap(lambda x: Store.call({}, x, new_state))(x)
        return new_state, outputs

    def init(x):
        with nn.stateful() as state:
            return network.init(KEY, x), state

    x = jnp.ones(2)
    with jax.checking_leaks():
        ((collection, _), params), state = jax.jit(init)(x)
        new_state, outputs = step(params, state, x)
    np.testing.assert_array_equal(collection["/store"], [0.0, 0.0])
    assert new_state.as_dict().keys() == {"/Sum_0", "/Sum:0"}
    assert outputs.as_dict().keys() == {"/", "/store", "/Sum_0", "/Sum:0"}


# Saving


def test_saving_with_flax():
    state = nn.Collection({"/a": {"mean": jnp.array([1.0, 2.0])}, "/b": {"mean": jnp.ones(1)}})
    assert serialization.to_state_dict(state).keys() == {"/a", "/b"}
    target = jax.tree.map(jnp.zeros_like, state)
    for template in (target, nn.Collection()):
        restored = serialization.from_bytes(template, serialization.to_bytes(state))
        assert isinstance(restored, nn.Collection)
        assert restored.as_dict().keys() == {"/a", "/b"}
        np.testing.assert_array_equal(restored["/a"]["mean"], [1.0, 2.0])
    np.testing.assert_array_equal(target["/a"]["mean"], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"^The saved Collection lacks the paths \['/b'\]"):
        serialization.from_state_dict(state, {"/a": {"mean": jnp.ones(2)}})


def test_flax_is_not_needed():
    script = (
        "import sys; sys.modules['flax'] = None\n"
        "import jax; from batchnorm.flax import nn\n"
        "with nn.stateful() as state: nn.module(lambda: nn.get_state().store(1)).init("
        "jax.random.PRNGKey(0))\n"
        "assert state['/'] == 1 and 'flax.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
