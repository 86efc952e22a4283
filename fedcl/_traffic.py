"""What travels between a server and its clients, see `fedcl.metrics.communication`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedcl import _once, _phase, base, tree
from fedcl._switches import Facts
from fedcl.store import Store

PyTree = Any
COUNTS = ("population", "version")  # Two numbers for bookkeeping.
COHORT = 4  # Any will do: what `aggregate` changes does not depend on how many send.


class Communication(NamedTuple):
    """Bytes of one client's part in a round, from static shapes."""

    up: int  # The message: Δφ, its weight, what the method tells, other sums.
    down: int  # What the client reads and the rounds change, φ above all.
    once: int  # What they leave as it is, θ above all: sent when a client joins.


class Sums(NamedTuple):
    """Bytes of one client in a round in which a phase sums over the clients."""

    up: int  # The statistic, of each that takes part.
    down: int  # What the phase tells everyone then, beside φ.


def communication(
    algorithm: base.Algorithm,
    state: base.State,
    stream: base.StreamLike,
    parts: Sequence[_phase.Phase] = (),
) -> Communication:
    """Bytes that travel per client and round, without running anything.

    What is sent down is read off the algorithm: those leaves of the server that
    `client_update` reads and `aggregate` changes, and what phases before it said to the
    clients. So the accumulators in θ of FedEx-LoRA count, as they are stored: a client
    may have missed any number of rounds. Personal leaves of φ do not.

    Args:
      algorithm: the algorithm.
      state: one federation, arrays or `jax.ShapeDtypeStruct`s, or with a store.
      stream: for the shapes of a visit.
      parts: the phases of the round, whose news count as in a round in which those
        before the federated one are on.

    Returns:
      Bytes as stored, without compression.
    """
    if isinstance(state.clients, Store):
        state = state._replace(clients=state.clients.shapes(1))
    server = state.server._replace(news=_news(algorithm, state, stream, parts))
    visit = jax.eval_shape(_visit, stream)
    return of_visit(algorithm, server, state.clients, visit)


def of_visit(
    algorithm: base.Algorithm, server: PyTree, clients: PyTree, visit: PyTree
) -> Communication:
    """`communication`, from the shapes of a visit."""
    read, message, _ = part(algorithm, server, clients, visit)
    changed = _changed(algorithm, server, message)
    down = once = 0
    for (name, leaf), is_read, moves in zip(_named(server), read, changed, strict=True):
        size = tree.size(leaf)
        down += size if is_read and (moves or name == "news") else 0
        kept = not moves and name != "news"
        once += size if kept and (is_read or name == "frozen") else 0
    return Communication(tree.size(message), down, once)


def sums(params: base.Params, parts: Sequence[_phase.Phase]) -> dict[str, Sums]:
    """Bytes that travel for phases such as `solve` and `consolidate`, by their names.

    Args:
      params: φ, arrays or `jax.ShapeDtypeStruct`s.
      parts: the phases of the round.

    Returns:
      Of the phases that sum over the clients, bytes as stored. The phase's metric
      "clients" says how many took part.
    """
    summing = ((p.name, p.sums) for p in parts if p.sums is not None)
    shapes = ((name, jax.eval_shape(of, params)) for name, of in summing)
    return {name: Sums(*map(tree.size, both)) for name, both in shapes}


def _named(server: base.ServerState) -> Iterator[tuple[str, Any]]:
    """The leaves in their order, each with the field that holds it."""
    for name, part in zip(server._fields, server, strict=True):
        for leaf in jax.tree.leaves(part):
            yield name, () if name in COUNTS else leaf


def _visit(stream: base.StreamLike) -> base.Visit:
    zero, key = jnp.int32(0), jax.random.key(0)
    return base.Visit(stream.sample(key, zero, zero), zero, zero, zero, key)


@_once.per_shapes
def part(algorithm, server, clients, visit) -> tuple[list[bool], base.Message, PyTree]:
    """A client's part, from shapes alone.

    Returns:
      Which leaves of the server it reads, and the shapes of its message and metrics.
    """

    def one(server, clients, visit):
        client = jax.tree.map(lambda x: x[0], clients)
        message, _, metrics = algorithm.client_update(server, client, visit)
        return message, metrics

    traced = jax.make_jaxpr(one, return_shape=True)(server, clients, visit)
    body, (message, metrics) = traced[0].jaxpr, traced[1]
    used = {id(v) for eqn in body.eqns for v in eqn.invars}
    used |= {id(v) for v in body.outvars[: len(jax.tree.leaves(message))]}
    leaves = body.invars[: len(jax.tree.leaves(server))]
    return [id(v) in used for v in leaves], message, metrics


def moving(
    algorithm: base.Algorithm,
    server: base.ServerState,
    read: Sequence[bool],
    message: base.Message,
) -> base.ServerState:
    """True at the leaves of the server that clients read and rounds change, else None."""
    changed = _changed(algorithm, server, message)
    both = [(a and b) or None for a, b in zip(read, changed, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(server), both)


@_once.per_shapes
def _changed(algorithm, server, message: base.Message) -> list[bool]:
    """Which leaves of the server are others after an aggregation."""
    many = lambda x: jax.ShapeDtypeStruct((COHORT, *x.shape), x.dtype)
    cohort = jax.tree.map(many, message)
    body = jax.make_jaxpr(algorithm.aggregate)(server, cohort).jaxpr
    leaves = body.invars[: len(jax.tree.leaves(server))]
    return [new is not old for old, new in zip(leaves, body.outvars, strict=True)]


def _news(algorithm, state: base.State, stream, parts: Sequence[_phase.Phase]) -> Any:
    """The shapes of what the phases before the federated one say."""
    own = lambda p: p.federated is not None and p.federated.algorithm is algorithm
    place = next((i for i, part in enumerate(parts) if own(part)), 0)
    before, n = tuple(parts[:place]), stream.num_clients
    if not before:
        return state.server.news

    def said(state, stream, key):
        state = _phase.start(before, state)
        state = state._replace(server=state.server._replace(news={}))
        for phase, memory in zip(before, state.phases, strict=True):
            facts = Facts(key, jnp.int32(0), stream, n, phase.data)
            state = _phase._one(phase, state, memory, facts)[0]
        return state.server.news

    return jax.eval_shape(said, state, stream, jax.random.key(0))
