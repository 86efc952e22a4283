r"""Elastic weight consolidation.

.. math::
   \ell(\theta) + \tfrac{\lambda}{2} \sum_j F_j (\theta_j - \theta^*_j)^2, \qquad
   F \leftarrow \gamma F + F_t \quad\text{at a boundary}

Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017,
https://arxiv.org/abs/1612.00796
Schwarz et al., Progress & Compress (online EWC), 2018, https://arxiv.org/abs/1805.06370
"""

from fedcl import base, statistics
from fedcl.algorithms import _importance


def ewc(
    strength: float, decay: float = 1.0, fisher: str = "empirical"
) -> base.ClientTransform:
    r"""Online EWC: penalises moving weights that mattered in earlier contexts.

    The Fisher diagonal is accumulated over the rows of every local step, at the
    parameters of that step, and committed in the first visit after the client's own
    boundary; θ* is what the server sent then. No data is read at the boundary, so a
    client may miss any number of rounds around it. With one client and a server step
    of one this is online EWC. For the Fisher at the end of a context, as in the
    paper, see `ewc_consolidated`.

    Args:
      strength: λ.
      decay: γ; with 1 the Fishers of all contexts add up.
      fisher: "empirical", "exact", "sampled" or "batched", see
        `fedcl.statistics.fisher`. λ does not carry over from one to another.

    Returns:
      A `ClientTransform`. Memory: three copies of φ.

    Raises:
      ValueError: for another `fisher`.

    Cost: one more backward pass per row and step ("exact" one per row and class,
    "batched" one per step).

    >>> import jax.numpy as jnp
    >>> memory = ewc(2.0).init({"w": jnp.ones(3)}, None)
    >>> ewc(2.0).loss(memory, {"w": jnp.zeros(3)}, {}, None, None).item()
    0.0
    """
    return _importance.accumulated(statistics.fisher(fisher), 0.5 * strength, decay)


def ewc_consolidated(strength: float) -> base.ClientTransform:
    r"""EWC whose Fisher is computed by a pass over the data when a context ends.

    The pass is a phase; together they are the paper's method, with online EWC's γ::

        algorithm = fedavg(loss_fn, opt, transform=ewc_consolidated(10.0))
        phases = [
            fedcl.phases.federated(algorithm),
            fedcl.phases.consolidate(
                fedcl.statistics.fisher("exact"), fisher_commit(decay=1.0), loss_fn
            ),
        ]

    There θ* is the server's parameters at the end of the context. With
    `consolidate(…, merge=True)` all clients share one Fisher, summed over clients.

    Args:
      strength: λ.

    Returns:
      A `ClientTransform`. Memory: two copies of φ.

    Cost: none per step; one pass over the client's rows where its context ends.

    >>> import jax.numpy as jnp
    >>> method, params = ewc_consolidated(2.0), {"w": jnp.ones(3)}
    >>> commit = _importance.fisher_commit()
    >>> memory = commit(method.init(params, None), params, {"w": jnp.ones(3)})
    >>> method.loss(memory, {"w": jnp.zeros(3)}, {}, None, None).item()
    3.0
    """
    return _importance.consolidated(0.5 * strength)
