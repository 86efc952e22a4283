"""Time and memory against the size of the cohort, and against the number of rounds.

    python benchmarks/speed/scaling.py cohort --plot cohort.png
    python benchmarks/speed/scaling.py rounds

Each size is a process of its own, timed in its second run. A cohort is taken ten clients
at a time and added up, from a population of 1000 whatever its size.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import compare
import nets
from work import Work, run

SIZES = {"cohort": (10, 30, 100, 300, 1000), "rounds": (10, 100, 1000, 10_000)}
KEYS = ("seconds", "peak_mb")


def work_of(axis: str, size: int) -> Work:
    """The work at a size."""
    if axis == "cohort":
        net = nets.MLP((784, 64, 62))
        return Work(net, 1000, 10, 10, 0.1, 2, cohort=size, rows=20, schedule=10)
    return Work(nets.MLP((64, 32, 10)), 10, 5, 10, 0.1, size)


def measure(axis: str, repeats: int) -> list[dict]:
    """A row for each size: medians of seconds of a run and of the memory's peak."""

    def one(size):
        command = [sys.executable, __file__, axis, "--one", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    runs = compare.in_turn({size: partial(one, size) for size in SIZES[axis]}, repeats)
    return [{axis: s, **compare.medians(told, KEYS)} for s, told in runs.items()]


def plot(axis: str, rows: list[dict], file: str) -> None:
    """Seconds, on a logarithmic axis, and memory over the size."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3), layout="constrained")
    sizes = [row[axis] for row in rows]
    labels = ("seconds of a run", "peak of the process's memory, MB")
    for ax, key, label in zip(figure.subplots(1, 2), KEYS, labels, strict=True):
        values = [row[key] for row in rows]
        ax.plot(sizes, values, marker="o")
        ax.set(xscale="log", xlabel=axis, ylabel=label)
        if key == "seconds":
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.2 * max(values))
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("axis", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", help="draw to this file")
    parser.add_argument("--one", type=int, help="time this size alone, in this process")
    given = parser.parse_args()
    if given.one:
        import ours

        told = run(ours.prepare(work_of(given.axis, given.one)))[0]
        print(json.dumps({"seconds": told["second"], "peak_mb": told["peak_mb"]}))
        return
    rows = measure(given.axis, given.repeats)
    print(f"| {given.axis} | s | s each | peak MB |\n|---|---|---|---|")
    for row in rows:
        size, seconds = row[given.axis], row["seconds"]
        print(
            f"| {size} | {seconds:.3g} | {seconds / size:.3g} | {row['peak_mb']:.0f} |"
        )
    if given.plot:
        plot(given.axis, rows, str(Path(given.plot)))


if __name__ == "__main__":
    main()
