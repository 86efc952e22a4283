"""Many rounds: fused on the device (`run`), or fed from the host (`loop`)."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedcl import (
    _engine,
    _hosts,
    _kept,
    _placement,
    _program,
    _stored,
    base,
    cohorts,
    phases,
    tree,
)
from fedcl import _evaluation as _shared
from fedcl._host import FaultError as FaultError
from fedcl._host import History as History
from fedcl._host import Options, drive
from fedcl._host import Progress as Progress
from fedcl.checkpoint import Checkpoints
from fedcl.store import Store

PyTree = Any
round_fn = _engine.round_fn
_as_tree = _shared.as_tree


def _evaluation(
    evaluate: Callable[[base.State], PyTree] | None,
    state: base.State,
    parts: tuple[phases.Phase, ...] = (),
    seeded: bool = False,
) -> Callable[[base.State], dict]:
    """`(state) -> dict`, one program for all runs that evaluate alike."""
    if evaluate is None:
        return lambda state: {}
    view = _shared.viewed(evaluate, state, parts, seeded)
    return lambda s: _shared.evaluated(view(s), evaluate, seeded=seeded)


def _evaluated(state, parts, evaluate, *, seeded):
    """An evaluation of a state without phases, see `fedcl.online`."""
    return {} if evaluate is None else _shared.evaluated(state, evaluate, seeded=seeded)


def run(
    algorithm: base.Algorithm | Sequence[phases.Phase],
    state: base.State,
    stream: base.StreamLike,
    *,
    key: jax.Array,
    rounds: int,
    cohort: cohorts.Sampler | None = None,
    schedule: _engine.Schedule = "vmap",
    mesh: Mesh | None = None,
    evaluate: Callable[[base.State], PyTree] | None = None,
    every: int | None = None,
    nonfinite: str = "raise",
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    donate: bool = False,
) -> tuple[base.State, History]:
    """Runs rounds fused by `lax.scan`, with evaluations, checkpoints and progress.

    One program is compiled for `every` rounds, and one for the evaluation, which runs
    that evaluate alike share. The state is donated from round to round; the one passed
    in is copied first and stays valid, unless it is to be donated too.

    Args:
      algorithm: an `Algorithm`, or the phases of a round, see `fedcl.phases`.
      state: from `algorithm.init`; with seeds, stacked to [S, ...]. From
        `fedcl.store.init` the clients' states stay in files.
      stream: a pure stream, see `fedcl.streams`; a pytree, passed as an argument.
      key: the run's key, (); or [S] keys for S seeds, run side by side by `vmap`.
      rounds: how many rounds in all, those of a resumed run included.
      cohort: who takes part, for an `Algorithm`; everyone by default.
      schedule: "vmap", "scan", a chunk size, or "auto", which times the first
        three candidates on a round and keeps the fastest; for an `Algorithm`.
      mesh: a mesh with an axis "clients"; for an `Algorithm`.
      evaluate: `(state) -> dict of arrays`, on the device. Give large arrays to it
        by `jax.tree_util.Partial`, so that they are arguments of the program.
      every: rounds between evaluations, and between looks from the host; by
        default about a tenth of `rounds`. There is an evaluation at round 0 too.
      nonfinite: what follows when a client sends NaN or Inf, which is never
        averaged: "raise" stops, naming round and client; "drop" counts on, see the
        metric "nonfinite".
      checkpoint: where and how often to save.
      resume: continue from the newest whole checkpoint; refused without one only
        if the directory holds checkpoints of something else.
      progress: called after every segment.
      donate: whether the state passed in may be used up, θ excepted: there is then one
        state in memory, not two. Not for a state from `fedcl.store.init`.

    Returns:
      The final state and the history.

    Raises:
      ValueError: for arguments that do not fit each other.
      FaultError: for a non-finite message (see `nonfinite`), or for duplicate or
        unknown client ids in a cohort.
      CheckpointError: for a checkpoint that does not belong to this run.
      Interrupted: after Ctrl-C, when everything is saved.
    """
    _check_options(rounds, every, nonfinite)
    every = _program.length_of(rounds, every)
    seeded = key.ndim == 1
    _check_population(state, stream, seeded)
    options = Options(rounds, every, nonfinite, checkpoint, resume, progress, seeded)
    if isinstance(state.clients, Store):
        _stored.check(algorithm, key, mesh, schedule)
        feed = _stored.on_device(cohort or cohorts.everyone(), stream, key)
        n = stream.num_clients
        step = _stored.one_round(algorithm, _stored.draw, schedule, n)
        seen = _evaluation(_as_tree(evaluate), state._replace(clients=()))
        return _stored.run(step, feed, state, key, seen, options)
    _placement.check_seeds(state, seeded)
    if schedule == "auto":
        one = _first_seed(state, key) if seeded else (state, key)
        schedule = choose_schedule(algorithm, *one, stream, cohort=cohort, mesh=mesh)
    program = _program.of(
        algorithm,
        stream,
        key=key,
        rounds=rounds,
        every=every,
        cohort=cohort,
        schedule=schedule,
        mesh=mesh,
    )
    program = program.of_state(state)
    state = program.begun(program.own(state, donate))
    if mesh is not None:
        _hosts.check_same((state, stream, key), "The federations")
    state = _engine.place(state, mesh, seeded)
    layouts = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    program, evaluate = program.everywhere(mesh), _as_tree(evaluate)
    evaluate = _hosts.everywhere(evaluate, mesh)
    first = _evaluation(evaluate, state, program.parts, seeded)

    def segment(state, start, stop):
        here = _placement.put_back(state, layouts)
        state, metrics = program.segment(here, start, stop)
        return state, metrics, first(state)

    return drive(segment, first, state, key, options._replace(still=program.still))


def _check_options(rounds: int, every: int | None, nonfinite: str) -> None:
    if rounds < 1 or (every is not None and every < 1):
        raise ValueError(
            f"rounds is {rounds} and every {every}; both must be 1 or more."
        )
    if nonfinite not in ("raise", "drop"):
        raise ValueError(f'nonfinite is {nonfinite!r}; it must be "raise" or "drop".')


def _check_population(state: base.State, stream: Any, seeded: bool) -> None:
    clients: Any = state.clients
    stored = isinstance(clients, Store)
    rows = () if stored else jax.tree.leaves(clients)[0].shape
    n = clients.num_clients if stored else rows[int(seeded)]
    if n != stream.num_clients:
        raise ValueError(
            f"The state has {n} clients and the stream {stream.num_clients}: give "
            "algorithm.init the stream's num_clients."
        )


def _first_seed(state: base.State, key: jax.Array) -> tuple[base.State, jax.Array]:
    return tree.gather(state, jnp.int32(0)), key[0]


def choose_schedule(
    algorithm: base.Algorithm | Sequence[phases.Phase],
    state: base.State,
    key: jax.Array,
    stream: base.StreamLike,
    *,
    cohort: cohorts.Sampler | None = None,
    mesh: Mesh | None = None,
    repeats: int = 3,
    tell: Callable[[str], None] | None = None,
) -> _engine.Schedule:
    """Times a round under each candidate schedule and returns the fastest.

    The times are kept in the user's cache directory (`$FEDCL_CACHE`), by program,
    backend, number of devices and version of JAX, and looked up the next time.

    Args:
      algorithm: an `Algorithm`; phases carry their own schedule.
      state: one federation.
      key: the run's key.
      stream: the stream.
      cohort: who takes part.
      mesh: where.
      repeats: timed rounds per candidate, the smallest counts.
      tell: is told the choice and the times in a sentence; None: Python's logger
        "fedcl.rounds", at level INFO.

    Returns:
      "vmap", "scan" or a chunk size. One that does not fit into memory, as its compiled
      program says, is not tried.

    Raises:
      ValueError: if given phases.
      MemoryError: if none fits.
    """
    from fedcl import memory

    if not isinstance(algorithm, base.Algorithm):
        raise ValueError('schedule="auto" needs an Algorithm, not a list of phases.')
    sampler = cohort or cohorts.everyone()
    size = sampler.draw(key, jnp.int32(0), stream.num_clients).client.shape[0]
    per_device = size // (1 if mesh is None else mesh.shape[_engine.AXIS])
    candidates: list[_engine.Schedule] = ["vmap", "scan"]
    if per_device >= 8:
        candidates.append(math.isqrt(per_device))

    def program(candidate: _engine.Schedule) -> tuple[Any, tuple]:
        parts = _program.parts_of(algorithm, cohort, candidate, mesh)
        ready = _engine.place(phases.start(parts, state), mesh)
        return jax.jit(partial(phases.step, parts)), (ready, key, jnp.int32(0), stream)

    def seconds(candidate: _engine.Schedule) -> float:
        one, given = program(candidate)
        compiled = one.lower(*given).compile()
        if not memory.fits(compiled, given, mesh):
            return math.inf
        go = lambda: jax.block_until_ready(compiled(*given))
        go()
        return min(_timed(go) for _ in range(repeats))

    one, given = program("vmap")
    name = _kept.name(one.lower(*given).as_text(), str(candidates))
    times = _hosts.agreed(_kept.read(name))
    when = ", as measured before on this machine" if times else ""
    if not times:
        found = _hosts.agreed([[c, seconds(c)] for c in candidates])
        times = [pair for pair in found if pair[1] < math.inf]
        if not times:
            raise MemoryError(
                f"A round fits into memory under none of the schedules {candidates}: "
                "take a smaller cohort or batch, or ask fedcl.memory.report what helps."
            )
        if times == found:
            _kept.write(name, times)
        when += "".join(f"; {c}: does not fit" for c, t in found if t == math.inf)
    best = min(times, key=lambda pair: pair[1])[0]
    listed = ", ".join(f"{c}: {1e3 * t:.1f} ms" for c, t in times)
    said = f"schedule {best!r}, the fastest of a round by {listed}{when}"
    (tell or logging.getLogger(__name__).info)(said)
    return best


def _timed(go: Callable[[], Any]) -> float:
    start = time.perf_counter()
    go()
    return time.perf_counter() - start


def loop(
    algorithm: base.Algorithm,
    state: base.State,
    stream: Any,
    *,
    key: jax.Array,
    rounds: int,
    cohort: cohorts.Sampler | None = None,
    schedule: _engine.Schedule = "vmap",
    mesh: Mesh | None = None,
    evaluate: Callable[[base.State], PyTree] | None = None,
    every: int | None = None,
    nonfinite: str = "raise",
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    prefetch: int = 2,
) -> tuple[base.State, History]:
    """`run` for a stream whose rows live on the host, fetched ahead by a thread.

    Who takes part, which rows are drawn and every key are those of `run`, so on the
    same data the result is the same.

    Args:
      algorithm: an `Algorithm`.
      state: from `algorithm.init`.
      stream: a hosted stream, see `fedcl.streams.hosted`: its `stream` says on the
        device which rows, its `fetch(index, mask, context)` reads them.
      key: the run's key, ().
      rounds: as in `run`, like all further arguments.
      cohort: as in `run`.
      schedule: "vmap", "scan" or a chunk size.
      mesh: as in `run`.
      evaluate: as in `run`.
      every: as in `run`.
      nonfinite: as in `run`.
      checkpoint: as in `run`.
      resume: as in `run`.
      progress: as in `run`.
      prefetch: rounds to fetch ahead.

    Returns:
      The final state and the history.
    """
    _check_options(rounds, every, nonfinite)
    _check_population(state, stream, False)
    if mesh is not None and _hosts.several():
        raise ValueError(
            "fedcl.loop reads a cohort's rows in one process, and there are "
            f"{jax.process_count()}: run it in one, or a stream that fits on the "
            "devices with fedcl.run."
        )
    if algorithm.review is not None:
        raise ValueError(
            "This algorithm passes once more over every context that ends (its hook "
            "`review`), and a hosted stream offers no such pass: use a method that "
            "accumulates while it trains, such as ewc or mas, or a stream that fits on "
            "the device and fedcl.run."
        )
    every = _program.length_of(rounds, every)
    sampler = cohort or cohorts.everyone()
    _engine.check_mesh(mesh, stream.num_clients, sampler.shards)
    options = Options(rounds, every, nonfinite, checkpoint, resume, progress, False)
    stored = isinstance(state.clients, Store)
    if stored:
        _stored.check(algorithm, key, mesh, schedule)
    one_round = jax.jit(round_fn(algorithm, schedule=schedule, mesh=mesh))
    plan = jax.jit(partial(_plan, sampler))
    elsewhere: Any = ()
    seen = state._replace(clients=elsewhere) if stored else state
    first = _evaluation(_as_tree(evaluate), seen)

    def visits(t: int) -> tuple[base.Visit, cohorts.Cohort]:
        who, index, visit = plan(stream.stream, key, jnp.int32(t))
        batches = stream.fetch(*map(np.asarray, index))
        live = np.any(batches["mask"] > 0, axis=-1) if stream.ragged else None
        return visit._replace(batches=batches, live=live), who

    with ThreadPoolExecutor(1) as pool:
        ahead = _Ahead(pool, visits, rounds, prefetch)

        def feed(t: int):
            visit, who = ahead.take(t)
            return who, (), visit

        if stored:
            given, n = (lambda _, visit: visit), stream.num_clients
            step = _stored.one_round(algorithm, given, schedule, n)
            return _stored.run(step, feed, state, key, first, options)

        def segment(state, start, stop):
            told = []
            state = _engine.place(state, mesh)
            for t in range(start, stop):
                visit, who = ahead.take(t)
                state, metrics = one_round(state, visit, who.train, who.report)
                told.append(metrics)
            metrics = jax.tree.map(lambda *xs: np.stack(xs), *told)
            return state, metrics, first(state)

        return drive(segment, first, state, key, options)


def _plan(sampler: cohorts.Sampler, stream: Any, key: jax.Array, t: jax.Array):
    """The part of a round that needs no rows, with the keys of `phases.step`."""
    key = jax.random.fold_in(jax.random.fold_in(key, t), 0)
    k_cohort, k_clients = jax.random.split(key)
    who = sampler.draw(k_cohort, t, stream.num_clients)

    def one(client):
        k_data, k_visit = jax.random.split(jax.random.fold_in(k_clients, client))
        index = stream.indices(k_data, client, t)
        visit = base.Visit({}, stream.task(client, t), client, t, k_visit)
        return index, visit, stream.present(client, t)

    index, visit, present = jax.vmap(one)(who.client)
    return who._replace(train=who.train & present), index, visit


class _Ahead:
    """Fetches visits in order, a few rounds ahead."""

    def __init__(self, pool: ThreadPoolExecutor, fetch: Callable, stop: int, n: int):
        self._pool, self._fetch, self._stop, self._n = pool, fetch, stop, max(n, 1)
        self._ready: dict[int, Future] = {}

    def take(self, t: int) -> Any:
        for ahead in itertools.islice(self._rounds(t), self._n):
            if ahead not in self._ready:
                self._ready[ahead] = self._pool.submit(self._fetch, ahead)
        return self._ready.pop(t).result()

    def _rounds(self, t: int) -> Iterator[int]:
        return iter(range(t, self._stop))
