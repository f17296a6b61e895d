"""What reads, differentiates or checks programs of JAX in ways of its own."""

import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.experimental.jet import jet
from jax.experimental.sparse import sparsify
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from batchnorm.jax import batch_norm, batch_statistics, in_plain_jax, normalize, update_running

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(8, 5, 4)).astype(np.float32)
MASK = RANDOM.uniform(size=(8, 5, 1)) < 0.7


def trained(x, **keywords):
    return batch_norm(x, x[0, 0], x[0, 1], activation="silu", **keywords)[0]


def evaluated(x):
    return normalize(x, x[0, 0], jnp.abs(x[0, 1]), x[0, 2], activation="silu")


def moved(x):
    return update_running(x[0, 0], x[0, 1], batch_statistics(x), rate=0.1)


def over_devices(x):
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), "i")
    one = partial(trained, axis_name="i")
    return jax.shard_map(one, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(x)


FUNCTIONS = {
    "training": trained,
    "masked": partial(trained, mask=MASK),
    "an array as eps": lambda x: trained(x, eps=jnp.abs(x[0, 0, 0])),
    "evaluation": evaluated,
    "running statistics": moved,
    "jit": jax.jit(trained),
    "checkpoint": jax.checkpoint(trained),
    "scan": lambda x: jax.lax.scan(lambda x, _: (trained(x), None), x, length=2)[0],
    "cond": lambda x: jax.lax.cond(x[0, 0, 0] < 9, trained, jnp.sin, x),
    "vmap": lambda x: jax.vmap(partial(trained, axis_name="i"), axis_name="i")(x[:, None]),
    "devices": over_devices,
    "solve": lambda x: jax.lax.custom_linear_solve(
        lambda v: 2 * v + 0 * trained(v), x, lambda _, b: b / 2, symmetric=True
    ),
}


def sums(function):
    return lambda x: sum((each**3).sum() for each in jax.tree.leaves(function(x)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_plain_jax(name):
    function = FUNCTIONS[name]
    for each in (function, jax.grad(sums(function))):
        plain = in_plain_jax(each)
        assert "batch_norm" in str(jax.make_jaxpr(each)(X)).replace("_batch_norm\n", "")
        text = jax.jit(plain).lower(X).as_text()
        assert "batchnorm_" not in text
        assert "batch_norm_" not in str(jax.make_jaxpr(plain)(X))
        wanted = each(X)
        for one, other in zip(*map(jax.tree.leaves, (jax.jit(plain)(X), wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_plain_functions_of_pytrees():
    def step(state, *, x):
        y, statistics = batch_norm(x)
        return {"y": y, "state": update_running(*state, statistics, rate=0.5)}

    state = (jnp.zeros(4), jnp.ones(4))
    got, wanted = in_plain_jax(step)(state, x=X), step(state, x=X)
    assert in_plain_jax(step).__name__ == "step"
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_in_plain_jax_takes_functions():
    with pytest.raises(TypeError, match="function must be a function of arrays, but got"):
        in_plain_jax(X)


def test_what_reads_plain_functions():
    plain = in_plain_jax(trained)
    costs = jax.jit(plain).lower(X).compile().cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    assert costs["flops"] > 8 * X.size
    np.testing.assert_allclose(sparsify(plain)(X), trained(X), rtol=1e-5, atol=1e-5)


JETS = [
    name
    for name in FUNCTIONS
    if name not in ("scan", "cond", "checkpoint", "vmap", "devices", "solve")
]


@pytest.mark.parametrize("name", JETS)
def test_jet(name):
    """Its terms are the derivatives along a line."""
    with enable_x64(True):
        x, direction = jnp.float64(X), jnp.float64(RANDOM.normal(size=X.shape))
        function = FUNCTIONS[name]

        def at(step):
            return function(x + step * direction)

        def derivative(of):
            return lambda step: jax.jvp(of, (step,), (1.0,))[1]

        none = jnp.zeros_like(x)
        y, terms = jet(function, (x,), ((direction, none, none),))
        got = [y, *zip(*terms, strict=True)] if isinstance(y, tuple) else [y, *terms]
        of = at
        for each in got:
            for one, other in zip(*map(jax.tree.leaves, (each, of(0.0))), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)
            of = derivative(of)


# ---- what looks for NaN


NAN, INF = (np.where(np.arange(X.size).reshape(X.shape) == 3, bad, X) for bad in (np.nan, np.inf))
NEGATIVE = -np.ones(4, np.float32)


def test_checkify():
    def found(function, x):
        error, _ = checkify.checkify(function, errors=checkify.float_checks)(x)
        return error.get()

    for wrap in (lambda function: function, jax.jit):
        assert "nan" in found(wrap(lambda x: normalize(x, x[0, 0], NEGATIVE)), X)
        for name in ("training", "masked", "evaluation", "jit", "scan", "cond"):
            for function in (FUNCTIONS[name], jax.grad(sums(FUNCTIONS[name]))):
                assert found(wrap(function), X) is None
                assert "nan" in found(wrap(function), NAN)


@pytest.fixture(params=["debug_nans", "debug_infs"])
def watched(request):
    # As a context: where a configuration sets it, JAX 0.10 forgets it in the gradient of any jit.
    with getattr(jax, request.param)(True):
        yield INF if request.param == "debug_infs" else NAN


PADDING = np.where(MASK, X, np.float32(1e4))
HUGE = np.full(4, 3e38, np.float32)


def overflowing(x):
    return normalize(x, jnp.zeros(4), jnp.zeros(4), HUGE)


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit, "without jit"])
def test_debugging_finds_what_is_bad(watched, wrap):
    bad, is_infinite = watched, np.isinf(watched).any()

    def run(function, *arrays):
        if wrap == "without jit":
            with jax.disable_jit():
                return jax.block_until_ready(function(*arrays))
        return jax.block_until_ready(wrap(function)(*arrays))

    for name in ("training", "masked", "evaluation"):
        for function in (FUNCTIONS[name], jax.grad(sums(FUNCTIONS[name]))):
            run(function, X)  # no false alarm
    run(FUNCTIONS["masked"], PADDING)
    function, x = (overflowing, X) if is_infinite else (trained, bad)
    for each in (function, jax.grad(sums(function))):
        with pytest.raises(FloatingPointError):
            run(each, x)


def test_a_compiled_program_is_loaded_where_nothing_was_lowered(tmp_path):
    """By a process that imports the door, and no more."""
    path = str(tmp_path / "program")
    save = """
        import pickle, sys
        import jax, jax.numpy as jnp
        from jax.experimental import serialize_executable
        from batchnorm.jax import batch_norm

        step = jax.jit(jax.grad(lambda x: (batch_norm(x)[0] ** 3).sum()))
        compiled = step.lower(jnp.ones((8, 4))).compile()
        assert "batchnorm_" in compiled.as_text()
        with open(sys.argv[1], "wb") as file:
            pickle.dump(serialize_executable.serialize(compiled), file)
    """
    load = """
        import pickle, sys
        import batchnorm.jax
        import jax.numpy as jnp
        from jax.experimental import serialize_executable

        with open(sys.argv[1], "rb") as file:
            compiled = serialize_executable.deserialize_and_load(*pickle.load(file))
        assert compiled(jnp.ones((8, 4))).shape == (8, 4)
    """
    for program in (save, load):
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_in_plain_jax_within_a_mapped_batch():
    mapped = jax.vmap(in_plain_jax(lambda x: batch_norm(x, axis_name="i")[0]), axis_name="i")
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    assert "batch_norm" not in str(jax.make_jaxpr(mapped)(x))
    np.testing.assert_allclose(mapped(x), batch_norm(x)[0], atol=1e-5)
