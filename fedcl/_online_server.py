"""The server: events in, reports out, and its books in between."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import _online_checks as checks
from fedcl import _online_desk as books
from fedcl import _online_events as events
from fedcl import base, rounds
from fedcl._host import History
from fedcl._online_core import Trained
from fedcl._online_drift import Detector
from fedcl._online_engine import Engine
from fedcl._online_staleness import Rule, discount, polynomial
from fedcl.checkpoint import Checkpoints

PyTree = Any
Fields = dict[str, Any]  # Of a `Report`.
UNKNOWN = float("nan")
NOTHING: Fields = {"outcome": "ok", "why": "", "staleness": -1, "loss": UNKNOWN}
NOTHING |= {"task": -1, "boundary": False, "evaluation": None}
FEDBUFF = discount(polynomial(0.5))  # One object, so that servers share programs.


class Server:
    """A long-lived federated server: `handle` one event, or `serve` many.

    Args:
      algorithm: any `fedcl.Algorithm` whose `aggregate` leaves θ as it is.
      state: from `algorithm.init`, whose clients are all that can ever join. It is
        copied, except for θ.
      buffer: B, messages to an aggregation; 1 aggregates each as it comes.
      key: the run's key. A client's draws are keyed by it, the stream's round, the
        client's id, and how often it came in that round; never by the order of arrival.
      stream: where simulated clients get their rows; None if all updates bring their
        rows or messages.
      example: without a stream, that of `algorithm.init`, from which the server learns
        what clients send and read. None: an update like φ, and they read φ.
      staleness: what a late message counts: `discount(polynomial(0.5))` (FedBuff) by
        default, `mixing()` (FedAsync) or `distance()` (AsyncFedED). These scale the
        update; where messages hold another kind, such as the means of `fedbpt` or the
        sums of `lorm`, only `discount(constant())` or a rule of your own goes.
      max_staleness: R, versions; older updates are dropped and counted.
      loss_fn: for prequential evaluation: each arrival's rows are tested with the
        served model before they train. None: they are not.
      detector: with `loss_fn`, says from each client's own rows when they drift; such
        as `page_hinkley()` or those of `fedcl.algorithms`. Boundaries are then the
        detector's and not the stream's: `visit.task` counts them, so that every
        client meets one at its next visit. None: the stream's tasks.
      quorum: clients that must have seen drift. Only clients that have trained since
        the last boundary count, so that a late return is not a new drift.
      rest: versions after a boundary in which no new one is declared.
      evaluate: `(state) -> dict of arrays`, as in `fedcl.run`.
      every: versions between evaluations.
      faults: what follows from a bad arrival, which never touches the state: "raise"
        `RefusedError`, or "drop" it, reported and counted.
      checkpoint: where to save, with `every` counted in events.
      resume: continue from the newest whole checkpoint, if there is one; the caller
        then feeds the events from `server.position` on.

    Attributes:
      message: the structure of a message, for real devices and for `load`.
      past: the history up to the checkpoint that was resumed, or None.

    Raises:
      ValueError: for arguments that do not fit each other, or the algorithm's messages.
      TypeError: if `aggregate` writes into θ.
      CheckpointError: for a checkpoint that does not belong here.

    When a method has the hook `review`, a client whose task is another one than at its
    last visit looks once more at all rows of that visit's round before it trains; at a
    detected boundary, all clients do that are there.

    Cost: memory for R + 1 versions of what clients read and aggregations change, φ
    above all, and B messages beside the clients; an update costs the client's visit,
    and with `loss_fn` one more forward pass over its rows.
    """

    def __init__(
        self,
        algorithm: base.Algorithm,
        state: base.State,
        *,
        buffer: int,
        key: jax.Array,
        stream: base.StreamLike | None = None,
        example: PyTree = None,
        staleness: Rule | None = None,
        max_staleness: int = 10,
        loss_fn: base.LossFn | None = None,
        detector: Detector | None = None,
        quorum: int = 1,
        rest: int = 0,
        evaluate: Callable[[base.State], PyTree] | None = None,
        every: int = 1,
        faults: str = "raise",
        checkpoint: Checkpoints | None = None,
        resume: bool = False,
    ):
        n = jax.tree.leaves(state.clients)[0].shape[0]
        positive = {"buffer": buffer, "quorum": quorum, "every": every}
        checks.options(algorithm, stream, n, positive, max_staleness, faults)
        if detector is not None and loss_fn is None:
            raise ValueError(
                "Server: detector= needs the loss it tests by: give loss_fn=."
            )
        rule = FEDBUFF if staleness is None else staleness
        what = (algorithm, state, stream, example, key, rule, loss_fn, detector)
        self._engine = Engine(*what, buffer, max_staleness + 1)
        self._key, self._buffer, self._faults = key, buffer, faults
        self._reviews, self._tests = algorithm.review is not None, loss_fn is not None
        self._detects, self._quorum, self._rest = detector is not None, quorum, rest
        self._evaluate, self._every = rounds._as_tree(evaluate), every
        self._desk = books.empty(n, max_staleness + 1)
        self.message = self._engine.message
        self._sizes = books.Sizes(*self._engine.travels)
        self._lock = threading.Lock()
        self._checkpoint = checkpoint
        self._unsaved: list[books.Report] = []
        self.past: History | None = None
        if checkpoint is not None:
            self._open(checkpoint, resume)
        self._publish()

    @property
    def params(self) -> base.Params:
        """φ as served, of one version, whatever other threads do."""
        return self._served.params

    @property
    def version(self) -> int:
        """Aggregations so far."""
        return self._served.version

    @property
    def position(self) -> int:
        """Events handled so far."""
        return self._desk.of("position")

    @property
    def task(self) -> int:
        """Boundaries detected so far, of which real devices should be told."""
        return self._desk.of("task")

    @property
    def totals(self) -> books.Totals:
        """What has happened so far."""
        return books.totals(self._desk, self._sizes)

    def snapshot(self) -> books.Snapshot:
        """What is served: a version and its parameters, which stay valid."""
        return self._served

    def state(self) -> base.State:
        """A copy of the federation as it is now; θ is not copied."""
        with self._lock:
            state = self._engine.state
            copied = state._replace(server=state.server._replace(frozen=None))
            copied = jax.tree.map(jnp.copy, copied)
        server = copied.server._replace(frozen=self._engine.frozen)
        return copied._replace(server=server)

    def evaluate(self) -> dict[str, np.ndarray]:
        """What `evaluate` gives now; {} if there is none."""
        with self._lock:
            return self._evaluated()

    def handle(self, event: events.Event) -> books.Report:
        """Handles one event; safe to call from several threads.

        Args:
          event: what happened.

        Returns:
          What came of it.

        Raises:
          RefusedError: for a bad arrival, if `faults` is "raise".
          TypeError: for what is not an event.
          RuntimeError: when an earlier event was cut off in the middle.
        """
        if type(event) not in events.KINDS.values():
            kinds = ", ".join(events.KINDS)
            raise TypeError(f"{event!r} is not an event; those are {kinds}.")
        with self._lock:
            if self._engine.torn:
                raise RuntimeError(
                    "An earlier event was cut off in the middle, and what it worked on "
                    "is lost: build the server again with resume=True."
                )
            self._engine.begin()
            report = self._reported(event, self._handled(event))
            if self._checkpoint is not None:
                self._unsaved.append(report)
                if self._checkpoint.due(report.position):
                    self._save()
        if self._faults == "raise" and report.outcome in books.FAULTS:
            raise books.RefusedError(report)
        return report

    def close(self) -> None:
        """Saves, if there is where to, and waits until everything is on disk."""
        with self._lock:
            if self._checkpoint is None:
                return
            if not self._engine.torn:
                self._save()
            self._checkpoint.close()

    def _handled(self, event: events.Event) -> Fields:
        """Does what the event asks for; the fields of its report."""
        try:
            match event:
                case events.Join():
                    return self._join(event)
                case events.Leave():
                    return self._leave(event)
                case events.Download():
                    return self._download(event)
                case events.Update():
                    return self._update(event)
                case events.Tick():
                    return self._tick(event)
        except checks.Refusal as e:
            return {"outcome": "refused", "why": str(e)}

    def _join(self, event: events.Join) -> Fields:
        client = checks.present(self._desk, event.client, "joins", joined=False)
        self._desk.joined[client] = True
        return self._sent_to(client, "joins")

    def _leave(self, event: events.Leave) -> Fields:
        client = checks.present(self._desk, event.client, "leaves")
        self._desk.joined[client] = self._desk.open[client] = False
        self._desk.add("leaves")
        return {}

    def _download(self, event: events.Download) -> Fields:
        client = checks.present(self._desk, event.client, "downloads")
        return self._sent_to(client, "downloads")

    def _sent_to(self, client: int, count: str) -> Fields:
        self._desk.held[client], self._desk.open[client] = self.version, True
        self._desk.add(count)
        return {}

    def _tick(self, event: events.Tick) -> Fields:
        flush = event.flush and self._desk.of("fill")
        fields = self._aggregated() if flush else {}
        self._desk.add("ticks")
        return fields

    def _update(self, event: events.Update) -> Fields:
        client = checks.present(self._desk, event.client, "sends an update")
        version = checks.base_version(self._desk, event, self.version)
        fields: Fields = {"staleness": self.version - version}
        message, visit, there = event.message, None, True
        if message is not None:
            message = checks.real_message(self.message, message, client)
        if self.version - version >= len(self._desk.ages):
            return fields | {"outcome": "stale"}
        if message is not None:
            loss = UNKNOWN if event.loss is None else float(event.loss)
            told = self._engine.deliver(message, client, version, self._desk.of("fill"))
            return fields | {"loss": loss} | self._taken(client, version, told, True)
        visit, there = self._drawn(event, client, version)
        if not there:
            return fields | {"outcome": "absent"}
        return fields | self._simulated(visit, client, version, not event.lost)

    def _drawn(
        self, event: events.Update, client: int, version: int
    ) -> tuple[base.Visit, bool]:
        """The visit, and whether the client has rows."""
        if event.visit is not None:
            return self._given(event.visit, client), True
        if not self._engine.draws:
            raise checks.Refusal(
                f"The update of client {client} brings neither a message nor a visit, "
                "and the server has no stream to draw rows from."
            )
        round = version if event.round is None else int(event.round)
        visit, there = self._engine.draw(client, round, self._again(client, round))
        return visit, bool(there)

    def _given(self, visit: base.Visit, client: int) -> base.Visit:
        """A visit that an update brings; the first says what all look like."""
        like = self._engine.visit or jax.eval_shape(lambda: visit)
        visit = checks.fitting(like, visit, f"client {client}'s visit")
        if int(visit.client) != client:
            raise checks.Refusal(
                f"The update of client {client} brings a visit of client "
                f"{int(visit.client)}: they must be the same."
            )
        return visit

    def _again(self, client: int, round: int) -> int:
        """How often the client has come in this round before."""
        same = self._desk.round[client] == round
        return int(self._desk.again[client]) + 1 if same else 0

    def _simulated(
        self, visit: base.Visit, client: int, version: int, heard: bool
    ) -> Fields:
        """Test, then train: the client runs from the version that it downloaded."""
        fields: Fields = {"boundary": False}
        if self._tests:
            fields["loss"], fired = self._engine.test(visit)
            fields["boundary"] = self._voted(client, fired)
        if self._detects:
            visit = visit._replace(task=jnp.int32(self.task))
        fields["task"] = int(visit.task)
        if self._reviews:
            self._review(client, fields["task"], fields["boundary"])
        told = self._engine.train(visit, version, self._desk.of("fill"), heard)
        self._engine.visit = self._engine.visit or jax.eval_shape(lambda: visit)
        if told.finite:
            round = int(visit.round)
            self._desk.again[client] = self._again(client, round)
            self._desk.round[client], self._desk.task[client] = round, fields["task"]
        return fields | self._taken(client, version, told, heard)

    def _voted(self, client: int, fired: bool) -> bool:
        """Counts a client's word; whether the federation declares a boundary."""
        desk = self._desk
        resting = self.task > 0 and self.version < desk.of("boundary_at") + self._rest
        if fired and desk.task[client] == self.task and not resting:
            desk.vote[client] = True
        if np.sum(desk.vote) < self._quorum:
            return False
        desk.vote[:] = False
        desk.add("task")
        desk.put("boundary_at", self.version)
        return True

    def _review(self, client: int, task: int, boundary: bool) -> None:
        """Clients whose context has ended look at it once more."""
        desk = self._desk
        due = desk.joined & (desk.task >= 0)
        if not self._detects:
            due &= (np.arange(len(due)) == client) & (desk.task != task)
        elif not boundary:
            return
        for c in np.flatnonzero(due):
            self._engine.review(int(c), int(desk.round[c]), int(desk.task[c]))

    def _taken(self, client: int, version: int, told: Trained, heard: bool) -> Fields:
        """Counts an update that was run or delivered, and aggregates a full buffer."""
        fields: Fields = {"metrics": books.numbers(told.metrics)}
        if not told.finite:
            why = (
                f"The update of client {client}, from version {version}, holds NaN or "
                "Inf. It was left out, and the client's state kept."
            )
            return fields | {"outcome": "nonfinite", "why": why}
        desk = self._desk
        desk.open[client] = False
        if not told.reported:
            return fields | {"outcome": "empty" if heard else "lost"}
        desk.sent[client] = max(version, int(desk.sent[client]))
        desk.ages[self.version - version] += 1
        desk.add("fill")
        desk.add("accepted")
        full = desk.of("fill") == self._buffer
        return {"outcome": "accepted"} | fields | (self._aggregated() if full else {})

    def _aggregated(self) -> Fields:
        """A server step over what is in the buffer, which is then empty."""
        whole = self._engine.aggregate(self._desk.of("fill"))
        self._desk.put("fill", 0)
        if not whole:
            why = (
                f"The aggregation after version {self.version} was not finite: the "
                "server stays as it was, and the buffer's messages are gone."
            )
            return {"outcome": "diverged", "why": why}
        self._publish()
        due = self._evaluate is not None and self.version % self._every == 0
        return {"evaluation": self._evaluated()} if due else {}

    def _reported(self, event: events.Event, fields: Fields) -> books.Report:
        desk = self._desk
        fields = {**NOTHING, "metrics": {}, **fields}
        if fields["outcome"] not in ("ok", "accepted"):
            desk.add(fields["outcome"])
        desk.add("position")
        desk.times[1] = event.time
        if np.isnan(desk.times[0]):
            desk.times[0] = event.time
        return books.Report(
            position=self.position,
            event=type(event).__name__,
            client=books.id_of(event),
            time=event.time,
            version=self.version,
            fill=desk.of("fill"),
            totals=self.totals,
            **fields,
        )

    def _publish(self) -> None:
        server = self._engine.core.server
        version = int(server.version)
        self._served = books.Snapshot(version, server.params, self._engine.frozen)

    def _evaluated(self) -> dict[str, np.ndarray]:
        state = self._engine.state
        told = rounds._evaluated(state, (), self._evaluate, seeded=False)
        return jax.tree.map(np.asarray, told)

    def _whole(self) -> Any:
        """What a checkpoint holds: everything but θ, which it knows again."""
        return {"core": self._engine.core, "desk": books.packed(self._desk)}

    def _save(self) -> None:
        assert self._checkpoint is not None
        if not self._unsaved:
            return
        fresh = books.columns(self._unsaved, self._engine.metrics)
        self._unsaved = []
        self._checkpoint.record(self.position, fresh)
        self._checkpoint.save(self.position, self._whole(), self._key, force=True)

    def _open(self, checkpoint: Checkpoints, resume: bool) -> None:
        frozen = self._engine.frozen
        saved = checkpoint.open(self._whole(), self._key, resume=resume, frozen=frozen)
        if saved is None:
            return
        there: Any = saved.state
        self._engine.core = there["core"]
        self._desk = books.unpacked(there["desk"])
        self.past = History(saved.rounds, saved.evaluations, saved.at)
