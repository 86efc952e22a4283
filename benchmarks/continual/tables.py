"""Prints every result beside its published value, and writes RESULTS.md.

    python benchmarks/continual/tables.py

The verdict compares means. "Within": no further from the published value than two
standard errors of both means together, where a published mean without one counts as
exact; for the one-epoch tables, than two points; for Avalanche's targets, than three, the
tolerance of that library's own tests. "Better" or "below": further than that.
Published values in parentheses are recalled: they could not be checked against the paper
or its repository. The others were, in the source that published.csv names, though for
some not their error, which then stands in parentheses.
"""

import math
from pathlib import Path
from typing import NamedTuple

import run

HERE = Path(__file__).parent
TITLES = {
    "vandeven": "Split-MNIST in three scenarios (van de Ven et al., 2022)",
    "der": "One epoch, small buffers (Buzzega et al., 2020)",
    "mnist360": "MNIST-360, general continual learning (Buzzega et al., 2020)",
    "avalanche": "Targets of Avalanche's continual-learning-baselines",
    "fashion": "Split-Fashion-MNIST: no published targets; ours",
    "federated": "Federated: ten clients, ours",
}

CENTRAL = ["arm", "published", "ours", "runs", "verdict", "forgetting", "date"]
FEDERATED = (
    "arm",
    "accuracy",
    "forgetting",
    "worst client",
    "spread over clients",
    "kept by a client",
    "sent by all",
    "runs",
    "date",
)
POINTS = {"der": 2.0, "mnist360": 2.0, "avalanche": 3.0}


class Mean(NamedTuple):
    """A mean over runs in percent, its standard error, and how many there were."""

    value: float
    error: float
    runs: int

    def __str__(self) -> str:
        error = f" ± {self.error:.2f}" if self.runs > 1 else ""
        return f"{self.value:.2f}{error}"


def mean(values: list[float]) -> Mean:
    """The mean of fractions, in percent."""
    n, m = len(values), sum(values) / len(values)
    spread = sum((v - m) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return Mean(100 * m, 100 * math.sqrt(spread / n), n)


def published() -> dict[tuple[str, str], dict[str, str]]:
    """The published values by experiment and arm."""
    return {(r["experiment"], r["arm"]): r for r in run.read(HERE / "published.csv")}


def verdict(ours: Mean, value: float, error: float, points: float) -> str:
    """Whether ours is near the published mean, or better."""
    own = ours.error if ours.runs > 1 else 0.0
    near = max(2 * math.hypot(own, error), points)
    gap = ours.value - value
    if abs(gap) <= near:
        return "within"
    return "better" if gap > 0 else f"below by {-gap:.2f}"


def lines(name: str, targets: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    """The table of one experiment."""
    found = run.rows(name)
    federated = name.startswith("federated")
    columns = FEDERATED if federated else CENTRAL
    out = [f"### {name}", "", f"`python benchmarks/continual/run.py {name}`", ""]
    out += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in dict.fromkeys(r["arm"] for r in found):
        mine = [r for r in found if r["arm"] == arm]
        ours = mean([float(r["average"]) for r in mine])
        forgot = _forgotten([r["forgetting"] for r in mine])
        if federated:
            cells = [ours, forgot, *_spread(mine), ours.runs]
        else:
            points = POINTS.get(name.split("_")[0], 0.0)
            told, judged = _target(targets.get((name, arm)), ours, points)
            cells = [told, ours, ours.runs, judged, forgot]
        row = [arm, *cells, max(r["date"] for r in mine)]
        out.append(f"| {' | '.join(map(str, row))} |")
    return [*out, ""]


def _forgotten(values: list[str]) -> str:
    """Mean forgetting in points; "—" where contexts ended without an evaluation."""
    return f"{mean([float(v) for v in values]).value:.1f}" if all(values) else "—"


def _spread(rows: list[dict[str, str]]) -> list[str]:
    """What clients have of it, and what it costs them."""
    of = lambda key: sum(float(r[key]) for r in rows) / len(rows)
    kept, sent = of("bytes_kept") / 1e3, of("bytes_up") / 1e6
    worst, std = 100 * of("worst_client"), 100 * of("client_std")
    return [f"{worst:.1f}", f"{std:.1f}", f"{kept:.0f} kB", f"{sent:.0f} MB"]


def _target(row: dict[str, str] | None, ours: Mean, points: float) -> tuple[str, str]:
    if row is None:
        return "—", "—"
    value, error = float(row["value"]), float(row["sem"] or 0)
    spread = f"± {error:.2f}" if error else ""
    told = {
        "verified": f"{value:.2f} {spread}",
        "mean": f"{value:.2f} ({spread})",
        "recalled": f"({f'{value:.2f} {spread}'.strip()})",
    }[row["status"]]
    return told.strip(), verdict(ours, value, error, points)


def main() -> None:
    targets, names = published(), [n for n in run.experiments() if run.rows(n)]
    out = ["# Results", "", "Accuracy in percent: mean ± standard error over runs.", ""]
    out += [__doc__.split("\n\n", 2)[2].strip(), ""]
    for prefix, title in TITLES.items():
        mine = [n for n in names if n.startswith(prefix)]
        if mine:
            out += [f"## {title}", ""]
        for name in mine:
            out += lines(name, targets)
    text = "\n".join(out)
    (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
