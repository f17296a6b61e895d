"""What is written is true: examples run, files that are named exist, and the house is as drawn.

Examples in docstrings run here, those in *.md with >>> by pytest.
"""

import ast
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import textwrap
import tokenize
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


# The latter need Triton, which `make test` does without.
WITH_DOCSTRINGS = [
    name for name in MODULES if not name.endswith("._cpu") and "torch._gpu." not in name
]


@pytest.mark.parametrize("name", WITH_DOCSTRINGS)
def test_docstrings(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def has_an_example(value):
    return any(test.examples for test in doctest.DocTestFinder().find(value, "", globs={}))


@pytest.mark.parametrize("name", ["definition", "native"])
def test_there_are_docstring_examples(name):
    module = importlib.import_module(f"batchnorm.{name}")
    assert any(has_an_example(value) for value in vars(module).values() if callable(value))


LAYERS = ["flax.linen", "flax.nnx", "equinox", "keras"]  # for libraries over doors


@pytest.mark.parametrize("package", ["numpy", "mlx", "jax", "flax.nn", "torch", *LAYERS])
def test_all_that_a_door_offers_has_an_example(package):
    module = importlib.import_module(f"batchnorm.{package}")
    # The example of Gradients is that of the function that returns them.
    # And that of revert is convert's.
    for name in set(module.__all__) - {"Gradients", "initializers", "revert"}:
        assert has_an_example(getattr(module, name)), name


TOOLS = {"inspect", "recalibrate"}  # for models
TORCH_LAYERS = [name for name in batchnorm.torch.__all__ if "BatchNorm" in name]


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        *itertools.product(
            ["mlx", "jax", "torch"], sorted(set(COMMON) - {"batch_norm_gradients"} - TOOLS)
        ),
        *itertools.product(["numpy"], sorted(set(COMMON) - TOOLS)),  # which does not differentiate
        *itertools.product(["mlx", "torch", "flax.nnx", "keras"], sorted(TOOLS)),
        *itertools.product(["torch"], TORCH_LAYERS),
    ],
)
def test_help_is_whole(framework, name):
    function = getattr(importlib.import_module(f"batchnorm.{framework}"), name)
    docstring = inspect.getdoc(function)
    order = ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
    titles = re.findall(r"^(\w+)\n-+$", docstring, re.MULTILINE)
    assert titles == [title for title in order if title in titles]
    assert {"Parameters", "Raises", "Examples"} <= {*titles}
    assert "Returns" in titles or isinstance(function, type) or name == "recalibrate"
    assert not re.search(
        r"^\s*\.\.\.|As in torch", docstring.partition("Examples\n")[0], re.MULTILINE
    )
    section = re.split("(?:Returns|Raises)\n", docstring.partition("Parameters\n")[2])[0]
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


# ---- files and folders


FOLDERS = ("src", "csrc", "tests", "docs", "examples", "benchmarks")
FILES = {
    path.relative_to(ROOT).as_posix()
    for place in (ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    for path in place
    if path.is_file() and "__pycache__" not in path.parts
}
PAGES = sorted(file for file in FILES if re.fullmatch(r"\w+\.md|docs/.*\.md", file))
SOURCES = sorted(file for file in FILES if re.fullmatch(r"\w+/.*\.(pyi?|cc|h)", file))
NAMED = re.compile(
    r"(?<![\w./*<-])"  # whole words, and no address or pattern
    r"((?:[\w-]+/)*[\w-]+\.(?:pyi?|md|cc|h|toml|txt|png|json)(?![\w*])"
    r"|(?:[\w-]+/)+(?=[\s`,;:)]|$))"
)
ELSEWHERE = {"demo.png", "build/", "xla/ffi/api/ffi.h"}  # made by a program, or another's


def prose(file: str) -> str:
    """A page without addresses on the web; the comments and docstrings of a source."""
    text = (ROOT / file).read_text()
    if file.endswith(".md"):
        return re.sub(r"\S+://\S+", "", text)
    if file.endswith((".cc", ".h")):
        text = re.sub(r"#include .*", "", text)
        return "\n".join(re.findall(r"//.*|/\*.*?\*/", text, re.DOTALL))
    with (ROOT / file).open() as lines:
        comments = [each.string for each in tokenize.generate_tokens(lines.readline)]
    comments = [each for each in comments if each.startswith("#")]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join([*comments, *(ast.get_docstring(node) or "" for node in nodes)])


def names_what_is(name: str) -> bool:
    """Whether it is the end of a file's path, or with a slash at the end of a folder's."""
    paths = FILES
    if name.endswith("/"):
        paths = {f"{folder.as_posix()}/" for file in FILES for folder in Path(file).parents}
    return any(f"/{path}".endswith(f"/{name}") for path in paths)


@pytest.mark.parametrize("file", PAGES + SOURCES)
def test_files_that_are_named_exist(file: str):
    names = set(NAMED.findall(prose(file))) - ELSEWHERE
    absent = [name for name in names if "foo" not in name and not names_what_is(name)]
    assert not absent, f"{file} names what does not exist"


def test_a_name_of_what_does_not_exist_is_found():
    found = NAMED.findall(
        "docs/nowhere.md, csrc/ and `nowhere/`; https://a.example/b.md, *.cc, 1/2"
    )
    assert found == ["docs/nowhere.md", "csrc/", "nowhere/"]
    assert [name for name in found if names_what_is(name)] == ["csrc/"]


def drawn(tree: str) -> set[str]:
    """The files of a tree: names, more than one in a line, then two spaces and what they are.

    A folder ends in a slash, and what is in it stands below it, two places further right; what
    ends in `.h/.cc` is two files. Lines that stand further right go on with what was said.
    """
    name = r"(?:[\w.-]+/)*[\w-]*\.\w+(?:/\.\w+)?|(?:[\w.-]+/)+"
    files, folders = set(), [(-2, "")]  # with their indentation
    for line in textwrap.dedent(tree).splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > folders[-1][0] + 2:
            continue
        while folders[-1][0] >= indent:
            folders.pop()
        names = re.match(rf"\s*((?:{name})(?:,?\s+(?:{name})(?=[,\s]|$))*)(?:\s\s|$)", line)
        assert names, f"no names at the start of: {line}"
        for each in re.split(r",?\s+", names[1]):
            path, _, other = (folders[-1][1] + each).partition("/.")
            if path.endswith("/"):
                folders.append((indent, path))
            else:
                files |= {path} | ({f"{path.rpartition('.')[0]}.{other}"} if other else set())
    return files


def test_the_house_is_as_drawn():
    """Every file of the package and of the kernels stands in the tree of CONTRIBUTING.md."""
    house = (ROOT / "CONTRIBUTING.md").read_text().partition("## The house\n")[2]
    tree = re.search(r"(?:^ {4}.*\n|^\n)+", house, re.MULTILINE)[0]
    files = {file for file in FILES if re.fullmatch(r"(src/batchnorm|csrc)/.*\.(pyi?|cc|h)", file)}
    files = {file for file in files if not file.endswith("/__init__.py")}
    found = drawn(tree)
    assert not found - FILES, "drawn, but not there"
    assert not files - found, "there, but not drawn"


def test_a_tree_is_read():
    tree = """
    csrc/a.h/.cc            one,
                            one.cc in words
    csrc/
      b.cc  c.cc            two,
                            d.cc in words
    src/batchnorm/
      e.py, f.py            three
      g/                    four
        h.py
        i/j.py
      k.py                  five
    """
    assert drawn(tree) == {
        *("csrc/a.h", "csrc/a.cc", "csrc/b.cc", "csrc/c.cc", "src/batchnorm/e.py"),
        *("src/batchnorm/f.py", "src/batchnorm/g/h.py", "src/batchnorm/g/i/j.py"),
        "src/batchnorm/k.py",
    }
