"""The native kernels: whether they are here, and which faces of them serve.

This is the only module in Python that imports `batchnorm.native._cpu`. A native module that was
never built is absent, and `kernels` is None; one that is there but cannot be loaded raises
ImportError.
"""

import importlib.util
from collections.abc import Callable

if importlib.util.find_spec("batchnorm.native._cpu") is not None:
    from . import _cpu as kernels
else:
    kernels = None  # type: ignore[assignment]

_reports: dict[str, tuple[Callable[[], str], bool]] = {}


def register_report(name: str, report: Callable[[], str], *, of_kernels: bool = True) -> None:
    """Let `native_status` name a door, once it is imported.

    `report` says "served", and how, or "not served" and why; `of_kernels`: by those of this module.
    """
    _reports[name] = report, of_kernels


def native_status() -> str:
    """Say whether native kernels serve, how, and which of the doors that are imported.

    Returns
    -------
    str
        The instruction set and the number of threads in use, and the state of each door and kind of
        device; or why there are no native kernels.

    Examples
    --------
    >>> import batchnorm
    >>> print(batchnorm.native_status())  # doctest: +ELLIPSIS
    Native kernels ...
    """
    faces = "".join(
        f" {name}: {report()}."
        for name, (report, of_kernels) in _reports.items()
        if kernels is not None or not of_kernels
    )
    if kernels is None:
        return (
            "Native kernels are not built: every array on a CPU is served by operations of its "
            "framework; to build them, install a C++17 compiler (GCC or Clang) and reinstall "
            f"batchnorm.{faces}"
        )
    threads = kernels.num_threads()
    return (
        f"Native kernels serve, with {kernels.instruction_set()} "
        f"and up to {threads} thread{'s' if threads != 1 else ''}.{faces}"
    )


def set_num_threads(threads: int) -> None:
    """Set how many threads one call of a native kernel may use.

    The default is the number of CPUs that the process may use. For PyTorch's tensors on Linux,
    whose kernels run on the threads of PyTorch's OpenMP runtime except in a forked process,
    torch.set_num_threads is a limit as well, in forked processes, too.

    Parameters
    ----------
    threads : int
        At least 1. Without native kernels it has no effect.

    Raises
    ------
    TypeError
        If `threads` is not an integer.
    ValueError
        If `threads` is not within [1, 1024].

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.set_num_threads(2)
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an integer, but got {threads!r}.")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be within [1, 1024], but got {threads}.")
    if kernels is not None:
        kernels.set_num_threads(threads)


def instruction_sets() -> list[str]:
    """Name the instruction sets that the native kernels can use here, the widest first.

    Examples
    --------
    >>> from batchnorm.native import instruction_sets
    >>> instruction_sets()  # doctest: +SKIP
    ['AVX-512', 'AVX2', 'SSE2']
    """
    return [] if kernels is None else kernels.instruction_sets()


def set_instruction_set(name: str) -> None:
    """Make later calls use another instruction set than the widest; meant for tests.

    Parameters
    ----------
    name : str
        One of `instruction_sets()`.

    Raises
    ------
    ValueError
        If it is not one of them.
    """
    if kernels is None or not kernels.set_instruction_set(name):
        choices = ", ".join(instruction_sets()) or "none"
        raise ValueError(
            f"name must be an instruction set of this machine ({choices}), but got {name!r}."
        )
