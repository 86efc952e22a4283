"""FFM's Algorithms 1 and 2, the couplings and FedDF equal their slow loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import (
    _program,
    _random,
    algorithms,
    cohorts,
    phases,
    testing,
)
from fedcl.checkpoint import Checkpoints
from fedcl.tpu import mesh
from tests.oracles import case, federation, ffm
from tests.oracles.federation import LR, N, S, T
from tests.problems import many

KEY, PER_BATCH = jax.random.key(5), 4
ASKING = 2**32 - 1
DATA = federation.data(0)
ROWS = ffm.public()


def rows():
    kind = lambda a: jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32)
    return jax.tree.map(kind, ROWS._asdict())


def key_of(phase, t):
    return jax.random.fold_in(jax.random.fold_in(KEY, t), phase)


def index(key):
    below = _random.below(jax.random.split(key)[0], (PER_BATCH,), len(ROWS.y))
    return np.asarray(below)


@functools.cache
def draws_of(phase):
    """Which public rows step e of a phase draws in round t."""
    each = jax.jit(
        lambda t, e: _random.below(
            jax.random.split(jax.random.fold_in(key_of(phase, t), e))[0],
            (PER_BATCH,),
            len(ROWS.y),
        )
    )
    return functools.cache(lambda t, e: np.asarray(each(t, e)))


def go(parts, algorithm, cohort=None, length=T, params=None):
    """All rounds; the state and the metrics [T, ...]."""
    stream = case.recorded(DATA)
    params = case.params_of(DATA.theta) if params is None else params
    parts = parts(cohort or case.heard(jnp.asarray(DATA.report)))

    @jax.jit
    def simulate(parts, stream, params):
        state = algorithm.init(params, stream.example(), N)
        one = lambda s, t: phases.step(parts, s, KEY, t, stream)
        return jax.lax.scan(one, phases.start(parts, state), jnp.arange(length))

    return simulate(parts, stream, params)


def difference(state, want):
    return np.abs(case.theta_of(state) - want).max()


def sgd(lr, beta):
    return optax.sgd(lr, momentum=beta or None)


class Ours:
    """The same round in fedcl, from the oracle's class."""

    def __init__(self, kind, switch=None, transform=None):
        self.kind = kind
        server = fedcl.aggregation.server(
            fedcl.aggregation.weighted_mean(), sgd(1.0, kind.server_beta)
        )
        self.algorithm = algorithms.fedavg(
            case.loss_fn,
            sgd(LR, kind.beta),
            server=server,
            opt_policy=kind.client_policy,
            transform=transform,
        )
        self.switch = switch or phases.every(2, 3)

    def public(self, **kw):
        k = self.kind
        return phases.public(
            case.loss_fn,
            sgd(k.public_lr, k.public_beta),
            rows(),
            batch_size=PER_BATCH,
            switch=self.switch,
            opt_policy=k.public_policy,
            **kw,
        )

    def federated(self, cohort, **kw):
        return phases.federated(self.algorithm, cohort=cohort, **kw)

    def algorithm2(self, cohort):
        return (self.public(), self.federated(cohort))


def scheduled(kind):
    """The oracle's class with the switch `every(2, 3)`."""

    class Every(kind):
        def steps(self, t, w):
            return 0 if t % 2 else 3

    return Every


def variant(kind, **fields):
    return type("Variant", (scheduled(kind),), fields)


POLICIES = {
    "plain": {},
    "public momentum kept, clients' averaged": {
        "client_policy": "average",
        "beta": 0.5,
        "public_beta": 0.7,
    },
    "public momentum reset, clients' kept": {
        "client_policy": "keep",
        "beta": 0.5,
        "public_policy": "reset",
        "public_beta": 0.7,
        "server_beta": 0.4,
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_algorithm_2_is_the_literal_loop(name):
    kind = variant(ffm.Round, **POLICIES[name])
    ours = Ours(kind)
    state, told = go(ours.algorithm2, ours.algorithm)
    np.testing.assert_array_equal(told["public/steps"], [3, 0] * 4 + [3])
    want = kind(DATA, ROWS, draws_of(0)).run()
    assert difference(state, want) < 2e-6
    plain = variant(ffm.Round)(DATA, ROWS, draws_of(0)).run()
    assert name == "plain" or np.abs(want - plain).max() > 1e-2


def test_sampling_before_training_is_the_literal_loop():
    kind = variant(ffm.Sampled, client_policy="keep", beta=0.5)
    table = jnp.asarray(kind.table, jnp.int32)
    both = jnp.ones(2, bool)
    draw = lambda key, round, n: cohorts.Cohort(table[round], both, both)
    ours = Ours(kind)
    state, _ = go(ours.algorithm2, ours.algorithm, cohorts.Sampler(draw, shards=None))
    assert difference(state, kind(DATA, ROWS, draws_of(0)).run()) < 2e-6


def test_who_trains_and_is_not_heard_matters_only_if_clients_remember():
    """The paper's S_t among all who trained, and S_t drawn before, in the slow loop."""

    def heard_only(kind):
        class Heard(kind):
            def who(self, t):
                report = super().who(t)[1]
                return report, report

        return Heard

    for policy, same in (("reset", True), ("keep", False)):
        kind = variant(ffm.Round, client_policy=policy, beta=0.5)
        ends = [k(DATA, ROWS, draws_of(0)).run() for k in (kind, heard_only(kind))]
        assert np.array_equal(*ends) == same


def test_algorithm_1_is_algorithm_2_without_public_data():
    ours = Ours(ffm.Round, phases.until(0, 3))
    never, _ = go(ours.algorithm2, ours.algorithm)
    plain, _ = go(lambda c: (ours.federated(c),), ours.algorithm)
    jax.tree.map(np.testing.assert_array_equal, never.server, plain.server)
    assert difference(plain, ffm.Round(DATA, ROWS, None).run()) < 1e-6


def coupled(kind, **kw):
    """Mixed FL: [gradient], aside(public), federated, join."""
    method = algorithms.gradient_transfer(kind.strength) if kind.strength else None
    ours = Ours(kind, transform=method)
    given = phases.client_gradient(LR * S, kind.strength) if kind.both else None

    def parts(cohort):
        tell = phases.gradient(case.loss_fn, rows(), batch_size=PER_BATCH, **kw)
        first = (tell,) if kind.strength else ()
        beside = phases.aside(ours.public(transfer=given))
        return (*first, beside, ours.federated(cohort), phases.join(kind.rate))

    return go(parts, ours.algorithm)


def negative(steps, others):
    """Draws of `gradient`, numbered −1, −2, …, are those of phase 0."""
    return lambda t, e: draws_of(0)(t, -1 - e) if e < 0 else draws_of(steps)(t, e)


COUPLINGS = {
    "parallel": ({"rate": 0.5}, 0),
    "one-way": ({"rate": 0.0, "strength": 0.7, "batches": 2}, 1),
    "two-way": ({"rate": 0.5, "strength": 0.7, "both": True}, 1),
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_coupling_is_the_literal_loop(name):
    fields, public = COUPLINGS[name]
    kind = variant(ffm.Mixed, **fields)
    kw = {"switch": phases.always(kind.batches)} if kind.strength else {}
    state, _ = coupled(kind, **kw)
    want = kind(DATA, ROWS, negative(public, 0)).run()
    assert difference(state, want) < 5e-6
    assert np.abs(want - ffm.Round(DATA, ROWS, None).run()).max() > 1e-2


def test_without_strength_a_coupling_is_fedavg():
    ours = Ours(ffm.Round, transform=algorithms.gradient_transfer(0.0))

    def parts(cohort):
        tell = phases.gradient(case.loss_fn, rows(), batch_size=PER_BATCH)
        beside = phases.aside(ours.public())
        return (tell, beside, ours.federated(cohort), phases.join(0.0))

    plain = Ours(ffm.Round)
    want, _ = go(lambda c: (plain.federated(c),), plain.algorithm)
    got, told = go(parts, ours.algorithm)
    jax.tree.map(np.testing.assert_array_equal, got.server.params, want.server.params)
    assert np.all(told["gradient/norm"] > 0)


def distilling(kind, steps, **kw):
    ours = Ours(kind)

    def parts(cohort):
        student = phases.distil(
            case.linear,
            optax.sgd(kind.distil_lr),
            {k: v for k, v in rows().items() if k != "y"},
            batch_size=PER_BATCH,
            switch=phases.always(steps),
            temperature=kind.temperature,
            **kw,
        )
        return (ours.federated(cohort), student)

    return go(parts, ours.algorithm)


@functools.cache
def distil_draws(t, e):
    key = jax.random.fold_in(key_of(1, t), e)
    return np.asarray(_random.below(key, (PER_BATCH,), len(ROWS.y)))


@pytest.mark.parametrize("schedule", ["vmap", 3])
def test_distillation_is_fed_df(schedule):
    kind = type("Warm", (ffm.FedDF,), {"temperature": 2.0})
    state, told = distilling(kind, kind.distil_steps, schedule=schedule)
    want = kind(DATA, ROWS, distil_draws).run()
    assert difference(state, want) < 2e-6
    assert np.abs(want - ffm.Round(DATA, ROWS, None).run()).max() > 1e-2
    assert told["distil/steps"].tolist() == [3] * T


def test_distillation_in_no_steps_is_fedavg():
    ours = Ours(ffm.Round)
    want, _ = go(lambda c: (ours.federated(c),), ours.algorithm)
    got, _ = distilling(ffm.FedDF, 0)
    jax.tree.map(np.testing.assert_array_equal, got.server, want.server)


def test_nobody_teaches_in_a_round_in_which_nobody_reports():
    silent = case.heard(jnp.zeros((T, N), bool))
    ours = Ours(ffm.Round)
    student = phases.distil(
        case.linear, optax.sgd(1.0), rows(), batch_size=2, switch=phases.always(2)
    )
    parts = lambda cohort: (ours.federated(cohort), student)
    state, _ = go(parts, ours.algorithm, silent, length=2)
    start = case.params_of(DATA.theta)
    jax.tree.map(np.testing.assert_array_equal, state.server.params, start)


def test_conflict_and_budget_are_their_formulas():
    kind = ffm.Conflict
    asks = phases.all_of(
        phases.conflict(case.loss_fn, kind.each, batch_size=PER_BATCH),
        phases.budget(kind.budget),
    )
    ours = Ours(kind, asks)
    state, told = go(ours.algorithm2, ours.algorithm)
    asked = lambda t: jax.random.fold_in(jax.random.fold_in(key_of(0, t), ASKING), 0)
    draws = lambda t, e: index(asked(t)) if e < 0 else draws_of(0)(t, e)
    oracle = kind(DATA, ROWS, draws)
    assert difference(state, oracle.run()) < 2e-6
    steps = [h.steps for h in oracle.told]
    np.testing.assert_array_equal(told["public/steps"], steps)
    assert sum(steps) == kind.budget
    assert 0 in steps[: steps.index(1)]  # A conflict before the budget was spent.


def test_plateau_is_its_formula():
    kind = ffm.Plateau
    ours = Ours(kind, phases.plateau(kind.delta, kind.each, decay=kind.decay))
    state, told = go(ours.algorithm2, ours.algorithm)
    oracle = kind(DATA, ROWS, draws_of(0))
    assert difference(state, oracle.run()) < 2e-6
    steps = [h.steps for h in oracle.told]
    np.testing.assert_array_equal(told["public/steps"], steps)
    assert set(steps[2:]) == {0, 1}


@functools.cache
def everything_at_once(schedule, where=None):
    """Two-way coupling, a switch with memory and distillation, on eight clients."""
    p = many(testing.toy_problem(), 8)
    table = {"x": p.stream.x.reshape(-1, 5)[:20], "y": p.stream.y.reshape(-1)[:20]}
    asks = phases.all_of(
        phases.conflict(p.loss_fn, 2, batch_size=4, threshold=0.2),
        phases.plateau(0.5, 3),
        phases.budget(5),
    )
    method = algorithms.gradient_transfer(0.3)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=method)
    given = phases.client_gradient(0.1 * testing.STEPS, 0.3)
    apply = lambda params, x, key: x @ params["kernel"] + params["bias"][None]
    parts = (
        phases.gradient(p.loss_fn, table, batch_size=4),
        phases.aside(
            phases.public(
                p.loss_fn,
                optax.adam(0.01),
                table,
                batch_size=4,
                switch=asks,
                transfer=given,
            )
        ),
        phases.federated(
            algorithm,
            cohort=cohorts.stratified(4, 4),
            schedule=schedule,
            mesh=where,
            switch=phases.every(3, offset=1),
            name="private",
        ),
        phases.federated(
            algorithm, cohort=cohorts.stratified(8, 4), schedule=schedule, mesh=where
        ),
        phases.join(0.5),
        phases.distil(
            apply,
            optax.sgd(0.1),
            table,
            batch_size=4,
            switch=phases.every(2, 2),
            schedule="scan",
        ),
    )
    state = algorithm.init(p.params, p.stream.example(), 8)
    return parts, state, p.stream


def run(schedule="vmap", where=None, **kw):
    parts, state, stream = everything_at_once(schedule, where)
    kw = {"key": KEY, "rounds": 6, "every": 2, "mesh": where, **kw}
    return fedcl.run(parts, state, stream, **kw)


def close(a, b):
    one = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(one, a, b)


@pytest.fixture(scope="module")
def alone():
    before = _program._compiled._cache_size()
    state, history = run()
    assert _program._compiled._cache_size() == before + 1
    return state, history


def test_chunks_on_four_devices_give_the_same_round(alone):
    state, history = run(3, mesh(4))
    close(state, alone[0])
    steps = history.rounds["public/steps"]
    np.testing.assert_array_equal(steps, alone[1].rounds["public/steps"])
    assert 0 < steps.sum() <= 5 and 0 in steps


def test_a_resumed_run_is_the_same(alone, tmp_path):
    saved = Checkpoints(tmp_path, every=2)
    run(rounds=2, checkpoint=saved)
    state, _ = run(checkpoint=saved, resume=True)
    close(state, alone[0])
