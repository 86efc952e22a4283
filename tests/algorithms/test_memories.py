"""What the memories of chosen rows promise beside their oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms as fc
from fedcl import losses, models, phases, scored, testing
from fedcl.algorithms._gss import _slots
from fedcl.algorithms._icarl import Teacher
from fedcl.testing import CLASSES, FEATURES
from fedcl.tpu import mesh
from tests.oracles import chosen, federation
from tests.problems import many, sigmoids

MODEL = models.mlp((FEATURES, 8, CLASSES))
assert MODEL.outputs is not None
OUTPUTS = MODEL.outputs
LOSS = losses.sigmoid(OUTPUTS)


def run(method, rounds, *more):
    """The toy federation of an MLP after some rounds, and the phases that ran."""
    problem = testing.toy_problem()
    algorithm = fc.fedavg(LOSS, optax.sgd(0.1), transform=method)
    parts = (phases.federated(algorithm), *(make(LOSS) for make in more))
    stream = problem.stream
    params = MODEL.init(jax.random.key(0))
    state = algorithm.init(params, stream.example(), stream.num_clients)
    key = jax.random.key(1)
    return parts, fedcl.run(parts, state, stream, key=key, rounds=rounds, every=rounds)[
        0
    ]


@functools.cache
def served(rounds):
    """iCaRL with its classifier: the state, and the state that is served."""
    nearest = fc.nearest_exemplar_mean(CLASSES, 8)
    parts, state = run(fc.icarl(10, 3, CLASSES), rounds, nearest)
    return state, phases.served(parts, state)


def exemplars(state):
    """x and y of all clients' exemplars."""
    rows = jax.tree.map(np.asarray, state.clients.memory[1].rows)
    real = rows["mask"] > 0
    return rows["x"][real], rows["y"][real]


def features(params, x):
    return np.asarray(OUTPUTS(params, jnp.asarray(x)).features, np.float64)


def test_the_served_layer_is_the_nearest_mean_of_exemplars():
    state, to_serve = served(4)
    x = np.random.default_rng(0).normal(size=(200, FEATURES)).astype(np.float32)
    known, y = exemplars(state)
    f = features(state.server.params, x)
    want = chosen.nearest_mean(f, features(state.server.params, known), y)
    got = np.argmax(MODEL.apply(to_serve.server.params, jnp.asarray(x)), axis=1)
    np.testing.assert_array_equal(got, want)
    # The classes of the context that has not ended are nobody's exemplars.
    assert set(want) == set(y) == {0, 1, 2, 3}
    trained = np.argmax(MODEL.apply(state.server.params, jnp.asarray(x)), axis=1)
    assert (trained != want).any()


def test_before_there_are_exemplars_the_trained_layer_serves():
    state, to_serve = served(1)
    assert not len(exemplars(state)[0])
    jax.tree.map(np.testing.assert_array_equal, to_serve.server, state.server)


def test_the_served_layer_is_not_trained():
    state, plain = served(4)[0], run(fc.icarl(10, 3, CLASSES), 4)[1]
    # Two programs, which XLA may fuse and so round differently.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, state.server, plain.server)


def test_the_classifier_on_eight_devices_is_the_same():
    problem = many(sigmoids(), 8)
    algorithm = fc.fedavg(problem.loss_fn, optax.sgd(0.1), transform=fc.icarl(10, 3, 6))
    start = algorithm.init(problem.params, problem.stream.example(), 8)
    layers = []
    for where in (None, mesh(8)):
        nearest = fc.nearest_exemplar_mean(CLASSES, FEATURES, head="", mesh=where)
        parts = (phases.federated(algorithm, mesh=where), nearest(problem.loss_fn))
        kw = {"key": jax.random.key(2), "rounds": 3, "every": 3, "mesh": where}
        state = fedcl.run(parts, start, problem.stream, **kw)[0]
        layers.append(phases.served(parts, state).server.params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *layers)
    assert sorted(np.flatnonzero(layers[0]["bias"] == 0)) == [0, 1]


def test_the_classifier_wants_one_memory_of_exemplars():
    with pytest.raises(ValueError, match="0 memories"):
        run(fc.replay(10, 2), 1, fc.nearest_exemplar_mean(CLASSES, 8))


def test_older_lists_lose_what_was_chosen_last():
    first = run(fc.herding(8, 2, CLASSES), 3)[1].clients.memory
    later = run(fc.herding(8, 2, CLASSES), 5)[1].clients.memory
    for k in range(4):
        old, new = (_lists(m, k) for m in (first, later))
        assert first.lists[k] == 2 and later.lists[k] == 4
        assert [len(v) for v in old.values()] == [4, 4]
        assert [len(v) for v in new.values()] == [2, 2, 2, 2]
        for c in (0, 1):
            np.testing.assert_array_equal(new[c], old[c][:2])


def _lists(memory, k):
    """{class: rows in the order in which they were chosen} on client k."""
    own = jax.tree.map(lambda a: np.asarray(a[k]), memory)
    order = np.argsort(own.rank, kind="stable")
    real = [i for i in order if own.rows["mask"][i] > 0]
    ids = sorted({int(own.rows["y"][i]) for i in real})
    return {
        c: np.stack([own.rows["x"][i] for i in real if own.rows["y"][i] == c])
        for c in ids
    }


def test_icarl_with_heads_has_the_papers_loss():
    """Rows of two heads; class 5 was never met, class 4 only by this batch."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, old = ({"w": normal(3, 6)} for _ in range(2))
    task = losses.sigmoid(lambda p, x, key: losses.Output(x @ p["w"], x))
    y = np.array([2, 4, 0, 1])
    head = np.array([[0, 0, 1, 1, 1, 0]] * 2 + [[1, 1, 0, 0, 0, 0]] * 2, np.float32)
    batch = {"x": normal(4, 3), "y": jnp.asarray(y), "mask": jnp.array([1, 0.5, 1, 1])}
    batch |= {"icarl_new": jnp.array([1.0, 0.5, 0.0, 0.0]), "head": jnp.asarray(head)}
    teacher = Teacher(old, jnp.array([0, 0, 1, 0, -1, -1]), jnp.int32(1))
    ctx = context_of(task, params)
    loss = fc.icarl(4, 2, 6).loss

    @jax.jit
    def total(params, batch, memory):
        value, aux = task(params, batch, ctx.key)
        return value + loss(memory, params, batch, aux, ctx)

    got = total(params, batch, (teacher, ()))

    z, z_old = (np.asarray(batch["x"] @ p["w"], np.float64) for p in (params, old))
    g, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z_old))
    target = np.eye(6)[y]
    target[:, [0, 1, 3]] = q[:, [0, 1, 3]]
    each = -(target * np.log(g) + (1 - target) * np.log(1 - g))
    want = np.average(each[:, :5].sum(axis=1), weights=[1, 0.5, 1, 1])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def context_of(loss_fn, params):
    zero = jnp.int32(0)
    key, never = jax.random.key(0), jnp.array(False)
    return fedcl.Context(key, zero, zero, never, zero, zero, params, (), loss_fn)


def test_gss_replaces_rows_in_the_problem():
    oracle = chosen.GSS(6, 3, 4)
    key_of = lambda t, k, s: jax.random.key(100 * t + 10 * k + s)
    federation.run(federation.data(), oracle, federation.Mean(), key_of)
    assert oracle.replacements > 3


def test_gss_writes_a_slot_once_per_batch():
    """A scatter with the same slot twice would have no defined result."""
    example = {"mask": jax.ShapeDtypeStruct((8,), jnp.float32)}
    memory = scored.empty(example, 2)
    memory = scored.add(memory, {"mask": jnp.ones(2)}, jnp.ones(2))
    real, score = jnp.ones(8, bool), jnp.full(8, 0.9)
    slots = np.asarray(jax.jit(_slots)(memory, real, score, jax.random.key(0)))
    assert sorted(slots) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_a_model_that_no_perturbation_moves_has_no_bregman_information():
    rows = {"x": jnp.ones((3, 2)), "mask": jnp.ones(3)}
    flat = lambda p, b, k: (0.0, jnp.zeros_like(b["x"]))
    steep = lambda p, b, k: (0.0, 40 * (b["x"] - 1))
    score = jax.jit(fc.bregman_information(16), static_argnums=2)
    assert (abs(score(None, rows, flat, jax.random.key(0))) < 1e-6).all()
    assert (score(None, rows, steep, jax.random.key(0)) > 0.1).all()


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="score is 'los'"):
        fc.scored_replay(4, 2, score="los")
    with pytest.raises(ValueError, match="keep is 'most'"):
        fc.scored_replay(4, 2, keep="most")
    with pytest.raises(ValueError, match="copies is 1"):
        fc.bregman_information(1)
    with pytest.raises(ValueError, match="candidates is 0"):
        fc.gss(4, 2, candidates=0)
    words = {"x": jnp.ones((3, 2), jnp.int32), "mask": jnp.ones(3)}
    with pytest.raises(TypeError, match="int32"):
        fc.bregman_information()(None, words, LOSS, jax.random.key(0))
