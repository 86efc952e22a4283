r"""Adaptive federated optimisation: FedAvgM, FedAdam, FedYogi, FedAdagrad.

With :math:`\Delta = \sum_k n_k (\theta_k - \theta) / \sum_k n_k`,

.. math::
   m \leftarrow \beta_1 m + (1-\beta_1)\Delta, \qquad
   \theta \leftarrow \theta + \eta\,\frac{m}{\sqrt{v} + \tau}

========== ==========================================================================
FedAdagrad :math:`v \leftarrow v + \Delta^2`
FedAdam    :math:`v \leftarrow \beta_2 v + (1-\beta_2)\Delta^2`
FedYogi    :math:`v \leftarrow v - (1-\beta_2)\Delta^2\,\mathrm{sign}(v-\Delta^2)`
========== ==========================================================================

from m = 0 and v = τ² (the paper asks for at least that), and without bias correction:
in this they differ from `optax.adam` and `optax.yogi`, which after the reduction make
valid server optimisers too.

Reddi et al., Adaptive Federated Optimization, 2021, https://arxiv.org/abs/2003.00295
Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification (FedAvgM), 2019, https://arxiv.org/abs/1909.06335
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedcl import aggregation, base

Second = Callable[[jax.Array, jax.Array], jax.Array]


class Moments(NamedTuple):
    """The server's moments, like φ."""

    m: base.Params
    v: base.Params


def _server(lr: float, b1: float, tau: float, second: Second) -> aggregation.Server:
    def init(params):
        m = jax.tree.map(jnp.zeros_like, params)
        v = jax.tree.map(lambda p: jnp.zeros_like(p) + tau**2, params)
        return Moments(m, v)

    def update(updates, state, params=None):
        first = lambda m, u: b1 * m + (1 - b1) * u
        m = jax.tree.map(first, state.m, updates)
        v = jax.tree.map(lambda v, u: second(v, jnp.square(u)), state.v, updates)
        step = lambda m, v: m / (jnp.sqrt(v) + tau)
        return jax.tree.map(step, m, v), Moments(m, v)

    adaptive = optax.GradientTransformation(init, update)
    stages = (aggregation.weighted_mean(), adaptive, optax.scale(-lr))
    return aggregation.server(*stages)


def fedavgm(lr: float = 1.0, momentum: float = 0.9) -> aggregation.Server:
    r"""FedAvg with server momentum, :math:`m \leftarrow \beta m + \Delta`, θ += ηm.

    Args:
      lr: η; with momentum 0 and a rate of 1 this is FedAvg.
      momentum: β.

    Returns:
      A chain for `fedavg(…, server=…)`.

    >>> chain = fedavgm(momentum=0.5)
    >>> state, u = chain.init(jnp.zeros(1)), jnp.ones((2, 1))
    >>> updates, state = chain.update(u, state, weights=jnp.ones(2))
    >>> chain.update(u, state, weights=jnp.ones(2))[0]
    Array([-1.5], dtype=float32)
    """
    return aggregation.server(
        aggregation.weighted_mean(), optax.trace(momentum), optax.scale(-lr)
    )


def fedadam(
    lr: float = 1e-2, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> aggregation.Server:
    r"""Adam on the server, see the formulas of this module.

    Args:
      lr: η.
      b1: β₁.
      b2: β₂.
      tau: τ > 0, the degree of adaptivity: small is more adaptive.

    Returns:
      A chain for `fedavg(…, server=…)`.

    >>> chain = fedadam(lr=0.5, b1=0.0, b2=0.0, tau=1.0)
    >>> u, state = jnp.ones((2, 1)), chain.init(jnp.zeros(1))
    >>> chain.update(u, state, weights=jnp.ones(2))[0]
    Array([-0.25], dtype=float32)
    """
    return _server(lr, b1, tau, lambda v, u2: b2 * v + (1 - b2) * u2)


def fedyogi(
    lr: float = 1e-2, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> aggregation.Server:
    """Yogi on the server: v moves additively, by (1 − β₂)Δ² at most.

    Args:
      lr: η.
      b1: β₁.
      b2: β₂.
      tau: τ > 0, as in `fedadam`.

    Returns:
      A chain for `fedavg(…, server=…)`.

    >>> chain = fedyogi(lr=1.0, b1=0.0, b2=0.75, tau=2.0)
    >>> u, state = 4 * jnp.ones((2, 1)), chain.init(jnp.zeros(1))
    >>> chain.update(u, state, weights=jnp.ones(2))[1][1].v
    Array([8.], dtype=float32)
    """
    return _server(lr, b1, tau, lambda v, u2: v - (1 - b2) * u2 * jnp.sign(v - u2))


def fedadagrad(
    lr: float = 1e-2, b1: float = 0.0, tau: float = 1e-3
) -> aggregation.Server:
    """Adagrad on the server: v is the sum of all squares.

    Args:
      lr: η.
      b1: β₁.
      tau: τ > 0, as in `fedadam`.

    Returns:
      A chain for `fedavg(…, server=…)`.

    >>> chain = fedadagrad(lr=1.0, tau=2.0)
    >>> u, state = 3 * jnp.ones((2, 1)), chain.init(jnp.zeros(1))
    >>> chain.update(u, state, weights=jnp.ones(2))[1][1].v
    Array([13.], dtype=float32)
    """
    return _server(lr, b1, tau, lambda v, u2: v + u2)
