"""Saving Collections and Models with `flax.serialization`, where Flax is installed."""

from __future__ import annotations

from typing import Any

from .collection import Collection
from .module import Model

try:
    from flax import serialization
except ImportError:
    serialization = None  # type: ignore[assignment]


def _collection_to_state_dict(collection: Collection) -> dict[str, Any]:
    return {path: serialization.to_state_dict(v) for path, v in collection.as_dict().items()}


def _collection_from_state_dict(target: Collection, saved: dict[str, Any]) -> Collection:
    missing = sorted(target.state.keys() - saved.keys())
    if missing:
        raise ValueError(
            f"The saved Collection lacks the paths {missing}, which the target has. "
            "An empty Collection as the target takes all that was saved."
        )
    return Collection(
        {
            path: serialization.from_state_dict(target.state.get(path), value, name=path)
            for path, value in saved.items()
        }
    )


def _model_to_state_dict(model: Model) -> dict[str, Any]:
    return {"params": serialization.to_state_dict(model.params)}


def _model_from_state_dict(target: Model, saved: dict[str, Any]) -> Model:
    if saved.keys() != {"params"}:
        raise ValueError(f"A saved Model has the entry params alone, got {sorted(saved)}.")
    return target.replace(params=serialization.from_state_dict(target.params, saved["params"]))


if serialization is not None:
    for kind, to_state_dict, from_state_dict in (
        (Collection, _collection_to_state_dict, _collection_from_state_dict),
        (Model, _model_to_state_dict, _model_from_state_dict),
    ):
        serialization.register_serialization_state(  # type: ignore[no-untyped-call]
            kind, to_state_dict, from_state_dict
        )
