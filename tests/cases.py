"""The inputs, good, hard and bad, that every door is given: one table each."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Good:
    """A shape with its feature axes, in words."""

    name: str
    shape: tuple[int, ...]
    axis: Any
    mask: str | None = None  # "bool" or "weights", of a feature axis of size "1" or "C"
    residual: bool = False
    activation: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def features(self) -> tuple[int, ...]:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(each % len(self.shape) for each in axes))

    def arrays(self, dtype=np.float64, seed=0):
        """dy, x, scale, bias and the keywords of batch_norm."""
        random = np.random.default_rng(seed)
        feature_shape = tuple(self.shape[each] for each in self.features)
        x = (random.normal(size=self.shape) * 2 + 3).astype(dtype)
        dy = random.normal(size=self.shape).astype(dtype)
        scale = random.uniform(0.5, 2, feature_shape).astype(np.float32)
        bias = random.normal(size=feature_shape).astype(np.float32)
        keywords = {"axis": self.axis, "eps": 1e-3, "activation": self.activation}
        if self.mask is not None:
            shape = tuple(
                1 if axis in self.features and self.mask.endswith("1") else size
                for axis, size in enumerate(self.shape)
            )
            mask = random.uniform(size=shape) > 0.3
            if self.mask.startswith("weights"):
                mask = mask * random.uniform(0.5, 2, shape).astype(np.float32)
            keywords["mask"] = mask
        if self.residual:
            keywords["residual"] = random.normal(size=self.shape).astype(dtype)
        return dy, x, scale, bias, keywords


GOOD = [
    Good("NC", (12, 5), -1),
    Good("NLC", (6, 7, 5), 2),
    Good("NHWC", (4, 5, 3, 6), -1),
    Good("NCHW", (4, 6, 5, 3), 1),
    Good("NDHWC", (2, 3, 2, 3, 4), -1),
    Good("channels first of all", (5, 30), 0),
    Good("one channel", (50, 1), 1),
    Good("many channels", (3, 1500), 1),
    Good("long rows", (2, 3, 1700), 1),
    Good("many rows", (1500, 3), 1),
    Good("two feature axes", (4, 3, 5, 2), (1, 2)),
    Good("feature axes apart", (4, 3, 5, 2), (1, -1)),
    Good("feature axes in any order", (4, 3, 5, 2), (2, 1)),
    Good("mask", (8, 7, 5), -1, mask="bool 1"),
    Good("mask of each feature", (8, 7, 5), -1, mask="bool C"),
    Good("weights", (8, 5, 7), 1, mask="weights 1"),
    Good("weights of each feature", (8, 5, 7), 1, mask="weights C"),
    Good("weights of long rows", (2, 3, 1700), 1, mask="weights 1"),
    Good("relu", (12, 5), -1, activation="relu"),
    Good("silu", (4, 6, 5, 3), 1, activation="silu"),
    Good("residual", (12, 5), -1, residual=True),
    Good("residual and relu", (4, 6, 5, 3), 1, residual=True, activation="relu"),
    Good("all at once", (8, 7, 5), -1, mask="weights 1", residual=True, activation="silu"),
]


WITHOUT_REDUCED_AXES = [
    Good("a vector", (5,), -1),
    Good("a vector of one", (1,), 0),
    Good("a vector, all at once", (5,), 0, mask="bool C", residual=True, activation="silu"),
    Good("every axis", (2, 3), (0, 1), activation="relu"),
    Good("every axis, in any order", (2, 1, 3), (2, 0, 1), residual=True),
    Good("every axis, weights", (2, 3), (1, 0), mask="weights C"),
]
ONE_VALUE = [
    Good("one row", (1, 5), -1),
    Good("one pixel", (1, 6, 1, 1), 1, mask="bool 1", activation="silu"),
    Good("one row, weights", (1, 5), -1, mask="weights C", residual=True),
    *WITHOUT_REDUCED_AXES,
]


@dataclass(frozen=True)
class Hard:
    """An input on which an obvious way to compute fails, and within how much of the truth y is.

    `rows` is how many there have to be to show it.
    """

    name: str
    values: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    tolerance: float
    rows: int = 1_000_000
    dtype: str = "float32"
    eps: float = 1e-5

    def __str__(self) -> str:
        return self.name

    @cache  # noqa: B019, of module constants alone
    def x(self, rows=None, features=2):
        """x, of the shape (rows, features), to be read only."""
        random = np.random.default_rng(0)
        x = self.values(random, (rows or self.rows, features)).astype(self.dtype)
        x.flags.writeable = False
        return x


def _large_mean(random, shape):
    """The means lie between two floats."""
    return 1e4 + 3e-4 * np.arange(shape[1]) + 0.01 * random.standard_normal(shape)


def _outlier_first(random, shape):
    """A first element far off is a bad pivot, if one relies on it."""
    x = random.standard_normal(shape)
    x[0] = 1e4
    return x


LARGE_MEAN = Hard("large mean", _large_mean, tolerance=5e-3)
CONSTANT = Hard("constant", lambda _, shape: np.full(shape, 1234.567), tolerance=1e-6)
CONSTANTS = [
    Hard(f"constant {value:.0e}", lambda _, shape, v=value: np.full(shape, v), 1e-6, rows=70_000)
    for value in (1e10, 2.0**70, 1e38)
]
FAR_AND_HUGE = Hard(
    "far and huge",
    lambda random, shape: 1e35 + 1e32 * random.standard_normal(shape),
    tolerance=1e-3,
    rows=70_000,
)
HUGE = Hard("huge", lambda random, shape: 1e30 * random.standard_normal(shape), tolerance=1e-3)
FAR_FLOAT16 = Hard(
    "float16 far from 0",
    lambda random, shape: random.uniform(300, 400, shape),
    tolerance=2e-3,
    dtype="float16",
)
LARGE_FLOAT16 = Hard(
    "float16 whose squares overflow",
    lambda random, shape: 300 * random.standard_normal(shape),
    tolerance=3e-3,
    dtype="float16",
)
OUTLIER_FIRST = Hard("outlier first", _outlier_first, tolerance=1.5e-3, rows=100_000)
SMALL = Hard(
    "small",
    lambda random, shape: 1e-12 * random.standard_normal(shape),
    tolerance=1e-4,
    rows=1000,
    eps=1e-30,
)
HARD = [
    *(LARGE_MEAN, CONSTANT, *CONSTANTS, HUGE, FAR_AND_HUGE),
    *(FAR_FLOAT16, LARGE_FLOAT16, OUTLIER_FIRST, SMALL),
]


@dataclass(frozen=True)
class Extreme:
    """A call at an end of the range of its dtype, which is right all the same.

    `x` and `dy` are of a random generator and a shape, `mask` of a shape that broadcasts to it.
    """

    name: str
    x: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    dtype: str = "float32"
    scale: float | None = None
    eps: float = 1e-5
    mask: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None
    dy: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None
    activation: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}: {self.name}"

    def arrays(self, shape, axis):
        """dy, x, scale, bias and the keywords of batch_norm."""
        random = np.random.default_rng(0)
        x = self.x(random, shape).astype(self.dtype)
        dy = (self.dy or normal)(random, shape).astype(self.dtype)
        wide = np.float64 if self.dtype == "float64" else np.float32
        channels = shape[axis]
        scale = None if self.scale is None else np.full(channels, self.scale, wide)
        bias = np.linspace(-1, 1, channels).astype(wide)
        keywords = {"axis": axis, "eps": self.eps, "activation": self.activation}
        if self.mask is not None:
            rows = [1 if each == axis % len(shape) else n for each, n in enumerate(shape)]
            keywords["mask"] = mask = self.mask(random, tuple(rows))
            if mask.dtype == bool:  # as padding: out of the loss, too
                dy = np.where(mask, dy, np.zeros_like(dy))
        return dy, x, scale, bias, keywords


def normal(random, shape):
    return random.standard_normal(shape)


def _limit(dtype):
    return float(ml_dtypes.finfo(dtype).max)


def _constant(value):
    return lambda random, shape: np.full(shape, value)


def _times(factor):
    return lambda random, shape: factor * random.standard_normal(shape)


def _either(one, other, part=0.5):
    return lambda random, shape: np.where(random.uniform(size=shape) < part, one, other)


def _uniform(limit):
    return lambda random, shape: limit * random.uniform(-1, 1, shape)


def _some(random, shape):
    """Seven in ten, the first not among them."""
    mask = random.uniform(size=shape) < 0.7
    mask[0] = False
    return mask


def _weights_of(*values):
    return lambda random, shape: random.choice(np.float32(values), shape)


def _padded(value, x=normal):
    """x, and `value` where `_some` has no weight."""

    def padded(random, shape):
        values = x(random, shape)
        values[0] = value
        return values

    return padded


def _ends(dtype):
    limit = _limit(dtype)
    return [
        Extreme("both ends", _either(limit, -limit), dtype),
        Extreme("one end, hardly the other", _either(limit, -limit, 0.1), dtype),
        Extreme("more than the range apart", _either(0.6 * limit, -limit), dtype),
        Extreme("the whole range", _uniform(limit), dtype),
        Extreme("near one end", lambda r, shape: limit * r.uniform(0.9, 1, shape), dtype),
        Extreme("constant, the largest", _constant(limit), dtype),
        *(
            Extreme(f"padding {name}", _padded(value), dtype, 4, mask=_some, activation=activation)
            for name, value in (("largest", limit), ("lowest", -limit))
            for activation in (None, "relu", "silu")
        ),
        Extreme("padding of small noise", _padded(-limit, _times(1e-3)), dtype, 4, mask=_some),
        Extreme(
            "padding far from the ends",
            _padded(-limit, _either(limit, limit / 2)),
            dtype,
            mask=_some,
        ),
    ]


EXTREMES = [
    *(each for dtype in ("float32", "float16", "bfloat16") for each in _ends(dtype)),
    Extreme("constant 1e21, masked", _constant(1e21), mask=_some),
    Extreme("constant 1e21, weighted", _constant(1e21), mask=_weights_of(0, 0.5, 2)),
    Extreme("padding 1e38 of tiny noise", _padded(1e38, _times(1e-6)), mask=_some, eps=1e-20),
    Extreme("padding -1e38, weights", _padded(-1e38), mask=_weights_of(0, 0.5, 2)),
    Extreme("large slope, constant", _constant(3.0), scale=3e37, eps=1e-37, dy=_times(1e-20)),
    Extreme("large slope", normal, scale=3e37, eps=1e-37, dy=_times(1e-3)),
    Extreme("large slope of tiny noise", _times(1e-10), scale=3e37, eps=1e-30, dy=_times(1e-22)),
    Extreme("scale 1e36", normal, scale=1e36),
    Extreme("scale 3e38", _uniform(1.5), scale=3e38, dy=_times(1e-3)),
    Extreme("scale 1e-39", normal, scale=1e-39),
    Extreme("scale 1e-30", normal, scale=1e-30),
    Extreme("tiny noise", _times(1e-15), eps=1e-37),
    Extreme("subnormal", _times(1e-40), eps=1e-37),
    Extreme("the largest eps", _times(1e15), eps=1e30),
    Extreme("weights 1e-37", normal, mask=_weights_of(1e-37, 3e-37)),
    Extreme("weights 1e-37 of 1e30", _times(1e30), mask=_weights_of(1e-37, 3e-37)),
    Extreme("weights 1e-40 beside 1", normal, mask=_weights_of(1e-40, 1, 2)),
    Extreme("weights 1e-30 beside 1", normal, mask=_weights_of(1e-30, 1, 2)),
    Extreme("weights 1e35", normal, mask=_weights_of(1e35, 3e35)),
    Extreme("weights 1e35 of 1e35", _times(1e35), mask=_weights_of(0, 1e35, 3e35)),
    Extreme("weights 1e-30 to 1e30", normal, mask=_weights_of(1e-30, 1, 1e30)),
    Extreme("dy 1e36", normal, dy=_times(1e36)),
    Extreme("dy 1e36, small scale", normal, dy=_times(1e36), scale=1e-3, eps=1e-10),
    Extreme("dy 1e-34", normal, dy=_times(1e-34)),
    Extreme("subnormal halves", _times(1e-6), "float16", eps=1e-14),
]
EXTREMES_OF_FLOAT64 = [
    *_ends("float64"),
    Extreme("noise 1e200", _times(1e200), "float64"),
    Extreme("constant 1e300", _constant(1e300), "float64"),
    Extreme("far and huge", lambda r, shape: 1e300 + 1e296 * r.standard_normal(shape), "float64"),
    Extreme("scale 1e300", normal, "float64", scale=1e300),
    Extreme("scale 1e-300", normal, "float64", scale=1e-300),
    Extreme(
        "large slope, constant",
        _constant(3.0),
        "float64",
        scale=3e307,
        eps=1e-37,
        dy=_times(1e-20),
    ),
    Extreme("weights 1e-30", normal, "float64", mask=_weights_of(1e-30, 3e-30)),
    Extreme("weights 1e30", normal, "float64", mask=_weights_of(1e30, 3e30)),
    Extreme("dy 1e300", normal, "float64", dy=_times(1e300)),
]


def _x(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@dataclass(frozen=True)
class Bad:
    """A call that must be refused: function, arguments, the error's type and a piece of it."""

    name: str
    error: type[Exception]
    message: str
    x: Any = None
    arrays: tuple[Any, ...] = ()
    keywords: Any = None
    function: str = "batch_norm"
    of_values: bool = False  # found only by a door that looks at values

    def __str__(self) -> str:
        return self.name

    def call(self, door):
        x = _x(6, 4) if self.x is None else self.x
        return door.call(self.function, x, *self.arrays, **(self.keywords or {}))


BAD = [
    Bad("rank 0", ValueError, r"x must have at least one axis, but its shape is \(\)", x=_x()),
    Bad(
        "rank 0, evaluation",
        ValueError,
        r"x must have at least one axis, but its shape is \(\)",
        x=_x(),
        arrays=(_x(), _x()),
        function="normalize",
    ),
    Bad(
        "integers",
        TypeError,
        "x must be an array of real floating-point .*int32",
        x=np.ones((6, 4), np.int32),
    ),
    Bad(
        "bools",
        TypeError,
        "x must be an array of real floating-point .*bool",
        x=np.ones((6, 4), bool),
    ),
    Bad(
        "complex",
        TypeError,
        "x must be an array of real floating-point .*complex64",
        x=np.ones((6, 4), np.complex64),
    ),
    Bad("eps zero", ValueError, "eps must be positive and finite, but got 0", keywords={"eps": 0}),
    Bad(
        "eps negative",
        ValueError,
        "eps must be positive and finite, but got -1",
        keywords={"eps": -1e-5},
    ),
    Bad(
        "eps NaN",
        ValueError,
        "eps must be positive and finite, but got nan",
        keywords={"eps": np.nan},
    ),
    Bad(
        "eps infinite",
        ValueError,
        "eps must be positive and finite, but got inf",
        keywords={"eps": np.inf},
    ),
    *(
        Bad(f"eps {name}", ValueError, message, keywords={"eps": value})
        for name, value, message in (
            ("too small", 1e-80, r"eps must be within \[1e-37, 1e\+30\], but got 1e-80"),
            ("too large", 1e80, r"eps must be within \[1e-37, 1e\+30\], but got 1e\+80"),
            ("0 as a float", Fraction(1, 10**400), r"eps must be within \[1e-37, 1e\+30\]"),
            ("infinite as a float", Fraction(10**400), r"eps must be within \[1e-37, 1e\+30\]"),
            ("subnormal", np.float32(1e-42), r"eps must be within \[1e-37, 1e\+30\]"),
        )
    ),
    Bad(
        "eps a Decimal",
        TypeError,
        r"eps must be a positive number, but got Decimal\('0.001'\)",
        keywords={"eps": Decimal("0.001")},
    ),
    Bad(
        "eps a string",
        TypeError,
        "eps must be a positive number, but got 'x'",
        keywords={"eps": "x"},
    ),
    Bad(
        "axis out of range",
        ValueError,
        r"axis must be within \[-2, 1\] .* got 2",
        keywords={"axis": 2},
    ),
    Bad(
        "axis negative out of range",
        ValueError,
        r"axis must be within \[-2, 1\] .* got -3",
        keywords={"axis": -3},
    ),
    Bad(
        "axis repeated",
        ValueError,
        r"axis must not name an axis of x twice, but got \(1, -1\)",
        keywords={"axis": (1, -1)},
    ),
    Bad(
        "axis a float",
        TypeError,
        "axis must be an integer or a tuple of integers, but got 1.0",
        keywords={"axis": 1.0},
    ),
    Bad(
        "axis a bool",
        TypeError,
        "axis must be an integer or a tuple of integers, but got True",
        keywords={"axis": True},
    ),
    Bad("no axis", ValueError, "axis must name at least one", keywords={"axis": ()}),
    Bad(
        "scale too short",
        ValueError,
        r"scale must have the feature shape \(4,\) .* its shape is \(3,\)",
        arrays=(_x(3),),
    ),
    Bad(
        "scale of one",
        ValueError,
        r"scale must have the feature shape \(4,\) .* its shape is \(1,\)",
        arrays=(_x(1),),
    ),
    Bad("scale of rank 2", ValueError, r"scale must have the feature shape", arrays=(_x(1, 4),)),
    Bad(
        "bias too long",
        ValueError,
        r"bias must have the feature shape \(4,\) .* its shape is \(5,\)",
        arrays=(None, _x(5)),
    ),
    Bad(
        "scale complex",
        TypeError,
        "scale must be an array of real",
        arrays=(np.ones(4, np.complex64),),
    ),
    Bad(
        "scale integers",
        TypeError,
        "scale must be an array of real floating-point .*int32",
        arrays=(np.ones(4, np.int32),),
    ),
    Bad(
        "bias bools",
        TypeError,
        "bias must be an array of real floating-point .*bool",
        arrays=(_x(4), np.ones(4, bool)),
    ),
    Bad(
        "mask does not broadcast",
        ValueError,
        r"mask must broadcast to the shape \(6, 4\) of x, but its shape is \(5, 1\)",
        keywords={"mask": np.ones((5, 1), bool)},
    ),
    Bad(
        "mask of higher rank",
        ValueError,
        "mask must broadcast",
        keywords={"mask": np.ones((1, 6, 4), bool)},
    ),
    Bad(
        "mask complex", TypeError, "mask must be", keywords={"mask": np.ones((6, 1), np.complex64)}
    ),
    Bad(
        "weights negative",
        ValueError,
        "mask must hold bools or weights >= 0, but it holds -1",
        keywords={"mask": -(_x(6, 1) ** 0)},
        of_values=True,
    ),
    Bad(
        "weights NaN",
        ValueError,
        "mask must hold bools or weights >= 0, but it holds nan",
        keywords={"mask": np.full((6, 1), np.nan)},
        of_values=True,
    ),
    Bad(
        "residual does not broadcast",
        ValueError,
        r"residual must broadcast to the shape \(6, 4\) of x, but its shape is \(6, 3\)",
        keywords={"residual": _x(6, 3)},
    ),
    Bad(
        "residual integers",
        TypeError,
        "residual must be an array of real floating-point",
        keywords={"residual": np.ones((6, 4), np.int32)},
    ),
    Bad(
        "unknown activation",
        ValueError,
        'activation must be None, "relu" or "silu", but got \'gelu\'',
        keywords={"activation": "gelu"},
    ),
    Bad(
        "activation a function", ValueError, "activation must be None", keywords={"activation": abs}
    ),
    Bad(
        "one value a feature",
        ValueError,
        r"needs more than one value of each feature, but x of shape \(1, 4\)",
        x=_x(1, 4),
    ),
    Bad(
        "a vector",
        ValueError,
        r"needs more than one value of each feature, but x of shape \(3,\) has one",
        x=_x(3),
    ),
    Bad(
        "every axis a feature axis",
        ValueError,
        r"needs more than one value of each feature, but x of shape \(6, 4\) has one",
        keywords={"axis": (0, 1)},
    ),
    Bad(
        "allow_one_value no bool",
        TypeError,
        "allow_one_value must be True or False, but got 'no'",
        keywords={"allow_one_value": "no"},
    ),
    Bad(
        "mean too short",
        ValueError,
        r"mean must have the feature shape \(4,\)",
        arrays=(_x(3), _x(4)),
        function="normalize",
    ),
    Bad(
        "mean integers",
        TypeError,
        "mean must be an array of real floating-point .*int32",
        arrays=(np.ones(4, np.int32), _x(4)),
        function="normalize",
    ),
    Bad(
        "var complex",
        TypeError,
        "var must be an array of real floating-point .*complex64",
        arrays=(_x(4), np.ones(4, np.complex64)),
        function="normalize",
    ),
    Bad(
        "var of one",
        ValueError,
        r"var must have the feature shape \(4,\)",
        arrays=(_x(4), _x(1)),
        function="normalize",
    ),
    Bad(
        "integers, evaluation",
        TypeError,
        "x must be an array of real",
        x=np.ones((6, 4), np.int32),
        arrays=(_x(4), _x(4)),
        function="normalize",
    ),
    Bad(
        "integers, statistics",
        TypeError,
        "x must be an array of real",
        x=np.ones((6, 4), np.int32),
        function="batch_statistics",
    ),
    Bad(
        "axis, statistics",
        ValueError,
        "axis must be within",
        keywords={"axis": 5},
        function="batch_statistics",
    ),
    Bad(
        "mask, statistics",
        ValueError,
        "mask must broadcast",
        keywords={"mask": np.ones(3, bool)},
        function="batch_statistics",
    ),
]
