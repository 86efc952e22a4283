"""What an experiment leaves behind: numbers, tables and files."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fedcl import _experiment_nats as _nats
from fedcl import _experiment_study as _study
from fedcl import metrics, rounds
from fedcl.checkpoint import CheckpointError

if TYPE_CHECKING:
    from fedcl._experiment_config import Experiment
    from fedcl._experiment_run import Setup

ROOM = 50_000_000  # Bytes that must be free.
MEANING = {
    "average": "mean accuracy over contexts at the end",
    "average_incremental": "mean over t of the mean accuracy on the first t contexts",
    "forgetting": "see the setting evaluation.forgetting",
    "bwt": "backward transfer: last minus when learnt, over earlier contexts",
    "fwt": "forward transfer: just before it is learnt, minus chance",
    "learning": "accuracy on each context when it was just learnt",
    "anytime": "mean over evaluations of the accuracy on contexts met so far",
    "min_acc": "each earlier context's lowest accuracy after it was learnt",
    "wc_acc": "worst-case accuracy: the last context now, earlier ones at their worst",
    "worst_client": "lowest of the clients' accuracies at the end, each on test data "
    "weighed as its own",
    "worst_decile": "mean of the lowest tenth of the clients' accuracies",
    "client_std": "standard deviation of the clients' accuracies",
    "bytes_kept": "bytes that one client keeps between its visits",
    "bytes_up": "bytes that all clients sent in the whole run",
    "bytes_down": "bytes that all clients received in the whole run",
    "local_steps": "local steps of all clients in the whole run",
    "rounds": "rounds",
    "public_steps": "steps that the server took on its own rows",
    "rounds_to_target": "rounds until the mean accuracy over all contexts reached "
    "evaluation.target; all rounds where it never did",
    "reached": "share of the seeds that reached it",
    "seconds": "wall time of the arm, all seeds side by side, compilation included",
}

BIAS = {  # Of arms whose server is `fedit`.
    "lora_bias": "how far the mean of the adapters' factors is from the mean of their "
    "products, as a share of it; mean over the rounds in which somebody reported",
}

# What an evaluation calls the metric.
COLUMN = {"accuracy": "accuracy", "nats": "loss"}


class Arm(NamedTuple):
    """What one arm recorded."""

    history: rounds.History
    sent: metrics.Communication
    summed: dict[str, metrics.Sums]
    kept: int
    seconds: float

    def travelled(self, clients: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that all clients sent, and received, in the whole run; [S] each."""
        told = self.history.rounds
        count = lambda key: told[key].sum(axis=(1, 2))
        up, down = count("reported") * self.sent.up, count("trained") * self.sent.down
        for name, one in self.summed.items():
            took = told[f"{name}/clients"]
            up = up + took.sum(axis=1) * one.up
            down = down + (took > 0).sum(axis=1) * clients * one.down
        return up, down


def prepare(out: Path, e: "Experiment", resume: bool) -> Path:
    """Makes the directory and writes experiment.toml, before anything is computed."""
    from fedcl.experiment import to_toml

    out = out.absolute()
    used = (out / "summary.json").exists() or any(out.glob("checkpoints/*/steps/*"))
    if used and not resume:
        raise CheckpointError(
            f"{out} already holds a run. Continue it with --resume (resume=True), or "
            "choose another directory with --out."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        _whole(out / "experiment.toml", to_toml(e).encode())
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}. Choose a directory "
            "you may write to with --out."
        ) from error
    if free < ROOM:
        raise CheckpointError(
            f"{out} is on a disk with {free / 1e6:.0f} MB free; a run needs "
            f"{ROOM / 1e6:.0f} MB. Choose another with --out."
        )
    return out


def collect(
    e: "Experiment", setup: "Setup", arms: dict[str, Arm]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The summary and the history of all arms."""
    import fedcl

    history: dict[str, np.ndarray] = {
        "seeds": np.asarray(e.seeds),
        "ends": setup.ends,
        "seen": setup.seen,
        "stream/table": np.asarray(setup.stream.table),
        "stream/clock": np.asarray(setup.stream.clock),
    }
    summary: dict[str, Any] = {
        "name": e.name,
        "about": e.about,
        "versions": {"fedcl": fedcl.__version__, "jax": jax.__version__},
        "seeds": list(e.seeds),
        "clients": e.stream.clients,
        "cohort": e.federation.cohort,
        "contexts": setup.stream.num_contexts,
        "forgetting": e.evaluation.forgetting,
        "metric": setup.metric,
        "card": setup.card or {},
        "meaning": dict(_nats.MEANING if setup.metric == "nats" else MEANING),
        "arms": {},
    }
    chance = 1 / max(setup.table.classes, 1)
    for name, arm in arms.items():
        mine = _columns(arm)
        history |= {f"{name}/{k}": v for k, v in mine.items()}
        if setup.metric == "nats":
            values = _nats.values(e, setup, arm, mine)
        else:
            values = _values(e, setup, arm, mine, chance)
            values["public_steps"] += _study.before(e, e.arms[name])
        if "lora_bias" in mine:
            values["lora_bias"] = _while_heard(mine["lora_bias"], mine["reported"])
            summary["meaning"] |= BIAS
        summary["arms"][name] = {k: _over_seeds(v) for k, v in values.items()}
    return summary, history


def _columns(arm: Arm) -> dict[str, np.ndarray]:
    told, seen = arm.history.rounds, arm.history.evaluations
    reported = told["reported"].astype(np.float32)
    total = np.maximum(reported.sum(axis=-1), 1)
    zeros = np.zeros(reported.shape[:2])
    nats = {"nats": seen["loss"]} if "loss" in seen else {"accuracy": seen["accuracy"]}
    if "general" in seen:
        nats["general"] = seen["general"]
    also = ("lora_bias", "validation/loss")
    more: dict[str, np.ndarray] = {k: told[k] for k in also if k in told}
    return {
        "at": arm.history.at,
        **nats,
        "per_client": seen["per_client"],
        "loss": (told["loss"] * reported).sum(axis=-1) / total,
        "reported": reported.sum(axis=-1),
        "trained": told["trained"].sum(axis=-1),
        "public_steps": told.get("public/steps", zeros).sum(axis=-1),
        "bytes": np.asarray(arm.sent),
        **more,
    }


def _while_heard(told: np.ndarray, reported: np.ndarray) -> np.ndarray:
    """The mean over the rounds in which somebody reported, [S] of [S, R]."""
    heard = reported > 0
    return np.where(heard, told, 0).sum(axis=1) / np.maximum(heard.sum(axis=1), 1)


def _values(e, setup: "Setup", arm: Arm, mine, chance: float) -> dict[str, np.ndarray]:
    """Every metric of an arm, [S] each."""
    seen = setup.seen[mine["at"]]
    where = metrics.rows_of(mine["at"], setup.ends)
    last = mine["per_client"][:, -1]
    rule = e.evaluation.forgetting
    values = _all_seeds(mine["accuracy"], last, where, seen, chance, convention=rule)
    seeds, (up, down) = len(e.seeds), arm.travelled(e.stream.clients)
    fixed = {
        "bytes_kept": np.full(seeds, arm.kept),
        "bytes_up": up,
        "bytes_down": down,
        "local_steps": metrics.local_steps(arm.history.rounds),
        "rounds": np.full(seeds, mine["loss"].shape[1]),
        "public_steps": mine["public_steps"],
        "seconds": np.full(seeds, arm.seconds),
    }
    fixed |= _study.target(e, mine["at"], mine["accuracy"])
    return {k: np.asarray(v, float) for k, v in {**values, **fixed}.items()}


@partial(jax.jit, static_argnames="convention")
def _all_seeds(A, per_client, where, seen, chance, *, convention: str):
    one = partial(_one_seed, convention)
    return jax.vmap(one, (0, 0, None, None, None))(A, per_client, where, seen, chance)


def _one_seed(convention: str, A, per_client, where, seen, chance):
    R = A[where]
    k = A.shape[1]
    learnt = where[:k]
    spread = metrics.spread(per_client)
    return {
        "average": metrics.average_accuracy(R),
        "average_incremental": metrics.average_incremental(R),
        "forgetting": metrics.forgetting(R, convention),
        "bwt": metrics.backward_transfer(R),
        "fwt": metrics.forward_transfer(R, chance),
        "learning": metrics.learning_accuracy(R),
        "anytime": metrics.anytime_average(A, seen),
        "min_acc": metrics.min_acc(A, learnt),
        "wc_acc": metrics.wc_acc(A, learnt),
        "worst_client": spread.worst,
        "worst_decile": spread.worst_decile,
        "client_std": spread.std,
    }


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    each = values.tolist()
    return {"mean": float(values.mean()), "std": float(values.std()), "each": each}


def matrix(history: dict[str, np.ndarray], arm: str) -> np.ndarray:
    """R of every seed, [S, T, K]."""
    rows = np.asarray(metrics.rows_of(history[f"{arm}/at"], history["ends"]))
    return history[f"{arm}/{metric_of(history)}"][:, rows]


def metric_of(history: dict[str, np.ndarray]) -> str:
    """What the history holds of each context."""
    return "nats" if any(key.endswith("/nats") for key in history) else "accuracy"


def write(out: Path, summary: dict[str, Any], history: dict[str, np.ndarray]) -> str:
    """Writes everything; returns why that failed, or ""."""
    from fedcl import report

    try:
        _whole(out / "summary.json", json.dumps(summary, indent=2).encode())
        _whole(out / "R.csv", _csv(summary, history).encode())
        with open(out / ".history.npz", "wb") as file:
            np.savez_compressed(file, **history)  # type: ignore[arg-type]
        os.replace(out / ".history.npz", out / "history.npz")
        report.write(out, summary, history)
    except OSError as error:
        return f"{out} could not be written: {error.strerror or error}"
    return ""


def write_grid(out: Path, summary: dict[str, Any]) -> str:
    """Writes the table of all points; returns why that failed, or ""."""
    from fedcl import _experiment_grid as _grid

    try:
        _whole(out / "grid.csv", _grid.csv(summary).encode())
        _whole(out / "grid.md", _grid.markdown(summary).encode())
        _whole(out / "summary.json", json.dumps(summary, indent=2).encode())
    except OSError as error:
        return f"{out} could not be written: {error.strerror or error}"
    return ""


def read(out: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write` wrote.

    Raises:
      CheckpointError: if the run did not end, or its files are damaged.
    """
    try:
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        with np.load(out / "history.npz", allow_pickle=False) as columns:
            return summary, {k: columns[k] for k in columns.files}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{out} holds no finished run: {error}. Finish it with fedcl run "
            f"{out / 'experiment.toml'} --out {out} --resume."
        ) from error


def _csv(summary: dict[str, Any], history: dict[str, np.ndarray]) -> str:
    lines = [f"arm,seed,after,context,{metric_of(history)}"]
    for arm in summary["arms"]:
        for (s, t, k), value in np.ndenumerate(matrix(history, arm)):
            lines.append(f"{arm},{summary['seeds'][s]},{t},{k},{value:.6f}")
    return "\n".join(lines) + "\n"


def _whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)
