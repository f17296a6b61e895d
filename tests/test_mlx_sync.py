"""Statistics over the devices of a group: two processes, compared with one that has all the data.

Run as a program, this file is one of the two processes.
"""

import json
import os
import socket
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compare import close
from mlx.utils import tree_flatten

from batchnorm.mlx import batch_norm, batch_statistics, recalibrate

CHANNELS = 3
# How many rows each process has, and whether there is a mask.
CASES = {
    "even": (4, 4, False),
    "uneven": (7, 2, False),
    "one row": (1, 5, False),
    "second empty": (6, 0, False),
    "first empty": (0, 6, False),
    "long": (3000, 1100, False),
    "large mean": (5, 4, False),
    "masked": (5, 4, True),
    "masked and empty": (5, 0, True),
    "one masked out": (3, 4, True),
}


def data(name):
    """x, dy, v, mask, scale and bias of the whole batch."""
    first, second, masked = CASES[name]
    rng = np.random.default_rng(list(CASES).index(name))
    shape = (first + second, 2, CHANNELS)
    x, dy, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    x[:first] += 100  # the processes' own pivots lie far apart
    if name == "large mean":
        x = 1e4 + 0.01 * x
        v *= 0.01
    mask = rng.integers(0, 3, size=(first + second, 2, 1)).astype(np.float32) if masked else None
    if name == "one masked out":
        mask[:first] = 0
    scale, bias = (rng.normal(size=CHANNELS).astype(np.float32) for _ in range(2))
    return x, dy, v, mask, scale, bias


def results(x, dy, v, mask, scale, bias, group=None, compiled=False):
    x, dy, v, scale, bias = map(mx.array, (x, dy, v, scale, bias))
    mask = None if mask is None else mx.array(mask)

    def forward(x, scale, bias):
        return batch_norm(x, scale, bias, mask=mask, activation="silu", group=group)[0]

    def loss(x, scale, bias):
        return (forward(x, scale, bias) * dy).sum()

    def slope(x):
        """The derivative of the loss of all processes along v, each process's part of it."""
        return (mx.grad(loss)(x, scale, bias) * v).sum()

    def var(x):
        share = 1 if group is None else 1 / group.size()
        return share * batch_statistics(x, mask=mask, group=group).var.sum()

    _, statistics = batch_norm(x, mask=mask, group=group)
    alone = batch_statistics(x, mask=mask, group=group)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(x, scale, bias)
    for each in (gradients, statistics, alone):  # one after the other, in all processes alike
        mx.eval(each)
    return {
        "y": forward(x, scale, bias),
        "y compiled": (mx.compile(forward) if compiled else forward)(x, scale, bias),
        "x gradient": gradients[0],
        "scale gradient": gradients[1],
        "bias gradient": gradients[2],
        "second gradient": mx.grad(slope)(x),
        "third gradient": mx.grad(lambda x: (mx.grad(slope)(x) * dy).sum())(x),
        "tangent": mx.jvp(lambda x: forward(x, scale, bias), [x], [v])[1][0],
        **{f"{name} ": value for name, value in statistics._asdict().items()},
        **alone._asdict(),
        "gradient of var": mx.grad(var)(x),
    }


RECALIBRATION = [
    [np.random.default_rng(rows).normal(size=(rows, CHANNELS)) for rows in own]
    for own in ((30, 4, 9), (7,))
]


def recalibrated(batches, group=None):
    model = nn.Sequential(nn.BatchNorm(CHANNELS), nn.BatchNorm(CHANNELS))
    batches = [mx.array(each) for each in batches]
    recalibrate(model, batches, normalize_by="running", group=group)
    return {name: np.array(each) for name, each in tree_flatten(model.parameters())}


def process(path):
    group = mx.distributed.init(strict=True, backend="ring")
    arrays = {}
    for name, (first, _, _) in CASES.items():
        part = slice(first) if group.rank() == 0 else slice(first, None)
        x, dy, v, mask, scale, bias = data(name)
        mask = None if mask is None else mask[part]
        arguments = (x[part], dy[part], v[part], mask, scale, bias, group)
        for key, value in results(*arguments, compiled=name == "uneven").items():
            arrays[f"{name}/{key}"] = np.array(value)
    for name, value in recalibrated(RECALIBRATION[group.rank()], group).items():
        arrays[f"recalibrated/{name}"] = value
    try:
        recalibrated([np.full((2, CHANNELS), np.nan)] if group.rank() else [], group)
    except (RuntimeError, ValueError) as error:
        arrays["failure"] = str(error)
    try:
        mx.compile(lambda x: batch_norm(x, group=group), shapeless=True)(mx.zeros((4, 3)))
    except ValueError as error:
        arrays["refusal"] = str(error)
    np.savez(f"{path}{group.rank()}.npz", **arrays)


def free_ports(count):
    with_sockets = [socket.socket() for _ in range(count)]
    for each in with_sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_sockets]
    for each in with_sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("sync")
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(folder / "rank")],
                env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(2)
        ]
        # Where one fails, the other waits for it in vain: look at both.
        deadline = time.monotonic() + 120
        while None in (codes := [each.poll() for each in processes]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for each in processes:
            each.kill()
            each.wait()
    assert codes == [0, 0], (folder / "log").read_text()
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(2)]


def test_two_processes_recalibrate_as_one(both):
    for name, expected in recalibrated([*RECALIBRATION[0], *RECALIBRATION[1]]).items():
        first, second = (each[f"recalibrated/{name}"] for each in both)
        np.testing.assert_array_equal(first, second)
        close(first, expected, 1e-6, 1e-6, name)


def test_who_fails_to_recalibrate_fails_for_both(both):
    first, second = (str(each["failure"]) for each in both)
    assert "it failed in process 1: ValueError: The input of layers.0 has statistics that" in first
    assert second.startswith("The input of layers.0 has statistics that are not finite")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_as_one(both, name):
    for key, value in results(*data(name)).items():
        expected = np.array(value)
        first, second = (each[f"{name}/{key}"] for each in both)
        if key in ("scale gradient", "bias gradient"):
            actual = first + second
        elif expected.ndim == 1:  # statistics, the same in both
            np.testing.assert_array_equal(first, second)
            actual = first
        else:
            actual = np.concatenate([first, second])
        size = np.abs(expected).max()
        close(actual, expected, 1e-4, 2e-5 * size + 1e-6, key)


def test_a_group_is_refused_in_a_program_for_any_size(both):
    for each in both:
        assert "group must be None in a program for any size" in str(each["refusal"])


if __name__ == "__main__":
    process(sys.argv[1])
