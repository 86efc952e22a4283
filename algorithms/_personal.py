r"""Parts of φ that stay on their client.

.. math:: \phi_k = (\phi^{shared}, \phi_k^{own}), \qquad
   \phi^{shared} \leftarrow \phi^{shared} - \sum_k p_k \Delta_k^{shared}

Arivazhagan et al., Federated Learning with Personalization Layers, 2019,
https://arxiv.org/abs/1912.00818
Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning
(FedSA-LoRA), 2024, https://arxiv.org/abs/2410.01463
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedcl import base, tree


class Own(NamedTuple):
    """What `personal` keeps on a client."""

    params: base.Params  # φ with None where it is shared.
    inner: Any  # What the algorithm itself keeps.


def personal(algorithm: base.Algorithm, where: Callable[[str], bool]) -> base.Algorithm:
    """The same algorithm, but some leaves of φ stay on the client that trains them.

    A client meets the shared leaves as the server sends them and its own as it left
    them, whenever that was; before its first visit they are those of `init`. They are
    not sent, so they are neither averaged nor counted as communication.

    Args:
      algorithm: any algorithm.
      where: `(path) -> bool`, the leaves of φ that are personal.

    Returns:
      An `Algorithm`. Its server keeps the personal leaves of `init`; what a client has
      is `own_params(state, client)`. With nothing personal it is the algorithm itself.

    Raises:
      ValueError: by `aggregate`, for messages that bring personal leaves.

    Cost: N times the personal leaves in memory; less to send. A cohort is added up
    chunk by chunk wherever that of the algorithm is.

    >>> from fedcl.algorithms import fedavg
    >>> import jax.numpy as jnp
    >>> import optax
    >>> loss = lambda p, batch, key: (p["a"] * p["b"], batch["x"])
    >>> a = personal(fedavg(loss, optax.sgd(0.1)), lambda path: path == "b")
    >>> example = {k: jax.ShapeDtypeStruct((2,), jnp.float32) for k in ("x", "mask")}
    >>> state = a.init({"a": jnp.ones(()), "b": jnp.ones(())}, example, num_clients=3)
    >>> state.clients.kept.params
    {'a': None, 'b': Array([1., 1., 1.], dtype=float32)}
    """

    def init(params, example, num_clients, frozen=None):
        state = algorithm.init(params, example, num_clients, frozen)
        own = tree.stack(_pick(state.server.params, where), num_clients)
        kept = Own(own, state.clients.kept)
        return state._replace(clients=state.clients._replace(kept=kept))

    def opened(server, client):
        params = tree.merge(client.kept.params, server.params)
        inner = client._replace(kept=client.kept.inner)
        return server._replace(params=params), inner

    def client_update(server, client, visit):
        here, inner = opened(server, client)
        message, inner, metrics = algorithm.client_update(here, inner, visit)
        ended = tree.sub(here.params, message.delta)
        kept = Own(_pick(ended, where), inner.kept)
        shared = _pick(message.delta, lambda path: not where(path))
        return message._replace(delta=shared), inner._replace(kept=kept), metrics

    def filled(server, messages):
        shared = _pick(server.params, lambda path: not where(path))
        _check_shared(shared, messages.delta)
        c = messages.weight.shape[0]
        still = tree.stack(tree.zeros_like(_pick(server.params, where)), c)
        return messages._replace(delta=tree.merge(messages.delta, still))

    def aggregate(server, messages):
        return how(server, filled(server, messages))

    def part(server, messages):
        return how.part(server, filled(server, messages))

    def review(server, client, visit):
        assert algorithm.review is not None
        new = algorithm.review(*opened(server, client), visit)
        return new._replace(kept=Own(client.kept.params, new.kept))

    how: Any = algorithm.aggregate
    passes = algorithm.review is not None
    adds_up = isinstance(how, base.Folding)
    whole: Any = base.Folding(aggregate, part, how.finish) if adds_up else aggregate
    return base.Algorithm(init, client_update, whole, review if passes else None)


def fedsa_lora(algorithm: base.Algorithm) -> base.Algorithm:
    """FedSA-LoRA: the adapters' A is shared, their B is personal.

    A learns what the clients have in common and B what each has alone; the mean of A is
    linear in what is sent, and half as long.

    Args:
      algorithm: over adapters, such as `fedavg`.

    Returns:
      An `Algorithm`, see `personal`.

    Guo et al., 2024, https://arxiv.org/abs/2410.01463

    Cost: as `personal`.
    """
    return personal(algorithm, lambda path: path.endswith("lora/b"))


def own_params(state: base.State, client: jax.Array) -> base.Params:
    """φ as one client has it: the server's shared leaves, its own personal ones.

    Args:
      state: of a `personal` algorithm.
      client: its id, (). Map over ids by `jax.lax.map` to evaluate every client.

    Returns:
      A tree like φ.

    Raises:
      ValueError: if the algorithm is not personal.
    """
    found = tree.members(state.clients.kept, Own)
    if not found:
        raise ValueError(
            "own_params: the clients keep no leaves of φ of their own; wrap the "
            "algorithm with fedcl.algorithms.personal(algorithm, where)."
        )
    return tree.merge(tree.gather(found[0].params, client), state.server.params)


def _check_shared(shared: base.Params, delta: base.Params) -> None:
    want: Any = jax.tree.structure(shared)  # Its type does not know equality.
    if want != jax.tree.structure(delta):
        raise ValueError(
            "personal: messages bring updates of the leaves "
            f"{sorted(tree.describe(delta))}, and the shared ones are "
            f"{sorted(tree.describe(shared))}: clients must send the latter alone."
        )


def _pick(params: base.Params, where: Callable[[str], bool]) -> base.Params:
    """The tree with None where the predicate says no."""
    keep = lambda path, x: x if where(tree.path_string(path)) else None
    return jax.tree_util.tree_map_with_path(keep, params)
