"""The command `batchnorm`."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import doctor

_EXAMPLE = """
example:
  batchnorm doctor --quick
"""
_DOCTOR = """
Say what is served on this machine: the native kernels, every framework that is installed, by which
path its float32 arrays are served on each of its devices, and whether numbers come out right on
inputs on which an obvious way to compute fails, by ours and by the framework's own layer. The exit
status is 1 where something of batchnorm is broken.
"""
_DOCTOR_EXAMPLE = """
example:
  batchnorm doctor                 # all, in a minute or so
  batchnorm doctor --quick         # without timing
  batchnorm doctor --json > report.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status comes back."""
    given = _parser().parse_args(arguments)
    report = doctor.examine(quick=given.quick, progress=_progress())
    print(json.dumps(report.to_dict(), indent=2) if given.json else report)
    return 1 if report.is_broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchnorm",
        description="Tools for batch normalization.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_doctor = commands.add_parser(
        "doctor",
        help="say what is served on this machine, and whether it is right",
        description=_DOCTOR,
        epilog=_DOCTOR_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    of_doctor.add_argument("--quick", action="store_true", help="without timing")
    of_doctor.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return parser


def _progress() -> doctor.Progress:
    """What is done now, on a terminal alone, each in the place of what was done before."""
    if not sys.stderr.isatty():
        return lambda what: None

    def show(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    return show
