"""A federation over Flower equals the one in this process, and refuses what is foreign."""

import functools
import io
import itertools
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import _flower_client as far
from fedcl import _flower_federation as ends
from fedcl import _flower_wire as wire
from fedcl import (
    aggregation,
    algorithms,
    checkpoint,
    cohorts,
    flower,
    models,
    testing,
    tree,
)
from tests.problems import adapted_problem

flwr_app = pytest.importorskip("flwr.app")
ROUNDS, KEY, N = 5, jax.random.key(7), 4


@pytest.fixture(autouse=True)
def a_task(monkeypatch):
    """Flower's processes know which task they are; here is none."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(identity, name, 1)


class Loopback:
    """A grid whose nodes are here: each message is handled when it is pushed."""

    def __init__(self, nodes):
        self.nodes, self.replies, self.log = dict(nodes), {}, []
        self._names = map(str, itertools.count())

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(m) for m in messages]

    def _push(self, message):
        name = next(self._names)
        message.metadata.__dict__["_message_id"] = name
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        self.log.append((kind, node))
        reply = self.nodes[node](message)
        if reply is not None:
            self.replies[name] = reply
        return name

    def pull_messages(self, names):
        return [self.replies.pop(n) for n in names if n in self.replies]


def node(member, make, directory, **config):
    """A node of Flower, as its SuperNode runs it."""
    app = flower.client_app(make, directory=str(directory))
    config = {"partition-id": member, **config}

    def handle(message):
        state = flwr_app.RecordDict()
        context = flwr_app.Context(
            run_id=1, node_id=member, node_config=config, state=state, run_config={}
        )
        try:
            return app(message, context)
        except Exception as e:
            return flwr_app.Message(flwr_app.Error(2, str(e)), reply_to=message)

    return handle


@functools.cache
def federation():
    """A method that tells, remembers and reviews, and a server with a memory."""
    problem = testing.toy_problem()
    algorithm = algorithms.fedavg(
        problem.loss_fn,
        optax.sgd(0.1),
        transform=fedcl.chain(
            algorithms.scaffold(), algorithms.ewc_consolidated(0.5, fisher="empirical")
        ),
        server=aggregation.server(aggregation.weighted_mean(), optax.adam(0.1)),
    )
    phi, theta = tree.partition(problem.params, lambda path: path == "kernel")
    return flower.Federation(algorithm, phi, problem.stream, KEY, some(), theta)


def some():
    """Everyone, in any order; of whom some sit out, and some are not heard."""
    here = cohorts.training(cohorts.uniform(N), cohorts.bernoulli(0.8))
    return cohorts.reporting(here, cohorts.bernoulli(0.8))


@functools.cache
def undisturbed():
    """The same in this process."""
    return in_process(federation())


def in_process(f):
    example = f.stream.example()
    state = f.algorithm.init(f.params, example, num_clients=N, frozen=f.frozen)
    options = {"key": f.key, "rounds": ROUNDS, "cohort": f.cohort}
    return fedcl.run(f.algorithm, state, f.stream, schedule="scan", **options)


def nodes_of(f, directory):
    return {10 + i: node(i, lambda _: f, directory) for i in range(N)}


def serve(nodes, f, **options):
    settings = {"rounds": ROUNDS, "timeout": 60.0, "poll": 0.01}
    return flower.serve(Loopback(nodes), f, **{**settings, **options})


def close(a, b, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def round_of(message):
    asked = message.content["asked"]
    return asked["round"] if message.metadata.message_type == far.VISIT else None


def test_it_is_the_run_of_one_process(tmp_path):
    f = federation()
    state, history = serve(nodes_of(f, tmp_path), f)
    expected, told = undisturbed()
    close(state.server, expected.server)
    assert set(told.rounds) == set(history.rounds)
    asked = ~np.isnan(history.rounds["loss"])  # One process computes, and drops, more.
    for name in told.rounds:
        both = (x.rounds[name] * asked for x in (history, told))
        np.testing.assert_allclose(*map(np.nan_to_num, both), atol=1e-5)
    assert 0 < np.sum(told.rounds["reported"]) < np.sum(asked) < asked.size
    assert state.clients == ()


def test_a_restarted_node_goes_on(tmp_path):
    """It dies with an answer half given; another, with its disk, takes its place."""
    f = federation()
    nodes = nodes_of(f, tmp_path)
    alive, deaths = nodes[11], []
    rounds = undisturbed()[1].rounds
    there = np.any((rounds["client"] == 1) & rounds["reported"], axis=1)
    when = np.flatnonzero(there)[1]

    def dies(message):
        if round_of(message) == when:
            deaths.append(alive(message))  # It has trained, and says nothing.
            nodes[99] = node(1, lambda _: f, tmp_path)
            return None
        return None if deaths else alive(message)

    nodes[11] = dies
    grid = Loopback(nodes)
    grid.nodes = nodes
    state, _ = flower.serve(grid, f, rounds=ROUNDS, timeout=60.0, poll=0.01)
    assert len(deaths) == 1
    close(state.server, undisturbed()[0].server)


def test_an_answer_that_is_lost_is_given_again(tmp_path):
    f = federation()
    nodes, lost = nodes_of(f, tmp_path), []
    deaf = lambda one: (
        lambda m: lost.append(one(m)) if round_of(m) == 1 and len(lost) < 2 else one(m)
    )
    state, _ = serve({k: deaf(one) for k, one in nodes.items()}, f, again=0.2)
    assert len(lost) == 2
    close(state.server, undisturbed()[0].server)


def test_an_answer_that_never_comes_was_not_reported(tmp_path):
    """What the client told then is not told: as `cohorts.reporting` has it."""
    f = federation()._replace(cohort=None)
    nodes = nodes_of(f, tmp_path)
    one, silence = nodes[12], []
    nodes[12] = lambda m: silence.append(one(m)) if round_of(m) == 1 else one(m)
    state, history = serve(nodes, f, timeout=3.0, faults="drop")
    heard = np.ones((ROUNDS, N), bool)
    heard[1, 2] = False
    sampler = cohorts.reporting(cohorts.everyone(), cohorts.recorded(heard))
    expected, _ = in_process(f._replace(cohort=sampler))
    assert len(silence) == 1
    np.testing.assert_array_equal(history.rounds["reported"], heard)
    close(state.server, expected.server)


def test_a_server_that_stops_resumes(tmp_path):
    f = federation()
    nodes = nodes_of(f, tmp_path)
    saved = lambda: checkpoint.Checkpoints(tmp_path / "server")
    serve(nodes, f, rounds=2, checkpoint=saved())
    shutil.copytree(tmp_path / "server", tmp_path / "old")
    state, history = serve(nodes, f, checkpoint=saved(), resume=True)
    close(state.server, undisturbed()[0].server)
    assert history.rounds["loss"].shape == (ROUNDS, N)
    old = checkpoint.Checkpoints(tmp_path / "old")
    with pytest.raises(flower.FederationError, match="the server lost rounds"):
        serve(nodes, f, checkpoint=old, resume=True)


def test_a_new_run_is_not_an_old_one(tmp_path):
    f = federation()
    nodes = nodes_of(f, tmp_path)
    first, second = (serve(nodes, f, rounds=1)[0] for _ in range(2))
    close(first.server, second.server, 0)


def spoilt(change):
    """A node whose answers are changed on the way."""

    def wrapped(one):
        def handle(message):
            reply = one(message)
            if message.metadata.message_type == far.VISIT:
                change(reply.content)
            return reply

        return handle

    return wrapped


def array(x):
    return flwr_app.Array(str(x.dtype), x.shape, wire.NPY, wire.encode(x))


def put(name, value):
    return lambda content: content["reply"].__setitem__(name, value)


BAD = {
    "shape": (
        put("message/delta/kernel", array(np.ones((2, 3), "f"))),
        "float32.2, 3.",
    ),
    "dtype": (put("message/delta/kernel", array(np.ones((5, 6)))), "float64.5, 6."),
    "unknown": (
        put("message/delta/w", array(np.ones((5, 6)))),
        "unknown: message/delta/w",
    ),
    "missing": (lambda c: c["reply"].pop("message/weight"), "missing: message/weight"),
    "absent": (lambda c: c.pop("reply"), "no reply"),
    "nan": (put("message/delta/kernel", array(np.full((5, 6), np.nan, "f"))), "NaN"),
    "negative": (put("message/weight", array(np.float32(-1)[...])), "weight -1"),
    "pickle": (
        put(
            "message/delta/kernel",
            flwr_app.Array("float32", (5, 6), wire.NPY, pickle.dumps(np.ones(6, "f"))),
        ),
        "is not an array",
    ),
    "format": (
        put(
            "message/delta/kernel",
            flwr_app.Array("float32", (5, 6), "torch.Tensor", b"x"),
        ),
        "format 'torch.Tensor'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_message_is_refused(name, tmp_path):
    change, words = BAD[name]
    f = federation()._replace(cohort=None)
    nodes = nodes_of(f, tmp_path)
    nodes[11] = spoilt(change)(nodes[11])
    with pytest.raises(flower.FederationError, match=f"client 1 .*{words}"):
        serve(nodes, f, rounds=1)
    _, history = serve(nodes, f, rounds=1, faults="drop")
    np.testing.assert_array_equal(history.rounds["reported"][0], [1, 0, 1, 1])


def again(rate, **policy):
    opt = optax.sgd(rate, momentum=0.9)
    return algorithms.fedavg(testing.toy_problem().loss_fn, opt, **policy)


def other(f, name):
    """A federation that differs in one thing."""
    return {
        "version": lambda: f._replace(version="b"),
        "key": lambda: f._replace(key=jax.random.key(8)),
        "program": lambda: f._replace(algorithm=again(0.2)),
        "frozen": lambda: f._replace(frozen=jax.tree.map(jnp.ones_like, f.frozen)),
        "arrays": lambda: f._replace(algorithm=again(0.1, opt_policy="average")),
    }[name]()


@pytest.mark.parametrize("name", ["version", "key", "program", "frozen", "arrays"])
def test_another_federation_is_refused(name, tmp_path):
    f = federation()._replace(algorithm=again(0.1))
    nodes = {**nodes_of(f, tmp_path), 12: node(2, lambda _: other(f, name), tmp_path)}
    with pytest.raises(
        flower.FederationError, match=f"(?s)client 2 of another.*{name}: here"
    ):
        serve(nodes, f, rounds=1)


def test_who_is_not_there_is_named(tmp_path):
    f = federation()._replace(cohort=None)
    nodes = nodes_of(f, tmp_path)
    del nodes[13]
    with pytest.raises(flower.FederationError, match=r"clients \[3\].*connected"):
        serve(nodes, f, timeout=0.5)


def test_a_client_knows_what_it_can_answer(tmp_path):
    client = far.Client(federation(), 1, tmp_path)
    asked = far.Asked("0" * 32, 1, 0, -1, True)
    for change, words in [
        ({"client": 2}, "asks for client 2"),
        ({"heard": 0}, "lost its state"),
        ({"run": "../../etc"}, "names its run"),
    ]:
        with pytest.raises(flower.FederationError, match=words):
            client.visit(asked._replace(**change), {})
    with pytest.raises(flower.FederationError, match="client 9 of a federation of 4"):
        far.Client(federation(), 9, tmp_path)
    with pytest.raises(flower.FederationError, match="partition-id=0 directory"):
        far._client(federation(), {"partition-id": 0}, None)


def test_what_does_not_fit_is_refused(tmp_path):
    f = federation()
    with pytest.raises(TypeError, match="phases run on one machine"):
        serve({}, f._replace(algorithm=(f.algorithm,)))
    with pytest.raises(ValueError, match="one key"):
        serve({}, f._replace(key=jax.random.split(KEY)))
    with pytest.raises(ValueError, match="rounds is 0"):
        serve({}, f, rounds=0)
    with pytest.raises(ValueError, match="faults is 'ignore'"):
        serve({}, f, faults="ignore")


def test_only_what_a_client_reads_travels():
    """φ and what the method shares; not the server's optimiser, nor θ."""
    problem = testing.toy_problem()
    phi, theta = tree.partition(problem.params, lambda path: path == "bias")
    for transform, shared in [
        (None, set()),
        (algorithms.scaffold(), {"shared/bias"}),
    ]:
        algorithm = algorithms.fedavg(
            problem.loss_fn,
            optax.sgd(0.1),
            transform=transform,
            server=aggregation.server(aggregation.mean(), optax.adam(0.1)),
        )
        f = flower.Federation(algorithm, phi, problem.stream, KEY, frozen=theta)
        shapes = ends.shapes(f)
        sent = ends.sent(shapes.server, shapes.sent)
        assert set(sent) == {"params/bias", "version"} | shared


def adapted():
    """A server that writes into θ what φ cannot hold."""
    problem, _, params = adapted_problem()
    phi, theta = tree.partition(params, models.lora_only)
    chain = aggregation.server(algorithms.fedex_lora(), optax.sgd(1.0))
    algorithm = algorithms.fedavg(problem.loss_fn, optax.sgd(0.1), server=chain)
    travels = {"frozen/accumulator/update", "params/lora/a", "params/lora/b", "version"}
    return flower.Federation(
        algorithm, phi, problem.stream, KEY, some(), theta
    ), travels


def seeds():
    """Clients that read the server's memory, and send a scalar per step."""
    problem = testing.toy_problem()
    algorithm = algorithms.fedkseed(problem.loss_fn, 1e-2, num_seeds=16, adaptive=True)
    travels = {"opt_state/counts", "opt_state/sizes", "version"}
    travels |= {"params/bias", "params/kernel"}
    f = flower.Federation(algorithm, problem.params, problem.stream, KEY, some())
    return f, travels


@pytest.mark.parametrize("make", [adapted, seeds])
def test_algorithms_of_another_kind(make, tmp_path):
    f, travels = make()
    shapes = ends.shapes(f)
    assert set(ends.sent(shapes.server, shapes.sent)) == travels
    state, _ = serve(nodes_of(f, tmp_path), f)
    expected, _ = in_process(f)
    close(state.server, expected.server)


def test_arrays_survive_the_wire_and_nothing_else_does(tmp_path):
    a = {
        "b": jnp.arange(3, dtype=jnp.bfloat16),
        "k": jax.random.split(jax.random.key(0)),
        "n": jnp.int32(3),
        "z": jnp.zeros((0, 2)),
    }
    wire.write(tmp_path / "a.npz", a, {"round": 3})
    back, manifest = wire.read(tmp_path / "a.npz", jax.eval_shape(lambda: a))
    assert manifest == {"round": 3} and tree.describe(back) == tree.describe(a)
    close(wire.pack(a), wire.pack(back), 0)
    close(
        wire.pack(far.from_record(far.to_record(wire.pack(a)), a, "It")), wire.pack(a)
    )
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(flower.FederationError, match="cannot be read"):
        wire.read(tmp_path / "a.npz", a)
    like = jax.ShapeDtypeStruct((3,), np.float32)
    objects = io.BytesIO()
    np.save(objects, np.array([{}, 1, 2], object), allow_pickle=True)
    for data in (
        wire.encode(np.ones(3, "f"))[:-1],
        objects.getvalue(),
        b"",
        b"\x93NUM",
    ):
        with pytest.raises(flower.FederationError, match="It"):
            wire.decode(data, like, "It")


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_on_this_machine(kill, tmp_path):
    """One SuperLink, three SuperNodes, one of them killed: the parameters are the same."""
    script = Path(__file__).parents[1] / "benchmarks" / "flower" / "localhost.py"
    command = [sys.executable, str(script), "--keep", str(tmp_path)]
    command += ["--kill"] if kill else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
