"""Replay and DER++ on Split-MNIST, one client, beside PyTorch and Avalanche.

    python benchmarks/speed/replay.py MNIST_DIR --torch PYTHON --avalanche PYTHON

Two works: one of large products, one of many small steps. Start-up is the first run minus
the second (tracing, compilation). The matmul rate is this machine's own, of the first
layer's product, measured between the runs.
"""

import argparse
import gzip
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import compare
import numpy as np
from work import Peer, run

SCRIPTS = {
    "fedcl": "replay_ours.py",
    "torch": "replay_torch.py",
    "avalanche": "replay_avalanche.py",
}
KEYS = ("start", "second", "gflops")


class Work(NamedTuple):
    """Experience replay on Split-MNIST, class-incremental, five contexts."""

    hidden: tuple[int, ...]
    batch: int
    replayed: int
    capacity: int
    steps: int  # Per context.
    optimizer: str
    learning_rate: float
    logits: bool  # DER++ (α = β = 0.5) instead of plain replay.


WORKS = {
    "er": Work((400, 400), 128, 128, 1000, 400, "adam", 1e-3, False),
    "derpp": Work((100, 100), 10, 10, 500, 1200, "sgd", 0.03, True),
}


def flops(work: Work) -> float:
    """Multiply-adds times two of all steps: forward, and backward without the inputs'."""
    sizes = (784, *work.hidden, 10)
    layers = [a * b for a, b in itertools.pairwise(sizes)]
    rows = work.batch + work.replayed * (2 if work.logits else 1)
    return 5 * work.steps * rows * 2 * (3 * sum(layers) - layers[0])


def mnist(directory: str) -> tuple[np.ndarray, np.ndarray]:
    """Training images [M, 784] in [0, 1] and labels [M]."""

    def read(name: str, header: int) -> np.ndarray:
        path = Path(directory) / name
        if path.exists():
            return np.frombuffer(path.read_bytes(), np.uint8)[header:]
        zipped = path.with_name(f"{name}.gz").read_bytes()
        return np.frombuffer(gzip.decompress(zipped), np.uint8)[header:]

    x = read("train-images-idx3-ubyte", 16).reshape(-1, 784)
    y = read("train-labels-idx1-ubyte", 8)
    return x.astype(np.float32) / 255, y.astype(np.int64)


def measure(name: str, prepare: Callable[[Work, str], Callable[[], None]]) -> None:
    """Runs a peer's script: prints the seconds of two runs, and more, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("data")
    parser.add_argument("--born", type=float, default=time.time(), help="by replay.py")
    given = parser.parse_args()
    work = WORKS[given.work]
    told, _ = run(Peer(prepare(work, given.data), lambda end: {}))
    rate = flops(work) / told["second"] / 1e9
    start = told["first"] - told["second"]
    print(json.dumps({**told, "peer": name, "start": start, "gflops": rate}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--torch", required=True, help="a Python that has PyTorch")
    parser.add_argument("--avalanche", help="a Python that has avalanche-lib")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--works", nargs="*", choices=WORKS, default=[*WORKS])
    given = parser.parse_args()
    peers = {
        "fedcl": sys.executable,
        "torch": given.torch,
        "avalanche": given.avalanche,
    }
    peers = {name: python for name, python in peers.items() if python}
    print("| work | peer | start-up s | run s | GFLOP/s | torch / peer |")
    print("|---|---|---|---|---|---|")
    for work in given.works:
        each = {
            name: partial(compare.one, python, SCRIPTS[name], work, given.data)
            for name, python in peers.items()
        }
        each["matmul"] = lambda: {"gflops": compare.matmul_rate((256, 784, 400))}
        runs = compare.in_turn(each, given.repeats)
        rate = compare.medians(runs.pop("matmul"), ["gflops"])["gflops"]
        middle = {name: compare.medians(told, KEYS) for name, told in runs.items()}
        for name, m in middle.items():
            ratio = middle["torch"]["second"] / m["second"]
            print(
                f"| {work} | {name} | {m['start']:.1f} | {m['second']:.2f} "
                f"| {m['gflops']:.1f} | {ratio:.2f} |"
            )
        print(f"| | matmul | | | {rate:.1f} | |")


if __name__ == "__main__":
    main()
