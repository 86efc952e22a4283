"""What the conveniences cost: importing fedcl, watching a run, saving a run.

    python benchmarks/overhead.py

prints medians and ratios of interleaved repeats; the figures are in
docs/benchmarks.md.
"""

import statistics
import subprocess
import sys
import tempfile
import time

import jax
import optax

import fedcl
from fedcl import algorithms, checkpoint, cohorts, losses, models, streams


def seconds(go) -> float:
    start = time.perf_counter()
    go()
    return time.perf_counter() - start


def compare(name: str, a, b, repeats: int) -> None:
    """Interleaves A and B and prints the median of each and of the ratio."""
    pairs = [(seconds(a), seconds(b)) for _ in range(repeats)]
    first, second = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratio = statistics.median(y / x for x, y in pairs)
    print(f"{name}: {first:.3f} s and {second:.3f} s, ratio {ratio:.3f} (n={repeats})")


def python(code: str):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def imports() -> None:
    names = "import jax, optax", "import fedcl"
    compare("import: jax + optax, fedcl", *map(python, names), repeats=7)


def runs() -> None:
    stream = streams.class_incremental(
        streams.digits(),
        num_contexts=5,
        num_clients=20,
        rounds_per_context=40,
        steps=10,
        batch_size=32,
    )
    model = models.mlp((64, 256, 10))
    algorithm = algorithms.fedavg(losses.softmax(model.apply), optax.sgd(0.05))
    params = model.init(jax.random.key(0))
    state = algorithm.init(params, stream.example(), stream.num_clients)
    part = fedcl.phases.federated(algorithm, cohort=cohorts.uniform(10))

    def run(**kw):
        return lambda: jax.block_until_ready(
            fedcl.run(
                [part], state, stream, key=jax.random.key(1), rounds=200, every=10, **kw
            )[0]
        )

    def saved():
        with tempfile.TemporaryDirectory() as where:
            run(checkpoint=checkpoint.Checkpoints(where, every=50))()

    def watched():
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("rounds", total=200)
            run(progress=lambda told: bar.update(task, completed=told.done))()

    run()()
    compare("200 rounds: bare, with a progress bar", run(), watched, repeats=7)
    compare("200 rounds: bare, with 4 checkpoints", run(), saved, repeats=7)


if __name__ == "__main__":
    imports()
    runs()
