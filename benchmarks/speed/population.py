"""Time per round and resident memory of a federation with its clients in files.

    python benchmarks/speed/population.py --clients 1000000 --cohort 1000

Each client keeps 64 numbers of its own (a personal head's worth) and its bookkeeping;
the stream is synthetic. Start-up and compile are told apart from the rounds.
"""

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedcl
from fedcl import algorithms, base, cohorts, losses, store

STEPS, ROWS, FEATURES, CLASSES = 5, 10, 32, 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream(base.Stationary):
    """Gaussian rows with labels from one linear map."""

    truth: jax.Array  # [D, Y]
    num_clients: int = dataclasses.field(metadata={"static": True})

    def sample(self, key, client, round):
        x = jax.random.normal(key, (STEPS, ROWS, FEATURES))
        y = jnp.argmax(x @ self.truth, axis=-1)
        return {"x": x, "y": y, "mask": jnp.ones((STEPS, ROWS))}


def remembering():
    """A method whose memory is 64 numbers, changed at every visit."""
    init = lambda params, example: jnp.zeros(64)
    return fedcl.transform(init=init, begin=lambda memory, params, ctx: memory + 1)


def resident() -> float:
    """Bytes of this process in memory at most, so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--schedule", type=int, default=100)
    parser.add_argument("--resident", action="store_true", help="states on the device")
    a = parser.parse_args()
    stream = Stream(
        jax.random.normal(jax.random.key(0), (FEATURES, CLASSES)), a.clients
    )
    loss = losses.softmax(lambda p, x, key: x @ p)
    algorithm = algorithms.fedavg(loss, optax.sgd(0.1), transform=remembering())
    params, began = jnp.zeros((FEATURES, CLASSES)), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        inputs = (algorithm, params, stream.example(), a.clients)
        clients = Path(folder) / "clients"
        state = (
            algorithm.init(*inputs[1:]) if a.resident else store.init(*inputs, clients)
        )
        started, at = time.perf_counter() - began, [time.perf_counter()]
        before = resident()
        fedcl.run(
            algorithm,
            state,
            stream,
            key=jax.random.key(1),
            rounds=a.rounds,
            every=1,
            cohort=cohorts.uniform(a.cohort),
            schedule=a.schedule,
            progress=lambda p: at.append(time.perf_counter()),
        )
        each = np.diff(at)
        disk = sum(512 * f.stat().st_blocks for f in Path(folder).rglob("*"))
    told = {
        "clients": a.clients,
        "cohort": a.cohort,
        "store": not a.resident,
        "start (s)": round(started, 2),
        "compile and first round (s)": round(float(each[0]), 2),
        "round, median (s)": round(float(np.median(each[1:])), 3),
        "resident before rounds (MB)": round(before),
        "resident at most (MB)": round(resident()),
        "disk (MB)": round(disk / 1e6, 1),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
