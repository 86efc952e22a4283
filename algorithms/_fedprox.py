r"""FedProx.

.. math:: \ell_k(\theta) + \tfrac{\mu}{2} \|\theta - \theta^t\|^2

Li et al., Federated Optimization in Heterogeneous Networks, 2020,
https://arxiv.org/abs/1812.06127
"""

from fedcl import base, tree
from fedcl.transforms import transform


def fedprox(mu: float) -> base.ClientTransform:
    r"""Keeps local steps near the parameters :math:`\theta^t` that the server sent.

    Args:
      mu: μ; 0 is FedAvg.

    Returns:
      A `ClientTransform` without memory.

    Cost: none worth mention.

    >>> import types
    >>> import jax.numpy as jnp
    >>> ctx = types.SimpleNamespace(anchor={"w": jnp.zeros(3)})
    >>> fedprox(2.0).loss((), {"w": jnp.ones(3)}, {}, None, ctx).item()
    3.0
    """

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(params, ctx.anchor)
        return 0.5 * mu * tree.vdot(gap, gap)

    return transform(loss=loss)
