"""Zeroth-order and black-box methods: against loops in float64, and the contract."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedcl
from fedcl import algorithms as alg
from fedcl import oracle, phases, testing, tree
from fedcl.algorithms import _fedkseed
from fedcl.tpu import mesh
from tests.oracles import black_box, case, federation, visits
from tests.oracles.federation import LR, N, S
from tests.problems import many

data = functools.partial(federation.data, 1)
ROUNDS, SEEDS, EPSILON, DIM, POP = 3, 7, 0.3, 3, 6


def run(algorithm, rounds=ROUNDS):
    return visits.run(algorithm, case.params_of(data().theta), data(), rounds)


def vector(params):
    parts = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    return federation.vector(*parts)


@functools.cache
def directions():
    one = lambda s: _fedkseed.direction(case.params_of(data().theta), s)
    return np.stack([vector(one(s)) for s in range(SEEDS)])


def kseed(**options):
    options = {"num_seeds": SEEDS, "epsilon": EPSILON, **options}
    return alg.fedkseed(case.loss_fn, LR, **options)


@functools.cache
def plain():
    """A run of FedKSeed that several tests look at: the state after each round."""
    return visits.states(kseed(), case.params_of(data().theta), data(), ROUNDS)


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_fedkseed_equals_a_loop(adaptive, rebuild):
    def choose(t, k, odds):
        key = jax.random.split(visits.key_of(t)[k])[0]
        return np.asarray(
            jax.random.categorical(key, jnp.log(jnp.asarray(odds)), shape=(S,))
        )

    rate, eps = (float(np.float32(x)) for x in (LR, EPSILON))
    given = (data(), ROUNDS, directions(), rate, eps, choose, adaptive, 0.4)
    want = black_box.fedkseed(*given)
    if adaptive or rebuild:
        state = run(kseed(adaptive=adaptive, clip=0.4, rebuild=rebuild))[0]
    else:
        state = plain()[-1]
    kept = state.server.opt_state
    error = np.abs(vector(state.server.params) - want.theta).max()
    print(f"\nfedkseed adaptive={adaptive} rebuild={rebuild}: {error:.1e}")
    assert error < 2e-5
    np.testing.assert_allclose(kept.walked, want.walked, atol=2e-5)
    odds = jax.nn.softmax(_fedkseed._log_odds(kept, adaptive))
    np.testing.assert_allclose(odds, want.probabilities, rtol=1e-4)
    assert adaptive == (np.ptp(want.probabilities) > 0.05)
    moved = np.abs(want.theta - data().theta).max()
    assert moved > 0.05


def test_the_replay_is_the_mean_of_where_the_clients_ended():
    """A round from φ_0: the sum of steps along fixed directions has no order."""
    d, state = data(), plain()[0]
    everyone = d._replace(train=np.ones_like(d.train), report=np.ones_like(d.report))
    chosen = lambda t, k, odds: np.asarray(
        jax.random.categorical(
            jax.random.split(visits.key_of(t)[k])[0], jnp.zeros(SEEDS), shape=(S,)
        )
    )
    given = (everyone, 1, directions(), LR, EPSILON, chosen)
    ends, heard = black_box.fedkseed(*given).ends, d.train[0] & d.report[0]
    n = np.where(heard, d.mask[0].sum(axis=(1, 2)), 0)
    mean = sum(n[k] * ends[k] for k in range(N)) / n.sum()
    np.testing.assert_allclose(vector(state.server.params), mean, atol=1e-5)


def test_who_has_the_start_and_the_sums_has_the_model():
    state = plain()[-1]
    kept, replay = state.server.opt_state, jax.jit(alg.replayed)
    # Programs may round the last bit of a sum in their own way.
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    params = replay(kept.start, kept.walked, LR)
    jax.tree.map(near, params, state.server.params)
    assert float(jnp.max(jnp.abs(params["kernel"] - kept.start["kernel"]))) > 0.01
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, replay(kept.start, kept.walked, 0.0), kept.start)


def test_clients_that_rebuild_the_model_read_nothing_of_it():
    """A server that has lost φ trains them alike, within the last bits of a sum."""
    params, one = case.params_of(data().theta), plain()[0]
    lost = jax.tree.map(jnp.zeros_like, one.server.params)
    visit = jax.tree.map(lambda x: x[0], visits.visits(data(), 1))
    client = tree.gather(one.clients, jnp.int32(0))
    blind = one.server._replace(params=lost)
    told = {
        rebuild: jax.jit(kseed(rebuild=rebuild).client_update)(server, client, visit)[0]
        for rebuild, server in ((True, blind), (False, one.server))
    }
    slopes = {k: np.asarray(m.delta) for k, m in told.items()}
    np.testing.assert_allclose(slopes[True], slopes[False], atol=2e-5)
    unread = jax.jit(kseed().client_update)(blind, client, visit)[0].delta
    assert np.abs(slopes[False] - unread).max() > 0.01
    assert np.abs(slopes[False]).max() > 0.01 and set(lost) == set(params)


def message_of(algorithm, params, problem):
    """The shapes of what a client sends, for a model of any size."""
    state = jax.eval_shape(lambda p: algorithm.init(p, {}, 1), params)
    visit = jax.eval_shape(
        lambda: jax.tree.map(lambda x: x[0], visits.visits(data(), 0))
    )
    client = jax.eval_shape(lambda s: tree.gather(s, jnp.int32(0)), state.clients)
    return jax.eval_shape(algorithm.client_update, state.server, client, visit)[0]


@pytest.mark.parametrize(
    ("num_seeds", "adaptive"), [(1024, False), (4096, False), (1600, True)]
)
def test_fedkseed_sends_less_than_twenty_kilobytes_of_any_model(num_seeds, adaptive):
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**3), jnp.bfloat16)}
    loss = lambda p, batch, key: (jnp.sum(p["w"]).astype(jnp.float32), ())
    algorithm = alg.fedkseed(loss, 0.1, num_seeds=num_seeds, adaptive=adaptive)
    message = message_of(algorithm, huge, None)
    assert tree.size(message) == 4 * num_seeds * (3 if adaptive else 1) + 4 < 20_000


def test_a_small_epsilon_follows_the_gradient():
    d, rows = data(), federation.rows_of(data(), 0, 0, 0, False)
    z = directions()[0]
    slope = (
        black_box.loss(d.theta + 1e-5 * z, rows)
        - black_box.loss(d.theta - 1e-5 * z, rows)
    ) / 2e-5
    assert np.isclose(slope, federation.gradient(d.theta, rows) @ z, rtol=1e-6)


# FedBPT


def bpt(box=None, **options):
    box = oracle.black_box(case.loss_fn) if box is None else box
    return alg.fedbpt(box, dimension=DIM, population=POP, std=0.7, **options)


def normals(t, k):
    keys = jax.random.split(visits.key_of(t)[k], 3 * S)[:S]
    return np.stack([np.asarray(jax.random.normal(key, (POP, DIM))) for key in keys])


def projection_of(state):
    """The oracle's θ is the kernel, then the bias; φ's leaves are in order of name."""
    pi = np.asarray(state.server.opt_state.projection, np.float64)
    bias = federation.Y
    return np.concatenate([pi[bias:], pi[:bias]])


def test_fedbpt_equals_a_loop_until_the_budget_ends():
    budget = (POP + 1) * S
    box = oracle.black_box(case.loss_fn, budget=budget)
    state, told = run(bpt(box, least_std=0.1))
    given = (data(), ROUNDS, projection_of(state), float(np.float32(0.7)), 0.1)
    want = black_box.fedbpt(*given, POP, normals, budget)
    error = np.abs(vector(state.server.params) - want.theta).max()
    print(f"\nfedbpt: {error:.1e}")
    assert error < 5e-5
    assert np.abs(want.theta - data().theta).max() > 0.05
    assert np.isclose(float(state.server.opt_state.strategy.std), want.std, rtol=1e-4)
    np.testing.assert_array_equal(state.clients.memory, want.queries)
    # In the end nobody asks, nobody sends and nothing moves.
    assert told[0]["reported"].any() and told[-1]["exhausted"].all()
    assert not told[-1]["reported"].any() and not told[-1]["queries"].any()


def test_fedbpt_minimises_a_quadratic_and_equals_the_loop():
    """The loss of a prompt is its distance to a point in the search's reach."""
    target = np.asarray([0.5, -0.4, 0.3])
    pi = projection_of(bpt().init(case.params_of(data().theta), {}, N))
    goal = data().theta + pi @ target

    def loss(params, batch, key):
        there = case.params_of(goal)
        gap = tree.sub(params, there)
        return tree.vdot(gap, gap), ()

    rounds = federation.T
    state, _ = run(bpt(oracle.black_box(loss)), rounds)
    value = lambda theta, rows: float(((theta - goal) ** 2).sum())
    given = (data(), rounds, pi, float(np.float32(0.7)), 0.0)
    want = black_box.fedbpt(*given, POP, normals, value=value).theta
    error = np.abs(vector(state.server.params) - want).max()
    print(f"\nfedbpt on a quadratic: {error:.1e}")
    assert error < 1e-4
    first, last = value(data().theta, None), value(want, None)
    assert last < 0.1 * first


def test_fedbpt_sends_a_few_numbers():
    message = message_of(bpt(), case.params_of(data().theta), None)
    assert tree.size(message) == 4 * (DIM + 2) + 4


def test_all_parents_are_those_of_evosax():
    """Of 2 n candidates CMA-ES learns from the best n: the positive weights are ours."""
    from evosax.algorithms import CMA_ES

    from fedcl.algorithms._fedbpt import _all_parents

    given = jax.jit(lambda: CMA_ES(8, jnp.zeros(5)).default_params)()
    ours = jax.jit(lambda n: _all_parents(6, 5, n))(4)
    np.testing.assert_allclose(ours["weights"][:4], given.weights[:4], rtol=1e-5)
    assert not ours["weights"][4:].any()
    for name in ("mu_eff", "c_c", "c_1", "c_mu", "c_std", "d_std"):
        np.testing.assert_allclose(ours[name], getattr(given, name), rtol=1e-5)


def test_an_oracle_may_live_elsewhere():
    """Calls go out to Python, and clients without budget make none."""
    calls = []

    def remote(prompt, x):
        calls.append(prompt.shape)
        return np.float32(((prompt - x.mean()) ** 2).sum())

    def query(params, batch, key):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        given = (params["kernel"], batch["x"])
        return jax.pure_callback(remote, shape, *given, vmap_method="sequential")

    algorithm, d = bpt(oracle.Oracle(query, budget=(POP + 1) * S)), data()
    state = algorithm.init(case.params_of(d.theta), {}, N)
    step = jax.jit(fedcl.round_fn(algorithm, schedule="scan"))
    everyone = np.ones(N, bool)
    state, first = step(state, visits.visits(data(), 0), everyone, everyone)
    jax.block_until_ready(state)
    made = len(calls)
    assert made >= int(first["queries"].sum()) > 0
    state, second = step(state, visits.visits(data(), 0), everyone, everyone)
    jax.block_until_ready(state)
    spared = np.asarray(second["exhausted"]) > 0
    assert spared.any() and len(calls) - made <= (~spared).sum() * (POP + 1) * S


def test_an_oracle_refuses_gradients_and_bad_budgets():
    box = oracle.black_box(case.loss_fn)
    rows = jax.tree.map(lambda x: x[0, 0], visits.visits(data(), 0).batches)
    params = case.params_of(data().theta)
    with pytest.raises(TypeError, match="no gradients"):
        jax.grad(lambda p: box.query(p, rows, jax.random.key(0)))(params)
    with pytest.raises(ValueError, match="budget is -1"):
        oracle.black_box(case.loss_fn, budget=-1)
    with pytest.raises(ValueError, match="population is 1"):
        alg.fedbpt(box, population=1)
    with pytest.raises(ValueError, match="num_seeds is 0"):
        alg.fedkseed(case.loss_fn, 0.1, num_seeds=0)


def test_fedbpt_says_that_it_needs_evosax(monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax.algorithms", None)
    with pytest.raises(ImportError, match=r"fedcl-jax\[blackbox\]"):
        alg.fedbpt(oracle.black_box(case.loss_fn), dimension=2, population=9)


# The contract


def algorithms(problem):
    box = oracle.black_box(problem.loss_fn)
    return {
        "fedkseed": alg.fedkseed(problem.loss_fn, 0.1, num_seeds=5, adaptive=True),
        "fedbpt": alg.fedbpt(box, dimension=2, population=4),
    }


@pytest.mark.parametrize("name", ["fedkseed", "fedbpt"])
def test_keeps_the_contract(name):
    problem = testing.toy_problem()
    algorithm = algorithms(problem)[name]
    assert len(testing.check_algorithm(algorithm, problem, tolerance=1e-4)) >= 7


@pytest.mark.parametrize("name", ["fedbpt"])
def test_chunks_on_eight_devices_give_the_same_federation(name):
    problem, devices = many(testing.toy_problem(), 8), mesh(8)
    algorithm = algorithms(problem)[name]

    def end(schedule, where):
        state = algorithm.init(problem.params, problem.stream.example(), 8)
        parts = (phases.federated(algorithm, schedule=schedule, mesh=where),)
        options = {"key": jax.random.key(2), "rounds": 2, "every": 2, "mesh": where}
        return fedcl.run(parts, state, problem.stream, **options)[0].server.params

    plain, meshed = end("vmap", None), end(1, devices)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, meshed, plain)
    assert not np.allclose(plain["kernel"], problem.params["kernel"])
