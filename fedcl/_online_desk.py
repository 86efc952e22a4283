"""The books that an online server keeps on the host, and what it reports."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedcl import base
from fedcl._host import History
from fedcl._online_events import KINDS

EVENTS = tuple(KINDS)
OUTCOMES = (
    "ok",  # Of an event that is no update.
    "accepted",
    "stale",  # Older than `max_staleness` versions.
    "absent",  # The stream has no rows for the client in that round.
    "empty",  # Weight 0.
    "lost",
    "refused",
    "nonfinite",
    "diverged",  # Accepted, but the aggregation was not finite, and was undone.
)
FAULTS = ("refused", "nonfinite", "diverged")
COUNTS = (
    *("position", "fill", "task", "boundary_at"),
    *("joins", "leaves", "downloads", "ticks"),
    *OUTCOMES[1:],
)


class Desk(NamedTuple):
    """What the host knows of each client, and what it counts. The server writes it."""

    joined: np.ndarray  # [N] bool
    held: np.ndarray  # [N] int32, the version last downloaded; -1: none.
    open: np.ndarray  # [N] bool: downloaded, and no update accepted since.
    sent: np.ndarray  # [N] int32, the base of the last update accepted; -1: none.
    round: np.ndarray  # [N] int32, the stream's round of the last visit; -1: none.
    again: np.ndarray  # [N] int32, visits before the last one in that round.
    task: np.ndarray  # [N] int32, the task of the last visit; -1: none.
    vote: np.ndarray  # [N] bool: drift was seen at the client.
    ages: np.ndarray  # [R + 1] int32, accepted updates by staleness.
    counts: np.ndarray  # [len(COUNTS)] int32
    times: np.ndarray  # [2] float64, of the first and the last event.

    def of(self, name: str) -> int:
        """A count."""
        return int(self.counts[COUNTS.index(name)])

    def put(self, name: str, value: int) -> None:
        """Sets a count."""
        self.counts[COUNTS.index(name)] = value

    def add(self, name: str) -> None:
        """Counts one more."""
        self.counts[COUNTS.index(name)] += 1


def empty(n: int, versions: int) -> Desk:
    """Nobody is there and nothing has happened."""
    no, never = np.zeros(n, bool), np.full(n, -1, np.int32)
    return Desk(
        joined=no,
        held=never,
        open=no.copy(),
        sent=never.copy(),
        round=never.copy(),
        again=np.zeros(n, np.int32),
        task=never.copy(),
        vote=no.copy(),
        ages=np.zeros(versions, np.int32),
        counts=np.zeros(len(COUNTS), np.int32),
        times=np.full(2, np.nan),
    )


def packed(desk: Desk) -> dict[str, Any]:
    """The desk as arrays of a checkpoint; times keep all their bits."""
    fields = desk._asdict() | {"times": desk.times.view(np.int32)}
    return {name: jnp.array(x) for name, x in fields.items()}


def unpacked(arrays: dict[str, Any]) -> Desk:
    """The reverse of `packed`."""
    fields = {name: np.array(x) for name, x in arrays.items()}
    return Desk(**fields | {"times": fields["times"].view(np.float64)})


class Sizes(NamedTuple):
    """Bytes of what travels, as stored."""

    up: int  # A message.
    down: int  # What clients read and aggregations change, φ above all.
    once: int  # θ and what else stays as it is, at a join.


class Totals(NamedTuple):
    """What has happened since the server began."""

    joins: int
    leaves: int
    downloads: int
    accepted: int
    stale: int
    absent: int
    empty: int
    lost: int
    refused: int
    nonfinite: int
    diverged: int
    boundaries: int
    up_bytes: int
    down_bytes: int
    ages: tuple[int, ...]  # Accepted updates by staleness, 0 to `max_staleness`.
    rate: float  # Accepted updates per second of the events' own time.


class Report(NamedTuple):
    """What one event did.

    Attributes:
      position: events handled so far, this one included.
      event: "Join", "Leave", "Download", "Update" or "Tick".
      client: its id; -1 for a tick.
      time: the event's.
      outcome: "ok" or, of an update, "accepted", "stale", "absent", "empty" (weight
        0), "lost", "refused", "nonfinite" or "diverged" (the aggregation that it
        completed was not finite, and was undone).
      why: what was wrong, for those that are faults.
      version: of the server, after the event.
      staleness: versions between the update's base and the server; -1 if it has none.
      loss: of the served model on the update's rows, before training; NaN if unknown.
      metrics: what `client_update` told.
      fill: messages in the buffer.
      task: boundaries seen, or the stream's task of this update; -1 if it has none.
      boundary: whether drift was declared with this event.
      evaluation: what `evaluate` gave, when it was due.
      totals: what has happened so far.
    """

    position: int
    event: str
    client: int
    time: float
    outcome: str
    why: str
    version: int
    staleness: int
    loss: float
    metrics: dict[str, float]
    fill: int
    task: int
    boundary: bool
    evaluation: dict[str, np.ndarray] | None
    totals: Totals


class Snapshot(NamedTuple):
    """What is served."""

    version: int
    params: base.Params  # φ
    frozen: base.Params  # θ, None if everything is trained.


class RefusedError(ValueError):
    """An arrival that a server with `faults="raise"` did not take.

    Attributes:
      report: of the event. It is counted, the state is as before, and the server can
        go on with the next one.
    """

    def __init__(self, report: Report):
        super().__init__(report.why)
        self.report = report


def totals(desk: Desk, sizes: Sizes) -> Totals:
    """The sums of the books."""
    copied = ("joins", "leaves", "downloads", *OUTCOMES[1:])
    arrived = sum(desk.of(name) for name in ("accepted", "stale", "empty", "nonfinite"))
    down = sizes.down * (desk.of("downloads") + desk.of("joins"))
    seconds = float(desk.times[1] - desk.times[0])
    return Totals(
        **{name: desk.of(name) for name in copied},
        boundaries=desk.of("task"),
        up_bytes=sizes.up * arrived,
        down_bytes=down + sizes.once * desk.of("joins"),
        ages=tuple(desk.ages.tolist()),
        rate=desk.of("accepted") / seconds if seconds > 0 else float("nan"),
    )


def collect(reports: Iterable[Report]) -> History:
    """Reports as columns, like the history of a run.

    Args:
      reports: finitely many.

    Returns:
      A `History`: `rounds` has a row per event, with "event" and "outcome" as numbers
      in the order of `online.EVENTS` and `online.OUTCOMES`, and `metrics` NaN where an
      event has none; `evaluations` are at the versions `at`.
    """
    rows = list(reports)
    names = sorted({name for r in rows for name in r.metrics})
    return columns(rows, names)


def columns(rows: list[Report], names: list[str]) -> History:
    """`collect`, with these metrics."""
    of = lambda f, kind: np.array([f(r) for r in rows], kind)
    plain: dict[str, Any] = {
        "position": np.int64,
        "client": np.int32,
        "time": np.float64,
    }
    plain |= {"version": np.int32, "staleness": np.int32, "loss": np.float32}
    plain |= {"fill": np.int32, "task": np.int32, "boundary": np.bool_}
    told = {name: of(lambda r, n=name: getattr(r, n), k) for name, k in plain.items()}
    told["event"] = of(lambda r: EVENTS.index(r.event), np.int8)
    told["outcome"] = of(lambda r: OUTCOMES.index(r.outcome), np.int8)
    for name in names:
        value = lambda r, n=name: r.metrics.get(n, np.nan)
        told[f"metrics/{name}"] = of(value, np.float32)
    seen = [(r.version, r.evaluation) for r in rows if r.evaluation is not None]
    keys = seen[0][1] if seen else {}
    evaluations = {k: np.stack([e[k] for _, e in seen]) for k in keys}
    return History(told, evaluations, np.array([v for v, _ in seen], np.int64))


def numbers(metrics: Any) -> dict[str, float]:
    """The metrics that are numbers."""
    if not isinstance(metrics, dict):
        return {}
    return {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}


def id_of(event: Any) -> int:
    """The client of an event as far as it has one; -1 for none, or for nonsense."""
    client = getattr(event, "client", -1)
    return int(client) if isinstance(client, int | np.integer) else -1
