"""A name with an underscore stays in its file, and a module with one in its package.

Ruff looks at attributes (SLF) and at imports from other packages (PLC2701); this at imports within.
"""

import ast
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src/batchnorm"


def imported_from_elsewhere(source: str, folder: str = "") -> list[str]:
    """By a file in this folder; one with an underscore is a room of the package that it is in."""
    levels = (1, 2) if folder.startswith("_") else (1,)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            of_own_package = node.level in levels
            modules = (node.module or "").split(".")
            if not of_own_package or node.module:
                modules += [alias.name for alias in node.names]
            # Of its own package, a file may import a module by its name.
            found += [name for name in modules[of_own_package:] if name.startswith("_")]
    return found


def test_private_names_stay_at_home():
    found = {
        str(path.relative_to(SOURCES)): names
        for path in SOURCES.rglob("*.py")
        if (names := imported_from_elsewhere(path.read_text(), path.parent.name))
    }
    assert not found


def test_what_counts():
    assert imported_from_elsewhere("from . import _stages") == []
    assert imported_from_elsewhere("from ._stages import normalize as _normalize") == []
    assert imported_from_elsewhere("from ._stages import _normalize") == ["_normalize"]
    assert imported_from_elsewhere("from .stages import _normalize") == ["_normalize"]
    assert imported_from_elsewhere("from ..jax import _stages") == ["_stages"]
    assert imported_from_elsewhere("from .._stages import normalize") == ["_stages"]
    assert imported_from_elsewhere("from .._stages import normalize", "_gpu") == []
    assert imported_from_elsewhere("from .._stages import _normalize", "_gpu") == ["_normalize"]
    assert imported_from_elsewhere("from ..jax._stages import normalize") == ["_stages"]
    assert imported_from_elsewhere("from .native._cpu import batch_norm") == ["_cpu"]
