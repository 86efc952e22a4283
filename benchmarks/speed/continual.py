"""The continual work: many contexts, replay and EWC, cohorts of a population.

    python benchmarks/speed/continual.py --torch PYTHON_WITH_TORCH --repeats 5

Class-incremental, online EWC with the Fisher of each client's own rows when a context
ends. Both sides draw their own batches, so they agree in what they do and not in the
numbers: the accuracy over all contexts at the end is printed beside the time.
"""

import argparse
import sys
from functools import partial
from typing import NamedTuple

import compare
import numpy as np

SCRIPTS = {"fedcl": "continual_ours.py", "torch": "continual_torch.py"}
KEYS = ("ready", "compile", "run", "accuracy", "peak_mb")


class Work(NamedTuple):
    """Experience replay and EWC on clusters, a few classes in each context."""

    sizes: tuple[int, ...] = (64, 64, 40)
    contexts: int = 20
    rounds: int = 50  # Of each context.
    clients: int = 100
    cohort: int = 10
    steps: int = 4
    batch: int = 10
    replayed: int = 10
    capacity: int = 50
    rows: int = 10  # Of each client in each context.
    rate: float = 0.05
    strength: float = 1.0


WORK = Work()


def rows_of(work: Work, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x [M, D] around one point for each class, y [M], in the order of the contexts."""
    rng = np.random.default_rng(seed)
    classes, features = work.sizes[-1], work.sizes[0]
    each = work.contexts * work.clients * work.rows // classes
    y = np.repeat(np.arange(classes, dtype=np.int32), each)
    points = rng.standard_normal((classes, features), np.float32)
    return points[y] + rng.standard_normal((len(y), features), np.float32), y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", help="a Python that has torch")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    peers = {"fedcl": sys.executable}
    peers |= {"torch": given.torch} if given.torch else {}
    each = {
        name: partial(compare.one, python, SCRIPTS[name], "continual")
        for name, python in peers.items()
    }
    runs = compare.in_turn(each, given.repeats)
    print("| peer | ready s | compile s | run s | peer / fedcl | accuracy | peak MB |")
    print("|---|---|---|---|---|---|---|")
    middle = {name: compare.medians(told, KEYS) for name, told in runs.items()}
    for name, m in middle.items():
        ratio = m["run"] / middle["fedcl"]["run"]
        print(
            f"| {name} | {m['ready']:.1f} | {m['compile']:.1f} | {m['run']:.2f} "
            f"| {ratio:.2f} | {m['accuracy']:.1%} | {m['peak_mb']:.0f} |"
        )
    for name, (first, *_) in runs.items():
        print(name, first["told"], *(f"{k} {v}" for k, v in first["versions"].items()))


if __name__ == "__main__":
    main()
