"""A cohort taken in parts is added up: the same federation, in memory that is flat."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import _fold, algorithms, cohorts, phases, testing, tree
from fedcl import aggregation as agg
from fedcl.tpu import mesh
from tests.problems import many, replaying
from tests.test_rounds import assert_close

KEY = jax.random.key(3)
CHAINS = {
    "weighted_mean": lambda: agg.server(agg.weighted_mean()),
    "clipped, mean, adam": lambda: agg.server(
        agg.per_client(optax.clip(0.05)), agg.mean(), optax.adam(0.1)
    ),
}


@pytest.fixture(scope="module")
def problem():
    return many(testing.toy_problem(), 8)


def go(p, parts=None, chain="clipped, mean, adam", wrap=lambda a: a, **kw):
    """Two rounds in which a client sits out, another is silent and a third sends NaN."""
    tell = fedcl.transform(end=lambda memory, params, ctx: (memory, params))
    method = fedcl.chain(replaying(), tell)
    options = {"transform": method, "server": CHAINS[chain]()}
    algorithm = wrap(algorithms.fedavg(p.loss_fn, optax.sgd(0.1), **options))
    state = algorithm.init(p.params, p.stream.example(), 8)
    poisoned = p.stream.x.at[6].set(jnp.nan)
    stream = type(p.stream)(poisoned, p.stream.y)
    parts = parts(algorithm) if parts else algorithm
    run = {"key": KEY, "rounds": 2, "every": 2, "nonfinite": "drop", **kw}
    return fedcl.run(parts, state, stream, **run)


def cohort(sampler):
    trains = cohorts.training(sampler, lambda k, c, t: c != 1)
    return cohorts.reporting(trains, lambda k, c, t: c != 4)


def same(a, b):
    return jax.tree.map(np.testing.assert_array_equal, a, b)


CASES = {
    "scan": ("scan", None, "clipped, mean, adam"),
    "chunks with a rest": (3, None, "weighted_mean"),
    "four devices": (1, 4, "clipped, mean, adam"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cohort_added_up_is_the_cohort_stacked(problem, case):
    schedule, devices, chain = CASES[case]
    who = cohort(cohorts.stratified(8, devices or 1))
    want, h = go(problem, chain=chain, cohort=who)
    where = {} if devices is None else {"mesh": mesh(devices)}
    got, g = go(problem, chain=chain, cohort=who, schedule=schedule, **where)
    assert_close(got, want)
    for name in ("client", "trained", "reported", "nonfinite"):
        np.testing.assert_array_equal(g.rounds[name], h.rounds[name])
    assert h.rounds["nonfinite"].any() and not h.rounds["reported"].all()
    assert tree.vdot(want.server.shared, want.server.shared) > 0


def test_one_chunk_is_the_cohort_at_once_bit_for_bit(problem):
    who = cohort(cohorts.uniform(5))
    same(go(problem, cohort=who, schedule=5)[0], go(problem, cohort=who)[0])


def test_who_reads_the_messages_has_them_stacked(problem):
    """A phase after the cohort gets what each client sent, whatever the schedule."""

    def parts(algorithm, **kw):
        def apply(data, steps, state, memory, facts):
            deltas = phases.sent(state).messages.delta
            return state, deltas, {}

        empty = lambda data, state: jax.tree.map(
            lambda x: jnp.zeros((8, *x.shape)), state.server.params
        )
        look = phases.Phase((), "look", empty, apply)
        return [phases.federated(algorithm, **kw), look]

    want, _ = go(problem, parts=parts)
    got, _ = go(problem, parts=lambda a: parts(a, schedule=3))
    assert_close(got, want)
    assert np.abs(got.phases[1].own["kernel"]).max() > 0


def test_a_round_that_is_off_says_nothing(problem):
    off = phases.every(2)
    part = lambda a: [phases.federated(a, schedule=3, switch=off)]
    want = lambda a: [phases.federated(a, switch=off)]
    assert_close(go(problem, parts=part)[0], go(problem, parts=want)[0])


def big(chain, size, schedule, wrap=lambda algorithm: algorithm):
    """Bytes of temporaries of a round of `size` of 1000 clients, φ of 40 kB."""
    params = {"shared": jnp.zeros(10_000), "own": jnp.zeros(3)}
    far = lambda p, x: sum(jnp.sum((leaf - x) ** 2) for leaf in jax.tree.leaves(p))
    loss = lambda p, batch, key: (far(p, batch["x"][0]), batch["x"])
    algorithm = wrap(algorithms.fedavg(loss, optax.sgd(0.1), server=chain))

    class Stream(testing.ToyStream):
        num_clients = 1000

        def sample(self, key, client, round):
            return {"x": jax.random.normal(key, (1, 1)), "mask": jnp.ones((1, 1))}

        def example(self):
            row = jax.ShapeDtypeStruct((1,), jnp.float32)
            return {"x": row, "mask": row}

    jax.tree_util.register_dataclass(Stream)
    stream = Stream(jnp.zeros(1), jnp.zeros(1))
    init = lambda p: algorithm.init(p, stream.example(), 1000)
    part = phases.federated(algorithm, cohort=cohorts.uniform(size), schedule=schedule)
    begun = lambda p: phases.start((part,), init(p))
    state = jax.eval_shape(begun, params)
    step = jax.jit(lambda s, k, t, x: phases.step((part,), s, k, t, x))
    one = step.lower(state, KEY, jnp.int32(0), stream).compile().memory_analysis()
    return one.temp_size_in_bytes


def test_memory_does_not_grow_with_the_cohort():
    few, many_ = (big(agg.default_server(), n, 10) for n in (10, 1000))
    assert many_ < 1.1 * few
    robust = agg.server(agg.median(), optax.sgd(1.0))
    assert big(robust, 1000, 10) > 1000 * 40_000


def personal(algorithm):
    return algorithms.personal(algorithm, lambda path: path in ("own", "bias"))


def test_what_is_shared_of_a_personal_cohort_is_added_up(problem):
    who = cohort(cohorts.uniform(8))
    want, _ = go(problem, wrap=personal, cohort=who)
    got, _ = go(problem, wrap=personal, cohort=who, schedule=3)
    assert_close(got, want)
    assert np.ptp(want.clients.kept.params["bias"], axis=0).max() > 0
    assert big(agg.default_server(), 1000, 10, personal) < 100 * 40_000


def test_a_chain_says_why_it_stacks():
    clip = agg.per_client(optax.clip(1.0))
    assert not _fold.why_stacked(agg.server(clip, agg.mean(), optax.adam(1.0)))
    cases = {
        "median is not a mean": agg.server(agg.median(), optax.sgd(1.0)),
        "optax may look at all": agg.server(
            optax.clip(1.0), agg.mean(), optax.sgd(1.0)
        ),
        "not built by": optax.sgd(1.0),
        "mine is not a mean": agg.server(
            agg.reduction(lambda u, w: u[-1], linear=True, label="mine")
        ),
    }
    for message, chain in cases.items():
        assert message in _fold.why_stacked(chain)
