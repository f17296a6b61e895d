"""`make fuzz` in small, and that it would see a fault: a wrong number, a stray write, an end."""

import subprocess
import sys

import fuzz
import numpy as np
import pytest
import random_calls
import random_cases
import torch
import truth
from random_cases import BFLOAT16, FLOAT32, Case, Expected, Near, WrongError, check

import batchnorm.numpy as bn
import batchnorm.torch as bt


@pytest.mark.parametrize("door", ["numpy", "torch"])
def test_random_calls_are_right(door):
    calls, failures = fuzz.run(seed=1, first=0, last=299, seconds=600, door=door)
    assert not failures, "\n\n".join(
        f"{each.number} {each.arguments}\n{each.what}" for each in failures
    )
    assert calls == 300


@pytest.mark.parametrize("door", ["numpy", "torch"])
def test_a_number_stands_for_one_call(door):
    one, other = (random_calls.draw(3, 8, door).case.values for _ in range(2))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


# A process that is told what random_calls.py is told, and ends as a call might end it.
PROGRAM = """
import os, sys, time
_, first, last, *_, journal = sys.argv[1:]
for number in range(int(first), int(last) + 1):
    with open(journal, "w") as file:
        file.write(f"{number}\\nx: {number} rows")
    if number == 3:
        os.abort()
    if number == 5:
        time.sleep(600)
    if number == 6:
        sys.exit("x is wrong")
"""


def test_the_call_that_ended_a_process_is_named():
    program = (sys.executable, "-c", PROGRAM)
    calls, failures = fuzz.run(0, 1, 8, 600, program=program, patience=5)
    assert calls == 8
    assert [each.number for each in failures] == [3, 5, 6]
    assert [each.arguments for each in failures] == ["x: 3 rows", "x: 5 rows", "x: 6 rows"]
    aborted, hung, wrong = (each.what for each in failures)
    assert aborted.startswith("ended the process with -6")
    assert hung.startswith("took longer than 5 seconds")
    assert wrong == "ended the process with 1\nx is wrong"


def test_after_many_failures_it_is_enough():
    program = (sys.executable, "-c", PROGRAM.replace("number == 6", "True"))
    calls, failures = fuzz.run(0, 6, 99, 600, program=program, most_failures=2)
    assert [each.number for each in failures] == [6, 7]
    assert calls == 2


def fuzz_program(*arguments):
    program = [sys.executable, fuzz.__file__, *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=300)


def test_a_call_alone():
    done = fuzz_program("--seed", "1", "--only", "2")
    assert done.stdout == "fuzz: seed 1\n\nfuzz: 1 calls, 0 failed\n", done.stderr
    assert done.returncode == 0


def test_another_package_than_that_in_the_folder_is_refused(tmp_path):
    done = fuzz_program("--package", str(tmp_path), "--seconds", "1")
    assert done.returncode == 1
    assert f"not that in {tmp_path}" in done.stderr


# ---- what a call is compared with


def case_of(**values):
    x = np.arange(12, dtype=np.float32).reshape(6, 2) ** 2
    return Case((6, 2), (1,), FLOAT32, 1e-5, None, {"x": x, **values})


@pytest.mark.parametrize("factor", [0.99, 1.01, -1, np.nan, np.inf])
def test_a_wrong_number_is_seen(factor):
    case = case_of(dy=np.ones((6, 2), np.float32) * np.arange(6, dtype=np.float32)[:, None])
    expected, x = Expected(case), case.values["x"]
    y, statistics = bn.batch_norm(x, eps=case.eps)
    gradient = bn.batch_norm_gradients(case.values["dy"], x, statistics, eps=case.eps).x
    nearly = [*expected.statistics().values(), expected.output(), expected.gradients()["x"]]
    for near, right in zip(nearly, [*statistics, y, gradient], strict=True):
        check("it", right, near)
        wrong = right.copy()
        wrong.flat[-1] *= factor
        with pytest.raises(WrongError, match="it is "):
            check("it", wrong, near)


def test_a_wrong_kind_of_array_is_seen():
    near = Near(np.ones((2, 3)), np.zeros((2, 3)))
    check("it", np.ones((2, 3), np.float32), near, FLOAT32)
    with pytest.raises(WrongError, match="dtype float32, not bfloat16"):
        check("it", np.ones((2, 3), np.float32), near, BFLOAT16)
    with pytest.raises(WrongError, match=r"the shape \(3,\), not \(2, 3\)"):
        check("it", np.ones(3), near)


def test_what_is_beyond_the_range_of_a_dtype_may_be_infinite():
    near = Near(np.array([1e39, -1e39, 0.0]), np.zeros(3))
    check("it", np.array([np.inf, -np.inf, 0], np.float32), near)
    for wrong in ([np.nan, -np.inf, 0], [-np.inf, -np.inf, 0], [1e30, -np.inf, 0]):
        with pytest.raises(WrongError):
            check("it", np.array(wrong, np.float32), near)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, BFLOAT16])
def test_memory_is_watched_all_around_an_array(dtype):
    for seed in range(20):
        random = np.random.default_rng(seed)
        values = random.standard_normal((2, 3)).astype(dtype)
        placed = random_cases.place(random, values)
        np.testing.assert_array_equal(placed.array, values)
        inside = np.zeros(placed.memory.size, bool)
        placed.bytes_of(inside.view(np.uint8))[...] = np.bytes_(b"\1" * values.itemsize)
        assert inside.sum() == values.nbytes
        for is_written in (True, False):
            placed.is_written = is_written
            for place, own in enumerate(inside):
                watch = random_cases.Watch([placed])
                watch.look()
                placed.memory[place] ^= 0xFF
                if is_written and own:
                    watch.look()
                else:
                    with pytest.raises(WrongError, match="that are not written"):
                        watch.look()
                placed.memory[place] ^= 0xFF


# ---- what it has found


def test_of_two_elements_one_may_be_far_out_and_not_count():
    """That x̂ is finite does not help where x̂·Σ g·x̂ is not."""
    x = np.float32([[3e31], [-2e31], [4], [1]])
    dy, mask = np.float32([[1], [2], [3], [4]]), np.array([[False], [False], [True], [True]])
    gradients = bn.batch_norm_gradients(dy, x, bn.batch_statistics(x, mask=mask), mask=mask)
    wanted = truth.batch_norm_gradients(dy, x, mask=mask)["x"]
    np.testing.assert_allclose(gradients.x, wanted, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("function", ["batch_norm", "normalize"])
def test_parameters_of_nothing_have_gradients(function, order):
    x, mean, scale, bias = torch.zeros(0, 3), torch.zeros(3), torch.ones(3), torch.zeros(3)
    leaves = [each.requires_grad_() for each in (mean, scale, bias)]
    if function == "normalize":
        y = bt.normalize(x, mean, torch.ones(3), scale, bias)
    else:
        y, leaves = bt.batch_norm(x, scale, bias)[0], leaves[1:]
    for gradient in torch.autograd.grad(y.sum(), leaves, create_graph=order == 2):
        assert torch.equal(gradient, torch.zeros(3))
