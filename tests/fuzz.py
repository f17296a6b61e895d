"""Make random calls until the time is over, and say which of them failed.

    python tests/fuzz.py --seconds 60               # says its seed first
    python tests/fuzz.py --seed 7 --only 123        # one call of such a run again

random_calls.py makes the calls, in a process that may die of one; the next process goes on after
it. `make fuzz` lets the native module that it uses be one with sanitizers. The exit status is 1 if
a call failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RANDOM_CALLS = (sys.executable, str(Path(__file__).with_name("random_calls.py")))

# Python itself frees little of its memory at the end.
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


class Failure(NamedTuple):
    number: int
    arguments: str
    what: str


class Outcome(NamedTuple):
    calls: int
    failures: list[Failure]


def run(
    seed: int,
    first: int,
    last: int,
    seconds: float,
    door: str = "",
    *,
    program: Sequence[str] = RANDOM_CALLS,
    environment: Mapping[str, str] = os.environ,
    patience: float = 120,
    most_failures: int = 20,
) -> Outcome:
    """Calls `first` to `last` of a seed, as many as there is time for.

    A call that takes longer than `patience`, in seconds, hangs.
    """
    end = time.monotonic() + seconds
    failures: list[Failure] = []
    number = first
    while number <= last and time.monotonic() < end and len(failures) < most_failures:
        with tempfile.NamedTemporaryFile("r") as journal, tempfile.TemporaryFile("w+") as output:
            left = end - time.monotonic()
            arguments = (str(each) for each in (seed, number, last, left, door, journal.name))
            worker = subprocess.Popen(
                [*program, *arguments], stdout=output, stderr=output, env=environment
            )
            hangs = _hangs(worker, Path(journal.name), patience)
            said, _, call = Path(journal.name).read_text().partition("\n")
            output.seek(0)
            lines = output.read().strip()
        if hangs:
            ending = f"took longer than {patience:.0f} seconds"
        else:
            ending = f"ended the process with {worker.returncode}"
        if hangs or worker.returncode:
            number = int(said or number)
            failures.append(Failure(number, call, f"{ending}\n{lines}"))
            number += 1
        else:
            return Outcome(int(said or first - 1) + 1 - first, failures)
    return Outcome(number - first, failures)


def _hangs(worker: subprocess.Popen[bytes], journal: Path, patience: float) -> bool:
    """Whether it comes no further; then it is ended."""
    seen, since = "", time.monotonic()
    while True:
        try:
            worker.wait(0.5)
            return False
        except subprocess.TimeoutExpired:
            now = journal.read_text()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            worker.kill()
            worker.wait()
            return True


def environment_of(package: str, preload: str) -> dict[str, str]:
    """With the batchnorm in a folder in the place of the installed one."""
    environment = dict(os.environ)
    if preload:
        environment |= {"LD_PRELOAD": preload, **SANITIZERS}
    if package:
        environment["PYTHONPATH"] = package
        program = "import batchnorm; print(batchnorm.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        if Path(package).resolve() not in Path(found).resolve().parents:
            sys.exit(f"--package: the batchnorm that is imported is {found}, not that in {package}")
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="make this call alone")
    parser.add_argument(
        "--door", choices=["numpy", "torch"], default="", help="make the calls of this door alone"
    )
    parser.add_argument("--package", default="", help="a folder with the batchnorm to call")
    parser.add_argument("--preload", default="", help="libraries that it needs, of sanitizers")
    options = parser.parse_args()
    environment = environment_of(options.package, options.preload)
    print(f"fuzz: seed {options.seed}", flush=True)
    first, last = (0, 10**9) if options.only is None else (options.only, options.only)
    calls, failures = run(
        options.seed, first, last, options.seconds, options.door, environment=environment
    )
    same = {name: getattr(options, name) for name in ("door", "package", "preload")}
    again = "".join(f" --{name} '{value}'" for name, value in same.items() if value)
    for number, arguments, what in failures:
        print(f"\nfailed: python tests/fuzz.py --seed {options.seed} --only {number}{again}")
        print(f"{arguments}\n{what}")
    print(f"\nfuzz: {calls} calls, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
