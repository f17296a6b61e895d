"""Files of safetensors: a header that says where each array lies, then the arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .stored import (
    Checkpoint,
    from_bfloat16,
    from_float8_e4m3fn,
    from_float8_e5m2,
    library,
    stored,
)

KIND = "safetensors"
_NUMPYS = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# The name of each, as which NumPy reads it, and what makes the array of that.
_DTYPES = {each: (name, name, np.asarray) for each, name in _NUMPYS.items()} | {
    "BF16": ("bfloat16", "uint16", from_bfloat16),
    "F8_E4M3": ("float8_e4m3fn", "uint8", from_float8_e4m3fn),
    "F8_E5M2": ("float8_e5m2", "uint8", from_float8_e5m2),
}


def read(path: Path) -> Checkpoint:
    # What it opens it has checked: the header, and that all arrays are there.
    with library("safetensors", path).safe_open(path, framework="numpy"):
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return Checkpoint(
        path, {name: _leaf(path, entry, 8 + length) for name, entry in header.items()}
    )


def _leaf(path: Path, entry: dict[str, Any], start: int) -> Any:
    """A Stored; or the name of a dtype that is read by no one here."""
    shape, start = entry["shape"], start + entry["data_offsets"][0]
    if entry["dtype"] not in _DTYPES:
        return entry["dtype"]
    name, read_as, made = _DTYPES[entry["dtype"]]

    def read() -> np.ndarray:
        little = np.dtype(read_as).newbyteorder("<")
        return made(np.fromfile(path, little, int(np.prod(shape)), offset=start).reshape(shape))

    return stored(path, KIND, shape, name, read)
