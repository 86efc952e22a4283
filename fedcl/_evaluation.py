"""One program evaluates every arm: it is given what it reads of a federation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.tree_util import Partial

from fedcl import _once, base, phases

PyTree = Any
Evaluate = Callable[[base.State], PyTree]
# What methods fill with trees of their own.
SERVER = ("opt_state", "shared", "client_opt", "news")
STATE = ("clients", "phases", "sent")


@partial(jax.jit, static_argnames=("seeded",))
def evaluated(state: base.State, evaluate: Evaluate, *, seeded: bool) -> dict:
    """`evaluate(state)` as a dict, of every seed."""
    fn = partial(_named, evaluate)
    return (jax.vmap(fn) if seeded else fn)(state)


@partial(jax.jit, static_argnames=("seeded",))
def _served(state: base.State, parts: tuple, *, seeded: bool) -> base.State:
    fn = partial(phases.served, parts)
    return (jax.vmap(fn) if seeded else fn)(state)


def _named(evaluate: Evaluate, state: base.State) -> dict:
    value = evaluate(state)
    return value if isinstance(value, dict) else {"value": value}


def as_tree(evaluate: Evaluate | None) -> Evaluate | None:
    """A plain function as a pytree without leaves, so that it can be an argument."""
    plain = evaluate is not None and jax.tree_util.all_leaves([evaluate])
    return Partial(evaluate) if plain else evaluate


def viewed(
    evaluate: Evaluate | None,
    state: base.State,
    parts: tuple = (),
    seeded: bool = False,
) -> Callable[[base.State], base.State]:
    """`(state) -> state`, served by the phases, without what the evaluation never reads.

    Two arms whose memories differ then meet in one compiled program.

    Args:
      evaluate: `(state) -> arrays`, or None.
      state: the federation with its phases' memories, arrays or shapes.
      parts: the phases of a round.
      seeded: whether the state has the seed axis first.
    """
    serves = any(part.serve for part in parts)
    serve = lambda s: _served(s, parts, seeded=seeded) if serves else s
    if evaluate is None:
        return serve
    whole = jax.eval_shape(serve, state)
    lighter = _without(_reads(seeded, evaluate, whole))
    return lambda s: lighter(serve(s))


@_once.per_shapes
def _reads(seeded: bool, evaluate: Evaluate, state: base.State) -> base.State:
    """True for the leaves that an evaluation reads; for all, if it asks for shapes."""
    leaves = jax.tree.leaves(state)
    shape: Any = jax.tree.structure(state)
    one = [jax.ShapeDtypeStruct(x.shape[int(seeded) :], x.dtype) for x in leaves]
    of = lambda fn, s: fn(s)
    whole = shape.unflatten(one)
    found, want = jax.make_jaxpr(of, return_shape=True)(evaluate, whole)
    used = {id(v) for e in found.jaxpr.eqns for v in e.invars}
    used |= {id(v) for v in found.jaxpr.outvars}
    reads = shape.unflatten([id(v) in used for v in found.jaxpr.invars[-len(one) :]])
    try:
        got = jax.eval_shape(of, evaluate, _without(reads)(whole))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        got = None
    return reads if got == want else jax.tree.map(lambda flag: True, reads)


def _without(reads: base.State) -> Callable[[base.State], base.State]:
    def keep(a, names, flags):
        idle = [n for n in names if not any(jax.tree.leaves(getattr(flags, n)))]
        return a._replace(**dict.fromkeys(idle, ()))

    def lighter(state: base.State) -> base.State:
        server = keep(state.server, SERVER, reads.server)
        return keep(state, STATE, reads)._replace(server=server)

    return lighter
