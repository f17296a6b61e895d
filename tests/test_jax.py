"""What the JAX door has beyond the other doors: transformations, lowering, and native calls."""

import functools
import re
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from cases import GOOD, HARD, Good, Hard
from compare import close
from doors import JAX
from jax import export
from jax.test_util import check_grads

from batchnorm.jax import batch_norm, batch_statistics, normalize, update_running

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

# For programs that take longer to compile than to run.
quick_jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def run_in_python(program: str, **keywords) -> str:
    """What `program` prints, in a process of its own that must succeed, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(x, scale, bias, residual, mask, axis, eps, activation):
    """y, mean and var by the formulas as they are written, for JAX to differentiate in float64."""
    features = [each % x.ndim for each in (axis if isinstance(axis, tuple) else (axis,))]
    reduced = tuple(each for each in range(x.ndim) if each not in features)
    along = [size if each in features else 1 for each, size in enumerate(x.shape)]
    w = jnp.broadcast_to(jnp.float64(1.0 if mask is None else mask), x.shape)
    m = w.sum(reduced, keepdims=True)
    mean = (w * x).sum(reduced, keepdims=True) / m
    var = (w * (x - mean) ** 2).sum(reduced, keepdims=True) / m
    z = (x - mean) / jnp.sqrt(var + eps) * scale.reshape(along) + bias.reshape(along)
    z = z if residual is None else z + residual
    y = {None: z, "relu": jnp.where(z > 0, z, 0), "silu": z / (1 + jnp.exp(-z))}[activation]
    return y, mean.reshape(scale.shape), var.reshape(scale.shape)


CASES = [
    Good("NHWC and relu", (2, 2, 2, 3), -1, activation="relu"),
    Good("residual and silu", (5, 2, 3), 1, residual=True, activation="silu"),
    Good("all at once", (5, 2, 3), 1, mask="weights C", residual=True, activation="silu"),
    Good("features apart and a mask", (3, 2, 3, 2), (1, 3), mask="bool 1"),
]


class Losses:
    """The same loss of a dict of arrays twice, by batchnorm and by plain formulas."""

    def __init__(self, case: Good) -> None:
        dy, x, scale, bias, keywords = case.arrays(np.float64)
        residual = keywords.pop("residual", None)
        arrays = {"x": x, "scale": scale, "bias": bias, "residual": residual}
        if case.mask and case.mask.startswith("weights"):
            arrays["mask"] = np.float64(keywords.pop("mask")) + 0.1
        self.arrays = {
            name: jnp.asarray(array, jnp.float64)
            for name, array in arrays.items()
            if array is not None
        }
        random = np.random.default_rng(1)
        draw = partial(jax.tree.map, lambda array: random.normal(size=array.shape))
        self.directions = draw(self.arrays), draw(self.arrays)
        self.batch = jax.tree.map(lambda array: jnp.stack([array, 2 * array + 0.1]), self.arrays)
        self.dy, self.keywords = dy, keywords

    def ours(self, arrays):
        y, statistics = batch_norm(**arrays, **self.keywords)
        return self.loss(y, statistics.mean, statistics.var)

    def plain(self, arrays):
        return self.loss(*plain(**{"residual": None, "mask": None, **arrays, **self.keywords}))

    def loss(self, y, mean, var):
        return (y**3 * self.dy).sum() + (mean * jnp.sin(var)).sum()


def inner(one, other):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), one, other)))


# Each of a function, its argument, two directions there, and a batch of arguments.
FIRST_ORDER = {
    "grad": lambda f, a, t, u, b: jax.grad(f)(a),
    "jvp": lambda f, a, t, u, b: jax.jvp(f, (a,), (t,)),
    "vjp": lambda f, a, t, u, b: jax.vjp(f, a)[1](1.0),
    "linearize": lambda f, a, t, u, b: jax.linearize(f, a)[1](t),
    "jacfwd": lambda f, a, t, u, b: jax.jacfwd(f)(a),
    "jacrev": lambda f, a, t, u, b: jax.jacrev(f)(a),
    "remat": lambda f, a, t, u, b: jax.grad(jax.checkpoint(f))(a),
    "vmap": lambda f, a, t, u, b: jax.vmap(f)(b),
    "vmap of grad": lambda f, a, t, u, b: jax.vmap(jax.grad(f))(b),
    "grad of vmap": lambda f, a, t, u, b: jax.grad(lambda b: jax.vmap(f)(b).sum())(b),
    "nested vmap": lambda f, a, t, u, b: jax.vmap(jax.vmap(jax.grad(f)))(
        jax.tree.map(lambda array: jnp.stack([array, array + 1, 3 * array]), b)
    ),
    "vmap along another axis": lambda f, a, t, u, b: jax.vmap(
        lambda x: jax.grad(f)({**a, "x": x})["x"], in_axes=1, out_axes=2
    )(jnp.stack([a["x"], 2 * a["x"]], 1)),
    "vmap over scale and bias alone": lambda f, a, t, u, b: jax.vmap(
        lambda scale, bias: jax.grad(f)({**a, "scale": scale, "bias": bias})
    )(b["scale"], b["bias"]),
}


HIGHER_ORDER = {
    "forward over forward": lambda f, a, t, u, b: jax.jvp(
        lambda a: jax.jvp(f, (a,), (t,))[1], (a,), (u,)
    )[1],
    "forward over reverse": lambda f, a, t, u, b: jax.jvp(jax.grad(f), (a,), (t,))[1],
    "reverse over forward": lambda f, a, t, u, b: jax.grad(lambda a: jax.jvp(f, (a,), (t,))[1])(a),
    "reverse over reverse": lambda f, a, t, u, b: jax.grad(lambda a: inner(jax.grad(f)(a), t))(a),
    "third order": lambda f, a, t, u, b: jax.grad(
        lambda a: inner(jax.jvp(jax.grad(f), (a,), (t,))[1], u)
    )(a),
    "hessian": lambda f, a, t, u, b: jax.hessian(lambda x: f({**a, "x": x}))(a["x"]),
    "vmap of second order": lambda f, a, t, u, b: jax.vmap(
        lambda a: jax.jvp(jax.grad(f), (a,), (t,))[1]
    )(b),
}


assert_exact = partial(close, rtol=1e-10, atol=1e-10)


ORDERS = {"first": FIRST_ORDER, "higher": HIGHER_ORDER}


def transformed(f, losses, order):
    at = losses.arrays, *losses.directions, losses.batch
    return quick_jit(lambda at: {name: t(f, *at) for name, t in ORDERS[order].items()})(at)


@functools.cache
def exact(case: Good, order: str):
    losses = Losses(case)
    return transformed(losses.plain, losses, order)


@pytest.mark.parametrize(
    ("order", "case"),
    [("first", each) for each in CASES] + [("higher", each) for each in CASES[:3]],
    ids=str,
)
def test_derivatives_are_exact(case: Good, order: str):
    with enable_x64(True):
        losses = Losses(case)
        got, wanted = transformed(losses.ours, losses, order), exact(case, order)
        for name in wanted:
            assert_exact(got[name], wanted[name])


def test_derivatives_without_jit():
    with enable_x64(True):
        losses, wanted = Losses(CASES[0]), exact(CASES[0], "first")
        at = losses.arrays, *losses.directions, losses.batch
        for name in ("grad", "jvp", "linearize", "vmap of grad"):
            assert_exact(FIRST_ORDER[name](losses.ours, *at), wanted[name])
        with jax.disable_jit():
            assert_exact(jax.grad(losses.ours)(losses.arrays), wanted["grad"])


def test_derivatives_are_those_of_finite_differences():
    with enable_x64(True):
        losses = Losses(CASES[2])
        check_grads(jax.jit(losses.ours), (losses.arrays,), order=1, atol=1e-6, rtol=1e-6)


def test_evaluation_has_derivatives():
    with enable_x64(True):
        random = np.random.default_rng(0)
        x, parameters = random.normal(size=(6, 3)), random.uniform(0.5, 2, (4, 3))

        def ours(x, p):
            return (normalize(x, *p) ** 3).sum()

        def wanted(x, p):
            return (((x - p[0]) / jnp.sqrt(p[1] + 1e-5) * p[2] + p[3]) ** 3).sum()

        for transform in (jax.grad, jax.hessian):
            assert_exact(*(jax.jit(transform(f, (0, 1)))(x, parameters) for f in (ours, wanted)))


@pytest.mark.parametrize("dtype", JAX.dtypes, ids=str)
def test_narrow_dtypes_stay(dtype):
    x = jnp.arange(24.0).reshape(2, 4, 3).astype(dtype)
    scale = jnp.ones(3, dtype)

    def loss(x, scale):
        y, statistics = batch_norm(x, scale)
        assert y.dtype == dtype
        assert statistics.mean.dtype == jnp.float32
        return (y.astype(jnp.float32) ** 3).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    assert [each.dtype for each in gradients] == [dtype, dtype]
    wanted = jax.grad(loss, (0, 1))(x, scale)
    for got, other in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(np.float32(got), np.float32(other))


# ---- control flow, donation, lowering

X = np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32)


def train(x, mean):
    y, statistics = batch_norm(x, activation="relu")
    return y, update_running(mean, mean, statistics, rate=0.1)[0]


def test_scan_cond_and_while():
    def by_scan(x):
        return jax.lax.scan(lambda x, _: train(x, jnp.zeros(4)), x, length=3)[0]

    def by_while(x):
        return jax.lax.while_loop(
            lambda state: state[0] < 3,
            lambda state: (state[0] + 1, train(state[1], jnp.zeros(4))[0]),
            (0, x),
        )[1]

    def by_cond(x):
        for _ in range(3):
            x = jax.lax.cond(x[0, 0, 0] < 9, lambda x: train(x, jnp.zeros(4))[0], jnp.sin, x)
        return x

    def by_hand(x):
        for _ in range(3):
            x = train(x, jnp.zeros(4))[0]
        return x

    for function in (by_scan, by_while, by_cond):
        np.testing.assert_allclose(jax.jit(function)(X), by_hand(X), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: (by_hand(x) ** 3).sum())(X)
    for function in (by_scan, by_cond):
        got = jax.jit(jax.grad(lambda x, f=function: (f(x) ** 3).sum()))(X)
        np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5)


def test_donated_arguments():
    wanted = train(X, jnp.zeros(4))
    got = jax.jit(train, donate_argnums=(0, 1))(jnp.asarray(X), jnp.zeros(4))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_compiled_ahead_of_time():
    compiled = jax.jit(train).lower(X, jnp.zeros(4)).compile()
    assert "batchnorm_batch_norm" in compiled.as_text()
    np.testing.assert_array_equal(compiled(X, jnp.zeros(4))[0], train(X, jnp.zeros(4))[0])


def test_exported_programs_need_no_batchnorm():
    step = jax.jit(jax.grad(lambda x: (train(x, jnp.zeros(4))[0] ** 3).sum()))
    exported = export.export(step, platforms=["cpu", "cuda"])(X)
    assert "batchnorm_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(X), step(X), rtol=1e-4, atol=1e-5)


def test_statistics_are_mapped_as_x_is():
    scales = jnp.stack([jnp.ones(4), jnp.arange(4.0)])
    y, mean = jax.vmap(
        lambda scale: (batch_norm(X, scale)[0], batch_norm(X, scale)[1].mean), out_axes=(0, None)
    )(scales)
    np.testing.assert_allclose(mean, X.mean((0, 1)), rtol=1e-5, atol=1e-6)
    for one, scale in zip(y, scales, strict=True):
        np.testing.assert_allclose(one, batch_norm(X, scale)[0], rtol=1e-5, atol=1e-5)


def kernels(function, *arrays, platform="cpu"):
    """The names of those that are called by what is lowered for a platform."""
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))
    return re.findall(r"custom_call @batchnorm_([a-z_]+)_\d", lowered.as_text())


def loss(x, **keywords):
    return (batch_norm(x, **keywords)[0] ** 3).sum()


@pytest.mark.parametrize("dtype", [*JAX.dtypes, np.float64], ids=str)
def test_each_dtype_is_native(dtype):
    with enable_x64(dtype == np.float64):
        assert kernels(jax.grad(loss), X.astype(dtype)) == ["batch_norm", "gradients"]


def test_what_is_native():
    assert kernels(loss, X) == ["batch_norm"]
    everything = ["batch_norm", "gradients"]
    for keywords in ({}, {"axis": 1}, {"axis": (1, 2)}, {"residual": X}):
        assert kernels(jax.grad(partial(loss, **keywords)), X) == everything
    masked = jax.grad(partial(loss, mask=X > 0))
    assert kernels(masked, X) == ["statistics", "normalize", "gradients"]
    assert kernels(jax.vmap(jax.grad(loss)), X) == everything
    mapped = jax.vmap(jax.grad(partial(loss, axis_name="i")), axis_name="i")
    separate = ["statistics", "normalize", "gradient_sums", "input_gradient"]
    assert kernels(mapped, X) == separate
    assert kernels(batch_statistics, X) == ["statistics"]
    assert kernels(lambda x: normalize(x, x[0, 0], x[0, 0]), X) == ["normalize"]
    assert kernels(partial(loss, axis=(0, 2)), X) == [], "no kernel for features apart"
    assert kernels(jax.grad(loss), X, platform="cuda") == []


def test_scale_and_bias_alone_need_one_pass():
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda s: (batch_norm(X, s)[0] ** 3).sum()))(jnp.ones(4)))
    assert "batch_norm_gradient_sums" in jaxpr
    assert "batch_norm_input_gradient" not in jaxpr


def test_many_calls_at_once():
    run_in_python(
        """
        import jax, jax.numpy as jnp, numpy as np
        from batchnorm.jax import batch_norm

        @jax.jit
        def independent(arrays):
            return [jax.grad(lambda x: (batch_norm(x)[0] ** 3).sum())(x) for x in arrays]

        arrays = list(np.random.default_rng(0).normal(size=(12, 20_000, 32)).astype("float32"))
        wanted = independent(arrays)
        for _ in range(20):
            for one, other in zip(independent(arrays), wanted):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        """
    )


def test_a_jaxlib_that_refuses_the_kernels():
    printed = run_in_python(
        """
        import warnings
        import jax, jax.numpy as jnp, numpy as np

        def refuse(*arguments, **keywords):
            raise RuntimeError("another version")

        jax.ffi.register_ffi_target = refuse
        from batchnorm.jax import batch_norm

        x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype("float32")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y, _ = batch_norm(x)
            batch_norm(x[:, :3])
        np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-4)
        assert jax.jit(jnp.sin)(0.0) == 0
        print(*(warning.message for warning in caught))
        """
    )
    assert printed.count("This jaxlib does not take batchnorm's native kernels") == 1
    assert "another version" in printed


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda x: (train(x, jnp.zeros(4))[0] ** 3).sum()))(X)
        jax.vmap(jax.grad(lambda x: (train(x, jnp.zeros(4))[0] ** 3).sum()))(X)


# ---- without native kernels


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("hard", HARD, ids=str)
def test_accurate_without_native(hard: Hard):
    x = hard.x(min(hard.rows, 200_000), 3)
    step = jax.jit(partial(batch_norm, eps=hard.eps))
    assert "batchnorm_" not in step.lower(x).as_text()
    y, _ = step(x)
    close(y, truth.batch_norm(x, eps=hard.eps).y, rtol=0, atol=hard.tolerance)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("case", GOOD[:4] + GOOD[11:14] + GOOD[-2:], ids=str)
def test_right_without_native(case: Good):
    dy, x, scale, bias, keywords = case.arrays(np.float32)
    residual = keywords.pop("residual", None)

    @jax.jit
    def step(x, scale, bias, residual):
        def function(*arrays):
            return batch_norm(*arrays[:3], residual=arrays[3], **keywords)[0]

        y, backward = jax.vjp(function, x, scale, bias, residual)
        return y, backward(dy)

    y, gradients = step(x, scale, bias, residual)
    keywords["residual"] = residual
    np.testing.assert_allclose(y, truth.batch_norm(x, scale, bias, **keywords).y, atol=1e-5)
    wanted = truth.batch_norm_gradients(dy, x, scale, bias, **keywords)
    for name, gradient in zip(("x", "scale", "bias", "residual"), gradients, strict=True):
        if gradient is not None:
            np.testing.assert_allclose(gradient, wanted[name], rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.usefixtures("without_native")
def test_passes_over_memory_without_native():
    """Sums about the mean, and the range: 6.0 times x by XLA's account, 6.2 in JAX 0.6.2."""
    x = np.ones((65_536, 64), np.float32)
    compiled = jax.jit(lambda x: batch_norm(x)[0]).lower(x).compile()
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    assert costs["bytes accessed"] / x.nbytes < 6.3


# ---- numbers and arguments


def test_a_wrong_weight_spoils_its_feature_alone():
    weights = jnp.ones((8, 5, 4)).at[0, 0, 1].set(-1).at[0, 0, 2].set(jnp.nan)
    y, statistics = jax.jit(lambda w: batch_norm(X, mask=w))(weights)
    gradient = jax.grad(lambda x: (batch_norm(x, mask=weights)[0] ** 3).sum())(X)
    for each in (y, gradient, statistics.var, statistics.count):
        bad = np.isnan(each).reshape(-1, 4)
        np.testing.assert_array_equal(bad, np.broadcast_to([False, True, True, False], bad.shape))


def test_float64_without_x64_is_float32():
    y, statistics = batch_norm(np.float64(X))
    assert y.dtype == statistics.mean.dtype == jnp.float32
    np.testing.assert_array_equal(y, batch_norm(X)[0])


def test_state_goes_in_and_comes_out():
    mean, var = jnp.zeros(4), jnp.ones(4)
    new_mean, new_var = update_running(mean, var, batch_statistics(X), rate=0.5)
    np.testing.assert_allclose(new_mean, 0.5 * X.mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_var, 0.5 + 0.5 * X.var((0, 1)), rtol=1e-5)
    assert (mean == 0).all()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"axis_name": "j"}, ValueError, "axis_name must name axes that are mapped.* 'j'"),
        ({"axis_index_groups": [[0, 1]]}, ValueError, "axis_index_groups needs an axis_name"),
        (
            {"axis_name": "i", "axis_index_groups": [[0, 1], [2]]},
            ValueError,
            "must hold each index of axis_name='i', of size 4, exactly once",
        ),
        ({"axis_name": "i", "axis_index_groups": [[0, 1], [1, 2, 3]]}, ValueError, "exactly once"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1, 2], [3]]}, ValueError, "of one size"),
        ({"axis_name": "i", "axis_index_groups": [0, 1]}, TypeError, "sequence of sequences"),
    ],
)
def test_mapped_axes_are_checked(keywords, error, message):
    for function in (batch_norm, batch_statistics):
        with pytest.raises(error, match=message):
            jax.vmap(lambda x, f=function: f(x, **keywords), axis_name="i")(X[:4])


@pytest.mark.parametrize(
    "groups",
    [np.array([[0]]), jnp.array([[0]]), [range(1)], ((0,),), [np.array([0])], [[jnp.int32(0)]]],
    ids=["NumPy", "JAX", "ranges", "tuples", "a list of arrays", "scalars"],
)
def test_groups_of_every_kind(groups):
    of_group = partial(batch_norm, axis_name="i", axis_index_groups=groups)
    y, _ = jax.pmap(of_group, axis_name="i")(X[None])
    np.testing.assert_allclose(y[0], batch_norm(X)[0], rtol=1e-5, atol=1e-5)


def test_statistics_over_two_mapped_axes():
    def normalized(x):
        return batch_norm(x, axis_name=("i", "j"))

    y, statistics = jax.vmap(jax.vmap(normalized, axis_name="j"), axis_name="i")(X[..., None, :])
    wanted = truth.batch_norm(X)
    np.testing.assert_allclose(y[:, :, 0], wanted.y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics.var[2, 3], wanted.var, rtol=1e-5)


def test_one_value_on_each_device_will_do():
    y, statistics = jax.vmap(lambda x: batch_norm(x, axis_name="i"), axis_name="i")(X[:, :1])
    np.testing.assert_allclose(y, batch_norm(X[:, :1])[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(statistics.count, np.full((8, 4), 8))
    with pytest.raises(ValueError, match="more than one value"):
        batch_norm(X[:1, 0])


def test_one_example_a_call():
    scale, bias = np.float32([1, 2, 3, 4]), np.float32([4, 3, 2, 1])
    x = np.asarray(X[:, 0])
    dy = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def trained(x, scale, bias):
        def of_one(x):
            return batch_norm(x, scale, bias, axis_name="i", activation="silu")

        return jax.vmap(of_one, axis_name="i")(x)

    def evaluated(x, scale, bias):
        return jax.vmap(lambda x: normalize(x, bias, scale, scale, bias))(x), None

    keywords = [{"activation": "silu"}, {"given": (bias, scale)}]
    for function, options in zip((trained, evaluated), keywords, strict=True):
        close(function(x, scale, bias)[0], truth.batch_norm(x, scale, bias, **options).y, atol=1e-5)
        gradient = jax.grad(lambda x, f=function: (f(x, scale, bias)[0] * dy).sum())(x)
        wanted = truth.batch_norm_gradients(dy, x, scale, bias, **options)["x"]
        close(gradient, wanted, atol=1e-4)


# ---- a mapped axis of jax.vmap as the batch


def operations(function, *arrays) -> dict[str, list]:
    """The types of operands and results of each operation, by its name."""
    found: dict[str, list] = {}

    def look(jaxpr):
        for equation in jaxpr.eqns:
            types = [[each.aval for each in side] for side in (equation.invars, equation.outvars)]
            found.setdefault(equation.primitive.name, []).append(types)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda each: hasattr(each, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(function)(*arrays).jaxpr)
    return found


def over_batch(function, in_axes=0, out_axes=0):
    return jax.vmap(function, in_axes, out_axes, axis_name="batch")


by_example = partial(batch_norm, axis_name="batch")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_mapped_batch_is_one_batch(place, masked):
    random = np.random.default_rng(1)
    mask = random.uniform(size=X.shape) < 0.7 if masked else None
    dy = random.normal(size=X.shape).astype(np.float32)
    feature = 1 if place == 2 else 2
    scale = jnp.arange(1.0, 1 + X.shape[feature])

    def whole(x, scale):
        return batch_norm(x, scale, scale, axis=feature, mask=mask, activation="silu")

    def mapped(x, scale):
        def one(x, mask):
            return by_example(x, scale, scale, axis=min(feature, 1), mask=mask, activation="silu")

        dims = place, None if mask is None else place
        return over_batch(one, dims, (place, None))(x, mask)

    def loss(function, x, scale):
        y, statistics = function(x, scale)
        return (y * dy).sum() + jnp.sin(statistics.mean * statistics.var).sum(), (y, statistics)

    for transform in (lambda f, static_argnums: f, jax.jit):
        gradient = transform(jax.grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
        got, wanted = gradient(mapped, X, scale), gradient(whole, X, scale)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got[1][1].count, wanted[1][1].count)


def test_a_mapped_batch_is_one_call_without_a_copy():
    def step(x, scale):
        def loss(scale):
            y, statistics = over_batch(lambda x: by_example(x, scale), out_axes=(0, None))(x)
            return (y**3).sum(), statistics

        return jax.grad(loss, has_aux=True)(scale)

    found = operations(step, X, jnp.ones(4))
    # Older versions can't tell an axis of pmap from one of vmap.
    in_one = jax.__version_info__ >= (0, 8)
    for name in [*(["batch_norm"] if in_one else ["statistics", "normalize"]), "gradient_sums"]:
        ((operands, results),) = found[f"batch_norm_{name}"]
        assert operands[0].shape == X.shape
        assert {each.shape for each in operands} <= {X.shape, (4,)}, "nothing is repeated"
        assert {each.shape for each in results} <= {X.shape, (4,)}
    assert "transpose" not in found
    evaluated = operations(jax.vmap(lambda x: normalize(x, x[0] * 0, jnp.ones(4))), X)
    assert evaluated["batch_norm_normalize"][0][0][1].shape == (8, 4), "means of their own"
    evaluated = operations(jax.vmap(lambda x: normalize(x, jnp.zeros(4), jnp.ones(4))), X)
    assert evaluated["batch_norm_normalize"][0][0][1].shape == (4,)


def test_an_empty_mapped_batch():
    x = jnp.zeros((0, 5, 4))
    y, statistics = over_batch(by_example, out_axes=(0, None))(x)
    assert y.shape == x.shape
    alone = over_batch(partial(batch_statistics, axis_name="batch"), out_axes=None)(x)
    for each in (statistics, alone):
        np.testing.assert_array_equal(each.count, np.zeros(4))


def test_parameters_alone_take_no_pass_for_tangents_of_x():
    def gradients(x):
        def loss(scale, bias):
            return (by_example(x, scale, bias)[0] ** 2).sum()

        return jax.grad(loss, (0, 1))(jnp.ones(4), jnp.ones(4))

    assert "batch_norm_tangent_sums" not in operations(over_batch(gradients), X)


def test_several_mapped_axes():
    """Each alone, all together, and either of two; as the joined batch."""
    x = X.reshape(2, 4, 5, 4)

    def mapped(names, out):
        function = partial(batch_norm, axis_name=names, allow_one_value=True)
        inner = jax.vmap(function, axis_name="inner", out_axes=(0, None if "inner" in names else 0))
        return jax.vmap(inner, axis_name="outer", out_axes=(0, out))

    y, statistics = jax.jit(mapped(("outer", "inner"), None))(x)
    close(y, truth.batch_norm(x).y, rtol=0, atol=1e-5)
    close(statistics.var, truth.batch_norm(x).var)
    y, statistics = jax.jit(mapped(("inner",), 0))(x)
    for got, var, part in zip(y, statistics.var, x, strict=True):
        close(got, truth.batch_norm(part).y, rtol=0, atol=1e-5)
        close(var, truth.batch_norm(part).var)
    y, statistics = jax.jit(mapped(("outer",), None))(x)
    for i in range(4):
        close(y[:, i], truth.batch_norm(x[:, i]).y, rtol=0, atol=1e-5)
        close(statistics.var[i], truth.batch_norm(x[:, i]).var)


def test_vectors_of_a_mapped_batch():
    x = X[:, 0]
    wanted = truth.batch_norm(x)
    y, statistics = over_batch(by_example, out_axes=(0, None))(x)
    close(y, wanted.y, rtol=0, atol=1e-5)
    close(statistics.var, wanted.var, rtol=1e-5)
    np.testing.assert_array_equal(statistics.count, np.full(4, 8))
    got = jax.grad(lambda x: (over_batch(by_example)(x)[0] ** 3).sum())(x)
    np.testing.assert_allclose(got, jax.grad(loss)(x), rtol=1e-4, atol=1e-5)


def test_what_of_a_mapped_batch_is_mapped():
    """Whatever is mapped and whatever is not, the result is that of the joined batch."""
    scales = jnp.arange(1.0, 33.0).reshape(8, 4)
    masks = np.random.default_rng(0).uniform(size=(8, 5, 1)) < 0.5
    each = X.reshape(8, 5, 4)

    def plainly(x, scale, mask):
        joined = jnp.broadcast_to(x, each.shape)
        weights = None if mask is None else jnp.broadcast_to(mask, (8, 5, 1))
        y, statistics = batch_norm(joined, mask=weights)
        return y if scale is None else y * jnp.broadcast_to(scale, (8, 4))[:, None], statistics

    for x in (each, each[0]):
        for scale in (None, scales[0], scales):
            for mask in (None, masks[0], masks):
                dims = [
                    None if array is None or array.ndim < rank else 0
                    for array, rank in ((x, 3), (scale, 2), (mask, 3))
                ]
                mapped = over_batch(lambda x, s, m: by_example(x, s, mask=m), dims, (0, None))
                if dims == [None] * 3:
                    continue
                y, statistics = mapped(x, scale, mask)
                wanted_y, wanted = plainly(x, scale, mask)
                np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=1e-4)
                np.testing.assert_array_equal(statistics.count, wanted.count)
                np.testing.assert_allclose(statistics.var, wanted.var, rtol=1e-5)


def test_a_mapped_batch_with_scales_of_their_own():
    """Derivatives of first and second order, in both modes, one of the scales being 0."""
    with enable_x64(True):
        x, scale = jnp.float64(X), jnp.float64(X[:, 0]).at[2, 1].set(0.0)

        def ours(x, scale):
            return over_batch(lambda x, scale: by_example(x, scale, activation="silu")[0])(x, scale)

        def wanted(x, scale):
            x_hat = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5)
            return jax.nn.silu(x_hat * scale[:, None])

        def derivatives(function):
            def loss(x, scale):
                return (function(x, scale) ** 3).sum()

            def along(x, scale):
                return jax.jvp(loss, (x, scale), (x**2, scale + 1))[1]

            return jax.grad(loss, (0, 1))(x, scale), jax.grad(along, (0, 1))(x, scale)

        got, exact = (jax.jit(partial(derivatives, each))() for each in (ours, wanted))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            close(one, other, rtol=1e-8, atol=1e-8)


def test_axes_that_are_mapped_within_each_other():
    wanted = truth.batch_norm(X)
    inner = over_batch(by_example, out_axes=(0, None))
    y, statistics = jax.vmap(inner)(X)
    for one, of_one, x in zip(y, statistics.var, X, strict=True):
        apart = truth.batch_norm(x)
        close(one, apart.y, rtol=0, atol=1e-5)
        close(of_one, apart.var, rtol=1e-5)
    both = partial(batch_norm, axis_name=("batch", "other"))
    y, statistics = jax.vmap(
        over_batch(both, out_axes=(0, None)), out_axes=(0, None), axis_name="other"
    )(X)
    close(y, wanted.y, rtol=0, atol=1e-5)
    close(statistics.var, wanted.var, rtol=1e-5)
    again = jax.vmap(over_batch(by_example), axis_name="batch")(X)[0]
    close(again[0], truth.batch_norm(X[0]).y, rtol=0, atol=1e-5)


def test_the_derivative_of_weights_of_zero():
    with enable_x64(True):
        x, weights = jnp.float64(X[:, 0]), jnp.ones(8).at[:3].set(0.0)[:, None]
        step = jnp.zeros_like(weights).at[1].set(1.0)
        y_dot, of_statistics = jax.jvp(lambda w: batch_norm(x, mask=w), [weights], [step])[1]
        one, other = (truth.batch_norm(np.float64(x), mask=weights + h * step) for h in (0, 1e-6))
        close(y_dot, (other.y - one.y) / 1e-6, rtol=1e-4, atol=1e-4)
        close(of_statistics.var, (other.var - one.var) / 1e-6, rtol=1e-4, atol=1e-4)


# ---- numbers that are arrays


def in_evaluation(x, eps):
    return normalize(x, x[0, 0], jnp.abs(x[0, 1]), x[0, 2], eps=eps, activation="silu")


def in_training(x, eps, **keywords):
    return batch_norm(x, x[0, 2], eps=eps, activation="silu", **keywords)[0]


@pytest.mark.parametrize(
    "function",
    [
        in_evaluation,
        in_training,
        partial(in_training, mask=np.arange(40).reshape(8, 5, 1) % 3 > 0),
        lambda x, eps: over_batch(lambda x: in_training(x, eps, axis_name="batch"))(x[:, None]),
    ],
)
def test_eps_may_be_an_array(function):
    """Which is an operand: no program is made anew for another; and it has derivatives."""
    with enable_x64(True):
        x, eps, traced = jnp.float64(X), 0.3, []

        def loss(x, eps):
            traced.append(eps)
            return (function(x, eps) ** 3).sum()

        step = jax.jit(jax.value_and_grad(loss))
        for value in (0.3, 0.01):
            wanted = jax.value_and_grad(loss)(x, value)
            traced.clear()
            for one, other in zip(step(x, jnp.float64(value)), wanted, strict=True):
                assert_exact(one, other)
        assert not traced, "no program is made for the second"
        at, h = jnp.float64(eps), 1e-5
        assert_exact(jax.jit(function)(x, at), function(x, eps))
        by_difference = (loss(x, eps + h) - loss(x, eps - h)) / (2 * h)
        close(jax.grad(loss, 1)(x, at), by_difference, rtol=1e-6)
        second = jax.grad(jax.grad(loss, 1))(x, at)
        by_difference = (jax.grad(loss)(x, eps + h) - jax.grad(loss)(x, eps - h)) / (2 * h)
        close(second, by_difference, rtol=1e-5, atol=1e-6)
        many = jax.vmap(function, (None, 0))(x, jnp.array([0.3, 0.01]))
        assert_exact(many[1], function(x, 0.01))


def test_a_number_is_a_constant_in_double():
    with enable_x64(True):
        x = jnp.float64(X)
        assert_exact(batch_norm(x, eps=0.1)[0], truth.batch_norm(np.float64(X), eps=0.1).y)
        assert abs(batch_norm(x, eps=0.1)[0] - batch_norm(x, eps=jnp.float32(0.1))[0]).max() > 1e-10
    assert "eps=0.1" in str(jax.make_jaxpr(partial(batch_norm, eps=0.1))(X))


def test_rates_may_be_arrays():
    mean, var = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    traced = []

    def moved(rate):
        traced.append(rate)
        return update_running(mean, var, batch_statistics(X), rate=rate)

    step = jax.jit(moved)
    for rate in (0.0, 0.1, 1.0):
        wanted = update_running(mean, var, batch_statistics(X), rate=rate)
        for one, other in zip(step(rate), wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert len(traced) == 1
    for rate in (-0.1, 1.1):
        assert np.isnan(step(rate)).all()


def test_arrays_out_of_range_make_nan():
    for eps in (0.0, -1e-5, jnp.inf, jnp.nan, 1e31):
        assert np.isnan(batch_norm(X, eps=jnp.float32(eps))[0]).all()
    for wrong, error in ((jnp.ones(1), ValueError), (jnp.array(True), TypeError)):
        for call in (partial(batch_norm, X, eps=wrong), partial(train_by, wrong)):
            with pytest.raises(error, match=r"(eps|rate) must be"):
                call()


def test_integers_and_wider_numbers():
    got = jax.jit(train_by)(1)
    for one, other in zip(got, train_by(1), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    with enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            x, eps = jnp.asarray(X, dtype), jnp.float64(0.1)
            for function in (in_training, in_evaluation):
                found = jax.grad(lambda e, f=function, x=x: f(x, e).sum())(eps)
                assert found.dtype == jnp.float64
                assert jnp.isfinite(found)


def train_by(rate):
    return update_running(jnp.zeros(4), jnp.ones(4), batch_statistics(X), rate=rate)
