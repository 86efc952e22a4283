"""Phases that add up a statistic over the clients, and what becomes of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedcl import _engine, base, statistics, tree
from fedcl._phase import Phase
from fedcl._switches import Facts, Switch, context_ends

PyTree = Any


def consolidate(
    statistic: statistics.Statistic,
    commit: Callable[[base.Memory, base.Params, PyTree], base.Memory],
    loss_fn: base.LossFn,
    *,
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    name: str = "consolidate",
) -> Phase:
    """Clients whose context ends add up a statistic, and every client commits it.

    What a client remembers of its own context alone needs no phase: that is the hook
    `review` of a `ClientTransform`.

    Args:
      statistic: what is accumulated over the clients' current rows at the server's
        parameters, see `fedcl.statistics`.
      commit: `(memory, params, solved) -> memory`.
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      mesh: where the clients live.
      switch: when; by default when some client's context ends.
      name: prefixes its metric, "clients", how many contexts ended.

    Returns:
      A `Phase`. It costs one pass over the data of a context.
    """
    total = sum_over_clients(statistic, loss_fn, None, mesh)

    def apply(data, steps, state, memory, facts):
        value, ends = total(state, facts)
        solved = statistic.solve(value)
        one = lambda m: commit(m, state.server.params, solved)
        memories = jax.vmap(one)(state.clients.memory)
        what = "The memory in `commit`"
        memories = _engine.same_types(state.clients.memory, memories, what)
        memories = tree.where(ends > 0, memories, state.clients.memory)
        clients = state.clients._replace(memory=memories)
        return state._replace(clients=clients), memory, {"clients": ends}

    def sums(params):
        value = statistic.init(params, None)
        return value, statistic.solve(value)

    init = lambda data, state: ()
    return Phase((), name, init, apply, switch or context_ends(), sums=sums)


def solve(
    statistic: statistics.Statistic,
    write: Callable[[base.Params, PyTree], base.Params],
    loss_fn: base.LossFn,
    *,
    rows: Callable[[base.Memory], base.Batch] | None = None,
    commit: bool = False,
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    name: str = "solve",
) -> Phase:
    """The server writes into its parameters what a sum over the clients solves.

    Closed-form classifiers are of this kind: class means, linear discriminants and
    ridge regression are statistics, and `write` puts them into the last layer.

    Args:
      statistic: see `fedcl.statistics`.
      write: `(params, solved) -> params`.
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      rows: `(memory) -> batch [M, ...]`, sums over what all clients remember, anew
        each time. None: over the rows of the contexts that end, added to the sum of
        those before.
      commit: True: training goes on from the parameters written. False: they serve
        for evaluation only, see `served`, and training does not see them.
      mesh: where the clients live.
      switch: when; by default when some client's context ends.
      name: prefixes its metric, "clients", how many took part.

    Returns:
      A `Phase`. Until it has been on for the first time nothing is written.
    """
    total = sum_over_clients(statistic, loss_fn, rows, mesh)

    def init(data, state):
        return tree.strong(
            (statistic.init(state.server.params, None), jnp.array(False))
        )

    def apply(data, steps, state, memory, facts):
        value, clients = total(state, facts)
        value = statistic.merge(memory[0], value) if rows is None else value
        memory = (value, memory[1] | (clients > 0))
        state = _written(state, memory) if commit else state
        return state, memory, {"clients": clients}

    def _written(state, memory):
        params = state.server.params
        new = write(params, statistic.solve(memory[0]))
        new = _engine.same_types(params, new, "The parameters in `write`")
        params = tree.where(memory[1], new, params)
        return state._replace(server=state.server._replace(params=params))

    serve = None if commit else _written
    sums = lambda params: (statistic.init(params, None), ())
    return Phase(
        (), name, init, apply, switch or context_ends(), serve=serve, sums=sums
    )


def sum_over_clients(
    statistic: statistics.Statistic,
    loss_fn: base.LossFn,
    rows: Callable[[base.Memory], base.Batch] | None,
    mesh: Mesh | None,
    *,
    ending: bool = True,
) -> Callable[[base.State, Facts], tuple[PyTree, jax.Array]]:
    """Builds `(state, facts) -> (value, how many clients took part)`.

    Clients are taken one after another, each device its own, so that there is one
    value in memory, not one per client. Over what they remember, or over the rows of
    their contexts, all of them take part, or with `ending` those whose context ends.
    """
    over_all = rows is not None or not ending

    def local(server, stream, key, round, memories, ids):
        bound = lambda p, b, k: loss_fn(tree.merge(p, server.frozen), b, k)

        def of_client(value, xs):
            memory, client = xs

            def do(value):
                sweep = stream.sweep(client, round) if rows is None else rows(memory)
                sweep = jax.tree.map(lambda x: x[None], sweep) if rows else sweep
                own = (server.params, sweep, bound, jax.random.fold_in(key, client))
                return statistic.merge(value, statistics.over(statistic, *own))

            takes = stream.present(client, round) & (
                True if over_all else stream.ends(client, round)
            )
            return jax.lax.cond(takes, do, lambda v: v, value), takes

        empty = tree.strong(statistic.init(server.params, None))
        value, takes = jax.lax.scan(of_client, empty, (memories, ids))
        return value, jnp.sum(takes)

    def on_devices(*args):
        value, took = local(*args)
        values = jax.tree.map(lambda v: jax.lax.all_gather(v, _engine.AXIS), value)
        merged = statistics.merge_all(statistic, values)
        return merged, jax.lax.psum(took, _engine.AXIS)

    def total(state, facts):
        ids = jnp.arange(facts.num_clients)
        memories = state.clients.memory if rows is not None else ()
        fn = local if mesh is None else _on_clients(on_devices, mesh)
        shared = (state.server, facts.stream, facts.key, facts.round)
        return fn(*shared, memories, ids)

    return total


def _on_clients(fn: Callable, mesh: Mesh) -> Callable:
    """`fn(server, stream, key, round, memories, ids)` on each device's own clients."""
    clients = P(_engine.AXIS)
    specs = (P(), P(), P(), P(), clients, clients)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
