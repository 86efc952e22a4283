"""Metrics against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedcl import base, metrics, streams, tree
from fedcl.algorithms import fedavg

# Row t after context t. Context 0 peaks in row 1, after it was learnt, and context 1
# is higher before it is learnt than at the end, so that all conventions differ.
R = np.array([[0.8, 0.6, 0.1], [0.9, 0.7, 0.2], [0.5, 0.4, 0.95]])
# Nothing is forgotten: context 0 improves to the end.
UP = np.array([[0.5, 0.2], [0.75, 0.9]])
AT = np.array([0, 5, 10, 15, 20])
A = np.array([[0.1, 0.1], [0.8, 0.1], [0.9, 0.2], [0.3, 0.9], [0.6, 0.7]])

GOLDEN = {
    "average_accuracy": (0.5 + 0.4 + 0.95) / 3,
    "average_incremental": (0.8 + (0.9 + 0.7) / 2 + (0.5 + 0.4 + 0.95) / 3) / 3,
    "matrix_mean": (0.8 + 0.9 + 0.7 + 0.5 + 0.4 + 0.95) / 6,
    "learning_accuracy": (0.8 + 0.7 + 0.95) / 3,
    "backward_transfer": ((0.5 - 0.8) + (0.4 - 0.7)) / 2,
}
FORGETTING = {
    "chaudhry": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,
    "mammoth": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,
    "avalanche": ((0.8 - 0.5) + (0.7 - 0.4)) / 2,
    "fed_mammoth": ((0.8 - 0.5) + (0.7 - 0.4) + 0) / 3,
    "mfcl": ((0.008 - 0.5) + (0.7 - 0.4) + 0) / 3,
    "fot": ((0.8 - 0.5) + (0.7 - 0.4)) / 2,
    "sequel": ((0.5 - 0.9) + (0.4 - 0.7) + 0) / 3,
}
# A context that only improves; and one that was best before it was learnt.
FORGETTING_UP = {
    "chaudhry": 0.5 - 0.75,
    "mammoth": 0.0,
    "avalanche": 0.5 - 0.75,
    "fed_mammoth": (0.5 - 0.75) / 2,
    "mfcl": ((0.005 - 0.75) + 0) / 2,
    "fot": 0.5 - 0.75,
    "sequel": 0.0,
}
EARLY = np.array([[0.6, 0.8, 0.0], [0.6, 0.5, 0.0], [0.6, 0.4, 0.9]])
FORGETTING_EARLY = {
    "chaudhry": (0.0 + 0.4) / 2,
    "mammoth": (0.0 + 0.1) / 2,
    "avalanche": (0.0 + 0.1) / 2,
    "fed_mammoth": 0.1 / 3,
    "mfcl": ((0.006 - 0.6) + 0.1) / 3,
    "fot": (0.0 + 0.1) / 2,
    "sequel": -0.1 / 3,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_metrics_of_the_matrix(name):
    fn = getattr(metrics, name)
    np.testing.assert_allclose(fn(R), GOLDEN[name], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fn)(R), GOLDEN[name], rtol=1e-6)


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
@pytest.mark.parametrize(
    ("matrix", "golden"),
    [(R, FORGETTING), (UP, FORGETTING_UP), (EARLY, FORGETTING_EARLY)],
    ids=["peak", "up", "early"],
)
def test_forgetting_in_seven_conventions(matrix, golden, convention):
    got = metrics.forgetting(matrix, convention)
    np.testing.assert_allclose(got, golden[convention], atol=1e-6)


def test_forgetting_of_unknown_convention_names_the_seven():
    with pytest.raises(ValueError, match=r"'best'.*chaudhry.*sequel"):
        metrics.forgetting(R, "best")


def test_transfer_and_intransigence():
    gain = ((0.6 - 0.1) + (0.2 - 0.3)) / 2
    np.testing.assert_allclose(
        metrics.forward_transfer(R, np.array([0.5, 0.1, 0.3])), gain, rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics.intransigence(R, np.array([0.9, 0.9, 0.9])),
        (0.1 + 0.2 - 0.05) / 3,
        rtol=1e-5,
    )


def test_anytime_average_counts_seen_contexts_alone():
    seen = np.array([[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]], bool)
    expected = (0.8 + 0.9 + (0.3 + 0.9) / 2 + (0.6 + 0.7) / 2) / 4
    np.testing.assert_allclose(metrics.anytime_average(A, seen), expected, rtol=1e-6)


def test_worst_case_over_evaluations():
    learnt = np.array([2, 4])
    np.testing.assert_allclose(metrics.min_acc(A, learnt), 0.3, rtol=1e-6)
    np.testing.assert_allclose(
        metrics.wc_acc(A, learnt), 0.5 * 0.7 + 0.5 * 0.3, rtol=1e-6
    )


def test_windows_of_evaluations():
    # Within two evaluations: 0.9 → 0.3 and 0.9 → 0.7; 0.1 → 0.8 and 0.2 → 0.9.
    falls, gains = (0.6 + 0.2) / 2, (0.7 + 0.7) / 2
    np.testing.assert_allclose(metrics.windowed_forgetting(A, 2), falls, rtol=1e-6)
    np.testing.assert_allclose(metrics.windowed_plasticity(A, 2), gains, rtol=1e-6)
    np.testing.assert_allclose(
        metrics.windowed_plasticity(A, 3), (0.8 + 0.8) / 2, rtol=1e-6
    )


def test_spread_over_clients():
    values = np.linspace(0, 1, 20)[::-1]
    got = metrics.spread(values)
    np.testing.assert_allclose(got.worst_decile, 0.5 / 19, rtol=1e-5)
    np.testing.assert_allclose(got.std, values.std(), rtol=1e-5)
    np.testing.assert_allclose(got.mean, 0.5, rtol=1e-6)
    assert got.worst == 0


def test_rows_of_R_are_the_first_evaluations_after_the_ends():
    got = metrics.R_of(A, at=AT, ends=np.array([5, 11]))
    np.testing.assert_allclose(got, A[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(metrics.R_of(A, AT, np.array([30, 30])), A[[4, 4]])


def test_one_context_forgets_nothing():
    one = np.array([[0.5]])
    assert all(metrics.forgetting(one, c) == 0 for c in ("chaudhry", "avalanche"))
    assert metrics.backward_transfer(one) == metrics.forward_transfer(one, 0.1) == 0


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 3)), np.zeros((0, 0))])
def test_wrong_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=r"R has 2 rows|must be \[T, K\]"):
        metrics.average_incremental(bad)


def linear(params, x):
    return x @ params["w"]


def tiny_stream():
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(40, 3)).astype(np.float32),
        "y": np.arange(40, dtype=np.int32) % 4,
    }
    return streams.class_incremental(
        data, num_contexts=2, num_clients=2, rounds_per_context=2, steps=3, batch_size=5
    )


@pytest.mark.parametrize("chunk", [None, 2, 100])
def test_evaluator_against_numpy(chunk):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(3, 4))
    x, y = rng.normal(size=(2, 7, 3)), np.array([[0, 1, 0, 1, 1, 0, 0]] * 2)
    y[1] += 2
    mask = np.ones((2, 7), np.float32)
    mask[1, 4:] = 0
    shares = rng.uniform(size=(3, 2, 4))
    hit = (x @ w).argmax(-1) == y
    by_class = np.zeros((2, 4))
    there = np.zeros((2, 4), bool)
    for k in range(2):
        for c in range(4):
            rows = (y[k] == c) & (mask[k] > 0)
            there[k, c] = rows.any()
            by_class[k, c] = hit[k][rows].mean() if rows.any() else 0
    expected = (shares * by_class).sum((1, 2)) / (shares * there).sum((1, 2))

    test = {k: jnp.asarray(v, jnp.float32) for k, v in {"x": x, "mask": mask}.items()}
    test["y"] = jnp.asarray(y)
    state = _state({"w": jnp.asarray(w, jnp.float32)})
    evaluate = metrics.evaluator(linear, test, shares.astype(np.float32), chunk=chunk)
    got = jax.jit(lambda e, s: e(s))(evaluate, state)
    np.testing.assert_allclose(got["per_client"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        got["accuracy"], (hit * mask).sum(1) / mask.sum(1), rtol=1e-6
    )


def test_evaluator_predicts_within_the_head():
    head = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    test = {"x": jnp.ones((1, 2, 1)), "y": jnp.array([[0, 1]]), "head": head}
    test["mask"] = jnp.ones((1, 2))
    state = _state({"w": jnp.array([[0.0, 5.0]])})
    got = metrics.evaluator(linear, test, np.ones((1, 1, 2), np.float32))(state)
    assert got["accuracy"] == 1


def _state(params):
    server = base.ServerState(params, None, (), (), (), jnp.float32(1), jnp.int32(0))
    return base.State(server, base.ClientState((), (), (), jnp.zeros(1), jnp.zeros(1)))


def test_communication_from_shapes():
    stream = tiny_stream()
    loss = lambda p, batch, key: (jnp.sum(linear(p, batch["x"])), batch["y"])
    algorithm = fedavg(loss, optax.sgd(0.1))
    params = {"w": jnp.zeros((3, 4)), "t": jnp.zeros(5)}
    trained, frozen = tree.partition(params, lambda path: path == "w")
    init = lambda p, f: algorithm.init(p, stream.example(), 2, frozen=f)
    state = jax.eval_shape(init, trained, frozen)
    got = metrics.communication(algorithm, state, stream)
    assert got == (4 * (12 + 1), 4 * 12, 4 * 5)


def test_local_steps_of_those_who_trained():
    rounds = {
        "steps": np.array([[[3.0, 3.0]], [[2.0, 3.0]]]),
        "trained": np.array([[[True, False]], [[True, True]]]),
    }
    assert metrics.local_steps(rounds).tolist() == [3.0, 5.0]
