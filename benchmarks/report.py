"""Run the benchmarks, and write what they found into docs/benchmarks.md and its pictures.

Each framework is measured in a process of its own. With --quick, to see that everything runs, there
are few shapes and few rounds, and the page is written into build/ instead.
"""

import argparse
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import groupby, product
from pathlib import Path

from matplotlib.figure import Figure
from measure import INSTRUCTION_SETS, THREADS, Result
from tabulate import tabulate

HERE = Path(__file__).parent
PROGRAMS = (
    *("kernels", "torch_layers", "whole_models", "jax_layers", "library_layers", "mlx_layers"),
)
# Okabe & Ito's, https://jfly.uni-koeln.de/color/: one for each side of a picture.
COLORS = (
    *("#0072b2", "#e69f00", "#d55e00", "#009e73"),
    *("#cc79a7", "#56b4e9", "#f0e442", "#000000", "#999999"),
)

INTRODUCTION = """# Benchmarks

How long batch normalization takes here and in its peers. `make bench` has made this page: `python
benchmarks/report.py` runs one program for each framework, in which all sides take turns, round
after round in another order, on the same data, with the same allocator and the same number of
threads. Times are medians; a ratio is formed in each round, and its median given. The unit is a
copy of x by as many threads, the faster of an ordinary one and one past the cache: the least that
a forward pass can take is 1 copy, and a backward pass, which reads two tensors and writes one, 1.5.

Where the processor has several instruction sets, kernels and layers are measured with each. Which
one is used is our choice then: clock, caches and memory are this processor's, and one that has AVX2
alone is another machine.

"The set" is the 53 batch normalizations of ResNet-50 at batch 32, each shape counted as often as
the network has it. [performance.md](performance.md) says where the time goes.
"""


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in lines if "model name" in name), model)
    threads = f"{THREADS} thread{'s' if THREADS > 1 else ''}"
    return f"{model}, {threads}, {platform.system()}, Python {platform.python_version()}."


def run(quick: bool, folder: Path) -> list[tuple[str, list[Result]]]:
    found = []
    for name, instruction_set in product(PROGRAMS, INSTRUCTION_SETS):
        is_widest = instruction_set == INSTRUCTION_SETS[0]
        path = folder / f"{name}.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
        command += ["--instruction-set", instruction_set]
        subprocess.run(command + ["--quick"] * quick, check=True)
        record = json.loads(path.read_text())
        results = [Result(**{**each, "shape": tuple(each["shape"])}) for each in record["results"]]
        if not is_widest:
            results = [
                replace(each, framework=f"{each.framework}, {instruction_set}") for each in results
            ]
        found.append((record["title"], results))
    return found


def by(results: Sequence[Result], *names: str) -> list[tuple[tuple[str, ...], list[Result]]]:
    def key(each: Result) -> tuple[str, ...]:
        return tuple(str(getattr(each, name)) for name in names)

    order = {value: i for i, value in enumerate(dict.fromkeys(map(key, results)))}
    ordered = sorted(results, key=lambda each: order[key(each)])
    return [(value, list(group)) for value, group in groupby(ordered, key)]


def sides(results: list[Result]) -> list[str]:
    return [name for name in dict.fromkeys(each.side for each in results) if name != "copy"]


def summary(results: list[Result]) -> str:
    """Sums over the set: ours in copies, and each peer's time over ours."""
    rows = []
    results = [each for each in results if each.times]
    peers = sides(results)
    for (call, layout), group in by(results, "call", "layout"):
        total = {
            side: sum(each.times * each.milliseconds for each in group if each.side == side)
            for side in [*peers, "copy"]
        }
        ours = total[peers[0]]
        ratios = [f"{total[peer] / ours:.2f}" if total[peer] else "–" for peer in peers[1:]]
        rows.append([call, layout, f"{ours:.1f}", f"{ours / total['copy']:.2f}", *ratios])
    headings = [
        "the set",
        "layout",
        f"{peers[0]}, ms",
        "in copies",
        *(f"{p}: ×" for p in peers[1:]),
    ]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def shapes(results: list[Result]) -> str:
    peers = sides(results)
    rows = []
    for (_, layout), group in by(results, "shape", "layout"):
        of = {each.side: each for each in group}
        ours = of[peers[0]]
        ratios = [f"{of[peer].ratio:.2f}" if peer in of else "–" for peer in peers[1:]]
        row = [str(ours.shape), ours.times or "", layout, f"{ours.milliseconds:.4f}"]
        rows.append([*row, f"{ours.copies:.2f}", *ratios])
    headings = ["N, C, …", "in the set", "layout", f"{peers[0]}, ms", "in copies"]
    headings += [f"{peer}: ×" for peer in peers[1:]]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def slower(results: list[Result]) -> str:
    """Where a peer is faster than ours."""
    found = [
        f"{each.shape} {each.layout}, {each.call}: {each.side} takes {each.ratio:.2f} of the time"
        for each in results
        if not each.side.startswith(("copy", "batchnorm", "no ")) and each.ratio < 0.97
    ]
    if not found:
        return "No peer is faster in any shape."
    return "A peer is faster here:\n\n" + "\n".join(f"- {line}" for line in found)


def is_drawn(each: Result) -> bool:
    return math.prod(each.shape) > 2**16 and not each.call.startswith("step")


def draw(results: list[Result], path: Path) -> None:
    """Ratios to a copy of every shape, ours beside the peers'."""
    panels = by([*filter(is_drawn, results)], "call", "layout")
    figure = Figure(figsize=(11, 3.2 * len(panels)), dpi=110, layout="constrained")
    for axes, ((call, layout), group) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True
    ):
        labels = [key[0] for key, _ in by(group, "shape")]
        names = sides(group)
        width = 0.8 / len(names)
        for i, (name, color) in enumerate(zip(names, COLORS[: len(names)], strict=True)):
            heights = {str(each.shape): each.copies for each in group if each.side == name}
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(labels))]
            values = [heights.get(label, math.nan) for label in labels]
            axes.bar(places, values, width, color=color, label=name)
        axes.set_title(f"{call}, {layout}", loc="left")
        axes.set_ylabel("time in copies of x")
        axes.set_xticks(range(len(labels)), [label.strip("()") for label in labels], rotation=20)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        axes.legend(frameon=False, fontsize=8, ncols=len(names), **above)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    quick = parser.parse_args().quick
    build = HERE.parent / "build" / "benchmarks"
    docs = build if quick else HERE.parent / "docs"
    pictures = docs / "benchmarks"
    for folder in (build, pictures):
        folder.mkdir(parents=True, exist_ok=True)

    parts = [INTRODUCTION, f"Measured on {date.today():%d %B %Y}: {machine()}\n"]
    for title, results in run(quick, build):
        for (name,), found in by(results, "framework"):
            file = re.sub("[, ]+", "-", name.lower())
            picture = f"benchmarks/{file}.png"
            parts += [f"## {name}\n", f"{title}\n"]
            if any(each.times for each in found):
                parts += [summary(found) + "\n", slower(found) + "\n"]
            if any(map(is_drawn, found)):
                draw(found, docs / picture)
                parts += [f"![{name}: time of every shape in copies]({picture})\n"]
            for (call,), group in by(found, "call"):
                parts += [f"### {name}, {call}\n", shapes(group) + "\n"]
    (docs / "benchmarks.md").write_text("\n".join(parts))
    print(f"Written: {docs / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
