"""Accuracies of a federation on the device, and what it sends; see `fedcl.metrics`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from fedcl import base, losses, tree


class Communication(NamedTuple):
    """Bytes of one client's part in a round, from static shapes."""

    up: int  # The message: Δφ, its weight, what the method tells.
    down: int  # φ and what the method shares.
    once: int  # θ, which is sent when a client joins.


def communication(
    algorithm: base.Algorithm, state: base.State, stream: base.StreamLike
) -> Communication:
    """Bytes that travel per client and round, without running anything.

    Args:
      algorithm: the algorithm.
      state: one federation, arrays or `jax.ShapeDtypeStruct`s.
      stream: for the shapes of a visit.

    Returns:
      Bytes as stored, without compression.
    """

    def message(server, clients, stream):
        zero, key = jnp.int32(0), jax.random.key(0)
        batches = stream.sample(key, zero, zero)
        visit = base.Visit(batches, zero, zero, zero, key)
        client = jax.tree.map(lambda x: x[0], clients)
        return algorithm.client_update(server, client, visit)[0]

    server = state.server
    sent = jax.eval_shape(message, server, state.clients, stream)
    down = (server.params, server.shared, server.client_opt)
    return Communication(tree.size(sent), tree.size(down), tree.size(server.frozen))


def evaluator(
    apply: Callable[..., jax.Array],
    test: base.Batch,
    shares: ArrayLike,
    *,
    chunk: int | None = None,
) -> Partial:
    """Accuracy per context and per client, for `fedcl.run(evaluate=…)`.

    A client's accuracy weighs the test data as the client's own data is made up:
    `per_client[n] = Σ_{k,y} shares[n, k, y] · accuracy[k, y]`.

    Args:
      apply: `(params, x) -> logits [B, Y]` on whole parameters.
      test: leaves [K, P, ...] with "x", "y", "mask" and optionally "head", as from
        `fedcl.streams.held_out`.
      shares: [N, K, Y], the share of each context and class in a client's data. Those
        that the test data lacks are left out and the rest renormalised.
      chunk: rows per forward pass, to bound memory; None: a context at a time.

    Returns:
      A `Partial`, `(state) -> {"accuracy": [K], "per_client": [N]}`, whose arrays are
      arguments of the program.
    """
    test = dict(test)
    k, rows = test["mask"].shape
    size = rows if chunk is None else min(chunk, rows)
    if size < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more.")
    parts = -(-rows // size)
    pad = lambda x: jnp.pad(
        x, [(0, 0), (0, parts * size - rows)] + [(0, 0)] * (x.ndim - 2)
    ).reshape(k * parts, size, *x.shape[2:])
    return Partial(
        partial(_accuracies, apply, k), jax.tree.map(pad, test), jnp.asarray(shares)
    )


def _accuracies(apply, contexts, test, shares, state) -> dict[str, jax.Array]:
    params = tree.merge(state.server.params, state.server.frozen)
    classes = shares.shape[-1]

    def one(batch):
        logits = losses.with_head(apply(params, batch["x"]), batch)
        hit = jnp.argmax(logits, axis=-1) == batch["y"]
        of_class = jax.nn.one_hot(batch["y"], classes) * batch["mask"][:, None]
        return jnp.sum(of_class * hit[:, None], axis=0), jnp.sum(of_class, axis=0)

    counted = jax.lax.map(one, test)
    right, total = (jnp.sum(c.reshape(contexts, -1, classes), 1) for c in counted)
    accuracy = jnp.sum(right, axis=1) / jnp.maximum(jnp.sum(total, axis=1), 1)
    shares = shares * (total > 0)[None]
    each = shares * (right / jnp.maximum(total, 1))[None]
    per_client = jnp.sum(each, (1, 2)) / jnp.maximum(jnp.sum(shares, (1, 2)), 1e-9)
    return {"accuracy": accuracy, "per_client": per_client}
