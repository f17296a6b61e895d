"""The command `batchnorm inspect`, as a shell sees it; doctor has a file of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from batchnorm.tools import command
from batchnorm.tools.command import main


def saved(path, *, var=1.5):
    layer = torch.nn.BatchNorm1d(3)
    layer.running_var.fill_(var)
    layer.running_mean.fill_(0.5)
    torch.save({"bn": layer.state_dict()}, path)
    return str(path)


@pytest.fixture
def healthy(tmp_path):
    return saved(tmp_path / "healthy.pt")


@pytest.fixture
def sick(tmp_path):
    return saved(tmp_path / "sick.pt", var=-1)


def test_prints_a_table_and_sentences(healthy, sick, capsys):
    assert main(["inspect", healthy]) == 0
    assert capsys.readouterr().out.splitlines()[-1].rstrip() == "1 normalization: nothing odd."
    assert main(["inspect", sick]) == 0
    said = capsys.readouterr()
    assert "severe: negative_variance" in said.out
    assert not said.err


def test_strict(healthy, sick):
    assert main(["inspect", "--strict", healthy]) == 0
    assert main(["inspect", "--strict", healthy, sick]) == 1


def test_json_alone_comes_out(sick, capsys):
    assert main(["inspect", "--json", sick]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["findings"][0]["channels"] == [0, 1, 2]
    assert not said.err


def test_files_are_models_of_their_own(healthy, sick, capsys):
    assert main(["inspect", "--json", healthy, sick]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [each["group"] for each in layers] == [healthy, sick]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_draws(sick, tmp_path, suffix):
    picture = tmp_path / f"layers.{suffix}"
    assert main(["inspect", sick, "--picture", str(picture)]) == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("picture", "said"),
    [("there/x.png", "No such file"), ("x.txt", "must end in .png"), (".", "must end in .png")],
)
def test_where_no_picture_can_be(sick, tmp_path, monkeypatch, capsys, picture, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("batchnorm.tools.command.inspect_files", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", sick, "--picture", picture])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_picture_that_is_refused_later_leaves_no_file(tmp_path, capsys):
    picture = tmp_path / "x.png"
    assert main(["inspect", str(tmp_path / "absent.pt"), "--picture", str(picture)]) == 2
    assert not picture.exists()


def test_what_cannot_be_read(tmp_path, healthy, capsys):
    (tmp_path / "text.pt").write_text("hello")
    assert main(["inspect", healthy, str(tmp_path / "text.pt")]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"batchnorm inspect: {tmp_path}/text.pt is of none of the formats")
    assert said.err.count("\n") == 1


def test_no_normalization(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", **{"conv.weight": np.ones(3)})
    assert main(["inspect", str(tmp_path / "other.npz")]) == 2
    assert "holds no batch normalization. Looked for running_mean" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["rich", "matplotlib"])
def test_without_the_extra(library, sick, tmp_path, monkeypatch, capsys):
    there = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == library else there(name))
    assert main(["inspect", sick, "--picture", str(tmp_path / "x.png")]) == 2
    assert 'pip install ".[tools]"' in capsys.readouterr().err
    assert main(["inspect", "--json", sick]) == 0


@pytest.mark.parametrize("arguments", [[], ["doctor"], ["inspect"]])
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "examples:\n  batchnorm " in said
    assert max(map(len, said.splitlines())) <= 100


def test_no_framework_is_imported(healthy):
    frameworks = (
        "torch",
        "mlx",
        "jax",
        "flax",
        "keras",
        "h5py",
        "safetensors",
        "rich",
        "matplotlib",
    )
    program = (
        "import sys, batchnorm.tools, batchnorm.tools.command\n"
        f"print([each for each in {frameworks} if each in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_python_m(sick):
    run = subprocess.run(
        [sys.executable, "-m", "batchnorm", "inspect", "--strict", sick],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "1 normalization: severe in 1." in run.stdout
