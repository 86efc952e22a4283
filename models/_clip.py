r"""A dual encoder of images and texts (CLIP).

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, https://arxiv.org/abs/2103.00020: with :math:`u_i` the unit-length
embedding of image i and :math:`v_j` that of text j, and a learned temperature,

.. math:: logits_{ij} = e^{s} \langle u_i, v_j \rangle.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedcl.models._attention import (
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
from fedcl.models._model import Model, Params, from_nnx
from fedcl.models._pooling import first_of, unit
from fedcl.models._vit import Block, ViT, ViTConfig, layer_norm


class ClipOutput(NamedTuple):
    """What a dual encoder gives; None for what the input leaves out."""

    logits: jax.Array | None  # [images, texts]
    images: jax.Array | None  # [images, E], of unit length.
    texts: jax.Array | None  # [texts, E], of unit length.


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The architecture of CLIP's encoder of texts.

    Attributes:
      vocab: V, tokens.
      width: D, of a token's vector.
      depth: L, blocks.
      heads: attention heads; must divide `width`.
      hidden: width of the MLP.
      projection: E, width of the embedding.
      context: the longest text.
      activation: of the MLP, a name of Hugging Face's.
      eps: added to variances.
      eos: the token that ends a text, whose vector is the text's; None: the token of
        the highest id in the row, as in the first CLIP.
      unit: whether embeddings are scaled to unit length.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    projection: int
    context: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    eos: int | None = None
    unit: bool = True

    def __post_init__(self) -> None:
        counts = ("vocab", "width", "depth", "heads", "hidden", "projection", "context")
        check_positive("ClipTextConfig", self, *counts)
        check_heads("ClipTextConfig", self.width, self.heads)
        check_one_of("ClipTextConfig", "activation", self.activation, ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The architecture of a dual encoder.

    Attributes:
      image: the encoder of images; its output is "embedding", with a projection.
      text: the encoder of texts, projected to the same width.
      logit_scale: s at first.
    """

    image: ViTConfig
    text: ClipTextConfig
    logit_scale: float = math.log(1 / 0.07)

    def __post_init__(self) -> None:
        if self.image.output != "embedding" or not self.image.projection:
            raise ValueError(
                "ClipConfig: `image` must have output='embedding' and a projection, got "
                f"output={self.image.output!r}, projection={self.image.projection}."
            )
        if self.image.projection != self.text.projection:
            raise ValueError(
                "ClipConfig: images and texts must be projected to the same width, got "
                f"{self.image.projection} and {self.text.projection}."
            )


class ClipText(nnx.Module):
    """Causal pre-norm blocks; the vector of the token that ends a text, projected."""

    def __init__(
        self,
        config: ClipTextConfig,
        numbers: Numbers,
        remat: bool,
        unroll: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        options: Any = {"numbers": numbers, "rngs": rngs}
        wide, zeros = config.width, lambda *s: nnx.Param(jnp.zeros(s, numbers.params))
        sizes = (wide, config.heads, config.hidden, config.activation, config.eps)
        block = lambda rngs: Block(*sizes, numbers=numbers, rngs=rngs)
        rest: Any = {"use_bias": False, "param_dtype": numbers.params, "rngs": rngs}
        self.embed = zeros(config.vocab, wide)
        self.position = zeros(config.context, wide)
        self.blocks = stacked(block, config.depth, rngs)
        self.norm = layer_norm(wide, config.eps, **options)
        self.project = nnx.Linear(wide, config.projection, **rest)
        self.config, self.numbers = config, numbers
        self.remat, self.unroll = remat, unroll

    def __call__(self, x: Any) -> jax.Array:
        return self.features(x)

    def features(self, x: Any) -> jax.Array:
        """The embedding of each text, [B, E] float32."""
        return self.pool(self.norm(self.run(self.embedded(x), x)), x)

    def embedded(self, x: Any) -> jax.Array:
        """The tokens' vectors before the first block, [B, T, D]."""
        text = read_text(x, self.config.vocab)
        self._check_length(text)
        h = vectors_of(self.embed[...], text.tokens)
        h = h + jnp.take(self.position[...], text.positions, axis=0, mode="fill")
        return h.astype(self.numbers.compute or h.dtype)

    def run(self, h: jax.Array, x: Any) -> jax.Array:
        """Vectors [B, T, D] through the blocks; no token sees a later one."""
        # A soft prompt has no learned position: with it rows may be longer than those.
        sight = Sight(visible(read_text(x, self.config.vocab), causal=True))
        return run_blocks(self.blocks, h, sight, remat=self.remat, unroll=self.unroll)

    def pool(self, h: jax.Array, x: Any) -> jax.Array:
        """The end's vector projected, [B, E] float32."""
        tokens, eos = read_text(x, self.config.vocab).tokens, self.config.eos
        end = jnp.max(tokens, axis=1, keepdims=True) if eos is None else eos
        row = self.project(first_of(h, tokens == end).astype(jnp.float32))
        return unit(row) if self.config.unit else row

    def _check_length(self, text: Text) -> None:
        length, most = text.tokens.shape[1], self.config.context
        if length > most:
            raise ValueError(
                f"apply: texts of {length} tokens, but the model has positions for "
                f"{most} (`context`); cut them, and let each end with its last token."
            )


class Clip(nnx.Module):
    """Both encoders and the temperature."""

    def __init__(
        self,
        config: ClipConfig,
        numbers: Numbers,
        remat: bool,
        unroll: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.image = ViT(config.image, numbers, remat, unroll, rngs=rngs)
        self.text = ClipText(config.text, numbers, remat, unroll, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros((), numbers.params))

    def __call__(self, x: Mapping[str, Any]) -> ClipOutput:
        _check_input(x)
        images = self.image(x["images"]) if "images" in x else None
        texts = self.text(x["tokens"]) if "tokens" in x else None
        if images is None or texts is None:
            return ClipOutput(None, images, texts)
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        return ClipOutput(scale * (images @ texts.T), images, texts)


def clip(
    config: ClipConfig,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """A dual encoder of images and texts.

    Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", 2021, https://arxiv.org/abs/2103.00020.

    Args:
      config: the architecture.
      dtype: what is computed in, such as `jnp.bfloat16`; None: the parameters' type.
        Norms, softmaxes, embeddings and logits are float32 in any case.
      param_dtype: the type of the parameters that `init` draws.
      remat: keep nothing of a block for the backward pass but what goes in.
      unroll: write the blocks out instead of scanning them.

    Returns:
      A model with parameters `image`, `text` and `logit_scale`. `apply` takes a dict
      with "images" [B, H, W, channels], "tokens" [B', T] or both, and gives
      `ClipOutput(logits [B, B'], images [B, E], texts [B', E])`. Each half is a model
      of its own: `image_encoder(config.image)` on `params["image"]` and
      `clip_text(config.text)` on `params["text"]`.

    Raises:
      ValueError: for a configuration that does not fit together.

    Cost: the two encoders run one after the other; what stays frozen can be run once
    and its embeddings kept.

    >>> image = ViTConfig((4, 4, 1), 2, 8, 1, 2, 16, projection=6, unit=True)
    >>> model = clip(ClipConfig(image, ClipTextConfig(9, 8, 1, 2, 16, projection=6)))
    >>> params = model.init(jax.random.key(0))
    >>> x = {"images": jnp.ones((3, 4, 4, 1)), "tokens": jnp.array([[1, 5, 8], [1, 8, 0]])}
    >>> model.apply(params, x).logits.shape
    (3, 2)
    """
    numbers = Numbers(param_dtype, dtype)
    build = lambda rngs: Clip(config, numbers, remat, unroll, rngs=rngs)

    def init(key: jax.Array, shapes: Params) -> Params:
        params = drawn_init(key, shapes, _deviation)
        scale = jnp.full((), config.logit_scale, shapes["logit_scale"].dtype)
        return {**params, "logit_scale": scale}

    return from_nnx(build, init=init)


def clip_text(
    config: ClipTextConfig,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    unroll: bool = False,
) -> Model:
    """CLIP's encoder of texts alone, [B, T] int32 to embeddings [B, E].

    Args:
      config: the architecture.
      dtype: as in `clip`, like the rest.

    >>> model = clip_text(ClipTextConfig(9, 8, 1, 2, 16, projection=6))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.array([[1, 5, 8], [1, 8, 0]])).shape
    (2, 6)
    """
    numbers = Numbers(param_dtype, dtype)
    build = lambda rngs: ClipText(config, numbers, remat, unroll, rngs=rngs)
    return from_nnx(build, init=lambda key, shapes: drawn_init(key, shapes, _deviation))


def _deviation(path: str, leaf: Any) -> float | None:
    drawn = ("kernel", "embed", "position", "class_token")
    return EMBEDDING_STD if path.endswith(drawn) else None


def _check_input(x: Any) -> None:
    keys = set(x) if isinstance(x, Mapping) else None
    if not keys or not keys <= {"images", "tokens"}:
        given = type(x).__name__ if keys is None else ", ".join(sorted(keys)) or "none"
        raise ValueError(
            "apply: a dual encoder reads a dict with images, tokens or both, got "
            f"{given}."
        )
