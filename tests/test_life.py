"""Pre-training, fine-tuning, adapters and prompts are the same two phases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, base, losses, phases, tree

KEY = jax.random.key(5)
V, LENGTH = 7, 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts(base.Stationary):
    """Clients who write in two alternating letters of their own."""

    tokens: jax.Array  # [N, M, LENGTH]

    num_clients = 3

    def sample(self, key, client, round):
        at = jax.random.randint(key, (2, 4), 0, self.tokens.shape[1])
        tokens = self.tokens[client][at]
        there = jnp.ones(tokens.shape, jnp.int32)
        answer = (jnp.arange(LENGTH) > 3).astype(jnp.float32)
        weights = jnp.broadcast_to(answer, tokens.shape)
        mask = jnp.ones(tokens.shape[:2])
        return {"tokens": tokens, "segments": there, "weights": weights, "mask": mask}

    def sweep(self, client, round):
        return self.sample(jax.random.key(0), client, round)


def texts(apart=True):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 2, (3, 8, 1))
    own = 2 * np.arange(3)[:, None, None] * apart
    letters = own + (start + np.arange(LENGTH)) % 2
    noisy = np.where(rng.random(letters.shape) < 0.1, V - 1, letters)
    return Texts(jnp.asarray(noisy, jnp.int32))


def writer():
    """A causal model: the token, the prompt, and the mean of what was read."""
    draw = lambda i, *shape: 0.3 * jax.random.normal(jax.random.key(i), shape)
    a, b = draw(3, 6, 2), jnp.zeros((2, V))
    scale = jnp.float32(1.0)
    return {
        "embed": draw(0, V, 6),
        "prompt": draw(1, 2, 6),
        "head": {"kernel": draw(2, 6, V), "lora": {"a": a, "b": b, "scale": scale}},
    }


def writes(params, x, key=None):
    h = params["embed"][x["tokens"]]
    p, read = params["prompt"], jnp.arange(1, LENGTH + 1)[None, :, None]
    h = h + jnp.sum(p, 0)[None, None] + jnp.cumsum(h, 1) / read
    head, lora = params["head"], params["head"]["lora"]
    return h @ head["kernel"] + lora["scale"] * ((h @ lora["a"]) @ lora["b"])


LIFE = {
    "pre-training from scratch": (lambda path: "lora" not in path, None),
    "continued pre-training": (lambda path: "lora" not in path, "pre-training"),
    "full fine-tuning": (lambda path: not path.endswith("scale"), "pre-training"),
    "adapters": (lambda path: path.endswith(("lora/a", "lora/b")), "pre-training"),
    "prompt": (lambda path: path == "prompt", "pre-training"),
}


@functools.cache
def pretrained():
    """From public text of all letters."""
    return lived("pre-training from scratch")[1]


def lived(name):
    trained, start = LIFE[name]
    whole = writer() if start is None else pretrained()
    phi, theta = tree.partition(whole, trained)
    stream, loss = texts(name != "prompt"), losses.next_token(writes)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (20, LENGTH)))
    text = {"tokens": tokens.astype(jnp.int32), "segments": jnp.ones((20, LENGTH))}
    public = phases.public(
        loss, optax.sgd(0.1), text, batch_size=4, switch=phases.until(1, 3)
    )
    algorithm = algorithms.fedavg(loss, optax.adam(0.05))
    parts = (public, phases.federated(algorithm))
    rows = jax.vmap(lambda k: stream.sample(jax.random.key(3), k, 0))(jnp.arange(3))
    test = jax.tree.map(lambda x: x.reshape(3, -1, *x.shape[3:]), rows)
    evaluate = fedcl.metrics.loss_evaluator(loss, test)
    state = algorithm.init(phi, stream.example(), 3, frozen=theta)
    kw = {"key": KEY, "rounds": 6, "every": 6, "evaluate": evaluate}
    state, history = fedcl.run(parts, state, stream, **kw)
    jax.tree.map(np.testing.assert_array_equal, state.server.frozen, theta)
    jax.tree.map(
        lambda x, y: np.testing.assert_(np.any(x != y)), phi, state.server.params
    )
    end = tree.merge(state.server.params, state.server.frozen)
    return history.evaluations["loss"].mean(axis=1), end


@pytest.mark.parametrize("name", LIFE)
def test_the_life_of_a_model_is_the_same_two_phases(name):
    first, last = lived(name)[0][[0, -1]]
    assert last < first - 0.1
