r"""SCAFFOLD, option II.

.. math::
   y \leftarrow y - \eta\,(\nabla\ell_k(y) - c_k + c), \qquad
   c_k^+ = c_k - c + \frac{x - y}{S\eta}, \qquad
   c = \frac{1}{N} \sum_k c_k

Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
2020, https://arxiv.org/abs/1910.06378
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedcl import base, tree
from fedcl.transforms import transform


class Variate(NamedTuple):
    """A client's control variate."""

    used: base.Params  # c_k, fixed during a visit.
    total: base.Params  # Sum of this visit's raw gradients.
    steps: jax.Array  # () float32, in this visit.


def scaffold() -> base.ClientTransform:
    r"""Corrects client drift by control variates; use plain SGD on the clients.

    With SGD, :math:`x - y = \eta \sum_s (g_s - c_k + c)`, so that the paper's
    :math:`c_k^+` is the mean of the raw gradients :math:`g_s` along the visit. That is
    what is computed here: it needs no learning rate, and does not change its meaning
    under a schedule. The server's c is the mean over the whole population of what each
    client last reported, zero for those that never did, as in the paper's Algorithm 1
    under partial participation. The paper averages clients with equal weights: use
    `server=fedcl.aggregation.server(mean(), optax.sgd(lr))`.

    In a chain, "raw" is the gradient that reaches this member: put members that
    penalise or project where they should count.

    Returns:
      A `ClientTransform`. Memory: two copies of φ on the client, one on the server,
      and another on the client for what it last told; doubles the bytes sent.

    Cost: none worth mention.

    >>> scaffold().init({"w": jnp.ones(2)}, None).used["w"]
    Array([0., 0.], dtype=float32)
    """

    def init(params, example):
        zeros = tree.zeros_like(params)
        return Variate(zeros, zeros, jnp.float32(0))

    def update(grads, memory, params, batch, aux, ctx):
        total = tree.add(memory.total, grads)
        corrected = tree.add(tree.sub(grads, memory.used), ctx.shared)
        return corrected, memory._replace(total=total, steps=memory.steps + 1)

    def end(memory, params, ctx):
        mean = jax.tree.map(lambda t: t / jnp.maximum(memory.steps, 1), memory.total)
        used = tree.where(memory.steps > 0, mean, memory.used)
        zeros = tree.zeros_like(memory.total)
        return Variate(used, zeros, jnp.float32(0)), used

    return transform(init=init, update=update, end=end)
