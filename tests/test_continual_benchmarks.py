"""The continual benchmarks: files that load, runs that resume, verdicts."""

import importlib
import sys
from pathlib import Path

import pytest

from fedcl import experiment

FOLDER = Path(__file__).parents[1] / "benchmarks" / "continual"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    sys.modules.pop("run")


@pytest.fixture
def tables(run):
    yield importlib.import_module("tables")
    sys.modules.pop("tables")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("experiments/*.toml")), ids=str)
def test_every_experiment_file_can_be_run_from_tfds_or_files(file):
    given = experiment.load(str(file), ["data.source='tfds'"])
    assert given.name == file.stem and given.data.path in ("mnist", "fashion_mnist")


def test_published_values_belong_to_arms(run):
    for row in run.read(FOLDER / "published.csv"):
        file = FOLDER / "experiments" / f"{row['experiment']}.toml"
        assert row["arm"] in experiment.load(str(file)).arms, row
        assert row["status"] in ("verified", "mean", "recalled")


def test_runs_go_on_where_they_were(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "experiments").mkdir()
    tiny = (Path(__file__).parent / "tiny.toml").read_text()
    tiny = tiny.replace("[public]\nfraction = 0.1\nsteps = 5\n", "")
    (tmp_path / "experiments" / "tiny.toml").write_text(
        tiny + '[data]\nsource = "npz"\npath = "x"\nclasses = 10\n'
    )
    from fedcl import streams

    columns = streams.digits()
    file = tmp_path / "digits.npz"
    importlib.import_module("numpy").savez(file, **columns)
    assert [*run.pending("tiny", range(2), ["replay"])] == [("replay", [0, 1])]
    row, other = run.run_one("tiny", "replay", [0, 1], {"x": str(file)})
    assert other["seed"] == 1 and row["average"] != other["average"]
    run.append("tiny", other)
    assert [*run.pending("tiny", range(2), ["replay"])] == [("replay", [0])]
    (kept,) = run.rows("tiny")
    assert list(kept) == list(run.COLUMNS)
    assert 0 <= float(kept["average"]) <= 1 and kept["seed"] == "1"


def test_one_seed_has_its_own_data(run):
    table = run.table_of("vandeven_domain")
    assert [*run.pending("vandeven_domain", range(20, 22), ["er"])] == [
        ("er", [20]),
        ("er", [21]),
    ]
    first, other = (run.overrides([s], None, table) for s in (0, 3))
    assert "stream.seed=3" in other and not any("order" in o for o in first)
    (order,) = (o for o in other if o.startswith("stream.order="))
    given = experiment.load(str(FOLDER / "experiments/vandeven_domain.toml"), [order])
    assert sorted(given.stream.order) == [*range(10)] != given.stream.order


def test_verdicts(tables):
    ours = tables.mean([0.80, 0.82, 0.84])
    assert (round(ours.value, 2), round(ours.error, 2)) == (82.0, 1.15)
    told = lambda value, error=0.0, points=0.0: tables.verdict(
        ours, value, error, points
    )
    assert told(84.0) == "within" and told(80.0) == "within"
    assert told(85.0) == "below by 3.00" and told(79.0) == "better"
    assert told(85.0, 1.0) == "within" and told(85.0, points=3.0) == "within"
    assert str(tables.mean([0.5])) == "50.00"
