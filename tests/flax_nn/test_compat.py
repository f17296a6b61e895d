"""What flax.nn uses of JAX beyond its promises: a test fails by the name of what has changed."""

import jax
import jax.numpy as jnp

from batchnorm.flax.nn._compat import (
    belongs_to,
    current_trace,
    partial_results,
    set_current_trace,
)


def test_take_current_trace():
    outside, inside = current_trace(), jax.jit(lambda x: traces.append(current_trace()) or x)
    traces = []
    inside(1.0)
    assert traces[0] is not outside
    assert current_trace() is outside


def test_set_current_trace():
    found = {}

    @jax.jit
    def outer(x):
        trace = current_trace()

        def inner(carry, _):
            with set_current_trace(trace):
                found["set"] = current_trace() is trace
                found["belongs"] = belongs_to(x + 1, trace)
            found["left"] = current_trace() is not trace
            return carry, None

        return jax.lax.scan(inner, x, None, length=2)[0]

    outer(1.0)
    assert found == {"set": True, "belongs": True, "left": True}


def test_tracers_know_their_trace_and_that_its_parent():
    found = {}

    def inner(x):
        found["inner is of outer"] = belongs_to(x, outer_trace)
        found["inner is of inner"] = belongs_to([x, 1.0], current_trace())
        found["outer is of inner"] = belongs_to(outer_x, current_trace())
        return x

    @jax.jit
    def outer(x):
        nonlocal outer_trace, outer_x
        outer_trace, outer_x = current_trace(), x
        return jax.grad(inner)(x)

    outer_trace = outer_x = None
    outer(1.0)
    assert found == {
        "inner is of outer": False,
        "inner is of inner": True,
        "outer is of inner": True,
    }


def test_trace_to_jaxpr_nounits():
    def function(x):
        return [jnp.ones(3), x + 1.0]

    known, unknown = partial_results(function, [jax.ShapeDtypeStruct((2,), jnp.float32)], function)
    assert jnp.array_equal(known, [1.0, 1.0, 1.0])
    assert unknown == jax.ShapeDtypeStruct((2,), jnp.float32)
