"""Detected boundaries: the detectors beside slow ones, and methods that obey them."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms as fc
from fedcl import losses, phases, testing
from fedcl.tpu import mesh

N, STEPS, B, Y = 3, 4, 8, 6
LENGTH = 6  # Rounds of a context.
DRIFTS = [LENGTH, 2 * LENGTH]
ROUNDS = 3 * LENGTH
KEY = jax.random.key(3)
CTX: Any = None  # These detectors do not read it.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """Two orthogonal classes per context; what it tells of contexts is `tasks`."""

    tasks: jax.Array  # [N, T + 1] int32
    visits: jax.Array  # [N, T] bool

    num_clients = N
    ragged = False

    def context(self, round):
        return round // LENGTH

    def sample(self, key, client, round):
        k_class, k_noise = jax.random.split(key)
        y = 2 * self.context(round) + jax.random.randint(k_class, (STEPS, B), 0, 2)
        x = 3 * jax.nn.one_hot(y, Y) + 0.1 * jax.random.normal(k_noise, (STEPS, B, Y))
        return {"x": x, "y": y, "mask": jnp.ones((STEPS, B))}

    def sweep(self, client, round):
        return self.sample(jax.random.key(9), client, round)

    def task(self, client, round):
        return self.tasks[client, round]

    def present(self, client, round):
        return self.visits[client, round]

    def ends(self, client, round):
        return self.tasks[client, round + 1] != self.tasks[client, round]

    def example(self):
        row = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((B, *s), dtype)
        return {"x": row(Y), "y": row(dtype=jnp.int32), "mask": row()}


NONE = jnp.zeros((N, ROUNDS + 1), jnp.int32)
TOLD = jnp.broadcast_to(jnp.arange(ROUNDS + 1, dtype=jnp.int32) // LENGTH, NONE.shape)

grid = np.arange(N)[:, None] + np.arange(ROUNDS)[None]
THIRDS = grid % 3 > 0  # Somebody is always away.
MIDDLE = grid % LENGTH != 3  # Everybody is there when a context begins.
assert MIDDLE[:, [0, *DRIFTS]].all()

loss_fn = losses.softmax(lambda p, x, key: x @ p["w"])


def recording(method):
    """The method, and in which rounds it was told of a boundary, [T]."""

    def init(params, example):
        return method.init(params, example), jnp.zeros(ROUNDS, bool)

    def begin(memory, params, ctx):
        inner, seen = memory
        return method.begin(inner, params, ctx), seen.at[ctx.round].set(ctx.boundary)

    def update(grads, memory, params, batch, aux, ctx):
        grads, inner = method.update(grads, memory[0], params, batch, aux, ctx)
        return grads, (inner, memory[1])

    def end(memory, params, ctx):
        inner, told = method.end(memory[0], params, ctx)
        return (inner, memory[1]), told

    return fedcl.transform(
        init=init,
        begin=begin,
        batch=lambda m, p, b, c: method.batch(m[0], p, b, c),
        loss=lambda m, p, b, a, c: method.loss(m[0], p, b, a, c),
        update=update,
        end=end,
        review=method.review
        and (lambda m, p, s, c: (method.review(m[0], p, s, c), m[1])),
    )


def final(method, tasks=NONE, visits=MIDDLE, review=None):
    algorithm = fc.fedavg(loss_fn, optax.sgd(0.3), transform=recording(method))
    stream = Hidden(tasks, jnp.asarray(visits))
    state = algorithm.init({"w": jnp.zeros((Y, Y))}, stream.example(), N)
    part = phases.federated(algorithm, review=review)
    state, _ = fedcl.run((part,), state, stream, key=KEY, rounds=ROUNDS, every=ROUNDS)
    return state


def free(method, detector):
    """`recording` stands inside, so that it sees what the method is told."""
    return fc.task_free(recording(method), detector)


def boundaries(memory):
    """[N, T]"""
    return np.asarray(memory.memory[0].memory[1])


def visit_after(rounds, visits, nth=0):
    """The nth visit of each client from each of the rounds on, [N, T]."""
    found = np.zeros((N, ROUNDS), bool)
    for k in range(N):
        for t in rounds:
            found[k, t + np.flatnonzero(visits[k, t:])[nth]] = True
    return found


METHODS = (
    fc.ewc(0.5),
    fc.ewc_consolidated(0.5, fisher="empirical"),
    fc.si(0.1),
    fc.mas(0.01),
    fc.rwalk(0.1, interval=2),
    fc.lwf(0.5, Y),
    fc.agem(12, 3),
)


def test_told_and_clocked_boundaries_are_the_same():
    """All methods at once; the reviews of the last two rounds of contexts coincide. The
    two programs may round a product differently."""
    method = fedcl.chain(*METHODS)
    told = final(method, TOLD, THIRDS)
    at_ends = phases.every(LENGTH, offset=LENGTH - 1)
    clocked = final(
        free(method, fc.every_rounds(LENGTH)), visits=THIRDS, review=at_ends
    )
    expected = visit_after(DRIFTS, THIRDS)
    np.testing.assert_array_equal(told.clients.memory[1], expected)
    np.testing.assert_array_equal(boundaries(clocked.clients), expected)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, clocked.server.params, told.server.params)
    jax.tree.map(close, clocked.clients.memory[0].memory[0], told.clients.memory[0])


@pytest.mark.parametrize(
    "detector",
    [
        fc.entropy_jump(1.2),
        fc.loss_window(4, mean=0.3, variance=0.02, at="peak"),
    ],
    ids=["entropy", "peak"],
)
def test_a_drift_is_seen_at_the_next_visit_and_nothing_else(detector):
    state = final(free(fc.ewc(0.5), detector))
    np.testing.assert_array_equal(
        boundaries(state.clients), visit_after(DRIFTS, MIDDLE, 1)
    )


def test_a_plateau_is_seen_once_in_every_context():
    detector = fc.loss_window(4, mean=0.3, variance=0.02)
    found = boundaries(final(free(fc.ewc(0.5), detector)).clients)
    per_context = found.reshape(N, 3, LENGTH).sum(axis=2)
    assert per_context.tolist() == [[1, 1, 1]] * N
    assert not (found & visit_after([0, *DRIFTS], MIDDLE)).any()


def test_a_detector_decides_as_if_the_stream_had_told():
    """Told what was detected, the method without a detector does the same."""
    method = fedcl.chain(*METHODS[::2])
    detected = final(free(method, fc.entropy_jump(1.2)))
    tasks = np.cumsum(boundaries(detected.clients), axis=1, dtype=np.int32)
    told = final(method, jnp.asarray(np.pad(tasks, ((0, 0), (0, 1)), mode="edge")))
    equal = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(equal, detected.server.params, told.server.params)


def slow_windows(series, length, mean, variance):
    """Aljundi et al., 2019, over a list of losses: where plateaus and peaks are."""
    window, plateaus, peaks = collections.deque(maxlen=length), [], []
    last, peaked = (0.0, 0.0), True
    for i, loss in enumerate(series):
        window.append(loss)
        if len(window) < length:
            continue
        m, v = np.mean(window), np.var(window)
        if not peaked and m > last[0] + np.sqrt(last[1]):
            peaked = True
            peaks.append(i)
        if peaked and m < mean and v < variance:
            peaked, last = False, (m, v)
            plateaus.append(i)
    return {"plateau": plateaus, "peak": peaks}


def logits_of_loss(loss):
    """Two classes' logits whose cross-entropy at class 0 is the loss."""
    p = np.exp(-loss)
    return np.log([p, 1 - p]) if p < 1 else np.array([50.0, 0.0])


@pytest.mark.parametrize("at", ["plateau", "peak"])
@pytest.mark.parametrize("seed", range(3))
def test_windows_equal_those_of_a_slow_loop(at, seed):
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.choice([0.05, 0.15, 0.6], 12), 6)
    series = level * rng.uniform(0.7, 1.3, level.size)
    detector = fc.loss_window(4, 0.2, 0.01, at)
    batch = {"y": jnp.zeros(2, jnp.int32), "mask": jnp.array([1.0, 0.0])}

    def one(state, z):
        rows = jnp.stack([z, jnp.array([-9.0, 9.0])])  # The second row is not real.
        fired, state = detector.fired(detector.observe(state, rows, batch, CTX), CTX)
        return state, fired

    zs = jnp.asarray([logits_of_loss(v) for v in series], jnp.float32)
    found = np.flatnonzero(jax.lax.scan(one, detector.init(), zs)[1])
    expected = slow_windows(series, 4, 0.2, 0.01)[at]
    assert found.tolist() == expected and len(expected) > 1


def test_entropy_is_of_the_first_real_rows_of_each_visit():
    detector = fc.entropy_jump(0.5)
    batch = {"y": jnp.zeros(2, jnp.int32), "mask": jnp.array([1.0, 0.0])}
    sure, unsure = jnp.array([[9.0, 0.0]] * 2), jnp.zeros((2, 2))
    state, heard = detector.init(), []
    for rows in ([sure, unsure], [sure], [], [unsure], [], [sure], [unsure]):
        fired, state = detector.fired(state, CTX)
        heard.append(bool(fired))
        for logits in rows:
            state = detector.observe(state, logits, batch, CTX)
    heard.append(bool(detector.fired(state, CTX)[0]))
    assert heard == [False, False, False, False, True, False, False, True]


def test_impossible_detectors_are_refused():
    with pytest.raises(ValueError, match=r"'valley'.*\('plateau', 'peak'\)"):
        fc.loss_window(at="valley")
    with pytest.raises(ValueError, match="length is 0"):
        fc.loss_window(0)
    with pytest.raises(ValueError, match="period is 0"):
        fc.every_rounds(0)
    with pytest.raises(ValueError, match="interval is 0"):
        fc.rwalk(1.0, interval=0)
    with pytest.raises(ValueError, match=r"entropy_jump.*\(2, 3, 4\)"):
        fc.entropy_jump().observe(None, jnp.zeros((2, 3, 4)), {}, CTX)


@pytest.mark.parametrize("where", [None, mesh(3)], ids=["one device", "three devices"])
def test_a_switch_says_when_all_present_clients_review(where):
    method = fedcl.transform(
        init=lambda params, example: jnp.zeros(ROUNDS),
        review=lambda memory, params, sweep, ctx: memory.at[ctx.round].add(1),
    )
    algorithm = fc.fedavg(loss_fn, optax.sgd(0.3), transform=method)
    stream = Hidden(NONE, jnp.asarray(THIRDS))
    state = algorithm.init({"w": jnp.zeros((Y, Y))}, stream.example(), N)
    part = phases.federated(algorithm, mesh=where, review=phases.every(4, offset=1))
    kw = {"key": KEY, "rounds": 10, "every": 10, "mesh": where}
    state, _ = fedcl.run((part,), state, stream, **kw)
    expected = np.zeros((N, ROUNDS))
    expected[:, [1, 5, 9]] = THIRDS[:, [1, 5, 9]]
    np.testing.assert_array_equal(state.clients.memory, expected)


def test_a_review_needs_a_method_that_reviews():
    p = testing.toy_problem()
    algorithm = fc.fedavg(p.loss_fn, optax.sgd(0.1), transform=fc.ewc(1.0))
    with pytest.raises(ValueError, match="none has the hook `review`"):
        phases.federated(algorithm, review=phases.every(2))
