"""Every example in the documentation runs: docstrings here; those in *.md with >>> by pytest."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import batchnorm
from batchnorm.documentation import COMMON, documented

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


@pytest.mark.parametrize("door", ["numpy", "mlx", "jax", "flax.nn", "torch"])
def test_all_that_a_door_offers_has_an_example(door):
    module = importlib.import_module(f"batchnorm.{door}")
    # The example of Gradients is that of the function that returns them; a lazy layer, or one for a
    # higher rank, has that of its sibling.
    siblings = {name for name in module.__all__ if name.startswith(("Lazy", "BatchNorm3d"))}
    for name in set(module.__all__) - {"Gradients", "initializers"} - siblings:
        assert has_an_example(getattr(module, name)), name


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("door", ["numpy", "mlx", "jax", "torch"])
def test_help_is_whole(door, name):
    function = getattr(importlib.import_module(f"batchnorm.{door}"), name, None)
    if function is None:
        pytest.skip("a framework that differentiates")
    docstring = inspect.getdoc(function)
    order = ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
    titles = re.findall(r"^(\w+)\n-+$", docstring, re.MULTILINE)
    assert titles == [title for title in order if title in titles]
    assert {"Parameters", "Returns", "Raises", "Examples"} <= {*titles}
    assert "..." not in docstring.partition("Examples\n")[0]
    section = docstring.partition("Parameters\n")[2].partition("Returns\n")[0]
    said = re.findall(r"^(\w.*?)(?: : .*)?$", section, re.MULTILINE)
    assert sorted(", ".join(said).split(", ")) == sorted(inspect.signature(function).parameters)


def test_a_docstring_is_completed():
    @documented(array="tensor")
    def normalize(x, mean, var, bias, out, axis):
        """... A paragraph.

        Parameters
        ----------
        x
            ... It may be empty.
        out : tensor
            Where to.

        Raises
        ------
        RuntimeError
            If so.
        """

    assert inspect.getdoc(normalize) == inspect.cleandoc(
        """
        Normalize x by a given mean and variance, as in evaluation.

        A paragraph.

        Parameters
        ----------
        x : tensor of real floating-point numbers
            It may be empty.
        mean, var : tensor of the feature shape
            Running statistics, or those of `batch_statistics`.
        bias, axis
            As in `batch_norm`.
        out : tensor
            Where to.

        Returns
        -------
        y : tensor, of the shape and dtype of x

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`.
        RuntimeError
            If so.
        """
    )


@pytest.mark.parametrize(("file", "program"), PROGRAMS)
def test_programs(file, program):
    exec(compile(program, file, "exec"), {})
