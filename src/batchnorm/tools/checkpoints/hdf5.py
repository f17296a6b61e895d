"""HDF5's files as trees: of their datasets and of what their groups are called."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from .stored import Place, Tree, from_bfloat16, is_number, library, stored

KIND = "HDF5"
Opened = Callable[[], AbstractContextManager[Any]]  # a file of h5py, closed after use


def opened(path: Path) -> Opened:
    return partial(library("h5py", path).File, path, "r")


def opened_within(path: Path, member: str) -> Opened:
    """A file that a zip archive holds: in its place where it lies there as it is."""
    h5py = library("h5py", path)

    @contextmanager
    def open_it() -> Iterator[Any]:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(member)
            if info.compress_type != zipfile.ZIP_STORED:
                with h5py.File(BytesIO(archive.read(info)), "r") as file:
                    yield file
                return
        with _Part(path, info) as part, h5py.File(part, "r") as file:
            yield file

    return open_it


def tree(group: Any, path: Path, opened: Opened) -> Tree:
    """The datasets, as deep as the groups; links lead nowhere, least of all to other files."""
    h5py = library("h5py", path)
    found: dict[str, Any] = {}
    for key in group:
        if isinstance(group.get(key, getlink=True), h5py.HardLink):
            each = group[key]
            if isinstance(each, h5py.Group):
                found[key] = tree(each, path, opened)
            elif isinstance(each, h5py.Dataset):
                found[key] = _leaf(each, path, opened)
    return found


def names(group: Any, place: Place, tree: Tree) -> Iterator[tuple[Place, str]]:
    """What groups of a tree say in an attribute `name`, by their places."""
    name = group.attrs.get("name")
    if isinstance(name, str):
        yield place, name
    for key, each in tree.items():
        if isinstance(each, dict):
            yield from names(group[key], (*place, key), each)


def _leaf(dataset: Any, path: Path, opened: Opened) -> Any:
    """A Stored; or the name of a dtype that holds no numbers, or lies elsewhere."""
    dtype, where = dataset.dtype, dataset.name
    is_bfloat16 = dtype == np.dtype("V2")  # as which h5py writes it
    if not (is_bfloat16 or is_number(dtype)) or dataset.external or dataset.is_virtual:
        return str(dtype)
    if dataset.shape is None:
        return None

    def read() -> np.ndarray:
        with opened() as file:
            found = np.asarray(file[where][()])
        return from_bfloat16(found) if is_bfloat16 else found

    name = "bfloat16" if is_bfloat16 else dtype.name
    return stored(path, KIND, dataset.shape, name, read)


class _Part(RawIOBase):
    """A member of a zip archive that is not compressed, as a file to be read in any order."""

    _HEADER = 30  # bytes of a member's own header, the last four of which say how long the rest is

    def __init__(self, path: Path, member: zipfile.ZipInfo) -> None:
        self._file = path.open("rb")
        self._file.seek(member.header_offset)
        header = self._file.read(self._HEADER)
        rest = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        self._start = member.header_offset + self._HEADER + rest
        self._size, self._at = member.file_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._at = offset + {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: max(0, min(len(view), self._size - self._at))])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
