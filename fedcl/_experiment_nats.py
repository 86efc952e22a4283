"""What a run on text leaves behind: losses in nats per token."""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import metrics

if TYPE_CHECKING:
    from fedcl._experiment_results import Arm
    from fedcl._experiment_run import Setup

MEANING = {
    "average": "mean over contexts of the loss at the end, in nats per token",
    "perplexity": "exp(average)",
    "forgetting": "of the loss, see evaluation.forgetting: positive when it has risen",
    "rise": "mean over earlier contexts of the loss at the end minus when learnt",
    "rise_first": "the same of the first context alone",
    "gain": "mean over contexts of the base's loss minus that at the end",
    "worst_gain": "the same of the context that gained least; positive: better than the "
    "base on all of them",
    "passed": "the least gain over the base of any context passed so far, at the end of "
    "any context",
    "general": "loss on general text that nobody trains on, at the end",
    "general_rise": "the same minus that of the base",
    "worst_client": "the highest loss of a client at the end, contexts weighed as its "
    "data",
    "bytes_kept": "bytes that one client keeps between its visits",
    "bytes_up": "bytes that all clients sent in the whole run",
    "bytes_down": "bytes that all clients received in the whole run",
    "bytes_round": "bytes that travelled in a round, both ways, on average",
    "local_steps": "local steps of all clients in the whole run",
    "tokens": "places of rows that went through the clients' steps, replayed ones and "
    "those of a public phase not counted",
    "tokens_per_second": "tokens / seconds",
    "rounds": "rounds",
    "seconds": "wall time of the arm, all seeds side by side, compilation and evaluation "
    "included",
}


def values(e: Any, setup: "Setup", arm: "Arm", mine: dict[str, Any]) -> dict[str, Any]:
    """Every metric of an arm, [S] each."""
    where = metrics.rows_of(mine["at"], setup.ends)
    one = partial(_one_seed, e.evaluation.forgetting)
    found = jax.jit(jax.vmap(one, (0, None)))(mine["nats"], where)
    last = np.nanmax(mine["per_client"][:, -1], axis=1)
    up, down = arm.travelled(e.stream.clients)
    steps = metrics.local_steps(arm.history.rounds)
    length = setup.stream.data["tokens"].shape[1]
    tokens = steps * (setup.stream.batch_size * length)
    rounds, seeds = mine["loss"].shape[1], len(e.seeds)
    general = mine.get("general", np.full((seeds, 1), np.nan))
    fixed = {
        "general": general[:, -1],
        "general_rise": general[:, -1] - general[:, 0],
        "worst_client": last,
        "bytes_kept": np.full(seeds, arm.kept),
        "bytes_up": up,
        "bytes_down": down,
        "bytes_round": (up + down) / rounds,
        "local_steps": steps,
        "tokens": tokens,
        "tokens_per_second": tokens.sum() / arm.seconds * np.ones(seeds),
        "rounds": np.full(seeds, rounds),
        "seconds": np.full(seeds, arm.seconds),
    }
    return {k: np.asarray(v, float) for k, v in {**found, **fixed}.items()}


def _one_seed(convention: str, A: jax.Array, where: jax.Array) -> dict[str, jax.Array]:
    L = A[where]
    k = A.shape[1]
    rise = metrics.loss_rise(L)
    gained = A[0] - L[-1]
    met = jnp.arange(len(where))[:, None] >= jnp.arange(k)[None, :]
    return {
        "average": jnp.mean(L[-1]),
        "perplexity": jnp.exp(jnp.mean(L[-1])),
        "forgetting": metrics.loss_forgetting(L, convention),
        "rise": jnp.sum(rise) / max(k - 1, 1),
        "rise_first": rise[0],
        "gain": jnp.mean(gained),
        "worst_gain": jnp.min(gained),
        "passed": jnp.min(jnp.where(met, A[0][None] - L, jnp.inf)),
    }


SHOWN = {  # Of the command's table.
    "nats/token": lambda a: _plain(a["average"]),
    "forgetting": lambda a: _plain(a["forgetting"]),
    "first context +": lambda a: _plain(a["rise_first"]),
    "worst gain": lambda a: _plain(a["worst_gain"]),
    "general +": lambda a: _plain(a["general_rise"]),
    "kB/round": lambda a: f"{a['bytes_round']['mean'] / 1e3:.0f}",
    "tokens/s": lambda a: f"{a['tokens_per_second']['mean']:.0f}",
    "seconds": lambda a: f"{a['seconds']['mean']:.0f}",
}


def _plain(value: dict[str, float]) -> str:
    spread = f" ± {value['std']:.3f}" if value["std"] else ""
    return f"{value['mean']:.3f}{spread}"
