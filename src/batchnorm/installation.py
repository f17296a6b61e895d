"""How to install: said here, and changed here once the package is published."""

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir . in a checkout of batchnorm"
_INSTALL = 'pip install ".[{extra}]" in a checkout of batchnorm'


def missing(door: str, framework: str, extra: str) -> ImportError:
    """The error of a door without its framework, which `extra` of pyproject.toml brings."""
    return ImportError(f"{door} needs {framework}: {_INSTALL.format(extra=extra)}.", name=door)
