"""How layers are found among the names of a checkpoint.

A name is found by its end, whatever is before it, and whatever separates the two; so are layers
that a program has wrapped, or put in a mapping beside others.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..conventions import CONVENTIONS
from .states import COUNTER, State, state

_BY_NAMES = ("torch", "keras", "flax")
_NAMES = {
    name
    for each in (CONVENTIONS[framework] for framework in _BY_NAMES)
    for name in (each.scale, each.bias, each.mean, each.var)
} | {COUNTER}
LOOKED_FOR = "; ".join(
    f"{names.mean} and {names.var} ({whose})"
    for whose, names in (
        ("PyTorch, MLX", CONVENTIONS["torch"]),
        ("Keras", CONVENTIONS["keras"]),
        ("Flax, where batch_stats is above them, or scale or bias beside", CONVENTIONS["flax"]),
    )
)
# Keys that stand for a whole model, of trainers; and attributes of wrappers, wherever they are.
_WRAPPERS = {"state_dict", "model_state_dict", "model_state", "model", "module"}
_WITHIN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COLLECTIONS = {"params", "batch_stats", "variables"}  # of Flax, of which each holds a part
_KEPT_BY_FLAX = {"value", "raw_value"}  # below the name of a Variable, as some checkpoints have it
_OPTIMIZERS = {
    *("optim", "optimizer", "optimizers", "opt_state", "optimizer_state", "optimizer_states"),
    *("optim_state", "optimizer_state_dict", "optim_state_dict", "optimizer_states_dict"),
}
# Further models within one, by the names that averages and teachers have.
_OTHER_MODEL = re.compile(r"((?:\w+_)?(?:ema|teacher|student)(?:_(?:model|net|network|encoder))?)$")
_AVERAGE = "ema_"  # before a whole name in which the dots have become underscores, too


@dataclass(kw_only=True)
class Found:
    """A layer whose arrays are yet to be read."""

    group: str
    name: str
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
                mean, var = (tuple(self.arrays[each].shape) for each in (names.mean, names.var))
                if mean == var and mean and 0 not in mean and (known or not is_plain):
                    return framework
        return None

    def read(self) -> State:
        assert self.framework is not None
        return state(
            self.name,
            self.framework,
            self.arrays.get,
            group=self.group,
            eps=self.settings.get("eps"),
            momentum=self.settings.get("momentum"),
            is_frozen=not self.settings.get("trainable", True),
        )


def found_in(
    tree: Mapping[Any, Any], settings: Mapping[tuple[str, ...], Mapping[str, Any]] | None = None
) -> list[Found]:
    """The layers among the arrays of a mapping, which may be of mappings, in its order."""
    places: dict[_Place, Found] = {}
    for keys, leaf in _leaves(tree):
        parts = [part for key in keys for part in _parts(key)]
        while len(parts) > 1 and parts[-1] in _KEPT_BY_FLAX:
            parts.pop()
        prefix, role = _split(parts)
        if role is None:
            continue
        is_flat = len(_parts(keys[-1])) > 1  # what is above leads to a whole state_dict
        above = sum(len(_parts(key)) for key in keys[:-1]) if is_flat else 0
        place = places.setdefault(_Place.of(prefix, above), Found(group="", name=""))
        place.is_under_batch_stats |= "batch_stats" in prefix
        place.settings = (settings or {}).get(keys[:-1], place.settings)
        place.arrays[role] = leaf
    found = {place: each for place, each in places.items() if each.framework is not None}
    _give_names(found)
    return [*found.values()]


class _Place(NamedTuple):
    """The keys above a whole model, what wraps it or tells it from others, and the layer in it."""

    above: tuple[str, ...]
    leading: tuple[str, ...]
    name: tuple[str, ...]

    @classmethod
    def of(cls, parts: list[str], above: int) -> "_Place":
        kept = [part for part in parts[above:] if part not in _COLLECTIONS | _WITHIN]
        end = 0
        while end < len(kept) - 1 and (kept[end] in _WRAPPERS or _OTHER_MODEL.match(kept[end])):
            end += 1
        return cls(tuple(parts[:above]), tuple(kept[:end]), tuple(kept[end:]))

    def shown(self, others: set[str]) -> tuple[str, str]:
        """Without wrappers. `others` are all names of layers, with underscores."""
        above = [part for part in self.above if part == "model" or part not in _WRAPPERS]
        leading = [part for part in self.leading if part not in _WRAPPERS]
        name = ".".join(self.name)
        if name.startswith(_AVERAGE) and name.removeprefix(_AVERAGE) in others:
            leading, name = [*leading, _AVERAGE.rstrip("_")], name.removeprefix(_AVERAGE)
        return ".".join(above + leading), name


def _give_names(found: Mapping[_Place, Found]) -> None:
    """Names without wrappers, and those that Keras gives, as far as they tell layers apart."""
    others = {"_".join(place.name) for place in found}
    short = [place.shown(others) for place in found]
    given = [
        (group, each.settings.get("name") or name)
        for (group, name), each in zip(short, found.values(), strict=True)
    ]
    full = [(".".join(place.above + place.leading), ".".join(place.name)) for place in found]
    names = next(each for each in (given, short, full) if len({*each}) == len(each) or each is full)
    is_one = len({group for group, _ in names}) == 1  # which needs no name then
    for each, (group, name) in zip(found.values(), names, strict=True):
        each.group, each.name = "" if is_one else group, name


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[./]", key) if part]


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays but for those of an optimizer, which has averages of its own."""
    if isinstance(tree, Mapping):
        if "param_groups" not in tree:
            for key, value in tree.items():
                path = tuple(map(str, key)) if isinstance(key, tuple) else (str(key),)
                if not _OPTIMIZERS.intersection(path):
                    yield from _leaves(value, (*keys, *path))
    elif isinstance(tree, (list, tuple)) and not hasattr(tree, "shape"):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*keys, str(index)))
    elif keys and _is_array(tree):
        yield keys, tree


def _is_array(value: Any) -> bool:
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return is_array and not getattr(value, "is_meta", False)  # of PyTorch, without values


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
