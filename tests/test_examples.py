"""The example programs, in their short forms."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_MLX = ("batchnorm.mlx.BatchNorm", "mlx.nn.BatchNorm", "no normalization")
IN_JAX = "batchnorm.flax.nn.BatchNorm"
IN_TORCH = "batchnorm.torch.BatchNorm2d"
ALONE = {"digits_mlx.py": IN_MLX, "digits_jax.py": [IN_JAX], "digits_torch.py": [IN_TORCH]}


def run(program, *arguments, cwd):
    return subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"},  # It compiles sooner.
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("demo")


@pytest.fixture(scope="module")
def digits(demo):
    return demo.digits


@pytest.fixture(scope="module")
def digits_mlx(demo):
    return demo.digits_mlx


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    return run("demo.py", "--quick", cwd=folder), folder


def train(program, seed=0, batch_size=449):
    digits = program.digits
    trainings = program.trainings(seed)
    options = argparse.Namespace(quick=True, batch_size=batch_size, seed=seed)
    digits.train(trainings, digits.load(seed), options)
    return trainings


def test_demo_ends_with_a_report(quick):
    finished, _ = quick
    report = finished.stdout.partition("The network with mlx.nn.BatchNorm, inspected")[2]
    for index in range(3):
        assert re.search(rf"normalizations\.{index} .*drift", report), report
    assert re.search(r"3 normalizations: (severe|warning) in \d", report.splitlines()[-1])


def test_demo_prints_a_table_of_four_rows(quick):
    finished, _ = quick
    assert finished.returncode == 0, finished.stderr
    first_losses = []
    for name in (*IN_MLX, IN_JAX):
        row = re.search(
            rf"^\W*{re.escape(name)}\s+(\d+\.\d+)\s+(\d+\.\d+)\s+(\d+\.\d)%\s+(\d+\.\d+)\s+(\S+)\s*$",
            finished.stdout,
            re.MULTILINE,
        )
        assert row, f"no row of {name} in\n{finished.stdout}"
        first, last, accuracy, seconds, normalizing = row.groups()
        assert 0 < float(last) < float(first) < 4
        assert 10 <= float(accuracy) <= 100
        if name in ("no normalization", IN_JAX):
            assert normalizing == "–"
        else:
            assert float(normalizing) < float(seconds)
        first_losses.append(float(first))
    ours, others, _, in_jax = first_losses
    assert ours == pytest.approx(others, abs=1e-3)
    assert ours == pytest.approx(in_jax, abs=1e-3)


class Idle:
    losses, seconds, accuracy = (1.0,), (1.0,), 0.5

    def step(self, images, labels):
        pass

    def test(self, data):
        pass


@pytest.mark.parametrize(("length", "epochs"), [("--quick", 1), ("--epochs=3", 3)])
def test_training_says_how_far_it_is_where_there_is_no_terminal(digits, capsys, length, epochs):
    options = digits.command_line("").parse_args([length])
    digits.train({"one": Idle(), "other": Idle()}, digits.load(0), options)
    lines = re.findall(r"^Epoch (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert lines == [f"{each + 1} of {epochs}: accuracy 50.0%, 50.0%" for each in range(epochs)]


def test_demo_is_exact_where_features_are_shifted(quick):
    finished, _ = quick
    error = re.search(r"batchnorm\.mlx\.BatchNorm +outputs off by (\S+),", finished.stdout)
    assert float(error[1]) < 1e-3


def test_demo_draws_a_picture(quick):
    from matplotlib.image import imread

    _, folder = quick
    assert [path.name for path in folder.iterdir()] == ["demo.png"]
    pixels = imread(folder / "demo.png")
    assert pixels.shape[0] >= 500
    assert pixels.shape[1] >= 1000
    assert len(np.unique(pixels[..., 0])) > 50


@pytest.mark.parametrize("program", ALONE)
def test_digits_of_one_framework_run_alone(program, tmp_path):
    finished = run(program, "--quick", "--batch-size", "300", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    for name in ALONE[program]:
        assert re.search(rf"{re.escape(name)} .* 4/4 loss \d.* accuracy \d", finished.stdout)
    assert not list(tmp_path.iterdir())


def test_demo_helps(tmp_path):
    finished = run("demo.py", "--help", cwd=tmp_path)
    assert finished.returncode == 0
    for option in ("--epochs", "--quick", "--batch-size", "--seed", "--picture"):
        assert option in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: must be an integer of at least 1, but got '0'"),
        (["--batch-size", "1348"], "--batch-size: must be an integer of at least 1 and at most"),
        (["--seed", "one"], "--seed: must be an integer of at least 0, but got 'one'"),
        (["--picture", "demo.txt"], "--picture: must end in .png, but got 'demo.txt'"),
        (["--picture", "no/demo.png"], "--picture: must be in a folder that exists"),
        (["--quick", "--epochs", "2"], "--epochs: not allowed with argument --quick"),
        (["--speed", "2"], "unrecognized arguments: --speed 2"),
    ],
)
def test_demo_refuses_wrong_options(demo, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        demo.main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_fails_where_a_network_learned_too_little(demo, monkeypatch, capsys, tmp_path):
    arguments = ["--epochs", "1", "--batch-size", "300", "--picture", f"{tmp_path}/demo.png"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    # Another network of MLX stands in for that of JAX, which takes long to compile.
    in_jax = {IN_JAX: demo.digits_mlx.trainings(seed=1)[IN_MLX[0]]}
    monkeypatch.setattr(demo.digits_jax, "trainings", lambda seed: in_jax)
    assert demo.main() == 1
    assert f"{IN_MLX[0]} and {IN_JAX}: below 97% held-out accuracy" in capsys.readouterr().err


def test_losses_in_mlx_and_in_jax_lie_on_each_other(demo, digits_mlx):
    ours = train(digits_mlx, batch_size=64)[IN_MLX[0]]
    in_jax = train(demo.digits_jax, batch_size=64)[IN_JAX]
    assert len(ours.losses) == 21
    assert ours.losses[-1] < ours.losses[0] / 1.5
    assert in_jax.losses == pytest.approx(ours.losses, rel=0, abs=1e-3)
    assert in_jax.accuracy == pytest.approx(ours.accuracy, abs=0.05)


def test_losses_in_torch_are_those_of_mlx_in_any_number_of_processes(demo, digits_mlx):
    digits_torch = importlib.import_module("digits_torch")
    one, two = (
        digits_torch.run(argparse.Namespace(quick=True, batch_size=65, seed=0, processes=processes))
        for processes in (1, 2)  # two have 33 and 32 digits of each batch
    )
    in_mlx = train(digits_mlx, batch_size=65)[IN_MLX[0]].losses
    assert len(in_mlx) == 20
    assert one == pytest.approx(in_mlx, rel=0, abs=1e-3)
    assert two == pytest.approx(one, rel=1e-5)


def test_networks_start_from_the_same_weights(demo, digits, digits_mlx):
    given = digits.initial_weights(seed=0)
    ours, others, plain = (
        dict(demo.tree_flatten(digits_mlx.Network(normalization, given).parameters()))
        for normalization in digits_mlx.NORMALIZATIONS.values()
    )
    assert plain.keys() == given.keys()
    assert ours.keys() == others.keys() > given.keys()
    for name in ours:
        assert np.array_equal(ours[name], others[name]), name
    for name in given:
        assert np.array_equal(ours[name], given[name]), name
        assert np.array_equal(plain[name], given[name]), name


def test_networks_are_trained_from_the_same_weights_on_the_same_batches(digits_mlx, monkeypatch):
    seen = {}

    class Recorded(digits_mlx.Training):
        def __init__(self, normalization, weights):
            super().__init__(normalization, weights)
            seen[normalization] = [*weights.values()]

        def step(self, images, labels):
            super().step(images, labels)
            seen[normalization_of(self)] += [images, labels]

    def normalization_of(training):
        return type(training.network.normalizations[0])

    monkeypatch.setattr(digits_mlx, "Training", Recorded)
    trainings = train(digits_mlx)
    assert seen.keys() == set(digits_mlx.NORMALIZATIONS.values())
    for ours, others, plain in zip(*seen.values(), strict=True):
        assert np.array_equal(ours, others)
        assert np.array_equal(ours, plain)
    ours, others, _ = (trainings[name].losses for name in IN_MLX)
    assert len(ours) == 3
    assert ours == pytest.approx(others, rel=1e-4)


def test_training_is_the_same_for_the_same_seed(digits_mlx):
    first, again, other = (train(digits_mlx, seed) for seed in (0, 0, 1))
    for name in IN_MLX:
        assert first[name].losses == again[name].losses
        assert first[name].losses != other[name].losses


def test_digits_are_split_and_batched_without_repetition(digits):
    data = digits.load(seed=0)
    assert data.train_images.shape == (digits.TRAIN, 8, 8, 1)
    assert data.test_images.shape == (digits.TEST, 8, 8, 1)
    every = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    original = digits.load_digits().data / 16
    assert np.array_equal(np.unique(every, axis=0), np.unique(original, axis=0))

    numbered = data._replace(train_labels=np.arange(digits.TRAIN))
    epochs = [
        [labels for _, labels in digits.batches(numbered, 64, seed=0, epoch=epoch)]
        for epoch in (0, 1)
    ]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [64] * (digits.TRAIN // 64)
        assert len(np.unique(np.concatenate(epoch))) == 64 * len(epoch)
    assert not np.array_equal(epochs[0], epochs[1])
