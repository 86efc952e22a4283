"""How far each LoRA aggregation is from the mean of the clients' updates.

python benchmarks/foundation/exactness.py

writes exactness.csv and exactness.md beside this file: the error of the update that the
layer has after a round, |s A B + U − Σ p s A B| / |Σ p s A B| in the Frobenius norm,
against how far the clients' factors moved apart, as a share of their norm. A minute
on two CPU cores.

Two methods do not have one update to be compared with that mean:

FedSA-LoRA shares A alone, so after a round client j has s Ā B_j. "Through each client's
B" compares it with the mean of the clients' updates as it would be with that client's B,
s Σ p_k A_k B_j, and "against what each client trained" with s A_j B_j. Both are
sqrt(Σ p_j |error_j|² / Σ p_j |wanted_j|²).

LoRM moves one factor at a time and solves for it with the Grams G_k = X_kᵀ X_k of the
clients' inputs, so many rows of standard normal numbers as p_k says. Its rows are the mean
error of B's turn and of A's. Where the inputs are alike (X_k is one matrix of 512 rows,
repeated) the solution is the mean; where each client's features have scales of their own,
exp(N(0, 1)), it is not and does not mean to be: it keeps each client's outputs on its own
inputs.
"""

import csv
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedcl import aggregation, algorithms, base, models, tree
from fedcl.algorithms._lorm import _normal

IN, OUT, RANK, CLIENTS, SEEDS, SCALE = 256, 192, 8, 8, 5, 2.0
ROWS = 512  # Of inputs, for each unit of a client's share.
DRIFTS = (0.05, 0.2, 0.5, 1.0)
BOTH, ONLY_B = models.lora_only, algorithms.ffa_lora
LOSS: Any = None  # An aggregation reads none.
LORM = algorithms.lorm(algorithms.fedavg(LOSS, optax.sgd(0.1)), LOSS)


def chain(stage: aggregation.Stage) -> aggregation.Server:
    return aggregation.server(stage, optax.sgd(1.0))


# Name: the server's chain, which factors move, the accumulator (None: dense).
METHODS: dict[str, tuple[aggregation.Server, Any, int | None]] = {
    "FedIT (mean of factors)": (chain(algorithms.fedit()), BOTH, None),
    "HetLoRA (mean by size)": (chain(algorithms.hetlora_mean()), BOTH, None),
    "FlexLoRA (best of rank r)": (chain(algorithms.flexlora()), BOTH, None),
    "FedEx-LoRA, r' = r": (chain(algorithms.fedex_lora(rank=RANK)), BOTH, None),
    "FedEx-LoRA, r' = 4r": (chain(algorithms.fedex_lora(rank=4 * RANK)), BOTH, None),
    "FedEx-LoRA": (chain(algorithms.fedex_lora()), BOTH, None),
    "FedEx-LoRA, accumulator of rank 8r": (
        chain(algorithms.fedex_lora()),
        BOTH,
        8 * RANK,
    ),
    "FLoRA (stacking, restart)": (
        chain(algorithms.flora(jax.random.key(0))),
        BOTH,
        None,
    ),
    "FFA-LoRA, RoLoRA (one factor moves)": (chain(algorithms.fedit()), ONLY_B, None),
}


def only_a(path: str) -> bool:
    return path.endswith("lora/a")


def drifted(drift: float, seed: int, where: Any) -> tuple[dict, np.ndarray, np.ndarray]:
    """φ and θ as one dict, and the clients' factors [C, ...] in float64."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(IN, RANK)), rng.normal(size=(RANK, OUT))
    moved = lambda x: x[None] + drift * rng.normal(size=(CLIENTS, *x.shape))
    still = lambda x: np.repeat(x[None], CLIENTS, axis=0)
    ends_a = moved(a) if where("lora/a") else still(a)
    ends_b = moved(b) if where("lora/b") else still(b)
    low = {"a": a, "b": b, "scale": np.float64(SCALE), "mask": np.ones(RANK)}
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), low)
    return {"lora": single}, ends_a, ends_b


def accumulator(rank: int | None) -> dict[str, jax.Array]:
    lost = {"lost": jnp.zeros(())}
    if rank is None:
        return {"update": jnp.zeros((IN, OUT)), **lost}
    return {"a": jnp.zeros((IN, rank)), "b": jnp.zeros((rank, OUT)), **lost}


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(tx: Any, where: Any, params: dict, a: jax.Array, b: jax.Array, p: jax.Array):
    """The parameters after one aggregation."""
    phi, theta = tree.partition(params, where)
    ends = {"a": a, "b": b}
    delta = jax.tree_util.tree_map_with_path(
        lambda path, x: x[None] - ends[tree.path_string(path)[-1]], phi
    )
    zero = jnp.int32(0)
    server = base.ServerState(phi, theta, tx.init(phi), (), (), jnp.float32(1), zero)
    new = aggregation.server_step(tx, server, base.Message(delta, p))
    return tree.merge(new.params, new.frozen)


@functools.partial(jax.jit, static_argnums=0)
def merged(where: Any, params: dict, a: jax.Array, b: jax.Array, p: jax.Array, grams):
    """The parameters after LoRM's aggregation of the factor that moved."""
    phi, theta = tree.partition(params, where)
    name = "a" if where("lora/a") else "b"
    moved = {"a": a, "b": b}[name]
    delta = {"lora": dict.fromkeys(params["lora"])}
    delta["lora"][name] = params["lora"][name][None] - moved
    normal = jax.vmap(lambda g, d: _normal(g, params["lora"], d, "lora"))(grams, delta)
    server = base.ServerState(phi, theta, (), (), (), jnp.float32(1), jnp.int32(0))
    chain = aggregation.default_server()
    server = server._replace(opt_state=chain.init(phi))
    message = base.Message(delta, p, sums=({"lora": normal}, ()))
    new = LORM.aggregate(server, message)
    return tree.merge(new.params, new.frozen)


def grams(seed: int, alike: bool) -> np.ndarray:
    """The clients' X_kᵀ X_k, [C, in, in]."""
    rng = np.random.default_rng(200 + seed)
    n = counts(seed)
    if alike:
        x = rng.normal(size=(ROWS, IN))
        return n[:, None, None] * (x.T @ x)[None]
    x = [np.exp(rng.normal(size=IN)) * rng.normal(size=(ROWS * k, IN)) for k in n]
    return np.stack([rows.T @ rows for rows in x])


def effective(params: dict) -> np.ndarray:
    """s A B + U in float64."""
    low, u = jax.tree.map(lambda x: np.asarray(x, np.float64), list(params.values()))
    low, u = (low, u) if "mask" in low else (u, low)
    return SCALE * low["a"] @ low["b"] + (
        u["update"] if "update" in u else u["a"] @ u["b"]
    )


def ideal(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    return SCALE * np.einsum("c,cir,cro->io", p, a, b)


def counts(seed: int) -> np.ndarray:
    return np.random.default_rng(100 + seed).integers(1, 10, CLIENTS)


def shares(seed: int) -> np.ndarray:
    return counts(seed) / counts(seed).sum()


def error(name: str, drift: float, seed: int) -> float:
    tx, where, rank = METHODS[name]
    params, a, b = drifted(drift, seed, where)
    p, single = shares(seed), lambda x: jnp.asarray(x, jnp.float32)
    whole = params | {"accumulator": accumulator(rank)}
    want = ideal(a, b, p)
    got = effective(step(tx, where, whole, single(a), single(b), single(p)))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def fedsa(name: str, drift: float, seed: int) -> float:
    """Of the clients' models with the mean of A and the B of each, see the top."""
    params, a, b = drifted(drift, seed, BOTH)
    p, single = shares(seed), lambda x: jnp.asarray(x, jnp.float32)
    tx = chain(aggregation.weighted_mean())
    new = step(tx, only_a, params, single(a), single(b), single(p))
    mean = np.asarray(new["lora"]["a"], np.float64)
    through = {FEDSA[0]: np.tensordot(p, a, 1)[None], FEDSA[1]: a}[name]
    off = np.linalg.norm((mean[None] - through) @ b, axis=(1, 2))
    return float(np.sqrt(p @ off**2 / (p @ np.linalg.norm(a @ b, axis=(1, 2)) ** 2)))


def lorm(name: str, drift: float, seed: int) -> float:
    """The mean error of the two turns."""
    p, single = shares(seed), lambda x: jnp.asarray(x, jnp.float32)
    inputs, errors = single(grams(seed, name == LORMS[0])), []
    for where in (ONLY_B, only_a):
        params, a, b = drifted(drift, seed, where)
        new = merged(where, params, single(a), single(b), single(p), inputs)
        low = jax.tree.map(lambda x: np.asarray(x, np.float64), new["lora"])
        want = ideal(a, b, p)
        off = np.linalg.norm(SCALE * low["a"] @ low["b"] - want)
        errors.append(float(off / np.linalg.norm(want)))
    return float(np.mean(errors))


def defect(name: str, drift: float, seed: int) -> float:
    """What published code computes, see `DEFECTS`, in float64."""
    _, a, b = drifted(drift, seed, BOTH)
    p = shares(seed)
    want, mean = ideal(a, b, p), SCALE * np.tensordot(p, a, 1) @ np.tensordot(p, b, 1)
    got = {
        "FedEx-LoRA without α / r": mean + (want - mean) / SCALE,
        "FLoRA with p on both factors": ideal(a, b, p**2),
        "FedIT of the first client alone": SCALE * p[0] ** 2 * a[0] @ b[0],
    }[name]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


DEFECTS = (
    "FedEx-LoRA without α / r",
    "FLoRA with p on both factors",
    "FedIT of the first client alone",
)


FEDSA = (
    "FedSA-LoRA, through each client's B",
    "FedSA-LoRA, against what each client trained",
)
LORMS = ("LoRM, inputs alike", "LoRM, inputs unlike")


def table() -> list[tuple[str, list[float]]]:
    """The mean error over seeds, by method and drift."""
    mean = lambda of, name, d: float(np.mean([of(name, d, s) for s in range(SEEDS)]))
    kinds = ((error, METHODS), (fedsa, FEDSA), (lorm, LORMS), (defect, DEFECTS))
    return [(n, [mean(of, n, d) for d in DRIFTS]) for of, names in kinds for n in names]


def main() -> None:
    rows, here = table(), Path(__file__).with_suffix("")
    with here.with_suffix(".csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", *(f"drift {d:g}" for d in DRIFTS)])
        out.writerows([name, *(f"{e:.3g}" for e in errors)] for name, errors in rows)
    lines = [
        f"Relative error of the update, {IN} x {OUT}, rank {RANK}, {CLIENTS} clients, "
        f"mean of {SEEDS} seeds, float32. FedSA-LoRA and LoRM do not aim at that mean, and "
        "what their rows compare is said in exactness.py. The last three rows are what "
        "published code computes instead.\n",
        "| drift | " + " | ".join(f"{d:.0%}" for d in DRIFTS) + " |",
        "|---|" + "---|" * len(DRIFTS),
    ]
    lines += [f"| {n} | " + " | ".join(f"{e:.2g}" for e in es) + " |" for n, es in rows]
    text = "\n".join(lines) + "\n"
    here.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
