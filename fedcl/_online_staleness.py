"""What a late message counts: discounts by age, mixing, and distance.

With version t at the server, a message Δ of a client that started from version t − τ:

FedBuff: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022,
https://arxiv.org/abs/2106.06639
FedAsync: Xie et al., Asynchronous Federated Optimization, 2019,
https://arxiv.org/abs/1903.03934
AsyncFedED: Wang et al., AsyncFedED: Asynchronous Federated Learning with Euclidean
Distance based Adaptive Weight Aggregation, 2022, https://arxiv.org/abs/2205.13797
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedcl import base, tree

Scale = Callable[[jax.Array], jax.Array]  # Of the age τ, () int32.
Rule = Callable[[base.Message, jax.Array, base.Params, base.Params], base.Message]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A rule that scales `delta`, which must be an update of φ and all that counts."""

    rule: Rule

    def __call__(
        self,
        message: base.Message,
        age: jax.Array,
        now: base.Params,
        sent: base.Params,
    ) -> base.Message:
        return self.rule(message, age, now, sent)


def constant() -> Scale:
    """s(τ) = 1: late messages count like fresh ones.

    >>> constant()(jnp.int32(7)).item()
    1.0
    """
    return _one


def polynomial(power: ArrayLike = 0.5) -> Scale:
    r"""s(τ) = (1 + τ)^(−a), FedBuff's with a = ½.

    Args:
      power: a, 0 or more.

    >>> polynomial(0.5)(jnp.int32(3)).item()
    0.5
    """
    return lambda age: (1 + age.astype(jnp.float32)) ** -jnp.float32(power)


def hinge(slope: ArrayLike = 10.0, after: ArrayLike = 4.0) -> Scale:
    r"""s(τ) = 1 up to τ = b, then 1 / (a (τ − b) + 1); FedAsync's second.

    Args:
      slope: a.
      after: b, in versions.

    >>> [round(hinge(1.0, 2.0)(jnp.int32(t)).item(), 2) for t in (0, 2, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    def scale(age):
        late = jnp.maximum(age.astype(jnp.float32) - jnp.float32(after), 0)
        return 1 / (jnp.float32(slope) * late + 1)

    return scale


def discount(scale: Scale) -> Rule:
    r"""FedBuff: a message of age τ counts s(τ) Δ.

    The discount is of the update and not of its weight in a mean, which would be
    undone where all messages of a buffer are equally old. FedBuff's own server,
    :math:`w \leftarrow w - \eta_g \frac1B \sum_k s(\tau_k) \Delta_k`, has the chain
    `server(mean(), optax.sgd(eta))`; fedavg's default weighs by rows instead of 1/B.

    Args:
      scale: `constant()`, `polynomial(a)`, `hinge(a, b)`, or your own `(τ) -> s`.

    Returns:
      A `Rule`. What the client tells and its weight stay as they are; with
      `constant()`, so does everything.

    >>> late = discount(polynomial(0.5))(
    ...     base.Message({"w": jnp.ones(2)}, 1.0), jnp.int32(3), None, None)
    >>> late.delta["w"]
    Array([0.5, 0.5], dtype=float32)
    """

    if scale is _one:
        return _as_sent
    return Scaling(
        lambda message, age, now, sent: message._replace(
            delta=_scaled(scale(age), message.delta)
        )
    )


def mixing(alpha: ArrayLike = 0.6, scale: Scale | None = None) -> Rule:
    r"""FedAsync: the server's parameters move towards the client's.

    .. math:: w_t \leftarrow (1 - \alpha_t) w_t + \alpha_t\, (w_{t-\tau} - \Delta),
       \qquad \alpha_t = \alpha\, s(\tau)

    which is a step along :math:`\alpha_t (w_t - w_{t-\tau} + \Delta)`. The paper
    aggregates each message by itself: `buffer=1`, and a server step of 1.

    Args:
      alpha: α in (0, 1].
      scale: s; `polynomial(0.5)` by default, as in the paper's experiments.

    Returns:
      A `Rule`.
    """
    s = polynomial() if scale is None else scale

    def rule(message, age, now, sent):
        moved = tree.add(_since(now, sent, message.delta), message.delta)
        rate = jnp.float32(alpha) * s(age)
        return message._replace(delta=_scaled(rate, moved))

    return Scaling(rule)


def distance(strength: ArrayLike = 1.0, eps: ArrayLike = 1.0) -> Rule:
    r"""AsyncFedED: staleness is how far the server has moved, in units of the update.

    .. math:: \gamma = \frac{\|w_t - w_{t-\tau}\|}{\|\Delta\|}, \qquad
       \Delta \leftarrow \frac{\lambda}{\gamma + \varepsilon}\, \Delta

    A fresh message counts λ/ε. The paper aggregates each message by itself,
    `buffer=1`; its second half, a number of local steps that follows γ, is not here.

    Args:
      strength: λ.
      eps: ε, positive.

    Returns:
      A `Rule`; an update of zero stays zero.
    """

    def rule(message, age, now, sent):
        moved = _norm(_since(now, sent, message.delta))
        step = _norm(message.delta)
        gamma = moved / jnp.maximum(step, jnp.finfo(jnp.float32).tiny)
        rate = jnp.float32(strength) / (gamma + jnp.float32(eps))
        return message._replace(delta=_scaled(rate, message.delta))

    return Scaling(rule)


def _one(age: jax.Array) -> jax.Array:
    return jnp.float32(1)


def _as_sent(message, age, now, sent):
    return message


def _since(now: base.Params, sent: base.Params, delta: base.Params) -> base.Params:
    """How far the server has moved, at the leaves that clients send."""
    away = lambda d, n, s: None if d is None else n - s
    return jax.tree.map(away, delta, now, sent, is_leaf=lambda d: d is None)


def _scaled(c: jax.Array, a: base.Params) -> base.Params:
    """`c·a`; integers, such as the seeds that some messages hold, stay."""
    real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(lambda x: c.astype(x.dtype) * x if real(x) else x, a)


def _norm(a: base.Params) -> jax.Array:
    """‖a‖ in float32, ()."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(a)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))
