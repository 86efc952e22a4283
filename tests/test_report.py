"""The report: whole, offline, and in one palette."""

import base64
import re

import numpy as np
import pytest

from fedcl import _experiment_results as _results
from fedcl import report

ARMS = ["fedavg", "replay", "a-third_arm"]


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    at = np.arange(0, 7, 2)
    seen = np.zeros((7, 2), bool)
    seen[1:, 0], seen[4:, 1] = True, True
    history = {
        "seeds": np.array([0, 1]),
        "ends": np.array([3, 6]),
        "seen": seen,
        "stream/table": np.eye(2, dtype=np.float32),
        "stream/clock": (np.arange(6)[:, None] > [2, 3]).astype(np.int32),
    }
    one = {"mean": 0.5, "std": 0.1}
    for arm in ARMS:
        history |= {
            f"{arm}/at": at,
            f"{arm}/accuracy": rng.uniform(size=(2, 4, 2)),
            f"{arm}/per_client": rng.uniform(size=(2, 4, 2)),
        }
    summary = {
        "name": "made <up>",
        "about": "for a test",
        "versions": {"fedcl": "0", "jax": "0"},
        "seeds": [0, 1],
        "clients": 2,
        "cohort": 2,
        "contexts": 2,
        "forgetting": "chaudhry",
        "meaning": _results.MEANING,
        "arms": {a: dict.fromkeys(_results.MEANING, one) for a in ARMS},
    }
    return summary, history


def test_report_is_self_contained(run, tmp_path):
    page = report.write(tmp_path, *run).read_text("utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "http" not in page and "<script" not in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == len(report.CAPTIONS) == 6
    for name in report.CAPTIONS:
        there = (tmp_path / f"{name}.png").read_bytes()
        assert there in [base64.b64decode(p) for p in pictures]
    assert all(f"{arm}</td>" in page for arm in ARMS)
    assert "made &lt;up&gt;" in page and "made <up>" not in page


def test_rows_of_R_in_the_table(run):
    summary, history = run
    lines = _results._csv(summary, history).splitlines()
    assert lines[0] == "arm,seed,after,context,accuracy"
    assert len(lines) == 1 + 3 * 2 * 2 * 2
    # Context 0 ended with round 3; the first evaluation after that is of round 4.
    value = history["fedavg/accuracy"][0, 2, 1]
    assert f"fedavg,0,0,1,{value:.6f}" in lines


def test_every_figure_has_labelled_axes(run):
    figures = report.draw(*run)
    assert set(figures) == set(report.CAPTIONS)
    for name in ("average", "clients", "bytes", "stream"):
        axes = figures[name].axes[0]
        assert axes.get_ylabel() or axes.get_yticklabels(), name
    assert figures["average"].axes[0].get_xlabel() == "round"
    shown = [t.get_text() for t in figures["matrix"].axes[0].texts]
    R = 100 * _results.matrix(run[1], "fedavg").mean(0)
    assert shown == [f"{v:.0f}" for v in R.ravel()]


def test_an_arm_keeps_its_colour(run):
    figure = report.draw(*run)["average"]
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    for arm in ARMS:
        assert drawn[arm] == report.color(ARMS, arm)
    assert len({report.color(ARMS, a) for a in ARMS}) == 3


def test_rebuilding_needs_a_finished_run(tmp_path, run):
    summary, history = run
    assert _results.write(tmp_path, summary, history) == ""
    before = (tmp_path / "report.html").read_text("utf-8")
    (tmp_path / "report.html").unlink()
    report.rebuild(tmp_path)
    strip = lambda s: re.sub(r"base64,[A-Za-z0-9+/=]+", "", s)
    assert strip((tmp_path / "report.html").read_text("utf-8")) == strip(before)
