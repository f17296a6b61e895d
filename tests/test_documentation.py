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


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    for name in ("definition", "native", "numpy", "mlx"):
        module = importlib.import_module(f"batchnorm.{name}")
        assert any(test.examples for test in finder.find(module)), name


@pytest.mark.parametrize(("file", "program"), PROGRAMS)
def test_programs(file, program):
    exec(compile(program, file, "exec"), {})
