"""scikit-build-core, with the headers and the library of the MLX that kernels are to be built for.

pip builds in an environment of its own, in which there is what this asks for. The native operation
serves one version of MLX: the one that is installed, or, where none is, the newest that the extra
"mlx" allows, which pip installs next if that extra is asked for. What is asked for depends on the
machine, which `requires` of pyproject.toml could not say.

    pip install . -C cmake.define.BATCHNORM_MLX=OFF           without an operation of MLX
    pip install . -C cmake.define.BATCHNORM_MLX=.../mlx       for the MLX in that folder
"""

import os
import platform
import re
import site
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from scikit_build_core import build as _build
from scikit_build_core.build import *

_SWITCH = "BATCHNORM_MLX"


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_mlx(config_settings)]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_mlx(config_settings)]


def _mlx(config_settings):
    if _is_switched(config_settings or {}) or not _has_wheels():
        return []
    found = [each for each in distributions(path=_folders()) if each.metadata["Name"]]
    installed = {each.metadata["Name"]: each.version for each in found}
    if any(name.startswith("mlx-cuda") for name in installed):
        return []  # a GPU's MLX is served by its own operations
    pyproject = tomllib.loads(Path("pyproject.toml").read_text())
    extra = map(Requirement, pyproject["project"]["optional-dependencies"]["mlx"])
    allowed = next(each.specifier for each in extra if each.marker.evaluate())
    version = installed.get("mlx")
    if version is None or not allowed.contains(version, prereleases=True):
        return [f"mlx-cpu{allowed}"]
    # One that was built from source has no wheel of the same headers.
    return [] if Version(version).is_devrelease else [f"mlx-cpu=={version}"]


def _is_switched(config_settings):
    """Whether the user says for which MLX, or that for none."""
    variables = ("SKBUILD_CMAKE_DEFINE", "SKBUILD_CMAKE_ARGS", "CMAKE_ARGS")
    return _SWITCH in f"{config_settings} {[os.environ.get(each) for each in variables]}"


def _has_wheels():
    """Whether mlx-cpu has a wheel for this machine, and the kernels a face for it."""
    library, version = platform.libc_ver()
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and library == "glibc"
        and tuple(map(int, re.findall(r"\d+", version)[:2])) >= (2, 35)
    )


def _folders():
    """Where the environment keeps its packages for which this is built."""
    return [*map(sysconfig.get_path, ("purelib", "platlib")), site.getusersitepackages()]
