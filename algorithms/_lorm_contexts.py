r"""LoRM's merge over contexts, as a phase.

.. math:: U = \arg\min_U \sum_{t \le T} \|X_t U_t - X_t U\|_F^2
   = \Big(\sum_t G_t\Big)^{-1} \sum_t G_t U_t, \qquad G_t = X_t^\top X_t

:math:`U_t` is all that a layer had learnt when context t ended, :math:`X_t` the inputs
that its rows gave it.

Salami et al., Closed-form merging of parameter-efficient modules for Federated Continual
Learning, 2025, https://arxiv.org/abs/2410.17961
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedcl import base, phases, statistics, tree
from fedcl.algorithms import _lora_factors as low
from fedcl.algorithms import _lorm
from fedcl.algorithms._lorm import Normal


def lorm_contexts(
    gram_loss: base.LossFn,
    *,
    ridge: float = 1e-3,
    mesh: Mesh | None = None,
    switch: phases.Switch | None = None,
    name: str = "lorm",
) -> phases.Phase:
    r"""When contexts end, merges what was learnt in them with all that was before.

    The merge goes into the accumulators, see `fedcl.models.accumulated`, and adapters
    start again: A goes on, B is 0. The next context is trained from there; in the
    authors' code every task is trained from the base alone, and the merge only serves.

    Args:
      gram_loss: the loss of the model of `fedcl.models.tapped`.
      ridge: as in `lorm`, towards what was learnt last. Below 1e-3 the rounding of the
        sums shows in directions that no context used.
      mesh: where the clients live.
      switch: when; by default when some client's context ends. Contexts that end in the
        same round are one.
      name: prefixes its metric, "clients", how many contexts ended.

    Returns:
      A `Phase`, for after the federated one. Its sums over clients are linear.

    Raises:
      ValueError: when the round is built, if an adapter has no dense accumulator, or
        its A is not trained.

    Cost: a pass over the rows of a context, forward and backward; in² + in · out
    numbers a layer in memory, a solve in³ at a boundary.

    >>> lorm_contexts(None).name
    'lorm'
    """
    # The statistic is told φ alone, and the loss that it is given φ and θ.
    whole = lambda params, batch, key: (jnp.float32(0), params)
    total = phases.sum_over_clients(_statistic(gram_loss), whole, None, mesh)

    def init(data, state):
        _check(state.server)
        found = low.known(state.server.params, state.server.frozen, "lorm_contexts")
        return {path: _empty(parts) for path, parts in found.items()}

    def apply(data, steps, state, memory, facts):
        grams, clients = total(state, facts)
        now = low.known(state.server.params, state.server.frozen, "lorm_contexts")
        params, frozen = state.server.params, state.server.frozen
        for path, gram in grams.items():
            at = path.removesuffix("lora") + "accumulator/update"
            learnt = low.leaf(frozen, at) + _dense(now[path])
            normal = Normal(gram, jnp.matmul(gram, learnt, precision="highest"))
            memory = memory | {path: tree.add(memory[path], normal)}
            merged = _lorm.solved(memory[path], learnt, ridge)
            frozen = low.put(frozen, at, merged)
            params = low.put(params, f"{path}/b", jnp.zeros_like(now[path]["b"]))
        server = state.server._replace(params=params, frozen=frozen)
        new = tree.where(clients > 0, server, state.server)
        return state._replace(server=new), memory, {"clients": clients}

    def sums(params):
        """Grams up; down, what each layer's accumulator becomes."""
        each = map(_empty, low.adapters(params).values())
        return tuple(zip(*each, strict=True))

    switch = switch or phases.context_ends()
    return phases.Phase((), name, init, apply, switch, sums=sums)


def _statistic(gram_loss: base.LossFn) -> statistics.Statistic:
    """The Gram of each adapted layer's inputs, by path of the adapter."""

    def init(params, example):
        sides = {path: p["a"].shape for path, p in low.adapters(params).items()}
        return {path: jnp.zeros((*s[:-1], s[-2])) for path, s in sides.items()}

    def accumulate(value, params, batch, loss_fn, key):
        k_whole, k_gram = jax.random.split(key)
        everything = loss_fn(params, batch, k_whole)[1]
        found = _lorm.batch_grams(gram_loss, everything, batch, k_gram)
        return tree.add(value, found)

    return statistics.Statistic(init, accumulate, tree.add, lambda value: value)


def _dense(parts: dict[str, jax.Array]) -> jax.Array:
    return low.dense(low.product(parts["a"], parts["b"], low.gate_of(parts)))


def _empty(parts: dict[str, jax.Array]) -> Normal:
    *lead, n_in, _ = parts["a"].shape
    square, right = (*lead, n_in, n_in), (*lead, n_in, parts["b"].shape[-1])
    return Normal(jnp.zeros(square), jnp.zeros(right))


def _check(server: base.ServerState) -> None:
    for path in low.known(server.params, server.frozen, "lorm_contexts"):
        at = path.removesuffix("lora") + "accumulator/update"
        if low.leaf(server.frozen, at) is None:
            raise ValueError(
                f"lorm_contexts: θ has no {at!r}, where the merge of contexts goes. Put "
                "one there with fedcl.models.accumulated(model, params), rank=None, "
                "before the parameters are split into φ and θ."
            )
        if low.leaf(server.params, f"{path}/a") is None:
            raise ValueError(
                f"lorm_contexts: A of {path!r} is frozen; train both factors "
                "(fedcl.models.lora_only), in turns with rolora if you use lorm."
            )
