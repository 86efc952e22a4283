"""The floor: one JAX program written for the work by hand, all rounds in a scan.

No masks, metrics, keys or state of clients: what a round costs at the least in JAX.
"""

import functions
import jax
import jax.numpy as jnp
import nets
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from work import ORDERS, Peer, Work, measure, rows_of


def prepare(work: Work) -> Peer:
    flat, rows = nets.weights(work.net), rows_of(work)
    phi = {path: v for path, v in flat.items() if nets.trained(work.net, path)}
    theta = {path: v for path, v in flat.items() if path not in phi}
    local = functions.local_of(work.net, work.rate)

    @jax.jit
    def run(phi, theta, rows):
        def round_(phi, given):
            t, who = given
            index = rows.order[who, t % ORDERS]  # [C, S, B]
            one = lambda i: local(phi, theta, rows.x[i], rows.y[i])
            sums = lambda index: total(one, index, phi, work.schedule)
            if work.devices > 1:
                sums = spread(sums, work.devices)
            return jax.tree.map(lambda p: p / len(index), sums(index)), None

        ts = jnp.arange(rows.who.shape[0])
        return jax.lax.scan(round_, phi, (ts, rows.who))[0]

    given = jax.device_put((phi, theta, rows))
    go = lambda: jax.block_until_ready(run(*given))
    return Peer(go, lambda end: jax.tree.map(np.asarray, end))


def spread(sums, devices: int):
    """The same sums, of clients over devices."""
    mesh = jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,))
    own = lambda index: jax.lax.psum(sums(index), "clients")
    where = {"mesh": mesh, "in_specs": P("clients"), "out_specs": P()}
    return jax.shard_map(own, **where, check_vma=False)


def total(one, index, phi, schedule):
    """The sum of `one` over the clients, some at a time and added up."""
    size = {"vmap": len(index), "scan": 1}.get(schedule, schedule)

    def add(total, index):
        ends = jax.vmap(one)(index) if size > 1 else one(index[0])
        ones = jnp.ones(size)
        added = lambda a, e: a + (jnp.einsum("c,c...->...", ones, e) if size > 1 else e)
        return jax.tree.map(added, total, ends), None

    chunks = index.reshape(-1, size, *index.shape[1:])
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, phi), chunks)[0]


if __name__ == "__main__":
    measure("floor", ["jax"], prepare)
