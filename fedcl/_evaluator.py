"""Accuracies and losses of a federation on the device, see `fedcl.metrics`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from fedcl import base, losses, tree


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
    k = test["mask"].shape[0]
    return Partial(
        partial(_accuracies, apply, k), _chunked(test, chunk), jnp.asarray(shares)
    )


def _chunked(test: base.Batch, chunk: int | None) -> base.Batch:
    """Leaves [K, P, ...] as [K · parts, chunk, ...], padded with rows of mask 0."""
    k, rows = test["mask"].shape
    size = rows if chunk is None else min(chunk, rows)
    if size < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more.")
    parts = -(-rows // size)
    pad = lambda x: jnp.pad(
        x, [(0, 0), (0, parts * size - rows)] + [(0, 0)] * (x.ndim - 2)
    ).reshape(k * parts, size, *x.shape[2:])
    return jax.tree.map(pad, dict(test))


def _accuracies(apply, contexts, test, shares, state) -> dict[str, jax.Array]:
    params = tree.merge(state.server.params, state.server.frozen)
    classes = shares.shape[-1]

    def one(batch):
        logits = losses.with_head(apply(params, losses.inputs(batch)), batch)
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


def loss_evaluator(
    loss_fn: base.LossFn,
    test: base.Batch,
    shares: ArrayLike | None = None,
    *,
    chunk: int | None = None,
    weight: Callable[[base.Batch], jax.Array] = losses.predictions,
) -> Partial:
    r"""Mean loss per context and per client, for `fedcl.run(evaluate=…)`.

    With `losses.next_token` these are nats per predicted token, whatever the lengths of
    the rows and the chunks. A client's loss is
    `per_client[n] = Σ_k shares[n, k] · loss[k]`.

    Args:
      loss_fn: `(params, batch, key) -> (loss, aux)`, on whole parameters; its key is
        the same at every evaluation.
      test: leaves [K, P, ...] with "mask", such as "tokens" [K, P, T].
      shares: [N, K] or [N, K, Y], the share of each context in a client's data. Those
        without test data are left out and the rest renormalised. None: no
        `per_client`.
      chunk: rows per forward pass, to bound memory; None: a context at a time.
      weight: `(batch) -> [B]`, how many predictions each row's part in the loss stands
        for, so that chunks add up.

    Returns:
      A `Partial`, `(state) -> {"loss": [K], "per_client": [N]}`; a context without
      test data has loss NaN.

    Raises:
      ValueError: for a chunk below 1.
    """
    table = None if shares is None else jnp.asarray(shares)
    table = jnp.sum(table, axis=2) if table is not None and table.ndim == 3 else table
    k = test["mask"].shape[0]
    return Partial(partial(_losses, loss_fn, weight, k), _chunked(test, chunk), table)


def _losses(loss_fn, weight, contexts, test, shares, state) -> dict[str, jax.Array]:
    params = tree.merge(state.server.params, state.server.frozen)

    def one(batch):
        n = jnp.sum(weight(batch))
        return n * loss_fn(params, batch, jax.random.key(0))[0], n

    total, n = (jnp.sum(x.reshape(contexts, -1), 1) for x in jax.lax.map(one, test))
    loss = jnp.where(n > 0, total / jnp.maximum(n, 1e-9), jnp.nan)
    if shares is None:
        return {"loss": loss}
    own = shares * (n > 0)[None]
    each = jnp.sum(own * jnp.where(n > 0, loss, 0)[None], axis=1)
    return {"loss": loss, "per_client": each / jnp.maximum(jnp.sum(own, 1), 1e-9)}
