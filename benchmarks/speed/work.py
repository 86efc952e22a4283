"""The works, the rows that every peer reads, and how a peer is timed. NumPy only."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import nets
import numpy as np

ORDERS = 4  # Orders of a client's rows, which its rounds take in turn.


class Work(NamedTuple):
    """Federated averaging by SGD on rows that are given, in a given order."""

    net: nets.Net
    clients: int
    steps: int
    batch: int
    rate: float
    rounds: int  # In a timed run.
    cohort: int | None = None  # None: all clients in every round.
    rows: int = 100  # Of each client.
    schedule: str | int = "vmap"  # How the JAX programs take the clients.
    devices: int = 1  # Over which fedcl spreads them.

    @property
    def size(self) -> int:
        return self.cohort or self.clients


WORKS = {
    "mlp": Work(nets.MLP(), 50, 10, 10, 0.1, 20, schedule="scan"),
    "cnn": Work(nets.CNN(), 10, 20, 20, 0.01, 1, schedule="scan"),
    "vit": Work(nets.ViT(), 16, 5, 8, 0.01, 1, schedule="scan"),
    # pfl-research's CIFAR10-IID setting, on noise of the same shape.
    "cifar10": Work(nets.CNN((32, 32, 3), classes=10), 1000, 5, 10, 0.1, 1500, 50, 50),
}


class Rows(NamedTuple):
    """What is trained on.

    Attributes:
      x: [M, ...] float32.
      y: [M] int32.
      order: [N, ORDERS, S, B] int32, row numbers: client n in round t takes those of
        `order[n, t % ORDERS]`.
      who: [T, C] int32, the clients of each round.
    """

    x: np.ndarray
    y: np.ndarray
    order: np.ndarray
    who: np.ndarray


def rows_of(work: Work, seed: int = 1) -> Rows:
    """Noise, the same for all peers."""
    rng = np.random.default_rng(seed)
    n, m = work.clients, work.clients * work.rows
    x = rng.standard_normal((m, *work.net.shape), np.float32)
    y = rng.integers(0, work.net.classes, m, np.int32)
    shape = (n, ORDERS, work.steps, work.batch)
    own = work.rows * np.arange(n, dtype=np.int32)[:, None, None, None]
    order = own + rng.integers(0, work.rows, shape, np.int32)
    everyone = np.arange(n, dtype=np.int32)
    draw = lambda: rng.permutation(everyone)[: work.cohort]
    who = [everyone if work.cohort is None else draw() for _ in range(work.rounds)]
    return Rows(x, y, order, np.stack(who))


def flops(work: Work) -> float:
    """Multiply-adds times two of a round."""
    return float(work.size * work.steps * work.batch * nets.flops(work.net))


class Peer(NamedTuple):
    """A peer that is ready to run.

    Attributes:
      go: `() -> end`, all rounds of the work from the first weights on, and done.
      read: `(end) -> weights`, the trained ones, as `nets.weights` has them.
    """

    go: Callable[[], Any]
    read: Callable[[Any], nets.Weights]


def measure(
    name: str, packages: Sequence[str], prepare: Callable[[Work], Peer]
) -> None:
    """Runs a peer's script: prints the seconds of two runs, and more, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--rounds", type=int, help="instead of the work's own")
    parser.add_argument("--schedule", type=schedule, help="instead of the work's own")
    parser.add_argument("--devices", type=int, default=1, help="that a CPU is")
    parser.add_argument("--save", help="write the trained weights, .npz")
    parser.add_argument("--born", type=float, default=time.time(), help="by compare.py")
    given = parser.parse_args()
    work = WORKS[given.work]
    work = work._replace(rounds=given.rounds or work.rounds, devices=given.devices)
    if given.devices > 1:  # Before JAX first computes.
        flag = f"--xla_force_host_platform_device_count={given.devices}"
        os.environ["XLA_FLAGS"] = flag
    if given.schedule:
        work = work._replace(schedule=given.schedule)
    peer = prepare(work)
    ready = time.time() - given.born
    told, end = run(peer)
    if given.save:
        np.savez(given.save, **peer.read(end))
    told |= {
        "peer": name,
        "versions": versions(packages),
        "ready": ready,
        "compile": told["first"] - told["second"],
        "round": told["second"] / work.rounds,
        "cpu": told["cpu"] / work.rounds,
        "gflops": work.rounds * flops(work) / told["second"] / 1e9,
    }
    print(json.dumps(told))


def schedule(word: str) -> str | int:
    """A schedule as a command line has it: its name, or the size of a chunk."""
    return int(word) if word.isdigit() else word


def run(peer: Peer) -> tuple[dict[str, Any], Any]:
    """The seconds of two runs, the second's core seconds, the memory's peak; the end."""
    seconds, busy, end = [], 0.0, None
    for _ in range(2):
        start, before = time.perf_counter(), time.process_time()
        end = peer.go()
        seconds.append(time.perf_counter() - start)
        busy = time.process_time() - before
    told = {"first": seconds[0], "second": seconds[1], "cpu": busy, "peak_mb": peak()}
    return told, end


def measured(
    name: str, packages: Sequence[str], prepare: Callable[[], Callable[[], Any]]
) -> None:
    """Runs a script of the continual work: prints two runs' seconds and more as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("--born", type=float, default=time.time(), help="by compare.py")
    given = parser.parse_args()
    go = prepare()
    ready = time.time() - given.born
    told, (accuracy, said) = run(Peer(go, lambda end: {}))
    told |= {"peer": name, "accuracy": accuracy, "told": said, "ready": ready}
    told |= {"compile": told["first"] - told["second"], "run": told["second"]}
    print(json.dumps(told | {"versions": versions(packages)}))


def peak() -> float:
    """Memory of this process at the most so far, in MB: on a GPU that of the device."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and (stats := jax.local_devices()[0].memory_stats()):
        return stats["peak_bytes_in_use"] / 2**20
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of installed packages."""
    return {package: metadata.version(package) for package in packages}


def cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0))
