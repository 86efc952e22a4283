"""What an experiment asks of the engine changes how it is computed, not what."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer

from fedcl import _experiment_engine as _engine
from fedcl import cli, experiment, losses, memory, models
from fedcl._experiment_config import Client
from fedcl.tpu import mesh

TINY = Path(__file__).parent / "tiny.toml"
SMALL = ["public.steps=0", "public.fraction=0.0", "stream.drift={kind='abrupt'}"]
CHAIN = "chain=[{method='replay', capacity=8, per_batch=4}]"


def load(*words, arms=f"arms={{a={{{CHAIN}}}}}"):
    return experiment.load(TINY, [*SMALL, arms, *words])


@pytest.fixture(scope="module")
def computed():
    """Two arms that differ in how their local steps are computed."""
    arms = f"arms={{plain={{{CHAIN}}}, parts={{{CHAIN}, client={{accumulate=3}}}}}}"
    return experiment.run(load(arms=arms)).history


def test_an_arm_takes_its_batches_in_parts(computed):
    for name in ("loss", "per_client"):
        want, got = (computed[f"{a}/{name}"] for a in ("plain", "parts"))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (computed["plain/loss"] != computed["parts/loss"]).any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"accumulate": 3}, 1e-6),
        ({"remat": True}, 1e-6),
        ({"precision": "bfloat16"}, 1),
    ],
    ids=str,
)
def test_local_steps_by_other_means(options, error):
    model = models.mlp((5, 8, 3))
    params = model.init(jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (7, 5)), jnp.arange(7) % 3
    batch = {"x": x, "y": y, "mask": jnp.ones(7).at[2].set(0)}
    of = lambda m: losses.softmax(m.outputs)
    step = lambda f: jax.jit(lambda p: f(p, batch, jax.random.key(2))[0])(params)
    client = Client(**options)
    assert _engine.local_loss(Client(), of(model), of, model)(params, batch, None)
    want, got = step(of(model)), step(_engine.local_loss(client, of(model), of, model))
    np.testing.assert_allclose(got, want, rtol=0.02 * error)
    assert error < 1 or got != want


def test_states_in_files_are_those_on_the_device(computed, tmp_path):
    store = f"federation.store='{tmp_path / 'states'}'"
    out, told = tmp_path / "run", []
    result = experiment.run(load(store), out, progress=told.append)
    for name in ("loss", "per_client", "reported", "trained", "at"):
        got, want = result.history[f"a/{name}"], computed[f"plain/{name}"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert result.history["a/bytes"].tolist() == computed["plain/bytes"].tolist()
    assert [e.done for e in told if e.done] == [1, 2, 3, 4] * 2
    assert "a: needs" in "".join(e.text for e in told)
    assert {p.name for p in (tmp_path / "states" / "a").iterdir()} == {"0", "1"}
    with pytest.raises(ValueError, match="already holds a store"):
        experiment.run(load(store))
    # All is done: nothing runs again, and the numbers are read.
    again = experiment.run(load(store), out, resume=True)
    np.testing.assert_array_equal(again.history["a/loss"], result.history["a/loss"])


STORE = "federation.store='states'"
BAD = {
    "a batch of 4 rows has no more parts": ["federation.client.accumulate=5"],
    "Leave one out": ["federation.client={accumulate=2, remat=true}"],
    "'bfloat16'": ["federation.client.precision='half'"],
    'given with schedule = "auto"': [STORE, "federation.schedule='auto'"],
    "public.every = 2": [STORE, "public.fraction=0.1", "public.every=2"],
    "arms.a.review_every": [STORE, "arms.a.review_every=3"],
    "list it in the grid": [STORE, "grid={'evaluation.limit'=[1, 2]}"],
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused(message):
    with pytest.raises(experiment.ConfigError) as e:
        load(*BAD[message])
    assert message in str(e.value)


def test_what_the_file_does_not_show_is_refused():
    with pytest.raises(ValueError, match="with several devices"):
        _engine.check(load(STORE), mesh(2), "refuse")
    with pytest.raises(ValueError, match="allowed: refuse, report, ignore"):
        experiment.run(load(), memory="maybe")
    ewc = "{method='ewc_consolidated', strength=1.0}"
    with pytest.raises(ValueError, match="a method with `review`"):
        experiment.run(load(STORE, arms=f"arms={{a={{chain=[{ewc}]}}}}"))


def test_what_will_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    told = []

    def unmade(parts, state, stream, **options):
        made = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
        refuse(*made, **options)

    monkeypatch.setattr(memory, "report", unmade)
    with pytest.raises(MemoryError, match="arm a: too much of 0, with checkpoints"):
        experiment.run(load(), tmp_path / "out", progress=told.append)
    with pytest.raises(MemoryError, match="arm a: too much of 0$"):
        experiment.run(load(), progress=told.append)
    assert not any(event.done for event in told)


def refuse(*given, checkpoint=False, **options):
    also = ", with checkpoints" if checkpoint else ""
    raise MemoryError(f"too much of {len(given)}{also}")


def test_who_asks_to_go_on_goes_on(monkeypatch):
    told = []
    monkeypatch.setattr(memory, "report", refuse)
    _engine.tell_memory("report", told.append, "a", (), {})
    assert [event.text for event in told] == ["a: too much of 0"]
    _engine.tell_memory("ignore", told.append, "a", (), {})
    assert len(told) == 1


@pytest.fixture
def no_place():
    """JAX without a place for compiled programs, as outside of these tests."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {n: getattr(jax.config, n) for n in names}
    jax.config.update(names[0], None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path))
    own = jax.config.jax_compilation_cache_dir
    assert own in cli._keep_programs(True)
    assert jax.config.jax_compilation_cache_dir == own and not list(tmp_path.iterdir())


def test_compiled_programs_are_kept_in_the_cache(tmp_path, monkeypatch, no_place):
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path))
    assert f"kept in {tmp_path / 'programs'}" in cli._keep_programs(True)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")


def test_without_a_place_nothing_is_kept(tmp_path, monkeypatch, no_place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in cli._keep_programs(True)
    assert jax.config.jax_compilation_cache_dir is None


def test_of_several_processes_the_one_that_fails_says_which(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(typer.Exit), cli._clear_errors(False, "fedcl run", None):
        raise ValueError("the disk is full")
    said = capsys.readouterr().err
    assert said.startswith("error: process 3 of 4, on ") and "disk is full" in said


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    kept = tmp_path / "cache" / "programs"
    env = {**os.environ, "FEDCL_CACHE": str(tmp_path / "cache")}
    env = {k: v for k, v in env.items() if not k.startswith("JAX_")}
    words = [sys.executable, "-m", "fedcl.cli", "run", str(TINY), "--out"]

    def go(name):
        done = subprocess.run(
            [*words, str(tmp_path / name)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(kept) in done.stderr.replace("\n", "")
        return sorted(p.name for p in kept.iterdir())

    first = go("one")
    assert len(first) > 20 and go("two") == first
