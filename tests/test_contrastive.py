"""A dual encoder trained on pairs by a federation, against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedcl
from fedcl import algorithms, base, losses, models
from tests.oracles import language
from tests.prompted import random_like

CLIENTS, STEPS, PAIRS, RATE = 3, 2, 4, 10.0
IMAGE = models.ViTConfig((2, 2, 1), 1, 4, 1, 2, 4, projection=5, unit=True)
TEXT = models.ClipTextConfig(9, 4, 1, 2, 4, projection=5, context=3)
MODEL = models.clip(models.ClipConfig(IMAGE, TEXT))


def pairs():
    """Images, captions that end with the highest token, and weights, one in four 0."""
    rng, shape = np.random.default_rng(0), (CLIENTS, STEPS, PAIRS)
    tokens = rng.integers(1, 8, (*shape, 3))
    tokens[..., 2] = 8
    mask = rng.choice([0.5, 1.0], shape)
    np.put_along_axis(mask, rng.integers(0, PAIRS, (*shape[:2], 1)), 0.0, axis=2)
    return {
        "images": jnp.asarray(rng.normal(size=(*shape, 2, 2, 1)), jnp.float32),
        "tokens": jnp.asarray(tokens, jnp.int32),
        "mask": jnp.asarray(mask, jnp.float32),
    }


def cut(rows, k, s):
    """The real pairs of a step alone, and their weights."""
    mask = np.asarray(rows["mask"][k, s])
    there = np.flatnonzero(mask)
    assert len(there) == PAIRS - 1
    x = {name: rows[name][k, s][there] for name in ("images", "tokens")}
    return x, jnp.asarray(mask[there])


def slow(params, x, w):
    """The loss of real pairs, and their logits."""
    z = MODEL.apply(params, x).logits
    each = [jax.nn.logsumexp(a, axis=1) - jnp.diag(a) for a in (z, z.T)]
    return jnp.sum((each[0] + each[1]) / 2 * w) / jnp.sum(w), z


def test_a_round_of_clip_is_the_slow_loop():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    start, rows = random_like(shapes, size=0.7), pairs()
    algorithm = algorithms.fedavg(losses.contrastive(MODEL.apply), optax.sgd(RATE))
    example = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0, 0], rows))
    state = algorithm.init(start, example, CLIENTS)
    ids, zero = jnp.arange(CLIENTS), jnp.zeros(CLIENTS, jnp.int32)
    keys = jax.random.split(jax.random.key(1), CLIENTS)
    visits = base.Visit(rows, zero, ids, zero, keys)
    report = jnp.array([True, True, False])
    step = jax.jit(fedcl.round_fn(algorithm))
    new, told = step(state, visits, jnp.ones(CLIENTS, bool), report)

    grad, ends, n = jax.jit(jax.value_and_grad(slow, has_aux=True)), [], []
    for k in (0, 1):
        mine = start
        for s in range(STEPS):
            moves = grad(mine, *cut(rows, k, s))[1]
            mine = jax.tree.map(lambda p, g: p - RATE * g, mine, moves)
        ends.append(mine)
        n.append(float(rows["mask"][k].sum()))
    mean = lambda a, b: (n[0] * a + n[1] * b) / sum(n)
    want = jax.tree.map(mean, *ends)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.server.params, want)
    error = max(jax.tree.leaves(gaps))
    print(f"\ncontrastive round: {error:.1e}")
    assert error < 1e-5
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), want, start)
    assert min(jax.tree.leaves(moved["image"]["blocks"]["mlp"])) > 1e-4
    assert moved["text"]["embed"] > 1e-4 and moved["logit_scale"] > 1e-4
    # Of client 2, which trained and did not report, the loss in float64.
    x, w = cut(rows, 2, 0)
    loss, z = grad(start, x, w)[0]
    want = language.contrastive(np.asarray(z, np.float64), np.asarray(w, np.float64))
    assert np.isclose(float(loss), want, rtol=1e-5)
    assert np.isfinite(told["loss"]).all()
