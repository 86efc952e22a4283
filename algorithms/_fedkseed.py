r"""Full-parameter tuning by a few thousand numbers: zeroth order from shared seeds.

Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes, 2023, https://arxiv.org/abs/2312.06353

Everyone can draw the same K directions z_1 … z_K from their numbers. A client steps
along one of them at a time and sends how far it went along each:

.. math::
   \hat g = \frac{L(\phi + \epsilon z_s) - L(\phi - \epsilon z_s)}{2 \epsilon}, \quad
   c_{ks} = \sum \hat g, \quad
   a \leftarrow a + \sum_k p_k c_k, \quad
   \phi = \phi_0 - \eta \sum_s a_s z_s
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedcl import base, tree


class Replay(NamedTuple):
    """What the server keeps: with φ_0, `walked` is the whole model."""

    start: base.Params  # φ_0
    walked: jax.Array  # a, [K]
    sizes: jax.Array  # Sum of |ĝ| along each direction, [K].
    counts: jax.Array  # Steps along each direction, [K].


def fedkseed(
    loss_fn: base.LossFn,
    rate: ArrayLike,
    *,
    num_seeds: int = 1024,
    epsilon: ArrayLike = 1e-3,
    adaptive: bool = False,
    clip: ArrayLike = 1000.0,
    seed: int = 0,
    rebuild: bool = False,
) -> base.Algorithm:
    r"""FedKSeed: zeroth-order steps along K shared directions; see the module.

    A direction does not depend on φ, so the sum of a client's steps is exact whatever
    their order, and whoever has φ_0 and a has φ: see `replayed`, with which the server
    computes it. There are no gradients and no optimiser; every parameter may be
    trained. The step is constant and there is no weight decay, without which the replay
    would not be exact.

    What travels: c up, 4 K bytes, whatever the model (`adaptive`: 12 K). Down, in the
    paper, a, as much again, from which every client computes φ; φ_0 once. That is
    `rebuild=True`. By default clients are handed the φ that the server has computed,
    the same numbers without each client's replay, and φ is what then counts as sent.

    Args:
      loss_fn: `(params, batch, key) -> (loss, aux)`; only its value is read.
      rate: η.
      num_seeds: K.
      epsilon: ε.
      adaptive: FedKSeed-Pro: direction s is drawn with probability
        :math:`\propto \exp(\mathrm{minmax}_s(\text{mean } |\hat g|))`; one that nobody
        has drawn counts as 0. False: all alike.
      clip: the largest \|ĝ\| that counts in that mean.
      seed: of the directions.
      rebuild: whether a client computes φ from φ_0 and a, as on a device of its own,
        and reads nothing else of the server (`adaptive`: the |ĝ| and the counts too).

    Returns:
      An `Algorithm`. Its message's `delta` is c, [K] float32 in place of a tree like φ,
      so phases that read the clients' models, such as `phases.distil`, do not go with
      it. The server's step is the sum above, linear in c. Metrics are those of
      `fedavg`; "loss" is the mean of L(φ + εz) and L(φ − εz).

    Raises:
      ValueError: if `num_seeds` < 1.

    Cost: two forward passes a step. A round costs the server one draw of φ's size for
    every direction used so far; it keeps φ and φ_0. With `rebuild` so it does to a
    client: once for a cohort under "vmap", once for each client under "scan".

    >>> loss = lambda p, batch, key: (jnp.sum(p["w"] ** 2), batch["x"])
    >>> algorithm = fedkseed(loss, 0.1, num_seeds=4)
    >>> example = {k: jax.ShapeDtypeStruct((2,), jnp.float32) for k in ("x", "mask")}
    >>> state = algorithm.init({"w": jnp.ones(3)}, example, num_clients=2)
    >>> state.server.opt_state.walked.shape
    (4,)
    """
    if num_seeds < 1:
        raise ValueError(f"fedkseed: num_seeds is {num_seeds}; it must be 1 or more.")

    def init(params, example, num_clients, frozen=None):
        params, none = tree.strong(params), jnp.zeros(num_seeds)
        kept = Replay(params, none, none, none)
        never = jnp.int32(-1)
        client = base.ClientState((), (), (), never, never)
        population, version = jnp.float32(num_clients), jnp.int32(0)
        server = base.ServerState(params, frozen, kept, (), (), population, version)
        return base.State(tree.strong(server), tree.stack(client, num_clients))

    def client_update(server, client, visit):
        bound = lambda p, b, k: loss_fn(tree.merge(p, server.frozen), b, k)[0]
        steps = visit.batches["mask"].shape[0]
        k_seed, k_loss = jax.random.split(visit.key)
        kept = server.opt_state
        phi = server.params
        if rebuild:
            phi = replayed(kept.start, kept.walked, rate, seed=seed)
        odds = _log_odds(kept, adaptive)
        drawn = jax.random.categorical(k_seed, odds, shape=(steps,))

        def step(params, xs):
            s, key, batch, live = xs
            z = direction(phi, s, seed)
            high = bound(_moved(params, epsilon, z), batch, key)
            low = bound(_moved(params, -jnp.asarray(epsilon), z), batch, key)
            slope = jnp.where(live, (high - low) / (2 * epsilon), 0)
            loss = jnp.where(live, (high + low) / 2, 0)
            return _moved(params, -jnp.asarray(rate) * slope, z), (slope, loss)

        live = jnp.ones(steps, bool) if visit.live is None else visit.live
        xs = (drawn, jax.random.split(k_loss, steps), visit.batches, live)
        _, (slopes, losses) = jax.lax.scan(step, phi, xs)
        message = _message(drawn, slopes, live, visit.batches["mask"])
        taken = jnp.sum(live.astype(jnp.float32))
        loss = jnp.sum(losses) / jnp.maximum(taken, 1)
        metrics = {"loss": loss, "rows": message.weight, "steps": taken}
        client = client._replace(task=visit.task, version=server.version)
        return message, client, metrics

    def _message(drawn, slopes, live, mask):
        summed = lambda x: jnp.zeros(num_seeds).at[drawn].add(x)
        sums: Any = ()
        if adaptive:
            sizes = jnp.minimum(jnp.abs(slopes), clip)
            sums = (summed(sizes), summed(live.astype(jnp.float32)))
        return base.Message(summed(slopes), jnp.sum(mask), sums=sums)

    def aggregate(server, messages):
        kept, weights = server.opt_state, messages.weight
        p = weights / jnp.maximum(jnp.sum(weights), 1e-12)
        kept = kept._replace(walked=kept.walked + p @ messages.delta)
        if adaptive:
            sizes, counts = (jnp.sum(x, axis=0) for x in messages.sums)
            kept = kept._replace(sizes=kept.sizes + sizes, counts=kept.counts + counts)
        params = replayed(kept.start, kept.walked, rate, seed=seed)
        version = server.version + 1
        return server._replace(params=params, opt_state=kept, version=version)

    return base.Algorithm(init, client_update, aggregate)


def replayed(
    start: base.Params, walked: jax.Array, rate: ArrayLike, *, seed: int = 0
) -> base.Params:
    r"""φ of `fedkseed` from what is sent, :math:`\phi_0 - \eta \sum_s a_s z_s`.

    Args:
      start: φ_0.
      walked: a, [K]: of a server `state.server.opt_state.walked`.
      rate: η.
      seed: of the directions.

    Returns:
      φ, the server's: the same sum in the same order. (Two compiled programs may round
      the last bit of a product in their own way.)

    Cost: a draw of φ's size for every s with a_s ≠ 0, one at a time.

    >>> phi = {"w": jnp.ones(3)}
    >>> bool(jnp.all(replayed(phi, jnp.zeros(8), 0.1)["w"] == phi["w"]))
    True
    """

    def add(params, xs):
        s, far = xs
        step = lambda p: _moved(p, -jnp.asarray(rate) * far, direction(start, s, seed))
        return jax.lax.cond(far != 0, step, lambda p: p, params), None

    each = (jnp.arange(walked.shape[0]), walked)
    return jax.lax.scan(add, start, each)[0]


def direction(params: base.Params, s: ArrayLike, seed: int = 0) -> base.Params:
    """z_s, standard normal: a tree like φ from a number.

    Args:
      params: φ, for its shapes.
      s: which, ().
      seed: of all directions.

    >>> a, b = (direction({"w": jnp.ones(2)}, s) for s in (3, 3))
    >>> bool(jnp.all(a["w"] == b["w"]))
    True
    """
    key = jax.random.fold_in(jax.random.key(seed), s)
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, x: jax.random.normal(k, x.shape, jnp.float32).astype(x.dtype)
    return jax.tree.unflatten(shape, map(draw, keys, leaves))


def _moved(params: base.Params, far: Any, z: base.Params) -> base.Params:
    return jax.tree.map(lambda x, d: x + jnp.asarray(far, x.dtype) * d, params, z)


def _log_odds(kept: Replay, adaptive: bool) -> jax.Array:
    """The logarithm of what each direction's probability is proportional to, [K]."""
    if not adaptive:
        return jnp.zeros_like(kept.walked)
    mean = kept.sizes / jnp.maximum(kept.counts, 1)
    low, high = jnp.min(mean), jnp.max(mean)
    return (mean - low) / jnp.where(high > low, high - low, 1)
