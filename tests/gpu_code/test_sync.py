"""Three processes as one, by the kernels: checks of test_torch_sync.py.

Run as a program, this file is one of the processes.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import pytest
import test_torch_sync as sync
from gpu_code import interpreter

import batchnorm.native

# Not those of programs, transformations and models, which operations serve, nor of groups.
CHECKS = [
    *("three_do_as_one", "layers_do_as_one", "a_nan_in_one_process_is_skipped_by_all"),
    *("nobody_has_data", "a_step_has_one_collective_forward_and_one_backward"),
    *("parameters_alone_are_trained", "dtypes_may_differ", "large_means_are_not_rounded"),
    "scales_of_their_own",
]
STAGES = {
    *("moments_kernel", "merge_moments_kernel", "coefficients_kernel", "running_kernel"),
    *("normalize_kernel", "gradient_sums_kernel", "merge_sums_kernel", "shares_kernel"),
    "input_gradient_kernel",
}


def process(folder: str, rank: int) -> None:
    interpreter.mend()
    checks = {name: sync.CHECKS[name] for name in CHECKS}
    with (
        patch.object(sync, "CHECKS", checks),
        patch.object(batchnorm.native, "kernels", None),
        patch("batchnorm.torch._gpu.DEVICES", {"cpu"}),
        interpreter.launches() as launched,
    ):
        sync.process(folder, rank)
    Path(folder, f"launched{rank}.json").write_text(json.dumps(Counter(launched)))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    with patch.object(sync, "__file__", __file__):
        outputs = sync.run(folder, "process", sync.PROCESSES)
    found = []
    for kind in ("rank", "launched"):
        files = [folder / f"{kind}{rank}.json" for rank in range(sync.PROCESSES)]
        found.append([json.loads(each.read_text()) if each.exists() else {} for each in files])
    return *found, outputs


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(outcomes, name: str):
    found, _, outputs = outcomes
    for rank, each in enumerate(found):
        outcome = each.get(name, f"did not run\n{outputs[rank]}")
        assert outcome.startswith("passed"), f"rank {rank}: {outcome}"


def test_kernels_serve_in_each(outcomes):
    _, launched, _ = outcomes
    for each in launched:
        assert each.keys() >= STAGES


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
