"""NumPy's archives of arrays."""

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from .stored import Checkpoint, CheckpointError, from_bfloat16, is_number, stored

KIND = "NumPy's .npz"


def read(path: Path) -> Checkpoint:
    with zipfile.ZipFile(path) as archive:
        members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
        return Checkpoint(
            path,
            {each.filename.removesuffix(".npy"): _leaf(path, archive, each) for each in members},
        )


def _leaf(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """A Stored; or the name of a dtype that holds no numbers."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        length = member.file_size - file.tell()
    key = member.filename.removesuffix(".npy")
    if dtype.hasobject:
        raise CheckpointError(
            f"{path} holds Python objects in {key!r}, as pickled code, of which nothing was "
            "executed: save arrays of numbers alone."
        )
    if length != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"{key!r} has {length} bytes, not those of {dtype} of shape {shape}")
    if dtype == np.dtype("V2"):  # as which NumPy saves bfloat16
        return stored(path, KIND, shape, "bfloat16", lambda: from_bfloat16(_read(path, key)))
    if not is_number(dtype):
        return str(dtype)
    return stored(path, KIND, shape, dtype.name, partial(_read, path, key))


def _read(path: Path, key: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        found: np.ndarray = archive[key]
    return found
