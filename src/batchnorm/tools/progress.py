"""How far a tool is on its way through the batches."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

Walk = Callable[[], Iterator[Any]]


@contextmanager
def shown(title: str, batches: Iterable[Any], passes: int, *, progress: bool) -> Iterator[Walk]:
    """A function that goes through the batches, with a bar for all passes.

    The bar is on a terminal alone, and where `rich` is installed.
    """
    if not (progress and sys.stderr.isatty() and find_spec("rich")):
        yield lambda: iter(batches)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        if passes > 1:
            said = f"{title}: {passes} passes over the batches, one for each layer"
            bar.console.print(said, highlight=False)
        task = bar.add_task(title, total=None)
        with suppress(TypeError, NotImplementedError):  # of what can't say it before the first pass
            bar.update(task, total=passes * len(batches))  # type: ignore[arg-type]

        def walk() -> Iterator[Any]:
            for batch in batches:
                yield batch
                bar.advance(task)
            if bar.tasks[0].total is None:
                bar.update(task, total=passes * bar.tasks[0].completed)

        yield walk
