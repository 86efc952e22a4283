"""The program of a run: what `fedcl.run` runs and `fedcl.memory.report` asks about."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedcl import _engine, _frozen, _hosts, _once, base, cohorts, phases, tree

PyTree = Any


def _segment(
    state: base.State,
    held: PyTree,
    key: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    parts: tuple[phases.Phase, ...],
    stream: Any,
    *,
    length: int,
    whole: bool,
) -> tuple[base.State, dict]:
    """`length` rounds from `start`, those before `stop`; `held` of θ stays."""

    def one(state, t):
        whole = _frozen.together(state, held)
        state, told = phases.step(parts, whole, key, t, stream)
        return _frozen.without(state, held), told

    def guarded(state, t):
        told = jax.eval_shape(one, state, t)[1]
        skip = lambda s, t: (s, tree.zeros_like(told))
        return jax.lax.cond(t < stop, one, skip, state, t)

    ts = start + jnp.arange(length)
    return jax.lax.scan(one if whole else guarded, state, ts)


@partial(jax.jit, static_argnames=("length", "whole", "seeded"), donate_argnums=0)
def _compiled(state, held, key, start, stop, parts, stream, *, length, whole, seeded):
    fn = partial(_segment, length=length, whole=whole)
    if seeded:
        fn = jax.vmap(fn, in_axes=(0, 0, 0, None, None, None, None))
    return fn(state, held, key, start, stop, parts, stream)


class Program(NamedTuple):
    """One program for all segments of a run.

    Attributes:
      parts: the phases of a round.
      stream: what the clients see.
      key: the run's, () or [S].
      length: rounds of a segment.
      whole: whether every segment is that long.
      still: θ's structure, True for the leaves that no round changes.
    """

    parts: tuple[phases.Phase, ...]
    stream: Any
    key: jax.Array
    length: int
    whole: bool
    still: PyTree = None

    @property
    def seeded(self) -> bool:
        return self.key.ndim == 1

    def begun(self, state: base.State) -> base.State:
        """The state with a fresh memory for every phase."""
        begin = partial(phases.start, self.parts)
        return (jax.vmap(begin) if self.seeded else begin)(state)

    def of_state(self, state: base.State) -> "Program":
        """The program that leaves alone what of the state's θ no round changes."""
        begun = jax.eval_shape(self.begun, state)
        given = (self.seeded, self.parts, begun, self.key, self.stream)
        return self._replace(still=_frozen.unchanged(*given))

    def own(self, state: base.State, donate: bool) -> base.State:
        """A state that `segment` may consume, but for what it leaves alone.

        Args:
          state: the caller's.
          donate: whether it may be consumed itself; θ may belong to others as well, and
            an array that it holds twice can be given once.
        """
        held = _frozen.held(state, self.still)
        shared = {id(x) for x in jax.tree.leaves(state.server.frozen)}

        def mine(x):
            once = donate and id(x) not in shared
            shared.add(id(x))
            return x if once else jnp.copy(x)

        mine_all = jax.tree.map(mine, _frozen.without(state, held))
        return _frozen.together(mine_all, held)

    def everywhere(self, mesh: Mesh | None) -> "Program":
        """The same for all processes of a mesh."""
        parts, stream = _hosts.everywhere((self.parts, self.stream), mesh)
        return self._replace(parts=parts, stream=stream)

    def segment(self, state: base.State, start: int, stop: int):
        """Rounds `start` to `stop`: `(state, metrics)`; the state passed in is donated."""
        given, fixed = self._arguments(state, start, stop)
        state, metrics = _compiled(*given, **fixed)
        return _frozen.together(state, given[1]), metrics

    def lower(self, state: base.State) -> Any:
        """What `segment` compiles for a state of such shapes."""
        given, fixed = self._arguments(state, 0, 0)
        return _compiled.lower(*given, **fixed)

    def _arguments(self, state: base.State, start: int, stop: int):
        held = _frozen.held(state, self.still)
        times = (jnp.int32(start), jnp.int32(stop))
        rest = (held, self.key, *times, self.parts, self.stream)
        fixed = {"length": self.length, "whole": self.whole, "seeded": self.seeded}
        return (_frozen.without(state, held), *rest), fixed


def of(
    algorithm: base.Algorithm | Sequence[phases.Phase],
    stream: base.StreamLike,
    *,
    key: jax.Array,
    rounds: int,
    every: int | None,
    cohort: cohorts.Sampler | None,
    schedule: _engine.Schedule,
    mesh: Mesh | None,
) -> Program:
    """The program that `fedcl.run` compiles for these arguments."""
    parts = parts_of(algorithm, cohort, schedule, mesh)
    for part in parts:
        _engine.check_mesh(mesh, stream.num_clients, part.shards)
    every = length_of(rounds, every)
    return Program(parts, stream, key, every, rounds % every == 0)


def length_of(rounds: int, every: int | None) -> int:
    """Rounds between looks: about a tenth of all, unless `every` says."""
    return min(every or max(1, rounds // 10), rounds)


def parts_of(
    algorithm: base.Algorithm | Sequence[phases.Phase],
    cohort: cohorts.Sampler | None,
    schedule: _engine.Schedule,
    mesh: Mesh | None,
) -> tuple[phases.Phase, ...]:
    """The phases of a round; of an `Algorithm`, that one."""
    if isinstance(algorithm, base.Algorithm):
        return _alone(algorithm, cohort, schedule, mesh)
    if cohort is not None:
        raise ValueError(
            "cohort= is for an Algorithm; with phases, give it to phases.federated(…)."
        )
    return tuple(algorithm)


@_once.remembered  # The same phase again is the same program.
def _alone(algorithm, cohort, schedule, mesh) -> tuple[phases.Phase, ...]:
    """The round of an `Algorithm`."""
    return (phases.federated(algorithm, cohort=cohort, schedule=schedule, mesh=mesh),)
