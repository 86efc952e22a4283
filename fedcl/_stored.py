"""Rounds whose clients' states come from a store, see `fedcl.store`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import _engine, _once, base, cohorts
from fedcl._host import History, Options, drive

PyTree = Any
# `(t) -> (the cohort, data of all, members [C, ...])`
Feed = Callable[[int], tuple[cohorts.Cohort, PyTree, PyTree]]


def check(algorithm: Any, key: jax.Array, mesh: Any, schedule: Any) -> None:
    """Refuses what a store does not offer."""
    wrong = [
        (not isinstance(algorithm, base.Algorithm), "a list of phases"),
        (key.ndim == 1, "several seeds"),
        (mesh is not None, "a mesh"),
        (schedule == "auto", 'schedule="auto"'),
        (getattr(algorithm, "review", None) is not None, "a method with `review`"),
    ]
    found = [what for there, what in wrong if there]
    if found:
        raise ValueError(
            f"The clients' states are in a store, which does not go with {found[0]}: "
            "give one Algorithm, one key and a schedule, or keep the states on the "
            "device."
        )


def plan(sampler: cohorts.Sampler, stream: Any, key: jax.Array, t: jax.Array):
    """The cohort of a round and the key of its clients, as `phases.step` draws them."""
    key = jax.random.fold_in(jax.random.fold_in(key, t), 0)
    k_cohort, k_clients = jax.random.split(key)
    who = sampler.draw(k_cohort, t, stream.num_clients)
    present = jax.vmap(stream.present, in_axes=(0, None))(who.client, t)
    return who._replace(train=who.train & present), k_clients


def on_device(sampler: cohorts.Sampler, stream: Any, key: jax.Array) -> Feed:
    """The feed of `fedcl.run`, whose clients draw their rows on the device."""
    ask = jax.jit(partial(plan, sampler))

    def feed(t: int):
        who, k_clients = ask(stream, key, jnp.int32(t))
        return who, (stream, k_clients, jnp.int32(t)), who.client

    return feed


def draw(data: PyTree, client: jax.Array) -> base.Visit:
    """One client's visit in that feed."""
    stream, key, t = data
    return _engine.visit_of(stream, key, client, t)


@_once.remembered
def one_round(algorithm, visit: Callable, schedule: _engine.Schedule, n: int):
    """`(server, rows [C, ...], cohort, data, members) -> (server, rows, metrics)`."""
    apply = _engine.cohort_fn(algorithm, visit, schedule, None)

    def step(server, rows, who, data, members):
        here = who._replace(client=jnp.arange(who.client.shape[0]))
        state, metrics = apply(base.State(server, rows), here, data, members)
        fault = _engine._fault(who.client, n)
        told = {**metrics, "client": who.client, "fault": fault}
        return state.server, state.clients, told

    return jax.jit(step, donate_argnums=(0, 1))


def lower(
    f: Any, state: base.State, stream: Any, key: jax.Array
) -> tuple[base.State, Any]:
    """The shapes of what a round has on the device, and what it compiles.

    Args:
      f: what the federated phase was built from.
      state: with a store.
      stream: the stream.
      key: the run's key.
    """
    store: Any = state.clients
    t = jnp.int32(0)
    who, own = jax.eval_shape(partial(plan, f.sampler), stream, key, t)
    here = state._replace(clients=store.shapes(who.client.shape[0]))
    step = one_round(f.algorithm, draw, f.schedule, stream.num_clients)
    data = (stream, own, t)
    return here, step.lower(here.server, here.clients, who, data, who.client)


def run(
    step: Callable,
    feed: Feed,
    state: base.State,
    key: jax.Array,
    first: Callable[[base.State], dict],
    o: Options,
) -> tuple[base.State, History]:
    """Round after round: read the cohort's rows, run, write them back."""
    store: Any = state.clients
    begun = False

    def segment(state, start, stop):
        nonlocal begun
        if not begun:
            store.rewind(start)
        begun, server, told = True, state.server, []
        for t in range(start, stop):
            who, data, members = feed(t)
            ids = np.asarray(who.client)
            rows = jax.tree.map(jnp.asarray, store.gather(ids))
            server, rows, metrics = step(server, rows, who, data, members)
            store.step(t, ids, rows, undo=o.checkpoint is not None)
            told.append(metrics)
        if o.checkpoint is not None:
            store.forget(min(o.checkpoint.whole(), default=0))
        state = state._replace(server=server)
        metrics = jax.tree.map(lambda *xs: np.stack(xs), *told)
        return state, metrics, first(state)

    elsewhere: Any = ()
    server = base.State(jax.tree.map(jnp.copy, state.server), elsewhere)
    ended, history = drive(segment, first, server, key, o)
    store.settle()
    return ended._replace(clients=store), history
