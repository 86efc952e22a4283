"""Four Fisher diagonals, and what libraries make of them, at the same weights.

python benchmarks/continual/fisher.py

prints the table of docs/conventions.md: digits, an MLP 64-32-10 trained by Adam on the
first 1280 rows. It takes half a minute on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedcl import base, losses, models, statistics, streams, tree

ROWS, BATCH = 1280, 64

model = models.mlp((64, 32, 10))
loss_fn = losses.softmax(model.apply)


def sweep(rows: int, batch: int) -> base.Batch:
    """The first rows of the digits in batches, [rows // batch, batch, ...]."""
    data = streams.digits()
    shape = (rows // batch, batch)
    x = jnp.reshape(data["x"][:rows], (*shape, 64))
    return {"x": x, "y": jnp.reshape(data["y"][:rows], shape), "mask": jnp.ones(shape)}


def train(rows: base.Batch, steps: int) -> base.Params:
    """The weights after so many steps of Adam, one batch each."""
    params, opt = model.init(jax.random.key(0)), optax.adam(1e-3)

    def step(carry, i):
        params, state = carry
        batch = tree.gather(rows, i % rows["mask"].shape[0])
        grads = jax.grad(lambda p: loss_fn(p, batch, jax.random.key(1))[0])(params)
        updates, state = opt.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, opt.init(params)), jnp.arange(steps))[0][0]


def weighted_by_p(params: base.Params, rows: base.Batch) -> np.ndarray:
    """The empirical Fisher with each row's square weighed by p(y|x) of its label, [P]."""

    def of_row(row):
        value = lambda p: loss_fn(p, row, jax.random.key(2))[0]
        loss, grads = jax.value_and_grad(value)(params)
        return jax.tree.map(lambda g: jnp.exp(-loss) * g**2, grads)

    of_batch = lambda b: jax.vmap(of_row)(statistics.one_by_one(b))
    found = jax.lax.map(of_batch, rows)
    total = jax.tree.map(lambda g: jnp.sum(g, axis=(0, 1)), found)
    return vector(total) / rows["mask"].size


def vector(a: base.Params) -> np.ndarray:
    """All leaves as one, [P]."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(a)]).astype(np.float64)


def diagonal(
    statistic: statistics.Statistic, params: base.Params, rows: base.Batch
) -> np.ndarray:
    """The result of a statistic as one vector, [P]."""
    value = statistics.over(statistic, params, rows, loss_fn, jax.random.key(2))
    return vector(statistic.solve(value))


def estimates(
    params: base.Params, rows: int, batch: int = BATCH
) -> dict[str, np.ndarray]:
    """Each estimator's diagonal, [P], by the name in the page."""
    small, whole = sweep(rows, 16), sweep(rows, batch)
    of = lambda kind, data: diagonal(statistics.fisher(kind), params, data)
    found = {k: of(k, whole) for k in ("exact", "sampled", "empirical")}
    found["batched, B = 16"] = of("batched", small)
    found[f"batched, B = {batch}"] = of("batched", whole)
    found["p(y) g²"] = weighted_by_p(params, whole)
    found["batched / B"] = found[f"batched, B = {batch}"] / batch
    found["batched, at most 1e-4"] = np.minimum(found[f"batched, B = {batch}"], 1e-4)
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties by their mean rank."""

    def ranks(v):
        _, group, count = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[group]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def table(steps: int, rows: int = ROWS) -> list[tuple[str, float, float, float, float]]:
    """Name, sum, largest entry, sum over the exact one's, rank correlation with it."""
    params = jax.jit(train, static_argnums=1)(sweep(rows, BATCH), steps)
    found = estimates(params, rows)
    exact = found["exact"]
    return [
        (k, f.sum(), f.max(), f.sum() / exact.sum(), rank_correlation(f, exact))
        for k, f in found.items()
    ]


def show(steps: int) -> None:
    """Prints a table in Markdown."""
    head = "| estimator | sum | largest | sum / exact | rank correlation |"
    print(f"\nAfter {steps} steps:\n\n{head}\n|---|---|---|---|---|")
    for name, total, top, ratio, rho in table(steps):
        print(f"| {name} | {total:.3g} | {top:.2g} | {ratio:.3g} | {rho:.2f} |")


if __name__ == "__main__":
    for steps in (60, 2000):
        show(steps)
