"""The parts of a transformer: attention, rotary positions, MLPs and stacked blocks.

Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762:
softmax(Q Kᵀ / √size) V, per head. Grouped heads: Ainslie et al., "GQA", 2023,
https://arxiv.org/abs/2305.13245. Rotary positions: Su et al., "RoFormer", 2021,
https://arxiv.org/abs/2104.09864.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike

Turn = tuple[jax.Array, jax.Array]  # cos and sin, each [B or 1, T, 1, size / 2].


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The types of a network: of its parameters, and of what is computed from them."""

    params: Any = jnp.float32
    compute: Any = None  # None: whatever inputs and parameters promote to.

    def options(self) -> dict[str, Any]:
        return {"param_dtype": self.params, "dtype": self.compute}


class Text(NamedTuple):
    """Rows of tokens: ids, the document of each, and its position therein, [B, T]."""

    tokens: jax.Array
    segments: jax.Array | None  # None: one document a row, no padding.
    positions: jax.Array  # [B or 1, T]


class Sight(NamedTuple):
    """What each token sees and where it stands; the same in every layer.

    Attributes:
      mask: [B or 1, 1, T, S] bool, True where query t sees key s; None: everywhere.
      turn: the rotation of queries and keys, see `rotation`; None: no rotation.
      rows: B, where rows and tokens are one axis, [B * T, D], as `run_blocks` has
        them; None: they are two.
    """

    mask: jax.Array | None = None
    turn: Turn | None = None
    rows: int | None = None


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of every layer, [L, B, S, heads, size]."""

    keys: jax.Array
    values: jax.Array

    def write(
        self, k: jax.Array, v: jax.Array, layer: jax.Array, slot: ArrayLike
    ) -> "Cache":
        """With [B, T, heads, size] of one layer in the slots from `slot` on."""
        at = (layer, 0, slot, 0, 0)
        put = lambda a, x: jax.lax.dynamic_update_slice(a, x[None].astype(a.dtype), at)
        return Cache(put(self.keys, k), put(self.values, v))

    def read(self, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """One layer's, [B, S, heads, size]."""
        return self.keys[layer].astype(dtype), self.values[layer].astype(dtype)


def read_text(x: Any, vocab: int) -> Text:
    """The tokens of a language model's input, checked as far as shapes allow.

    Args:
      x: int32 tokens [B, T], or a dict with "tokens" and optionally "segments" [B, T]
        (number of the document, each a contiguous run; 0 is padding) and "positions".
      vocab: number of tokens that the model knows.

    Raises:
      TypeError: if the tokens are not integers.
      ValueError: for other keys or shapes, and outside jit for ids below 0
        or beyond `vocab`; under jit their embedding, and so the loss, is NaN.
    """
    parts = dict(x) if isinstance(x, Mapping) else {"tokens": x}
    _check_text(parts, vocab)
    tokens, segments = parts["tokens"], parts.get("segments")
    positions = parts.get("positions")
    if positions is None:
        shape = (1, tokens.shape[1])
        positions = positions_in(
            jnp.ones(shape, jnp.int32) if segments is None else segments
        )
    return Text(tokens, segments, positions)


def vectors_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table, [..., D]; NaN, which no loss passes over, for ids it lacks.

    >>> vectors_of(jnp.ones((2, 1)), jnp.array([1, 2, -1])).tolist()
    [[1.0], [nan], [nan]]
    """
    ids = ids.astype(jnp.int32)
    return jnp.take(table, jnp.where(ids < 0, len(table), ids), axis=0, mode="fill")


def positions_in(segments: jax.Array) -> jax.Array:
    """Positions that restart where the segment changes, [B, T] int32.

    >>> positions_in(jnp.array([[0, 1, 1, 1, 2, 2]])).tolist()
    [[0, 0, 1, 2, 0, 1]]
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def visible(text: Text, *, causal: bool, window: int | None = None) -> jax.Array | None:
    """Which keys each token sees, [B or 1, 1, T, T] bool; None: all of them.

    Args:
      text: tokens see their own segment alone; padding sees padding. A segment
        below 0 (a soft prompt) is seen by all.
      causal: no token sees a later one.
      window: nor one `window` or more places before it.
    """
    length, mask = text.tokens.shape[1], None
    if causal:
        gap = jnp.arange(length)[:, None] - jnp.arange(length)[None]
        mask = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
        mask = mask[None, None]
    if text.segments is None:
        return mask
    keys = text.segments[:, None, None, :]
    same = (text.segments[:, None, :, None] == keys) | (keys < 0)
    return same if mask is None else same & mask


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How rotary frequencies are stretched to a context beyond the trained one.

    `kind` "linear" divides them by `factor`; "llama3" divides those whose wave is
    longer than `context / low` and leaves those shorter than `context / high`, with
    a linear ramp between (The Llama 3 Herd of Models, 2024,
    https://arxiv.org/abs/2407.21783).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    context: int = 8192


def frequencies(size: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Angles per position of each pair of coordinates, theta^(-2i / size), [size / 2].

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    """
    plain = theta ** -(np.arange(0, size, 2) / size)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    waves = scaling.context * plain / (2 * math.pi)
    keep = np.clip((waves - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return plain * ((1 - keep) / scaling.factor + keep)


def rotation(positions: jax.Array, rates: np.ndarray) -> Turn:
    """Cosines and sines of positions x rates, each [B, T, 1, size / 2] float32."""
    places = positions.astype(jnp.float32)[:, :, None, None]
    angles = places * jnp.asarray(rates, jnp.float32)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: Turn) -> jax.Array:
    """Rotates coordinates i and i + size / 2 of each head, [B, T, N, size]."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention, [B, T, D] -> [B, T, D].

    `prefix`, None at first, may be set to an `nnx.Param` of keys and values that
    every token sees besides its own context, [2, P, kv_heads, size], or one per row,
    [B, 2, P, kv_heads, size] (stacked blocks: with the layer axis in front). They are
    not rotated, and the positions of the tokens stay as they are. `prefix_open`, [P]
    bool, may say which of them are there (in which layers, if blocks are stacked).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        size: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        numbers: Numbers = Numbers(),
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.size = size or width // heads
        self.prefix: Any = nnx.data(None)
        self.prefix_open: Any = nnx.data(None)
        self._inputs(width, bias, numbers, rngs)
        self.out = nnx.Linear(
            heads * self.size,
            width,
            use_bias=bias if out_bias is None else out_bias,
            rngs=rngs,
            **numbers.options(),
        )

    def _inputs(self, width: int, bias: bool, numbers: Numbers, rngs: nnx.Rngs) -> None:
        options: Any = {"use_bias": bias, "rngs": rngs, **numbers.options()}
        self.q = nnx.Linear(width, self.heads * self.size, **options)
        self.k = nnx.Linear(width, self.kv_heads * self.size, **options)
        self.v = nnx.Linear(width, self.kv_heads * self.size, **options)

    def __call__(self, x: jax.Array, sight: Sight = Sight()) -> jax.Array:
        return self.mix(*self.project(x, sight), sight.mask).reshape(x.shape)

    def project(
        self, x: jax.Array, sight: Sight
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, heads, size], keys and values [B, T, kv_heads, size]."""
        rows = x.shape[0] if sight.rows is None else sight.rows
        q, k, v = (self._heads(y, rows) for y in self._projections(x))
        if sight.turn is None:
            return q, k, v
        return rotate(q, sight.turn), rotate(k, sight.turn), v

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """What the queries read, through `out`, [B * T, D]; `k` and `v` may be cached."""
        if self.prefix is not None:
            k, v, mask = _prefixed(self.prefix[...], self.prefix_open, k, v, mask)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out(mixed.reshape(-1, self.heads * self.size))

    def _projections(self, x: jax.Array) -> tuple[jax.Array, ...]:
        return self.q(x), self.k(x), self.v(x)

    def _heads(self, y: jax.Array, rows: int) -> jax.Array:
        return y.reshape(rows, -1, y.shape[-1] // self.size, self.size)


class FusedAttention(Attention):
    """Attention whose queries, keys and values come from one layer, `qkv`."""

    def _inputs(self, width: int, bias: bool, numbers: Numbers, rngs: nnx.Rngs) -> None:
        wide = (self.heads + 2 * self.kv_heads) * self.size
        options: Any = {"use_bias": bias, "rngs": rngs, **numbers.options()}
        self.qkv = nnx.Linear(width, wide, **options)

    def _projections(self, x: jax.Array) -> tuple[jax.Array, ...]:
        ends = (self.heads * self.size, (self.heads + self.kv_heads) * self.size)
        return tuple(jnp.split(self.qkv(x), ends, axis=-1))


class FeedForward(nnx.Module):
    """Two layers with an activation between, [..., D] -> [..., D]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        bias: bool = True,
        numbers: Numbers = Numbers(),
        rngs: nnx.Rngs,
    ) -> None:
        options: Any = {"use_bias": bias, "rngs": rngs, **numbers.options()}
        self.up = nnx.Linear(width, hidden, **options)
        self.down = nnx.Linear(hidden, width, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(FeedForward):
    """`down(activation(gate(x)) * up(x))`, Shazeer, "GLU Variants", 2020."""

    def __init__(self, width: int, hidden: int, *args: Any, **options: Any) -> None:
        super().__init__(width, hidden, *args, **options)
        numbers = options.get("numbers", Numbers())
        self.gate = nnx.Linear(
            width,
            hidden,
            use_bias=options.get("bias", True),
            rngs=options["rngs"],
            **numbers.options(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def stacked(build: Callable[[nnx.Rngs], Any], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` blocks as one module whose parameters have a leading axis [depth, ...]."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(build))(rngs)


def run_blocks(
    blocks: Any,
    h: jax.Array,
    sight: Sight = Sight(),
    *,
    remat: bool = False,
    unroll: bool = False,
) -> jax.Array:
    """`h` [B, T, D] through stacked blocks, one after the other: `h = block(h, sight)`.

    Blocks see rows and tokens as one axis, [B * T, D]: their linear layers are then
    plain 2-d matrix products, which run twice as fast under vmap on a CPU.

    Args:
      blocks: made by `stacked`.
      h: what goes in, and comes out in the same shape and type.
      sight: the same for every block.
      remat: keep nothing of a block for the backward pass but what goes in.
      unroll: write the blocks out instead of scanning them.
    """
    graphdef, leaves = nnx.split(blocks)
    sight = sight._replace(rows=h.shape[0])
    apply = lambda h, block: nnx.merge(graphdef, block)(h, sight)
    apply = jax.checkpoint(apply) if remat else apply
    step = lambda h, block: (apply(h, block).astype(h.dtype), None)
    flat = h.reshape(-1, h.shape[-1])
    return jax.lax.scan(step, flat, leaves, unroll=unroll)[0].reshape(h.shape)


def _prefixed(
    prefix: jax.Array, seen: Any, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    if seen is not None and mask is None:
        mask = jnp.ones((1, 1, 1, k.shape[1]), bool)
    pair = jnp.broadcast_to(prefix, (k.shape[0], *prefix.shape[-4:])).astype(k.dtype)
    k = jnp.concatenate([pair[:, 0], k], axis=1)
    v = jnp.concatenate([pair[:, 1], v], axis=1)
    if mask is not None:
        shape = (*mask.shape[:3], prefix.shape[-3])
        open_ = jnp.ones((1, 1, 1, shape[3]), bool) if seen is None else seen[...]
        open_ = jnp.broadcast_to(open_.reshape(1, 1, 1, -1), shape)
        mask = jnp.concatenate([open_, mask], axis=3)
    return k, v, mask


def _check_text(parts: dict[str, Any], vocab: int) -> None:
    known = ("tokens", "segments", "positions")
    if "tokens" not in parts or not set(parts) <= set(known):
        raise ValueError(
            f"apply: a language model reads {', '.join(known)} (the last two may be "
            f"left out), got the keys {', '.join(sorted(parts)) or 'none'}."
        )
    shapes = {name: tuple(jnp.shape(part)) for name, part in parts.items()}
    if len(shapes["tokens"]) != 2 or len(set(shapes.values())) > 1:
        raise ValueError(
            f"apply: tokens, segments and positions are [B, T], got {shapes}."
        )
    tokens = parts["tokens"]
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"apply: tokens are integer ids, got {tokens.dtype}.")
    if isinstance(tokens, Tracer) or not tokens.size:
        return
    ids = np.asarray(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"apply: token ids from {low} to {high}, but the model has {vocab} tokens "
            "(0 to vocab - 1); is the tokenizer another model's?"
        )
