"""Rows that clients hold out of their own, to test on while they train."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fedcl.streams._stream import Stream


def validation(
    stream: Stream, fraction: float, *, seed: int = 0
) -> tuple[Stream, Stream]:
    """Every client holds a share of its rows out of each of its contexts.

    Rows that contexts share are held out of all of them.

    Args:
      stream: the clients' stream.
      fraction: of each client's rows of a context, rounded down; one at least stays.
      seed: of the choice.

    Returns:
      The stream without those rows, and one of them alone, for `phases.validation`. The
      orders of both are the stream's.

    Raises:
      ValueError: if `fraction` is not in (0, 1), or labels drift within the stream.

    >>> from fedcl import streams
    >>> rows = {"x": np.zeros((12, 1)), "y": np.arange(12) % 2}
    >>> one = streams.class_incremental(rows, num_contexts=1, num_clients=2,
    ...     rounds_per_context=3, steps=1, batch_size=2)
    >>> train, held = streams.validation(one, 0.34)
    >>> train.size.tolist(), held.size.tolist()
    ([[4, 4]], [[2, 2]])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation: fraction must be in (0, 1), got {fraction}.")
    if stream.prior is not None:
        raise ValueError(
            "validation: the labels of this stream drift, and its rows are drawn by "
            "label: hold rows out of the table before the stream is built."
        )
    rows, start, size = (np.array(a) for a in (stream.rows, stream.start, stream.size))
    held = np.minimum((fraction * size).astype(np.int32), np.maximum(size - 1, 0))
    for at, n, out in {*zip(start.flat, size.flat, held.flat, strict=True)}:
        own = rows[at : at + n]
        chosen = np.random.default_rng([seed, at]).permutation(n) < out
        rows[at : at + n] = np.concatenate([own[~chosen], own[chosen]])

    def cells(start, size):
        widest = max(1, int(size.max()))
        given = {"rows": rows, "start": start, "size": size}
        arrays = {name: jnp.asarray(a) for name, a in given.items()}
        return dataclasses.replace(stream, **arrays, capacity=widest)

    return cells(start, size - held), cells(start + size - held, held)
