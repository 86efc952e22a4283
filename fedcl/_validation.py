"""A phase that tells how well φ does on rows that clients keep to test on."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from fedcl import base, statistics, tree
from fedcl._consolidate import sum_over_clients
from fedcl._phase import Phase
from fedcl._switches import Switch


def validation(
    loss_fn: base.LossFn,
    held_out: base.StreamLike,
    *,
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    name: str = "validation",
) -> Phase:
    r"""Clients test φ on rows of their own that nobody trains on.

    .. math:: L_t = \sum_k \frac{n_k}{\sum_j n_j}\, \ell_k(\phi)

    over all clients that are present, n_k the rows that client k holds out of its
    context of the round. φ is the server's where the phase stands: after the federated
    phase, what that gave. Nothing is trained and nothing kept; `plateau` follows it by
    `metric="validation/loss"`.

    Args:
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      held_out: the same clients' rows, as a stream: its `sweep` and `present` are read.
      mesh: where the clients live.
      switch: when; None: in every round. A switch that follows the metric then sees 0.
      name: prefixes its metrics: "loss", NaN if nobody has a row; "rows" and "clients",
        how many took part.

    Returns:
      A `Phase`.

    Raises:
      ValueError: when the round is built, if the two streams have different clients.

    Cost: a forward pass over the rows held out, client by client. Each sends two
    numbers, which may be summed securely.
    """
    statistic = _loss()
    total = sum_over_clients(statistic, loss_fn, None, mesh, ending=False)

    def apply(data, steps, state, memory, facts):
        if data.num_clients != facts.num_clients:
            raise ValueError(
                f"validation: held_out has {data.num_clients} clients and the "
                f"federation {facts.num_clients}: hold rows of the same clients out."
            )
        own = dataclasses.replace(facts, stream=data)
        (loss, rows), clients = total(state, own)
        mean = jnp.where(rows > 0, loss / jnp.maximum(rows, 1e-9), jnp.nan)
        return state, memory, {"loss": mean, "rows": rows, "clients": clients}

    init = lambda data, state: ()
    sums = lambda params: (statistic.init(params, None), ())
    return Phase(held_out, name, init, apply, switch, sums=sums)


def _loss() -> statistics.Statistic:
    """The sum of the loss over rows, and the rows."""

    def accumulate(value, params, batch, loss_fn, key):
        rows = jnp.sum(batch["mask"])
        loss = loss_fn(params, batch, key)[0].astype(jnp.float32)
        seen = statistics.Sum(jnp.where(rows > 0, loss * rows, 0), rows)
        return tree.add(value, seen)

    empty = lambda params, example: statistics.Sum(jnp.float32(0), jnp.float32(0))
    return statistics.Statistic(empty, accumulate, tree.add, statistics.mean)
