"""Schedules: drift as an array pi[round, client, context]."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedcl.streams import _checks


class Schedule(NamedTuple):
    """Which mixture over contexts each client is in at each round.

    `pi[t, n] = table[clock[t, n]]`: the dense array is never needed, so a schedule of
    10 000 rounds and 1 000 clients with ten contexts costs 40 MB and not 400.

    Attributes:
      table: distinct mixtures, [U, K] float32; a row of zeros is absence.
      clock: which one, [T, N] int32.

    >>> from fedcl import streams
    >>> schedule = streams.Schedule.of([[[1, 0]], [[0.5, 0.5]], [[0, 1]]])
    >>> schedule.num_rounds, schedule.num_clients, schedule.num_contexts
    (3, 1, 2)
    """

    table: np.ndarray  # [U, K] float32
    clock: np.ndarray  # [T, N] int32

    @classmethod
    def of(cls, pi: ArrayLike) -> "Schedule":
        """The schedule of a dense array [T, N, K].

        Raises:
          ValueError: the array does not have three axes, is negative or not finite,
            or a mixture sums to neither 1 nor 0 (absent).
        """
        pi = np.asarray(pi, np.float64)
        if pi.ndim != 3 or 0 in pi.shape:
            raise ValueError(
                f"pi must be [rounds, clients, contexts], got shape {pi.shape}"
            )
        flat = _checks.distributions("pi", pi, empty=True).reshape(-1, pi.shape[2])
        table, clock = np.unique(flat, axis=0, return_inverse=True)
        return cls(table, clock.reshape(pi.shape[:2]).astype(np.int32))

    @property
    def num_rounds(self) -> int:
        """T."""
        return self.clock.shape[0]

    @property
    def num_clients(self) -> int:
        """N."""
        return self.clock.shape[1]

    @property
    def num_contexts(self) -> int:
        """K."""
        return self.table.shape[1]

    def pi(self) -> np.ndarray:
        """The dense array, [T, N, K] float32."""
        return self.table[self.clock]

    def used(self) -> np.ndarray:
        """Whether client n is ever to draw from context k, [K, N] bool."""
        seen = np.zeros((len(self.table), self.num_clients), bool)
        seen[self.clock, np.arange(self.num_clients)[None, :]] = True
        return (self.table > 0).T.astype(np.int64) @ seen > 0


def abrupt(num_contexts: int, num_clients: int, rounds_per_context: int) -> Schedule:
    """One context after another, the same for every client.

    >>> from fedcl import streams
    >>> streams.abrupt(2, 1, 2).pi()[:, 0, 1].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    return staggered(num_contexts, num_clients, rounds_per_context)


def recurring(
    num_contexts: int, num_clients: int, rounds_per_context: int, *, cycles: int = 2
) -> Schedule:
    """The contexts one after another, again and again: `cycles` times."""
    once = abrupt(num_contexts, num_clients, rounds_per_context)
    clock = np.tile(once.clock, (_checks.positive("cycles", cycles), 1))
    return Schedule(once.table, clock)


def gradual(
    num_contexts: int, num_clients: int, rounds_per_context: int, *, width: int
) -> Schedule:
    r"""Each context fades into the next over `width` rounds about the boundary.

    $$ \pi_{t,k+1} = 1 - \pi_{t,k}
       = \mathrm{clip}\left(\frac{t + 1/2 - b_k}{w} + \frac12, 0, 1\right) $$
    with $b_k = (k + 1) \cdot$ `rounds_per_context`.

    Args:
      num_contexts: K.
      num_clients: N.
      rounds_per_context: rounds from one boundary to the next.
      width: w, from 1 (abrupt) to `rounds_per_context`.

    >>> from fedcl import streams
    >>> streams.gradual(2, 1, 2, width=2).pi()[:, 0, 1].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    shape = _sizes(num_contexts, num_clients, rounds_per_context)
    if _checks.positive("width", width) > shape[2]:
        raise ValueError(
            f"width ({width}) must not exceed rounds_per_context ({shape[2]}): "
            "three contexts would overlap"
        )
    t = np.arange(shape[0] * shape[2])[:, None] + 0.5
    starts = np.arange(shape[0] + 1)[None, :] * shape[2]
    begun = np.clip((t - starts) / width + 0.5, 0, 1)
    begun[:, 0], begun[:, -1] = 1, 0
    return _together(begun[:, :-1] - begun[:, 1:], shape[1])


def blurry(
    num_contexts: int, num_clients: int, rounds_per_context: int, *, blur: float
) -> Schedule:
    """A share `blur` of the rows comes from the other contexts, evenly.

    Tasks without clean boundaries: Bang et al., Rainbow Memory, 2021
    (https://arxiv.org/abs/2103.17230); Koh et al., i-Blurry, 2022
    (https://arxiv.org/abs/2110.10031).

    >>> from fedcl import streams
    >>> streams.blurry(3, 1, 1, blur=0.5).pi()[0, 0].tolist()
    [0.5, 0.25, 0.25]
    """
    shape = _sizes(num_contexts, num_clients, rounds_per_context)
    if not 0 <= blur <= 1 or (shape[0] == 1 and blur > 0):
        raise ValueError(f"blur must be in [0, 1] (0 with one context), got {blur}")
    one = np.repeat(np.eye(shape[0]), shape[2], axis=0)
    return _together(
        (1 - blur) * one + blur * (1 - one) / max(shape[0] - 1, 1), shape[1]
    )


def staggered(
    num_contexts: int,
    num_clients: int,
    rounds_per_context: int,
    *,
    lag: int | ArrayLike = 0,
    order: str | ArrayLike = "same",
    seed: int = 0,
) -> Schedule:
    """Asynchronous clients: each starts its contexts late, or in its own order.

    A client waits in its first context while its lag lasts. The schedule is
    `num_contexts * rounds_per_context + max(lag)` rounds long, so that the last client
    finishes too.

    Args:
      num_contexts: K.
      num_clients: N.
      rounds_per_context: rounds a client spends in a context.
      lag: rounds of delay, [N]; or a whole number L, and each client's is drawn
        uniformly from 0 .. L.
      order: "same", "random", or the contexts each client meets, [N, K].
      seed: of NumPy's generator, for what is drawn.

    >>> from fedcl import streams
    >>> streams.staggered(2, 2, 2, lag=[0, 1]).clock.T.tolist()
    [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    """
    k, n, length = _sizes(num_contexts, num_clients, rounds_per_context)
    rng = np.random.default_rng(seed)
    late = _lags(lag, n, rng)
    orders = _orders(order, k, n, rng)
    t = np.arange(k * length + late.max())[:, None]
    stage = np.clip((t - late[None, :]) // length, 0, k - 1)
    clock = orders[np.arange(n)[None, :], stage]
    return Schedule(np.eye(k, dtype=np.float32), clock.astype(np.int32))


def join_leave(
    schedule: Schedule,
    join: ArrayLike | None = None,
    leave: ArrayLike | None = None,
) -> Schedule:
    """Client n is there in rounds join[n] <= t < leave[n] only; otherwise absent.

    Args:
      schedule: what the clients do while they are there.
      join: [N], or None for "from the start".
      leave: [N], or None for "to the end".

    >>> from fedcl import streams
    >>> late = streams.join_leave(streams.abrupt(1, 2, 3), join=[0, 2])
    >>> late.pi()[:, 1, 0].tolist()
    [0.0, 0.0, 1.0]
    """
    rounds, clients = schedule.clock.shape
    join = np.zeros(clients, int) if join is None else np.asarray(join)
    leave = np.full(clients, rounds) if leave is None else np.asarray(leave)
    for name, given in (("join", join), ("leave", leave)):
        if given.shape != (clients,):
            raise ValueError(
                f"{name} must have one round per client, [{clients}], "
                f"got shape {given.shape}"
            )
    t = np.arange(rounds)[:, None]
    there = (join[None, :] <= t) & (t < leave[None, :])
    absent = np.zeros((1, schedule.num_contexts), np.float32)
    table = np.concatenate([schedule.table, absent])
    return Schedule(table, np.where(there, schedule.clock, len(table) - 1))


def label_drift(first: ArrayLike, last: ArrayLike, num_rounds: int) -> np.ndarray:
    """A label prior that moves in a straight line from `first` to `last`.

    Args:
      first: the distribution in round 0, [Y], or [N, Y] for one per client.
      last: the distribution in the last round, of the same shape.
      num_rounds: T.

    Returns:
      [T, 1 or N, Y] float32, the `prior` of `from_arrays`.

    >>> from fedcl import streams
    >>> streams.label_drift([1, 0], [0, 1], 3)[:, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    ends = [_checks.distributions("label_drift", p) for p in (first, last)]
    if ends[0].shape != ends[1].shape or ends[0].ndim not in (1, 2):
        raise ValueError(
            "first and last must be two [Y] or two [N, Y] distributions, got shapes "
            f"{ends[0].shape} and {ends[1].shape}"
        )
    start, stop = (np.atleast_2d(p)[None] for p in ends)
    w = np.linspace(0, 1, _checks.positive("num_rounds", num_rounds))[:, None, None]
    return ((1 - w) * start + w * stop).astype(np.float32)


def _sizes(contexts: int, clients: int, length: int) -> tuple[int, int, int]:
    names = ("num_contexts", "num_clients", "rounds_per_context")
    k, n, s = map(_checks.positive, names, (contexts, clients, length))
    return k, n, s


def _lags(lag: int | ArrayLike, clients: int, rng: np.random.Generator) -> np.ndarray:
    late = np.asarray(lag)
    if late.dtype.kind not in "iu" or late.shape not in ((), (clients,)):
        raise ValueError(
            f"lag must be one whole number of rounds, or one per client, [{clients}]; "
            f"got {late.tolist()!r}"
        )
    if (late < 0).any():
        raise ValueError(f"lag must be >= 0, got {late.min()}")
    return late if late.ndim else rng.integers(0, int(late) + 1, clients)


def _orders(
    order: str | ArrayLike, k: int, n: int, rng: np.random.Generator
) -> np.ndarray:
    same = np.tile(np.arange(k), (n, 1))
    if isinstance(order, str):
        _checks.choice("order", order, ("same", "random"))
        return same if order == "same" else rng.permuted(same, axis=1)
    given = np.asarray(order)
    if given.shape != (n, k) or (np.sort(given, axis=1) != same).any():
        raise ValueError(
            f"order must be [{n}, {k}], every row a permutation of 0 .. {k - 1}; got "
            f"shape {given.shape}"
        )
    return given


def _together(pi: Sequence[ArrayLike] | np.ndarray, num_clients: int) -> Schedule:
    """The same mixtures [T, K] for every client."""
    one = Schedule.of(np.asarray(pi)[:, None, :])
    return Schedule(one.table, np.repeat(one.clock, num_clients, axis=1))
