r"""Averaged gradient episodic memory.

.. math::
   g \leftarrow g - \frac{g^\top r}{r^\top r}\, r \quad\text{if } g^\top r < 0, \qquad
   r = \nabla \ell(\theta;\ \text{rows of earlier contexts})

Chaudhry et al., Efficient Lifelong Learning with A-GEM, 2019,
https://arxiv.org/abs/1812.00420
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedcl import _random, base, reservoir, tree
from fedcl.algorithms._replay import check_rows
from fedcl.transforms import transform

COLUMN = "agem_context"


class Episodes(NamedTuple):
    """Rows of the past, and how many contexts there were."""

    rows: reservoir.Reservoir
    context: jax.Array  # () int32: the client's boundaries so far.


def agem(capacity: int, per_batch: int, past_only: bool = True) -> base.ClientTransform:
    r"""Removes from the gradient what would raise the loss on remembered rows.

    All rows met are offered to one reservoir, with the context in which they were
    met; the reference r comes from rows of *earlier* contexts, as in the paper, so
    that nothing is projected before the first boundary.

    Args:
      capacity: rows remembered on each client.
      per_batch: rows behind r; 0 is FedAvg.
      past_only: False draws from rows of the current context too, which is what
        remains to do where boundaries are hidden (a constant `task`).

    Returns:
      A `ClientTransform`. Memory: `capacity` rows. What is projected is the gradient
      that reaches this member of a chain; r is of the task's loss alone.

    Raises:
      ValueError: for a negative `per_batch` or, at `init`, for a capacity that is not
        positive.

    Cost: a second forward and backward pass, over `per_batch` rows.

    >>> like = {k: jax.ShapeDtypeStruct((4,), jnp.float32) for k in ("x", "mask")}
    >>> agem(capacity=10, per_batch=2).init(None, like).rows.rows["x"].shape
    (10,)
    """
    check_rows("agem", per_batch)

    def init(params, example):
        label = jax.ShapeDtypeStruct(example["mask"].shape, jnp.int32)
        rows = reservoir.empty({**example, COLUMN: label}, capacity)
        return Episodes(rows, jnp.int32(0))

    def begin(memory, params, ctx):
        return memory._replace(context=memory.context + ctx.boundary.astype(jnp.int32))

    def update(grads, memory, params, batch, aux, ctx):
        k_sample, k_loss, k_add = jax.random.split(ctx.key, 3)
        if per_batch:
            past = _draw(memory, per_batch, k_sample, past_only)
            r = jax.grad(lambda p: ctx.loss_fn(p, past, k_loss)[0])(params)
            grads = _projected(grads, r)
        label = jnp.broadcast_to(memory.context, batch["mask"].shape)
        rows = reservoir.add(memory.rows, {**batch, COLUMN: label}, k_add)
        return grads, memory._replace(rows=rows)

    return transform(init=init, begin=begin, update=update)


def _draw(memory: Episodes, n: int, key: jax.Array, past_only: bool) -> base.Batch:
    """Rows of earlier contexts, uniformly; of mask 0 if there are none."""
    rows = memory.rows.rows
    allowed = rows["mask"] > 0
    if past_only:
        allowed &= rows[COLUMN] < memory.context
    counted = jnp.cumsum(allowed)
    nth = _random.below(key, (n,), jnp.maximum(counted[-1], 1))
    drawn = tree.gather(rows, jnp.searchsorted(counted, nth, side="right"))
    mask = drawn.pop("mask") * (counted[-1] > 0)
    del drawn[COLUMN]
    return {**drawn, "mask": mask}


def _projected(grads: base.Params, r: base.Params) -> base.Params:
    dot, norm = tree.vdot(grads, r), tree.vdot(r, r)
    opposed = (dot < 0) & (norm > 0)
    scale = jnp.where(opposed, dot / jnp.where(norm > 0, norm, 1), 0.0)
    return jax.tree.map(lambda g, r: g - scale.astype(g.dtype) * r, grads, r)
