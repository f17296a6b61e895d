"""What `import` and `dir` show of the package and its doors, with their frameworks and without."""

import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import old_flax_nn
import pytest

import batchnorm
import batchnorm.flax.nn

ROOT = Path(__file__).parents[1]
DOORS = [
    *("numpy", "mlx", "jax", "flax", "flax.linen", "flax.nn", "flax.nnx", "equinox", "keras"),
    *("torch", "torch.functional"),
]
LAYERS = {
    (f"batchnorm.{door}", name)
    for door in DOORS
    for name, value in vars(importlib.import_module(f"batchnorm.{door}")).items()
    if inspect.isclass(value) and "BatchNorm" in name and value.__module__.startswith("batchnorm")
}


@pytest.mark.parametrize("name", ["batchnorm", *(f"batchnorm.{door}" for door in DOORS)])
def test_dir_shows_public_names_alone(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    for each in dir(module):
        assert hasattr(module, each)


def test_dir_is_not_the_list_itself():
    batchnorm.__dir__().append("mine")
    assert "mine" not in batchnorm.__all__


@pytest.mark.parametrize("name", sorted({name for _, name in LAYERS}))
def test_a_layer_of_the_package_is_looked_for_in_a_door(name):
    with pytest.raises(ImportError) as caught:
        exec(f"from batchnorm import {name}", {})
    named = set(re.findall(rf"from (\S+) import {name}\b", str(caught.value)))
    assert named == {door for door, each in LAYERS if each == name}


def test_layers_are_found():
    doors = {
        *("batchnorm.mlx", "batchnorm.equinox"),
        *("batchnorm.flax.linen", "batchnorm.flax.nn", "batchnorm.flax.nnx"),
    }
    assert {door for door, name in LAYERS if name == "BatchNorm"} == doors
    assert ("batchnorm.torch", "SyncBatchNorm") in LAYERS


# What the old flax.nn had beside the module system and BatchNorm, and flax beside flax.nn.
OF_OLD_FLAX_NN = {
    *("celu", "elu", "gelu", "glu", "leaky_relu", "log_sigmoid", "log_softmax", "relu", "sigmoid"),
    *("silu", "soft_sign", "softmax", "softplus", "swish", "tanh"),
    *("Dense", "DenseGeneral", "Conv", "ConvTranspose", "Embed", "LayerNorm", "GroupNorm"),
    *("LSTMCell", "GRUCell", "ConvLSTM", "OptimizedLSTMCell", "max_pool", "avg_pool"),
    *("MultiHeadDotProductAttention", "SelfAttention", "attention", "dot_product_attention"),
    *("stochastic", "is_stochastic", "make_rng", "dropout"),
}
SUBMODULES_OF_OLD_FLAX_NN = {"activation", "base", "linear", "pooling", "recurrent"}
OF_FLAX = {
    *("core", "jax_utils", "metrics", "serialization", "struct", "training", "traverse_util"),
}
ADVISED = [
    *(("batchnorm", name, f"from batchnorm.torch import {name}") for name in ["SyncBatchNorm"]),
    *(("batchnorm.flax.nn", name, "docs/coming-from-flax.md") for name in sorted(OF_OLD_FLAX_NN)),
    *(
        ("batchnorm.flax.nn", name, f"without {name} between")
        for name in sorted(SUBMODULES_OF_OLD_FLAX_NN)
    ),
    *(("batchnorm.flax", name, f"from flax import {name}") for name in sorted(OF_FLAX)),
    ("batchnorm.flax", "optim", "Optax"),
]


@pytest.mark.parametrize(("module", "name", "advice"), ADVISED)
def test_advice_is_seen_however_the_name_is_asked_for(module, name, advice):
    shown = importlib.import_module(module)
    assert not hasattr(shown, name)
    assert getattr(shown, name, None) is None
    with pytest.raises(AttributeError, match=advice) as of_attribute:
        getattr(shown, name)
    for form in (f"{name}", f"{name} as other", f"__name__, {name}"):
        with pytest.raises(ImportError, match=advice) as of_import:
            exec(f"from {module} import {form}", {})
        assert str(of_import.value) == str(of_attribute.value)
        assert of_import.value.name == module
    assert re.match(rf"{name}\b", str(of_attribute.value))


@pytest.mark.parametrize("name", sorted(OF_OLD_FLAX_NN))
def test_the_file_for_old_programs_has_what_is_said_to_be_there(name):
    with pytest.raises(AttributeError) as advice:
        getattr(batchnorm.flax.nn, name)
    assert hasattr(old_flax_nn, name) == ("a Module of yours" not in str(advice.value))
    if not hasattr(old_flax_nn, name):
        with pytest.raises(AttributeError, match=re.escape(str(advice.value))):
            getattr(old_flax_nn, name)
    function = re.search(r"use (jax\.\w+)\.(\w+), or", str(advice.value))
    if function:
        there = getattr(importlib.import_module(function[1]), function[2])
        assert there is getattr(old_flax_nn, name)


def test_all_of_the_file_for_old_programs_is_imported_by_a_star():
    names = {}
    exec("from old_flax_nn import *", names)
    assert {"Dense", "dropout", *batchnorm.flax.nn.__all__} <= names.keys()


def test_initializers_are_a_module_as_they_were():
    names = {}
    exec("import batchnorm.flax.nn.initializers as module", names)
    exec("from batchnorm.flax.nn.initializers import zeros, lecun_normal", names)
    assert names["module"] is batchnorm.flax.nn.initializers is old_flax_nn.initializers
    assert names["zeros"] is jax.nn.initializers.zeros
    assert names["lecun_normal"] is jax.nn.initializers.lecun_normal


def test_the_file_for_old_programs_has_what_the_package_has():
    for name in batchnorm.flax.nn.__all__:
        assert getattr(old_flax_nn, name) is getattr(batchnorm.flax.nn, name)


@pytest.mark.parametrize("name", sorted(OF_FLAX))
def test_flax_has_what_is_said_to_be_there(name):
    importlib.import_module(f"flax.{name}")


@pytest.mark.parametrize("name", ["other", "batch_norm", "BatchNorm4d", "__wrapped__"])
@pytest.mark.parametrize("module", ["batchnorm", "batchnorm.flax", "batchnorm.flax.nn"])
def test_another_name_is_an_ordinary_mistake(module, name):
    shown = importlib.import_module(module)
    assert not hasattr(shown, name)
    with pytest.raises(AttributeError, match=f"^module '{module}' has no attribute '{name}'$"):
        getattr(shown, name)
    with pytest.raises(ImportError, match=f"^cannot import name '{name}' from '{module}'"):
        exec(f"from {module} import {name}", {})


@pytest.fixture(scope="module")
def without_frameworks():
    """What each import says where no framework is installed."""
    program = """
import importlib, json, sys
for framework in ("mlx", "jax", "flax", "equinox", "keras", "torch"):
    sys.modules[framework] = None
said = {}
for door in sys.argv[1:]:
    try:
        importlib.import_module(f"batchnorm.{door}")
    except Exception as error:
        said[door] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, *DOORS], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("door", "framework"),
    [
        ("mlx", "MLX"),
        ("jax", "JAX"),
        ("flax.linen", "Flax"),
        ("flax.nn", "JAX"),
        ("flax.nnx", "Flax"),
        ("equinox", "Equinox"),
        ("keras", "Keras"),
        ("torch", "PyTorch"),
        ("torch.functional", "PyTorch"),
    ],
)
def test_a_door_without_its_framework_says_what_to_install(without_frameworks, door, framework):
    package = door.removesuffix(".functional")
    said = without_frameworks[door]
    command = re.fullmatch(
        rf"ImportError: batchnorm\.{package} needs {framework}: "
        r'pip install "\.\[(\w+)\]" in a checkout of batchnorm\.',
        said,
    )
    assert command, said
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert command[1] in project["optional-dependencies"]


def test_what_needs_no_framework_is_imported(without_frameworks):
    assert {"numpy", "flax"}.isdisjoint(without_frameworks)


@pytest.mark.parametrize("place", ["src", "docs", "examples", "README.md", "CHANGELOG.md"])
def test_nothing_says_that_the_package_is_published(place):
    path = ROOT / place
    files = path.rglob("*") if path.is_dir() else [path]
    for file in files:
        if file.suffix in (".py", ".md"):
            assert not re.search("pip install ['\"]?batchnorm", file.read_text()), file
