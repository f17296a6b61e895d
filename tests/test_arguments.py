"""Each argument of each public function, wrong in every way: an error names it.

The arguments are those of the signatures: a new one without a row here fails.
"""

import inspect
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
import truth
from compare import near
from doors import JAX, MLX, NUMPY, TORCH, Door
from torch.masked import masked_tensor

import batchnorm.numpy
import batchnorm.torch
from batchnorm.documentation import COMMON
from batchnorm.numpy import Statistics

# PyTorch says so of nested and of masked tensors whenever one is made, and they are made here to be
# refused. Our doors say nothing of the kind.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of .* is in prototype stage")

SHAPE, FEATURES = (6, 4), (4,)
TOOLS = ("inspect", "recalibrate")  # whose arguments are models
OPTIONAL = ("scale", "bias", "mask", "residual", "out")


class Wrong(NamedTuple):
    """A value that an argument can't have."""

    name: str
    value: Any


class Units(np.ndarray):
    """As of libraries of physical units: its arithmetic is its own."""

    def __array_ufunc__(self, *arguments, **keywords):
        raise TypeError("these units do not go together")


class Functions(np.ndarray):
    def __array_function__(self, *arguments, **keywords):
        raise TypeError("these units do not go together")


class NotAvailable:
    """As a column of numbers with missing ones."""

    def __array__(self, dtype=None, copy=None):
        return np.array([1.0, None, 2.0, 3.0], object)


class Failing:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("nothing to be had")


def values(shape, dtype=np.float32):
    return np.random.default_rng(0).uniform(0.5, 1, shape).astype(dtype)


# ---- what is wrong with an array


def no_arrays(door: Door) -> Iterator[Wrong]:
    yield Wrong("a string", "abc")
    yield Wrong("a dict", {})
    yield Wrong("a set", {1.0})
    yield Wrong("an object", object())
    yield Wrong("a function", abs)
    yield Wrong("a ragged list", [[1.0], [2.0, 3.0]])
    yield Wrong("with missing values", NotAvailable())
    yield Wrong("no array at all", Failing())
    if door in (MLX, TORCH):
        yield Wrong("a number", 1.0)
        yield Wrong("a list", [1.0, 2.0, 3.0, 4.0])


def with_a_meaning(shape) -> Iterator[Wrong]:
    masked = np.ma.masked_less(values(shape), 0.7)
    yield Wrong("a masked array", masked)
    yield Wrong("a masked array without a mask", np.ma.asarray(values(shape)))
    yield Wrong("a list of masked arrays", list(masked))
    yield Wrong("a list of lists with a masked value", [[np.ma.masked] * 4])
    yield Wrong("an array with units", values(shape).view(Units))
    yield Wrong("an array with functions of its own", values(shape).view(Functions))


def of_other_frameworks(door: Door, shape) -> Iterator[Wrong]:
    """What no array of this door can be made of, or none without losing something."""
    yield Wrong("a sparse tensor", torch.ones(shape).to_sparse())
    yield Wrong("a nested tensor", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    yield Wrong("a masked tensor", masked_tensor(torch.ones(shape), torch.ones(shape) > 0))
    yield Wrong("random keys of JAX", jax.random.split(jax.random.key(0), FEATURES))
    if door is not TORCH:
        yield Wrong("a tensor without memory", torch.ones(shape, device="meta"))
        yield Wrong("a tensor of bfloat16", torch.ones(shape, dtype=torch.bfloat16))
        yield Wrong("a tensor with a gradient", torch.ones(shape, requires_grad=True))
    if door is not MLX:
        yield Wrong("an MLX array of bfloat16", mx.ones(shape, mx.bfloat16))
    if door in (MLX, TORCH):
        yield Wrong("a NumPy array", values(shape))
        yield Wrong("a JAX array", jnp.asarray(values(shape)))
        yield Wrong("an array of the other", torch.ones(shape) if door is MLX else mx.ones(shape))


def wrong_arrays(door: Door, shape, *, kinds: str) -> Iterator[Wrong]:
    """`kinds` are those of dtypes that are refused."""
    yield from no_arrays(door)
    yield from with_a_meaning(shape)
    yield from of_other_frameworks(door, shape)
    dtypes = {"c": [np.complex64], "b": [bool], "i": [np.int32, np.uint8]}
    for kind in kinds:
        for dtype in dtypes[kind]:
            yield Wrong(np.dtype(dtype).name, door.array(np.ones(shape, dtype)))
    if door is JAX:
        yield Wrong("float8", jnp.ones(shape, jnp.float8_e4m3fn))
    if door in (NUMPY, JAX):
        for dtype in (
            ml_dtypes.float8_e4m3fn,
            object,
            "U3",
            "M8[s]",
            "m8[s]",
            [("a", "f4")],
            "S3",
            "V2",
        ):
            yield Wrong(f"of dtype {dtype}", np.zeros(shape, dtype))


def of_features(door: Door, *, kinds: str = "bic") -> Iterator[Wrong]:
    yield from wrong_arrays(door, FEATURES, kinds=kinds)
    for shape in ((), (1,), (3,), (5,), (0,), (1, 4), (4, 1), SHAPE):
        yield Wrong(f"of shape {shape}", door.array(values(shape)))


def like_x(door: Door) -> Iterator[Wrong]:
    yield from wrong_arrays(door, SHAPE, kinds="bic")
    for shape in ((), (4,), (6, 1), (5, 4), (4, 6), (1, 6, 4)):
        yield Wrong(f"of shape {shape}", door.array(values(shape)))


def broadcasting(door: Door, *, kinds: str) -> Iterator[Wrong]:
    yield from wrong_arrays(door, SHAPE, kinds=kinds)
    for shape in ((5, 4), (6, 3), (6,), (1, 6, 4), (0, 4)):
        yield Wrong(f"of shape {shape}", door.array(values(shape)))


# ---- what is wrong with each argument


def x(door: Door) -> Iterator[Wrong]:
    yield Wrong("None", None)
    yield Wrong("of rank 0", door.array(values(())))
    yield from wrong_arrays(door, SHAPE, kinds="bic")


def mask(door: Door) -> Iterator[Wrong]:
    yield from broadcasting(door, kinds="c")
    if door.looks_at_values:
        yield Wrong("negative", -np.ones((6, 1)))
        yield Wrong("NaN", np.full((6, 1), np.nan))


def given_var(door: Door) -> Iterator[Wrong]:
    yield from required(door)
    if door.looks_at_values:
        yield Wrong("negative", np.array([1.0, 2.0, -1e-12, 1.0]))


def required(door: Door) -> Iterator[Wrong]:
    yield Wrong("None", None)
    yield from of_features(door)


def statistics(door: Door) -> Iterator[Wrong]:
    right = door.functions.batch_statistics(door.array(values(SHAPE)))
    pair = door.functions.batch_norm(door.array(values(SHAPE)))
    yield from (Wrong(repr(each)[:30], each) for each in (None, 3, "abc", (1, 2), (1, 2, 3), {}))
    yield Wrong("what batch_norm returns", pair)
    yield Wrong("y", pair[0])
    yield Wrong("a plain tuple of the three", tuple(right))
    yield Wrong("Statistics itself", type(right))
    for name in right._fields:
        for each in of_features(door, kinds="c"):
            yield Wrong(f"{name} {each.name}", right._replace(**{name: each.value}))
        yield Wrong(f"{name} None", right._replace(**{name: None}))


def axis(door: Door) -> Iterator[Wrong]:
    for each in (None, "1", 1.0, True, 2, -3, (), (0, 0), (0, 2), (0.5,), [[0]], {}, 1j, abs):
        yield Wrong(repr(each), each)
    yield Wrong("an array", np.array([0.5]))


def eps(door: Door) -> Iterator[Wrong]:
    for each in (None, "1e-5", True, 0, -1e-5, np.nan, np.inf, 1e80, 1e-80, (1e-5,), 1j, abs):
        yield Wrong(repr(each), each)
    yield Wrong("a Decimal", Decimal("0.1"))
    yield Wrong("several", np.full(3, 1e-5))
    yield Wrong("an array of one", np.full(1, 1e-5))
    yield Wrong("an array of a string", np.array("abc"))


def activation(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in ("gelu", 3, abs, ["relu"], True, b"relu"))


def boolean(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in ("no", 0, 1, None, [], 1.0))


def rate(door: Door) -> Iterator[Wrong]:
    for each in (None, "fast", True, 1.5, -0.1, np.nan, np.inf, 1j, (0.1,), abs):
        yield Wrong(repr(each), each)
    yield Wrong("several", np.full(3, 0.1))
    yield Wrong("an array of one", np.full(1, 0.1))
    yield Wrong("an array out of range", np.array(1.5))


def correction(door: Door) -> Iterator[Wrong]:
    for each in (None, "1", 2, -1, 0.5, 1.0, np.nan, True, 1j, (1,), [0], abs):
        yield Wrong(repr(each), each)
    yield Wrong("several", np.zeros(3, int))


def out(door: Door) -> Iterator[Wrong]:
    yield from with_a_meaning(SHAPE)
    yield Wrong("a list", [1.0])
    yield Wrong("a number", np.float32(1))
    yield Wrong("a tensor", torch.ones(SHAPE))
    yield Wrong("of shape (4, 6)", values((4, 6)))
    yield Wrong("of float64", values(SHAPE, np.float64))
    yield Wrong("read-only", np.broadcast_to(np.float32(1), SHAPE))


def axis_name(door: Door) -> Iterator[Wrong]:
    for each in (3, "nobody", ["i"], {}, ("nobody", "i"), (["i"],), np.zeros(3), abs, True):
        yield Wrong(repr(each), each)


def axis_index_groups(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (3, "ab", [[0]], [], abs))


def sync(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (3, "all", 1, [], abs))


def group(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (3, "all", 1, [], abs, True))


WRONG = {
    "x": x,
    "dy": lambda door: (*like_x(door), Wrong("None", None)),
    "scale": of_features,
    "bias": of_features,
    "mean": required,
    "var": required,
    "var of normalize": given_var,
    "residual": lambda door: broadcasting(door, kinds="bic"),
    "mask": mask,
    "statistics": statistics,
    "axis": axis,
    "eps": eps,
    "activation": activation,
    "allow_one_value": boolean,
    "rate": rate,
    "correction": correction,
    "out": out,
    "axis_name": axis_name,
    "axis_index_groups": axis_index_groups,
    "sync": sync,
    "group": group,
}


def right(door: Door, names) -> dict[str, Any]:
    """Arguments of those names, of which none is wrong; those with a default may be left out."""
    arrays = {
        "x": SHAPE,
        "dy": SHAPE,
        "residual": SHAPE,
        "mask": (6, 1),
        **dict.fromkeys(("scale", "bias", "mean", "var"), FEATURES),
    }
    arguments = {name: door.array(values(shape)) for name, shape in arrays.items()}
    arguments["statistics"] = door.functions.batch_statistics(arguments["x"])
    arguments |= {"rate": 0.5, "out": np.zeros(SHAPE, np.float32)}
    return {name: each for name, each in arguments.items() if name in names}


FUNCTIONS = {
    (door, name): inspect.signature(getattr(door.functions, name)).parameters
    for door in (NUMPY, MLX, JAX, TORCH)
    for name in door.functions.__all__
    if inspect.isfunction(getattr(door.functions, name)) and name in COMMON and name not in TOOLS
}
ARGUMENTS = [(*key, argument) for key, names in FUNCTIONS.items() for argument in names]


with pytest.raises(NameError) as of_jax:  # as JAX raises one, of an axis that is not there
    batchnorm.jax.batch_norm(np.ones((2, 2), np.float32), axis_name="no such axis")
UNKNOWN_AXIS = of_jax.type


def refusals(call, wrong, spoken: str) -> list[str]:
    """What is not refused as it should be."""
    faults = []
    for name, value in wrong:
        try:
            result = call(value)
        except (TypeError, ValueError) as error:
            first = str(error).partition("\n")[0]
            named = first.startswith((f"{spoken} ", f"{spoken}."))
            if type(error) not in (TypeError, ValueError, UNKNOWN_AXIS) or not named:
                faults.append(f"{name}: {type(error).__name__}: {first}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{name}: {result}"[:200])
    return faults


@pytest.mark.parametrize(
    ("door", "function", "argument"),
    ARGUMENTS,
    ids=[f"{door.name}-{function}-{argument}" for door, function, argument in ARGUMENTS],
)
def test_each_argument(door: Door, function: str, argument: str):
    arguments = right(door, FUNCTIONS[door, function])
    getattr(door.functions, function)(**arguments)
    before = np.copy(arguments.get("out", ()))

    def call(value):
        return getattr(door.functions, function)(**{**arguments, argument: value})

    wrong = WRONG.get(f"{argument} of {function}") or WRONG[argument]
    assert not refusals(call, wrong(door), argument)
    np.testing.assert_array_equal(arguments.get("out", ()), before)


# ---- arrays of other frameworks, of which one can be made

OTHERS = {
    "torch": torch.from_numpy,
    "mlx": mx.array,
    "jax": jnp.asarray,
    "numpy": np.asarray,
    "numpy's memory of a file": lambda array: array.view(np.memmap),
    "a matrix": lambda array: array.view(np.matrix),
    "a record": lambda array: array.view(np.recarray),
    "a list": lambda array: array.tolist(),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("door", [NUMPY, JAX], ids=["numpy", "jax"])
def test_arrays_of_other_frameworks(door: Door, kind: str):
    x, other = values(SHAPE), OTHERS[kind]
    y, statistics = door.functions.batch_norm(other(x), mask=other(x), residual=other(x))
    wanted = truth.batch_norm(x, mask=x, residual=x)
    near(y, wanted.y, 1e-5)
    near(statistics.var, wanted.var, 1e-6)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_narrow_arrays_of_jax_are_taken_by_numpy(kind):
    x = values(SHAPE, kind)
    y, _ = batchnorm.numpy.batch_norm(jnp.asarray(x))
    assert y.dtype == kind
    near(y, truth.batch_norm(x).y, 1e-2)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numbers_in_arrays_without_axes(kind):
    x = values(SHAPE)
    y, statistics = batchnorm.numpy.batch_norm(x, eps=np.array(0.25, kind))
    near(y, truth.batch_norm(x, eps=0.25).y, 1e-6)
    mean, var = batchnorm.numpy.update_running(
        np.zeros(4), np.ones(4), statistics, rate=np.array(0.5, kind)
    )
    near(mean, x.mean(0) / 2, 1e-6)
    near(var, 0.5 + x.var(0) / 2, 1e-6)


# ---- torch.nn.functional's function

FUNCTIONAL = {
    "input": x,
    "running_mean": of_features,
    "running_var": of_features,
    "weight": of_features,
    "bias": of_features,
    "training": boolean,
    "momentum": rate,
    "eps": eps,
}


OF_FUNCTIONAL = inspect.signature(batchnorm.torch.functional.batch_norm).parameters


@pytest.mark.parametrize(
    ("argument", "training"),
    [
        *((name, True) for name in OF_FUNCTIONAL),
        *((name, False) for name in OF_FUNCTIONAL if name != "momentum"),  # which is not read
    ],
)
def test_each_argument_of_functional(argument: str, training: bool):
    mean, var = torch.zeros(FEATURES), torch.ones(FEATURES)
    scale = torch.ones(FEATURES)
    arguments = {
        "input": torch.from_numpy(values(SHAPE)),
        **{"running_mean": mean, "running_var": var, "weight": scale, "bias": scale},
        "training": training,
    }

    def call(value):
        return batchnorm.torch.functional.batch_norm(**{**arguments, argument: value})

    wrong = FUNCTIONAL[argument](TORCH)
    assert not refusals(call, (each for each in wrong if each.name != "of rank 0"), argument)
    assert torch.equal(mean, torch.zeros(FEATURES))
    assert torch.equal(var, torch.ones(FEATURES))


# ---- functions of models


def models(_: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (None, 3, "abc", {}, torch.ones(3), abs))


def batches(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (3, abs, [], iter(())))
    yield Wrong("an array", door.array(values(SHAPE)))


def functions(_: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (3, "abc", []))


def normalize_by(_: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (None, 3, "both", True, ["batch"]))


OF_TOOLS = {
    "model": models,
    "batches": batches,
    "forward": functions,
    "normalize_by": normalize_by,
    "progress": boolean,
    "sync": sync,
    "group": group,
    "layer": models,
    "normalization": models,
}
# What fold's example may be is for the model to say.
TOOLS_ARGUMENTS = [
    (door, name, argument)
    for door in (MLX, TORCH)
    for name in ("changes", "fold", "fuse", "inspect", "recalibrate")
    if hasattr(door.functions, name)
    for argument in inspect.signature(getattr(door.functions, name)).parameters
    if argument != "example"
]


@pytest.mark.parametrize(
    ("door", "function", "argument"),
    [pytest.param(*each, id=f"{each[0].name}-{each[1]}-{each[2]}") for each in TOOLS_ARGUMENTS],
)
def test_each_argument_of_tools(door: Door, function: str, argument: str):
    layer, norm = (torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model = torch.nn.Sequential(layer, norm)
    if door is MLX:
        layer, norm = mlx.nn.Linear(4, 4), mlx.nn.BatchNorm(4)
        model = mlx.nn.Sequential(layer, norm)
    right = {"layer": layer, "normalization": norm, "model": model}
    right["batches"] = [door.array(values(SHAPE))] * 2
    called = getattr(door.functions, function)
    right = {
        key: each for key, each in right.items() if key in inspect.signature(called).parameters
    }
    if function == "changes":
        batchnorm.torch.fuse(model)
    if function == "fold" and door is MLX:
        norm.eval()
    called(**right)
    wrong = OF_TOOLS[argument](door)
    if (function, argument) == ("inspect", "batches"):
        wrong = (each for each in wrong if each.value is not None)
    assert not refusals(lambda value: called(**{**right, argument: value}), wrong, argument)


# ---- Statistics.merge


def no_statistics_of_these(door: Door) -> Iterator[Wrong]:
    yield from (Wrong(repr(each), each) for each in (None, 3, "abc", (1, 2), (1, 2, 3), {}))
    right = door.functions.batch_statistics(door.array(values(SHAPE)))
    yield Wrong("a plain tuple", tuple(right))
    for features in (1, 2, 5):
        one = door.functions.batch_statistics(door.array(values((6, features))))
        yield Wrong(f"of {features} features", one)
        for name in right._fields:
            value = getattr(one, name)
            yield Wrong(f"{name} of {features} features", right._replace(**{name: value}))
    yield Wrong("without an axis", Statistics(*(door.array(values(())) for _ in right)))
    for name in right._fields:
        for each in (None, "abc", 1.0, [1.0] * 4):
            yield Wrong(f"{name} {each!r}", right._replace(**{name: each}))


@pytest.mark.parametrize("door", [NUMPY, MLX, JAX, TORCH], ids=lambda door: door.name)
def test_merge_refuses(door: Door):
    statistics = door.functions.batch_statistics(door.array(values(SHAPE)))
    assert not refusals(statistics.merge, no_statistics_of_these(door), "other")
