"""What a file is, by its first bytes, and who reads it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import hdf5, keras, numpy, safetensors, torch
from .stored import Checkpoint, CheckpointError, understood

_FORMATS = "safetensors, PyTorch's .pt, .npz, HDF5 and .keras"
_OTHERWISE = "and give a mapping of its arrays to batchnorm.tools.inspect"
_PYTORCHS_NUMBER = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # which a file begins with that is no archive
_LONGEST_HEADER = 100_000_000  # of safetensors, in bytes
_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06")

Reader = tuple[str, Callable[[Path], Checkpoint]]  # what it reads; the function


def read(path: Path) -> Checkpoint:
    """What a file of weights holds; its arrays are read when they are asked for.

    Parameters
    ----------
    path : Path
        Of a file of safetensors, one that `torch.save` wrote, NumPy's .npz, HDF5, or Keras' .keras;
        or of the index of a model in several files (`model.safetensors.index.json`), which
        are read, too. The content counts, not the name.

    Returns
    -------
    checkpoint : Checkpoint

    Raises
    ------
    CheckpointError
        If it can't be read: there is no such file, it is no checkpoint, is cut off or damaged, or
        holds more than weights; or the library that reads it is not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from batchnorm.tools.checkpoints import read
    >>> path = Path(tempfile.mkdtemp()) / "weights.npz"
    >>> np.savez(path, **{"bn.weight": np.ones(3, np.float32)})
    >>> weight = read(path).tree["bn.weight"]
    >>> weight.shape, weight.dtype, weight.read().tolist()
    ((3,), 'float32', [1.0, 1.0, 1.0])
    """
    path = Path(path)
    kind, reader = _reader(path)
    with understood(path, kind):
        return reader(path)


def _reader(path: Path) -> Reader:
    start = _start(path)
    if start.startswith(_ARCHIVES):
        return _reader_of_archive(path)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return hdf5.KIND, keras.read_hdf5
    if start[:1] == b"\x80" and _PYTORCHS_NUMBER in start[:32]:
        return torch.KIND, torch.read
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return safetensors.KIND, safetensors.read
    if start.lstrip()[:1] == b"{":
        return _INDEX, _read_index
    raise CheckpointError(f"{path} {_what_else(path, start)}.")


def _start(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: {_advice_for_folder(path)}.")
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from error


def _advice_for_folder(path: Path) -> str:
    names = {each.name for each in path.iterdir()}
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        return f"load it by Orbax {_OTHERWISE}"
    if "saved_model.pb" in names or any(name.endswith(".ckpt.index") for name in names):
        return f"load it by TensorFlow {_OTHERWISE}"
    if ".metadata" in names:
        return f"load it by torch.distributed.checkpoint {_OTHERWISE}"
    return "give its files"


def _what_else(path: Path, start: bytes) -> str:
    """What a file is that is not read here, and what to do."""
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS instead of the file: run git lfs pull"
    if start.startswith(b"\x93NUMPY"):
        return "is one array without a name: save it with numpy.savez"
    if start[257:262] == b"ustar":
        return (
            "is a tar archive: give what it holds, or, if PyTorch before 0.1.10 wrote it and you "
            "trust it, save anew what torch.load(..., weights_only=False) makes of it"
        )
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return (
            "is a pickle, which is code, of which nothing was executed: save its arrays by "
            "torch.save, numpy.savez or safetensors"
        )
    if _is_msgpack(start):
        return f"is MessagePack, as Flax writes: load it by flax.serialization {_OTHERWISE}"
    if path.name.endswith(".index") or path.name == "saved_model.pb":
        return f"is TensorFlow's: load it by tf.train.load_checkpoint {_OTHERWISE}"
    return (
        f"is of none of the formats that are read here ({_FORMATS}): it begins with {start[:8]!r}"
    )


def _is_msgpack(start: bytes) -> bool:
    """A mapping whose first key is a text."""
    count = {0xDE: 2, 0xDF: 4}.get(start[0], 0 if 0x80 <= start[0] <= 0x8F else None)
    key = start[1 + count : 2 + count] if count is not None else b""
    return key != b"" and (0xA0 <= key[0] <= 0xBF or key[0] in (0xD9, 0xDA))


def _reader_of_archive(path: Path) -> Reader:
    with understood(path, "a zip archive"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if keras.CONFIGURATION in names and {keras.WEIGHTS, keras.PICKLED} & set(names):
        return keras.KIND, keras.read_archive
    if all(name.endswith(".npy") for name in names):
        return numpy.KIND, numpy.read
    if any(name.rpartition("/")[2] in torch.FILES for name in names):
        return torch.KIND, torch.read
    raise CheckpointError(
        f"{path} is a zip archive, but neither PyTorch's nor .npz nor .keras: it holds "
        f"{', '.join(sorted(names)[:3])}."
    )


# The index of a model in several files.

_INDEX = "the index of shards"


def _read_index(path: Path) -> Checkpoint:
    index = json.loads(path.read_bytes())
    if not isinstance(index.get("weight_map"), dict):
        raise CheckpointError(
            f"{path} is JSON without weights: give the file of the weights, or the index that has "
            "a weight_map."
        )
    shards = {name: _names(where) for name, where in index["weight_map"].items()}
    files = {
        each: path.parent / each
        for each in sorted({name for each in shards.values() for name in each})
    }
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "beside it: fetch all files of the model."
        )
    readers = {name: _reader(file) for name, file in files.items()}
    kinds = {kind for kind, _ in readers.values()}
    if kinds == {hdf5.KIND}:
        return keras.read_shards(path, list(files.values()))
    if not kinds <= {safetensors.KIND, torch.KIND}:
        raise CheckpointError(f"{path} names files of {', '.join(sorted(kinds))} as its shards.")
    found = {name: read(file).tree for name, file in files.items()}
    tree = {name: found[shard].get(name) for name, (shard, *_) in shards.items()}
    absent = [name for name, each in tree.items() if each is None]
    if absent:
        raise CheckpointError(
            f"{path} names {absent[0]} in {shards[absent[0]][0]}, which does not hold it: the "
            "files are not of one model."
        )
    return Checkpoint(path, tree)


def _names(where: Any) -> list[str]:
    return where if isinstance(where, list) else [where]
