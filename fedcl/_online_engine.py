"""An online server's hold on the device: what each event does to the core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedcl import _online_checks as checks
from fedcl import _online_core as programs
from fedcl import _traffic, base, tree
from fedcl._online_drift import Detector
from fedcl._online_staleness import Rule

PyTree = Any


class Shapes(NamedTuple):
    """What the programs work on, as far as it is known before anything arrives."""

    visit: base.Visit | None
    message: base.Message
    rest: PyTree  # See `_online_core.Sent`.
    metrics: list[str]
    travels: _traffic.Communication


class Engine:
    """The core, and the programs that change it.

    They are given its arrays, so one that is cut off leaves nothing to go on with:
    `torn` says so. One that fails before it takes them, and before the event has
    changed anything else, leaves all as it was.
    """

    def __init__(
        self,
        algorithm: base.Algorithm,
        state: base.State,
        stream: Any,
        example: PyTree,
        key: jax.Array,
        rule: Rule,
        loss_fn: base.LossFn | None,
        detector: Detector | None,
        buffer: int,
        versions: int,
    ):
        self._algorithm, self._stream, self._key = algorithm, stream, key
        self._rule, self._loss_fn, self._detector = rule, loss_fn, detector
        self.frozen = state.server.frozen
        known = _shapes(algorithm, state, stream, example, key)
        self.visit, self.message = known.visit, known.message
        self.metrics, self.travels = known.metrics, known.travels
        checks.scaled(rule, known.message, state.server.params)
        what = (state, known.message, known.rest, buffer, versions, detector)
        self.core = programs.start(*what)
        self.torn = self._changed = False
        if stream is None and example is None:
            checks.like_params(algorithm, self.state.server, self.core.buffer)
        jax.eval_shape(*self._aggregation(0))

    @property
    def draws(self) -> bool:
        """Whether there is a stream to draw rows from."""
        return self._stream is not None

    @property
    def state(self) -> base.State:
        """The federation, in arrays that the next event takes away."""
        server = self.core.server._replace(frozen=self.frozen)
        return base.State(server, self.core.clients)

    def begin(self) -> None:
        """Another event: so far it has changed nothing."""
        self._changed = False

    def draw(self, client: int, round: int, again: int) -> tuple[base.Visit, jax.Array]:
        """A client's visit from the stream, and whether there are rows."""
        which = map(jnp.int32, (client, round, again))
        return programs.draw(self._stream, self._key, *which)

    def test(self, visit: base.Visit) -> tuple[float, bool]:
        """The served model's loss on a visit, and whether drift was seen."""
        with self._changing():
            detectors, loss, fired = programs.watch(
                self.core.server,
                self.core.detectors,
                self.frozen,
                visit,
                loss_fn=self._loss_fn,
                detector=self._detector,
            )
            self.core = self.core._replace(detectors=detectors)
        return float(loss), bool(fired)

    def review(self, client: int, round: int, task: int) -> None:
        """A client looks once more at all rows of a round."""
        with self._changing():
            clients = programs.review(
                self.core.clients,
                self.core.server,
                self.frozen,
                self._stream,
                self._key,
                *map(jnp.int32, (client, round, task)),
                algorithm=self._algorithm,
            )
            self.core = self.core._replace(clients=clients)

    def train(
        self, visit: base.Visit, version: int, place: int, heard: bool
    ) -> programs.Trained:
        """A client trains from a version; its message goes to a place in the buffer."""
        args = (self.frozen, visit, jnp.int32(version), jnp.int32(place))
        static = {"algorithm": self._algorithm, "rule": self._rule}
        return self._updated(programs.train, *args, jnp.array(heard), **static)

    def deliver(
        self, message: base.Message, client: int, version: int, place: int
    ) -> programs.Trained:
        """A real device's message goes to a place in the buffer."""
        args = map(jnp.int32, (client, version, place))
        return self._updated(programs.deliver, message, *args, rule=self._rule)

    def aggregate(self, fill: int) -> bool:
        """A server step over the buffer; False if it was not finite, and undone."""
        with self._changing():
            program, *args = self._aggregation(fill)
            server, ring, whole = program(*args)
            self.core = self.core._replace(server=server, ring=ring)
        return bool(whole)

    def _aggregation(self, fill: int) -> tuple[Any, ...]:
        """The program of a server step, and its arguments."""
        program = partial(programs.aggregate, algorithm=self._algorithm)
        core = self.core
        held = (core.server, core.buffer, core.ring, self.frozen)
        return program, *held, jnp.int32(fill)

    def _updated(self, program: Callable, *args: Any, **static: Any) -> Any:
        with self._changing():
            clients, buffer = self.core.clients, self.core.buffer
            hidden: Any = {"clients": None, "buffer": None, "detectors": None}
            rest = self.core._replace(**hidden)
            clients, buffer, told = program(clients, buffer, rest, *args, **static)
            self.core = self.core._replace(clients=clients, buffer=buffer)
        return told

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self.torn = True
        try:
            yield
        except Exception:
            taken = any(x.is_deleted() for x in jax.tree.leaves(self.core))
            self.torn = taken or self._changed
            raise
        self.torn, self._changed = False, True


def _shapes(
    algorithm: base.Algorithm, state: base.State, stream: Any, example: Any, key: Any
) -> Shapes:
    """What there is to know from the stream, from the example, or from φ alone."""
    server, drawn = state.server, None
    if stream is None and example is None:
        none: Any = dict.fromkeys(server._fields)
        rest, message = base.ServerState(**none), programs.message_like(state)
        parts = (message, programs.sent(server, rest), server.frozen)
        sizes = _traffic.Communication(*map(tree.size, parts))
        return Shapes(None, message, rest, [], sizes)
    if stream is not None:
        zero = jnp.int32(0)
        drawn = jax.eval_shape(programs.draw, stream, key, zero, zero, zero)[0]
    visit = programs.visit_like(example) if drawn is None else drawn
    read, message, metrics = _traffic.part(algorithm, server, state.clients, visit)
    moving = _traffic.moving(algorithm, server, read, message)
    own: Any = dict.fromkeys(("params", "shared", "client_opt", "version", "frozen"))
    scalar = [k for k, v in metrics.items() if getattr(v, "shape", None) == ()]
    names = sorted(scalar) if stream is not None else []
    travels = _traffic.of_visit(algorithm, server, state.clients, visit)
    return Shapes(drawn, message, moving._replace(**own), names, travels)
