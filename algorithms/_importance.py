"""What quadratic penalties share: an anchor, an importance, and how both are committed."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fedcl import base, statistics, tree
from fedcl.transforms import transform


class Importance(NamedTuple):
    """The memory of a quadratic penalty."""

    anchor: base.Params  # θ*, like φ.
    importance: base.Params  # Ω, like φ; zeros before the first commit.
    running: base.PyTree = ()  # The statistic of the current context, accumulating.


def penalty(memory: Importance, params: base.Params) -> jax.Array:
    r""":math:`\sum_j \Omega_j (\theta_j - \theta^*_j)^2`, ()."""
    return tree.vdot(memory.importance, tree.square(tree.sub(params, memory.anchor)))


def committed(
    memory: Importance, params: base.Params, solved: base.PyTree, decay: float
) -> Importance:
    r"""The memory with :math:`\Omega \leftarrow \gamma\Omega + s,\ \theta^* = \theta`."""
    grown = lambda old, new: decay * old + new
    importance = jax.tree.map(grown, memory.importance, solved)
    return memory._replace(anchor=params, importance=importance)


def accumulated(
    statistic: statistics.Statistic, factor: float, decay: float
) -> base.ClientTransform:
    """Accumulates a statistic in every step and commits it at the boundary.

    Args:
      statistic: an importance, its result a tree like φ.
      factor: multiplies the penalty.
      decay: γ.

    Returns:
      A `ClientTransform`.
    """

    def init(params, example):
        empty = statistic.init(params, example)
        return Importance(params, tree.zeros_like(params), empty)

    def begin(memory, params, ctx):
        done = committed(memory, params, statistic.solve(memory.running), decay)
        done = done._replace(running=tree.zeros_like(memory.running))
        return tree.where(ctx.boundary, done, memory)

    def loss(memory, params, batch, aux, ctx):
        return factor * penalty(memory, params)

    def update(grads, memory, params, batch, aux, ctx):
        running = statistic.accumulate(
            memory.running, params, batch, ctx.loss_fn, ctx.key
        )
        return grads, memory._replace(running=running)

    return transform(init=init, begin=begin, loss=loss, update=update)


def consolidated(factor: float) -> base.ClientTransform:
    """The penalty alone, its memory written by a consolidation phase."""

    def init(params, example):
        return Importance(params, tree.zeros_like(params))

    def loss(memory, params, batch, aux, ctx):
        return factor * penalty(memory, params)

    return transform(init=init, loss=loss)


def fisher_commit(
    decay: float = 1.0, index: int | None = None
) -> Callable[[base.Memory, base.Params, base.PyTree], base.Memory]:
    r"""How `fedcl.phases.consolidate` writes the memory of a consolidated penalty.

    .. math:: F \leftarrow \gamma F + F_t, \qquad \theta^* \leftarrow \theta

    Args:
      decay: γ; 1 adds the contexts up, less than 1 forgets old ones.
      index: which member of a `fedcl.chain` the penalty is; None if it is alone.

    Returns:
      `(memory, params, solved) -> memory`, for `ewc_consolidated` with
      `statistics.fisher(…)` and for `mas_consolidated` with
      `statistics.sensitivity()`.

    Raises:
      TypeError: when the phase runs, if that memory is not a consolidated penalty's.

    >>> import jax.numpy as jnp
    >>> memory = Importance(jnp.float32(0), jnp.float32(2))
    >>> fisher_commit(0.5)(memory, jnp.float32(9), jnp.float32(1)).importance.item()
    2.0
    """

    def commit(memory, params, solved):
        if index is None:
            return committed(_checked(memory, index), params, solved, decay)
        members = list(memory)
        one = _checked(members[index], index)
        members[index] = committed(one, params, solved, decay)
        return tuple(members)

    return commit


def _checked(memory: base.Memory, index: int | None) -> Importance:
    if isinstance(memory, Importance) and memory.running == ():
        return memory
    raise TypeError(
        f"fisher_commit(index={index}) found a memory of type {type(memory).__name__}, "
        "not that of ewc_consolidated or mas_consolidated. In fedcl.chain(a, b, …) give "
        "the position of the consolidated penalty as index=, and do not use ewc or mas "
        "there: they commit by themselves."
    )
