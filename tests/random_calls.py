"""Random calls of NumPy's and PyTorch's doors, each compared with a long double truth.

A call is drawn from a seed and a number alone, and so can be made again. All of its arrays lie in
memory that is looked at afterwards: what was not to be written holds what it held.

fuzz.py runs this program, and says what came of it; it writes the number and the arguments of each
call to a file before it makes the call.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from random_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LONG,
    Case,
    Expected,
    Near,
    Placed,
    Random,
    Watch,
    Wide,
    WrongError,
    chance,
    check,
    draw_case,
    draw_given,
    draw_parameter,
    dtype_of,
    pick,
    place,
    place_within,
    put,
    rounded,
)

import batchnorm.numpy as bn
import batchnorm.torch as bt
from batchnorm import native

# ---- a call


class Call:
    """What a call is and does, said before it is made."""

    def __init__(
        self, what: str, case: Case | None, run: Callable[[], None], also: Any = ""
    ) -> None:
        self.what, self.case, self.run, self.also = what, case, run, also

    def __str__(self) -> str:
        lines = [self.what + (f", {self.also}" if self.also else "")]
        if self.case is not None:
            case = self.case
            lines.append(
                f"shape={case.shape}, axis={case.features}, dtype={case.dtype}, "
                f"eps={case.eps:.3g}, activation={case.activation!r}"
            )
            lines += [f"{name}: {placed}" for name, placed in case.placed.items()]
        return "\n  ".join(lines)


def options(case: Case, arrays: dict[str, Any], *names: str) -> dict[str, Any]:
    found = {"axis": case.features, "eps": case.eps, "activation": case.activation}
    return found | {name: arrays[name] for name in names if name in arrays}


def given_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return case.values["mean"].astype(Wide), case.values["var"].astype(Wide)


def watched(case: Case, also: Any = ()) -> Watch:
    return Watch([*case.placed.values(), *also])


# ---- NumPy


def numpy_call(random: Random) -> Call:
    function = pick(
        random,
        [
            *(numpy_batch_norm, numpy_batch_norm, numpy_normalize, numpy_statistics),
            *(numpy_gradients, numpy_gradients, numpy_update_running),
        ],
    )
    return function(random)


def numpy_parameters(dtype: np.dtype) -> list[np.dtype]:
    big_endian = FLOAT32.newbyteorder(">")
    return [FLOAT32, FLOAT64, FLOAT16, BFLOAT16, LONG, big_endian]


def arrays_of(random: Random, case: Case) -> dict[str, np.ndarray]:
    arrays = {name: placed.seen() for name, placed in case.placed.items()}
    for name in arrays:
        if chance(random, 0.05):
            arrays[name] = arrays[name].view()
            arrays[name].flags.writeable = False
    return arrays


def place_out(random: Random, case: Case) -> Placed | None:
    """Where y is to be put: nowhere in particular, into x, onto other arguments, apart from all."""
    kind = pick(random, [None, "apart", "apart", "x", "onto"])
    if kind is None:
        return None
    x = case.values["x"]
    if kind == "x" and x.shape == case.shape:
        put(random, case, "numpy")
        out = case.placed["x"]
        return replace(out, is_written=True)
    empty = np.zeros(case.shape, case.dtype)
    names = list(case.values)
    onto = pick(random, names)
    room = case.values[onto].nbytes + empty.nbytes // 2 + 64
    out = place(random, empty, room=room if kind == "onto" else 0)
    out.is_written = True
    if kind == "onto":
        placed = place_within(random, case.values[onto], out)
        placed.shape = case.shape if onto == "x" else placed.shape
        case.placed[onto] = placed
    put(random, case, "numpy")
    return out


def numpy_batch_norm(random: Random) -> Call:
    names = {"scale", "bias", "mask", "residual"}
    case = draw_case(random, "numpy", names, numpy_parameters)
    out = place_out(random, case)
    put(random, case, "numpy")
    arrays = arrays_of(random, case)

    def run() -> None:
        expected = Expected(case)
        watch = watched(case, [] if out is None else [out])
        y, statistics = bn.batch_norm(
            arrays["x"],
            arrays.get("scale"),
            arrays.get("bias"),
            **options(case, arrays, "mask", "residual"),
            out=None if out is None else out.array,
        )
        watch.look()
        if out is not None and y is not out.array:
            raise WrongError("y is not out")
        check("y", y, expected.output(), case.dtype)
        for name, near in expected.statistics().items():
            check(name, getattr(statistics, name), near, FLOAT64)

    return Call("numpy.batch_norm", case, run, f"out: {out}")


def numpy_normalize(random: Random) -> Call:
    case = draw_case(random, "numpy", {"scale", "bias", "residual"}, numpy_parameters)
    draw_given(random, case, [FLOAT32, FLOAT64])
    out = place_out(random, case)
    put(random, case, "numpy")
    arrays = arrays_of(random, case)

    def run() -> None:
        expected = Expected(case, given_of(case))
        watch = watched(case, [] if out is None else [out])
        y = bn.normalize(
            arrays["x"],
            arrays["mean"],
            arrays["var"],
            arrays.get("scale"),
            arrays.get("bias"),
            **options(case, arrays, "residual"),
            out=None if out is None else out.array,
        )
        watch.look()
        check("y", y, expected.output(), case.dtype)

    return Call("numpy.normalize", case, run, f"out: {out}")


def numpy_statistics(random: Random) -> Call:
    case = draw_case(random, "numpy", {"mask"}, numpy_parameters)
    put(random, case, "numpy")
    arrays = arrays_of(random, case)

    def run() -> None:
        expected = Expected(case)
        watch = watched(case)
        found = bn.batch_statistics(arrays["x"], axis=case.features, mask=arrays.get("mask"))
        watch.look()
        for name, near in expected.statistics().items():
            check(name, getattr(found, name), near, FLOAT64)

    return Call("numpy.batch_statistics", case, run)


def numpy_gradients(random: Random) -> Call:
    names = {"scale", "bias", "mask", "residual", "dy"}
    case = draw_case(random, "numpy", names, numpy_parameters)
    found = Expected(case).truth
    for name in ("count", "mean", "var"):
        values = np.broadcast_to(getattr(found, name), case.feature_shape)
        with np.errstate(all="ignore"):
            case.values[f"statistics.{name}"] = values.astype(FLOAT64)
    put(random, case, "numpy")
    arrays = arrays_of(random, case)

    def run() -> None:
        expected = Expected(case)
        for name in ("mean", "var"):
            expected.spoilt |= ~np.isfinite(case.values[f"statistics.{name}"])
        # What rounding the mean to one number may do.
        lost = Wide(2.0**-52) * np.abs(expected.truth.mean)
        watch = watched(case)
        statistics = bn.Statistics(
            *(arrays[f"statistics.{name}"] for name in bn.Statistics._fields)
        )
        try:
            gradients = bn.batch_norm_gradients(
                arrays["dy"],
                arrays["x"],
                statistics,
                arrays.get("scale"),
                arrays.get("bias"),
                **options(case, arrays, "mask", "residual"),
            )
        except ValueError:
            watch.look()
            if case.dtype == FLOAT64 and np.isinf(statistics.var).any():
                return
            raise
        watch.look()
        wanted = expected.gradients(lost)
        for name in ("x", "scale", "bias", "residual"):
            got = getattr(gradients, name)
            if (got is None) != (name not in case.values):
                raise WrongError(f"the gradient of {name} is {got}")
            if got is not None:
                check(f"the gradient of {name}", got, wanted[name])

    return Call("numpy.batch_norm_gradients", case, run)


def draw_update(random: Random, dtypes: Any) -> tuple[dict[str, np.ndarray], float, int]:
    channels = int(pick(random, [0, 1, 3, 17, 300]))
    shape = (channels,) if chance(random, 0.8) else (channels, 2)
    values = {
        "mean": draw_parameter(random, shape, dtypes),
        "var": np.abs(draw_parameter(random, shape, dtypes)),
        "statistics.count": random.integers(0, 4, shape).astype(FLOAT64),
        "statistics.mean": draw_parameter(random, shape, [FLOAT64]),
        "statistics.var": np.abs(draw_parameter(random, shape, [FLOAT64])),
    }
    rate = float(pick(random, [0.0, 1.0, random.random(), 1e-9]))
    return values, rate, int(random.integers(2))


def moved(
    old: tuple[np.ndarray, np.ndarray], batch: Any, rate: Any, correction: int
) -> tuple[np.ndarray, np.ndarray]:
    """Running statistics in long double, by the formula."""
    count, mean, var = (np.asarray(each).astype(Wide) for each in batch)
    enough = count > correction
    degrees = np.where(enough, count - correction, 1)
    rate = np.asarray(rate).astype(Wide)
    new_mean = (1 - rate) * old[0].astype(Wide) + rate * mean
    new_var = (1 - rate) * old[1].astype(Wide) + rate * var * count / degrees
    return (
        np.where(enough, new_mean, old[0].astype(Wide)),
        np.where(enough, new_var, old[1].astype(Wide)),
    )


def numpy_update_running(random: Random) -> Call:
    values, rate, correction = draw_update(random, [FLOAT32, FLOAT64, FLOAT16, BFLOAT16])
    placed = {name: place(random, value) for name, value in values.items()}

    def run() -> None:
        watch = Watch(list(placed.values()))
        batch = bn.Statistics(
            *(placed[f"statistics.{name}"].array for name in bn.Statistics._fields)
        )
        got = bn.update_running(
            placed["mean"].array, placed["var"].array, batch, rate=rate, correction=correction
        )
        watch.look()
        wanted = moved((values["mean"], values["var"]), batch, rate, correction)
        for name, one, other in zip(("mean", "var"), got, wanted, strict=True):
            within = 1e-14 * (np.abs(other) + np.abs(values[name].astype(Wide)))
            check(name, one, Near(other, within), np.promote_types(values[name].dtype, FLOAT32))

    text = "".join(f"\n  {name}: {each}" for name, each in placed.items())
    return Call("numpy.update_running", None, run, f"rate={rate}, correction={correction}{text}")


# ---- PyTorch


def torch_call(random: Random) -> Call:
    function = pick(
        random,
        [
            *(torch_batch_norm, torch_batch_norm, torch_normalize, torch_statistics),
            *(torch_update_running, torch_functional, torch_layer, torch_layer, torch_tampered),
        ],
    )
    return function(random)


def torch_parameters(dtype: np.dtype) -> list[np.dtype]:
    return [FLOAT32, FLOAT64, FLOAT16, BFLOAT16]


def layer_parameters(dtype: np.dtype) -> list[np.dtype]:
    return [dtype] if dtype.itemsize > 2 else [dtype, FLOAT32]


def tensors_of(random: Random, case: Case, leaves: set[str]) -> dict[str, torch.Tensor]:
    """A tensor for each argument, of which some of the `leaves` require a gradient."""
    tensors = {}
    made: dict[Any, torch.Tensor] = {}  # what comes twice is one tensor
    for name, placed in case.placed.items():
        tensors[name] = made.setdefault((id(placed.array), placed.shape), placed.tensor())
        if name in leaves and chance(random, 0.7):
            tensors[name].requires_grad_()
    return tensors


def check_gradients(
    expected: Expected, y: torch.Tensor, tensors: dict[str, torch.Tensor], *names: str
) -> None:
    leaves = {name: tensors[name] for name in names if name in tensors}
    wanted = {id(leaf): leaf for leaf in leaves.values() if leaf.requires_grad}
    if not wanted:
        return
    found = torch.autograd.grad(y, list(wanted.values()), tensors["dy"], allow_unused=True)
    nearly = expected.gradients()
    for leaf, gradient in zip(wanted.values(), found, strict=True):
        # A tensor that came twice has the sum of its two gradients.
        names = [name for name, each in leaves.items() if each is leaf]
        if gradient is None:
            raise WrongError(f"{names} has no gradient")
        near = nearly[names[0]]
        for other in (nearly[name] for name in names[1:]):
            roundings = sum(rounded(dtype_of(leaf), each.wanted) for each in (near, other))
            within = near.within + other.within + roundings
            near = Near(near.wanted + other.wanted, within, near.limit)
        check(f"the gradient of {' and '.join(names)}", gradient, near, dtype_of(leaf))


def torch_batch_norm(random: Random) -> Call:
    names = {"scale", "bias", "mask", "residual", "dy"}
    case = draw_case(random, "torch", names, torch_parameters)
    put(random, case, "torch")
    tensors = tensors_of(random, case, {"x", "scale", "bias", "residual"})
    spoils = chance(random, 0.1)

    def run() -> None:
        expected = Expected(case)
        watch = watched(case)
        y, statistics = bt.batch_norm(
            tensors["x"],
            tensors.get("scale"),
            tensors.get("bias"),
            **options(case, tensors, "mask", "residual"),
        )
        watch.look()
        check("y", y, expected.output(), case.dtype)
        for name, near in expected.statistics().items():
            check(name, getattr(statistics, name), near)
        if spoils:  # what users do with their statistics is nothing to a gradient
            with torch.no_grad():
                for each in statistics:
                    each.fill_(7)
        check_gradients(expected, y, tensors, "x", "scale", "bias", "residual")
        watch.look()

    return Call(
        "torch.batch_norm", case, run, "which then changes the statistics" if spoils else ""
    )


def torch_normalize(random: Random) -> Call:
    case = draw_case(random, "torch", {"scale", "bias", "residual", "dy"}, torch_parameters)
    draw_given(random, case, [FLOAT32, FLOAT64])
    put(random, case, "torch")
    leaves = ["x", "scale", "bias", "residual", *(["mean", "var"] if chance(random, 0.3) else [])]
    tensors = tensors_of(random, case, {*leaves})

    def run() -> None:
        expected = Expected(case, given_of(case))
        watch = watched(case)
        y = bt.normalize(
            tensors["x"],
            tensors["mean"],
            tensors["var"],
            tensors.get("scale"),
            tensors.get("bias"),
            **options(case, tensors, "residual"),
        )
        watch.look()
        check("y", y, expected.output(), case.dtype)
        check_gradients(expected, y, tensors, "x", "scale", "bias", "residual", "mean", "var")
        watch.look()

    return Call("torch.normalize", case, run)


def torch_statistics(random: Random) -> Call:
    case = draw_case(random, "torch", {"mask"}, torch_parameters)
    put(random, case, "torch")
    tensors = tensors_of(random, case, set())

    def run() -> None:
        expected = Expected(case)
        watch = watched(case)
        mask = tensors.get("mask")
        found = bt.batch_statistics(tensors["x"], axis=case.features, mask=mask)
        watch.look()
        for name, near in expected.statistics().items():
            check(name, getattr(found, name), near)

    return Call("torch.batch_statistics", case, run)


def torch_update_running(random: Random) -> Call:
    values, rate, correction = draw_update(random, torch_parameters(FLOAT32))
    placed = {name: place(random, value, backwards=False) for name, value in values.items()}

    def run() -> None:
        watch = Watch(list(placed.values()))
        batch = bt.Statistics(
            *(placed[f"statistics.{name}"].tensor() for name in bt.Statistics._fields)
        )
        got = bt.update_running(
            placed["mean"].tensor(), placed["var"].tensor(), batch, rate=rate, correction=correction
        )
        watch.look()
        wanted = moved((values["mean"], values["var"]), batch, rate, correction)
        for name, one, other in zip(("mean", "var"), got, wanted, strict=True):
            within = 1e-14 * (np.abs(other) + np.abs(values[name].astype(Wide)))
            check(name, one, Near(other, within), np.promote_types(values[name].dtype, FLOAT32))

    text = "".join(f"\n  {name}: {each}" for name, each in placed.items())
    return Call("torch.update_running", None, run, f"rate={rate}, correction={correction}{text}")


def draw_layer_case(random: Random, names: set[str]) -> Case:
    while True:
        case = draw_case(random, "torch", names, layer_parameters)
        rank, features = len(case.shape), case.features
        if features == (1,) and rank <= 5 and case.shape[1] > 0:
            return case


def put_with_running(random: Random, case: Case, moves: bool) -> None:
    """`put`, but the running statistics in no memory of others, since they may move."""
    put(random, case, "torch")
    for name in ("mean", "var"):
        case.placed[name] = place(random, case.values[name], backwards=False)
        case.placed[name].is_written = moves


def running_near(case: Case, batch: Expected, rate: Any) -> dict[str, Near]:
    """Where the running statistics are after a batch; `case.values` holds where they were."""
    old = {name: case.values[name].astype(Wide) for name in ("mean", "var")}
    count, statistics = batch.count, batch.statistics()
    found = {}
    with np.errstate(all="ignore"):
        of_batch = (count, batch.truth.mean, batch.truth.var)
        wanted = moved((old["mean"], old["var"]), of_batch, rate, 1)
        # How much of the batch comes in; and a count of hardly more than 1 is a hard divisor.
        unbiased = rate * np.where(count > 1, count / (count - 1), 1)
        blurred = np.where(np.abs(count - 1) < 1e-5, np.inf, 1e-6 * unbiased * count)
        for name, new in zip(("mean", "var"), wanted, strict=True):
            near = statistics[name]
            within = unbiased * near.within + rounded(case.values[name].dtype, old[name])
            if name == "var":
                within = within + blurred * np.abs(near.wanted)
            # A variance beyond float64 is infinite, and moves nothing or everything.
            is_any = batch.spoilt | (blurred == np.inf) | (statistics["var"].wanted > 1e307)
            within = np.where(is_any, np.inf, within)
            found[name] = Near(new, within, batch.limit)
    return found


def torch_functional(random: Random) -> Call:
    case = draw_layer_case(random, {"scale", "bias", "dy"})
    case.activation = None
    draw_given(random, case, torch_parameters(case.dtype))
    training = chance(random, 0.6)
    put_with_running(random, case, training)
    tensors = tensors_of(random, case, {"x", "scale", "bias"})
    momentum = float(pick(random, [0.1, 0.0, 1.0]))

    def run() -> None:
        expected = Expected(case, None if training else given_of(case))
        watch = watched(case)
        y = bt.functional.batch_norm(
            tensors["x"],
            tensors["mean"],
            tensors["var"],
            tensors.get("scale"),
            tensors.get("bias"),
            training,
            momentum,
            case.eps,
        )
        watch.look()
        check("y", y, expected.output(), case.dtype)
        if training and case.values["x"].size:
            for name, near in running_near(case, expected, momentum).items():
                check(f"running_{name}", tensors[name], near)
        check_gradients(expected, y, tensors, "x", "scale", "bias")
        watch.look()

    return Call("torch.functional.batch_norm", case, run, f"training={training}, {momentum=}")


def draw_layer(random: Random, case: Case) -> Any:
    rank = len(case.shape)
    kind = {2: bt.BatchNorm1d, 3: bt.BatchNorm1d, 4: bt.BatchNorm2d, 5: bt.BatchNorm3d}[rank]
    layer = kind(
        case.shape[1],
        eps=case.eps,
        momentum=pick(random, [0.1, 0.1, None, 1.0, 0.0]),
        affine=False,
        activation=case.activation,
        skip_nonfinite=chance(random, 0.2),
    )
    layer.num_batches_tracked.fill_(int(random.integers(3)))
    layer.train(chance(random, 0.7))
    if chance(random, 0.25):
        layer.freeze(
            normalize_by=pick(random, ["running", "batch", None]),
            update_running=pick(random, [True, False, None]),
        )
    return layer


def what_it_does(layer: Any) -> tuple[bool, bool]:
    """Whether a layer normalizes by running statistics, and whether it moves them."""
    by_running = layer.normalize_by or ("batch" if layer.training else "running")
    moves = layer.training if layer.update_running is None else layer.update_running
    return by_running == "running", moves


def give(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Let a layer have these tensors, its parameters as torch.nn.Parameter."""
    layer.running_mean, layer.running_var = tensors["mean"], tensors["var"]
    for name, own in (("scale", "weight"), ("bias", "bias")):
        if name in tensors:
            tensor = tensors[name]
            tensors[name] = torch.nn.Parameter(tensor.detach(), tensor.requires_grad)
            setattr(layer, own, tensors[name])


def torch_layer(random: Random) -> Call:
    case = draw_layer_case(random, {"scale", "bias", "mask", "residual", "dy"})
    draw_given(random, case, layer_parameters(case.dtype))
    layer = draw_layer(random, case)
    by_running, moves = what_it_does(layer)
    moves = moves and 0 not in case.shape
    put_with_running(random, case, moves)
    tensors = tensors_of(random, case, {"x", "scale", "bias", "residual"})
    give(layer, tensors)
    tracked = int(layer.num_batches_tracked)

    def run() -> None:
        batch = Expected(case)
        expected = Expected(case, given_of(case)) if by_running else batch
        watch = watched(case)
        y = layer(tensors["x"], residual=tensors.get("residual"), mask=tensors.get("mask"))
        watch.look()
        check("y", y, expected.output(), case.dtype)
        if moves:
            is_beyond = (batch.truth.var > np.finfo(FLOAT64).max).any()
            is_skipped = layer.skip_nonfinite and (batch.is_nonfinite or is_beyond)
            rate = 1 / Wide(tracked + 1) if layer.momentum is None else Wide(layer.momentum)
            for name, near in running_near(case, batch, rate).items():
                if is_skipped:
                    near = Near(case.values[name].astype(Wide), Wide(0))
                check(f"running_{name}", tensors[name], near)
            counted = tracked + (bool((batch.count > 0).any()) and not is_skipped)
            if int(layer.num_batches_tracked) != counted:
                raise WrongError(f"num_batches_tracked is not {counted}: {layer.state_dict()}")
        check_gradients(expected, y, tensors, "x", "scale", "bias", "residual")
        watch.look()

    return Call(f"torch layer {layer}, training={layer.training}", case, run)


def torch_tampered(random: Random) -> Call:
    """A layer whose tensors are not what they were, or not there: an error, and nothing worse."""
    case = draw_layer_case(random, {"scale", "bias", "mask", "residual", "dy"})
    draw_given(random, case, layer_parameters(case.dtype))
    layer = draw_layer(random, case)
    by_running, moves = what_it_does(layer)
    put(random, case, "torch")
    tensors = {name: placed.tensor().clone() for name, placed in case.placed.items()}
    for name in ("x", "scale", "bias"):
        if name in tensors:
            tensors[name].requires_grad_()
    give(layer, tensors)
    forward = {*tensors} - {"dy"} - (set() if by_running or moves else {"mean", "var"})
    backward = {"x", "scale"} & {*tensors}
    when, names = pick(random, [("forward", forward), ("backward", backward)])
    victim = pick(random, sorted(names))
    changes = ["freed", "shrunk"] if when == "backward" else ["freed"]
    if by_running and victim in ("mean", "var"):
        changes.append("None")
    change = pick(random, changes)
    has_gradients = chance(random, 0.5) or when == "backward"

    def tamper() -> None:
        tensor = tensors[victim]
        if change == "freed":
            tensor.untyped_storage().resize_(0)
        elif change == "shrunk":
            tensor.data = tensor.data.flatten()[: tensor.numel() // 2].clone()
        else:
            setattr(layer, f"running_{victim}", None)

    def run() -> None:
        if when == "forward":
            tamper()
        try:
            with torch.set_grad_enabled(has_gradients):
                y = layer(tensors["x"], residual=tensors.get("residual"), mask=tensors.get("mask"))
            if when == "backward":
                tamper()
                y.backward(tensors["dy"])
        except (RuntimeError, ValueError, TypeError):
            return
        if case.values[victim].size and 0 not in case.shape:
            raise WrongError(f"{victim} was taken, though it was {change}")

    text = f"{victim} is {change} before {when}, training={layer.training}, {has_gradients=}"
    return Call(f"torch layer {layer}", case, run, text)


# ---- several at once, and all of them


def draw_settings(random: Random) -> tuple[str, Callable[[], None]]:
    """What all calls of a process have in common, in words; and to set it."""
    threads = int(pick(random, [1, 2, 3, 5, 16]))
    level = pick(random, native.instruction_sets())
    cache = int(pick(random, [0, 1 << 12, 1 << 16, 1 << 25]))
    ours = int(pick(random, [1, 2, 4]))

    def settle() -> None:
        native.set_num_threads(threads)
        native.set_instruction_set(level)
        native.kernels.set_last_level_cache_bytes(cache)
        torch.set_num_threads(ours)

    return f"{threads} threads, PyTorch's {ours}, {level}, a cache of {cache} bytes", settle


def several(calls: list[Call]) -> Callable[[], None]:
    """All at once, each in a thread, while another one changes the number of threads."""

    def run() -> None:
        wrong: list[Exception] = []
        is_over = threading.Event()

        def make(call: Call) -> None:
            try:
                call.run()
            except Exception as error:
                error.add_note(f"in {call}")
                wrong.append(error)

        def change() -> None:
            while not is_over.wait(1e-3):
                for number in (1, 7):
                    native.set_num_threads(number)

        threads = [threading.Thread(target=make, args=(call,)) for call in calls]
        changing = threading.Thread(target=change)
        for thread in (changing, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        is_over.set()
        changing.join()
        if wrong:
            raise wrong[0]

    return run


def draw(seed: int, number: int, door: str | None = None) -> Call:
    """Call `number` of those that a seed stands for."""
    random = np.random.default_rng([seed, number])
    settings, settle = draw_settings(random)
    doors = {"numpy": numpy_call, "torch": torch_call}
    draw_one = doors[door or pick(random, list(doors))]
    if chance(random, 0.04):
        calls = [draw_one(random) for _ in range(random.integers(2, 5))]
        text = "\n".join(map(str, calls))
        call = Call("at once:\n" + text, None, several(calls), f"\n{settings}")
    else:
        call = draw_one(random)
        call.also = f"{call.also}; {settings}".removeprefix("; ")
    run = call.run

    def settled() -> None:
        settle()
        run()

    call.run = settled
    return call


def main(seed: str, first: str, last: str, seconds: str, door: str, journal: str) -> None:
    """Make the calls from `first` to `last`, as many as there is time for."""
    end = time.monotonic() + float(seconds)
    file = os.open(journal, os.O_WRONLY)
    for number in range(int(first), int(last) + 1):
        if time.monotonic() > end:
            break
        os.ftruncate(file, 0)
        os.pwrite(file, f"{number}\n(being drawn)".encode(), 0)
        call = draw(int(seed), number, door or None)
        os.pwrite(file, f"{number}\n{call}".encode(), 0)
        call.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
