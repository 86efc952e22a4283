r"""Sums over rows of powers of each row's gradient.

On one row a dense layer's gradient is an outer product :math:`x \delta^\top`, so

.. math:: \sum_n w_n |x_n \delta_n^\top|^p = (w |X|^p)^\top |\Delta|^p,

one product of matrices. Where the traced gradient of a leaf is such a product its two
factors are taken, and no gradient of a row is ever formed; any other leaf is summed row
by row.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

PyTree = Any


def powers(
    gradient: Callable[..., PyTree], rows: PyTree, weight: jax.Array, power: int
) -> PyTree:
    """`Σ_n weight[n] · |gradient(row n)|^power`.

    Args:
      gradient: of one row, a tree.
      rows: its arguments, a tuple of trees, each leaf [B, ...].
      weight: [B].
      power: 1 or 2.

    Cost: one backward pass of the batch; for a leaf that is not a dense layer's kernel
    B copies of it.

    >>> rows = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    >>> print(powers(lambda x, y: x * y, rows, jnp.array([1.0, 0.5]), 2))
    41.0
    """
    traced, shape = jax.make_jaxpr(jax.vmap(gradient), return_shape=True)(*rows)
    made = {v: e for e in traced.jaxpr.eqns for v in e.outvars}
    plans = [_plan(made, v) for v in traced.jaxpr.outvars]
    wanted = [v for plan in plans for v in plan.factors]
    values = iter(_evaluated(traced, wanted, jax.tree.leaves(rows)))
    sums = [
        plan.sum([*islice(values, len(plan.factors))], weight, power) for plan in plans
    ]
    return jax.tree.unflatten(jax.tree.structure(shape), sums)


def _evaluated(traced: core.ClosedJaxpr, wanted: list, args: list) -> list[jax.Array]:
    """The values of other variables of the program than its results."""
    told = traced.jaxpr.debug_info._replace(result_paths=None)
    jaxpr = traced.jaxpr.replace(outvars=wanted, debug_info=told)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, traced.consts))(*args)


class Plan(NamedTuple):
    """How the sum of a leaf is made.

    Attributes:
      factors: the rows' gradients [B, ...], or the two factors of their outer products.
      summed: axes of size 1 of each factor, over which that product sums.
      permutation: of the axes of the sum; empty: none.
    """

    factors: list
    summed: list[tuple[int, ...]]
    permutation: tuple[int, ...]

    def sum(self, values: list[jax.Array], weight: jax.Array, power: int) -> jax.Array:
        x, *delta = (
            jnp.squeeze(jnp.abs(x) if power == 1 else x**power, axes)
            for x, axes in zip(values, self.summed, strict=True)
        )
        x = x * jnp.expand_dims(weight.astype(x.dtype), range(1, x.ndim))
        made = jnp.tensordot(x, delta[0], axes=(0, 0)) if delta else x.sum(axis=0)
        return jnp.transpose(made, self.permutation or range(made.ndim))


def _plan(made: dict, v: Any) -> Plan:
    source, permutation, eqn = v, (), _maker(made, v)
    if eqn is not None and eqn.primitive.name == "transpose":
        first, *rest = eqn.params["permutation"]
        if first == 0:
            source, permutation = eqn.invars[0], tuple(i - 1 for i in rest)
            eqn = _maker(made, source)
    if eqn is not None and _is_outer(eqn):
        summed = [*eqn.params["dimension_numbers"][0]]
        return Plan([*eqn.invars], summed, permutation)
    return Plan([source], [()], permutation)


def _maker(made: dict, v: Any) -> Any:
    """What computes a variable, if not a constant or an argument."""
    return None if isinstance(v, core.Literal) else made.get(v)


def _is_outer(eqn) -> bool:
    """Whether each row's result is an outer product: nothing of it is summed."""
    if eqn.primitive.name != "dot_general":
        return False
    (left, _), batch = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[i] for i in left)
    return summed == 1 and tuple(map(tuple, batch)) == ((0,), (0,))
