r"""L2 anchoring, the plainest regularisation method.

.. math:: \ell(\theta) + \tfrac{\lambda}{2} \|\theta - \theta^*\|^2

The baseline that Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796, compare
EWC with: an EWC whose Fisher is the identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedcl import base, tree
from fedcl.transforms import transform


class Anchor(NamedTuple):
    """Where the last context left the parameters."""

    params: base.Params  # θ*, like φ.
    ready: jax.Array  # () float32, 0 before the first boundary.


def l2_anchor(strength: float) -> base.ClientTransform:
    r"""Penalises moving away from the parameters of the last boundary.

    Unlike `fedprox`, whose anchor is renewed in every visit, θ* stays for a whole
    context: it is what the server sent in the first visit after the client's own
    boundary. Before that there is no penalty.

    Args:
      strength: λ.

    Returns:
      A `ClientTransform`. Memory: one copy of φ.

    Cost: none worth mention.

    >>> method, params = l2_anchor(2.0), {"w": jnp.ones(3)}
    >>> memory = Anchor(params, jnp.float32(1))
    >>> method.loss(memory, {"w": jnp.zeros(3)}, {}, None, None).item()
    3.0
    """

    def init(params, example):
        return Anchor(params, jnp.float32(0))

    def begin(memory, params, ctx):
        return tree.where(ctx.boundary, Anchor(params, jnp.float32(1)), memory)

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(params, memory.params)
        return 0.5 * strength * memory.ready * tree.vdot(gap, gap)

    return transform(init=init, begin=begin, loss=loss)
