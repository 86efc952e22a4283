"""fedcl's side: `fedcl.run` with the library's own models, losses and server."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from work import ORDERS, Peer, Rows, Work, measure, rows_of

import fedcl
from fedcl import algorithms, base, cohorts, losses, models, phases, tpu, tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given(base.Stationary):
    """A stream whose rows and their order are given, the same for all peers."""

    rows: dict[str, jax.Array]  # [M, ...] each.
    order: jax.Array  # [N, ORDERS, S, B]

    @property
    def num_clients(self) -> int:
        return self.order.shape[0]

    def sample(self, key, client, round):
        index = self.order[client, round % ORDERS]
        taken = {name: a[index] for name, a in self.rows.items()}
        return taken | {"mask": jnp.ones(index.shape)}


class ConvNet(nnx.Module):
    """The network of `nets.CNN`."""

    def __init__(self, net: nets.CNN, *, rngs: nnx.Rngs) -> None:
        one, two = net.widths
        options: Any = {"padding": "VALID", "rngs": rngs}
        first = models.PatchConv(net.image[2], one, 3, **options)
        self.convs = nnx.List([first, models.PatchConv(one, two, 3, **options)])
        self.dense = nnx.Linear(math.prod(net.pooled), net.dense, rngs=rngs)
        self.head = nnx.Linear(net.dense, net.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.convs[1](jax.nn.relu(self.convs[0](x)))
        x = jax.nn.relu(models.pooled(x, 2, "max")).reshape(x.shape[0], -1)
        return self.head(jax.nn.relu(self.dense(x)))


class Federation(NamedTuple):
    """A work, as `fedcl.run` takes it."""

    parts: list[phases.Phase]
    state: base.State
    stream: Given
    loss: base.LossFn
    mesh: Mesh | None


def federation(work: Work) -> Federation:
    model, params = model_of(work.net)
    own = lambda path: nets.trained(work.net, path)
    phi, theta = tree.partition(params, own)
    rows = rows_of(work)
    given = {"x": jnp.asarray(rows.x), "y": jnp.asarray(rows.y)}
    stream = Given(given, jnp.asarray(rows.order))
    loss = losses.softmax(model.apply)
    algorithm = algorithms.fedavg(loss, optax.sgd(work.rate))
    state = algorithm.init(phi, stream.example(), work.clients, theta)
    cohort = cohorts.everyone() if work.cohort is None else sampler(rows)
    where = tpu.mesh(work.devices) if work.devices > 1 else None
    spread: Any = {"schedule": work.schedule, "mesh": where}
    parts = [phases.federated(algorithm, cohort=cohort, **spread)]
    return Federation(parts, state, stream, loss, where)


def prepare(work: Work) -> Peer:
    parts, state, stream, _, mesh = federation(work)
    options: Any = {"rounds": work.rounds, "every": work.rounds, "mesh": mesh}

    def go():
        end = fedcl.run(parts, state, stream, key=jax.random.key(0), **options)[0]
        return jax.block_until_ready(end.server.params)

    return Peer(go, lambda end: {k: np.asarray(v) for k, v in leaves(end)})


def sampler(rows: Rows) -> cohorts.Sampler:
    """The cohorts that are given."""
    everybody = jnp.ones(rows.who.shape[1], bool)
    draw = lambda key, t, n: cohorts.Cohort(
        jnp.asarray(rows.who)[t], everybody, everybody
    )
    return cohorts.Sampler(draw)


def model_of(net: nets.Net) -> tuple[models.Model, Any]:
    """fedcl's model of a network, and the first weights."""
    if isinstance(net, nets.MLP):
        model = models.mlp(net.sizes)
        params = jax.eval_shape(model.init, jax.random.key(0))
    elif isinstance(net, nets.CNN):
        model = models.from_nnx(lambda rngs: ConvNet(net, rngs=rngs))
        params = jax.eval_shape(model.init, jax.random.key(0))
    else:
        sizes = (net.image, net.patch, net.width, net.depth, net.heads, net.classes)
        vit = models.vit(*sizes, unroll=True)
        model, params = models.lora(
            vit,
            vit.init(jax.random.key(0)),
            rank=net.rank,
            alpha=net.alpha,
            where=lambda path: "attention" in path,
            key=jax.random.key(0),
        )
    flat = nets.weights(net)
    named = lambda path, x: jnp.asarray(flat.get(tree.path_string(path), x))
    return model, jax.tree_util.tree_map_with_path(named, params)


def leaves(params: Any) -> list[tuple[str, jax.Array]]:
    """The leaves by path."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(tree.path_string(path), leaf) for path, leaf in found]


if __name__ == "__main__":
    measure("fedcl", ["fedcl-jax", "jax"], prepare)
