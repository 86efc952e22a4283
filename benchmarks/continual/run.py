"""Runs the continual-learning experiments, one arm and seed at a time, and resumes.

    python benchmarks/continual/run.py der_smnist --seeds 5 --data mnist=DIR
    python benchmarks/continual/run.py                      # everything, from TFDS

Each run appends one line to `results/NAME.csv`; a line that is there is not run again,
so that a run that was stopped goes on where it was. A run that diverges is told and left
out. DIR holds the four IDX files of
MNIST (or of Fashion-MNIST, `--data fashion_mnist=DIR`); without it the same experiment
reads the set of that name from TensorFlow Datasets. The seed changes everything that is
drawn: data partition, order of the classes, permutations, rotations, initialisation and
batches. An experiment whose file lists several seeds runs them side by side in one program
instead, on one partition.
"""

import argparse
import csv
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COLUMNS = (
    "arm",
    "seed",
    "average",
    "forgetting",
    "average_incremental",
    "min_acc",
    "wc_acc",
    "worst_client",
    "client_std",
    "bytes_kept",
    "bytes_up",
    "seconds",
    "date",
)


OF_CONTEXTS = ("forgetting", "average_incremental", "min_acc", "wc_acc")


def experiments() -> list[str]:
    """The names of all experiment files."""
    return sorted(p.stem for p in (HERE / "experiments").glob("*.toml"))


def rows(name: str) -> list[dict[str, str]]:
    """What has been run of an experiment."""
    path = HERE / "results" / f"{name}.csv"
    return read(path) if path.exists() else []


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table_of(name: str) -> dict:
    """The experiment file."""
    import tomllib

    return tomllib.loads((HERE / "experiments" / f"{name}.toml").read_text())


def overrides(seeds: list[int], directory: str | None, table: dict) -> list[str]:
    """What turns the file into the run of these seeds."""
    changed = [f"seeds={seeds}"]
    if not together(table):
        changed += drawn(seeds[0], table)
    if directory is None:
        return [*changed, "data.source='tfds'"]
    return [*changed, f"data.path='{directory}'"]


def together(table: dict) -> bool:
    """Whether the seeds share their data and run in one program."""
    return len(table["seeds"]) > 1


def drawn(seed: int, table: dict) -> list[str]:
    """The data of one seed."""
    changed = [f"stream.seed={seed}", f"data.seed={seed}"]
    if table["stream"].get("domains", {}).get("kind") in ("permutations", "rotations"):
        changed.append(f"stream.domains.seed={seed}")
    if seed and table["name"].startswith("vandeven"):
        # As the authors' data/load.py, where seed 0 alone keeps the classes in order.
        order = np.random.default_rng(seed).permutation(table["data"]["classes"])
        changed.append(f"stream.order={order.tolist()}")
    return changed


def pending(
    name: str, seeds: range, only: list[str]
) -> Iterator[tuple[str, list[int]]]:
    """The arms and seeds that have not been run, all arms of a seed before the next."""
    table = table_of(name)
    done = {(row["arm"], int(row["seed"])) for row in rows(name)}
    for group in [[*seeds]] if together(table) else [[s] for s in seeds]:
        for arm in table["arms"]:
            missing = [s for s in group if (arm, s) not in done]
            if missing and (not only or arm in only):
                yield arm, missing


def run_one(
    name: str, arm: str, seeds: list[int], data: dict[str, str]
) -> list[dict[str, object]]:
    """One line of results for each seed."""
    from fedcl import experiment

    table = table_of(name)
    given = overrides(seeds, data.get(table["data"]["path"]), table)
    whole = experiment.load(str(HERE / "experiments" / f"{name}.toml"), given)
    one = whole.model_copy(update={"arms": {arm: whole.arms[arm]}})
    start = time.perf_counter()
    found = experiment.run(one).summary["arms"][arm]
    seconds = f"{(time.perf_counter() - start) / len(seeds):.1f}"
    unseen = whole.evaluation.every > whole.stream.rounds_per_context
    skipped = OF_CONTEXTS if unseen else ()  # Contexts ended without an evaluation.
    known = [k for k in COLUMNS if k in found and k not in skipped]
    fixed = {"arm": arm, "date": datetime.date.today().isoformat()}
    return [
        {k: f"{found[k]['each'][i]:.6g}" for k in known}
        | {**fixed, "seed": seed, "seconds": seconds}
        for i, seed in enumerate(seeds)
    ]


def append(name: str, row: dict[str, object]) -> None:
    """Adds a line to the experiment's results."""
    path = HERE / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="experiments; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR", help="IDX files"
    )
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "fedcl-xla"))
    given = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", given.cache)
    from fedcl import rounds  # After the variable: JAX reads it when imported.

    data = dict(pair.split("=", 1) for pair in given.data)
    for name in given.names or experiments():
        for arm, seeds in pending(name, range(given.seeds), given.arms):
            try:
                found = run_one(name, arm, seeds, data)
            except rounds.FaultError as error:
                print(f"{name} {arm} seeds {seeds} diverged: {error}", flush=True)
                continue
            for row in found:
                append(name, row)
                print(
                    name, arm, row["seed"], row["average"], row["seconds"], flush=True
                )


if __name__ == "__main__":
    main()
