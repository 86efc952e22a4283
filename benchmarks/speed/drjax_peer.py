"""DrJAX: broadcast, map and mean over the clients as JAX primitives, in a scan.

Rush et al., DrJAX: Scalable and Differentiable MapReduce Primitives in JAX, 2024,
https://arxiv.org/abs/2403.07128. `pip install drjax`.
"""

import drjax
import functions
import jax
import jax.numpy as jnp
import nets
import numpy as np
from jax.sharding import AxisType
from work import ORDERS, Peer, Work, measure, rows_of


def prepare(work: Work) -> Peer:
    flat, rows = nets.weights(work.net), rows_of(work)
    phi = {path: v for path, v in flat.items() if nets.trained(work.net, path)}
    theta = {path: v for path, v in flat.items() if path not in phi}
    local = functions.local_of(work.net, work.rate)

    @drjax.program(placements={"clients": work.size})
    def round_(phi, theta, x, y):
        sent = drjax.broadcast(phi)
        one = lambda phi, x, y: local(phi, theta, x, y)
        return drjax.reduce_mean(drjax.map_fn(one, (sent, x, y)))

    @jax.jit
    def run(phi, theta, rows):
        def step(phi, given):
            t, who = given
            index = rows.order[who, t % ORDERS]
            return round_(phi, theta, rows.x[index], rows.y[index]), None

        ts = jnp.arange(rows.who.shape[0])
        return jax.lax.scan(step, phi, (ts, rows.who))[0]

    given = jax.device_put((phi, theta, rows))
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((work.devices,), ("clients",), axis_types=auto)

    def go():
        with jax.set_mesh(mesh):
            return jax.block_until_ready(run(*given))

    return Peer(go, lambda end: jax.tree.map(np.asarray, end))


if __name__ == "__main__":
    measure("drjax", ["drjax", "jax"], prepare)
