"""The layers of Keras' files.

A layer's variables have numbers, in the order in which its `build` makes them. What they are, the
model's configuration says, in an archive of Keras 3; else the names of groups and the shapes. In
the older files of HDF5 they have names.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from . import hdf5
from .stored import Checkpoint, CheckpointError, Place, Stored, Tree, understood

KIND = "a model of Keras"
CONFIGURATION, WEIGHTS, PICKLED = "config.json", "model.weights.h5", "model.weights.npz"
_AFFINE, _MOVING = ["gamma", "beta"], ["moving_mean", "moving_variance"]
_RENORM = ["moving_stddev", "renorm_mean", "renorm_stddev"]
Config = Mapping[str, Any]


def read_archive(path: Path) -> Checkpoint:
    """A .keras file."""
    with zipfile.ZipFile(path) as archive:
        if PICKLED in archive.namelist():
            raise CheckpointError(
                f"{path} keeps its weights as Python objects, in pickled code, of which nothing "
                'was executed: save the model with weights_format="h5".'
            )
        config = json.loads(archive.read(CONFIGURATION))
    opened = hdf5.opened_within(path, WEIGHTS)
    with opened() as file:
        tree = hdf5.tree(file, path, opened)
        names = dict(hdf5.names(file, (), tree))
    return _with_roles(path, tree, names, config)


def read_hdf5(path: Path) -> Checkpoint:
    """A file of HDF5, Keras' or another's."""
    opened = hdf5.opened(path)
    with opened() as file:
        tree = hdf5.tree(file, path, opened)
        is_whole = isinstance(tree.get("model_weights"), dict)
        weights = "model_weights" if is_whole else "/"
        if any(name.startswith("layer_names") for name in file[weights].attrs):
            return _older(path, tree[weights] if is_whole else tree, file.attrs.get("model_config"))
        return _with_roles(path, tree, dict(hdf5.names(file, (), tree)))


def read_shards(path: Path, shards: Sequence[Path]) -> Checkpoint:
    """The weights of one model in several files of HDF5, whose index is at `path`."""
    found: dict[str, Any] = {}
    names: dict[Place, str] = {}
    for each in shards:
        opened = hdf5.opened(each)
        with understood(each, hdf5.KIND), opened() as file:
            tree = hdf5.tree(file, each, opened)
            names |= dict(hdf5.names(file, (), tree))
        _merge(found, tree)
    return _with_roles(path, found, names)


def _merge(into: dict[str, Any], tree: Tree) -> None:
    for key, each in tree.items():
        if isinstance(each, dict) and key in into:
            _merge(into[key], each)
        else:
            into[key] = each


def _with_roles(
    path: Path, tree: Tree, names: Mapping[Place, str], config: Config | None = None
) -> Checkpoint:
    """With the variables of each BatchNormalization by names instead of `vars` by numbers."""
    placed = dict(_by_place(config, ()))
    named: dict[str, list[Config]] = {}
    for chain, each in _chains(config):
        named.setdefault(chain[-1], []).append(each)
    settings: dict[Place, Mapping[str, Any]] = {}

    def visit(node: Tree, place: Place) -> Tree:
        found = {
            key: visit(each, (*place, key)) if isinstance(each, dict) else each
            for key, each in node.items()
        }
        variables = _in_order(node.get("vars"))
        if not variables:
            return found
        name = names.get((*place, "vars"))
        own = placed.get(place)
        if name is not None and (own is None or own.get("name") != name):
            candidates = named.get(name, [])
            own = candidates[0] if len(candidates) == 1 else None
        roles = _roles(variables, [place[-1] if place else "", name or ""], own)
        if roles:
            del found["vars"]
            settings[place] = ({} if name is None else {"name": name}) | _settings(own or {})
        return found | roles

    return Checkpoint(path, visit(tree, ()), settings)


def _in_order(variables: Any) -> list[Stored]:
    """Vectors of one length that are numbered from 0, or none."""
    if not isinstance(variables, dict):
        return []
    found = [variables.get(str(index)) for index in range(len(variables))]
    vectors = [each for each in found if isinstance(each, Stored) and len(each.shape) == 1]
    is_one = len(vectors) == len(found) and len({each.shape for each in vectors}) == 1
    return vectors if is_one else []


def _roles(variables: list[Stored], names: list[str], config: Config | None) -> dict[str, Stored]:
    """What the variables are called, if they are those of a BatchNormalization."""
    count = len(variables)
    if config is not None:
        used = zip(_AFFINE, ("scale", "center"), strict=True)
        affine = [role for role, key in used if config.get(key, True)]
        roles = affine + _MOVING + (_RENORM if config.get("renorm") else [])
        return dict(zip(roles, variables, strict=True)) if len(roles) == count else {}
    if any(name.startswith("batch_normalization") for name in names) and 2 <= count <= 7:
        renorm = _RENORM if count > 4 else []
        affine_count = count - len(_MOVING) - len(renorm)
        # Of one alone it is not known whether it is gamma or beta.
        affine = _AFFINE if affine_count == 2 else []
        return dict(
            zip(affine + _MOVING + renorm, variables[affine_count - len(affine) :], strict=True)
        )
    return dict(zip(_AFFINE + _MOVING, variables, strict=True)) if count == 4 else {}


def _by_place(value: Any, place: Place) -> Iterator[tuple[Place, Config]]:
    """Each BatchNormalization of a configuration, by the group in which Keras puts its variables.

    A group is called by the attribute that holds the object; in a list or mapping, by the object's
    class, with a number from the second of a name on.
    """
    if _is_object(value):
        if _is_normalization(value):
            yield place, value["config"]
        for key, each in value["config"].items():
            yield from _by_place(each, (*place, key))
    elif isinstance(value, (list, dict)):
        used: Counter[str] = Counter()
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, (list, dict)):
                name = _snake_case(each["class_name"]) if _is_object(each) else "container"
                number = f"_{used[name]}" if used[name] else ""
                used[name] += 1
                yield from _by_place(each, (*place, name + number))


def _snake_case(name: str) -> str:
    letters = re.sub(r"\W", "", name)
    return re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", letters).lower()


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(value, dict)
        and isinstance(value.get("class_name"), str)
        and isinstance(value.get("config"), dict)
    )


def _is_normalization(value: Any) -> bool:
    """Whatever its class is called, of which there may be subclasses."""
    return _is_object(value) and "moving_variance_initializer" in value["config"]


def _chains(value: Any, chain: Place = ()) -> Iterator[tuple[Place, Config]]:
    """Each BatchNormalization of a configuration, by the names of what holds it, and its own."""
    if _is_object(value):
        chain = (*chain, str(value["config"].get("name")))
        if _is_normalization(value):
            yield chain, value["config"]
    if isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _chains(each, chain)


def _settings(config: Config) -> dict[str, Any]:
    kept = ("name", "momentum", "scale", "center", "axis", "renorm", "trainable")
    found = {key: config[key] for key in kept if key in config}
    return found | ({"eps": config["epsilon"]} if "epsilon" in config else {})


# The older files.


def _older(path: Path, tree: Tree, configuration: Any) -> Checkpoint:
    """Those in which variables have names, as `layer/gamma:0`."""
    config = json.loads(configuration) if isinstance(configuration, (str, bytes)) else {}
    chains = list(_chains(config.get("config")))
    settings: dict[Place, Mapping[str, Any]] = {}

    def visit(node: Tree, place: Place) -> Tree:
        found = {
            key.removesuffix(":0"): visit(each, (*place, key)) if isinstance(each, dict) else each
            for key, each in node.items()
        }
        if all(isinstance(found.get(role), Stored) for role in _MOVING):
            own = _of_layer(chains, "/".join(place))
            if own:
                settings[place] = _settings(own)
        return found

    return Checkpoint(path, visit(tree, ()), settings)


def _of_layer(chains: list[tuple[Place, Config]], place: str) -> Config:
    """What is said of the layer whose variables are at a place; nothing where that is not clear.

    A place begins with the name of one of the model's own layers, which may hold others. Of those
    Keras 3 writes all names, Keras 2 the last, and for a wrapped layer none.
    """

    def begins(chain: Place) -> bool:
        return f"{place}/".startswith(f"{chain[0]}/")

    def ends(*names: str) -> bool:
        return f"/{place}/".endswith(f"/{'/'.join(names)}/")

    of_layer = [(chain, config) for chain, config in chains if begins(chain)]
    for found in (
        [config for chain, config in of_layer if ends(*chain)],
        [config for chain, config in of_layer if ends(chain[-1])],
        [config for _, config in of_layer],
    ):
        if found and all(each == found[0] for each in found):
            return found[0]
    return {}
