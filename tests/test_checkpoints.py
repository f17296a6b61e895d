"""Files of weights, as the frameworks write them, against what was written into them."""

import argparse
import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch

import batchnorm.keras
from batchnorm.tools import checkpoints
from batchnorm.tools.checkpoints import CheckpointError, Stored, read

# Keras 3.15 calls np.array of its own Variables, to save a model, whose __array__ does not take the
# `copy` that NumPy 2 asks for. No call of ours is on the way.
arrays_of_keras = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

# Layers.


def leaves(tree, place=()):
    """What lies at each place of a tree that is no mapping."""
    found = {}
    for key, each in tree.items():
        found |= leaves(each, (*place, key)) if isinstance(each, Mapping) else {(*place, key): each}
    return found


def arrays(tree):
    found = {}
    for place, each in leaves(tree).items():
        if isinstance(each, Stored):
            array = each.read()
            assert isinstance(array, np.ndarray)
            assert array.shape == each.shape
            found["/".join(place)] = array
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


NUMBERS = {
    each: np.arange(6).reshape(2, 3).astype(each)
    for each in ("float64", "float32", "float16", "int64", "uint8", "bool", "complex64")
}
WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


# PyTorch's.


def written(path, value, **options):
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "older format"])
def test_reads_what_pytorch_writes(tmp_path, is_archive):
    tensors = {name: torch.tensor(array) for name, array in NUMBERS.items()}
    value = {
        "state_dict": OrderedDict(tensors),
        "list": [torch.ones(2), {"parameter": torch.nn.Parameter(torch.arange(3.0))}],
        "bfloat16": torch.tensor([1.5, -2.0]).bfloat16(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "column": torch.arange(6.0).reshape(2, 3)[:, 1],
        "scalar": torch.tensor(2.0),
        "arguments": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "best": np.float64(0.25),
        7: "epoch",
    }
    path = written(tmp_path / "w", value, _use_new_zipfile_serialization=is_archive)
    checkpoint = read(path)
    assert checkpoint.path == path
    assert checkpoint.settings == {}
    assert checkpoint.tree["best"] == 0.25
    assert checkpoint.tree["arguments"].layers == [1, 2]
    assert checkpoint.tree["7"] == "epoch"
    same(
        arrays(checkpoint.tree),
        {
            **{f"state_dict/{name}": array for name, array in NUMBERS.items()},
            "list/0": np.ones(2, np.float32),
            "list/1/parameter": np.arange(3, dtype=np.float32),
            "bfloat16": np.array([1.5, -2], np.float32),
            "conjugate": np.array([1 - 2j], np.complex64),
            "column": np.array([1, 4], np.float32),
            "scalar": np.array(2, np.float32),
        },
    )
    assert checkpoint.tree["bfloat16"].dtype == "bfloat16"
    assert checkpoint.tree["list"]["1"]["parameter"].dtype == "float32"


# PyTorch's, of what it will give up, or has in part alone.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_leaves_alone_what_is_no_plain_tensor(tmp_path):
    value = {
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "half": torch.zeros(1, dtype=torch.complex32),
        "size": torch.Size([2]),
    }
    found = read(written(tmp_path / "w.pt", value)).tree
    assert not arrays(found)
    assert found["sparse"].is_sparse


def test_maps_what_pytorch_writes_into_memory(tmp_path, monkeypatch):
    path = written(tmp_path / "w.pt", {"a": torch.arange(3.0)})
    squeezed = tmp_path / "squeezed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.namelist():
            new.writestr(each, old.read(each))
    misnamed = tmp_path / "w.safetensors"
    misnamed.write_bytes(path.read_bytes())
    mapped, load = [], torch.load

    def spied(*arguments, mmap, **keywords):
        mapped.append(mmap)
        return load(*arguments, mmap=mmap, **keywords)

    monkeypatch.setattr(torch, "load", spied)
    for each in (path, squeezed, misnamed):
        assert read(each).tree["a"].read().tolist() == [0, 1, 2]
    assert mapped == [True, False, False]


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["archive", "older format", "pickle", "npz"])
def test_executes_nothing(tmp_path, kind):
    made, path = tmp_path / "made", tmp_path / "file"
    value = {"a": torch.ones(2), "code": Code(made)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.ones(2), code=np.array([Code(made)], dtype=object))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(CheckpointError, match="nothing was executed") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert not made.exists()
    if kind != "npz":  # it would have: else this test says nothing
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert made.exists()


class Mine:
    pass


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "older format"])
def test_names_what_is_more_than_weights(tmp_path, is_archive):
    value = {"mine": Mine(), "norm": torch.nn.BatchNorm1d(2)}
    path = written(tmp_path / "w.pt", value, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(CheckpointError, match=r"save model\.state_dict") as caught:
        read(path)
    assert f"{__name__}.Mine" in str(caught.value)
    assert ("torch.nn.modules.batchnorm.BatchNorm1d" in str(caught.value)) == is_archive


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "older format"])
def test_a_protocol_that_pytorch_does_not_read_as_weights(tmp_path, is_archive):
    options = {"pickle_protocol": 4, "_use_new_zipfile_serialization": is_archive}
    path = written(tmp_path / "w.pt", {"a": torch.ones(1)}, **options)
    with pytest.raises(CheckpointError, match=r"weights alone \(Unsupported operand 149\)"):
        read(path)


def test_an_array_of_numpy_is_named_as_pytorch_does(tmp_path):
    path = written(tmp_path / "w.pt", {"a": np.ones(2)})
    with pytest.raises(CheckpointError, match=r"multiarray\._reconstruct"):
        read(path)


def test_what_is_allowed_is_so_within_the_call_alone(tmp_path):
    before = torch.serialization.get_safe_globals()
    read(written(tmp_path / "w.pt", {"a": torch.ones(1)}))
    assert torch.serialization.get_safe_globals() == before


def archive_of(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["w/data.pkl", "w/constants.pkl", "w/code/a.py"], r"TorchScript.*torch\.jit\.load"),
        (["w/archive_format", "w/models/model.json"], r"torch\.export\.load"),
        (["serialized_exported_program.json", "version"], r"torch\.export\.load"),
        (["a.txt", "b.npy"], r"neither.*a\.txt"),
        (["config.json", "model.weights.npz"], r"pickled code.*weights_format"),
    ],
)
def test_archives_that_hold_no_weights(tmp_path, names, said):
    path = archive_of(tmp_path / "w.pt", *names)
    with pytest.raises(CheckpointError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_one_tensor_alone(tmp_path):
    with pytest.raises(CheckpointError, match="one Tensor without a name"):
        read(written(tmp_path / "w.pt", torch.ones(2)))


# Safetensors.


def safetensors_of(path, entries):
    """The format, stated once more: length, header, bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in entries.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_safetensors(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "w"
    values = {**NUMBERS, "empty": np.zeros((0, 2), np.float32), "scalar": np.array(2.0)}
    save_file(values, path, metadata={"format": "np"})
    checkpoint = read(path)
    same(arrays(checkpoint.tree), values)
    for name in NUMBERS:
        assert checkpoint.tree[name].dtype == name


@pytest.mark.parametrize("name", WIDENED)
def test_every_number_of_the_small_dtypes(tmp_path, monkeypatch, name):
    """Against PyTorch's cast, without the package that NumPy has them from."""
    from safetensors.torch import save_file

    bits = np.arange(2**16, dtype=np.uint16) if name == "bfloat16" else np.arange(2**8, dtype="u1")
    values = torch.tensor(bits).view(getattr(torch, name))
    save_file({"a": values, "scalar": values[0].clone()}, tmp_path / "w.safetensors")
    torch.save({"a": values, "scalar": values[0].clone()}, tmp_path / "w.pt")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for path in tmp_path.iterdir():
        found = read(path).tree["a"]
        assert found.dtype == name
        assert found.read().dtype == np.float32
        np.testing.assert_array_equal(found.read(), values.float().numpy())
        assert read(path).tree["scalar"].read().shape == ()


def test_no_more_of_safetensors_is_read_than_is_asked_for(tmp_path, monkeypatch):
    data = np.arange(4, dtype=np.float32)
    entries = {name: ("F32", [4], (data + at).tobytes()) for at, name in enumerate("abc")}
    path = safetensors_of(tmp_path / "w", {**entries, "f": ("F8_E8M0", [1], b"\1")})
    counts, fromfile = [], np.fromfile

    def spied(file, dtype, count, **keywords):
        counts.append(count)
        return fromfile(file, dtype, count, **keywords)

    monkeypatch.setattr(np, "fromfile", spied)
    tree = read(path).tree
    assert counts == []
    assert tree["f"] == "F8_E8M0"
    assert tree["b"].read().tolist() == [1, 2, 3, 4]
    assert counts == [4]


@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
def test_the_index_of_shards(tmp_path, kind):
    def shard(name, **values):
        if kind == "pytorch":
            return written(tmp_path / name, {k: torch.tensor(each) for k, each in values.items()})
        entries = {k: ("F32", [2], each.tobytes()) for k, each in values.items()}
        return safetensors_of(tmp_path / name, entries)

    values = {name: np.array([at, -at], np.float32) for at, name in enumerate(["a.w", "b.w", "c"])}
    shard("1-of-2", **{name: values[name] for name in ("a.w", "c")})
    second = shard("2-of-2", **{"b.w": values["b.w"]})
    index = tmp_path / "model.index.json"
    weight_map = {"a.w": "1-of-2", "b.w": "2-of-2", "c": "1-of-2"}
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    checkpoint = read(index)
    assert checkpoint.path == index
    same(arrays(checkpoint.tree), values)

    shard("2-of-2", other=values["c"])
    with pytest.raises(CheckpointError, match=r"names b\.w in 2-of-2, which does not hold it"):
        read(index)
    second.unlink()
    with pytest.raises(CheckpointError, match="names 2-of-2, which is not beside it"):
        read(index)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(CheckpointError, match="names files of the index of shards"):
        read(index)


# NumPy's.


def test_reads_npz(tmp_path):
    import ml_dtypes

    values = {**NUMBERS, "a/b.c": np.asfortranarray(NUMBERS["float32"]), "scalar": np.array(2.0)}
    half, one = np.array([1.5, -2], ml_dtypes.bfloat16), np.array(1, ml_dtypes.bfloat16)
    for path, save in ((tmp_path / "a.npz", np.savez), (tmp_path / "b.npz", np.savez_compressed)):
        save(path, **values, half=half, one=one, text=np.array(["a"]))
        tree = read(path).tree
        assert tree["text"] == "<U1"
        assert tree["half"].dtype == "bfloat16"
        widened = {"half": np.array([1.5, -2], np.float32), "one": np.array(1, np.float32)}
        same(arrays(tree), values | widened)


def test_an_array_of_npz_is_read_by_itself(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.full(1000, 1.0), b=np.full(1000, 2.0))  # more than a header comes with
    content = path.read_bytes()
    path.write_bytes(content.replace(np.full(500, 1.0).tobytes(), np.full(500, 3.0).tobytes()))
    tree = read(path).tree
    assert tree["b"].read().tolist() == [2] * 1000
    with pytest.raises(CheckpointError, match=r"w\.npz .*damaged.*CRC"):
        tree["a"].read()


# HDF5, and Keras'.


def test_reads_any_hdf5_as_a_tree(tmp_path):
    path = tmp_path / "w.h5"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones(2)
    with h5py.File(path, "w") as file:
        for name, array in NUMBERS.items():
            file[f"group/{name}"] = array
        file["scalar"] = np.float32(2)
        file["text"] = "words"
        file["nothing"] = h5py.Empty("f4")
        file["soft"] = h5py.SoftLink("/group")
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/secret")
        outside = [(str(tmp_path / "other.h5"), 0, 8)]
        file.create_dataset("outside", (1,), "f8", external=outside)
        layout = h5py.VirtualLayout((2,), "f8")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "secret", (2,))
        file.create_virtual_dataset("virtual", layout)
    tree = read(path).tree
    expected = {f"group/{name}": array for name, array in NUMBERS.items()}
    same(arrays(tree), expected | {"scalar": np.array(2, np.float32)})
    assert tree.keys() == {"group", "scalar", "text", "nothing", "outside", "virtual"}


def test_a_dataset_of_hdf5_is_read_by_itself(tmp_path):
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        for name, value in {"a": 1.0, "b": 2.0}.items():
            file.create_dataset(name, data=np.full(4, value), chunks=(4,), fletcher32=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(np.full(4, 1.0).tobytes(), np.full(4, 3.0).tobytes()))
    tree = read(path).tree
    assert tree["b"].read().tolist() == [2] * 4
    with pytest.raises(CheckpointError, match=r"w\.h5 .*damaged"):
        tree["a"].read()


def test_a_group_that_holds_itself(tmp_path):
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["a/b"] = file["/"]
    with pytest.raises(CheckpointError, match="holds itself"):
        read(path)


def norm(name, **keywords):
    return keras.layers.BatchNormalization(name=name, **keywords)


class MyNorm2D(keras.layers.BatchNormalization):
    pass


def functional():
    """One of everything; in an order in which no two counters agree."""
    twice = norm("twice", epsilon=0.75)
    one, other = (
        keras.Sequential([keras.Input((4,)), norm("z", momentum=each), twice], name=name)
        for name, each in (("one", 0.1), ("other", 0.2))
    )
    inner = keras.Sequential(
        [keras.Input((4,)), norm("x", scale=False, epsilon=0.5), norm("y")], name="inner"
    )
    deeper = keras.Sequential([keras.Input((4,)), norm("y", momentum=0.25), inner], name="deeper")
    start = keras.Input((3, 4))
    x = keras.layers.TimeDistributed(norm("within"), name="each")(start)
    x = keras.layers.Bidirectional(keras.layers.SimpleRNN(2), name="both")(x)
    shared = norm("shared", epsilon=0.125)
    x = shared(norm("last", center=False)(norm("zero", scale=False, center=False)(shared(x))))
    x = other(one(deeper(keras.ops.abs(x))))
    x = MyNorm2D(name="mine")(batchnorm.keras.BatchNormalization(name="ours", epsilon=0.3)(x))
    return keras.Model(start, norm("renorm", renorm=True, trainable=False)(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = norm("first", epsilon=0.5)
        self.more = [norm("second", momentum=0.5), keras.layers.Dense(4), norm("third")]

    def call(self, x):
        x = self.first(x)
        for layer in self.more:
            x = layer(x)
        return x


def filled(model):
    """With other numbers in every weight, as float32."""
    random = np.random.default_rng(0)
    for each in model.weights:
        each.assign(random.uniform(0.5, 2, each.shape).astype(np.float32))
    return model


def norms_of(model):
    """Every BatchNormalization once."""
    found, left = {}, [model]
    while left:
        layer = left.pop()
        if isinstance(layer, keras.layers.BatchNormalization):
            found[id(layer)] = layer
        left += getattr(layer, "layers", [])
        left += [layer.layer] if hasattr(layer, "layer") else []
    return [*found.values()]


def variables_of(layer):
    return {each.name: np.array(each.value) for each in layer.variables}


def settings_of(layer):
    return {
        "name": layer.name,
        "eps": layer.epsilon,
        **{name: getattr(layer, name) for name in ("momentum", "scale", "center", "axis")},
        **{name: getattr(layer, name) for name in ("renorm", "trainable")},
    }


def at(tree, place):
    for key in place:
        tree = tree[key]
    return tree


def same_layers(checkpoint, layers, settings):
    """Each place of the settings has the numbers of one layer, and each layer has a place."""
    found = set()
    for place, each in checkpoint.settings.items():
        index = [settings(layer) for layer in layers].index(each)
        values = variables_of(layers[index])
        node = at(checkpoint.tree, place)
        assert node.keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(node[name].read(), value)
        found.add(index)
    assert len(found) == len(layers)


@pytest.fixture(scope="module", name="model")
def _model():
    return filled(functional())


@arrays_of_keras
def test_reads_a_model_of_keras(tmp_path, model):
    path = tmp_path / "w"
    model.save(path.with_suffix(".keras"))
    path.with_suffix(".keras").rename(path)
    same_layers(read(path), norms_of(model), settings_of)


@arrays_of_keras
def test_reads_an_archive_of_keras_in_its_place(tmp_path, model, monkeypatch):
    """Where it is not compressed; else it is unpacked into memory."""
    path, squeezed = tmp_path / "w.keras", tmp_path / "squeezed.keras"
    model.save(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.namelist():
            new.writestr(each, old.read(each))
    same_layers(read(squeezed), norms_of(model), settings_of)
    unpacked, read_member = [], zipfile.ZipFile.read

    def spied(archive, name, *arguments):
        unpacked.append(name)
        return read_member(archive, name, *arguments)

    monkeypatch.setattr(zipfile.ZipFile, "read", spied)
    same_layers(read(path), norms_of(model), settings_of)
    assert unpacked == ["config.json"]


@arrays_of_keras
def test_reads_a_subclassed_model_whose_layers_are_not_configured(tmp_path):
    model = Subclassed()
    model(np.ones((2, 4), np.float32))
    filled(model).save(tmp_path / "w.keras")
    layers = [model.first, model.more[0], model.more[2]]
    same_layers(read(tmp_path / "w.keras"), layers, lambda layer: {"name": layer.name})


@arrays_of_keras
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_reads_weights_alone_by_their_order(tmp_path, shards):
    layers = [
        norm("a"),
        norm("batch_normalization_9", scale=False, center=False),
        norm("c", renorm=True),
        norm("d", renorm=True, scale=False, center=False),
        keras.layers.LayerNormalization(),
    ]
    model = filled(keras.Sequential([keras.Input((4,)), *layers]))
    if shards:
        model.save_weights(tmp_path / "w.weights.json", max_shard_size=1e-7)
        assert len([*tmp_path.glob("*.h5")]) > 1
        path = tmp_path / "w.weights.json"
    else:
        path = tmp_path / "w.weights.h5"
        model.save_weights(path)
    same_layers(read(path), layers[:4], lambda layer: {"name": layer.name})


@arrays_of_keras
def test_of_one_affine_variable_it_is_not_known_which_it_is(tmp_path):
    model = filled(keras.Sequential([keras.Input((4,)), norm("a", scale=False)]))
    model.save_weights(tmp_path / "w.weights.h5")
    (node,) = read(tmp_path / "w.weights.h5").tree["layers"].values()
    same(
        {key: each.read() for key, each in node.items()},
        {key: each for key, each in variables_of(model.layers[0]).items() if key != "beta"},
    )


@arrays_of_keras
def test_weights_in_bfloat16(tmp_path, monkeypatch):
    dtype = keras.DTypePolicy("bfloat16")
    model = filled(keras.Sequential([keras.Input((4,)), norm("a", dtype=dtype)]))
    expected = {k: each.astype(np.float32) for k, each in variables_of(model.layers[0]).items()}
    model.save(tmp_path / "w.keras")
    model.save(tmp_path / "w.h5")
    for path in [*tmp_path.iterdir()]:
        checkpoint = read(path)
        (place,) = checkpoint.settings
        node = at(checkpoint.tree, place)
        assert {each.dtype for each in node.values()} == {"bfloat16"}
        same({key: each.read() for key, each in node.items()}, expected)


@arrays_of_keras
def test_reads_the_older_files_of_keras(tmp_path, model):
    path = tmp_path / "w"
    model.save(path.with_suffix(".h5"))
    path.with_suffix(".h5").rename(path)
    same_layers(read(path), norms_of(model), settings_of)


def archive_by_hand(path, groups, layers, names=()):
    """A .keras file: how many vectors each group has, and what the layers' configurations are."""
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for group, count in groups.items():
            for index in range(count):
                file[f"layers/{group}/vars/{index}"] = np.full(2, index, np.float32)
        for group, name in dict(names).items():
            file[f"layers/{group}/vars"].attrs["name"] = name
    config = {"class_name": "Sequential", "config": {"name": "m", "layers": layers}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


def layer_of(name, kind="BatchNormalization", **settings):
    own = {"name": name, "moving_variance_initializer": {}, **settings}
    return {"class_name": kind, "config": own}


def test_without_names_it_is_the_place_in_the_configuration_that_counts(tmp_path):
    """As of Keras before 3.10, say."""
    groups = {"batch_normalization": 3, "batch_normalization_1": 3, "my_norm2d": 2, "dense": 2}
    layers = [
        {"class_name": "Dense", "config": {"name": "d"}},
        layer_of("one", scale=False),
        layer_of("two", center=False),
        layer_of("three", "MyNorm2D", scale=False, center=False),
    ]
    checkpoint = read(archive_by_hand(tmp_path / "w.keras", groups, layers))
    expected = {
        "batch_normalization": ("one", ["beta", "moving_mean", "moving_variance"]),
        "batch_normalization_1": ("two", ["gamma", "moving_mean", "moving_variance"]),
        "my_norm2d": ("three", ["moving_mean", "moving_variance"]),
    }
    for group, (name, roles) in expected.items():
        place = ("layers", group)
        assert checkpoint.settings[place]["name"] == name
        same(
            {role: each.read() for role, each in at(checkpoint.tree, place).items()},
            {role: np.full(2, index, np.float32) for index, role in enumerate(roles)},
        )
    assert len(checkpoint.settings) == len(expected)


def test_names_count_more_than_places(tmp_path):
    groups = {"batch_normalization": 4, "batch_normalization_1": 4, "held": 4}
    layers = [layer_of("one", epsilon=0.1), layer_of("two", epsilon=0.2)]
    layers.append({"class_name": "Mine", "config": {"norm": layer_of("three", epsilon=0.3)}})
    names = {"batch_normalization": "two", "batch_normalization_1": "one", "held": "three"}
    path = archive_by_hand(tmp_path / "w.keras", groups, layers, names)
    found = {group: each["eps"] for (_, group), each in read(path).settings.items()}
    assert found == {"batch_normalization": 0.2, "batch_normalization_1": 0.1, "held": 0.3}


def test_variables_that_are_not_those_of_the_layer_stay_as_they_are(tmp_path):
    path = archive_by_hand(
        tmp_path / "w.keras", {"my_norm": 4}, [layer_of("a", "MyNorm", renorm=True)]
    )
    checkpoint = read(path)
    assert checkpoint.settings == {}
    assert checkpoint.tree["layers"]["my_norm"]["vars"].keys() == {"0", "1", "2", "3"}

    with h5py.File(tmp_path / "w.h5", "w") as file:
        for index, shape in enumerate([(2,), (2,), (2,), (3,)]):
            file[f"unequal/vars/{index}"] = np.ones(shape)
            file[f"matrices/vars/{index}"] = np.ones((2, 2))
            file[f"batch_normalization/vars/{2 * index}"] = np.ones(2)
    assert read(tmp_path / "w.h5").settings == {}


def older(path, weights, config=None, root=""):
    """A file as Keras 2 writes it, by the names of its layers and weights."""
    with h5py.File(path, "w") as file:
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        group = file.require_group(root or "/")
        group.attrs["layer_names"] = [layer.encode() for layer in weights]
        for layer, values in weights.items():
            of_layer = group.create_group(layer)
            of_layer.attrs["weight_names"] = [name.encode() for name in values]
            for name, value in values.items():
                of_layer[name] = value
        if root:
            file["optimizer_weights/Adam/bn/gamma:0"] = np.ones(2)
    return path


def config_of(name, epsilon):
    return layer_of(name, "BatchNormalizationV1", epsilon=epsilon)


def test_reads_what_keras_2_wrote(tmp_path):
    roles = ("gamma", "beta", "moving_mean", "moving_variance")
    value = np.arange(2, dtype=np.float32)

    def weights(scope, at):
        return {f"{scope}/{role}:0": value + at + index for index, role in enumerate(roles)}

    of_layers = {
        "bn": weights("bn", 0),
        "conv1/bn": weights("conv1/bn", 10),
        "each": weights("each", 20),
        "model_1": weights("bn", 30) | weights("other", 40),
    }
    wrapper = {"name": "each", "layer": config_of("inner", 0.3)}
    deeper = {"name": "model_2", "layers": [config_of("bn", 0.4), config_of("other", 0.5)]}
    nested = [{"class_name": "Model", "config": deeper}]
    layers = [
        config_of("bn", 0.1),
        config_of("conv1/bn", 0.2),
        {"class_name": "TimeDistributed", "config": wrapper},
        {"class_name": "Model", "config": {"name": "model_1", "layers": nested}},
    ]
    expected = {("bn", "bn"): 0.1, ("conv1", "bn", "conv1", "bn"): 0.2}
    expected |= {("each", "each"): 0.3, ("model_1", "bn"): 0.4}
    expected |= {("model_1", "other"): 0.5}
    whole = {"class_name": "Model", "config": {"name": "m", "layers": layers}}
    listed = {"class_name": "Sequential", "config": layers}  # as before Keras 2.2
    for config in (whole, listed, None):
        checkpoint = read(older(tmp_path / "w.h5", of_layers, config, "model_weights"))
        found = {place: each["eps"] for place, each in checkpoint.settings.items()}
        assert found == (expected if config else {})
        for at_, place in enumerate(expected):
            node = at(checkpoint.tree, place)
            assert node.keys() == set(roles)
            assert node["moving_mean"].read().tolist() == [10 * at_ + 2, 10 * at_ + 3]
        assert "optimizer_weights" not in checkpoint.tree
    alone = read(older(tmp_path / "w.h5", of_layers))
    assert alone.tree["bn"]["bn"].keys() == set(roles)


# What can't be read.


def samples(folder):
    """One small file of each format."""
    values = {"a": np.arange(4, dtype=np.float32)}
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3)}
    torch.save(tensors, folder / "archive.pt")
    torch.save(tensors, folder / "older.pt", _use_new_zipfile_serialization=False)
    np.savez(folder / "w.npz", **values)
    safetensors_of(folder / "w.safetensors", {"a": ("F32", [4], values["a"].tobytes())})
    older(folder / "older.h5", {"bn": {"bn/moving_mean:0": values["a"]}})
    with h5py.File(folder / "vars.h5", "w") as file:
        file["layers/batch_normalization/vars/0"] = values["a"]
        file["layers/batch_normalization/vars/1"] = values["a"]
    with zipfile.ZipFile(folder / "w.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(folder / "vars.h5", "model.weights.h5")
    return sorted(folder.iterdir())


def test_a_file_that_is_cut_off(tmp_path):
    for path in samples(tmp_path):
        assert arrays(read(path).tree), path
        content = path.read_bytes()
        for length in {1, 4, 8, 9, 40, *(len(content) * part // 10 for part in range(1, 10))}:
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=path.name):
                arrays(read(path).tree)
        path.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            arrays(read(path).tree)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\0" * 600, "none of the formats that are read here"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\1\0", "numpy.savez"),
        (b"\x82\xa6params\x81", "flax.serialization.*batchnorm.tools.inspect"),
        (b"{}", "JSON without weights"),
        (b'{"meta":{}}', "JSON without weights"),  # safetensors have a brace there, too
        (b"[1]", "none of the formats"),
        (b"{", "cut off or damaged"),
        (b"0" * 257 + b"ustar" + b"0" * 250, "tar archive"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5: it is cut off or damaged"),
        (b"PK\3\4" + b"\0" * 100, "as a zip archive: it is cut off or damaged"),
        (b"\2\0\0\0\0\0\0\0{x", "safetensors: it is cut off or damaged"),
        (b"{" * 100_000, "nested too deeply|damaged"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, said):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w.safetensors", "give its files"),
        ("_CHECKPOINT_METADATA", "Orbax and give a mapping.*batchnorm.tools.inspect"),
        ("saved_model.pb", "TensorFlow and give a mapping"),
        ("weights.ckpt.index", "TensorFlow and give a mapping"),
        (".metadata", "torch.distributed.checkpoint and give a mapping"),
    ],
)
def test_a_folder(tmp_path, name, said):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"is a folder: .*{said}"):
        read(tmp_path)


def test_a_file_that_is_not_there_or_not_for_us(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="gone does not exist"):
        read(tmp_path / "gone")

    def refused(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"w\.pt can't be read: Permission denied\."):
        read(tmp_path / "w.pt")


def test_a_file_that_has_gone_before_an_array_is_read(tmp_path):
    path = safetensors_of(tmp_path / "w", {"a": ("F32", [1], b"\0" * 4)})
    tree = read(path).tree
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read any more"):
        tree["a"].read()


@pytest.mark.parametrize("name", ["torch", "safetensors", "h5py"])
def test_says_what_to_install(tmp_path, monkeypatch, name):
    files = {"torch": ["archive.pt", "older.pt"], "safetensors": ["w.safetensors"]}
    needing = {*files.get(name, ["older.h5", "vars.h5", "w.keras"])}
    everything = samples(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    for path in everything:
        if path.name in needing:
            with pytest.raises(CheckpointError, match=f"{path.name} .*pip install {name}"):
                read(path)
        else:
            read(path)


def test_dir_shows_public_names_alone():
    assert sorted(checkpoints.__all__) == dir(checkpoints)
