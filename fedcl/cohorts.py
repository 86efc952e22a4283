"""Who takes part in a round: cohorts, availability, and who reports.

A sampler is a pure function of (key, round): it draws client ids and two masks,
who trains and who reports back. Every mask is drawn from the client's id, so it
does not depend on the position in the cohort.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Process = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Cohort(NamedTuple):
    """The clients of one round."""

    client: jax.Array  # [C] int32, distinct ids.
    train: jax.Array  # [C] bool; False: the client sits this round out.
    report: jax.Array  # [C] bool; False: it trains, but the server hears nothing.


class Sampler(NamedTuple):
    """A cohort sampler.

    Attributes:
      draw: `(key, round, num_clients) -> Cohort`.
      shards: into how many equal, contiguous parts of the population the cohort is
        stratified; a mesh must divide it. None: it fits any mesh.
    """

    draw: Callable[[jax.Array, jax.Array, int], Cohort]
    shards: int | None = 1


def _full(client: jax.Array, train: jax.Array | None = None) -> Cohort:
    everybody = jnp.ones(client.shape, bool)
    train = everybody if train is None else train
    return Cohort(client.astype(jnp.int32), train, everybody)


def everyone() -> Sampler:
    """The whole population in every round.

    >>> everyone().draw(jax.random.key(0), 0, 3).client
    Array([0, 1, 2], dtype=int32)
    """
    return Sampler(lambda key, round, n: _full(jnp.arange(n)), shards=None)


def fixed(clients: ArrayLike) -> Sampler:
    """The same clients in every round.

    Args:
      clients: [C] ids; duplicates are reported as a fault when the round runs.
    """
    ids = jnp.asarray(clients)
    return Sampler(lambda key, round, n: _full(ids))


def _check_size(size: int, n: int, what: str) -> None:
    if not 1 <= size <= n:
        raise ValueError(
            f"A cohort of {size} cannot be drawn without replacement from {what} of "
            f"{n} clients: choose a size from 1 to {n}."
        )


def _on(process: Process, key: jax.Array, clients: jax.Array, round: jax.Array):
    return jax.vmap(process, in_axes=(None, 0, None))(key, clients, round)


def _top(score: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Ids of the `size` largest scores, and which of them are finite."""
    value, index = jax.lax.top_k(score, size)
    return index, value > -jnp.inf


def uniform(size: int, *, available: Process | None = None) -> Sampler:
    """`size` distinct clients, uniformly among those available.

    Args:
      size: C.
      available: a process such as `bernoulli(0.8)`; if fewer than `size` clients
        are available, the rest of the cohort sits the round out.

    Returns:
      A `Sampler`.

    Raises:
      ValueError: when the round is built, if the cohort exceeds the population.

    >>> cohort = uniform(2).draw(jax.random.key(0), 0, 5)
    >>> len(set(cohort.client.tolist()))
    2
    """
    return weighted(size, None, available=available)


def weighted(
    size: int, weights: ArrayLike | None, *, available: Process | None = None
) -> Sampler:
    r"""`size` distinct clients by successive sampling, p ∝ weights (Gumbel top-k).

    Args:
      size: C.
      weights: [N] non-negative, or None for uniform; a weight of 0 is never drawn.
      available: as in `uniform`.

    Returns:
      A `Sampler`.

    Raises:
      ValueError: if a weight is negative, or when the round is built, if the
        weights do not match the population or the cohort exceeds it.
    """
    logits = None if weights is None else jnp.log(_nonnegative(weights))

    def draw(key, round, n):
        _check_size(size, n, "a population")
        if logits is not None and logits.shape != (n,):
            raise ValueError(
                f"weighted: {logits.shape[0]} weights for a population of {n} clients."
            )
        k_draw, k_available = jax.random.split(key)
        score = jax.random.gumbel(k_draw, (n,))
        score = score if logits is None else score + logits
        if available is not None:
            here = _on(available, k_available, jnp.arange(n), round)
            score = jnp.where(here, score, -jnp.inf)
        return _full(*_top(score, size))

    return Sampler(draw)


def _nonnegative(weights: ArrayLike) -> jax.Array:
    w = jnp.asarray(weights, jnp.float32)
    if not bool(jnp.all(w >= 0)):
        raise ValueError(
            f"weighted: the smallest weight is {float(jnp.min(w))}; weights must be 0 "
            "or more."
        )
    return w


def stratified(size: int, shards: int, *, available: Process | None = None) -> Sampler:
    """`size/shards` distinct clients from each of `shards` parts of the population.

    On a mesh each device then gathers and scatters its own clients only, without
    communication. The draw is the same on one device as on many.

    Args:
      size: C, a multiple of `shards`.
      shards: contiguous parts of the population, a multiple of the devices.
      available: as in `uniform`.

    Returns:
      A `Sampler`.

    Raises:
      ValueError: if `shards` does not divide `size` or, when the round is built,
        the population.

    >>> stratified(4, 2).draw(jax.random.key(0), 0, 8).client // 4
    Array([0, 0, 1, 1], dtype=int32)
    """
    if size % shards:
        raise ValueError(
            f"stratified: a cohort of {size} does not split into {shards} equal parts: "
            f"choose a multiple of {shards}."
        )

    def draw(key, round, n):
        if n % shards:
            raise ValueError(
                f"stratified: {n} clients do not split into {shards} equal parts: choose "
                f"a divisor of {n}."
            )
        per = n // shards
        _check_size(size // shards, per, "a part")
        k_draw, k_available = jax.random.split(key)
        score = jax.random.gumbel(k_draw, (n,))
        if available is not None:
            here = _on(available, k_available, jnp.arange(n), round)
            score = jnp.where(here, score, -jnp.inf)
        top = lambda s: _top(s, size // shards)
        index, here = jax.vmap(top)(score.reshape(shards, per))
        index = index + per * jnp.arange(shards)[:, None]
        return _full(index.reshape(-1), here.reshape(-1))

    return Sampler(draw, shards=shards)


def training(sampler: Sampler, process: Process) -> Sampler:
    """Lets only some of the drawn clients train in a round.

    Args:
      sampler: draws the cohort.
      process: `(key, client, round) -> bool`; where False the client sits out.
    """

    def draw(key, round, n):
        cohort = sampler.draw(key, round, n)
        here = _on(process, jax.random.fold_in(key, 1), cohort.client, round)
        return cohort._replace(train=cohort.train & here)

    return Sampler(draw, sampler.shards)


def reporting(sampler: Sampler, process: Process) -> Sampler:
    """Lets only some of the training clients report: dropped or late updates.

    Args:
      sampler: draws the cohort.
      process: `(key, client, round) -> bool`; where False the client trains and
        keeps what it learnt to itself.
    """

    def draw(key, round, n):
        cohort = sampler.draw(key, round, n)
        here = _on(process, jax.random.fold_in(key, 2), cohort.client, round)
        return cohort._replace(report=cohort.report & here)

    return Sampler(draw, sampler.shards)


def bernoulli(p: ArrayLike) -> Process:
    """Each client is on with probability p, independently of all else.

    >>> on = bernoulli(1.0)
    >>> on(jax.random.key(0), jnp.int32(3), jnp.int32(0)).item()
    True
    """

    def process(key, client, round):
        return jax.random.bernoulli(jax.random.fold_in(key, client), p)

    return process


def diurnal(period: int, low: float, high: float) -> Process:
    r"""Availability that follows the day, each client in its own time zone.

    :math:`p = low + (high - low)\,(1 + \cos 2\pi(t/period + z_k))/2` with the zone
    :math:`z_k` spread evenly over clients by the golden ratio.

    Args:
      period: rounds per day.
      low: probability at night, in [0, 1].
      high: probability at noon, in [0, 1].
    """

    def process(key, client, round):
        zone = client * 0.6180339887498949
        phase = jnp.cos(2 * jnp.pi * (round / period + zone))
        p = low + (high - low) * (1 + phase) / 2
        return jax.random.bernoulli(jax.random.fold_in(key, client), p)

    return process


def recorded(table: ArrayLike) -> Process:
    """Availability read from a record; rounds past its end repeat its last row.

    Args:
      table: [T, N] bool.
    """
    trace = jnp.asarray(table, bool)

    def process(key, client, round):
        return trace[jnp.minimum(round, trace.shape[0] - 1), client]

    return process
