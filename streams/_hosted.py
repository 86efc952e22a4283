"""Streams whose rows stay on the host: the same draw, read from disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike

from fedcl.streams import _build, _checks, _tfds
from fedcl.streams._schedules import Schedule
from fedcl.streams._stream import Indices, Stream

_indices = jax.jit(Stream.indices)
_sweep_indices = jax.jit(Stream.sweep_indices)
_finish = jax.jit(Stream.finish)


@dataclasses.dataclass(frozen=True)
class Hosted:
    """A stream of indices, and a random-access source on the host.

    Which rows are drawn is `stream.indices`: exactly what a `Stream` of the same rows
    would draw, at any time and in any order. Only the drawn rows are read.

    Attributes:
      stream: says when and which; its own columns are never read.
      source: columns that can be indexed by an array of row numbers (NumPy arrays,
        memory maps), or a sequence of records (a TFDS or Grain data source).
      columns: our names to the source's; None keeps the source's names for columns,
        and is `{"x": "image", "y": "label"}` for records.
    """

    stream: Stream
    source: Any
    columns: Mapping[str, str] | None = None

    @property
    def num_clients(self) -> int:
        """N."""
        return self.stream.num_clients

    @property
    def num_contexts(self) -> int:
        """K."""
        return self.stream.num_contexts

    @property
    def num_rounds(self) -> int:
        """T."""
        return self.stream.num_rounds

    @property
    def ragged(self) -> bool:
        """As `Stream.ragged`."""
        return self.stream.ragged

    def indices(self, key: Array, client: ArrayLike, round: ArrayLike) -> Indices:
        """As `Stream.indices`: on the device, the rows that `fetch` is to read."""
        return self.stream.indices(key, client, round)

    def task(self, client: ArrayLike, round: ArrayLike) -> Array:
        """As `Stream.task`."""
        return self.stream.task(client, round)

    def present(self, client: ArrayLike, round: ArrayLike) -> Array:
        """As `Stream.present`."""
        return self.stream.present(client, round)

    def ends(self, client: ArrayLike, round: ArrayLike) -> Array:
        """As `Stream.ends`."""
        return self.stream.ends(client, round)

    def sample(self, key: Array, client: int, round: int) -> dict[str, np.ndarray]:
        """One visit's batches in NumPy, as `Stream.sample`."""
        return self.fetch(*_indices(self.stream, key, client, round))

    def sweep(self, client: int, round: int) -> dict[str, np.ndarray]:
        """Every row of the client's context once, as `Stream.sweep`."""
        return self.fetch(*_sweep_indices(self.stream, client, round))

    def fetch(
        self, index: ArrayLike, mask: ArrayLike, context: ArrayLike
    ) -> dict[str, np.ndarray]:
        """Reads the rows that `stream.indices` names; leading axes are free.

        Returns:
          The columns, [..., column's own axes], with "mask" and "head", transformed.
        """
        unique, inverse = np.unique(np.asarray(index), return_inverse=True)
        inverse = inverse.reshape(np.shape(index))
        batch = {k: narrowed[inverse] for k, narrowed in self._read(unique).items()}
        mask, context = np.asarray(mask), np.asarray(context)
        if self.stream.transform is not None:
            batch = _finish(self.stream, batch, mask, context)
            return {name: np.asarray(column) for name, column in batch.items()}
        if self.stream.head is not None:
            batch["head"] = np.asarray(self.stream.head)[context]
        own = batch.get("mask", np.float32(1))
        return batch | {"mask": (mask * own).astype(np.float32)}

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and types of one batch, without the steps axis."""
        zeros = np.zeros(self.stream.batch_size, np.int32)
        batch = self.fetch(zeros, zeros.astype(np.float32), zeros)
        return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(self.source, Mapping):
            names = self.columns or {name: name for name in self.source}
            read = {k: self.source[name][rows] for k, name in names.items()}
        else:
            many = getattr(self.source, "__getitems__", None)
            numbers = [int(row) for row in rows]
            records = many(numbers) if many else [self.source[i] for i in numbers]
            read = _tfds.stacked(records, self.columns)
        return {name: _checks.narrow(name, column) for name, column in read.items()}


def hosted(
    source: Any,
    schedule: Schedule,
    *,
    labels: npt.ArrayLike | Mapping[str, npt.ArrayLike],
    columns: Mapping[str, str] | None = None,
    contexts: np.ndarray | None = None,
    **options: Unpack[_build.Options],
) -> Hosted:
    """A stream over rows that do not fit into memory.

    Args:
      source: see `Hosted`.
      schedule: the drift.
      labels: [M] int, one per row of the source; or small columns by name, when the
        partition goes by another than "y".
      columns: see `Hosted`.
      contexts: each row's context, as the options: see `from_arrays`.
      **options: see `from_arrays`.

    Raises:
      ValueError: there are not as many labels as rows.
    """
    known = labels if isinstance(labels, Mapping) else {"y": labels}
    given = {name: len(np.asarray(column)) for name, column in known.items()}
    table = isinstance(source, Mapping)
    rows = len(next(iter(source.values()))) if table else len(source)
    if set(given.values()) != {rows}:
        raise ValueError(f"the source has {rows} rows, but the labels have {given}")
    stream = _build.from_arrays(known, schedule, contexts=contexts, **options)
    return Hosted(stream, source, columns)
