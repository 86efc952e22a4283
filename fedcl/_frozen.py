"""What of θ no round changes: neither copied, donated nor saved, but known again."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from fedcl import _hosts, _once, base, phases, tree

PyTree = Any


@_once.per_shapes
def unchanged(
    seeded: bool,
    parts: tuple[phases.Phase, ...],
    state: base.State,
    key: jax.Array,
    stream: Any,
) -> PyTree:
    """True for the leaves of θ that the phases hand on as they got them.

    Args:
      seeded: whether state and key have the seed axis first.
      parts: the phases of a round.
      state: the federation with its phases' memories.
      key: the run's key.
      stream: the stream.
    """
    flags = state.server.frozen
    if not jax.tree.leaves(flags):
        return flags
    if seeded:
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        state, key = jax.tree.map(one, (state, key))

    def probe(parts, state, key, stream):
        nonlocal flags
        new = phases.step(parts, state, key, jnp.int32(0), stream)[0]
        same = lambda a, b: a is b
        flags = jax.tree.map(same, state.server.frozen, new.server.frozen)

    jax.eval_shape(probe, parts, state, key, stream)
    return flags


def held(state: base.State, still: PyTree) -> PyTree:
    """The leaves of θ that stay, None for the others."""
    pick = lambda x, stays: x if stays else None
    return jax.tree.map(pick, state.server.frozen, still)


def without(state: base.State, held: PyTree) -> base.State:
    """The state with None for what is held."""
    drop = lambda x, h: x if h is None else None
    none = lambda x: x is None
    return with_frozen(
        state, jax.tree.map(drop, state.server.frozen, held, is_leaf=none)
    )


def together(state: base.State, held: PyTree) -> base.State:
    """Undoes `without`."""
    return with_frozen(state, tree.merge(state.server.frozen, held))


def with_frozen(state: base.State, frozen: PyTree) -> base.State:
    """The state with this θ."""
    return state._replace(server=state.server._replace(frozen=frozen))


def fingerprint(frozen: PyTree) -> str:
    """A text to know θ again by, the same however its parts are laid over devices."""
    sums = b"".join(_hosts.to_host(x).tobytes() for x in _sums(frozen))
    return hashlib.sha256(sums).hexdigest()[:16]


@jax.jit
def _sums(frozen: PyTree) -> list[jax.Array]:
    """Of each leaf, sums modulo 2³² of its mixed bits and places, so in any order."""

    def sums(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            widths = {1: jnp.uint8, 2: jnp.uint16}
            x = jax.lax.bitcast_convert_type(
                x, widths.get(x.dtype.itemsize, jnp.uint32)
            )
        bits = x.astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        return jnp.stack([jnp.sum(_mixed(bits ^ _mixed(place + n))) for n in (1, 2)])

    return [*map(sums, jax.tree.leaves(frozen))]


def _mixed(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
