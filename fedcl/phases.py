"""A round is a list of phases, each behind a switch.

Federated learning is one phase; FFM's Algorithm 2 is a public phase before it; an
exact Fisher at the end of a context is a consolidation phase after it. The switch
is a small function of the round's facts and says how many steps a phase runs: 0
skips it without cost.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedcl import _engine, _random, base, cohorts, statistics, tree

PyTree = Any
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Facts:
    """What a phase and its switch may know of the round.

    Attributes:
      key: the round's key, one per phase.
      round: the round, ().
      stream: the federation's stream.
      num_clients: N.
    """

    key: jax.Array
    round: jax.Array
    stream: Any
    num_clients: int = dataclasses.field(metadata={"static": True})


Switch = Callable[[base.State, Facts], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a round.

    Attributes:
      data: arrays that the phase reads, any tree; an argument of the program.
      name: prefixes the phase's metrics; "" for none.
      init: `(data, state) -> memory`, what the phase carries between rounds.
      apply: `(data, steps, state, memory, facts) -> (state, memory, metrics)`.
      switch: `(state, facts) -> () int32`, the steps to run; None: always on.
      shards: the parts in which its cohort is drawn, None for any.
    """

    data: PyTree
    name: str = dataclasses.field(metadata={"static": True})
    init: Callable = dataclasses.field(metadata={"static": True})
    apply: Callable = dataclasses.field(metadata={"static": True})
    switch: Switch | None = dataclasses.field(default=None, metadata={"static": True})
    shards: int | None = dataclasses.field(default=None, metadata={"static": True})


def always(steps: int = 1) -> Switch:
    """On in every round."""
    return lambda state, facts: jnp.int32(steps)


def every(period: int, steps: int = 1, *, offset: int = 0) -> Switch:
    """On in rounds offset, offset + period, …

    >>> facts = Facts(None, jnp.int32(4), None, 1)
    >>> every(2, steps=7)(None, facts).item()
    7
    """

    def switch(state, facts):
        return jnp.where((facts.round - offset) % period == 0, steps, 0)

    return switch


def until(rounds: int, steps: int = 1) -> Switch:
    """On in the first rounds only, as in public pre-training."""
    return lambda state, facts: jnp.where(facts.round < rounds, steps, 0)


def context_ends(steps: int = 1) -> Switch:
    """On when some client's context ends with this round."""

    def switch(state, facts):
        clients = jnp.arange(facts.num_clients)
        ends = jax.vmap(facts.stream.ends, in_axes=(0, None))(clients, facts.round)
        return jnp.where(jnp.any(ends), steps, 0)

    return switch


def step(
    phases: tuple[Phase, ...],
    state: base.State,
    key: jax.Array,
    round: jax.Array,
    stream: base.StreamLike,
) -> tuple[base.State, Metrics]:
    """Runs the phases of one round in order.

    Args:
      phases: the round.
      state: the federation, with one memory per phase.
      key: the run's key.
      round: () int32.
      stream: the stream.

    Returns:
      The new state and the metrics of all phases, prefixed by `name/`.
    """
    key = jax.random.fold_in(key, round)
    n = jax.tree.leaves(state.clients)[0].shape[0]
    memories = list(state.phases)
    metrics: Metrics = {}
    for i, phase in enumerate(phases):
        facts = Facts(jax.random.fold_in(key, i), round, stream, n)
        state, memories[i], told = _one(phase, state, memories[i], facts)
        prefix = f"{phase.name}/" if phase.name else ""
        metrics |= {prefix + name: value for name, value in told.items()}
    return state._replace(phases=tuple(memories)), metrics


def _one(phase: Phase, state: base.State, memory: PyTree, facts: Facts):
    if phase.switch is None:
        return phase.apply(phase.data, jnp.int32(1), state, memory, facts)
    steps = jnp.asarray(phase.switch(state, facts), jnp.int32)
    on = lambda s, m: phase.apply(phase.data, steps, s, m, facts)
    told = jax.eval_shape(on, state, memory)[2]
    off = lambda s, m: (s, m, tree.zeros_like(told))
    state, memory, metrics = jax.lax.cond(steps > 0, on, off, state, memory)
    return state, memory, {**metrics, "steps": steps}


def start(phases: tuple[Phase, ...], state: base.State) -> base.State:
    """The state with a fresh memory for every phase."""
    memories = tuple(phase.init(phase.data, state) for phase in phases)
    return state._replace(phases=memories)


def federated(
    algorithm: base.Algorithm,
    *,
    cohort: cohorts.Sampler | None = None,
    schedule: _engine.Schedule = "vmap",
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    name: str = "",
) -> Phase:
    """A cohort trains on its stream and the server aggregates.

    Args:
      algorithm: the federated algorithm.
      cohort: who takes part; everyone by default.
      schedule: "vmap", "scan" or a chunk size.
      mesh: a mesh with an axis "clients", or None.
      switch: in which rounds; None: in all.
      name: prefixes its metrics.

    Returns:
      A `Phase`.

    Raises:
      ValueError: for an unknown schedule, or when the round is built, for a mesh
        that the population or the cohort does not fit.
    """
    sampler = cohort or cohorts.everyone()

    def draw(data, client):
        stream, key, round = data
        return _engine.visit_of(stream, key, client, round)

    run_cohort = _engine.cohort_fn(algorithm, draw, schedule, mesh)

    def apply(data, steps, state, memory, facts):
        _engine.check_mesh(mesh, facts.num_clients, sampler.shards)
        k_cohort, k_clients = jax.random.split(facts.key)
        who = sampler.draw(k_cohort, facts.round, facts.num_clients)
        present = jax.vmap(facts.stream.present, in_axes=(0, None))
        who = who._replace(train=who.train & present(who.client, facts.round))
        told = (facts.stream, k_clients, facts.round)
        state, metrics = run_cohort(state, who, told, who.client)
        return state, memory, metrics

    return Phase((), name, lambda data, state: (), apply, switch, sampler.shards)


def public(
    loss_fn: base.LossFn,
    optimizer: optax.GradientTransformation,
    data: base.Batch,
    *,
    batch_size: int,
    switch: Switch,
    name: str = "public",
) -> Phase:
    """The server trains φ on public data (FFM Algorithm 2, public phase).

    The clients' pseudo-gradients of the same round are then taken against the
    parameters that leave this phase. The optimiser's state is kept between rounds.

    Args:
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      optimizer: an optax optimiser.
      data: columns [M, ...]; rows are drawn uniformly with replacement.
      batch_size: B.
      switch: how many steps in which round, for example `until(5, steps=50)`.
      name: prefixes its metrics, "loss" (the last step's) and "steps".

    Returns:
      A `Phase`.

    Zhuang et al., 2023 and Yu et al., 2023: https://arxiv.org/abs/2306.15546,
    https://arxiv.org/abs/2305.11414
    """
    columns = {"mask": jnp.ones(len(next(iter(data.values())))), **data}

    def apply(data, steps, state, memory, facts):
        rows = data["mask"].shape[0]
        server = state.server

        def local_step(i, carry):
            params, opt_state, _ = carry
            k_draw, k_loss = jax.random.split(jax.random.fold_in(facts.key, i))
            index = _random.below(k_draw, (batch_size,), rows)
            batch = tree.gather(data, index)
            objective = lambda p: loss_fn(tree.merge(p, server.frozen), batch, k_loss)
            (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        start_ = (server.params, memory, jnp.float32(0))
        params, memory, loss = jax.lax.fori_loop(0, steps, local_step, start_)
        state = state._replace(server=server._replace(params=params))
        return state, memory, {"loss": loss}

    init = lambda data, state: optimizer.init(state.server.params)
    return Phase(columns, name, init, apply, switch)


def consolidate(
    statistic: statistics.Statistic,
    commit: Callable[[base.Memory, base.Params, PyTree], base.Memory],
    loss_fn: base.LossFn,
    *,
    merge: bool = False,
    schedule: _engine.Schedule = "scan",
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    name: str = "consolidate",
) -> Phase:
    """Clients whose context ends pass once over its data and commit a statistic.

    Args:
      statistic: what is accumulated over the client's current rows at the server's
        parameters, see `fedcl.statistics`.
      commit: `(memory, params, solved) -> memory`.
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      merge: False: each client commits its own statistic. True: the statistics of
        the clients that end are merged, and every client commits the result.
      schedule: how the population is mapped.
      mesh: where it lives.
      switch: when; by default when some client's context ends.
      name: prefixes its metric, "clients", how many contexts ended.

    Returns:
      A `Phase`. It costs one pass over the data of a context, and with `merge` one
      statistic per client in memory.
    """

    def one(shared, memory, client):
        (params, frozen), stream, key, round = shared
        bound = lambda p, b, k: loss_fn(tree.merge(p, frozen), b, k)
        ends = stream.ends(client, round) & stream.present(client, round)
        sweep = stream.sweep(client, round)
        k_client = jax.random.fold_in(key, client)

        def accumulate(value, xs):
            i, batch = xs
            k = jax.random.fold_in(k_client, i)
            return statistic.accumulate(value, params, batch, bound, k), None

        example = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sweep
        )
        empty = statistic.init(params, example)
        steps = jnp.arange(sweep["mask"].shape[0])
        value = jax.lax.scan(accumulate, empty, (steps, sweep))[0]
        if merge:
            return memory, (tree.where(ends, value, empty), ends)
        committed = commit(memory, params, statistic.solve(value))
        committed = _engine.same_types(memory, committed, "The memory in `commit`")
        return tree.where(ends, committed, memory), (empty, ends)

    run_all = _engine.map_cohort(one, schedule, mesh)

    def apply(data, steps, state, memory, facts):
        shared = (
            (state.server.params, state.server.frozen),
            facts.stream,
            facts.key,
            facts.round,
        )
        ids = jnp.arange(facts.num_clients)
        memories, (values, ends) = run_all(shared, state.clients.memory, ids, ids)
        if merge:
            solved = statistic.solve(statistics.merge_all(statistic, values))
            one_commit = lambda m: commit(m, state.server.params, solved)
            committed = jax.vmap(one_commit)(memories)
            memories = tree.where(jnp.any(ends), committed, memories)
        clients = state.clients._replace(memory=memories)
        return state._replace(clients=clients), memory, {"clients": jnp.sum(ends)}

    init = lambda data, state: ()
    return Phase((), name, init, apply, switch or context_ends())
