"""What a layer keeps, as NumPy's arrays; and how layers are found among the names of a checkpoint.

A name is found by its end, whatever is before it, and whatever separates the two; so are layers
that a program has wrapped, or put in a mapping beside others.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..conventions import CONVENTIONS, Convention
from .pooling import Pooled

# By which way of computing a framework's own layer squares before it subtracts.
ONE_PASS = {
    "torch": "torch.nn on a CPU, for inputs of shape (N, C) or with channels last",
    "mlx": "mlx.nn",
    "flax": "Flax's layers with use_fast_variance=True, which is their default",
    "keras": "Keras' layer with the backends torch and numpy",
}


@dataclass(kw_only=True)
class Seen:
    """What came to a layer in the batches that were looked at.

    Attributes
    ----------
    order : its number in the order in which layers were called first
    is_positive : whether a channel's output was, anywhere; None where it need not be
    """

    pooled: Pooled
    order: int = 0
    is_positive: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """What one layer keeps: arrays in float64, of one axis.

    Attributes
    ----------
    name : its path in its model
    framework : whose names and conventions it has, a key of CONVENTIONS
    group : the model within the file, where there are several
    dtype : that of the running statistics as they were kept
    batches : how many it has counted; None if it counts none
    momentum : None where it is not known, or counts every batch alike
    is_frozen : whether no batch moves its statistics
    is_of_model : and not of a file
    one_pass : by which way it would square before it subtracts; None for no way
    """

    name: str
    framework: str
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float
    group: str = ""
    dtype: str = "float32"
    batches: int | None = None
    momentum: float | None = None
    is_frozen: bool = False
    is_of_model: bool = False
    one_pass: str | None = None
    seen: Seen | None = None

    @property
    def convention(self) -> Convention:
        return CONVENTIONS[self.framework]

    @property
    def path(self) -> str:
        return path_of(self.group, self.name)

    @property
    def shifts(self) -> np.ndarray:
        """How far the mean lies from 0, in standard deviations."""
        with np.errstate(all="ignore"):
            shifts: np.ndarray = np.abs(self.mean) / np.sqrt(self.var + self.eps)
        return shifts


def path_of(group: str, name: str) -> str:
    name = name or "the layer itself"
    return f"{group}: {name}" if group else name


@dataclass(kw_only=True)
class Place:
    """Where a layer's arrays are, unread."""

    group: str
    name: tuple[str, ...]
    is_under_batch_stats: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)

    @property
    def framework(self) -> str | None:
        """Whose names these are: None if they are no layer's."""
        for framework in _BY_NAMES:
            names = CONVENTIONS[framework]
            if all(each in self.arrays for each in (names.mean, names.var)):
                is_plain = framework == "flax"  # mean and var may be anything's
                known = self.is_under_batch_stats or {names.scale, names.bias} & set(self.arrays)
                shapes = {tuple(self.arrays[each].shape) for each in (names.mean, names.var)}
                if len(shapes) == 1 and () not in shapes and (known or not is_plain):
                    return framework
        return None

    def read(self) -> State:
        assert self.framework is not None
        return state(
            self.settings.get("name") or ".".join(self.name),
            self.framework,
            self.arrays.get,
            group=self.group,
            eps=self.settings.get("eps"),
            momentum=self.settings.get("momentum"),
            is_frozen=not self.settings.get("trainable", True),
        )


def state(
    name: str,
    framework: str,
    get: Callable[[str], Any],
    *,
    eps: Any = None,
    momentum: Any = None,
    is_exact: bool = False,
    **more: Any,
) -> State:
    """The state of a layer that gives its arrays, or None, by the framework's names for them.

    One that is exact does not square before it subtracts.
    """
    names = CONVENTIONS[framework]
    mean, var, scale, bias = (
        get(each) for each in (names.mean, names.var, names.scale, names.bias)
    )
    batches = get(_COUNTER)
    return State(
        name=name,
        framework=framework,
        mean=values(mean),
        var=values(var),
        scale=None if scale is None else values(scale),
        bias=None if bias is None else values(bias),
        dtype=name_of(var.dtype),
        batches=None if batches is None else int(values(batches)[0]),
        eps=names.eps if eps is None else float(eps),
        momentum=None if momentum is None else float(momentum),
        one_pass=None if is_exact else ONE_PASS[framework],
        **more,
    )


_BY_NAMES = ("torch", "keras", "flax")
_COUNTER = "num_batches_tracked"
_NAMES = {
    name
    for each in (CONVENTIONS[framework] for framework in _BY_NAMES)
    for name in (each.scale, each.bias, each.mean, each.var)
} | {_COUNTER}
LOOKED_FOR = "; ".join(
    f"{names.mean} and {names.var} ({whose})"
    for whose, names in (
        ("PyTorch, MLX", CONVENTIONS["torch"]),
        ("Keras", CONVENTIONS["keras"]),
        ("Flax, where batch_stats is above them, or scale or bias beside", CONVENTIONS["flax"]),
    )
)
# Keys and attributes that stand for a whole model, of trainers and wrappers.
_WRAPPERS = {"state_dict", "model_state_dict", "model_state", "model", "module", "_orig_mod"}
_COLLECTIONS = {"params", "batch_stats", "variables"}  # of Flax, of which each holds a part
_KEPT_BY_FLAX = {"value", "raw_value"}  # below the name of a Variable, as some checkpoints have it
# Further models within one, by the names that averages and teachers have: an underscore may be what
# separates the name from the rest.
_OTHER_MODEL = re.compile(r"((?:\w+_)?(?:ema|teacher|student)(?:_(?:model|net|network|encoder))?)$")
_OTHER_MODEL_FLAT = re.compile(r"(ema|teacher|student)_(?=\w+_)")

Item = TypeVar("Item")
Track = Callable[[list[Item]], Iterable[Item]]


def values(array: Any) -> np.ndarray:
    """Any framework's, or one that is still in a file, as float64 of one axis."""
    kept = array.read() if hasattr(array, "read") else array.tolist()
    return np.asarray(kept, np.float64).ravel()


def name_of(dtype: Any) -> str:
    """As NumPy calls it, whichever framework's it is."""
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]


def places_in(
    tree: Mapping[Any, Any], settings: Mapping[tuple[str, ...], Mapping[str, Any]] | None = None
) -> list[Place]:
    """The layers among the arrays of a mapping, which may be of mappings, in its order."""
    places: dict[tuple[str, tuple[str, ...]], Place] = {}
    for keys, leaf in _leaves(tree):
        parts = [part for key in keys for part in re.split(r"[./]", key) if part]
        while len(parts) > 1 and parts[-1] in _KEPT_BY_FLAX:
            parts.pop()
        prefix, role = _split(parts)
        if role is None:
            continue
        is_flat = len(re.split(r"[./]", keys[-1])) > 1  # keys[:-1] lead to a whole state_dict
        name = tuple(part for part in prefix if part not in _COLLECTIONS)
        group, name = _apart(name, _length(keys[:-1]) if is_flat else 0)
        place = places.setdefault((group, name), Place(group=group, name=name))
        place.is_under_batch_stats |= "batch_stats" in prefix
        place.settings = (settings or {}).get(keys[:-1], place.settings)
        place.arrays[role] = leaf
    found = [each for each in places.values() if each.framework is not None]
    shown = {each.group: _without_wrappers(each.group) for each in found}
    if len(shown) == 1:  # which needs no name then
        shown = dict.fromkeys(shown, "")
    if len({*shown.values()}) == len(shown):
        for each in found:
            each.group = shown[each.group]
    return found


def read(places: list[Place], track: Track[Place] = list) -> list[State]:
    return [each.read() for each in track(places)]


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays but for those of an optimizer, which has averages of its own."""
    if isinstance(tree, Mapping):
        if "param_groups" not in tree:
            for key, value in tree.items():
                if not str(key).lower().startswith(("optim", "opt_state")):
                    yield from _leaves(value, (*keys, str(key)))
    elif isinstance(tree, (list, tuple)) and not hasattr(tree, "shape"):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*keys, str(index)))
    elif keys and hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield keys, tree


def _split(parts: list[str]) -> tuple[list[str], str | None]:
    """What is before a name that we know, and that name."""
    *prefix, last = parts
    last = last.removesuffix(":0")  # of TensorFlow
    if last in _NAMES:
        return prefix, last
    for name in _NAMES:
        if "_" in name and last.endswith(f"_{name}"):
            return [*prefix, last.removesuffix(f"_{name}")], name
    for name in (CONVENTIONS["torch"].scale, CONVENTIONS["torch"].bias):
        if last.endswith(f"_{name}"):
            return [*prefix, last.removesuffix(f"_{name}")], name
    return prefix, None


def _length(keys: tuple[str, ...]) -> int:
    return sum(len([part for part in re.split(r"[./]", key) if part]) for key in keys)


def _without_wrappers(group: str) -> str:
    parts = group.split(".")
    return ".".join(part for part in parts if part == "model" or part not in _WRAPPERS)


def _apart(name: tuple[str, ...], leading: int) -> tuple[str, tuple[str, ...]]:
    """The model's name, of which the first `leading` parts are in any case, and the layer's."""
    end = min(leading, len(name))
    while end < len(name) - 1 and (name[end] in _WRAPPERS or _OTHER_MODEL.match(name[end])):
        end += 1
    group, rest = [*name[:end]], [*name[end:]]
    if rest and (found := _OTHER_MODEL_FLAT.match(rest[0])):
        group.append(found[1])
        rest[0] = rest[0].removeprefix(found[0])
    return ".".join(group), tuple(rest)
