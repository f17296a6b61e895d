"""What torch.save writes, with weights alone: nothing that it holds is executed."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .stored import Checkpoint, CheckpointError, first_line, is_number, library, stored

KIND = "a checkpoint of PyTorch"
FILES = {"data.pkl", "constants.pkl", "archive_format", "serialized_exported_program.json"}
_CODE = "{path} is {what}, which holds a program: save the state_dict of {load}({name!r}) instead."


def read(path: Path) -> Checkpoint:
    torch = library("torch", path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        _refuse_program(path)
    # PyTorch maps what is not compressed, and takes any file of this name for safetensors'.
    is_mapped = is_zip and _is_uncompressed(path) and path.suffix != ".safetensors"
    with (
        path.open("rb") as file,
        torch.serialization.safe_globals(_harmless()),
        warnings.catch_warnings(action="ignore"),  # of parts of PyTorch that the file's writer used
    ):
        try:
            found = torch.load(
                path if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped
            )
        except pickle.UnpicklingError as error:
            raise _refusal(path, torch, error) from error
    if not isinstance(found, (Mapping, list, tuple)):
        raise CheckpointError(
            f"{path} holds one {type(found).__name__} without a name: save model.state_dict()."
        )
    return Checkpoint(path, _tree(path, torch, found))


def _harmless() -> list[Any]:
    """What is made of a file beside PyTorch's own: data, by constructors that run no other code."""
    scalar = np.float64().__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}
    return [
        argparse.Namespace,
        # Where NumPy 1 and NumPy 2 have it.
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
    ]


def _refuse_program(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = {each.partition("/")[2] for each in archive.namelist()} | set(archive.namelist())
    if "constants.pkl" in names:
        what, load = "an archive of TorchScript", "torch.jit.load"
    elif names & {"archive_format", "serialized_exported_program.json"}:
        what, load = "a program of torch.export", "torch.export.load"
    else:
        return
    raise CheckpointError(_CODE.format(path=path, what=what, load=load, name=str(path)))


def _is_uncompressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())


def _refusal(path: Path, torch: Any, error: pickle.UnpicklingError) -> CheckpointError:
    """Why PyTorch did not take it for weights."""
    found: list[str] = []
    with suppress(Exception):  # the older format's have no such list
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found = found or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if found:
        return CheckpointError(
            f"{path} holds more than weights: {', '.join(found)}, of which nothing was executed; "
            "save model.state_dict() instead of the model."
        )
    why = first_line(str(error).partition("WeightsUnpickler error:")[2] or error)
    return CheckpointError(
        f"{path} can't be read as weights alone ({why}), and nothing of it was executed: it is "
        "damaged, or was not saved as by torch.save(model.state_dict(), path)."
    )


def _tree(path: Path, torch: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _tree(path, torch, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(index): _tree(path, torch, each) for index, each in enumerate(value)}
    return _leaf(path, torch, value)


def _leaf(path: Path, torch: Any, value: Any) -> Any:
    """A Stored for a tensor that NumPy can show, or what it was."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    is_widened = dtype == "bfloat16" or dtype.startswith("float8")
    is_here = value.device.type == "cpu" and not value.is_nested  # and no "meta", without numbers
    if not is_here or not (is_widened or _is_numpys(dtype)):
        return value

    def read() -> np.ndarray:
        found = value.detach().resolve_conj().resolve_neg()
        array: np.ndarray = (found.float() if is_widened else found).numpy()
        return array

    return stored(path, KIND, value.shape, dtype, read)


def _is_numpys(dtype: str) -> bool:
    try:
        return is_number(np.dtype(dtype))
    except TypeError:
        return False
