"""Times the peers in turn, each a process of its own, and prints medians and ratios.

    python benchmarks/continual/speed/compare.py MNIST_DIR --torch PYTHON_WITH_TORCH

Start-up (import, tracing, compilation: the first run minus the second) is reported
apart. The matmul rate is this machine's own, measured between the runs: a 256 × 784 by
784 × 400 product in float32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def one(python: str, script: str, work: str, data: str) -> dict:
    """One process of a peer."""
    command = [python, str(HERE / script), work, data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def matmul_rate() -> float:
    """This machine's float32 GFLOP/s on the shape of the first layer."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((256, 784)), jnp.ones((784, 400))
    fn = jax.jit(lambda a, b: a @ b)
    fn(a, b).block_until_ready()
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        fn(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 784 * 400 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--torch", required=True, help="a Python that has PyTorch")
    parser.add_argument("--avalanche", help="a Python that has avalanche-lib")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--works", nargs="*", default=["er", "derpp"])
    given = parser.parse_args()
    peers = {"fedcl": (sys.executable, "ours.py")}
    peers["torch"] = (given.torch, "plain_torch.py")
    if given.avalanche:
        peers["avalanche"] = (given.avalanche, "avalanche_peer.py")
    print("| work | peer | start-up s | run s | GFLOP/s | torch / peer |")
    print("|---|---|---|---|---|---|")
    for work in given.works:
        runs: dict[str, list[dict]] = {name: [] for name in peers}
        rates = []
        for _ in range(given.repeats):
            for name, (python, script) in peers.items():
                runs[name].append(one(python, script, work, given.data))
                print(work, name, runs[name][-1], file=sys.stderr, flush=True)
            rates.append(matmul_rate())
        median = lambda name, key: statistics.median(r[key] for r in runs[name])  # noqa: B023
        for name in peers:
            start = median(name, "first") - median(name, "second")
            ratio = median("torch", "second") / median(name, "second")
            print(
                f"| {work} | {name} | {start:.1f} | {median(name, 'second'):.2f} | "
                f"{median(name, 'gflops'):.1f} | {ratio:.2f} |"
            )
        print(f"| | matmul | | | {statistics.median(rates):.1f} | |")


if __name__ == "__main__":
    main()
