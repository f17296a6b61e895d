"""The command `batchnorm doctor`: what it says of frameworks that are well, broken or old."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from batchnorm.tools import doctor
from batchnorm.tools.command import main

ROOT = Path(__file__).parents[1]
EQUINOX = {"Equinox": doctor.PROBES["Equinox"]}


@pytest.fixture(scope="module")
def report():
    """What it prints, whole, as a program sees it."""
    command = [sys.executable, "-m", "batchnorm", "doctor", "--quick", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_framework_is_right_here(report):
    assert [row["framework"] for row in report["rows"]] == [*doctor.PROBES]
    assert not report["absent"]
    for row in report["rows"]:
        assert row["error"] == ""
        assert row["supported"]
        assert row["served"]
        assert set(row["served"].values()) == {"native kernels"}
        assert row["wrong"]["ours"] == []
        assert row["ratio"] is None


def test_what_frameworks_get_wrong_is_found(report):
    wrong = {row["framework"]: row["wrong"]["theirs"] for row in report["rows"]}
    assert "large mean" in wrong["MLX"]
    assert "large mean" in wrong["PyTorch"]
    assert wrong["NumPy"] == wrong["JAX"] == [], "which have no layer"


def test_the_first_lines(report):
    assert report["native"].startswith("Native kernels serve")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert report["version"] == project["version"]


def package(folder, name, program):
    """A package that is found before the one that is installed."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(program)


@pytest.fixture
def only_equinox(monkeypatch, tmp_path):
    """A folder before all others, for whoever looks and for the processes that it starts."""
    monkeypatch.setattr(doctor, "PROBES", EQUINOX)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(filter(None, sys.path))}")
    return tmp_path


def only_row():
    (row,) = doctor.examine(quick=True).rows
    return row


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise RuntimeError('no such library\\nor other')", "RuntimeError: no such library"),
        ("import os; os.abort()", "the process ended with signal SIGABRT"),
        ("import os; os._exit(3)", "the process ended with status 3"),
        ("raise SystemExit(3)", "the process ended with status 3"),
    ],
)
def test_a_framework_that_is_broken_is_a_row_that_says_so(only_equinox, program, said):
    package(only_equinox, "equinox", program)
    row = only_row()
    assert (row.error, row.is_of_framework, row.is_broken) == (said, True, False)
    assert f"Equinox is broken here: {said}" in str(row)


def test_a_framework_that_prints(only_equinox):
    package(only_equinox, "equinox", "print('{a greeting'); raise RuntimeError('no')")
    assert only_row().error == "RuntimeError: no"


def test_a_framework_that_hangs(only_equinox, monkeypatch):
    package(only_equinox, "equinox", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "SECONDS", 1.0)
    row = only_row()
    assert (row.error, row.is_of_framework) == ("no answer within 1 seconds", True)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.modules['batchnorm.equinox'] = None", "ModuleNotFoundError"),
        (
            "import batchnorm.jax.functions as f\n"
            "right = f.batch_norm\n"
            "import batchnorm.jax\n"
            "batchnorm.jax.batch_norm = lambda x, *a, **k: (x, right(x, *a, **k)[1])",
            "",
        ),
    ],
    ids=["no door", "wrong numbers"],
)
def test_a_door_that_is_broken_is_the_exit_status(only_equinox, capsys, program, said):
    (only_equinox / "sitecustomize.py").write_text(program)
    assert main(["doctor", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "batchnorm is broken with Equinox." in printed
    if said:
        assert f"batchnorm is broken here: {said}" in printed
    else:
        assert "ours: 0 of 5 hard inputs right; large mean: off by" in printed


def test_a_version_that_is_not_supported(only_equinox):
    old = only_equinox / "equinox-0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: equinox\nVersion: 0.1\n")
    row = only_row()
    assert not row.supported
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = re.findall(
        r"equinox>=([\d.]+)", " ".join(extras["optional-dependencies"]["equinox"])
    )
    assert f"Equinox 0.1, which is not supported: batchnorm asks for >={oldest}" in str(row)


def test_what_is_not_installed_is_said(monkeypatch):
    probe = doctor.PROBES["NumPy"]
    kind = type(probe)
    absent = kind(("no_such_package",), probe.door, probe.sides)
    monkeypatch.setattr(doctor, "PROBES", {"Nothing": absent})
    report = doctor.examine(quick=True)
    assert (report.rows, report.absent) == ([], ["Nothing"])
    assert "Not installed: Nothing." in str(report)


def test_the_time_is_a_ratio(monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", EQUINOX)
    (row,) = doctor.examine().rows
    assert row.ratio > 0
    assert f"forward and backward: {row.ratio:.2f} times as fast as its own" in str(row)


@pytest.mark.parametrize("arguments", [[], ["docter"], ["doctor", "--fast"]])
def test_what_is_not_understood(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: batchnorm" in capsys.readouterr().err
