"""FedJAX 0.0.17: `federated_averaging`, a jitted client update in a Python loop.

As released it fails on today's JAX, at its first round: core/tree_util.py, line 44, "module
'jax' has no attribute 'tree_map'". The name is put back here, and the rest runs.
`pip install fedjax`.
"""

import jax

setattr(jax, "tree_map", jax.tree.map)  # noqa: B010

import fedjax  # noqa: E402
import functions  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import nets  # noqa: E402
import numpy as np  # noqa: E402
from work import ORDERS, Peer, Work, measure, rows_of  # noqa: E402


def prepare(work: Work) -> Peer:
    flat, rows = nets.weights(work.net), rows_of(work)
    own = lambda path: nets.trained(work.net, path)
    phi = {path: jnp.asarray(v) for path, v in flat.items() if own(path)}
    theta = {path: jnp.asarray(v) for path, v in flat.items() if not own(path)}
    loss = functions.loss_of(work.net)
    grad = lambda phi, batch, key: jax.grad(loss)(phi, theta, batch["x"], batch["y"])
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.jit(grad),
        fedjax.optimizers.sgd(work.rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(
            batch_size=work.batch, num_epochs=1, skip_shuffle=True
        ),
    )
    key = jax.random.PRNGKey(0)

    def client(t: int, n: int):
        index = rows.order[n, t % ORDERS].reshape(-1)
        data = {"x": rows.x[index], "y": rows.y[index]}
        return str(n).encode(), fedjax.ClientDataset(data), key

    def go():
        state = algorithm.init(phi)
        for t, who in enumerate(rows.who):
            state, _ = algorithm.apply(state, [client(t, n) for n in who])
        return jax.block_until_ready(state.params)

    return Peer(go, lambda end: jax.tree.map(np.asarray, end))


if __name__ == "__main__":
    measure("fedjax", ["fedjax", "jax"], prepare)
