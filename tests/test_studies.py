"""The studies that come with fedcl: grids, switches by arm, starts, encoders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedcl import _experiment_encoder as encoder
from fedcl import _experiment_grid as grid
from fedcl import _experiment_run as _run
from fedcl import _experiment_study as study
from fedcl import experiment, tree

BAD = [
    ("switch-study", "public.fraction=0.0", ["arms.always.switch", "public.fraction"]),
    ("switch-study", "public.every=2", ["arms.never.switch", "public.every"]),
    ("switch-study", "arms.never.switch=[{method='evry', period=2}]", ['"every"']),
    ("switch-study", "arms.never.switch=[{method='every'}]", ["every needs period"]),
    ("switch-study", "grid={'federation.cohort'=[99]}", ["cohort-99", "given 99"]),
    ("switch-study", "grid={'public.mismatch'=[]}", ["grid.public.mismatch", "1 item"]),
    ("init-study", "public.steps=0", ["arms.random.start", "public.steps"]),
    ("init-study", "public.mismatch=1.0", ["leaves the server no class"]),
    ("encoder-topics", "data.source=digits", ["data.labelled", '"labelled"']),
    ("encoder-topics", "data.labelled.reader.path='x'", ["reader", "not both"]),
    ("init-study", "model={kind='encoder'}", ['"encoder"', "data.labelled"]),
]


@pytest.mark.parametrize(("name", "override", "fragments"), BAD)
def test_bad_settings_are_told(name, override, fragments):
    with pytest.raises(experiment.ConfigError) as e:
        experiment.load(name, [override])
    assert all(f in str(e.value) for f in fragments), str(e.value)


def test_a_grid_has_every_combination():
    given = {
        "a": {"b": 0, "c": 1},
        "grid": {"a.b": [1, 2], "d": [{"kind": "x", "y": 3}]},
    }
    found = dict(grid.tables(given))
    assert list(found) == ["b-1_d-x-3", "b-2_d-x-3"]
    assert found["b-2_d-x-3"] == {"a": {"b": 2, "c": 1}, "d": {"kind": "x", "y": 3}}


def test_a_grid_reads_back_to_the_same():
    given = experiment.load("switch-study", preset="tiny")
    assert experiment.load(experiment.resolved(given)) == given


@pytest.mark.parametrize(("mismatch", "there"), [(0.0, 10), (0.5, 5), (0.85, 2)])
def test_the_server_lacks_a_share_of_the_classes(mismatch, there):
    e = experiment.load("init-study", [f"public.mismatch={mismatch}"])
    y = np.arange(30) % 10
    rows = study.public_rows(e, {"x": np.arange(30.0), "y": y}, None)
    assert set(rows["y"]) == set(range(there))
    np.testing.assert_array_equal(rows["x"] % 10, rows["y"])


@pytest.mark.parametrize(
    ("mismatch", "turns"), [(0.0, (0, 1)), (0.5, (0, 3)), (1.0, (2, 3))]
)
def test_the_server_lacks_a_share_of_the_rotations(mismatch, turns):
    """Against quarter turns of NumPy: a foreign one is half a circle away."""
    e = experiment.load("switch-study", [f"public.mismatch={mismatch}"])
    x = np.random.default_rng(0).random((5, 6, 6)).astype(np.float32)
    rows = study.public_rows(e, {"x": x, "y": np.zeros(5)}, [0, 90])
    wanted = [np.rot90(x[i], turns[i % 2]) for i in range(5)]
    np.testing.assert_allclose(rows["x"], wanted, atol=1e-6)


def test_rounds_to_a_target():
    e = experiment.load("switch-study", ["evaluation.target=0.5"])
    accuracy = np.asarray([[[0, 0.2], [0.4, 0.6], [0.9, 0.9]], [[0.1, 0.1]] * 3])
    found = study.target(e, np.asarray([0, 3, 6]), accuracy)
    assert found["rounds_to_target"].tolist() == [3, 6]
    assert found["reached"].tolist() == [True, False]


def only(name, arms, overrides=()):
    given = experiment.load(name, overrides, preset="tiny")
    return given.model_copy(update={"arms": {k: given.arms[k] for k in arms}})


def test_switches_by_arm(tmp_path):
    """Public steps of three rules over eight rounds, and a grid's files."""
    given = only("switch-study", ["never", "budget", "conflict"])
    result = experiment.run(given, tmp_path / "out")
    (point,) = result.summary["points"].values()
    steps = {
        arm: values["public_steps"]["mean"] for arm, values in point["arms"].items()
    }
    assert (steps["never"], steps["budget"]) == (0, 160)
    assert 0 < steps["conflict"] <= 160 and steps["conflict"] % 20 == 0
    lines = (tmp_path / "out" / "grid.csv").read_text().splitlines()
    assert lines[1].startswith("mismatch-0.5,never,") and len(lines) == 4
    assert (tmp_path / "out" / "grid.md").read_text().count("| mismatch-0.5 |") == 3
    assert (tmp_path / "out" / "mismatch-0.5" / "report.html").exists()
    again = experiment.run(given, tmp_path / "out", resume=True)
    assert again.summary == result.summary


def test_starts_by_arm():
    """Before round 0 only the pre-trained arm has learnt; then both go on."""
    small = ["model={kind='mlp', hidden=[8]}", "public.learning_rate=0.03"]
    small += ["public.steps=40"]
    result = experiment.run(only("init-study", ["random", "pretrained"], small))
    (point,) = result.summary["points"].values()
    steps = {
        arm: values["public_steps"]["mean"] for arm, values in point["arms"].items()
    }
    assert steps == {"random": 0, "pretrained": 40}
    first = {k: v[0, 0] for k, v in result.history.items() if k.endswith("/accuracy")}
    drawn, trained = (float(x[0]) for x in first.values())
    assert trained > drawn + 0.1


@pytest.fixture
def news(tmp_path):
    """Twelve documents of each topic, one of them with two topics, one empty."""
    topics = experiment.load("encoder-topics").data.labelled.classes
    documents = [
        {"title": f"{t} {i}", "body": t * 3, "topics": [t]}
        for i in range(12)
        for t in topics
    ]
    documents[0]["topics"] = topics[:2]
    documents[1] |= {"title": "", "body": ""}
    (tmp_path / "reuters-000.json").write_text(json.dumps(documents))
    return tmp_path, topics


def of(news, *more):
    return [f"data.labelled.path={news[0]}", *more]


def test_documents_of_one_class_are_chosen(news):
    e = experiment.load(
        "encoder-topics", of(news, "data.labelled.per_class=11"), "tiny"
    )
    found = encoder.rows(e)
    assert np.bincount(found["y"]).tolist() == [11] * 10
    assert found["x"].shape == (110, 16) and found["x"].dtype == np.float32


def test_features_are_computed_once(news, monkeypatch):
    cache = f"data.labelled.reader.cache={news[0] / 'kept'}"
    e = experiment.load("encoder-topics", of(news, cache), "tiny")
    first = encoder.rows(e)
    monkeypatch.setattr(encoder, "features", lambda base, x: 1 / 0)
    np.testing.assert_array_equal(encoder.rows(e)["x"], first["x"])
    other = of(news, cache, "data.labelled.reader.seed=1")
    with pytest.raises(ZeroDivisionError):
        encoder.rows(experiment.load("encoder-topics", other, "tiny"))


def test_documents_that_are_not_there(tmp_path):
    e = experiment.load("encoder-topics", [f"data.labelled.path={tmp_path}"], "tiny")
    with pytest.raises(ValueError, match=r"holds no reuters-\*.json.*npm package"):
        encoder.rows(e)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"title": "\xff"}]', r"reuters-001.json is not UTF-8: byte 12 is 0xff"),
        (b'[{"title": ', r"reuters-001.json is not JSON: Expecting value at line 1"),
        (b'[{"title": "a"}, "b"]', r"reuters-001.json\[1\] is 'b'; it must be a map"),
        (b'[{"body": 3}]', r"reuters-001.json\[0\] is {'body': 3}.* in title, body"),
    ],
)
def test_documents_that_cannot_be_read_are_named(news, content, message):
    (news[0] / "reuters-001.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        encoder.rows(experiment.load("encoder-topics", of(news), "tiny"))


def test_the_encoder_itself_is_adapted_as_the_file_says(news):
    """With the very settings in its comment."""
    shipped = Path(experiment.__file__).parent / "experiments" / "encoder-topics.toml"
    said = re.findall(r"--set (\"[^\"]+\"|federation[\w.=]+)", shipped.read_text())
    assert len(said) == 3
    more = [text.strip('"') for text in said]
    given = only("encoder-topics", ["fedavg", "ncm"], of(news, *more))
    setup = _run.prepare(given, lambda event: None)
    trained = tree.describe(setup.params)
    assert {path.split("/")[-1] for path in trained if "lora" in path} == {"a", "b"}
    others = {path for path in trained if "lora" not in path}
    assert others == {"head/kernel", "head/bias"}
    result = experiment.run(given)
    assert set(result.summary["arms"]) == {"fedavg", "ncm"}
    assert np.isfinite(result.history["fedavg/loss"]).all()


def test_heads_on_a_frozen_encoder(news):
    given = only("encoder-topics", ["fedavg", "ncm"], of(news))
    (point,) = experiment.run(given).summary["points"].values()
    assert {"fedavg", "ncm"} == set(point["arms"])
    assert point["arms"]["ncm"]["average"]["mean"] > 0.5
    plain, ncm = (point["arms"][a]["bytes_up"]["mean"] for a in ("fedavg", "ncm"))
    clients, contexts, means = 2, 5, 4 * 10 * (1 + 20)
    assert ncm - plain == clients * contexts * means


def test_adapters_in_the_encoder(news):
    """The encoder reads tokens; only adapters and head are sent."""
    adapted = "model={kind='encoder', train='lora', rank=1}"
    given = only("encoder-topics", ["fedavg"], [*of(news), adapted, "grid={}"])
    arm = experiment.run(given).summary["arms"]["fedavg"]
    assert 0 < arm["bytes_up"]["mean"] / (4 * 2 * 2 * 5) < 1000
