"""Random arguments of a call, in memory that is watched, and what a call must make of them.

Everything is drawn from one generator of random numbers. What is wanted is computed in long double
by truth.py; how near to it a result must come follows from what each step adds up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
import truth
from compare import as_numpy

Random = np.random.Generator
Wide = np.longdouble

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16, FLOAT32, FLOAT64, LONG = (np.dtype(name) for name in "efdg")
DTYPES = [FLOAT32, FLOAT32, FLOAT64, FLOAT16, BFLOAT16]
ACTIVATIONS = [None, None, "relu", "silu"]


class WrongError(Exception):
    """What a call did is not what it should have done."""


def pick(random: Random, options: Any) -> Any:
    return options[random.integers(len(options))]


def chance(random: Random, probability: float) -> bool:
    return bool(random.random() < probability)


# ---- memory


@dataclass
class Placed:
    """An array in memory of which every byte is watched, seen as `shape`."""

    array: np.ndarray
    memory: np.ndarray
    shape: tuple[int, ...]
    is_written: bool = False

    def __str__(self) -> str:
        address = self.array.__array_interface__["data"][0]
        expanded = f" expanded to {self.shape}" if self.shape != self.array.shape else ""
        return (
            f"{self.array.dtype}{list(self.array.shape)} strides {list(self.array.strides)} "
            f"at {address % 64} mod 64 in memory {id(self.memory) % 9973}{expanded}"
        )

    def seen(self) -> np.ndarray:
        if self.shape == self.array.shape:
            return self.array
        return np.broadcast_to(self.array, self.shape)

    def bytes_of(self, memory: np.ndarray) -> np.ndarray:
        """The same array within a copy of its memory."""
        begin = self.array.__array_interface__["data"][0]
        offset = begin - self.memory.__array_interface__["data"][0]
        kind = f"V{self.array.itemsize}"
        return np.ndarray(self.array.shape, kind, memory, offset, self.array.strides)

    def tensor(self) -> torch.Tensor:
        array = self.array
        if array.dtype == BFLOAT16:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor if self.shape == self.array.shape else tensor.expand(self.shape)


def bytes_somewhere(random: Random, number: int) -> np.ndarray:
    """Either such as an overrun would leave at once, or at an address that does not vary."""
    if chance(random, 0.5):
        return np.full(number, 0xA5, np.uint8)
    memory = np.full(number + 64, 0xA5, np.uint8)
    return memory[-memory.__array_interface__["data"][0] % 64 :][:number]


def place(random: Random, values: np.ndarray, *, backwards: bool = True, room: int = 0) -> Placed:
    """Put values somewhere: in any order of axes, with gaps, backwards, at an odd address.

    `backwards` allows negative strides; `room` is how many bytes the memory has at least.
    """
    rank, size = values.ndim, values.itemsize
    how = pick(random, ["C", "C", "F", "permuted", "sliced", "strided", "channels last"])
    order = list(range(rank))
    if how == "F":
        order.reverse()
    elif how == "permuted":
        order = [int(axis) for axis in random.permutation(rank)]
    elif how == "channels last" and rank > 2:
        order = [0, *range(2, rank), 1]
    steps, gaps = [1] * rank, [0] * rank
    if how in ("sliced", "strided") and rank:
        for _ in range(random.integers(1, 3)):
            axis = random.integers(rank)
            if how == "sliced":
                gaps[axis] = int(random.integers(1, 4))
            else:
                steps[axis] = int(pick(random, [2, 3, -1, -2] if backwards else [2, 3]))
    front = int(pick(random, [0, 0, 0, size, 5 * size, 64]))
    if chance(random, 0.08):
        front += int(random.integers(1, 8))
    back = int(pick(random, [0, 0, size, 64]))
    spans = [
        max(0, (length - 1) * abs(step) + 1) + gap
        for length, step, gap in zip(values.shape, steps, gaps, strict=True)
    ]
    spans_in_memory = [spans[axis] for axis in order]
    memory = bytes_somewhere(random, max(room, front + int(np.prod(spans)) * size + back))
    block = np.ndarray(spans_in_memory, values.dtype, memory, front)
    block = block.transpose(sorted(range(rank), key=order.__getitem__))
    slices = [
        slice(0, max(0, (length - 1) * abs(step) + 1), abs(step))
        for length, step in zip(values.shape, steps, strict=True)
    ]
    turns = [slice(None, None, -1 if step < 0 else 1) for step in steps]
    array = block[tuple(slices)][tuple(turns)]
    array[...] = values
    return Placed(array, memory, values.shape)


def place_within(random: Random, values: np.ndarray, other: Placed) -> Placed:
    """Put values into the memory of another array, on top of it perhaps."""
    places = (other.memory.nbytes - values.nbytes) // values.itemsize
    offset = int(random.integers(places + 1)) * values.itemsize
    array = np.ndarray(values.shape, values.dtype, other.memory, offset)
    array[...] = values
    return Placed(array, other.memory, values.shape)


class Watch:
    """Of all memory of a call: what is not written must not change."""

    def __init__(self, placed: list[Placed]) -> None:
        self.placed = placed
        self.before = {id(each.memory): (each.memory, each.memory.copy()) for each in placed}

    def look(self) -> None:
        for memory, wanted in self.before.values():
            for each in self.placed:
                if each.is_written and each.memory is memory and each.array.size:
                    each.bytes_of(wanted)[...] = each.bytes_of(memory)
            changed = np.flatnonzero(memory != wanted)
            if changed.size:
                names = ", ".join(str(each) for each in self.placed if each.memory is memory)
                raise WrongError(
                    f"bytes {changed[:8].tolist()} of {memory.size} changed that are not written, "
                    f"in the memory of {names}"
                )


# ---- what is drawn


def draw_shape(random: Random, door: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape, and which of its axes are features."""
    most = int(pick(random, [60, 4000, 4000, 40_000] if chance(random, 0.96) else [400_000]))
    rank = int(pick(random, [2, 2, 2, 3, 3, 4, 4, 5]))
    if chance(random, 0.04):
        rank = int(random.integers(6, 25 if door == "torch" else 65))
    channels = int(pick(random, [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130, 300]))
    features = [int(pick(random, [1, rank - 1, 0]))]
    if rank > 2 and chance(random, 0.2):
        features = sorted(int(axis) for axis in random.permutation(rank)[: rank - 1 - (rank > 3)])
    shape = [1] * rank
    shape[features[0]] = channels
    left = max(1, most // channels)
    for axis in random.permutation(rank):
        if axis == features[0] or left < 2 or (rank > 6 and chance(random, 0.6)):
            continue
        most_here = min(left, int(pick(random, [2, 3, 9, 40, 700, 100_000])))
        shape[axis] = int(random.integers(1, most_here + 1))
        left //= shape[axis]
    if chance(random, 0.04):
        shape[random.integers(rank)] = 0
    if rank > 32:
        shape = [min(size, 2) if axis not in features else size for axis, size in enumerate(shape)]
    return tuple(shape), tuple(features)


def draw_numbers(random: Random, shape: Any, dtype: np.dtype, features: Any) -> np.ndarray:
    """Numbers as they come, and such as break what is computed carelessly."""
    info = ml_dtypes.finfo(dtype)
    digits = min(290.0, float(np.log10(float(info.max))) - 1)
    per_feature = [size if axis in features else 1 for axis, size in enumerate(shape)]
    normal = random.standard_normal(shape)
    mean = random.standard_normal(per_feature)
    family = pick(
        random,
        ["normal"] * 6
        + ["far", "far", "constant", "large", "small", "signs", "ramp", "outlier", "subnormal"],
    )
    with np.errstate(all="ignore"):
        if family == "far":
            normal += mean * 10 ** random.uniform(0, min(digits, 8))
        elif family == "constant":
            normal = mean * 10 ** random.uniform(-3, digits) + 0 * normal
        elif family == "large":
            normal = (normal + mean) * 10 ** random.uniform(digits / 4, 0.95 * digits)
        elif family == "small":
            normal = (normal + mean) * 10 ** -random.uniform(1, digits / 2)
        elif family == "signs":
            normal = np.sign(normal) * 10 ** random.uniform(-digits / 4, 0.95 * digits)
        elif family == "ramp":
            normal = np.arange(normal.size).reshape(shape) * 1e-3 + mean * 10 ** random.uniform(
                0, min(digits, 8)
            )
        elif family == "outlier" and normal.size:
            normal.reshape(-1)[0] = 10 ** random.uniform(0, min(digits, 4))
        elif family == "subnormal":
            normal = normal * float(info.smallest_subnormal) * 100
        return normal.clip(float(info.min), float(info.max)).astype(dtype)


def draw_parameter(random: Random, shape: Any, dtypes: list[np.dtype]) -> np.ndarray:
    values = random.standard_normal(shape)
    if chance(random, 0.1):
        values = values * 10 ** random.uniform(-4, 4)
    return values.clip(-6e4, 6e4).astype(pick(random, dtypes))


def draw_mask(random: Random, shape: tuple[int, ...], features: Any, is_wide: bool) -> np.ndarray:
    """Bools, or weights; for each element, each row or each feature."""
    of = [
        1 if (axis in features and chance(random, 0.7)) or chance(random, 0.1) else size
        for axis, size in enumerate(shape)
    ]
    leading = 0
    while leading < len(of) - 1 and of[leading] == 1 and chance(random, 0.5):
        leading += 1
    of = of[leading:]
    counts = random.random(of) < pick(random, [0.0, 0.3, 0.8, 1.0])
    kind = pick(random, ["bool", "bool", "weights", "whole numbers"])
    if kind == "bool":
        return counts
    if kind == "whole numbers":
        return (counts * random.integers(1, 4, of)).astype(pick(random, [np.int64, np.uint8]))
    weights = np.where(counts, random.uniform(0.1, 2, of), 0)
    weights = weights * 10 ** random.uniform(-3, 3)
    return weights.astype(FLOAT64 if is_wide and chance(random, 0.5) else FLOAT32)


def draw_padding(random: Random, x: np.ndarray, mask: np.ndarray) -> None:
    """Let what does not count hold anything."""
    info = ml_dtypes.finfo(x.dtype)
    padding = [0.0, np.nan, np.inf, -np.inf, float(info.max), float(info.min), 1e4]
    outside = np.broadcast_to(mask == 0, x.shape)
    for _ in range(random.integers(3)):
        chosen = outside & (random.random(x.shape) < random.random())
        x[chosen] = np.array(pick(random, padding)).astype(x.dtype)


@dataclass
class Case:
    """A call's arguments, as they are drawn and where they lie."""

    shape: tuple[int, ...]
    features: tuple[int, ...]
    dtype: np.dtype
    eps: float
    activation: str | None
    values: dict[str, np.ndarray] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.features)

    @property
    def values_per_feature(self) -> int:
        return int(np.prod([n for axis, n in enumerate(self.shape) if axis not in self.features]))

    def along(self, values: Any) -> np.ndarray:
        """Values of each feature, with axes of length 1 where x is reduced."""
        shape = [size if axis in self.features else 1 for axis, size in enumerate(self.shape)]
        return np.broadcast_to(np.asarray(values), self.feature_shape).reshape(shape)


def draw_case(
    random: Random, door: str, names: set[str], parameters: Callable[[np.dtype], list[np.dtype]]
) -> Case:
    """The values of a call; `names` are those of arguments that it may have.

    `parameters` says which dtypes may go with that of x.
    """
    shape, features = draw_shape(random, door)
    dtype = pick(random, DTYPES)
    if door == "numpy" and chance(random, 0.02):
        dtype = LONG
    case = Case(shape, features, dtype, 10 ** random.uniform(-7, 0), pick(random, ACTIVATIONS))
    if chance(random, 0.05):
        case.eps = 10 ** random.uniform(-14, 3)
    if case.values_per_feature == 1:
        reduced = next(axis for axis in range(len(shape)) if axis not in features)
        case.shape = shape = (*shape[:reduced], 2, *shape[reduced + 1 :])
    narrow = FLOAT64 if dtype == LONG else dtype
    values = case.values
    expanded = list(shape)
    if chance(random, 0.05):
        axis = random.integers(len(shape))
        expanded[axis] = min(1, shape[axis])
    values["x"] = draw_numbers(random, expanded, narrow, features).astype(dtype)
    if "mask" in names and chance(random, 0.4):
        values["mask"] = draw_mask(random, shape, features, dtype.itemsize > 4)
        if expanded == list(shape):
            draw_padding(random, values["x"], values["mask"])
    if chance(random, 0.04) and values["x"].size:
        at = random.integers(values["x"].size)
        values["x"].reshape(-1)[at] = pick(random, [np.nan, np.inf])
    for name in ("scale", "bias"):
        if name in names and chance(random, 0.7):
            values[name] = draw_parameter(random, case.feature_shape, parameters(dtype))
    if "residual" in names and chance(random, 0.3):
        of = [1 if chance(random, 0.15) else size for size in shape]
        of = of[random.integers(len(of)) if chance(random, 0.1) else 0 :]
        kind = dtype if chance(random, 0.8) else pick(random, [FLOAT32, FLOAT16])
        values["residual"] = draw_parameter(random, of, [kind])
    if "dy" in names:
        of = [1 if chance(random, 0.03) else size for size in shape]
        size = 10 ** random.uniform(-2, 2) if dtype != FLOAT16 else 1.0
        values["dy"] = (size * random.standard_normal(of)).astype(dtype)
    return case


def draw_given(random: Random, case: Case, dtypes: list[np.dtype]) -> None:
    """A mean and a variance not far from the batch's."""
    found = Expected(case).truth
    kind = pick(random, dtypes)
    most = min(1e30, float(ml_dtypes.finfo(kind).max) / 10)
    for name, value in (("mean", found.mean), ("var", found.var)):
        value = np.where(np.isfinite(value), value, 1.0)
        value = value * random.uniform(0.8, 1.2, case.feature_shape)
        case.values[name] = value.clip(-most, most).astype(kind)


def put(random: Random, case: Case, door: str) -> None:
    """Give every argument its memory, some the same one."""
    for name, value in case.values.items():
        if name in case.placed:
            continue
        twins = [
            other
            for other, placed in case.placed.items()
            if "mask" not in (name, other)
            and not name.startswith("statistics.")
            and name != "var"  # which is not negative
            and (placed.array.dtype, placed.array.shape) == (value.dtype, value.shape)
        ]
        if twins and chance(random, 0.1):
            twin = pick(random, twins)
            placed = replace(case.placed[twin])
            case.values[name] = case.values[twin]
        else:
            placed = place(random, value, backwards=door == "numpy")
        placed.shape = case.shape if name in ("x", "dy") else value.shape
        case.placed[name] = placed


# ---- the truth, and how near to it a result must come


@dataclass
class Near:
    """What a result must be, and how far from it each element may be: ∞ for anything at all."""

    wanted: np.ndarray
    within: np.ndarray
    # Beyond it, the dtype of computation has ∞ alone.
    limit: float = np.inf


# How many roundings of the dtype of computation a result may be off, in units of what is added up.
ROUNDINGS = 64


class Expected:
    """What a call must make of a case: each result as a `Near`.

    The error of each step is what came with its inputs, plus the rounding of all that it adds up;
    `unit` is that of 1, and `lost` what a product that is too small for the dtype loses. A feature
    is spoilt if what counts in it is not finite: then it may come out as anything.
    """

    def __init__(self, case: Case, given: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.case, self.given = case, given
        wide = {name: value.astype(Wide) for name, value in case.values.items()}
        x = np.broadcast_to(wide["x"], case.shape)
        self.weights = np.broadcast_to(wide.get("mask", Wide(1)), case.shape)
        self.part = (self.weights > 0) | np.isfinite(x)
        self.scale = wide.get("scale", np.ones(case.feature_shape, Wide))
        bias = wide.get("bias", np.zeros(case.feature_shape, Wide))
        residual = wide.get("residual", Wide(0))
        arguments = (x, wide.get("scale"), wide.get("bias"))
        keywords = {
            "axis": case.features,
            "eps": case.eps,
            "mask": wide.get("mask"),
            "residual": wide.get("residual"),
            "activation": case.activation,
            "given": given,
            "dtype": Wide,
        }
        with np.errstate(all="ignore"):
            self.truth = truth.batch_norm(*arguments, **keywords)
            if "dy" in wide:
                self.dy = np.broadcast_to(wide["dy"], case.shape)
                self.wanted = truth.batch_norm_gradients(self.dy, *arguments, **keywords)

            is_wide = case.dtype.itemsize > 4
            info = np.finfo(FLOAT64 if is_wide else FLOAT32)
            self.unit, self.limit = ROUNDINGS * Wide(info.eps) / 2, Wide(info.max)
            self.count = np.broadcast_to(self.truth.count, case.feature_shape)
            counted = self.weights > 0
            spoilt = self.over(counted & ~np.isfinite(x), np.any)
            self.is_nonfinite = bool(spoilt.any())
            self.spoilt = spoilt | ~np.isfinite(self.scale) | ~np.isfinite(bias)

            self.lost = Wide(info.smallest_subnormal)
            self.rstd = 1 / np.sqrt(self.truth.var + Wide(case.eps))
            mean, scale = case.along(self.truth.mean), case.along(np.abs(self.scale))
            distance = np.where(self.part, np.abs(x - mean), 0)
            self.mean_error = 4 * Wide(np.finfo(Wide).eps) * np.abs(self.truth.mean)
            if given is None:
                reach = self.over(np.where(counted, distance, 0), np.max)
                products = 2 + case.values_per_feature / self.divisor
                self.mean_error = self.mean_error + self.unit * reach + self.lost * products
            else:
                self.mean_error = self.mean_error + self.unit**2 * np.abs(self.truth.mean)
            self.x_hat = np.where(self.part, (x - mean) * case.along(self.rstd), 0)
            error = self.unit * distance + case.along(self.mean_error) + self.lost
            self.x_hat_error = error * case.along(self.rstd) + self.lost * (1 + distance)
            self.z = self.x_hat * case.along(self.scale) + case.along(bias) + residual
            added = np.abs(case.along(bias)) + np.abs(residual) + np.abs(self.z)
            self.z_error = self.x_hat_error * scale + self.unit * added + self.lost
            if "residual" in wide:
                self.z_error = self.z_error + rounded(case.dtype, residual)
            # Terms beyond the range of the dtype of computation do not cancel in it.
            largest = np.maximum(np.abs(self.x_hat) * scale, np.abs(residual))
            is_lost = (largest >= self.limit) & (np.abs(self.z) < self.limit)
            self.z_error = np.where(is_lost, np.inf, self.z_error)

    @property
    def divisor(self) -> np.ndarray:
        return np.where(self.count > 0, self.count, 1)

    def over(self, values: np.ndarray, operation: Callable[..., Any]) -> np.ndarray:
        """`operation` over the elements of each feature."""
        reduced = tuple(axis for axis in range(values.ndim) if axis not in self.case.features)
        keywords = {} if operation is np.any else {"initial": 0}
        found = operation(values, axis=reduced, keepdims=True, **keywords)
        return found.reshape(self.case.feature_shape)

    def near(self, wanted: np.ndarray, error: np.ndarray) -> Near:
        """Of the shape of x, or of one feature's; an error beyond the range of the dtype is ∞."""
        is_like_x = wanted.ndim == len(self.case.shape)
        spoilt = self.case.along(self.spoilt) if is_like_x else self.spoilt
        within = np.where(spoilt | (error > self.limit), np.inf, error)
        return Near(wanted, within, self.limit)

    def statistics(self) -> dict[str, Near]:
        mean, var = self.truth.mean, self.truth.var
        mean_error = self.mean_error + 4 * Wide(2.0**-53) * np.abs(mean)
        var_error = 4 * self.unit * var + self.mean_error**2 + self.lost
        return {
            "count": Near(self.count, 1e-6 * self.count),
            "mean": self.near(mean, mean_error),
            "var": self.near(var, var_error),
        }

    def output(self) -> Near:
        y = self.truth.y
        error = 1.2 * self.z_error + self.unit * np.abs(y) + rounded(self.case.dtype, y)
        return self.near(y, error)

    def gradients(self, mean_error: Any = 0) -> dict[str, Near]:
        """By the name of the argument. `mean_error`: how far off is the mean that comes to this."""
        with np.errstate(all="ignore"):
            return self._gradients(mean_error)

    def _gradients(self, mean_error: Any) -> dict[str, Near]:
        case, unit, along, wanted = self.case, self.unit, self.case.along, self.wanted
        dy, g, x_hat = np.abs(self.dy), np.abs(wanted["residual"]), np.abs(self.x_hat)
        size = np.abs(self.scale) * self.rstd
        x_hat_error = self.x_hat_error + along(mean_error * self.rstd)
        z_error = self.z_error + along(mean_error * size)
        g_error = np.zeros(case.shape, Wide)
        if case.activation == "silu":
            g_error = dy * (0.5 * z_error + unit)
        elif case.activation == "relu":
            g_error = dy * (np.abs(self.z) <= z_error)  # on either side of the kink
            g_error = (1 + unit) * g_error
        g_error = np.where(self.part, g_error, 0)

        def total(values: np.ndarray) -> np.ndarray:
            return self.over(np.where(self.part, values, 0), np.sum)

        lost = 2 * self.lost * case.values_per_feature * (1 + self.rstd)
        bias_error = total(g_error + unit * g) + lost
        scale_error = total((g_error + unit * g) * (x_hat + x_hat_error) + g * x_hat_error) + lost
        error = g_error + unit * g + along(lost)
        if self.given is None:
            sum_g, sum_g_x_hat = np.abs(wanted["bias"]), np.abs(wanted["scale"])
            shared = along(bias_error + unit * sum_g) + x_hat_error * along(sum_g_x_hat)
            shared = shared + x_hat * along(scale_error + unit * sum_g_x_hat)
            error = error + self.weights / along(self.divisor) * shared
            # A sum beyond the range of the dtype of computation meets an x̂ of 0.
            error = np.where(along(total(g * x_hat)) < self.limit, error, np.inf)
        x_error = along(size) * error + unit * np.abs(wanted["x"])
        scale_error = np.where(total(g * x_hat) < self.limit, scale_error, np.inf)
        errors = {
            "x": x_error + 8 * self.lost * (1 + error / unit),
            "scale": scale_error,
            "bias": bias_error,
            "residual": g_error,
        }
        for name in ("x", "residual"):
            errors[name] = errors[name] + rounded(case.dtype, np.abs(wanted[name]) + errors[name])
        if self.given is not None:
            errors["mean"] = size * (bias_error + 4 * total(unit * g)) + lost
            errors["var"] = size * self.rstd * (scale_error + 4 * total(unit * g * x_hat)) + lost
            errors["var"] = np.where(total(g * x_hat) < self.limit, errors["var"], np.inf)
        found = {name: self.near(wanted[name], error) for name, error in errors.items()}
        if "residual" in case.values:
            found["residual"] = self._summed_to_residual(found["residual"])
        return found

    def _summed_to_residual(self, near: Near) -> Near:
        case = self.case
        shape = case.values["residual"].shape
        whole = (1,) * (len(case.shape) - len(shape)) + shape
        axes = tuple(axis for axis, size in enumerate(case.shape) if whole[axis] != size)
        wanted = near.wanted.sum(axes, keepdims=True)
        within = near.within.sum(axes, keepdims=True)
        if axes:
            sizes = np.abs(np.nan_to_num(near.wanted))
            within = within + 4 * self.unit * sizes.sum(axes, keepdims=True)
        within = within + 2 * rounded(case.dtype, wanted)
        return Near(wanted.reshape(shape), within.reshape(shape), near.limit)


def rounded(dtype: np.dtype, values: np.ndarray) -> np.ndarray:
    """What rounding values to a dtype may change; nothing of NaN."""
    info = np.finfo(dtype) if dtype == LONG else ml_dtypes.finfo(dtype)
    return Wide(info.eps) * np.abs(np.nan_to_num(values)) + Wide(info.smallest_subnormal)


def dtype_of(array: Any) -> np.dtype:
    name = str(array.dtype).removeprefix("torch.")
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def check(name: str, got: Any, near: Near, dtype: np.dtype | None = None) -> None:
    """Where what is wanted is beyond the range of a dtype, half of that range will do."""
    kind, array = dtype_of(got), as_numpy(got)
    wanted = np.asarray(near.wanted)
    if dtype is not None and kind != dtype:
        raise WrongError(f"{name} is of dtype {kind}, not {dtype}")
    if array.shape != wanted.shape:
        raise WrongError(f"{name} has the shape {array.shape}, not {wanted.shape}")
    found = array.astype(Wide)
    info = np.finfo(kind) if kind == LONG else ml_dtypes.finfo(kind)
    limit = min(near.limit, Wide(info.max))
    with np.errstate(all="ignore"):
        within = near.within + rounded(kind, wanted)
        within = np.where(within < limit, within, np.inf)
        is_right = (np.abs(found - wanted) <= within) | (found == wanted) | np.isinf(within)
        is_right |= np.isnan(found) & np.isnan(wanted)
        is_beyond = np.abs(wanted) + within >= 0.99 * limit
        is_right |= is_beyond & (np.abs(found) >= limit / 2) & (np.sign(found) == np.sign(wanted))
    if not is_right.all():
        at = tuple(int(each) for each in np.argwhere(~is_right)[0])
        raise WrongError(
            f"{name} is {found[at]!s} at {at} of {wanted.shape}, not {wanted[at]!s}; it may be off "
            f"by {within[at]!s}; so it is at {int((~is_right).sum())} of {is_right.size} places"
        )
