"""Schedules, meshes, seeds, faults and the host loop give one result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import _program, algorithms, cohorts, memory, metrics, phases, testing, tree
from fedcl.rounds import FaultError
from fedcl.tpu import mesh
from tests.problems import many, replaying

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def problem():
    return testing.toy_problem()


def go(problem, algorithm=None, rounds=4, every=2, **kw):
    p = problem
    algorithm = algorithm or algorithms.fedavg(
        p.loss_fn, optax.sgd(0.1), transform=replaying()
    )
    state = algorithm.init(p.params, p.stream.example(), p.stream.num_clients)
    evaluate = lambda s: {"bias": s.server.params["bias"]}
    kw = {"key": KEY, "rounds": rounds, "every": every, "evaluate": evaluate, **kw}
    return fedcl.run(algorithm, state, p.stream, **kw)


def assert_close(a, b, tolerance=1e-5):
    one = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    jax.tree.map(one, a, b)


SCHEDULES = {
    "scan": {"schedule": "scan"},
    "chunks of three": {"schedule": 3},
    "eight devices": {"devices": 8},
    "four devices, scan": {"devices": 4, "schedule": "scan"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_and_mesh_gives_the_same_federation(problem, name):
    p = many(problem, 8)
    kw = dict(SCHEDULES[name])
    kw["mesh"] = mesh(kw.pop("devices")) if "devices" in kw else None
    cohort = cohorts.stratified(8, 8) if kw["mesh"] else cohorts.uniform(5)
    want, _ = go(p, cohort=cohort)
    got, _ = go(p, cohort=cohort, **kw)
    assert_close(got, want)
    assert not np.allclose(got.server.params["kernel"], p.params["kernel"])


def test_auto_names_its_choice_and_keeps_it(problem, tmp_path, monkeypatch):
    p = problem
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path))
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(p.params, p.stream.example(), 4)
    told = []
    choose = lambda: fedcl.rounds.choose_schedule(
        algorithm, state, KEY, p.stream, repeats=1, tell=told.append
    )
    chosen = choose()
    assert chosen in ("vmap", "scan")
    assert repr(chosen) in told[0] and "scan:" in told[0] and "vmap:" in told[0]
    assert choose() == chosen
    assert told[1] == f"{told[0]}, as measured before on this machine"


def test_auto_runs_and_tries_a_chunk(problem, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path))
    p = many(problem, 8)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(p.params, p.stream.example(), 8)
    run = lambda schedule: fedcl.run(
        algorithm, state, p.stream, key=KEY, rounds=2, schedule=schedule
    )[0]
    with caplog.at_level("INFO", logger="fedcl.rounds"):
        found = run("auto")
    assert "2: " in caplog.text and "scan: " in caplog.text
    assert_close(found, run("vmap"))


def test_auto_does_not_try_what_does_not_fit(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDCL_CACHE", str(tmp_path))
    p = many(problem, 8)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(p.params, p.stream.example(), 8)
    told, room = [], iter([True, False, True])
    monkeypatch.setattr(memory, "fits", lambda *args: next(room))
    choose = lambda: fedcl.rounds.choose_schedule(
        algorithm, state, KEY, p.stream, repeats=1, tell=told.append
    )
    assert choose() != "scan"
    assert "scan: does not fit" in told[0] and "scan: 0" not in told[0]
    monkeypatch.setattr(memory, "fits", lambda *args: False)
    with pytest.raises(MemoryError, match="under none of the schedules.*'scan', 2"):
        choose()


def test_a_run_in_pieces_is_the_run_in_one(problem):
    whole, h = go(problem, rounds=5, every=5)
    pieces, g = go(problem, rounds=5, every=2)
    assert_close(whole, pieces, 1e-7)
    np.testing.assert_array_equal(h.rounds["loss"], g.rounds["loss"])
    assert g.rounds["loss"].shape == (5, 4)
    np.testing.assert_array_equal(g.at, [0, 2, 4, 5])
    assert g.evaluations["bias"].shape[0] == 4


def test_an_algorithm_that_runs_again_is_not_compiled_again(problem):
    algorithm = algorithms.fedavg(
        problem.loss_fn, optax.sgd(0.1), transform=replaying()
    )
    go(problem, algorithm)
    before = _program._compiled._cache_size()
    go(problem, algorithm)
    assert _program._compiled._cache_size() == before


class Unhashable:
    """A hook as an object that compares by value, such as a dataclass."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, fn):
        self.fn = fn

    def __eq__(self, other):
        return self is other

    def __call__(self, *args):
        return self.fn(*args)


def test_hooks_need_no_hash(problem):
    p = problem
    plain = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=replaying())
    other = plain._replace(client_update=Unhashable(plain.client_update))
    assert_close(go(p, other)[0], go(p, plain)[0], 0)
    before = _program._compiled._cache_size()
    go(p, other)
    assert _program._compiled._cache_size() == before
    state = other.init(p.params, p.stream.example(), p.stream.num_clients)
    told = [metrics.communication(a, state, p.stream) for a in (other, plain)]
    assert told[0] == told[1]


def test_seeds_by_vmap_are_separate_runs(problem):
    keys = jax.random.split(KEY, 2)
    p = problem
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=replaying())
    one = algorithm.init(p.params, p.stream.example(), 4)
    both = tree.stack(one, 2)
    state, h = fedcl.run(algorithm, both, p.stream, key=keys, rounds=3, every=2)
    assert h.rounds["loss"].shape == (2, 3, 4)
    for i in range(2):
        alone, g = fedcl.run(algorithm, one, p.stream, key=keys[i], rounds=3, every=2)
        assert_close(tree.gather(state, jnp.int32(i)), alone)
        np.testing.assert_allclose(h.rounds["loss"][i], g.rounds["loss"], rtol=1e-5)


def test_one_client_is_plain_sgd(problem):
    """FedAvg of one client and no server momentum is SGD over the same batches."""
    p = problem
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state, _ = go(p, algorithm, rounds=3, cohort=cohorts.fixed([2]))
    params = p.params
    for t in range(3):
        key = jax.random.fold_in(jax.random.fold_in(KEY, t), 0)
        visit = fedcl._engine.visit_of(
            p.stream, jax.random.split(key)[1], jnp.int32(2), jnp.int32(t)
        )
        for s in range(testing.STEPS):
            batch = tree.gather(visit.batches, jnp.int32(s))
            grads = jax.grad(lambda q, b=batch: p.loss_fn(q, b, None)[0])(params)
            params = jax.tree.map(lambda q, g: q - 0.1 * g, params, grads)
    assert_close(state.server.params, params)


def poisoned(problem, client):
    nan = problem.stream.x.at[client].set(jnp.nan)
    stream = testing.ToyStream(nan, problem.stream.y)
    return problem._replace(stream=stream)


def test_nan_from_a_client_is_never_averaged(problem):
    with pytest.raises(FaultError, match=r"Round 0: client 2 sent NaN or Inf") as e:
        go(poisoned(problem, 2))
    assert tree.finite(e.value.state.server.params)
    dropped, h = go(poisoned(problem, 2), nonfinite="drop")
    assert tree.finite(dropped.server) and tree.finite(dropped.clients)
    assert h.rounds["nonfinite"].sum() == 4 and h.rounds["nonfinite"][:, 2].all()
    keeps = lambda sampler: cohorts.training(sampler, lambda k, c, t: c != 2)
    without, _ = go(problem, cohort=keeps(cohorts.everyone()))
    assert_close(dropped.server.params, without.server.params, 1e-6)


@pytest.mark.parametrize("ids", [[1, 1], [0, 4], [-1, 2]])
def test_impossible_cohorts_are_named(problem, ids):
    with pytest.raises(FaultError, match="listed twice in the cohort, or is not in"):
        go(problem, cohort=cohorts.fixed(ids))


def test_a_cohort_beyond_the_population_is_refused(problem):
    with pytest.raises(ValueError, match="A cohort of 9 cannot be drawn"):
        go(problem, cohort=cohorts.uniform(9))


def test_a_round_without_anyone_is_the_identity(problem):
    p = problem
    algorithm = algorithms.fedavg(
        p.loss_fn,
        optax.sgd(0.1),
        server=algorithms_server(),
        transform=replaying(),
    )
    state = algorithm.init(p.params, p.stream.example(), 4)
    nobody = cohorts.training(cohorts.everyone(), cohorts.bernoulli(0.0))
    after, _ = fedcl.run(algorithm, state, p.stream, key=KEY, rounds=3, cohort=nobody)
    jax.tree.map(np.testing.assert_array_equal, after._replace(phases=()), state)


def algorithms_server():
    return fedcl.aggregation.server(fedcl.aggregation.weighted_mean(), optax.adam(0.1))


def test_training_without_reporting_keeps_the_server_and_moves_the_memory(problem):
    silent = cohorts.reporting(cohorts.everyone(), cohorts.bernoulli(0.0))
    state, h = go(problem, cohort=silent)
    np.testing.assert_array_equal(
        state.server.params["kernel"], problem.params["kernel"]
    )
    assert state.clients.memory.seen.min() > 0
    assert h.rounds["trained"].all() and not h.rounds["reported"].any()


def test_shared_is_the_mean_of_what_was_told(problem):
    tell = fedcl.transform(end=lambda memory, params, ctx: (memory, params))
    algorithm = algorithms.fedavg(problem.loss_fn, optax.sgd(0.1), transform=tell)
    drop = cohorts.reporting(cohorts.uniform(3), cohorts.bernoulli(0.5))
    state, _ = go(problem, algorithm, rounds=6, cohort=drop)
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), state.clients.told)
    assert_close(state.server.shared, mean, 1e-5)
    assert float(tree.vdot(mean, mean)) > 0


@pytest.mark.parametrize("policy", ["keep", "average"])
def test_optimiser_state_policies_carry_momentum_across_visits(problem, policy):
    p = problem
    opt = optax.sgd(0.1, momentum=0.9)
    end = {}
    for name in ("reset", policy):
        algorithm = algorithms.fedavg(p.loss_fn, opt, opt_policy=name)
        end[name], _ = go(p, algorithm, rounds=2, cohort=cohorts.fixed([1]))
    assert not np.allclose(
        end["reset"].server.params["kernel"], end[policy].server.params["kernel"]
    )


def test_rate_scales_the_local_update(problem):
    p = problem
    half = algorithms.fedavg(p.loss_fn, optax.sgd(0.2), rate=lambda t: jnp.float32(0.5))
    same = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    assert_close(go(p, half)[0].server.params, go(p, same)[0].server.params, 1e-6)


def test_public_phase_runs_behind_its_switch(problem):
    p = problem
    rows = {"x": p.stream.x.reshape(-1, 5), "y": p.stream.y.reshape(-1)}
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    public = phases.public(
        p.loss_fn, optax.sgd(0.5), rows, batch_size=8, switch=phases.until(2, steps=5)
    )
    state = algorithm.init(p.params, p.stream.example(), 4)
    parts = (public, phases.federated(algorithm))
    _, h = fedcl.run(parts, state, p.stream, key=KEY, rounds=4, every=2)
    np.testing.assert_array_equal(h.rounds["public/steps"], [5, 5, 0, 0])
    assert h.rounds["public/loss"][2] == 0 < h.rounds["public/loss"][0]
    off = phases.public(
        p.loss_fn, optax.sgd(0.5), rows, batch_size=8, switch=phases.until(0, steps=5)
    )
    parts = (off, phases.federated(algorithm, name="private"))
    state, h = fedcl.run(parts, state, p.stream, key=KEY, rounds=4, every=2)
    assert "private/loss" in h.rounds


COUNTS = fedcl.statistics.histogram(testing.CLASSES)


def counting(p, **hooks):
    empty = lambda params, example: jnp.zeros(testing.CLASSES)
    method = fedcl.transform(init=empty, **hooks)
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=method)
    return algorithm, algorithm.init(p.params, p.stream.example(), 4)


def first_context(p):
    """How many rows of each class every client has in context 0, [N, Y]."""
    ys = np.asarray(p.stream.y[:, 0])
    return np.stack([np.bincount(y, minlength=testing.CLASSES) for y in ys])


@pytest.mark.parametrize("where", [None, mesh(4)], ids=["one device", "four devices"])
def test_a_review_sees_every_row_of_a_context_that_ends(problem, where):
    p = problem

    def review(memory, params, sweep, ctx):
        value = fedcl.statistics.over(COUNTS, params, sweep, ctx.loss_fn, ctx.key)
        return memory + value

    algorithm, state = counting(p, review=review)
    kw = {"mesh": where} if where else {}
    # Even clients leave context 0 after round 1, odd ones after round 2.
    state, _ = fedcl.run(algorithm, state, p.stream, key=KEY, rounds=3, every=1, **kw)
    np.testing.assert_allclose(state.clients.memory, first_context(p))


@pytest.mark.parametrize("where", [None, mesh(4)], ids=["one device", "four devices"])
def test_consolidation_sums_over_the_clients_whose_context_ends(problem, where):
    p = problem
    algorithm, state = counting(p)
    commit = lambda memory, params, solved: memory + solved
    parts = (
        phases.federated(algorithm, mesh=where),
        phases.consolidate(COUNTS, commit, p.loss_fn, mesh=where),
    )
    state, h = fedcl.run(parts, state, p.stream, key=KEY, rounds=3, every=3, mesh=where)
    np.testing.assert_array_equal(h.rounds["consolidate/clients"], [0, 2, 2])
    want = np.tile(first_context(p).sum(0), (4, 1))
    np.testing.assert_allclose(state.clients.memory, want)


@pytest.mark.parametrize("commit", [False, True], ids=["to serve", "to train on"])
def test_what_the_clients_sum_is_written_into_the_parameters(problem, commit):
    p = problem
    algorithm, state = counting(p)
    write = lambda params, solved: {**params, "bias": solved}
    parts = (
        phases.federated(algorithm),
        phases.solve(COUNTS, write, p.loss_fn, commit=commit),
    )
    evaluate = lambda s: {"bias": s.server.params["bias"]}
    state, h = fedcl.run(
        parts, state, p.stream, key=KEY, rounds=3, every=1, evaluate=evaluate
    )
    bias, each = h.evaluations["bias"], first_context(p)
    assert np.abs(bias[:2]).max() < 1
    np.testing.assert_allclose(bias[2], each[::2].sum(0))
    np.testing.assert_allclose(bias[3], each.sum(0))
    served = phases.served(parts, state).server.params["bias"]
    np.testing.assert_allclose(served, bias[3])
    assert np.allclose(state.server.params["bias"], bias[3]) == commit


def test_what_the_clients_remember_is_summed_anew(problem):
    p = problem
    grow = lambda memory, params, ctx: memory + 1
    algorithm, state = counting(p, begin=grow)
    ones = lambda memory: {
        "y": jnp.zeros(2, jnp.int32),
        "mask": memory[:2],
    }
    write = lambda params, solved: {**params, "bias": solved}
    parts = (
        phases.federated(algorithm),
        phases.solve(
            COUNTS, write, p.loss_fn, rows=ones, switch=phases.always(), commit=True
        ),
    )
    state, _ = fedcl.run(parts, state, p.stream, key=KEY, rounds=3, every=3)
    # Four clients with two rows of weight three, the number of visits.
    np.testing.assert_allclose(state.server.params["bias"][0], 24.0)


def test_bad_arguments_are_refused_with_both_sides(problem):
    cases = [
        ({"schedule": "pmap"}, "'pmap'; it must be"),
        ({"schedule": 0}, "0; it must be"),
        ({"rounds": 0}, "rounds is 0"),
        ({"nonfinite": "ignore"}, "'ignore'; it must be"),
        ({"mesh": mesh(8)}, "4 clients do not split over 8 devices"),
        (
            {"mesh": mesh(2), "cohort": cohorts.uniform(2)},
            "drawn in 1 part.s., the mesh has 2 devices",
        ),
    ]
    for kw, message in cases:
        with pytest.raises(ValueError, match=message):
            go(problem, **kw)
    wrong = problem._replace(params={"kernel": jnp.zeros((5, 6)), "bias": jnp.zeros(6)})
    algorithm = algorithms.fedavg(wrong.loss_fn, optax.sgd(0.1))
    state = algorithm.init(wrong.params, wrong.stream.example(), 3)
    with pytest.raises(ValueError, match="3 clients and the stream 4"):
        fedcl.run(algorithm, state, wrong.stream, key=KEY, rounds=1)


BAD_HOOKS = {
    "update": (
        lambda g, m, p, b, a, c: (g, {"n": m["n"][None]}),
        r"`update`.*memory(.|\n)*n: expected float32\[\], got float32\[1\]",
    ),
    "begin": (lambda m, p, c: {"n": jnp.int32(0)}, r"`begin`(.|\n)*got int32"),
    "loss": (lambda m, p, b, a, c: a[:, 0], r"`loss` returned shape \(4,\)"),
    "batch": (
        lambda m, p, b, c: {**b, "x": jnp.concatenate([b["x"], b["x"]])},
        r"`batch` returned columns with",
    ),
    "end": (lambda m, p, c: ((), ()), r"`end`(.|\n)*expected float32\[\], got nothing"),
}


@pytest.mark.parametrize("hook", BAD_HOOKS)
def test_a_wrong_shape_names_the_hook(problem, hook):
    bad, message = BAD_HOOKS[hook]
    init = lambda params, example: {"n": jnp.float32(0)}
    method = fedcl.transform(init=init, **{hook: bad})
    algorithm = algorithms.fedavg(problem.loss_fn, optax.sgd(0.1), transform=method)
    with pytest.raises(TypeError, match=message):
        go(problem, algorithm)


def test_fedavg_refuses_a_chain_that_keeps_the_client_axis(problem):
    for tx in (optax.sgd(1.0), optax.chain(optax.clip(1.0), optax.adam(1.0))):
        algorithm = algorithms.fedavg(problem.loss_fn, optax.sgd(0.1), server=tx)
        with pytest.raises(ValueError, match="exactly one reduction over clients"):
            algorithm.init(problem.params, problem.stream.example(), 4)


def test_only_trainable_leaves_travel(problem):
    p = problem
    phi, theta = tree.partition(p.params, lambda path: path == "bias")
    algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    state = algorithm.init(phi, p.stream.example(), 4, frozen=theta)
    after, _ = fedcl.run(algorithm, state, p.stream, key=KEY, rounds=2)
    np.testing.assert_array_equal(after.server.frozen["kernel"], p.params["kernel"])
    assert after.server.params["kernel"] is None
    assert np.abs(after.server.params["bias"]).max() > 0
