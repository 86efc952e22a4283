"""Domains: one transform per context, driven by arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from fedcl.streams import _checks
from fedcl.streams._stream import Batch, PyTree, Transform


class Domains(NamedTuple):
    """K transforms of a row, as one function of the context and of arrays.

    Attributes:
      num_contexts: K.
      transform: `(tables, context, batch) -> batch` on one row, pure JAX.
      tables: the arrays it reads, an argument of every call.
    """

    num_contexts: int
    transform: Transform
    tables: PyTree = None


def permutations(num_contexts: int, shape: Sequence[int], *, seed: int = 0) -> Domains:
    """A fixed random order of the inputs' values per context; context 0 as it is.

    Goodfellow et al., 2013 (https://arxiv.org/abs/1312.6211).

    Args:
      num_contexts: K.
      shape: of one row of "x".
      seed: of NumPy's generator.

    >>> from fedcl import streams
    >>> streams.permutations(3, (8, 8, 1)).tables.shape
    (3, 64)
    """
    size = int(np.prod(shape))
    count = _checks.positive("num_contexts", num_contexts)
    orders = np.tile(np.arange(size, dtype=np.int32), (count, 1))
    orders[1:] = np.random.default_rng(seed).permuted(orders[1:], axis=1)
    return Domains(count, _permute, orders)


def _permute(tables: PyTree, context: Array, batch: Batch) -> Batch:
    x = batch["x"]
    return batch | {"x": x.reshape(-1)[jnp.asarray(tables)[context]].reshape(x.shape)}


def rotations(angles: ArrayLike) -> Domains:
    """Images turned counter-clockwise by `angles[k]` degrees, bilinearly.

    Multiples of 90 degrees of square images are exact. The result is float32.
    Lopez-Paz & Ranzato, 2017 (https://arxiv.org/abs/1706.08840).

    Args:
      angles: [K] degrees; rows of "x" are [H, W] or [H, W, channels].

    >>> from fedcl import streams
    >>> streams.rotations([0, 90]).tables.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    radians = np.deg2rad(np.asarray(angles, np.float64))
    if radians.ndim != 1 or not len(radians) or not np.isfinite(radians).all():
        raise ValueError(
            f"angles must be one finite number per context, got {angles!r}"
        )
    # Rounding keeps quarter turns exact: cos(pi/2) is 6e-17 in floating point.
    turn = np.round(np.stack([np.cos(radians), np.sin(radians)], axis=1), 12) + 0.0
    return Domains(len(turn), _rotate, turn.astype(np.float32))


def _rotate(tables: PyTree, context: Array, batch: Batch) -> Batch:
    cos, sin = jnp.asarray(tables)[context]
    x = batch["x"].astype(jnp.float32)
    center = [(n - 1) / 2 for n in x.shape[:2]]
    i, j = jnp.meshgrid(*(jnp.arange(n) for n in x.shape[:2]), indexing="ij")
    i, j = i - center[0], j - center[1]
    at = [cos * i + sin * j + center[0], cos * j - sin * i + center[1]]
    planes = x.reshape(*x.shape[:2], -1)
    turn = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1)
    turned = jax.vmap(turn, in_axes=2, out_axes=2)(planes)
    return batch | {"x": turned.reshape(x.shape)}


def transforms(functions: Sequence[Callable[[Batch], Batch]]) -> Domains:
    """Any list of transforms of one row, `batch -> batch`, one per context.

    They must agree on shapes and types. Under `vmap` every row pays for all of them:
    prefer one transform driven by arrays when K is large.
    """
    if not functions:
        raise ValueError("transforms needs at least one function")
    return Domains(len(functions), _Switch(tuple(functions)))


@dataclasses.dataclass(frozen=True)
class _Switch:
    functions: tuple[Callable[[Batch], Batch], ...]

    def __call__(self, tables: PyTree, context: Array, batch: Batch) -> Batch:
        del tables
        return jax.lax.switch(context, self.functions, batch)
