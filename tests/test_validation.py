"""The clients' held-out loss against a loop in NumPy, and a switch that follows it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, experiment, metrics, phases, streams
from fedcl._toy import ToyStream
from fedcl.testing import toy_problem
from fedcl.tpu import mesh

KEY = jax.random.key(0)
P = toy_problem()
ALGORITHM = algorithms.fedavg(P.loss_fn, optax.sgd(0.3))
ROUNDS = 6
PUBLIC = {"x": P.stream.x.reshape(-1, 5)[:20], "y": P.stream.y.reshape(-1)[:20]}
LOSS = "validation/loss"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held(ToyStream):
    """Other rows of the toy's clients: n of them differ, and client 1 is away in round 3.

    In round 4 nobody holds a row.
    """

    def sweep(self, client, round):
        batch = super().sweep(client, round)
        index = jnp.arange(batch["mask"].size).reshape(batch["mask"].shape)
        kept = (index < 2 + 3 * client) & (round != 4)
        return batch | {"mask": kept.astype(jnp.float32)}

    def present(self, client, round):
        return (client != 1) | (round != 3)


OTHER = toy_problem(seed=1).stream
HELD = Held(OTHER.x, OTHER.y)


def wanted(params, round):
    """Σ n_k ℓ_k / Σ n_j in float64, the rows and the clients."""
    kernel, bias = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    losses, counts = [], []
    for client in range(4):
        if client == 1 and round == 3:
            continue
        context = int(np.clip((round - client % 2) // 2, 0, 2))
        n = 0 if round == 4 else min(2 + 3 * client, HELD.x.shape[2])
        x = np.asarray(HELD.x[client, context], np.float64)[:n]
        z = x @ kernel + bias
        z -= z.max(axis=1, keepdims=True)
        right = z[np.arange(n), np.asarray(HELD.y[client, context])[:n]]
        nll = np.log(np.exp(z).sum(axis=1)) - right
        losses.append(nll.mean() if n else 0.0)
        counts.append(n)
    total = sum(counts)
    mean = np.dot(losses, counts) / total if total else np.nan
    return mean, total, len(counts)


def go(*before, where=None, held=HELD, **kw):
    state = ALGORITHM.init(P.params, P.stream.example(), 4)
    parts = (
        *before,
        phases.federated(ALGORITHM, mesh=where),
        phases.validation(P.loss_fn, held, mesh=where, **kw),
    )
    kw = {"key": KEY, "rounds": ROUNDS, "every": 1, "mesh": where}
    evaluate = lambda s: s.server.params
    return fedcl.run(parts, state, P.stream, evaluate=evaluate, **kw)


@pytest.mark.parametrize("where", [None, mesh(4)], ids=["one device", "four devices"])
def test_the_loss_is_its_formula(where):
    _, history = go(where=where)
    at = {int(t): i for i, t in enumerate(history.at)}
    params = lambda t: jax.tree.map(lambda x: x[at[t + 1]], history.evaluations)
    want = np.array([wanted(params(t), t) for t in range(ROUNDS)])
    told = history.rounds
    np.testing.assert_allclose(told[LOSS], want[:, 0], rtol=2e-6)
    np.testing.assert_array_equal(told["validation/rows"], want[:, 1])
    np.testing.assert_array_equal(told["validation/clients"], want[:, 2])
    assert np.isnan(want[4, 0]) and np.isfinite(np.delete(want[:, 0], 4)).all()
    assert want[3, 2] == 3 and len(set(want[:, 1])) > 2


def test_nothing_is_trained():
    state, _ = go()
    plain = ALGORITHM.init(P.params, P.stream.example(), 4)
    kw = {"key": KEY, "rounds": ROUNDS, "every": 1}
    plain, _ = fedcl.run(ALGORITHM, plain, P.stream, **kw)
    jax.tree.map(np.testing.assert_array_equal, state.server, plain.server)


def steps_of(losses, delta, decay):
    """`plateau` over a list of losses."""
    means, steps = [], []
    for loss in losses:
        stalls = len(means) >= 2 and means[-2] - means[-1] < delta
        steps.append(2 if stalls else 0)
        if np.isfinite(loss):
            old = means[-1] if means else loss
            means.append(decay * old + (1 - decay) * loss)
    return steps


def test_a_plateau_follows_it_by_its_name():
    """And not the loss of training, which would ask for other rounds."""
    switch = phases.plateau(0.0, 2, decay=0.5, metric=LOSS)
    sgd = optax.sgd(0.01)
    trains = phases.public(P.loss_fn, sgd, PUBLIC, batch_size=4, switch=switch)
    _, history = go(trains)
    told = history.rounds
    steps = steps_of(told[LOSS], 0.0, 0.5)
    np.testing.assert_array_equal(told["public/steps"], steps)
    own = np.nanmean(told["loss"], axis=1)
    assert steps != steps_of(own, 0.0, 0.5) and set(steps[2:]) == {0, 2}


def test_what_does_not_fit():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Few(Held):
        num_clients = 3

    words = "held_out has 3 clients and the federation 4"
    with pytest.raises(ValueError, match=words):
        go(held=Few(HELD.x, HELD.y))


def test_two_numbers_travel():
    part = phases.validation(P.loss_fn, HELD)
    assert metrics.sums(P.params, (part,)) == {"validation": (8, 0)}


def own(stream, context, client):
    at, n = int(stream.start[context, client]), int(stream.size[context, client])
    return stream.rows[at : at + n].tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_a_share_of_each_clients_rows_is_held_out(shared):
    rows = {"x": np.arange(60.0)[:, None], "y": np.arange(60) % 4}
    options = {"num_clients": 3, "steps": 2, "batch_size": 4}
    options["rounds_per_context"] = 2
    if shared:
        domains = streams.permutations(2, (1,))
        stream = streams.domain_incremental(rows, domains, **options)
    else:
        stream = streams.class_incremental(rows, num_contexts=2, **options)
    train, held = streams.validation(stream, 0.25, seed=1)
    for k in range(2):
        for n in range(3):
            whole, kept, out = (own(s, k, n) for s in (stream, train, held))
            assert kept + out != whole and sorted(kept + out) == sorted(whole)
            assert [r for r in whole if r in out] == out
            assert len(out) == len(whole) // 4
            assert not shared or own(held, 0, n) == own(held, 1, n)
    seen = train.sweep(0, 0)
    assert set(seen["x"][seen["mask"] > 0].ravel().tolist()) == set(own(train, 0, 0))


def test_what_cannot_be_held_out():
    rows = {"x": np.zeros((12, 1)), "y": np.arange(12) % 2}
    options = {"rounds_per_context": 3, "num_clients": 2, "steps": 1}
    options |= {"num_contexts": 1, "batch_size": 2}
    stream = streams.class_incremental(rows, **options)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\), got 1"):
        streams.validation(stream, 1.0)
    drifting = dataclasses.replace(stream, prior=jnp.ones((1, 1, 2)))
    with pytest.raises(ValueError, match="labels of this stream drift"):
        streams.validation(drifting, 0.5)


def test_an_experiments_switch_follows_it():
    plateau = f"{{method='plateau', delta=9.0, steps=3, metric='{LOSS}'}}"
    arms = f"arms={{never={{switch=[]}}, often={{switch=[{plateau}]}}}}"
    settings = ["data.validation=0.25", arms]
    found = experiment.run(
        experiment.load(Path(__file__).parent / "tiny.toml", settings)
    )
    told = found.history[f"often/{LOSS}"]
    assert told.shape == (2, 5) and np.isfinite(told).all()
    assert found.history["often/public_steps"].sum() > 0
    with pytest.raises(experiment.ConfigError, match=r"data\.validation: given 0\.5"):
        experiment.load("lm-eras", ["data.validation=0.5"])
