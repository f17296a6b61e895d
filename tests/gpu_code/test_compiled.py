"""What the machine code of the kernels is like, as compiled.py finds it in processes of its own.

For sm_90 that of all that training uses, for the others of what takes the most registers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_code.compiled import Code

import batchnorm.torch

MOST_REGISTERS = 168  # so that three programs of four warps fit a multiprocessor
# What computes in float64, once a channel.
MERGING = {
    *("merge_moments_kernel", "merge_sums_kernel", "coefficients_kernel", "running_kernel"),
    *("forward_kernel", "shares_kernel"),
}
ATOMIC = re.compile(r"ATOM|REDG?\.|\w+_atomic_")
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64|v_(?!cvt_)\w*_f64")
WIDE_LOAD = re.compile(r"LDG.*\.128|(buffer|global)_load_dwordx4")
WIDE_STORE = re.compile(r"STG.*\.128|(buffer|global)_store_dwordx4")

COMPILED = {"sm_90": "all", **dict.fromkeys(("sm_80", "sm_100", "sm_120", "gfx942"), "some")}
FAULTY = ("sm_90", "gfx942")


def run(*program: str) -> bytes:
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", *program],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return found.stdout


def compiled(target: str, cases: str) -> list[Code]:
    return [Code(**each) for each in json.loads(run("gpu_code.compiled", target, cases))]


@pytest.fixture(scope="module")
def codes() -> dict[tuple[str, str], list[Code]]:
    works = [*COMPILED.items(), *((target, "faulty") for target in FAULTY)]
    return {work: compiled(*work) for work in works}


def count(code: Code, operation: re.Pattern) -> int:
    return sum(number for name, number in code.operations.items() if operation.match(name))


def faults(code: Code) -> set[str]:
    merges = code.kernel in MERGING
    is_faulty = {
        "spills": code.spilled > 0 and code.target != "sm_80",
        "registers": code.registers > MOST_REGISTERS,
        "atomic": count(code, ATOMIC) > 0,
        "float64": count(code, FLOAT64) > 0 and not merges,
        "narrow": not merges
        and (count(code, WIDE_LOAD) < code.loads or count(code, WIDE_STORE) < code.stores),
    }
    return {name for name, found in is_faulty.items() if found}


@pytest.mark.parametrize("target", COMPILED)
def test_no_kernel_is_faulty(codes, target: str):
    found = {
        f"{code.kernel} of {code.case}": faults(code) for code in codes[target, COMPILED[target]]
    }
    assert {name: each for name, each in found.items() if each} == {}


def test_every_kernel_is_looked_at(codes):
    folder = Path(batchnorm.torch.__file__).with_name("_gpu") / "kernels"
    sources = "".join(each.read_text() for each in folder.glob("*.py"))
    kernels = set(re.findall(r"def (\w+_kernel)\(", sources))
    of_several_processes = {"shares_kernel"}
    assert {code.kernel for code in codes["sm_90", "all"]} == kernels - of_several_processes


def test_the_kernels_that_are_found_are_those_that_triton_finds():
    run("gpu_code.cached")


@pytest.mark.parametrize("target", FAULTY)
def test_what_is_faulty_is_found(codes, target: str):
    found = {}
    for code in codes[target, "faulty"]:
        found.setdefault(code.kernel, set()).update(faults(code))
    assert found == {
        "atomic": {"atomic"},
        "double": {"float64"},
        "narrow": {"narrow"},
        "crowded": {"registers", "spills"},
    }
