"""Cells: which rows each client holds in each context, and who is where when."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from fedcl.streams import _checks
from fedcl.streams._partitions import Partition
from fedcl.streams._schedules import Schedule
from fedcl.streams._stream import Stream


class Cells(NamedTuple):
    """Which rows each client holds in each context, see `Stream`."""

    rows: np.ndarray  # [R] int32
    start: np.ndarray  # [K, N] int32
    size: np.ndarray  # [K, N] int32
    edges: np.ndarray | None  # [K, N, Y + 1] int32


def cells_of(
    table: _checks.Columns,
    owners: np.ndarray,
    schedule: Schedule,
    contexts: ArrayLike | None,
    partition: Partition,
    prior: np.ndarray | None,
    seed: int,
) -> Cells:
    count, clients = schedule.num_contexts, schedule.num_clients
    groups = groups_of(table, contexts, count)
    dealt = [
        _deal(partition, np.random.default_rng([seed, k]), owners[rows], clients)
        for k, rows in enumerate(groups)
    ]
    size = np.stack([np.bincount(d, minlength=clients) for d in dealt])
    start = np.cumsum(size.ravel()).reshape(size.shape) - size
    edges, within = None, np.zeros(len(owners), np.int32)
    if prior is not None:
        within = _checks.labels(_checks.column(table, "y"), prior.shape[-1])
        edges = _edges(
            [within[rows] for rows in groups], dealt, prior.shape[-1], clients
        )
        edges = np.broadcast_to(edges, (count, *edges.shape[1:]))
    orders = [np.lexsort((within[r], d)) for r, d in zip(groups, dealt, strict=True)]
    rows = np.concatenate([r[o] for r, o in zip(groups, orders, strict=True)])
    start, size = (np.broadcast_to(a, (count, clients)) for a in (start, size))
    return Cells(_int(rows), _int(start), _int(size), edges)


def _int(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.int32)


def groups_of(
    table: _checks.Columns, contexts: ArrayLike | None, count: int
) -> list[np.ndarray]:
    """The rows of each context; one group that all share when `contexts` is None."""
    rows = len(next(iter(table.values())))
    if contexts is None:
        return [np.arange(rows)]
    given = np.asarray(contexts)
    if given.shape != (rows,) or given.dtype.kind not in "iu":
        raise ValueError(
            f"contexts must be one integer per row, [{rows}], got shape {given.shape} "
            f"and dtype {given.dtype}"
        )
    if given.min() < 0 or given.max() >= count:
        raise ValueError(
            f"contexts must be in 0 .. {count - 1}, the schedule has {count}; got "
            f"{given.min()} .. {given.max()}"
        )
    return [np.flatnonzero(given == k) for k in range(count)]


def _deal(
    partition: Partition, rng: np.random.Generator, owners: np.ndarray, clients: int
) -> np.ndarray:
    if not len(owners):
        return np.zeros(0, np.int64)
    dealt = np.asarray(partition.assign(rng, owners, clients))
    if dealt.shape != owners.shape or dealt.min() < 0 or dealt.max() >= clients:
        raise ValueError(
            f"partition {partition.spec} must return a client in 0 .. {clients - 1} "
            f"for each of {len(owners)} rows, got shape {dealt.shape}, values "
            f"{dealt.min()} .. {dealt.max()}"
        )
    return dealt


def _edges(
    labels: list[np.ndarray], dealt: list[np.ndarray], classes: int, clients: int
) -> np.ndarray:
    counts = np.zeros((len(labels), clients, classes + 1), np.int32)
    for k, (y, d) in enumerate(zip(labels, dealt, strict=True)):
        np.add.at(counts[k], (d, y + 1), 1)
    return np.cumsum(counts, axis=-1, dtype=np.int32)


def rescheduled(stream: Stream, schedule: Schedule, prior: ArrayLike | None) -> Stream:
    """The same rows on the same clients, at other times."""
    edges = None if stream.edges is None else np.asarray(stream.edges)
    rows, start, size = (
        np.asarray(a) for a in (stream.rows, stream.start, stream.size)
    )
    prior = None if prior is None else np.asarray(prior)
    return dataclasses.replace(
        stream, **arrays_of(Cells(rows, start, size, edges), schedule, prior)
    )


def arrays_of(
    cells: Cells, schedule: Schedule, prior: np.ndarray | None
) -> dict[str, Any]:
    """The fields of a `Stream` that say who draws what, and when."""
    tasks, final = _tasks(cells, schedule, prior)
    return {
        **{
            k: None if v is None else jnp.asarray(v) for k, v in cells._asdict().items()
        },
        "table": jnp.asarray(schedule.table, jnp.float32),
        "clock": jnp.asarray(schedule.clock, jnp.int32),
        "tasks": jnp.asarray(tasks, jnp.int32),
        "final": jnp.asarray(final),
        "prior": None if prior is None else jnp.asarray(prior),
    }


def _tasks(
    cells: Cells, schedule: Schedule, prior: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The dominant context and whether it ends, [T, N]: `Stream.tasks`, `final`."""
    rounds, clients = schedule.clock.shape
    tasks = np.zeros((rounds, clients), np.int32)
    there, final = np.zeros((2, rounds, clients), bool)
    for t, clock in enumerate(schedule.clock):
        weights = np.where(_held(cells, prior, t), schedule.table[clock], 0)
        there[t] = (weights > 0).any(axis=1)
        tasks[t] = np.where(there[t], weights.argmax(axis=1), tasks[max(t - 1, 0)])
    later = np.full(clients, -1, np.int32)
    for t in reversed(range(rounds)):
        final[t] = there[t] & (later != tasks[t])
        later = np.where(there[t], tasks[t], later)
    # Before a client joins, it is in its first context already: no boundary there.
    waiting = ~np.maximum.accumulate(there, axis=0)
    return np.where(waiting, np.maximum(later, 0)[None, :], tasks), final


def _held(cells: Cells, prior: np.ndarray | None, t: int) -> np.ndarray:
    """Whether client n can draw anything from context k, [N, K] bool."""
    if prior is None or cells.edges is None:
        return (cells.size > 0).T
    wanted = prior[min(t, len(prior) - 1)] > 0
    return ((np.diff(cells.edges) > 0) & wanted[None]).any(axis=-1).T
