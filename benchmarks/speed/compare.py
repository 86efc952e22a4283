"""Times the peers in turn, each a process of its own, and prints medians.

    python benchmarks/speed/compare.py --torch PYTHON_WITH_TORCH --repeats 5

"ready" is from the start of the process to the first call (imports, data), "compile" the
first run minus the second; the rest is of the second run alone, "core s" its time on all
cores together. The matmul rate is this machine's own, measured between the runs. `--check`
compares the weights after one round instead. Give a Python that has the peer, or
FOLDER=PYTHON for one whose packages lie in a folder (`pip install --target`). A peer that
fails is named, with why, and the others go on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from work import WORKS, cores, flops

HERE = Path(__file__).parent
# On a GPU, leave room for the peers beside the matmul rate's program.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
SCRIPTS = {
    "fedcl": "ours.py",
    "floor": "floor.py",
    "drjax": "drjax_peer.py",
    "fedjax": "fedjax_peer.py",
    "torch": "plain_torch.py",
    "pfl": "pfl_peer.py",
    "flower": "flower_peer.py",
}
OWN = ("fedcl", "floor")  # Which need no Python of their own.
SPREAD = ("fedcl", "floor", "drjax")  # Which can take each core for a device.
DEVICES = "-devices"
TOLERANCE = 1e-4
T = TypeVar("T")


def one(python: str, script: str, *options: str) -> dict:
    """One process of a peer."""
    folder, _, python = python.rpartition("=")
    words = [*script.split(), *options, "--born", repr(time.time())]
    command = [python, str(HERE / words[0]), *words[1:]]
    env = {**os.environ, "PYTHONPATH": folder} if folder else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(said[-1])


def words_of(peer: str, work: str) -> str:
    """The peer's script and options; with "-devices", as many cores as split the cohort."""
    name, devices = peer.removesuffix(DEVICES), peer.endswith(DEVICES)
    size = WORKS[work].size
    most = max(d for d in range(1, cores() + 1) if size % d == 0)
    return f"{SCRIPTS[name]} --devices {most}" if devices else SCRIPTS[name]


def matmul_rate(
    shape: tuple[int, int, int] = (1024, 1024, 1024), dtype: str = "float32"
) -> float:
    """This machine's GFLOP/s, of m × k by k × n products."""
    import jax
    import jax.numpy as jnp

    m, k, n = shape
    a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    fn = jax.jit(lambda a, b: a @ b)
    fn(a, b).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        fn(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * m * k * n / min(seconds) / 1e9


def on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def in_turn(runs: Mapping[T, Callable[[], dict]], repeats: int) -> dict[T, list[dict]]:
    """What each run told, each time, one run after another."""
    told: dict[T, list[dict]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in list(told):
            try:
                told[name].append(runs[name]())
            except RuntimeError as error:
                print(f"{name} failed and is left out: {error}", file=sys.stderr)
                del told[name]
                continue
            print(name, told[name][-1], file=sys.stderr, flush=True)
    return told


def medians(told: list[dict], keys: Iterable[str]) -> dict[str, float]:
    """Of each figure, over the repeats."""
    return {key: statistics.median(run[key] for run in told) for key in keys}


def compare(
    work: str, peers: dict[str, str], repeats: int, options: Sequence[str] = ()
) -> list[dict]:
    """One row per peer, medians over the repeats, and one of the matmul rate."""
    words = {name: words_of(name, work) for name in peers}
    runs = {n: partial(one, p, words[n], work, *options) for n, p in peers.items()}
    found = in_turn({**runs, "matmul": lambda: {"gflops": matmul_rate()}}, repeats)
    rate = medians(found.pop("matmul"), ["gflops"])["gflops"]
    rows = []
    for name, told in found.items():
        row = medians(told, ("ready", "compile", "round", "cpu", "gflops", "peak_mb"))
        row |= {"least": min(run["round"] for run in told)}
        row |= {"work": work, "peer": name, "share": row["gflops"] / rate}
        rows.append(row | {"versions": told[0]["versions"], "n": repeats})
    return [*rows, {"work": work, "peer": "matmul", "gflops": rate}]


def table(rows: list[dict]) -> str:
    """Markdown; the last column but one is how many times as fast fedcl is."""
    lines = [
        "| work | peer | ready s | compile s | s / round | least | core s | peer / fedcl "
        "| GFLOP/s | of matmul | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {row["work"]: row["round"] for row in rows if row["peer"] == "fedcl"}
    for r in rows:
        if r["peer"] == "matmul":
            lines.append(f"| | matmul | | | | | | | {r['gflops']:.0f} | | |")
            continue
        ratio = f"{r['round'] / ours[r['work']]:.2f}" if r["work"] in ours else ""
        lines.append(
            f"| {r['work']} | {r['peer']} | {r['ready']:.1f} | {r['compile']:.1f} "
            f"| {r['round']:.4g} | {r['least']:.4g} | {r['cpu']:.4g} | {ratio} "
            f"| {r['gflops']:.1f} | {r['share']:.0%} | {r['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def check(work: str, peers: dict[str, str]) -> dict[str, float]:
    """Largest difference of a trained weight from fedcl's after one round."""
    with tempfile.TemporaryDirectory() as folder:
        ends = {}
        for name, python in peers.items():
            file = str(Path(folder) / f"{name}.npz")
            one(python, words_of(name, work), work, "--rounds", "1", "--save", file)
            ends[name] = dict(np.load(file))
    gaps = {}
    for name, end in ends.items():
        assert set(end) == set(ends["fedcl"]), (name, sorted(end))
        each = (np.max(np.abs(end[path] - v)) for path, v in ends["fedcl"].items())
        gaps[name] = float(max(each))
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--works", nargs="+", choices=WORKS, default=["mlp", "cnn", "vit"]
    )
    parser.add_argument("--peers", nargs="+", help="of those given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="weights, not seconds")
    parser.add_argument("--schedule", help="of the clients, in all; vmap on a GPU")
    parser.add_argument("--json", help="write every figure to this file")
    for name in SCRIPTS.keys() - set(OWN):
        parser.add_argument(f"--{name}", help=f"a Python that has {name}")
    given = parser.parse_args()
    peers = {n: sys.executable if n in OWN else getattr(given, n) for n in SCRIPTS}
    peers |= {n + DEVICES: peers[n] for n in SPREAD if on_cpu()}
    chosen = given.peers or peers
    peers = {
        name: python for name, python in peers.items() if python and name in chosen
    }
    if given.check:
        for work in given.works:
            gaps = check(work, peers)
            print(work, *(f"{name} {gap:.1e}" for name, gap in gaps.items()))
            assert max(gaps.values()) <= TOLERANCE, gaps
        return
    rows = []
    options = ["--schedule", given.schedule] if given.schedule else []
    for work in given.works:
        rows += compare(work, peers, given.repeats, options)
        print(f"{work}: {flops(WORKS[work]) / 1e9:.1f} GFLOP a round", file=sys.stderr)
    print(
        f"{platform.processor() or platform.machine()}, {cores()} cores, n = "
        f"{given.repeats}"
    )
    print(table(rows))
    for row in rows:
        if row["work"] == given.works[0] and "versions" in row:
            print(row["peer"], *(f"{k} {v}" for k, v in row["versions"].items()))
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
