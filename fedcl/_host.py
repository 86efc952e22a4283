"""The host's part of a run: segments, faults, history, checkpoints, progress."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedcl import _frozen, _hosts, base
from fedcl.checkpoint import Checkpoints, Interrupt

PyTree = Any


class History(NamedTuple):
    """What a run recorded. With seeds, every array has the seed axis first."""

    rounds: dict[str, np.ndarray]  # [T, ...], and [T, C] for what each client did.
    evaluations: dict[str, np.ndarray]  # [E, ...]
    at: np.ndarray  # [E] rounds done at each evaluation.


class Progress(NamedTuple):
    """What a progress callback is told after each segment."""

    done: int
    rounds: int
    metrics: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray]


class FaultError(RuntimeError):
    """A client misbehaved; carries the state and history up to that point.

    Attributes:
      state: the federation after the segment in which it happened; the client's
        message was left out of every aggregation.
      history: what was recorded, that segment included.
    """

    def __init__(self, message: str, state: base.State, history: History):
        super().__init__(message)
        self.state = state
        self.history = history


class Options(NamedTuple):
    """How to drive a run; `still` marks the leaves of θ that no round changes."""

    rounds: int
    every: int
    nonfinite: str
    checkpoint: Checkpoints | None
    resume: bool
    progress: Callable[[Progress], None] | None
    seeded: bool
    still: PyTree = None


def drive(
    segment: Callable,
    first: Callable[[base.State], dict],
    state: base.State,
    key: jax.Array,
    o: Options,
) -> tuple[base.State, History]:
    """Runs segments until all rounds are done.

    Args:
      segment: `(state, start, stop) -> (state, metrics, evaluation)`.
      first: `(state) -> evaluation`, before round 0.
      state: the federation at round 0.
      key: the run's key.
      o: the run's options.

    Returns:
      The final state and the history.
    """
    axis, done, saved = int(o.seeded), 0, None
    held = None if o.still is None else _frozen.held(state, o.still)
    own = lambda s: s if held is None else _frozen.without(s, held)
    if o.checkpoint is not None:
        saved = o.checkpoint.open(own(state), key, resume=o.resume, frozen=held)
    if saved is not None:
        done, state = saved.round, saved.state
        state = state if held is None else _frozen.together(state, held)
        pieces = [History(saved.rounds, saved.evaluations, saved.at)]
    else:
        pieces = [_initial(first(state), axis)]
        if o.checkpoint is not None:
            o.checkpoint.record(done, pieces[0])
    try:
        with Interrupt(o.checkpoint is not None) as interrupt:
            while done < o.rounds:
                start, done = done, min(done + o.every, o.rounds)
                state, metrics, evaluation = segment(state, start, done)
                fresh = _fresh(metrics, evaluation, done, done - start, axis)
                pieces.append(fresh)
                _tell(o, done, fresh, axis)
                asked = o.checkpoint is not None and _hosts.anyone(interrupt.requested)
                stopping = asked and done < o.rounds
                if o.checkpoint is not None:
                    o.checkpoint.record(done, fresh)
                    last = stopping or done == o.rounds
                    o.checkpoint.save(done, own(state), key, force=last)
                fault = _fault(fresh, done, o)
                if fault:
                    raise FaultError(fault, state, _joined(pieces, axis))
                if stopping:
                    assert o.checkpoint is not None
                    raise interrupt.error(done, o.rounds, o.checkpoint.directory)
    finally:
        if o.checkpoint is not None:
            o.checkpoint.close()
    return state, _joined(pieces, axis)


def _tell(o: Options, done: int, fresh: History, axis: int) -> None:
    if o.progress is None:
        return
    last = lambda columns: {k: np.take(v, -1, axis=axis) for k, v in columns.items()}
    told = Progress(done, o.rounds, last(fresh.rounds), last(fresh.evaluations))
    o.progress(told)


def _initial(evaluation: dict, axis: int) -> History:
    seen = {k: np.expand_dims(_hosts.to_host(v), axis) for k, v in evaluation.items()}
    return History({}, seen, np.zeros(1 if seen else 0, np.int64))


def _fresh(metrics: dict, evaluation: dict, at: int, n: int, axis: int) -> History:
    told = {k: _hosts.to_host(v) for k, v in metrics.items()}
    told = {k: v[:, :n] if axis else v[:n] for k, v in told.items()}
    seen = _initial(evaluation, axis)
    return History(told, seen.evaluations, np.full(len(seen.at), at, np.int64))


def _joined(pieces: list[History], axis: int) -> History:
    def join(columns: list[dict]) -> dict:
        told = [c for c in columns if c]
        names = told[0] if told else {}
        return {k: np.concatenate([c[k] for c in told], axis=axis) for k in names}

    return History(
        join([p.rounds for p in pieces]),
        join([p.evaluations for p in pieces]),
        np.concatenate([p.at for p in pieces]),
    )


def _fault(fresh: History, done: int, o: Options) -> str:
    """The first non-finite message or impossible cohort of a segment, or ""."""
    kinds = {
        "fault": "is listed twice in the cohort, or is not in the population: draw "
        "distinct ids from 0 to N − 1",
        "nonfinite": "sent NaN or Inf. Its message was left out and its state kept. "
        'Lower the learning rate, clip, or pass nonfinite="drop" to go on without it',
    }
    if o.nonfinite == "drop":
        del kinds["nonfinite"]
    for name, flags in fresh.rounds.items():
        kind = name.rsplit("/", 1)[-1]
        if kind not in kinds or not flags.any():
            continue
        where = tuple(np.argwhere(flags)[0])
        t = done - flags.shape[int(o.seeded)] + int(where[-2])
        client = int(fresh.rounds[name.replace(kind, "client")][where])
        seed = f" (seed {int(where[0])})" if o.seeded else ""
        return f"Round {t}{seed}: client {client} {kinds[kind]}."
    return ""
