"""Every example in the documentation runs: docstrings here; those in *.md with >>> by pytest."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import batchnorm

MODULES = [module.name for module in pkgutil.walk_packages(batchnorm.__path__, prefix="batchnorm.")]
ROOT = Path(__file__).parents[1]
PROGRAMS = [
    (path.name, program)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for program in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    if not program.startswith(">>>")
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("._cpu")])
def test_docstrings(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def has_an_example(value):
    return any(test.examples for test in doctest.DocTestFinder().find(value, "", globs={}))


@pytest.mark.parametrize("name", ["definition", "native"])
def test_there_are_docstring_examples(name):
    module = importlib.import_module(f"batchnorm.{name}")
    assert any(has_an_example(value) for value in vars(module).values() if callable(value))


@pytest.mark.parametrize("package", ["numpy", "mlx", "jax", "flax.nn", "torch"])
def test_all_that_a_door_offers_has_an_example(package):
    module = importlib.import_module(f"batchnorm.{package}")
    # The example of Gradients is that of the function that returns them; a lazy layer, or one for a
    # higher rank, has that of its sibling.
    siblings = {name for name in module.__all__ if name.startswith(("Lazy", "BatchNorm3d"))}
    for name in set(module.__all__) - {"Gradients", "initializers"} - siblings:
        assert has_an_example(getattr(module, name)), name


@pytest.mark.parametrize(("file", "program"), PROGRAMS)
def test_programs(file, program):
    exec(compile(program, file, "exec"), {})
