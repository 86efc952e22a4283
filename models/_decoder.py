"""Decoder language models: the Llama and GPT-2 families.

Touvron et al., "LLaMA", 2023, https://arxiv.org/abs/2302.13971: pre-norm blocks

    h <- h + Attention(RMSNorm(h)),    h <- h + down(silu(gate(h')) up(h')), h' = RMSNorm(h)

with rotary positions and grouped heads; Mistral and Qwen2 differ by a window and by
biases. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
(GPT-2): LayerNorm, learned positions, one fused projection, and an MLP with GELU.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from fedcl.models._attention import (
    Attention,
    Cache,
    FeedForward,
    FusedAttention,
    GatedFeedForward,
    Numbers,
    Scaling,
    Sight,
    Text,
    frequencies,
    read_text,
    rotation,
    run_blocks,
    stacked,
    vectors_of,
    visible,
)
from fedcl.models._init import EMBEDDING_STD, drawn_init
from fedcl.models._model import Model, from_nnx


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder.

    Attributes:
      vocab: V, tokens.
      width: D, of a token's vector.
      depth: L, blocks.
      heads: attention heads.
      hidden: width of the MLP.
      layout: "llama" (RMSNorm, rotary positions, gated MLP) or "gpt2" (LayerNorm,
        learned positions, fused projections, MLP with the tanh form of GELU).
      kv_heads: heads of keys and values; None: as many as `heads`.
      size: width of a head; None: `width / heads`.
      context: the longest row; of rotary positions, the longest trained on.
      eps: added to variances.
      tied: logits by the embedding, without a `head` of their own.
      theta: base of the rotary frequencies.
      scaling: how they are stretched.
      window: tokens see this many places back, themselves included; None: all.
      qkv_bias: whether the attention's inputs have biases.
      out_bias: its output.
      mlp_bias: the MLP.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    layout: Literal["llama", "gpt2"] = "llama"
    kv_heads: int | None = None
    size: int | None = None
    context: int = 2048
    eps: float = 1e-5
    tied: bool = True
    theta: float = 10_000.0
    scaling: Scaling | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        _check_config(self)

    @property
    def head_size(self) -> int:
        return self.size or self.width // self.heads


class Block(nnx.Module):
    """A pre-norm block, [B * T, D] -> [B * T, D]."""

    def __init__(self, config: DecoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(config, numbers, rngs)
        self.attention = _attention(config, numbers, rngs)
        self.norm2 = _norm(config, numbers, rngs)
        self.mlp = _mlp(config, numbers, rngs)

    def __call__(self, h: jax.Array, sight: Sight) -> jax.Array:
        h = h + self.attention(self.norm1(h), sight)
        return h + self.mlp(self.norm2(h))

    def extend(
        self,
        h: jax.Array,
        sight: Sight,
        cache: Cache,
        layer: jax.Array,
        slot: ArrayLike,
    ) -> tuple[jax.Array, Cache]:
        """The same for tokens in the slots from `slot` on, which see the cache's too."""
        q, k, v = self.attention.project(self.norm1(h), sight)
        cache = cache.write(k, v, layer, slot)
        h = h + self.attention.mix(q, *cache.read(layer, q.dtype), sight.mask)
        return h + self.mlp(self.norm2(h)), cache


class Decoder(nnx.Module):
    """Embedding, `depth` blocks stacked on a leading axis, norm, logits.

    `prompt`, None at first, may be set to an `nnx.Param` [P, D] by what overrides `run`
    to put these vectors before each text: it tells `generate` to do the same.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numbers: Numbers,
        remat: bool,
        unroll: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, numbers.params))
        self.embed = zeros(config.vocab, config.width)
        if config.layout == "gpt2":
            self.position = zeros(config.context, config.width)
        self.blocks = stacked(lambda r: Block(config, numbers, r), config.depth, rngs)
        self.norm = _norm(config, numbers, rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.width,
                config.vocab,
                use_bias=False,
                preferred_element_type=jnp.float32,
                rngs=rngs,
                **numbers.options(),
            )
        self.prompt: Any = nnx.data(None)
        self.config, self.numbers = config, numbers
        self.remat, self.unroll = remat, unroll

    def __call__(self, x: Any) -> jax.Array:
        return self.logits(self.features(x))

    def features(self, x: Any) -> jax.Array:
        """What the logits are a linear function of, [B, T, D]."""
        return self.norm(self.run(self.embedded(x), x))

    def embedded(self, x: Any) -> jax.Array:
        """The tokens' vectors before the first block, [B, T, D]."""
        text = read_text(x, self.config.vocab)
        h = vectors_of(self.embed[...], text.tokens)
        if self.config.layout == "gpt2":
            self._check_length(text)
            h = h + jnp.take(self.position[...], text.positions, axis=0, mode="fill")
        return h.astype(self.numbers.compute or h.dtype)

    def run(self, h: jax.Array, x: Any) -> jax.Array:
        """Vectors [B, T, D] through the blocks; segments and positions are those of `x`."""
        text = read_text(x, self.config.vocab)
        mask = visible(text, causal=True, window=self.config.window)
        sight = Sight(mask, self.turn(text.positions))
        return run_blocks(self.blocks, h, sight, remat=self.remat, unroll=self.unroll)

    def cache(self, rows: int, slots: int) -> Cache:
        """An empty cache, for `extend`."""
        config, kv = self.config, self.config.kv_heads or self.config.heads
        shape = (config.depth, rows, slots, kv, config.head_size)
        kind = self.numbers.compute or self.embed.dtype
        return Cache(jnp.zeros(shape, kind), jnp.zeros(shape, kind))

    def extend(
        self,
        h: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache,
        slot: ArrayLike,
    ) -> tuple[jax.Array, Cache]:
        """Vectors [B, T, D] through the blocks, after the tokens of a cache.

        Args:
          h: of the new tokens.
          positions: theirs, [B, T].
          mask: [B, 1, T, S], which slots of the cache each sees.
          cache: of the tokens before.
          slot: the first slot of the new tokens.

        Returns:
          The features, [B, T, D], and the cache with the new tokens in it.
        """
        graphdef, leaves = nnx.split(self.blocks)
        sight = Sight(mask, self.turn(positions), h.shape[0])

        def step(carry, block):
            module, (flat, cache) = nnx.merge(graphdef, block[0]), carry
            flat, cache = module.extend(flat, sight, cache, block[1], slot)
            return (flat.astype(h.dtype), cache), None

        start = (h.reshape(-1, h.shape[-1]), cache)
        layers = (leaves, jnp.arange(self.config.depth))
        (flat, cache), _ = jax.lax.scan(step, start, layers, unroll=self.unroll)
        return self.norm(flat.reshape(h.shape)), cache

    def turn(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """The rotation of queries and keys at these positions, None without one."""
        if self.config.layout == "gpt2":
            return None
        size, theta = self.config.head_size, self.config.theta
        return rotation(positions, frequencies(size, theta, self.config.scaling))

    def logits(self, features: jax.Array) -> jax.Array:
        """[..., D] to float32 [..., V]."""
        if not self.config.tied:
            return self.head(features).astype(jnp.float32)
        embed = self.embed[...].astype(features.dtype)
        dims = (((features.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            features, embed, dims, preferred_element_type=jnp.float32
        )

    def _check_length(self, text: Text) -> None:
        """Learned positions end; a row in which they restart may be longer."""
        length, most = text.tokens.shape[1], self.config.context
        if text.segments is None and length > most:
            raise ValueError(
                f"apply: rows of {length} tokens, but the model has learned positions "
                f"for {most} (`context`); cut the rows into documents of at most that."
            )


def decoder(
    config: DecoderConfig,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """A decoder language model of the Llama or the GPT-2 family.

    p(x_t | x_<t) = softmax(E Norm(h_L))_t, h_l = Block_l(h_{l-1}), h_0 = E[x]. Touvron
    et al., "LLaMA: Open and Efficient Foundation Language Models", 2023,
    https://arxiv.org/abs/2302.13971. There is no dropout.

    Args:
      config: the architecture.
      dtype: what is computed in, such as `jnp.bfloat16`; None: the parameters' type.
        Norms, rotations, softmaxes and logits are float32 in any case.
      param_dtype: the type of the parameters that `init` draws.
      remat: keeps only what goes into each block for the backward pass, and computes
        the block again there.
      unroll: writes the blocks out instead of scanning them.

    Returns:
      A model with parameters `embed` [V, D], (`position` [context, D],) `blocks`
      [L, ...], `norm` and (`head`). `apply` takes tokens [B, T] or a dict with
      "tokens", "segments" and "positions" (packed documents see only themselves) and
      gives float32 logits [B, T, V] of the next tokens.

    Raises:
      ValueError: if the sizes in `config` do not fit each other.

    Cost: compiles in the same time whatever the depth. Logits take 4 B T V bytes.

    >>> config = DecoderConfig(vocab=11, width=8, depth=2, heads=2, hidden=16)
    >>> model = decoder(config)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.ones((3, 5), jnp.int32)).shape
    (3, 5, 11)
    """
    numbers = Numbers(param_dtype, dtype)
    build = lambda rngs: Decoder(config, numbers, remat, unroll, rngs=rngs)
    std = lambda path, leaf: _deviation(path, config.depth)
    return from_nnx(build, init=lambda key, shapes: drawn_init(key, shapes, std))


def _deviation(path: str, depth: int) -> float | None:
    """GPT-2's initialisation: 0.02, and 1 / sqrt(2 L) of it into residuals."""
    if path.endswith(("out/kernel", "down/kernel")):
        return EMBEDDING_STD * (2 * depth) ** -0.5
    return EMBEDDING_STD if path.endswith(("kernel", "embed", "position")) else None


def _norm(config: DecoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> Any:
    options: Any = {"epsilon": config.eps, "rngs": rngs, **numbers.options()}
    if config.layout == "llama":
        return nnx.RMSNorm(config.width, **options)
    return nnx.LayerNorm(config.width, use_fast_variance=False, **options)


def _attention(config: DecoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> Attention:
    kind = Attention if config.layout == "llama" else FusedAttention
    return kind(
        config.width,
        config.heads,
        kv_heads=config.kv_heads,
        size=config.size,
        bias=config.qkv_bias,
        out_bias=config.out_bias,
        numbers=numbers,
        rngs=rngs,
    )


def _mlp(config: DecoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> FeedForward:
    llama = config.layout == "llama"
    kind, activation = (GatedFeedForward, jax.nn.silu) if llama else (FeedForward, gelu)
    sizes, bias = (config.width, config.hidden), config.mlp_bias
    return kind(*sizes, activation, bias=bias, numbers=numbers, rngs=rngs)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh form of GELU, as GPT-2 has it."""
    return jax.nn.gelu(x, approximate=True)


def _check_config(config: DecoderConfig) -> None:
    kv = config.heads if config.kv_heads is None else config.kv_heads
    counts = ("vocab", "width", "depth", "heads", "hidden", "context")
    low = [
        f"{name}={getattr(config, name)}"
        for name in counts
        if getattr(config, name) < 1
    ]
    wrong = f"{', '.join(low)} must be at least 1" if low else ""
    if not wrong and config.size is None and config.width % config.heads:
        wrong = f"heads={config.heads} must divide width={config.width}, or pass `size`"
    if not wrong and (kv < 1 or config.heads % kv):
        wrong = f"kv_heads={kv} must divide heads={config.heads}"
    if not wrong and config.layout not in ("llama", "gpt2"):
        wrong = f"layout={config.layout!r} must be 'llama' or 'gpt2'"
    if not wrong and config.layout == "llama" and config.head_size % 2:
        wrong = f"size={config.head_size} of a head must be even: pairs are rotated"
    if wrong:
        raise ValueError(f"DecoderConfig: {wrong}.")
