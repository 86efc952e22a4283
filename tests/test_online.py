"""The online server against the papers' loops, against rounds, and against bad input."""

import functools
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import (
    _online_core,
    aggregation,
    checkpoint,
    cohorts,
    losses,
    online,
    testing,
    tree,
)
from fedcl import algorithms as alg
from fedcl.online import Download, Join, Leave, Tick, Update
from tests.oracles import asynchronous, case, cases, federation, table
from tests.problems import deep

KEY = jax.random.key(3)
ROOT = Path(__file__).parent.parent
P = testing.toy_problem()
PLAIN = alg.fedavg(P.loss_fn, optax.sgd(0.1))
MANY = alg.fedavg(
    P.loss_fn,
    optax.sgd(0.1),
    transform=fedcl.chain(alg.replay(12, 3), alg.ewc(1.0), alg.scaffold()),
    server=alg.fedadam(0.1),
    opt_policy="keep",
)
EXAMPLE = P.stream.example()
# One object each, since programs are shared by those that are the same.
HINKLEY, SENSITIVE = online.page_hinkley(1.0, 0.05), online.page_hinkley(0.5)


def fresh(algorithm=PLAIN, problem=P):
    return algorithm.init(problem.params, problem.stream.example(), 4)


def server_of(algorithm=PLAIN, problem=P, **kw):
    kw = {"buffer": 1, "max_staleness": 3, "key": KEY, "stream": problem.stream, **kw}
    return online.Server(algorithm, fresh(algorithm, problem), **kw)


def served_many(**kw):
    """A server with everything that clients can remember, and a buffer."""
    return server_of(MANY, buffer=4, max_staleness=2, **kw)


def drained(server, events):
    return list(online.serve(server, events))


def order(count=60, key=KEY, **kw):
    return list(itertools.islice(online.arrivals(key, 4, **kw), count))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class TestRoundsAreTheSpecialCase:
    def test_the_whole_server_bit_for_bit(self):
        """And a context that ends is reviewed when the client is back: in `run` after
        its last round, which is the same as long as clients come every round."""
        problem, method = deep(), alg.herding(12, 3, testing.CLASSES)
        algorithm = alg.fedavg(problem.loss_fn, optax.sgd(0.1), transform=method)
        assert algorithm.review is not None
        state = fresh(algorithm, problem)
        want, history = fedcl.run(algorithm, state, problem.stream, key=KEY, rounds=6)
        server = server_of(algorithm, problem, buffer=4, max_staleness=0)
        reports = drained(server, online.synchronous(KEY, 4, 6))
        assert_same(server.state().server, want.server)
        assert server.version == 6
        trained = [r.metrics["loss"] for r in reports if r.event == "Update"]
        told = history.rounds["loss"].reshape(-1)
        np.testing.assert_allclose(trained, told, rtol=1e-6)

    def test_memories_optimisers_and_told_where_some_are_not_heard(self):
        half = cohorts.bernoulli(0.6)
        cohort = cohorts.reporting(cohorts.training(cohorts.everyone(), half), half)
        kw = {"key": KEY, "rounds": 6, "cohort": cohort}
        want, history = fedcl.run(MANY, fresh(MANY), P.stream, **kw)
        server = served_many()
        reports = drained(server, online.synchronous(KEY, 4, 6, cohort=cohort))
        outcomes = [r.outcome for r in reports]
        assert outcomes.count("lost") > 1 and server.totals.accepted > 3
        assert server.version == np.any(history.rounds["reported"], axis=1).sum()
        # Of so many methods the two programs may round a product differently.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, server.params, want.server.params)
        jax.tree.map(close, server.state().clients, want.clients)


FEDBUFF = aggregation.server(aggregation.mean(), optax.sgd(0.7))
PAPERS = {
    "fedbuff": (
        online.discount(online.polynomial(0.5)),
        lambda: asynchronous.FedBuff(2, 0.7, lambda age: (1 + age) ** -0.5),
    ),
    "fedbuff hinge": (
        online.discount(online.hinge(0.5, 1.0)),
        lambda: asynchronous.FedBuff(
            2, 0.7, lambda age: 1.0 if age <= 1 else 1 / (0.5 * (age - 1) + 1)
        ),
    ),
    "fedbuff constant": (
        online.discount(online.constant()),
        lambda: asynchronous.FedBuff(2, 0.7, lambda age: 1.0),
    ),
    "fedasync": (
        online.mixing(0.6, online.polynomial(0.25)),
        lambda: asynchronous.FedAsync(0.6, lambda age: (1 + age) ** -0.25),
    ),
    "asyncfeded": (
        online.distance(0.8, 0.9),
        lambda: asynchronous.AsyncFedED(0.8, 0.9),
    ),
}
METHODS = ["fedbuff", "fedbuff hinge", "fedbuff constant", "fedasync", "asyncfeded"]
METHODS += ["ewc_exact", "scaffold"]


@functools.cache
def of_oracle(name, buffered):
    """The algorithm beside an oracle's method."""
    method = None
    if name in cases.CASES:
        method = cases.CASES[name].method(float(np.float32(cases.CASES[name].strength)))
    server = FEDBUFF if buffered else None
    opt = optax.sgd(federation.LR)
    return alg.fedavg(case.loss_fn, opt, server=server, transform=method)


@functools.cache
def beside_the_oracle(name, bound=3):
    """The oracle's arrivals through the server: (server, reports, oracle's result)."""
    d, arrivals = federation.data(), asynchronous.order()
    rule, oracle_server = PAPERS.get(name, PAPERS["fedbuff"])
    oracle = federation.FedAvg()
    if name not in PAPERS:
        oracle = cases.CASES[name].oracle(float(np.float32(cases.CASES[name].strength)))
    buffered = name not in ("fedasync", "asyncfeded")
    algorithm = of_oracle(None if name in PAPERS else name, buffered)
    stream = case.recorded(d)
    server = online.Server(
        algorithm,
        algorithm.init(case.params_of(d.theta), stream.example(), federation.N),
        buffer=2 if buffered else 1,
        key=KEY,
        stream=stream,
        staleness=rule,
        max_staleness=bound,
        loss_fn=case.loss_fn,
    )
    make = {
        "download": lambda k, t: Download(k),
        "update": lambda k, t: Update(k, round=t),
    }
    make["lost"] = lambda k, t: Update(k, round=t, lost=True)
    events = [Join(k) for k in range(federation.N)]
    events += [make[kind](k, t) for kind, k, t in arrivals]
    reports = drained(server, events)
    return (
        server,
        reports,
        asynchronous.run(d, arrivals, oracle, oracle_server(), bound),
    )


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_loop_of_its_paper(name):
    server, reports, want = beside_the_oracle(name)
    error = np.abs(case.theta_of(server.state()) - want.theta).max()
    table.record_error(f"online {name}", float(error))
    assert error < 1e-5
    ages = [r.staleness for r in reports if r.outcome == "accepted"]
    assert ages == want.ages and max(ages) > 1
    tested = [r.loss for r in reports if not np.isnan(r.loss)]
    np.testing.assert_allclose(tested, want.losses, rtol=2e-5)


def test_the_oracles_differ_and_the_order_has_every_difficulty():
    results = {name: beside_the_oracle(name) for name in ("fedbuff", "asyncfeded")}
    for name, (_, reports, want) in results.items():
        outcomes = {r.outcome for r in reports}
        assert {"accepted", "absent", "lost"} <= outcomes, name
        other = results["fedbuff" if name == "asyncfeded" else "asyncfeded"][2]
        assert np.abs(want.theta - other.theta).max() > 1e-2
    assert "stale" in {r.outcome for r in results["asyncfeded"][1]}


class TestArrivals:
    def test_the_same_order_gives_the_same_bits(self):
        a, b = served_many(), served_many()
        assert_same(
            online.collect(drained(a, order())), online.collect(drained(b, order()))
        )
        assert_same(a.state(), b.state())

    def test_orders_are_pure_functions_of_the_key(self):
        assert order() == order() != order(key=jax.random.key(4))
        some = order(200, active=2, clock=0.5)
        working = 0
        for e in some:
            working += isinstance(e, Download) - isinstance(e, Update)
            assert working in (0, 1, 2)
        times = [e.time for e in some]
        assert times == sorted(times) and {e.client for e in some} == {0, 1, 2, 3}
        rounds = [e.round for e in some if isinstance(e, Update)]
        assert rounds[0] == 0 and rounds[-1] > 5

    def test_slow_clients_come_less_often_and_later(self):
        events = order(400, delay=online.exponential([1.0, 1.0, 1.0, 8.0]))
        came = np.bincount([e.client for e in events if isinstance(e, Update)])
        assert came[3] * 3 < min(came[:3])
        scale = online.half_normal(2.0)
        assert (
            abs(np.mean([scale(u, 0) for u in np.linspace(0.001, 0.999, 999)]) - 1.6)
            < 0.02
        )

    def test_what_a_client_draws_does_not_depend_on_who_comes_first(self):
        still = alg.fedavg(
            P.loss_fn,
            optax.sgd(0.1),
            transform=alg.replay(12, 3),
            server=aggregation.server(aggregation.mean(), optax.sgd(0.0)),
        )
        first, again = Update(0, round=0), [Download(0), Update(0, round=0)]
        one = [Join(0), Join(1), first, Update(1, round=0), *again]
        other = [Join(1), Update(1, round=0), Join(0), first, *again]
        a, b = server_of(still), server_of(still)
        drained(a, one), drained(b, other)
        assert_same(a.state().clients, b.state().clients)
        rows = a.state().clients.memory
        assert_same(
            *(
                tree.gather(s, jnp.array([2, 3]))
                for s in (rows, fresh(still).clients.memory)
            )
        )

    def test_a_second_visit_in_a_round_draws_other_rows(self):
        server = server_of(loss_fn=P.loss_fn)
        again = [Download(0), Update(0, round=0, lost=True)]
        reports = drained(server, [Join(0), *again * 3])
        assert server.version == 0
        assert len({r.loss for r in reports if r.event == "Update"}) == 3

    def test_programs_are_compiled_once(self):
        server = served_many(loss_fn=P.loss_fn, detector=SENSITIVE)
        programs = ("draw", "watch", "train", "aggregate")
        drained(server, order(12))
        before = {p: getattr(_online_core, p)._cache_size() for p in programs}
        drained(server, [*order(70)[12:], Leave(2), Tick(flush=True), Join(2)])
        assert server.totals.accepted > 20 and server.totals.ages[1] > 2
        assert {p: getattr(_online_core, p)._cache_size() for p in programs} == before


def test_late_updates_are_weighed_and_too_late_ones_counted():
    fast = [Update(1), Download(1)]
    server = server_of()  # It waits for three versions.
    last = drained(server, [Join(0), Join(1), *fast * 3, Update(0)])[-1]
    assert (last.outcome, last.staleness, server.version) == ("accepted", 3, 4)
    last = drained(server, [Download(0), *fast * 4, Update(0)])[-1]
    assert (last.outcome, last.staleness, server.version) == ("stale", 4, 8)
    # The first of client 1's updates after client 0's was one version late.
    assert server.totals.ages == (6, 1, 0, 1) and server.totals.stale == 1


def test_reports_count_what_travels():
    sent = fedcl.metrics.communication(MANY, fresh(MANY), P.stream)
    server = served_many()
    reports = drained(server, order(30))
    t = reports[-1].totals
    assert t.up_bytes == sent.up * t.accepted
    assert t.down_bytes == sent.down * (t.downloads + t.joins)
    assert (t.joins, t.downloads, t.accepted) == (4, 15, 11)
    assert [r.fill for r in reports if r.event == "Update"][:5] == [1, 2, 3, 0, 1]
    assert t.rate == pytest.approx(t.accepted / reports[-1].time)
    assert sum(t.ages) == t.accepted


class TestEvaluation:
    def test_test_then_train(self):
        """The loss of the served model, on the rows that then train, before they do."""
        server = server_of(loss_fn=P.loss_fn)
        drained(server, [Join(0), Join(1), Update(1)])
        served, key = server.params, jax.random.key(0)
        visit, _ = _online_core.draw(
            P.stream, KEY, jnp.int32(0), jnp.int32(0), jnp.int32(0)
        )
        of = lambda s: P.loss_fn(served, tree.gather(visit.batches, s), key)[0]
        want = np.mean([of(s) for s in range(testing.STEPS)])
        assert server.handle(Update(0)).loss == pytest.approx(float(want), rel=1e-6)

    def test_on_all_contexts_on_a_schedule(self):
        evaluate = lambda s: {"bias": s.server.params["bias"]}
        server = server_of(evaluate=evaluate, every=2)
        reports = drained(server, order(20))
        at = online.collect(reports).at
        assert at.tolist() == [2, 4, 6] and server.version == 6
        assert_same(server.evaluate()["bias"], server.params["bias"])
        last = [r for r in reports if r.evaluation][-1]
        assert last.version == 6

    def test_progress_and_columns(self):
        seen = []
        list(online.serve(server_of(), order(9), progress=seen.append))
        h = online.collect(seen)
        assert h.rounds["position"].tolist() == list(range(1, 10))
        assert {k: len(v) for k, v in h.rounds.items()} == dict.fromkeys(h.rounds, 9)
        assert online.OUTCOMES[h.rounds["outcome"][0]] == "ok"
        assert np.isfinite(h.rounds["metrics/loss"][h.rounds["event"] == 3]).all()


def probe():
    """A method that remembers its boundaries, tasks and reviews."""
    begin = lambda m, params, ctx: m + jnp.array([1, 0, 0]) * ctx.boundary
    end = lambda m, params, ctx: (m.at[1].set(ctx.task), ())
    review = lambda m, params, sweep, ctx: m + jnp.array([0, 0, 1])
    init = lambda params, example: jnp.zeros(3, jnp.int32)
    return fedcl.transform(init=init, begin=begin, end=end, review=review)


def drifting(visits=12, twice=True):
    """All clients come in turn, in each round of the stream once or twice."""
    return [
        e
        for t in range(visits)
        for c in range(4)
        for e in (Download(c), Update(c, round=t // 2 if twice else t))
    ]


class Scripted(NamedTuple):
    init: Callable
    observe: Callable
    fired: Callable


def scripted(*rounds):
    """Sees drift at every client in these rounds."""
    when = jnp.array((-1, *rounds))
    fired = lambda state, ctx: (jnp.any(ctx.round == when), state)
    return Scripted(lambda: (), lambda state, logits, batch, ctx: state, fired)


PROBED = alg.fedavg(P.loss_fn, optax.sgd(0.3), transform=probe())
SCRIPT_2_4 = scripted(2, 4)
JOINS = [Join(c) for c in range(4)]


class TestDrift:
    def served(self, detector, events=None, **kw):
        kw = {"loss_fn": P.loss_fn, "detector": detector, "buffer": 4, **kw}
        server = server_of(PROBED, **kw)
        return server, drained(server, [*JOINS, *(events or drifting())])

    def test_page_and_hinkley_as_their_loop(self):
        rng = np.random.default_rng(0)
        x = np.repeat([0.3, 1.0, 0.5, 1.5], 12) + 0.1 * rng.normal(size=48)
        detector = online.page_hinkley(0.8, 0.05, 4)

        def see(state, value):
            ctx = fedcl.Context(*[None] * 7, None, lambda p, b, k: (value, None))
            fired, state = detector.fired(detector.observe(state, None, None, ctx), ctx)
            return state, fired

        _, fired = jax.lax.scan(see, detector.init(), jnp.asarray(x, jnp.float32))
        alarms = np.flatnonzero(fired).tolist()
        assert alarms == asynchronous.page_hinkley(x.tolist(), 0.8, 0.05, 4)
        assert len(alarms) == 2

    def test_a_boundary_reaches_every_client_and_all_review(self):
        server, reports = self.served(HINKLEY, rest=3)
        when = [r for r in reports if r.boundary]
        assert server.task == len(when) == server.totals.boundaries >= 1
        memory = np.asarray(server.state().clients.memory)
        assert (memory[:, 0] == server.task).all()  # Each met each boundary once.
        assert (memory[:, 1] == server.task).all()
        assert (memory[:, 2] == server.task).all()
        # Two classes that the model has not seen: not before round 4, and not long after.
        first = when[0].position - 4
        assert 4 * 8 < first <= 7 * 8

    def test_a_quorum_of_clients_that_know_the_current_context(self):
        """Client 3 also sees what 0, 1 and 2 have declared: that is no new vote."""
        events = drifting(6, twice=False)
        server, reports = self.served(SCRIPT_2_4, events, quorum=3)
        assert [(r.client, r.task) for r in reports if r.boundary] == [(2, 1), (2, 2)]
        assert server.task == 2

    def test_votes_survive_a_restart(self, tmp_path):
        events = [*JOINS, *drifting(3, twice=False)]
        for stop in (len(events) - 6, len(events)):  # After client 0 has voted.
            saving = checkpoint.Checkpoints(tmp_path, every=100)
            kw = {"loss_fn": P.loss_fn, "detector": SCRIPT_2_4, "buffer": 4}
            kw |= {"quorum": 3, "checkpoint": saving, "resume": True}
            server = server_of(PROBED, **kw)
            reports = drained(server, events[server.position : stop])
        assert [r.client for r in reports if r.boundary] == [2]

    def test_a_rest_after_a_boundary(self):
        _, reports = self.served(scripted(1, 2, 3, 4, 5), rest=5)
        when = [r.version for r in reports if r.boundary]
        assert np.diff(when).tolist() == [5] and when[0] == 2

    def test_without_drift_nothing_happens(self):
        nobody, _ = self.served(scripted())
        assert nobody.task == 0
        assert (np.asarray(nobody.state().clients.memory) == 0).all()

    def test_the_detectors_of_task_free_methods(self):
        server, _ = self.served(alg.entropy_jump(0.1), rest=3)
        assert server.task >= 1
        server, _ = self.served(alg.every_rounds(2), rest=3)
        assert server.task >= 2

    def test_without_a_detector_the_stream_tells(self):
        server = server_of(PROBED, buffer=4)
        reports = drained(server, [*JOINS, *drifting(10)])
        memory = np.asarray(server.state().clients.memory)
        assert memory[:, 0].tolist() == [2, 1, 2, 1] == memory[:, 2].tolist()
        assert max(r.task for r in reports) == 2 and server.task == 0


def message(scale=1.0, weight=4.0):
    delta = jax.tree.map(lambda x: scale * jnp.ones_like(x), P.params)
    return fedcl.Message(delta, jnp.float32(weight))


class TestRealDevices:
    def test_a_message_counts_as_if_the_server_had_run_the_client(self):
        at_home, afar = server_of(), server_of(stream=None)
        joins = [Join(0), Join(1)]
        drained(at_home, [*joins, Update(0), Update(1)])
        state, made = fresh(), []
        for client in (0, 1):
            which = map(jnp.int32, (client, 0, 0))
            visit, _ = _online_core.draw(P.stream, KEY, *which)
            row = tree.gather(state.clients, client)
            made.append(jax.jit(PLAIN.client_update)(state.server, row, visit)[0])
        sent = [Update(c, base=0, message=m, loss=1.5) for c, m in enumerate(made)]
        reports = drained(afar, [*joins, *sent])
        assert [r.staleness for r in reports[2:]] == [0, 1]
        assert reports[-1].loss == 1.5
        assert_same(afar.params, at_home.params)

    def test_what_devices_tell_is_summed(self):
        algorithm = alg.fedavg(P.loss_fn, optax.sgd(0.1), transform=alg.scaffold())
        server = server_of(algorithm)
        told = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), server.message.told)
        sent = message()._replace(told=told)
        again = Update(1, message=sent)
        drained(server, [Join(1), Update(1, message=sent), Download(1), again])
        state = server.state()
        leaf = lambda a: np.unique(jax.tree.leaves(a)[0])
        assert leaf(state.server.shared) == 1.0  # 2 × 2 over a population of four.
        assert leaf(tree.gather(state.clients.told, 1)) == 4.0
        assert int(state.clients.version[1]) == 1

    def test_a_visit_that_an_update_brings(self):
        which = map(jnp.int32, (2, 0, 0))
        visit, _ = _online_core.draw(P.stream, KEY, *which)
        own, given = server_of(), server_of(stream=None)
        drained(own, [Join(2), Update(2)])
        drained(given, [Join(2), Update(2, visit=visit)])
        assert_same(own.state(), given.state())


def bad_arrivals():
    m = message()
    wide = m._replace(delta=m.delta | {"kernel": jnp.ones((6, 5))})
    double = m._replace(delta=m.delta | {"bias": np.ones(6)})
    part = m._replace(delta={"bias": m.delta["bias"]})
    which = map(jnp.int32, (1, 0, 0))
    visit, _ = _online_core.draw(P.stream, KEY, *which)
    short = visit._replace(batches=jax.tree.map(lambda x: x[:2], visit.batches))
    return {
        "population": (Update(9), r"Client 9 .* clients 0 to 3"),
        "negative": (Update(-1), "Client -1 "),
        "no id": (Update("a"), "'a' sends an update: a client's id is an integer"),
        "not there": (Update(3), r"Client 3 .* not there: Join\(3\) first"),
        "left": (Leave(3), r"Client 3 leaves and is not there"),
        "download": (Download(3), r"Client 3 downloads and is not there"),
        "future": (Update(1, base=7), "from version 7, and the server is at version 1"),
        "past": (Update(1, base=-2), "from version -2"),
        "duplicate": (Update(0), "client 0 from version 0 is a duplicate"),
        "replayed": (Update(0, base=0, message=m), "is a duplicate"),
        "shape": (
            Update(1, message=wide),
            r"(?s)client 1's message.*kernel.*float32\[5, 6\], got float32\[6, 5\]",
        ),
        "type": (Update(1, message=double), r"float32\[6\], got float64\[6\]"),
        "tree": (Update(1, message=part), "(?s)kernel.*got nothing"),
        "no message": (Update(1, message={"a": 1}), "(?s)client 1's message does not"),
        "weight": (Update(1, message=message(weight=-1.0)), "weight -1.0"),
        "nan weight": (Update(1, message=message(weight=np.nan)), "weight nan"),
        "nan": (
            Update(1, message=message(np.nan)),
            "client 1, from version 0, holds NaN",
        ),
        "inf": (Update(1, message=message(np.inf)), "NaN or Inf"),
        "visit": (
            Update(1, visit=short),
            r"(?s)visit.*\[3, 4, 5\], got float32\[2, 4, 5\]",
        ),
        "other's visit": (
            Update(2, visit=visit),
            "client 2 brings a visit of client 1",
        ),
        "huge": (Update(1, message=message(3e38)), "after version 1 was not finite"),
    }


def begun(**kw):
    """A server at version 1, whose steps are twice as long as they should be."""
    twice = aggregation.server(aggregation.mean(), optax.sgd(2.0))
    algorithm = alg.fedavg(P.loss_fn, optax.sgd(0.1), server=twice)
    rule = online.discount(online.constant())
    server = server_of(algorithm, staleness=rule, **kw)
    drained(server, [Join(0), Join(1), Join(2), Update(0)])
    return server


@pytest.fixture(scope="module")
def strict():
    return begun()


class TestBadInput:
    @pytest.mark.parametrize("name", bad_arrivals())
    def test_is_refused_and_changes_nothing(self, strict, name):
        event, words = bad_arrivals()[name]
        before, position = strict.state(), strict.position
        with pytest.raises(online.RefusedError, match=words) as e:
            strict.handle(event)
        assert e.value.report.outcome in ("refused", "nonfinite", "diverged")
        assert strict.position == position + 1
        after = strict.state()
        assert_same(after.server, before.server)
        if name != "huge":  # Its buffer is gone, and with it what the client told.
            assert_same(after.clients, before.clients)

    def test_is_dropped_and_counted(self):
        server = begun(faults="drop")
        bad = [event for event, _ in bad_arrivals().values()]
        before = server.params
        reports = drained(server, bad)
        assert all(r.why for r in reports)
        t = server.totals
        assert (t.refused, t.nonfinite, t.diverged) == (len(bad) - 3, 2, 1)
        assert_same(server.params, before)
        assert server.handle(Update(2)).outcome == "accepted"
        assert server.version == 2

    def test_a_client_that_leaves_keeps_what_it_remembers(self):
        server = served_many()
        drained(server, [Join(0), Update(0), Leave(0)])
        before = server.state()
        with pytest.raises(online.RefusedError, match="not there"):
            server.handle(Update(0))
        drained(server, [Join(1), Update(1), Join(0)])
        row = lambda s: tree.gather(s.clients, 0)
        assert_same(row(server.state()), row(before))
        assert server.handle(Update(0)).staleness == 0

    def test_an_absent_client_and_one_without_weight(self):
        class Away(testing.ToyStream):
            def present(self, client, round):
                return client != 1

        jax.tree_util.register_dataclass(Away)
        stream = Away(P.stream.x, P.stream.y)
        server = server_of(stream=stream)
        empty = Update(0, message=message(weight=0.0))
        reports = drained(server, [Join(0), Join(1), Update(1), empty])
        assert [r.outcome for r in reports[2:]] == ["absent", "empty"]
        assert server.version == 0

    def test_arguments(self):
        for kw, words in (
            ({"buffer": 0}, "buffer is 0"),
            ({"max_staleness": -1}, "max_staleness is -1"),
            ({"faults": "ignore"}, "faults is 'ignore'"),
            ({"detector": online.page_hinkley()}, "give loss_fn="),
            ({"quorum": 0}, "quorum is 0"),
        ):
            with pytest.raises(ValueError, match=words):
                server_of(**kw)
        with pytest.raises(ValueError, match="needs a stream"):
            server_of(PROBED, stream=None)
        with pytest.raises(ValueError, match="2 clients and the stream 4"):
            state = PLAIN.init(P.params, EXAMPLE, 2)
            online.Server(PLAIN, state, buffer=1, key=KEY, stream=P.stream)
        with pytest.raises(ValueError, match="5 of 4 clients"):
            order(active=5)
        with pytest.raises(TypeError, match="is not an event"):
            server_of().handle("hello")
        with pytest.raises(online.RefusedError, match="no stream"):
            drained(server_of(stream=None), [Join(0), Update(0)])

    def test_an_event_cut_off_in_the_middle_is_not_saved(self, tmp_path):
        server = server_of(checkpoint=checkpoint.Checkpoints(tmp_path, every=5))
        drained(server, order(10))

        def interrupted(*args, **kw):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as m:
            m.setattr(_online_core, "train", interrupted)
            with pytest.raises(KeyboardInterrupt):
                drained(server, order(14)[10:])
        with pytest.raises(RuntimeError, match="resume=True"):
            server.handle(Tick())
        server.close()
        again = server_of(checkpoint=checkpoint.Checkpoints(tmp_path), resume=True)
        drained(again, order(14)[again.position :])
        assert_same(again.state(), straight(14).state())

    def test_an_aggregation_that_writes_into_the_base_is_refused(self):
        def aggregate(server, messages):
            new = PLAIN.aggregate(server, messages)
            return new._replace(frozen={"theta": server.frozen["theta"] + 1})

        writing = PLAIN._replace(aggregate=aggregate)
        frozen = {"theta": jnp.ones(3)}
        init = PLAIN.init(P.params, EXAMPLE, 4, frozen=None)
        state = init._replace(server=init.server._replace(frozen=frozen))
        ignoring = writing._replace(
            client_update=lambda s, c, v: PLAIN.client_update(
                s._replace(frozen=None), c, v
            )
        )
        kw = {"buffer": 1, "key": KEY, "stream": P.stream}
        with pytest.raises(TypeError, match="changes the frozen parameters"):
            online.Server(ignoring, state, **kw)
        reading = ignoring._replace(aggregate=PLAIN.aggregate)
        server = online.Server(reading, state, **kw)
        assert server.snapshot().frozen["theta"] is frozen["theta"]


def straight(count, **kw):
    server = server_of(**kw)
    drained(server, order(count))
    return server


def watched(directory=None, resume=False, every=7):
    """A server with everything that must survive."""
    saving = directory and checkpoint.Checkpoints(directory, every=every)
    return served_many(
        loss_fn=P.loss_fn,
        detector=SENSITIVE,
        quorum=2,
        evaluate=lambda s: {"bias": s.server.params["bias"]},
        checkpoint=saving,
        resume=resume,
    )


SCRIPT = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
import conftest
from fedcl import online
from tests import test_online as t
server = t.watched(sys.argv[1], resume=True)
live = itertools.islice(online.arrivals(t.KEY, 4), 5000)
for report in online.serve(server, online.journal(sys.argv[1] + "/arrivals.jsonl", live)):
    pass
"""


class TestSaving:
    def test_killed_and_resumed_is_the_server_that_was_never_stopped(self, tmp_path):
        """`kill -9` after the first checkpoint, then the record and what comes after."""
        argv = [sys.executable, "-c", SCRIPT, str(tmp_path), str(ROOT)]
        process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while checkpoint.Checkpoints(tmp_path).latest() is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        record = tmp_path / "arrivals.jsonl"
        events = online.load(record)
        assert events == order(len(events)) and len(events) < 5000
        server = watched(tmp_path, resume=True)
        assert 0 < server.position <= len(events)
        live = order(len(events) + 9)[len(events) :]
        rest = drained(server, online.journal(record, live, start=server.position))
        assert online.load(record) == order(len(events) + 9)
        whole = watched()
        want = online.collect(drained(whole, order(len(events) + 9)))
        assert_same(server.state(), whole.state())
        assert server.totals == whole.totals
        got = online.collect(rest)
        tail = {k: v[-len(rest) :] for k, v in want.rounds.items()}
        assert_same(got.rounds, {k: tail[k] for k in got.rounds})
        assert server.past is not None
        head = {k: v[: -len(rest)] for k, v in want.rounds.items()}
        assert_same({k: server.past.rounds[k] for k in head}, head)
        before = np.isin(want.at, server.past.at)
        if before.any():
            assert_same(
                server.past.evaluations["bias"], want.evaluations["bias"][before]
            )

    def test_resuming_is_bit_identical_wherever_it_stops(self, tmp_path):
        whole = watched()
        drained(whole, order(45, clock=0.2))
        for stop in (9, 23, 38, 45):
            server = watched(tmp_path, resume=True)
            drained(server, order(stop, clock=0.2)[server.position :])
        assert server.position == 45 and server.totals == whole.totals
        assert_same(server.state(), whole.state())

    def test_other_servers_are_refused(self, tmp_path):
        drained(server_of(checkpoint=checkpoint.Checkpoints(tmp_path)), order(5))
        go = lambda **kw: server_of(checkpoint=checkpoint.Checkpoints(tmp_path), **kw)
        with pytest.raises(checkpoint.CheckpointError, match="already holds a run"):
            go()
        with pytest.raises(checkpoint.CheckpointError, match=r"(?s)its state.*buffer"):
            go(resume=True, buffer=5)
        with pytest.raises(checkpoint.CheckpointError, match="its key differs"):
            go(resume=True, key=jax.random.key(9))
        assert go(resume=True).position == 5

    def test_another_base_is_refused(self, tmp_path):
        def served(theta):
            init = fresh()
            state = init._replace(server=init.server._replace(frozen={"t": theta}))
            saving = checkpoint.Checkpoints(tmp_path)
            kw = {"stream": None, "checkpoint": saving, "resume": True}
            return online.Server(PLAIN, state, buffer=1, key=KEY, **kw)

        drained(served(jnp.arange(3.0)), [Join(0), Update(0, message=message())])
        assert served(jnp.arange(3.0)).version == 1
        with pytest.raises(
            checkpoint.CheckpointError, match="its frozen base θ differs"
        ):
            served(jnp.arange(3.0) + 1)

    def test_what_is_served_stays_valid_and_whole(self):
        server, seen, done = server_of(), [], threading.Event()

        def read():
            while not done.is_set():
                seen.append(server.snapshot())

        reader = threading.Thread(target=read)
        reader.start()
        versions = [server.snapshot()]
        for report in online.serve(server, order(80)):
            if report.version != versions[-1].version:
                versions.append(server.snapshot())
        done.set()
        reader.join()
        assert [s.version for s in versions] == list(range(server.version + 1))
        of = {s.version: np.asarray(s.params["kernel"]) for s in versions}
        numbers = [s.version for s in seen]
        assert numbers == sorted(numbers)
        for s in seen[:: max(1, len(seen) // 50)]:
            np.testing.assert_array_equal(s.params["kernel"], of[s.version])


class TestRecord:
    def test_events_come_back(self, tmp_path):
        which = map(jnp.int32, (1, 0, 0))
        visit, _ = _online_core.draw(P.stream, KEY, *which)
        half = message()._replace(
            delta={"kernel": jnp.ones((5, 6), jnp.bfloat16), "bias": jnp.zeros(())}
        )
        events = [*order(9), Tick(flush=True), Leave(0, 2.5), Update(0, message=half)]
        events += [Update(np.int64(1), visit=visit, lost=True, time=0.1)]
        online.save(tmp_path / "a.jsonl", events)
        kw = {"message": half, "visit": visit}
        back = online.load(tmp_path / "a.jsonl", **kw)
        assert back[:11] == events[:11]
        assert back[11].message.delta["kernel"].dtype == jnp.bfloat16
        assert_same(back[11].message, half)
        assert_same(back[12].visit._replace(key=0), visit._replace(key=0))
        assert back[12].visit.key == visit.key
        assert online.load(tmp_path / "a.jsonl", start=11, **kw)[0].client == 0
        with pytest.raises(ValueError, match=r"server\.message"):
            online.load(tmp_path / "a.jsonl")

    def test_a_line_cut_off_is_left_out_and_written_again(self, tmp_path):
        path = tmp_path / "a.jsonl"
        list(online.journal(path, order(6)))
        with open(path, "a") as file:
            file.write('{"event": "Upd')
        assert online.load(path) == order(6)
        assert list(online.journal(path, order(8)[6:], start=4)) == order(8)[4:]
        assert online.load(path) == order(8)
        with pytest.raises(ValueError, match="holds 8 arrivals and the server has"):
            next(online.journal(path, [], start=9))

    def test_a_line_that_is_no_event_is_named(self, tmp_path):
        path = tmp_path / "a.jsonl"
        for line in ("{", '{"event": "Dance"}', '{"event": "Join", "age": 3}', "3"):
            path.write_text(json.dumps({"event": "Tick"}) + "\n" + line + "\n")
            with pytest.raises(ValueError, match="line 2 is not an arrival"):
                online.load(path)


def test_the_loss_of_a_detector_is_not_computed_twice():
    """Page and Hinkley's test asks for the loss that the server computes anyway."""
    wide = lambda p, b, k: losses.softmax(
        lambda p, x, k: jnp.tanh(x @ p["a"]) @ p["b"]
    )(p, b, k)
    params = {"a": jnp.ones((5, 64)), "b": jnp.ones((64, 6))}
    state = PLAIN.init(params, EXAMPLE, 4)
    which = map(jnp.int32, (1, 0, 0))
    visit, _ = _online_core.draw(P.stream, KEY, *which)

    def flops(detector):
        rows = tree.stack(() if detector is None else detector.init(), 4)
        server = state.server._replace(frozen=None)
        kw = {"loss_fn": wide, "detector": detector}
        program = _online_core.watch.lower(server, rows, None, visit, **kw).compile()
        return program.cost_analysis()["flops"]

    assert flops(online.page_hinkley()) < 1.2 * flops(None)


def test_the_example_of_the_page_runs():
    page = (ROOT / "docs" / "online.md").read_text()
    example = page.split("```python\n")[-1].split("```")[0]
    assert "SECONDS, CLIENTS = 50, 20\n" in example
    names: dict = {}
    first, calls = example.split("replay, detector =")
    exec(first.replace("= 50, 20", "= 50, 4"), names)
    assert calls.count("go(") == 2
    server, history = names["go"](None, seconds=0.7)
    assert {len(v) for v in history.rounds.values()} == {server.position}
    assert np.isfinite(history.rounds["loss"]).sum() == server.totals.accepted > 2
