"""Times the sums of a Fisher or of MAS over rows against a gradient of each row.

    python benchmarks/speed/importance.py [--repeats 5]

One batch of 128 rows through an MLP 784-512-10. "By rows" is what `jax.vmap` of the
gradient gives, squared (for MAS its size) and summed. The two sides take turns; medians.
"""

import argparse
import statistics as of
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import _row_gradients, losses, models, statistics

ROWS = 128
STATISTICS = {
    "exact": lambda: statistics.fisher("exact"),
    "sampled": lambda: statistics.fisher("sampled"),
    "empirical": lambda: statistics.fisher("empirical"),
    "MAS": statistics.sensitivity,
}


def by_rows(gradient, rows, weight, power: int):
    """`fedcl._row_gradients.powers`, the plain way."""
    each = jax.vmap(gradient)(*rows)
    return jax.tree.map(
        lambda g: jnp.einsum("b,b...->...", weight, jnp.abs(g) ** power), each
    )


def batch_total(sum_of: Callable, name: str) -> Callable[[], jax.Array]:
    """The statistic of one batch, with this way of summing over rows."""
    model = models.mlp((784, 512, 10))
    loss, params = losses.softmax(model.apply), model.init(jax.random.key(0))
    batch = {
        "x": jax.random.normal(jax.random.key(1), (ROWS, 784)),
        "y": jnp.arange(ROWS) % 10,
        "mask": jnp.ones(ROWS),
    }
    statistics.powers, kept = sum_of, statistics.powers
    try:
        statistic = STATISTICS[name]()
        begin = statistic.init(params, None)
        add = lambda p, b: statistic.accumulate(begin, p, b, loss, jax.random.key(2))
        program = jax.jit(add).lower(params, batch).compile()
    finally:
        statistics.powers = kept
    return lambda: jax.block_until_ready(program(params, batch).total)


def seconds(go: Callable[[], object]) -> float:
    start = time.perf_counter()
    go()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| importance | by rows, ms | fedcl, ms | ratio | largest difference |")
    print("|---|---|---|---|---|")
    for name in STATISTICS:
        plain, ours = (batch_total(f, name) for f in (by_rows, _row_gradients.powers))
        a, b = (
            np.concatenate([x.ravel() for x in jax.tree.leaves(f())])
            for f in (plain, ours)
        )
        times = [(seconds(plain), seconds(ours)) for _ in range(repeats)]
        slow, fast = (of.median(t) for t in zip(*times, strict=True))
        gap = np.abs(a - b).max() / np.abs(a).max()
        cells = (f"{1e3 * slow:.1f}", f"{1e3 * fast:.2f}", f"{slow / fast:.0f}")
        print(f"| {name} | {' | '.join(cells)} | {gap:.0e} |")


if __name__ == "__main__":
    main()
