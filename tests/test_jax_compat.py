"""What batchnorm.jax._compat takes from JAX without a promise: a test for each, by its name."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from batchnorm.jax import _compat as compat

X, S = jnp.arange(6.0).reshape(2, 3), jnp.array([1.0, 2.0, 3.0])


class Product:
    """s·x and 2·s·x, linear in x, as one primitive; `seen` is what its rules were given."""

    def __init__(self):
        self.seen = []
        self.primitive = compat.primitive("product", self.types, jax.jit(self))
        compat.set_lowering(self.primitive, compat.lowering(self.in_jnp))

    def types(self, s, x):
        return [x, x]

    def in_jnp(self, s, x):
        return [s * x, 2 * s * x]

    def __call__(self, s, x):
        return self.primitive.bind(s, x)

    def transpose(self, cotangents, s, x):
        self.seen.append(cotangents)
        one, two = (0 if each is None else each for each in cotangents)
        return [None, s * (one + 2 * two)]

    def jvp(self, primals, tangents):
        self.seen.append(tangents)
        s, x_dot = primals[0], tangents[1]
        return self(*primals), [None, self(s, x_dot)[1]]  # a wrong None, to be seen


@pytest.fixture
def product():
    return Product()


def test_primitive(product):
    for results in (product(S, X), jax.jit(product)(S, X)):
        np.testing.assert_array_equal(results, [S * X, 2 * S * X])
    assert "product" in str(jax.make_jaxpr(product)(S, X))


def test_set_jvp(product):
    compat.set_jvp(product.primitive, product.jvp)
    _, dots = jax.jvp(partial(product, S), [X], [X + 1])
    np.testing.assert_array_equal(dots, [0 * X, 2 * S * (X + 1)])
    assert product.seen[0][0] is None, "the tangent of what is not differentiated"


def test_set_transpose(product):
    compat.set_transpose(product.primitive, product.transpose)
    transposed = jax.linear_transpose(lambda x: product(S, x)[1], X)
    np.testing.assert_array_equal(transposed(X)[0], 2 * S * X)
    assert product.seen[0][0] is None, "the cotangent of a result that is not used"


def test_set_batcher(product):
    seen = []

    def rule(axis, operands, dims):
        seen.append((axis.name, axis.size, dims))
        return product(*operands), [dims[1]] * 2

    compat.set_batcher(product.primitive, rule)
    results = jax.vmap(product, in_axes=(None, 0), axis_name="i")(S, X)
    np.testing.assert_array_equal(results[0], S * X)
    assert [(name, size, [*dims]) for name, size, dims in seen] == [("i", 2, [None, 0])]


def test_lowering(product):
    assert "stablehlo.multiply" in jax.jit(product).lower(S, X).as_text()


def test_set_lowering(product):
    compat.set_lowering(product.primitive, compat.lowering(lambda s, x: [s + x, s + x]), "cpu")
    for platform, operation in (("cpu", "stablehlo.add"), ("cuda", "stablehlo.multiply")):
        lowered = jax.jit(product).trace(S, X).lower(lowering_platforms=(platform,))
        assert operation in lowered.as_text()


class Spy(Product):
    """Which notes what the context of a lowering says."""

    def __init__(self):
        super().__init__()
        compat.set_lowering(self.primitive, self.lower, "cpu")

    def lower(self, context, *operands):
        self.seen.append((compat.is_here(context), compat.operand_types(context)))
        return compat.lowering(self.in_jnp)(context, *operands)

    def is_here(self, function):
        function.lower(S, X)
        return self.seen.pop()[0]


def test_operand_types():
    spy = Spy()
    jax.jit(spy).lower(S, X)
    ((_, types),) = spy.seen
    assert [(each.shape, each.dtype) for each in types] == [((3,), "float32"), ((2, 3), "float32")]


def test_is_here():
    spy = Spy()
    assert spy.is_here(jax.jit(spy))
    mesh = Mesh(np.array(jax.devices("cpu")[:1]).reshape(1, 1), ("i", "j"))
    over = partial(jax.shard_map, spy, mesh=mesh, in_specs=P(), out_specs=P())
    assert spy.is_here(jax.jit(over()))
    assert not spy.is_here(jax.jit(over(axis_names={"i"}))), "the rest is left to XLA to split"
    export.export(jax.jit(spy), platforms=["cpu"])(S, X)
    assert not spy.seen.pop()[0]


def in_jit_over_devices():
    spy = Spy()
    mesh = Mesh(np.array(jax.devices()), "i")
    whole, split = (jax.NamedSharding(mesh, spec) for spec in (P(), P("i")))
    assert not spy.is_here(jax.jit(spy, in_shardings=(whole, split)))


def test_is_here_over_devices():
    program = "import test_jax_compat; test_jax_compat.in_jit_over_devices()"
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def mapped(function):
    """`function` of X, which varies over the device of a mesh, and S, which does not."""
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), "i")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i")))


def test_type_like():
    kind = compat.type_like(jax.typeof(X.astype(jnp.bfloat16)), [1], jnp.float32)
    assert (kind.shape, kind.dtype, kind.weak_type) == ((3,), jnp.float32, False)

    def function(x, s):
        for array in (x, s):
            kind = compat.type_like(jax.typeof(array), [array.ndim - 1], jnp.float32)
            assert kind == jax.typeof(array).update(shape=(3,))
        return x

    mapped(function)(X, S)


def test_varying_axes():
    def function(x, s):
        assert compat.varying_axes(x) == {"i"}
        assert compat.varying_axes(s) == frozenset()
        assert compat.varies_as(x, [s, x])
        assert not compat.varies_as(s, [x])
        return x

    mapped(function)(X, S)
    assert compat.varying_axes(X) == frozenset()


def test_varying_alike():
    def function(x, s):
        for array in compat.varying_alike([x, s]):
            assert compat.varying_axes(array) == {"i"}
        assert compat.varying_alike([s])[0] is s
        return x

    mapped(function)(X, S)


def test_axis_size():
    def function(x):
        assert compat.axis_size("i") == 2
        assert compat.axis_size(("i",)) == 2
        return x

    jax.vmap(function, axis_name="i")(X)
    assert compat.axis_size("i") is None
    assert compat.axis_size(3) is None


def test_are_of_vmap():
    found = {}

    def look(way, names=("i",)):
        def function(x):
            found[way] = compat.are_of_vmap(names)
            return x

        return function

    jax.vmap(jax.jit(look("vmap")), axis_name="i")(X)
    jax.pmap(look("pmap"), axis_name="i")(X[:1])
    mesh = Mesh(np.array(jax.devices()[:1]), "i")
    jax.shard_map(look("shard_map"), mesh=mesh, in_specs=P(), out_specs=P())(X)
    within = jax.vmap(look("both", ("i", "j")), axis_name="j")
    jax.shard_map(within, mesh=mesh, in_specs=P(), out_specs=P())(X)
    jax.vmap(look("none", ()), axis_name="i")(X)
    can_tell = jax.__version_info__ >= (0, 8)
    ways = {"pmap": False, "shard_map": False, "both": False, "none": False}
    assert found == {"vmap": can_tell, **ways}


def test_group_sum():
    def without_groups_of_ours(x, _):
        return jax.lax.psum(x, "i", axis_index_groups=[[0]])

    with pytest.raises(NotImplementedError):
        mapped(without_groups_of_ours)(X, S)
    np.testing.assert_array_equal(mapped(lambda x, s: compat.group_sum(x, "i", [[0]]))(X, S), X)
