"""What a run needs is told before it runs, and refused if there is not as much."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fedcl
from fedcl import aggregation as agg
from fedcl import algorithms, cohorts, memory, phases, testing, tree
from tests.problems import many, replaying

KEY = jax.random.key(2)
MESSAGE = 4 * (5 * 6 + 6 + 1)  # Kernel, bias and weight.


@pytest.fixture(scope="module")
def problem():
    return many(testing.toy_problem(), 8)


def built(p, chain=None, **kw):
    algorithm = algorithms.fedavg(
        p.loss_fn, optax.sgd(0.1), transform=replaying(), server=chain
    )
    init = lambda params: algorithm.init(params, p.stream.example(), 8)
    parts = [phases.federated(algorithm, cohort=cohorts.uniform(6), **kw)]
    return parts, init


def test_a_report_names_its_parts_and_the_run_finds_its_program(problem, caplog):
    p = problem
    parts, init = built(p)
    table = jnp.zeros((7, 3))
    evaluate = jax.tree_util.Partial(
        lambda t, s: {"b": s.server.params["bias"] + jnp.sum(t)}, table
    )
    kw = {"key": KEY, "rounds": 2, "every": 2, "evaluate": evaluate}
    told = memory.report(parts, jax.eval_shape(init, p.params), p.stream, **kw)
    state = init(p.params)
    once = memory.report(parts, state, p.stream, **kw, donate=True)
    assert told.peak - once.peak == tree.size(state) == told.parts["state passed in"]
    assert told.parts["client states"] == tree.size(state.clients)
    assert told.parts["base θ"] == 0 and told.parts["evaluation"] == 84
    assert told.parts["stream"] == tree.size(p.stream)
    assert told.cohort == 6 * MESSAGE and "all 6 at once" in told.why
    own = sum(told.parts.values())
    assert 0.9 * own < told.peak < 1.3 * own and told.fits
    assert "client states" in str(told) and "peak" in str(told)
    with jax.log_compiles():
        fedcl.run(parts, state, p.stream, **kw)
    made = [r.message for r in caplog.records if "Finished XLA" in r.message]
    assert not [m for m in made if "_compiled" in m or "evaluated" in m]


CASES = {
    "added up": ({"schedule": 2}, None, 2, "2 at a time"),
    "robust": ({"schedule": 2}, agg.median, 6, "needs each client's message"),
}


def test_seeds_side_by_side_hold_a_cohort_each(problem):
    parts, init = built(problem, agg.server(agg.median(), optax.sgd(1.0)))
    keys = jax.random.split(KEY, 3)
    many_ = lambda p: jax.vmap(lambda _: init(p))(keys)
    state = jax.eval_shape(many_, problem.params)
    told = memory._messages(tuple(parts), state, problem.stream, keys, True)
    assert told[0] == 3 * 6 * MESSAGE and "each client's message" in told[1]
    assert "(3 seeds × 6 × 148 B)" in told[1]


@pytest.mark.parametrize("case", CASES)
def test_the_cohort_held_at_once(problem, case):
    schedule, reduction, held, why = CASES[case]
    chain = reduction and agg.server(reduction(), optax.sgd(1.0))
    parts, init = built(problem, chain, **schedule)
    state = jax.eval_shape(init, problem.params)
    told = memory._messages(
        tuple(parts), _begun(parts, state), problem.stream, KEY, False
    )
    assert told[0] == held * MESSAGE and why in told[1]


def test_who_reads_messages_holds_them(problem):
    parts, init = built(problem, schedule=2)
    look = lambda data, steps, state, memory, facts: (
        state,
        phases.mean_sent(state)[1],
        {},
    )
    after = phases.Phase((), "look", lambda data, state: jnp.array(False), look)
    parts = (*parts, after)
    state = _begun(parts, jax.eval_shape(init, problem.params))
    told = memory._messages(parts, state, problem.stream, KEY, False)
    assert told[0] == 6 * MESSAGE and "another part" in told[1]


def _begun(parts, state):
    return jax.eval_shape(lambda s: phases.start(tuple(parts), s), state)


def test_what_does_not_fit_is_refused_with_advice(problem):
    parts, init = built(problem)
    state = jax.eval_shape(init, problem.params)
    kw = {"key": KEY, "rounds": 1, "limit": 1000}
    with pytest.raises(
        MemoryError, match=r"will not fit(.|\n)*peak(.|\n)*of 1 kB"
    ) as e:
        memory.report(parts, state, problem.stream, **kw)
    assert 'schedule="scan"' in str(e.value) and "fedcl.store" in str(e.value)
