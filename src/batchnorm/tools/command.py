"""The command `batchnorm`."""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..installation import missing
from . import doctor
from .checkpoints import CheckpointError
from .inspection import inspect_files
from .report import Report

_EXAMPLE = """
examples:
  batchnorm doctor --quick
  batchnorm inspect model.safetensors
"""
_DOCTOR = """
Say what is served on this machine: the native kernels, every framework that is installed, by which
path its float32 arrays are served on each of its devices, and whether numbers come out right on
inputs on which an obvious way to compute fails, by ours and by the framework's own layer. The exit
status is 1 where something of batchnorm is broken.
"""
_DOCTOR_EXAMPLE = """
examples:
  batchnorm doctor                 # all, in a minute or so
  batchnorm doctor --quick         # without timing
  batchnorm doctor --json > report.json
"""
_INSPECT = """
Say which batch normalizations of a checkpoint are sick, and in which channels: statistics that are
NaN, were never updated, have not converged, lost their digits, and more. Files may be of
safetensors (or the index.json of several), PyTorch (weights only: nothing in it is executed), NumPy
(.npz) or Keras (.keras, .weights.h5, .h5); what is in them decides, not what they are called. The
exit status is 2 where a file cannot be read, or no normalization is found in it.
"""
_INSPECT_EXAMPLE = """
examples:
  batchnorm inspect model.safetensors
  batchnorm inspect checkpoint.pt --picture layers.png
  batchnorm inspect *.pt --strict  # exit status 1 where evaluation is wrong
  batchnorm inspect model.keras --json > report.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status comes back."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that has no arrow, say
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
    except (CheckpointError, ImportError, OSError) as error:
        print(f"batchnorm {given.command}: {error}", file=sys.stderr)
        return 2
    return status


def _doctor(given: argparse.Namespace) -> int:
    report = doctor.examine(quick=given.quick, progress=_progress())
    print(json.dumps(report.to_dict(), indent=2) if given.json else report)
    return 1 if report.is_broken else 0


def _inspect(given: argparse.Namespace) -> int:
    if not given.json:
        _need("rich", "A table")
    if given.picture is not None:
        _need("matplotlib", "A picture")
    report = inspect_files(given.files, progress=True)
    if given.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if given.picture is not None:
        report.figure().savefig(given.picture)
    return 1 if given.strict and report.is_severe else 0


def _need(library: str, what: str) -> None:
    """Before the work, of which nothing would be seen."""
    if find_spec(library) is None:
        raise missing(what, library, "tools")


def _print(report: Report) -> None:
    from rich.console import Console

    Console().print(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchnorm",
        description="Tools for batch normalization.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int], short: str, description: str, epilog: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            run.__name__.removeprefix("_"),
            help=short,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON, and nothing else")
        return added

    of_doctor = command(
        _doctor,
        "say what is served on this machine, and whether it is right",
        _DOCTOR,
        _DOCTOR_EXAMPLE,
    )
    of_doctor.add_argument("--quick", action="store_true", help="without timing")
    of_inspect = command(
        _inspect, "say which layers of a checkpoint are sick", _INSPECT, _INSPECT_EXAMPLE
    )
    of_inspect.add_argument("files", type=Path, nargs="+", metavar="FILE")
    of_inspect.add_argument(
        "--strict", action="store_true", help="exit status 1 where evaluation is wrong"
    )
    of_inspect.add_argument(
        "--picture", type=_picture, metavar="PATH", help="draw every layer there (.png, .svg, .pdf)"
    )
    return parser


def _picture(text: str) -> Path:
    """Where a picture can be written, as far as can be told beforehand."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, but got {text!r}")
    try:
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: {error.strerror}") from error
    return path


def _progress() -> doctor.Progress:
    """What is done now, on a terminal alone, each in the place of what was done before."""
    if not sys.stderr.isatty():
        return lambda what: None

    def show(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    return show
