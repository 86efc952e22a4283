"""Several processes that run one program: what each must hold, say and write alike.

Every process calls these functions in the same order; in a single process they cost
nothing. Only process 0 writes files and speaks.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

PyTree = Any


def several() -> bool:
    """Whether this program runs in more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def put(x: jax.Array, sharding: Sharding) -> jax.Array:
    """`jax.device_put`, also onto devices of other processes.

    There, `x` is an array that every process holds alike, or one over all of them.
    """
    spread = isinstance(x, jax.Array) and not x.is_fully_addressable
    if sharding.is_fully_addressable or spread:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    here = np.asarray(x)
    return jax.make_array_from_callback(here.shape, sharding, lambda i: here[i])


def everywhere(a: PyTree, mesh: Mesh | None) -> PyTree:
    """`a` with a copy of every array on each device, if there are several processes."""
    if mesh is None or not several():
        return a
    copy = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: put(x, copy) if hasattr(x, "dtype") else x, a)


def to_host(x: Any) -> np.ndarray:
    """The whole array, though parts of it be on other processes."""
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    if whole or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agreed(value: Any) -> Any:
    """What process 0 says, a JSON value; all have then come to this point."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.zeros(size, np.uint8)
    mine[: len(text)] = text[:size]
    said = np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)
    return json.loads(said.tobytes())


def anyone(flag: bool) -> bool:
    """Whether any process says so."""
    if not several():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def least(value: float | None) -> int | None:
    """The smallest number of any process, None being none; to seven figures."""
    if not several():
        return None if value is None else int(value)
    from jax.experimental import multihost_utils

    mine = np.float32(np.inf if value is None else value)
    found = float(np.min(multihost_utils.process_allgather(mine)))
    return None if np.isinf(found) else int(found)


def check_same(a: PyTree, what: str) -> None:
    """Refuses values that the processes have not made alike.

    Raises:
      ValueError: with the number of the process whose bytes differ.
    """
    if not several():
        return
    from jax.experimental import multihost_utils

    sums = np.asarray(multihost_utils.process_allgather(np.uint32(_checksum(a))))
    if (sums != sums[0]).any():
        process = int(np.argmax(sums != sums[0]))
        raise ValueError(
            f"{what} differ between processes: process {process} has checksum "
            f"{sums[process]:08x}, process 0 {sums[0]:08x}. Give every process the same "
            "program, files, seeds, package versions and kind of device."
        )


def _checksum(a: PyTree) -> int:
    total = 0
    for x in jax.tree.leaves(a):
        if not hasattr(x, "dtype") or not getattr(x, "is_fully_addressable", True):
            continue
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        total = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, total)
    return total
