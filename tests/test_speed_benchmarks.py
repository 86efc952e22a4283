"""The speed benchmarks: every peer does the same work, to the same weights."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fedcl import memory, tree
from tests.memory import temporaries

FOLDER = Path(__file__).parents[1] / "benchmarks" / "speed"
OURS = {path.stem for path in FOLDER.glob("*.py")}


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder, by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in OURS & set(sys.modules):
        sys.modules.pop(name)


def small(script, net):
    work, nets = script("work"), script("nets")
    sizes = {
        "mlp": nets.MLP((6, 5, 4)),
        "cnn": nets.CNN((8, 8, 2), (3, 4), 5, 3),
        "vit": nets.ViT((8, 8, 1), 4, 8, 2, 2, 3, 2, alpha=2.0),
    }
    return work.Work(sizes[net], 3, 2, 4, 0.05, 1, cohort=2, rows=5)


def ends(script, peer, work):
    ready = script(peer).prepare(work)
    return ready.read(ready.go())


@pytest.mark.filterwarnings("ignore:jax.interpreters:DeprecationWarning")  # DrJAX's.
@pytest.mark.parametrize("net", ["mlp", "cnn", "vit"])
def test_peers_reach_the_same_weights(script, net):
    work, nets = small(script, net), script("nets")
    ours = ends(script, "ours", work)
    first = nets.weights(work.net)
    assert set(ours) == {path for path in first if nets.trained(work.net, path)}
    moved = {path: np.max(np.abs(first[path] - end)) for path, end in ours.items()}
    assert min(moved.values()) > 1e-5
    for peer in peers_here():
        end = ends(script, peer, work)
        assert end.keys() == ours.keys(), peer
        for path, value in ours.items():
            gap = np.max(np.abs(end[path] - value))
            assert gap < min(1e-4, moved[path] / 30), (peer, path, gap, moved[path])


def peers_here():
    needs = {"floor": "jax", "drjax_peer": "drjax", "plain_torch": "torch"}
    found = lambda package: importlib.util.find_spec(package) is not None
    return [peer for peer, package in needs.items() if found(package)]


def test_the_continual_work_learns(script):
    work = script("continual").Work(
        sizes=(8, 8, 4), contexts=2, rounds=4, clients=4, cohort=2, capacity=8
    )
    accuracy, _ = script("continual_ours").prepare(work)()
    assert accuracy > 0.4  # By chance 0.25.


def test_the_memory_of_the_vit_work(script):
    """Beside the base: every client's LoRA, and what one client's gradient needs."""
    work = script("work").WORKS["vit"]
    parts, state, stream, loss, _ = script("ours").federation(work)
    phi, theta, example = state.server.params, state.server.frozen, stream.example()
    whole = lambda p, t, b: loss(tree.merge(p, t), b, None)[0]
    activations = temporaries(jax.grad(whole), phi, theta, example)
    report = memory.report(parts, state, stream, key=jax.random.key(0), rounds=1)
    most = tree.size(theta) + work.clients * tree.size(phi) + activations
    assert report.parts["temporaries"] <= 1.2 * most


def test_a_table_compares_peers_with_ours(script):
    compare, names = script("compare"), ("fedcl", "floor")
    row = dict.fromkeys(("ready", "compile", "cpu", "gflops", "share", "peak_mb"), 1.0)
    rows = [
        {**row, "work": "mlp", "peer": peer, "round": seconds, "least": seconds}
        for peer, seconds in zip(names, (2.0, 1.0), strict=True)
    ]
    *_, ours, floor, rate = compare.table(
        [*rows, {"work": "mlp", "peer": "matmul", "gflops": 100.0}]
    ).splitlines()
    assert "| 1.00 |" in ours and "| 0.50 |" in floor and "| 100 |" in rate


def test_a_language_round_is_counted_and_timed(script, monkeypatch, capsys):
    language = script("language")
    tiny = language.models.DecoderConfig(vocab=11, width=8, depth=2, heads=2, hidden=16)
    monkeypatch.setitem(language.CONFIGS, "small", tiny)
    options = {"clients": 2, "batch": 1, "tokens": 6, "size": 8, "repeats": 1}
    words = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["language", *words])
    language.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    frozen = 11 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16)
    adapters = 2 * 2 * (8 * 8 + 8 * 8)
    token = 4 * frozen + 6 * adapters + 6 * 2 * 2 * 6 * 8
    assert np.isclose(told["gflops"] * told["round"] * 1e9, 2 * 2 * 6 * token)
