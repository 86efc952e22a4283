"""The online federated server: a federation that never stops.

Clients come and go, and their updates arrive late, each with the version that it
started from. The server buffers them, discounts the late ones and aggregates, tests
the model on the rows of each arrival before they train it, sees drift, lets methods
commit at it, and saves itself. Its parts are the two pure functions of a
`fedcl.Algorithm`: `client_update`, run from the version that the client downloaded, and
`aggregate`, over a buffer in the place of a cohort. Rounds are the special case where
the buffer is the cohort and nobody is late.

    server = online.Server(algorithm, state, buffer=8, key=key, stream=stream)
    for report in online.serve(server, arrivals):
        ...                # server.params is what is served, at any time

Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022,
https://arxiv.org/abs/2106.06639
"""

from collections.abc import Callable, Iterable, Iterator

from fedcl._online_desk import EVENTS as EVENTS
from fedcl._online_desk import OUTCOMES as OUTCOMES
from fedcl._online_desk import RefusedError as RefusedError
from fedcl._online_desk import Report as Report
from fedcl._online_desk import Snapshot as Snapshot
from fedcl._online_desk import Totals as Totals
from fedcl._online_desk import collect as collect
from fedcl._online_drift import Detector as Detector
from fedcl._online_drift import page_hinkley as page_hinkley
from fedcl._online_events import Delay as Delay
from fedcl._online_events import Download as Download
from fedcl._online_events import Event as Event
from fedcl._online_events import Join as Join
from fedcl._online_events import Leave as Leave
from fedcl._online_events import Tick as Tick
from fedcl._online_events import Update as Update
from fedcl._online_events import arrivals as arrivals
from fedcl._online_events import exponential as exponential
from fedcl._online_events import half_normal as half_normal
from fedcl._online_events import journal as journal
from fedcl._online_events import load as load
from fedcl._online_events import save as save
from fedcl._online_events import synchronous as synchronous
from fedcl._online_server import Server as Server
from fedcl._online_staleness import Rule as Rule
from fedcl._online_staleness import Scale as Scale
from fedcl._online_staleness import constant as constant
from fedcl._online_staleness import discount as discount
from fedcl._online_staleness import distance as distance
from fedcl._online_staleness import hinge as hinge
from fedcl._online_staleness import mixing as mixing
from fedcl._online_staleness import polynomial as polynomial


def serve(
    server: Server,
    arrivals: Iterable[Event],
    *,
    progress: Callable[[Report], None] | None = None,
) -> Iterator[Report]:
    """Handles arrivals as they come, and saves the server when it ends, however it does.

    Args:
      server: a server; one that was resumed has handled `server.position` events, so
        give it the rest: `recorded[server.position:]`, or `journal(…, start=…)`.
      arrivals: any iterable: a list, `arrivals(…)`, a generator over a queue.
      progress: called with each report.

    Yields:
      A `Report` per event.

    Raises:
      RefusedError: see `Server`; to go on after one, call `serve` with what is left.

    >>> import jax, optax
    >>> from fedcl import algorithms, testing
    >>> p = testing.toy_problem()
    >>> algorithm = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    >>> state = algorithm.init(p.params, p.stream.example(), 4)
    >>> server = Server(algorithm, state, buffer=2, key=jax.random.key(0), stream=p.stream)
    >>> order = [Join(0), Join(3), Update(0), Update(3), Download(0), Update(0)]
    >>> [(r.outcome, r.version, r.fill) for r in serve(server, order)][2:]
    [('accepted', 0, 1), ('accepted', 1, 0), ('ok', 1, 0), ('accepted', 1, 1)]
    """
    try:
        for event in arrivals:
            report = server.handle(event)
            if progress is not None:
                progress(report)
            yield report
    finally:
        server.close()
