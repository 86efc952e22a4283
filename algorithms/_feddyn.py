r"""FedDyn.

.. math::
   \ell_k(\theta) - \langle h_k, \theta\rangle
   + \tfrac{\alpha}{2}\|\theta - \theta^{t-1}\|^2, \qquad
   h_k \leftarrow h_k - \alpha(\theta_k - \theta^{t-1}),

.. math::
   h \leftarrow h - \frac{\alpha}{N} \sum_{k\in P} (\theta_k - \theta^{t-1}), \qquad
   \theta^t = \frac{1}{|P|} \sum_{k\in P} \theta_k - \frac{h}{\alpha}

Acar et al., Federated Learning Based on Dynamic Regularization, 2021,
https://arxiv.org/abs/2111.04263
"""

import jax
import jax.numpy as jnp
import optax

from fedcl import aggregation, base, tree
from fedcl.transforms import transform


def feddyn(alpha: float) -> base.ClientTransform:
    r"""The client's half of FedDyn; its other half is `feddyn_server`.

    :math:`h_k`, the gradient of the local loss at the client's last solution, is
    tracked from where the client ended, so any client optimiser may be used::

        fedavg(loss_fn, opt, transform=feddyn(0.1), server=feddyn_server(0.1))

    Args:
      alpha: α, the same as the server's; 0 is FedAvg.

    Returns:
      A `ClientTransform`. Memory: one copy of φ.

    Cost: none worth mention; nothing more is sent than in FedAvg.

    >>> feddyn(0.1).init({"w": jnp.ones(2)}, None)["w"]
    Array([0., 0.], dtype=float32)
    """

    def init(params, example):
        return tree.zeros_like(params)

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(params, ctx.anchor)
        return 0.5 * alpha * tree.vdot(gap, gap) - tree.vdot(memory, params)

    def end(memory, params, ctx):
        moved = tree.sub(params, ctx.anchor)
        return jax.tree.map(lambda h, d: h - alpha * d, memory, moved), ()

    return transform(init=init, loss=loss, end=end)


def feddyn_server(alpha: float) -> aggregation.Server:
    r"""The server's half of FedDyn: the unweighted mean, corrected by h.

    In terms of the pseudo-gradients :math:`\Delta_k = \theta^{t-1} - \theta_k`:
    :math:`h \leftarrow h + \frac{\alpha}{N}\sum_{k \in P} \Delta_k` first, then a
    step of one along :math:`\frac{1}{|P|}\sum_{k \in P}\Delta_k + h/\alpha`. P are the
    clients with a weight above 0, N is the whole population.

    Args:
      alpha: α; with 0 this is the step along `fedcl.aggregation.mean()` exactly.

    Returns:
      A whole chain for `fedavg(…, server=…)`, linear in the clients' updates, with a
      state like φ.

    Raises:
      ValueError: when it is not given `weights=` and `population=`, which an algorithm
        does.

    >>> chain = feddyn_server(0.5)
    >>> state, u = chain.init({"w": jnp.zeros(())}), {"w": jnp.array([1.0, 3.0])}
    >>> given = {"weights": jnp.ones(2), "population": jnp.float32(4)}
    >>> chain.update(u, state, **given)[0]["w"]
    Array(-3., dtype=float32)
    """
    return aggregation.server(_reduction(alpha), optax.sgd(1.0))


def _reduction(alpha: float) -> aggregation.Stage:
    def update(updates, state, params=None, *, weights=None, population=None, **extra):
        if weights is None or population is None:
            raise ValueError(
                "The reduction `feddyn_server` needs `weights` and `population`; given "
                f"weights={weights}, population={population}. It belongs in the "
                "`server` chain of an algorithm."
            )
        reports = (weights > 0).astype(jnp.float32)
        total = jax.tree.map(
            lambda u: jnp.einsum("c,c...->...", reports.astype(u.dtype), u), updates
        )
        grown = lambda h, t: h + jnp.asarray(alpha / population, h.dtype) * t
        h = jax.tree.map(grown, state, total)
        mean = aggregation.mean()
        out = mean.update(updates, optax.EmptyState(), weights=weights)[0]
        return jax.tree.map(lambda m, h: m + _ratio(h, alpha), out, h), h

    return aggregation._stage(tree.zeros_like, update, "feddyn_server", True, True)


def _ratio(h: jax.Array, alpha: float) -> jax.Array:
    """h/α, and 0 at α = 0, where h is 0."""
    safe = jnp.where(alpha == 0, 1.0, alpha).astype(h.dtype)
    return jnp.where(alpha == 0, 0, h / safe)
