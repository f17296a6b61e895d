"""What is served on this machine, framework by framework, and whether it is right.

Each framework is looked at in a process of its own, so that one that is broken is a row that says
so; `probes` is what runs there.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from ..native import native_status
from .probes import INPUTS, MARK, NOT_FINITE, PROBES

Progress = Callable[[str], None]
SECONDS = 60.0  # for one framework
# No framework takes a GPU's memory for what is computed here, or says more than it must.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass
class Row:
    """One framework.

    Attributes
    ----------
    error : why there is no more than a version, or ""
    is_of_framework : whether the error is the framework's, and not ours
    served : by which path float32 arrays are, for each of its devices
    accuracy : the error of our output and of the framework's own, by the name of the input
    ratio : the framework's time over ours, forward and backward
    """

    framework: str
    version: str
    supported: bool
    required: str
    error: str = ""
    is_of_framework: bool = False
    served: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float | None]] = field(default_factory=dict)
    ratio: float | None = None

    @property
    def wrong(self) -> dict[str, list[str]]:
        """The inputs that each side gets wrong."""
        found: dict[str, list[str]] = {"ours": [], "theirs": []}
        for name, errors in self.accuracy.items():
            for side, error in errors.items():
                if error is not None and not error <= INPUTS[name].tolerance:
                    found[side].append(name)
        return found

    @property
    def is_broken(self) -> bool:
        """Whether something of ours is."""
        return bool((self.error and not self.is_of_framework) or self.wrong["ours"])

    def __str__(self) -> str:
        lines = [f"{self.framework} {self.version}"]
        if not self.supported:
            lines[0] += f", which is not supported: batchnorm asks for {self.required}"
        if self.error:
            whose = self.framework if self.is_of_framework else "batchnorm"
            return "\n".join([*lines, f"    {whose} is broken here: {self.error}"])
        lines += [f"    {device}: {how}" for device, how in self.served.items()]
        for side, whose in (("ours", "ours"), ("theirs", "its own layer")):
            errors = {name: each[side] for name, each in self.accuracy.items()}
            if None not in errors.values():
                wrong = self.wrong[side]
                said = f"    {whose}: {len(errors) - len(wrong)} of {len(errors)} hard inputs right"
                lines.append("; ".join([said, *(_wrong(name, errors[name]) for name in wrong)]))
        if self.ratio is not None:
            lines.append(f"    forward and backward: {self.ratio:.2f} times as fast as its own")
        return "\n".join(lines)


def _wrong(name: str, error: float | None) -> str:
    return f"{name}: " + ("not finite" if error == NOT_FINITE else f"off by {error:.2g}")


@dataclass
class Report:
    version: str
    native: str
    python: str
    rows: list[Row]
    absent: list[str]

    @property
    def is_broken(self) -> bool:
        return any(row.is_broken for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"wrong": row.wrong, "is_broken": row.is_broken} for row in self.rows]
        return asdict(self) | {"rows": rows, "is_broken": self.is_broken}

    def __str__(self) -> str:
        lines = [f"batchnorm {self.version}, Python {self.python}", self.native, ""]
        lines += [str(row) for row in self.rows]
        if self.absent:
            lines += ["", f"Not installed: {', '.join(self.absent)}."]
        broken = [row.framework for row in self.rows if row.is_broken]
        said = f"batchnorm is broken with {', '.join(broken)}." if broken else "Nothing is broken."
        return "\n".join([*lines, "", said])


def examine(*, quick: bool = False, progress: Progress = lambda what: None) -> Report:
    """Look at every framework that is installed; with `quick`, nothing is timed."""
    there = [name for name, probe in PROBES.items() if _is_there(probe.packages)]
    done: list[str] = []

    def look(name: str) -> Row:
        progress(f"{len(done)} of {len(there)} frameworks done, now: {name}")
        row = _row(name, quick)
        done.append(name)
        return row

    with ThreadPoolExecutor(2 if quick else 1) as pool:  # one, as others disturb what is timed
        rows = list(pool.map(look, there))
    progress("")
    return Report(
        version("batchnorm"),
        native_status(),
        sys.version.split()[0],
        rows,
        [name for name in PROBES if name not in there],
    )


def _is_there(packages: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(each) is not None for each in packages)


def _row(name: str, quick: bool) -> Row:
    probe = PROBES[name]
    found, required = _version(probe.packages[0]), _required(probe.packages[0])
    row = Row(name, found, _is_enough(found, required), f">={required}" if required else "any")
    command = [sys.executable, "-m", "batchnorm.tools.probes", name] + ["--quick"] * quick
    environment = {**os.environ, **_ENVIRONMENT, **probe.environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
            how = _ended(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            how = f"no answer within {SECONDS:g} seconds"
    ours = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    lines = [json.loads(line) for line in ours]
    if not lines or lines[-1] == {}:  # ended before it was imported, or before it was done
        row.error, row.is_of_framework = how, not lines
        return row
    for key, value in lines[-1].items():
        setattr(row, key, value)
    return row


def _ended(code: int) -> str:
    """How a process has ended that has not said all."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    return f"the process ended with {how}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _required(package: str) -> str:
    """The oldest version that an extra of this package asks for; "" for any."""
    for each in requires("batchnorm") or []:
        found = re.match(rf"{package}(?:\[\w+\])?\s*>=\s*([\d.]+)", each)
        if found:
            return found[1]
    return ""


def _is_enough(found: str, required: str) -> bool:
    one, other = (
        [int(each) for each in re.findall(r"\d+", text)[:3]] for text in (found, required)
    )
    return one >= other
