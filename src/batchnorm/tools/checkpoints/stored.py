"""What a checkpoint is once it has been looked at, whatever its format, and how reading fails."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Tree = Mapping[str, Any]
Place = tuple[str, ...]  # the keys of a tree, from its root


class CheckpointError(ValueError):
    """A file can't be read: one sentence that names it, and says why and what to do."""


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Attributes
    ----------
    shape : of the array
    dtype : that of the file, by NumPy's name, or "bfloat16", "float8_e4m3fn" and the like
    read : reads the array, and raises CheckpointError where that fails; bfloat16 and float8 come as
        float32, any other as it is
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes
    ----------
    path : of the file
    tree : nested mappings with the file's keys as strings, an index for what lies in a list;
        a leaf is a Stored, or whatever else the file holds
    settings : for Keras' files, what is known of the BatchNormalization at a place in the tree: of
        "name", "eps", "momentum", "scale", "center", "axis", "renorm" and "trainable" those that
        the file says, with Keras' momentum, which weighs the old statistics
    """

    path: Path
    tree: Tree
    settings: Mapping[Place, Mapping[str, Any]] = field(default_factory=dict)


def library(name: str, path: Path) -> Any:
    """The module that reads files such as the one at `path`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        why = "is not installed" if absent else f"can't be imported ({first_line(error)})"
        raise CheckpointError(
            f"{path} needs {name} to be read, which {why}: pip install {name}"
        ) from error


@contextmanager
def understood(path: Path, kind: str) -> Iterator[None]:
    """Whatever is raised, as CheckpointError: the file at `path` was taken for a `kind`."""
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise CheckpointError(f"{path} can't be read any more: {first_line(error)}.") from error
    except RecursionError as error:
        raise CheckpointError(
            f"{path} is nested too deeply to be read as {kind}, or holds itself."
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be read as {kind}: it is cut off or damaged ({first_line(error)})."
        ) from error


def first_line(said: BaseException | str) -> str:
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return lines[0].rstrip(".:")


def stored(path: Path, kind: str, shape: Any, dtype: str, read: Callable[[], Any]) -> Stored:
    """A Stored whose `read` fails as `understood` says."""

    def reads() -> np.ndarray:
        with understood(path, kind):
            return np.asarray(read())

    return Stored(tuple(int(size) for size in shape), dtype, reads)


def is_number(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc"


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits, an array of two bytes each: they are its upper half."""
    upper = np.left_shift(bits.view(np.uint16), 16, dtype=np.uint32)
    widened: np.ndarray = upper.view(np.float32)
    return widened


def from_float8_e5m2(bits: np.ndarray) -> np.ndarray:
    """float32 of an array of bytes: they are float16's upper half."""
    upper = np.left_shift(bits, 8, dtype=np.uint16)
    widened: np.ndarray = upper.view(np.float16).astype(np.float32)
    return widened


def from_float8_e4m3fn(bits: np.ndarray) -> np.ndarray:
    """float32 of an array of bytes: sign, 4 bits of exponent with bias 7, 3 bits; no infinity.

    By float16, whose exponent has one bit more and a bias of 15.
    """
    magnitude = np.left_shift(bits & 0x7F, 7, dtype=np.uint16)
    signed = (magnitude | np.left_shift(bits & 0x80, 8, dtype=np.uint16)).view(np.float16)
    is_nan = bits & 0x7F == 0x7F
    return np.where(is_nan, np.float32(np.nan), signed.astype(np.float32) * 256)
