"""Device meshes with a clients axis."""

import jax
from jax.sharding import AxisType, Mesh


def mesh(clients: int | None = None) -> Mesh:
    """A one-dimensional mesh over which clients are sharded.

    Args:
      clients: how many devices; all by default.

    Returns:
      A mesh with the axis "clients".

    Raises:
      ValueError: if there are not that many devices.

    >>> mesh(1).axis_names
    ('clients',)
    """
    devices = jax.devices()
    n = len(devices) if clients is None else clients
    if not 1 <= n <= len(devices):
        raise ValueError(
            f"A mesh over {n} devices was asked for; this process has {len(devices)} "
            f"({devices[0].platform}). For a test on one CPU, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 before importing jax."
        )
    return jax.make_mesh(
        (n,), ("clients",), axis_types=(AxisType.Auto,), devices=devices[:n]
    )
