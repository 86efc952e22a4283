"""What a phase is, and how the phases of a round run one after another."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedcl import base, cohorts, tree
from fedcl._switches import Facts, Metrics, NotStackedError, Switch

PyTree = Any
_ASKING = 2**32 - 1  # Folded into a phase's key for its switch; no step counts so far.


def _unmoved(memory: PyTree, state: base.State) -> PyTree:
    return memory


class Federated(NamedTuple):
    """What a federated phase was built from, for who must know before it runs."""

    algorithm: base.Algorithm
    sampler: cohorts.Sampler
    schedule: str | int
    mesh: Mesh | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a round.

    Attributes:
      data: arrays that the phase reads, any tree; an argument of the program.
      name: prefixes the phase's metrics; "" for none.
      init: `(data, state) -> memory`, what the phase carries between rounds.
      apply: `(data, steps, state, memory, facts) -> (state, memory, metrics)`.
      switch: says how many steps to run; None: always on.
      shards: the parts in which its cohort is drawn, None for any.
      serve: `(state, memory) -> state`, for evaluation alone; None: as it is.
      observe: `(memory, state) -> memory`, at the end of every round, when the state
        holds what the round's phases said (`server.news`) and its cohort sent.
      sums: `(params) -> (sent, said)`, of a phase that sums over clients: what each that
        takes part sends, and what everyone is told then; else None.
      federated: of a federated phase what it was built from, else None.
    """

    data: PyTree
    name: str = dataclasses.field(metadata={"static": True})
    init: Callable = dataclasses.field(metadata={"static": True})
    apply: Callable = dataclasses.field(metadata={"static": True})
    switch: Switch | None = dataclasses.field(default=None, metadata={"static": True})
    shards: int | None = dataclasses.field(default=None, metadata={"static": True})
    serve: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    observe: Callable = dataclasses.field(default=_unmoved, metadata={"static": True})
    sums: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    federated: Federated | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def __post_init__(self):
        check_switch(self.switch, "A phase's `switch`")


Maker = Callable[[base.LossFn], Phase]  # A phase that waits for the task's loss.


class Carried(NamedTuple):
    """What a phase takes from round to round."""

    own: PyTree
    switch: PyTree = ()


def check_switch(switch: Any, what: str) -> None:
    """Refuses a bare function where a `Switch` belongs."""
    if switch is not None and not isinstance(switch, Switch):
        raise TypeError(
            f"{what} is a {type(switch).__name__}; it must be a fedcl.phases.Switch: "
            "wrap a function as Switch(lambda memory, state, facts: steps)."
        )


def start(phases: tuple[Phase, ...], state: base.State) -> base.State:
    """The state with a fresh memory for every phase."""
    switched = lambda p: () if p.switch is None else p.switch.init(state)
    memories = (Carried(p.init(p.data, state), switched(p)) for p in phases)
    return state._replace(phases=tuple(memories))


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
    try:
        return _step(phases, state, key, round, stream, fold=True)
    except NotStackedError:
        return _step(phases, state, key, round, stream, fold=False)


def _step(phases, state, key, round, stream, *, fold: bool):
    key = jax.random.fold_in(key, round)
    n = jax.tree.leaves(state.clients)[0].shape[0]
    memories, ran = list(state.phases), []
    metrics: Metrics = {}
    state = state._replace(server=state.server._replace(news={}))
    for i, phase in enumerate(phases):
        facts = Facts(jax.random.fold_in(key, i), round, stream, n, phase.data, fold)
        state, memories[i], told, steps = _one(phase, state, memories[i], facts)
        prefix = f"{phase.name}/" if phase.name else ""
        metrics |= {prefix + name: value for name, value in told.items()}
        ran.append(steps)
    each = zip(phases, memories, ran, strict=True)
    seen = tuple(_observed(p, m, steps, state, metrics) for p, m, steps in each)
    server = state.server._replace(news=())
    return state._replace(server=server, phases=seen, sent=()), metrics


def _one(phase: Phase, state: base.State, memory: Carried, facts: Facts):
    if phase.switch is None:
        one = jnp.int32(1)
        state, own, told = phase.apply(phase.data, one, state, memory.own, facts)
        return state, memory._replace(own=own), told, one
    asked = jax.random.fold_in(facts.key, _ASKING)
    ask = dataclasses.replace(facts, key=asked)
    said = phase.switch.decide(memory.switch, state, ask)
    steps = jnp.asarray(said, jnp.int32)
    on = lambda s, m: phase.apply(phase.data, steps, s, m, facts)
    after, _, told = jax.eval_shape(on, state, memory.own)
    off = lambda s, m: (_silent(s, after), m, tree.zeros_like(told))
    state, own, metrics = jax.lax.cond(steps > 0, on, off, state, memory.own)
    return state, memory._replace(own=own), {**metrics, "steps": steps}, steps


def _silent(state: base.State, like: base.State) -> base.State:
    """The state with zeros where a phase that is off would have said something."""
    news = {**tree.zeros_like(like.server.news), **state.server.news}
    said = type(state.sent) is type(like.sent)
    sent = state.sent if said else tree.zeros_like(like.sent)
    return state._replace(server=state.server._replace(news=news), sent=sent)


def _observed(phase: Phase, memory: Carried, steps, state, metrics) -> Carried:
    own = phase.observe(memory.own, state)
    if phase.switch is None:
        return memory._replace(own=own)
    return Carried(own, phase.switch.observe(memory.switch, steps, state, metrics))


def served(phases: tuple[Phase, ...], state: base.State) -> base.State:
    """The federation as it is evaluated and deployed.

    Args:
      phases: those of the round.
      state: from `fedcl.run`.

    Returns:
      The state, with what phases such as `solve` write for serving alone.
    """
    for phase, memory in zip(phases, state.phases, strict=True):
        state = state if phase.serve is None else phase.serve(state, memory.own)
    return state
