"""A run that is killed and resumed is the run that was never stopped, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, checkpoint, cohorts, testing
from fedcl.tpu import mesh
from tests.problems import replaying

KEY = jax.random.key(3)


def go(directory=None, rounds=8, resume=False, identity=None, every=2, **kw):
    p = testing.toy_problem()
    algorithm = algorithms.fedavg(
        p.loss_fn, optax.sgd(0.1), transform=replaying(), opt_policy="keep"
    )
    state = algorithm.init(p.params, p.stream.example(), 4)
    saving = None
    if directory is not None:
        saving = checkpoint.Checkpoints(directory, every=2, identity=identity)
    evaluate = lambda s: {"bias": s.server.params["bias"]}
    kw = {"cohort": cohorts.stratified(2, 2), "key": KEY, **kw}
    return fedcl.run(
        algorithm,
        state,
        p.stream,
        rounds=rounds,
        every=every,
        evaluate=evaluate,
        checkpoint=saving,
        resume=resume,
        **kw,
    )


def assert_same(a, b, tolerance=0.0):
    close = lambda x, y: np.testing.assert_allclose(
        x, y, rtol=tolerance, atol=tolerance
    )
    jax.tree.map(close, a[0], b[0])
    assert a[1].rounds.keys() == b[1].rounds.keys()
    jax.tree.map(close, a[1], b[1])


@pytest.fixture(scope="module")
def whole():
    return go()


def test_resuming_is_bit_identical(tmp_path, whole):
    go(tmp_path, rounds=4)
    assert_same(go(tmp_path, resume=True), whole)


@pytest.mark.parametrize(
    "other", [{"schedule": "scan"}, {"devices": 2}], ids=["scan", "two devices"]
)
def test_resuming_on_another_schedule_or_mesh(tmp_path, whole, other):
    if "devices" in other:
        other = {"mesh": mesh(other["devices"])}
    go(tmp_path, rounds=4)
    assert_same(go(tmp_path, resume=True, **other), whole, 1e-5)


def test_seeds_resume_too(tmp_path):
    keys = jax.random.split(KEY, 2)
    p = testing.toy_problem()
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    one = algorithm.init(p.params, p.stream.example(), 4)
    both = fedcl.tree.stack(one, 2)

    def part(rounds, directory=None, resume=False):
        saving = directory and checkpoint.Checkpoints(directory)
        kw = {"key": keys, "rounds": rounds, "every": 2}
        return fedcl.run(
            algorithm, both, p.stream, checkpoint=saving, resume=resume, **kw
        )

    part(2, tmp_path)
    assert_same(part(4, tmp_path, True), part(4))


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import conftest
from tests import test_checkpoint
test_checkpoint.go(sys.argv[1], rounds=400, resume=True)
"""


@pytest.mark.parametrize("wait", [0.05, 0.4, 1.1])
def test_killed_at_any_moment(tmp_path, wait):
    """`kill -9` some time after the first checkpoint, then resume."""
    root = Path(__file__).parent.parent
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path), str(root)]
    process = subprocess.Popen(argv, cwd=root, stderr=subprocess.DEVNULL)
    steps = tmp_path / "steps"
    deadline = time.monotonic() + 240
    while not (steps.is_dir() and any(p.name.isdigit() for p in steps.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoint.Checkpoints(tmp_path).latest()
    assert reached is not None and reached < 400
    stop = reached + 4
    assert_same(go(tmp_path, rounds=stop, resume=True), go(rounds=stop))


def test_half_a_checkpoint_is_never_taken_for_whole(tmp_path, whole):
    go(tmp_path, rounds=4)
    (tmp_path / "steps" / "6").mkdir()
    (tmp_path / "steps" / "6.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "history" / "000000004-000000006.tmp").write_bytes(b"PK")
    assert checkpoint.Checkpoints(tmp_path).latest() == 4
    (tmp_path / "steps" / "6").rmdir()
    assert_same(go(tmp_path, resume=True), whole)


def test_a_damaged_checkpoint_is_named(tmp_path):
    go(tmp_path, rounds=2)
    for path in (tmp_path / "steps" / "2" / "state").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(bytes(data))
    with pytest.raises(checkpoint.CheckpointError, match="steps/2 cannot be read"):
        go(tmp_path, resume=True)


def test_another_experiment_is_refused(tmp_path):
    go(tmp_path, rounds=2, identity={"lr": 0.1})
    with pytest.raises(checkpoint.CheckpointError, match="lr: saved 0.1, given 0.2"):
        go(tmp_path, resume=True, identity={"lr": 0.2})
    with pytest.raises(checkpoint.CheckpointError, match="its key differs"):
        go(tmp_path, resume=True, identity={"lr": 0.1}, key=jax.random.key(4))
    with pytest.raises(checkpoint.CheckpointError, match="already holds a run"):
        go(tmp_path, identity={"lr": 0.1})
    p = testing.toy_problem()
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(p.params, p.stream.example(), 4)
    saving = checkpoint.Checkpoints(tmp_path, identity={"lr": 0.1})
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)its state.*memory"):
        fedcl.run(
            algorithm,
            state,
            p.stream,
            key=KEY,
            rounds=4,
            checkpoint=saving,
            resume=True,
        )


def test_a_directory_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be written"):
        checkpoint.Checkpoints(tmp_path / "file")


def test_a_disk_that_fails_does_not_end_the_run(tmp_path, whole, monkeypatch):
    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        got = go(tmp_path)
    assert_same(got, whole)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, whole):
    press = lambda told: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(checkpoint.Interrupted, match=r"after round 2 of 8") as e:
        go(tmp_path, progress=press)
    assert e.value.exit_code == 130
    assert_same(go(tmp_path, resume=True), whole)


def test_only_the_newest_checkpoints_stay(tmp_path):
    go(tmp_path, rounds=8)
    kept = sorted(int(p.name) for p in (tmp_path / "steps").iterdir())
    assert kept == [6, 8]


def test_the_state_passed_in_stays_valid(whole):
    p = testing.toy_problem()
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(p.params, p.stream.example(), 4)
    fedcl.run(algorithm, state, p.stream, key=KEY, rounds=2)
    assert jnp.isfinite(state.server.params["kernel"]).all()
