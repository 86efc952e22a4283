"""Streams and schedules from others: later, blended, one after the other."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from fedcl.streams._cells import Cells, arrays_of, rescheduled
from fedcl.streams._schedules import Schedule
from fedcl.streams._stream import Batch, PyTree, Stream, Transform

S = TypeVar("S", Schedule, Stream)


def lagged(source: S, lag: ArrayLike) -> S:
    """Client n is `lag[n]` rounds behind: pi'[t, n] = pi[max(t - lag[n], 0), n].

    Args:
      source: a schedule or a stream.
      lag: [N] whole rounds, less than T each: a client further behind would never
        leave its first round.

    >>> from fedcl import streams
    >>> streams.lagged(streams.abrupt(2, 2, 2), [0, 1]).clock.T.tolist()
    [[0, 0, 1, 1], [0, 0, 0, 1]]
    """
    schedule = _schedule(source)
    rounds, clients = schedule.clock.shape
    late = np.asarray(lag)
    if late.shape != (clients,) or late.dtype.kind not in "iu":
        raise ValueError(
            f"lag must be one whole number of rounds per client, [{clients}], got "
            f"shape {late.shape} and dtype {late.dtype}"
        )
    if late.min() < 0 or late.max() >= rounds:
        raise ValueError(
            f"lag must be in 0 .. {rounds - 1}: the schedule is {rounds} rounds long; "
            f"got {late.min()} .. {late.max()}"
        )
    then = np.maximum(np.arange(rounds)[:, None] - late[None, :], 0)
    everyone = np.arange(clients)[None, :]
    shifted = Schedule(schedule.table, schedule.clock[then, everyone])
    if isinstance(source, Schedule):
        return shifted
    prior = None if source.prior is None else np.asarray(source.prior)
    if prior is not None and len(prior) > 1:
        prior = np.broadcast_to(prior, (rounds, clients, prior.shape[2]))
        prior = prior[then, everyone]
    return rescheduled(source, shifted, prior)


def mixed(first: S, second: S, weight: float) -> S:
    """A blend: (1 - weight) of the first and `weight` of the second, at every round.

    Two schedules share their contexts; two streams keep theirs apart: the second's
    contexts come after the first's, K1 + K2 in all. Where one is absent, the other is
    drawn from alone.

    Args:
      first: a schedule or a stream.
      second: of the same kind, rounds and clients.
      weight: in [0, 1].

    >>> from fedcl import streams
    >>> one, two = streams.abrupt(2, 1, 1), streams.Schedule.of([[[0, 1]]] * 2)
    >>> streams.mixed(one, two, 0.25).pi()[0, 0].tolist()
    [0.75, 0.25]
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if isinstance(first, Schedule) and isinstance(second, Schedule):
        return _blend(first, second, weight)
    assert isinstance(first, Stream) and isinstance(second, Stream)
    a, b = _apart(first, second)
    return _union(first, second, _blend(a, b, weight))


def concatenated(first: S, second: S) -> S:
    """The second after the first.

    Two schedules share their contexts; two streams keep theirs apart, see `mixed`.
    Rows, clients, shapes and the way of drawing must agree.

    >>> from fedcl import streams
    >>> one = streams.abrupt(2, 1, 1)
    >>> streams.concatenated(one, one).pi()[:, 0, 0].tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    if isinstance(first, Schedule) and isinstance(second, Schedule):
        return _after(first, second)
    assert isinstance(first, Stream) and isinstance(second, Stream)
    return _union(first, second, _after(*_apart(first, second)))


def _schedule(source: Schedule | Stream) -> Schedule:
    return Schedule(np.asarray(source.table), np.asarray(source.clock))


def _same(what: str, first: object, second: object) -> None:
    if first != second:
        raise ValueError(f"both must have the same {what}, got {first} and {second}")


def _blend(a: Schedule, b: Schedule, weight: float) -> Schedule:
    _same("rounds and clients", a.clock.shape, b.clock.shape)
    _same("number of contexts", a.num_contexts, b.num_contexts)
    codes = a.clock.astype(np.int64) * len(b.table) + b.clock
    pairs, clock = np.unique(codes, return_inverse=True)
    one, two = np.divmod(pairs, len(b.table))
    table = (1 - weight) * a.table[one] + weight * b.table[two]
    total = table.sum(axis=1, keepdims=True)
    table = np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    clock = clock.reshape(a.clock.shape).astype(np.int32)
    return Schedule(table.astype(np.float32), clock)


def _after(a: Schedule, b: Schedule) -> Schedule:
    _same("number of clients", a.num_clients, b.num_clients)
    _same("number of contexts", a.num_contexts, b.num_contexts)
    table = np.concatenate([a.table, b.table])
    return Schedule(table, np.concatenate([a.clock, b.clock + len(a.table)]))


def _apart(first: Stream, second: Stream) -> tuple[Schedule, Schedule]:
    """Both schedules over the contexts of both."""
    a, b = _schedule(first), _schedule(second)
    after, before = ((0, 0), (0, b.num_contexts)), ((0, 0), (a.num_contexts, 0))
    return a._replace(table=np.pad(a.table, after)), b._replace(
        table=np.pad(b.table, before)
    )


def _union(first: Stream, second: Stream, schedule: Schedule) -> Stream:
    for name in ("num_clients", "batch_size", "draw", "epochs", "hidden"):
        _same(name, getattr(first, name), getattr(second, name))
    if first.draw == "replacement":
        _same("steps", first.steps, second.steps)
    _same("columns", _columns(first), _columns(second))
    if first.prior is not None or second.prior is not None:
        raise ValueError("streams with a label prior cannot be joined")
    heads = [None if s.head is None else s.head.shape[1] for s in (first, second)]
    _same("classes in head", *heads)
    head = None
    if first.head is not None and second.head is not None:
        head = jnp.concatenate([first.head, second.head])
    moved = len(next(iter(first.data.values())))
    cells = Cells(
        np.concatenate([first.rows, np.asarray(second.rows) + moved]),
        np.concatenate([first.start, np.asarray(second.start) + len(first.rows)]),
        np.concatenate([first.size, second.size]),
        None,
    )
    longest = first if first.capacity >= second.capacity else second
    plain = first.transform is None and second.transform is None
    joined = _Joined(first.transform, second.transform, first.num_contexts)
    return dataclasses.replace(
        longest,
        **arrays_of(cells, schedule, None),
        data=jax.tree.map(lambda *c: jnp.concatenate(c), first.data, second.data),
        head=head,
        tables=(first.tables, second.tables),
        transform=None if plain else joined,
    )


def _columns(stream: Stream) -> dict[str, tuple]:
    return {k: (v.shape[1:], v.dtype.name) for k, v in sorted(stream.data.items())}


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The first's transform for the first `contexts` contexts, then the second's."""

    first: Transform | None
    second: Transform | None
    contexts: int

    def __call__(self, tables: PyTree, context: Array, batch: Batch) -> Batch:
        keep = lambda tables, context, batch: batch
        first, second = self.first or keep, self.second or keep
        return jax.lax.cond(
            context < self.contexts,
            lambda: first(tables[0], context, batch),
            lambda: second(tables[1], context - self.contexts, batch),
        )
