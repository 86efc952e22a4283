"""How far our models are from transformers' in torch, configuration by configuration.

Needs torch and transformers. Models of random weights are compared on whole outputs; what
a model says at padding does not count.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fedcl import models
from fedcl.models._families import families
from tests.oracles import make_decoder_goldens, make_encoder_goldens
from tests.oracles.checkpoints import parameters
from tests.oracles.goldens import placed

SHAPE = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHER = {**SHAPE, "intermediate_size": 10}  # Than the goldens'.
TEXT = "The capital of France is Paris."
SENTENCES = ["Hello world", "A longer sentence about cats."]


class Row(NamedTuple):
    """One comparison, in float32."""

    family: str
    name: str
    output: str
    gap: float  # The largest |Δ|.
    size: float  # The largest |output| of theirs.
    config: Any  # Ours.


def row(family: str, name: str, output: str, config: Any, got: Any, want: Any) -> Row:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    gap = np.abs(got - want).max()
    return Row(family, name, output, float(gap), float(np.abs(want).max()), config)


def decoders(cases: Any = None) -> Iterator[Row]:
    """Logits [2, 20, V]; of other configurations than the goldens' by default."""
    live = make_decoder_goldens
    for name, config in live.random_cases(seed=5) if cases is None else cases:
        theirs, x = live.built(config, seed=6), live.tokens(config.vocab_size, seed=7)
        family = families()[config.model_type]
        ours = family.config(config.to_dict())
        params = placed(family, ours, live.weights(theirs))
        with torch.no_grad():
            want = theirs(torch.tensor(x, dtype=torch.long)).logits.numpy()
        logits = jax.jit(models.decoder(ours).apply)(params, x)
        yield row(config.model_type, name, "logits", ours, logits, want)


def encoders(
    *kinds: str, small: dict[str, int] = OTHER, act: str = "gelu_new"
) -> Iterator[Row]:
    """Encoders of text ("bert", "roberta"), images ("vit") and both ("clip")."""
    live = make_encoder_goldens
    for name, theirs, run in live.cases(small, act):
        kind = theirs.config.model_type
        if kinds and kind not in kinds:
            continue
        arrays = live.answers(live.shaken(theirs, seed=4), run)
        config = families()[kind].config(theirs.config.to_dict())
        weights = {k: v for k, v in arrays.items() if k[:3] not in ("in.", "out")}
        params = parameters(families()[kind], config, weights)
        compare = {"vit": _images, "clip": _both}.get(kind, _text)
        for output, got, want in compare(config, params, arrays):
            yield row(kind, name, output, config, got, want)


def _text(config: Any, params: Any, arrays: Any) -> Iterator[tuple[str, Any, Any]]:
    x = {"tokens": arrays["in.tokens"]}
    x |= {"types": arrays["in.types"]} if config.types > 1 else {}
    got = jax.jit(models.encoder(config).apply)(params, x)
    output = "logits" if "out.logits" in arrays else "tokens"
    want = arrays[f"out.{output}"]
    real = x["tokens"] != config.pad if want.ndim > 2 else slice(None)
    yield output, got[real], want[real]


def _images(config: Any, params: Any, arrays: Any) -> Iterator[tuple[str, Any, Any]]:
    apply = jax.jit(models.image_encoder(config).apply)
    yield "logits", apply(params, _rows_last(arrays)), arrays["out.logits"]


def _both(config: Any, params: Any, arrays: Any) -> Iterator[tuple[str, Any, Any]]:
    x = {"images": _rows_last(arrays), "tokens": arrays["in.tokens"]}
    out = jax.jit(models.clip(config).apply)(params, x)
    for output, got in (("logits", out.logits), ("image", out.images)):
        yield output, got, arrays[f"out.{output}"]
    yield "text", out.texts, arrays["out.text"]


def _rows_last(arrays: Any) -> jax.Array:
    """[B, channels, H, W] of torch to [B, H, W, channels]."""
    return jnp.asarray(arrays["in.images"].transpose(0, 2, 3, 1))


def smollm2(path: str) -> Row:
    """Logits of a sentence by the weights of a GGUF file, dequantised by both."""
    folder, name = os.path.split(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    base, words = models.load(path), models.tokenizer(path)
    models.check_tokenizer(words, base)
    ids = words(TEXT)["input_ids"]
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    got = base.model.apply(base.params, jnp.asarray([ids], jnp.int32))
    return row("llama", name, "logits", base.config, got, want)


def minilm(path: str) -> Row:
    """Mean-pooled embeddings of two sentences by the weights of a folder."""
    base = models.load(path, changes={"output": "embedding"})
    words = models.tokenizer(path)
    models.check_tokenizer(words, base)
    found = words(SENTENCES, padding=True)
    x = {"tokens": found["input_ids"], "segments": found["attention_mask"]}
    x = {name: jnp.asarray(value, jnp.int32) for name, value in x.items()}
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    given = {k: torch.tensor(found[k]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        h = theirs(**given).last_hidden_state
    w = given["attention_mask"][..., None]
    want = ((h * w).sum(1) / w.sum(1)).numpy()
    got = base.model.apply(base.params, x)
    return row("bert", "all-MiniLM-L6-v2", "embedding", base.config, got, want)


def described(config: Any) -> str:
    """A configuration in words: what is not the default."""
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            value = f"({described(value)})"
        if isinstance(value, tuple):
            value = "×".join(map(str, value))
        parts.append(f"{field.name} {value}")
    return ", ".join(parts)
