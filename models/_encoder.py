"""Text encoders: the BERT and RoBERTa families.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019, https://arxiv.org/abs/1810.04805: post-norm blocks

    h <- Norm(h + Attention(h)),    h <- Norm(h + down(gelu(up(h))))

over words, positions and types; every token sees all of its segment. Sentence
embeddings as means of tokens: Reimers and Gurevych, "Sentence-BERT", 2019,
https://arxiv.org/abs/1908.10084.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedcl.models._attention import (
    Attention,
    FeedForward,
    Numbers,
    Sight,
    Text,
    read_text,
    run_blocks,
    stacked,
    vectors_of,
    visible,
)
from fedcl.models._config import ACTIVATIONS, check_heads, check_one_of, check_positive
from fedcl.models._init import EMBEDDING_STD, drawn_init
from fedcl.models._model import Model, from_nnx
from fedcl.models._pooling import first_of, mean_of, unit

OUTPUTS = ("tokens", "embedding", "classes", "masked_lm")
POOLS = ("mean", "cls", "pooler")
LAYOUTS = ("bert", "roberta", "xlm-roberta")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of a text encoder, and what it gives.

    Attributes:
      vocab: V, tokens.
      width: D, of a token's vector.
      depth: L, blocks.
      heads: attention heads.
      hidden: width of the MLP.
      output: "tokens" [B, T, D]; "embedding" of each row [B, D]; "classes", logits
        [B, Y] from the embedding; "masked_lm", logits [B, T, V] of every token.
      pool: the embedding of a row: "mean" of its real tokens, "cls", the first of
        them, or "pooler", tanh of a linear layer of the first.
      num_classes: Y.
      unit: whether the embeddings of rows are scaled to unit length.
      context: the longest row, or the longest document in a packed one.
      types: kinds of tokens (first and second sentence).
      activation: of the MLP, a name of Hugging Face's.
      eps: added to variances.
      pad: where the input has no "segments", tokens of this id are padding; None:
        all are real.
      offset: rows of the table of positions before the first one's (RoBERTa's 2).
      layout: whose names checkpoints use: "bert", "roberta" or "xlm-roberta".
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    output: Literal["tokens", "embedding", "classes", "masked_lm"] = "tokens"
    pool: Literal["mean", "cls", "pooler"] = "mean"
    num_classes: int | None = None
    unit: bool = False
    context: int = 512
    types: int = 2
    activation: str = "gelu"
    eps: float = 1e-12
    pad: int | None = 0
    offset: int = 0
    layout: Literal["bert", "roberta", "xlm-roberta"] = "bert"

    def __post_init__(self) -> None:
        counts = ("vocab", "width", "depth", "heads", "hidden", "context", "types")
        check_positive("EncoderConfig", self, *counts)
        check_heads("EncoderConfig", self.width, self.heads)
        check_one_of("EncoderConfig", "output", self.output, OUTPUTS)
        check_one_of("EncoderConfig", "pool", self.pool, POOLS)
        check_one_of("EncoderConfig", "activation", self.activation, ACTIVATIONS)
        check_one_of("EncoderConfig", "layout", self.layout, LAYOUTS)
        if (self.output == "classes") != (self.num_classes is not None):
            raise ValueError(
                "EncoderConfig: `num_classes` goes with output='classes', got "
                f"num_classes={self.num_classes} and output={self.output!r}."
            )

    @property
    def pooled(self) -> bool:
        """Whether a row is one vector."""
        return self.output in ("embedding", "classes")


class Block(nnx.Module):
    """A post-norm block, [B * T, D] -> [B * T, D]."""

    def __init__(self, config: EncoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> None:
        options: Any = {"numbers": numbers, "rngs": rngs}
        act = ACTIVATIONS[config.activation]
        self.attention = Attention(config.width, config.heads, **options)
        self.norm1 = _norm(config, numbers, rngs)
        self.mlp = FeedForward(config.width, config.hidden, act, **options)
        self.norm2 = _norm(config, numbers, rngs)

    def __call__(self, h: jax.Array, sight: Sight) -> jax.Array:
        h = self.norm1(h + self.attention(h, sight).astype(h.dtype)).astype(h.dtype)
        return self.norm2(h + self.mlp(h).astype(h.dtype)).astype(h.dtype)


class MaskedLM(nnx.Module):
    """Logits of every token, V of them tied to the embedding, [B, T, D] -> [B, T, V]."""

    def __init__(self, config: EncoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> None:
        wide = config.width
        self.dense = nnx.Linear(wide, wide, rngs=rngs, **numbers.options())
        self.norm = _norm(config, numbers, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab, numbers.params))
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, h: jax.Array, embed: jax.Array) -> jax.Array:
        h = self.norm(self.activation(self.dense(h)))
        dims = (((h.ndim - 1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(
            h, embed.astype(h.dtype), dims, preferred_element_type=jnp.float32
        )
        return logits + self.bias[...].astype(jnp.float32)[None, None]


class Encoder(nnx.Module):
    """Embeddings, `depth` blocks stacked on a leading axis, and what is asked of them."""

    def __init__(
        self,
        config: EncoderConfig,
        numbers: Numbers,
        remat: bool,
        unroll: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        table = lambda rows: nnx.Param(jnp.zeros((rows, config.width), numbers.params))
        self.embed = table(config.vocab)
        self.position = table(config.context + config.offset)
        self.type = table(config.types)
        self.embed_norm = _norm(config, numbers, rngs)
        self.blocks = stacked(lambda r: Block(config, numbers, r), config.depth, rngs)
        self._outputs(config, numbers, rngs)
        self.config, self.numbers = config, numbers
        self.remat, self.unroll = remat, unroll

    def _outputs(self, config: EncoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> None:
        wide = config.width
        if config.pooled and config.pool == "pooler":
            self.pooler = nnx.Linear(wide, wide, rngs=rngs, **numbers.options())
        if config.num_classes is not None:
            # In float32, whatever the blocks compute in.
            rest = {"param_dtype": numbers.params, "rngs": rngs}
            self.head = nnx.Linear(wide, config.num_classes, **rest)
        if config.output == "masked_lm":
            self.masked_lm = MaskedLM(config, numbers, rngs)

    def __call__(self, x: Any) -> jax.Array:
        h = self.features(x)
        if self.config.output == "classes":
            return self.head(h)
        if self.config.output == "masked_lm":
            return self.masked_lm(h, self.embed[...])
        return h

    def features(self, x: Any) -> jax.Array:
        """What the outputs are made of: [B, D] float32 if rows are pooled, or [B, T, D]."""
        h = self.run(self.embedded(x), x)
        return self.pool(h, x) if self.config.pooled else h

    def embedded(self, x: Any) -> jax.Array:
        """The tokens' vectors before the first block, [B, T, D]."""
        text, types = self._read(x)
        real = 1 if text.segments is None else (text.segments > 0)
        places = text.positions * real + self.config.offset
        h = vectors_of(self.embed[...], text.tokens)
        h = h + jnp.take(self.position[...], places, axis=0, mode="fill")
        kind = self.type[...]
        h = h + (kind[:1][None] if types is None else vectors_of(kind, types))
        return self.embed_norm(h).astype(self.numbers.compute or h.dtype)

    def run(self, h: jax.Array, x: Any) -> jax.Array:
        """Vectors [B, T, D] through the blocks; who sees whom is said by `x`."""
        sight = Sight(visible(self._read(x)[0], causal=False))
        return run_blocks(self.blocks, h, sight, remat=self.remat, unroll=self.unroll)

    def pool(self, h: jax.Array, x: Any) -> jax.Array:
        """One vector a row, [B, D] float32."""
        segments = self._read(x)[0].segments
        real = jnp.ones(h.shape[:2], bool) if segments is None else segments > 0
        row = mean_of(h, real) if self.config.pool == "mean" else first_of(h, real)
        if self.config.pool == "pooler":
            row = jnp.tanh(self.pooler(row))
        row = row.astype(jnp.float32)
        return unit(row) if self.config.unit else row

    def _read(self, x: Any) -> tuple[Text, jax.Array | None]:
        """The tokens, with padding marked, and their types."""
        parts = dict(x) if isinstance(x, Mapping) else {"tokens": x}
        types = parts.pop("types", None)
        text = read_text(parts, self.config.vocab)
        if types is not None and jnp.shape(types) != text.tokens.shape:
            raise ValueError(
                f"apply: types have the shape {jnp.shape(types)}, but tokens "
                f"{text.tokens.shape}; give one type for each token."
            )
        if text.segments is not None:
            return text, types
        self._check_length(text)
        if self.config.pad is not None:
            marked = (text.tokens != self.config.pad).astype(jnp.int32)
            text = read_text({**parts, "segments": marked}, self.config.vocab)
        return text, types

    def _check_length(self, text: Text) -> None:
        """Positions end; a row of documents, in which they restart, may be longer."""
        length, most = text.tokens.shape[1], self.config.context
        if length > most:
            raise ValueError(
                f"apply: rows of {length} tokens, but the model has positions for {most} "
                "(`context`); cut the rows into documents of at most that."
            )


def _norm(config: EncoderConfig, numbers: Numbers, rngs: nnx.Rngs) -> nnx.LayerNorm:
    options: Any = {"epsilon": config.eps, "rngs": rngs, **numbers.options()}
    return nnx.LayerNorm(config.width, use_fast_variance=False, **options)


def _deviation(path: str, leaf: Any) -> float | None:
    drawn = ("kernel", "embed", "position", "type")
    return EMBEDDING_STD if path.endswith(drawn) else None


def encoder(
    config: EncoderConfig,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """A transformer that reads text: BERT, RoBERTa, MiniLM and their like.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", 2019, https://arxiv.org/abs/1810.04805. It gives what
    `config.output` says; the same network with another output is built from
    `dataclasses.replace(config, output="classes", num_classes=10)`. There is no
    dropout.

    Args:
      config: the architecture.
      dtype: what is computed in, such as `jnp.bfloat16`; None: the parameters' type.
        Norms, softmaxes, embeddings of rows and logits are float32 in any case.
      param_dtype: the type of the parameters that `init` draws.
      remat: keep nothing of a block for the backward pass but what goes in.
      unroll: write the blocks out instead of scanning them.

    Returns:
      A model with parameters `embed`, `position`, `type`, `embed_norm`, `blocks` (each
      with a leading axis [depth, ...]), and as the output asks `pooler`, `head` or
      `masked_lm`. `apply` takes tokens [B, T], or a dict of "tokens", optionally
      "segments" (0 is padding; packed documents see themselves alone; a pooled row is
      one document), "positions" and "types". With classes, `outputs` gives the
      embeddings as features.

    Raises:
      ValueError: for a configuration that does not fit together.

    Cost: scanned blocks compile in the same time whatever the depth.

    >>> config = EncoderConfig(9, 8, 2, 2, 16, output="classes", num_classes=3)
    >>> model = encoder(config)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.array([[1, 4, 2, 0], [1, 5, 6, 2]])).shape
    (2, 3)
    """
    numbers = Numbers(param_dtype, dtype)
    build = lambda rngs: Encoder(config, numbers, remat, unroll, rngs=rngs)
    return from_nnx(build, init=lambda key, shapes: drawn_init(key, shapes, _deviation))
