"""Clients' states in files: the federation of states on the device, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, cohorts, losses, store, streams, testing
from fedcl.checkpoint import Checkpoints
from tests.problems import replaying

KEY, N = jax.random.key(8), 10_000


class Many(testing.ToyStream):
    """Ten thousand clients with the data of four."""

    num_clients = N

    def sample(self, key, client, round):
        return super().sample(key, client % 4, round)


jax.tree_util.register_dataclass(Many)


@pytest.fixture(scope="module")
def problem():
    p = testing.toy_problem()
    stream = Many(p.stream.x, p.stream.y)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=replaying())
    kw = {"key": KEY, "rounds": 6, "every": 2, "cohort": cohorts.uniform(20)}
    kw |= {"schedule": 7, "evaluate": lambda s: {"bias": s.server.params["bias"]}}
    resident = algorithm.init(p.params, stream.example(), N)
    want = fedcl.run(algorithm, resident, stream, **kw)
    begin = lambda folder, **more: store.init(
        algorithm, p.params, stream.example(), N, folder, **more
    )
    return algorithm, stream, kw, begin, want


def check(got, want):
    (state, h), (resident, g) = got, want
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(state.server, resident.server)
    equal(state.clients.gather(np.arange(N)), resident.clients)
    equal(h.evaluations, g.evaluations)
    assert h.rounds.keys() == g.rounds.keys()
    equal({k: h.rounds[k] for k in g.rounds}, g.rounds)


def test_ten_thousand_clients_in_files_are_those_on_the_device(problem, tmp_path):
    algorithm, stream, kw, begin, want = problem
    state = begin(tmp_path / "clients")
    check(fedcl.run(algorithm, state, stream, **kw), want)
    assert (want[0].clients.task >= 0).sum() > 20
    again = begin(tmp_path / "clients", resume=True)
    np.testing.assert_array_equal(
        again.clients.gather(np.arange(N)).task, want[0].clients.task
    )


def test_a_killed_run_goes_on_from_its_last_checkpoint(problem, tmp_path):
    algorithm, stream, kw, begin, want = problem

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.done == 4:
            raise Killed

    saved = lambda: Checkpoints(tmp_path / "run", every=2)
    with pytest.raises(Killed):
        state = begin(tmp_path / "clients")
        save = {"checkpoint": saved(), "progress": kill}
        fedcl.run(algorithm, state, stream, **kw, **save)
    # Round 3 was half written.
    ids = want[1].rounds["client"][3][:9]
    torn = jax.tree.map(lambda x: x + 1, state.clients.gather(ids))
    state.clients.scatter(ids, torn)
    state = begin(tmp_path / "clients", resume=True)
    resumed = {"checkpoint": saved(), "resume": True}
    check(fedcl.run(algorithm, state, stream, **kw, **resumed), want)
    assert not list((tmp_path / "clients" / "undo").iterdir())


def endless(folder, rounds, resume=True):
    """A run with a store and checkpoints, and the same on the device without."""
    p = testing.toy_problem()
    stream = Many(p.stream.x, p.stream.y)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=replaying())
    given = (algorithm, p.params, stream.example(), N)
    kw = {"key": KEY, "rounds": rounds, "every": 2, "cohort": cohorts.uniform(20)}
    kw |= {"evaluate": lambda s: {"bias": s.server.params["bias"]}, "schedule": 7}
    if folder is None:
        return fedcl.run(algorithm, algorithm.init(*given[1:]), stream, **kw)
    state = store.init(*given, folder / "clients", resume=resume)
    kw |= {"checkpoint": Checkpoints(folder / "run", every=2), "resume": resume}
    return fedcl.run(algorithm, state, stream, **kw)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import conftest, pathlib
from tests import test_store
test_store.endless(pathlib.Path(sys.argv[1]), 100_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_kill_9_in_the_middle_of_a_round(tmp_path):
    root = Path(__file__).parent.parent
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path), str(root)]
    process = subprocess.Popen(argv, cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    whole = "run/steps/[0-9]*[02468]/_CHECKPOINT_METADATA"
    while not any(tmp_path.glob(whole)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = Checkpoints(tmp_path / "run").latest()
    assert reached is not None and (tmp_path / "clients" / "undo").exists()
    stop = reached + 4
    check(endless(tmp_path, stop), endless(None, stop))


def test_states_that_differ_are_moved(problem, tmp_path):
    algorithm, stream, kw, _, want = problem
    short = {**kw, "rounds": 2, "evaluate": None}
    more, _ = fedcl.run(algorithm, want[0], stream, **short)
    moved = store.move(want[0], tmp_path / "clients")
    got, _ = fedcl.run(algorithm, moved, stream, **short)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(got.clients.gather(np.arange(N)), more.clients)


def test_a_hosted_stream_runs_with_a_store(tmp_path):
    data = streams.digits()
    flat = {"x": data["x"].reshape(len(data["y"]), -1), "y": data["y"]}
    kw = {"num_contexts": 5, "num_clients": 4, "rounds_per_context": 1}
    kw |= {"steps": 2, "batch_size": 3, "draw": "replacement"}
    hosted = streams.Hosted(streams.class_incremental(flat, **kw), flat)
    loss = losses.softmax(lambda p, x, key: x @ p)
    algorithm = algorithms.fedavg(loss, optax.sgd(0.1, momentum=0.9), opt_policy="keep")
    params = np.zeros((64, 10), np.float32)
    state = algorithm.init(params, hosted.stream.example(), 4)
    run = {"key": KEY, "rounds": 3, "cohort": cohorts.uniform(2)}
    want, _ = fedcl.loop(algorithm, state, hosted, **run)
    example = hosted.stream.example()
    stored = store.init(algorithm, params, example, 4, tmp_path / "clients")
    got, _ = fedcl.loop(algorithm, stored, hosted, **run)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(got.server, want.server)
    equal(got.clients.gather(np.arange(4)), want.clients)


def test_what_does_not_fit_is_refused(problem, tmp_path):
    algorithm, stream, kw, begin, _ = problem
    state = begin(tmp_path / "clients")
    with pytest.raises(ValueError, match="already holds a store"):
        begin(tmp_path / "clients")
    p = testing.toy_problem()
    with pytest.raises(ValueError, match="of another federation"):
        store.init(
            algorithm, p.params, stream.example(), 9, tmp_path / "clients", resume=True
        )
    with pytest.raises(ValueError, match="several seeds"):
        seeds = {**kw, "key": jax.random.split(KEY, 2)}
        fedcl.run(algorithm, state, stream, **seeds)
    state.clients.step(0, np.arange(3), state.clients.gather(np.arange(3)), undo=False)
    with pytest.raises(ValueError, match="cannot be undone to 0"):
        fedcl.run(algorithm, state, stream, **kw)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        begin(tmp_path / "other")
