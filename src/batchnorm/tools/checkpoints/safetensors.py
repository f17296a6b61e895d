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
_DTYPES = {
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
# Those that NumPy lacks: as which it reads them, and what makes float32 of that.
_WIDENED = {
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
    dtype, shape = entry["dtype"], entry["shape"]
    name, read_as, widened = _WIDENED.get(dtype, (_DTYPES.get(dtype), _DTYPES.get(dtype), None))
    if name is None or read_as is None:
        return dtype
    start += entry["data_offsets"][0]

    def read() -> np.ndarray:
        little = np.dtype(read_as).newbyteorder("<")
        found = np.fromfile(path, little, int(np.prod(shape)), offset=start).reshape(shape)
        return found if widened is None else widened(found)

    return stored(path, KIND, shape, name, read)
