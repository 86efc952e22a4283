"""Classified documents, as a text encoder reads them: tokens, or its features.

The features of a frozen encoder are computed once, before any client trains, and can be
kept on disk; a model on top of them is then as cheap as one on small images.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedcl._experiment_config import Encoder, Experiment, Labelled, Reader

if TYPE_CHECKING:
    from fedcl.models import Model

BATCH = 64  # Documents of one forward pass.


class Base(NamedTuple):
    """An encoder with its parameters and its tokenizer."""

    model: "Model"
    params: Any
    tokenizer: Any
    bos: Any
    eos: Any
    vocab: int


def rows(e: Experiment) -> dict[str, np.ndarray]:
    """The documents as a table: "x", features [M, D] or tokens [M, T], and "y"."""
    from fedcl import streams

    given = e.data.labelled
    assert given is not None
    found = list(_chosen(given))
    base = _base(given.reader)
    tokens = streams.tokenised(
        streams.text(found), base.tokenizer, bos=base.bos, eos=base.eos
    )
    y = np.asarray([given.classes.index(d["label"]) for d in found], np.int32)
    x = streams.packed(tokens, given.length, packing="one").columns["tokens"][:]
    if len(x) != len(y):
        raise ValueError(
            f"data.labelled: {len(y)} documents, but {len(x)} have tokens."
        )
    if isinstance(e.model, Encoder):
        return {"x": np.asarray(x, np.int32), "y": y}
    return {"x": _kept(given.reader, base, np.asarray(x, np.int32)), "y": y}


def _chosen(given: Labelled) -> Iterator[dict[str, str]]:
    """The first documents of each class, in the files' order."""
    from fedcl.streams._text import json_items

    folder = Path(given.path).expanduser()
    files = sorted(folder.glob(given.pattern))
    if not files:
        raise ValueError(
            f"data.labelled: {folder} holds no {given.pattern}. {given.hint}".strip()
        )
    left = dict.fromkeys(given.classes, given.per_class or 10**9)
    for file in files:
        for place, document in json_items(file, str(file)):
            text, label = _read(given, document, place)
            if text and left.get(label, 0):
                left[label] -= 1
                yield {"text": text, "label": label}


def _read(given: Labelled, document: Any, place: str) -> tuple[str, str]:
    """A document's text and its label."""
    known = isinstance(document, Mapping)
    parts = [document.get(f) or "" for f in given.fields] if known else [document]
    if not known or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"data.labelled: {place} is {document!r:.60}; it must be a mapping with "
            f"text in {', '.join(given.fields)}."
        )
    return "\n".join(parts).strip(), _one(document.get(given.label))


def _one(label: Any) -> str:
    """The only label of a document, "" if it has another number of them."""
    labels = label if isinstance(label, list) else [label]
    return str(labels[0]) if len(labels) == 1 else ""


def _base(r: Reader) -> Base:
    """The encoder that gives each row's embedding."""
    from fedcl import models
    from fedcl._experiment_text import Bytes, find

    key = jax.random.key(r.seed)
    if r.kind == "bytes":
        config = models.EncoderConfig(257, 16, 1, 2, 16, output="embedding", pad=256)
        model = models.encoder(config)
        return Base(model, model.init(key), Bytes(), False, False, 257)
    path = find(r)
    allow = models.PERMISSIVE if r.allow is None else r.allow
    loaded = models.load(path, changes={"output": "embedding"}, allow=allow)
    tokenizer = models.tokenizer(path)
    models.check_tokenizer(tokenizer, loaded)
    drawn = r.weights == "random"
    params = jax.jit(loaded.model.init)(key) if drawn else loaded.params
    vocab = loaded.config.vocab
    return Base(loaded.model, params, tokenizer, "[CLS]", "[SEP]", vocab)


def _kept(r: Reader, base: Base, x: np.ndarray) -> np.ndarray:
    """The features, from the cache if they are there."""
    if r.cache is None:
        return features(base, x)
    named = hashlib.sha256(x.tobytes())
    for leaf in jax.tree.leaves(base.params):
        named.update(np.asarray(leaf).tobytes())
    file = Path(r.cache).expanduser() / f"features-{named.hexdigest()[:24]}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part.npy")
        np.save(aside, features(base, x))
        aside.replace(file)
    return np.load(file, allow_pickle=False)


def features(base: Base, x: np.ndarray) -> np.ndarray:
    """Embeddings [M, D] of rows of tokens [M, T]."""
    apply = jax.jit(base.model.apply)
    parts = []
    for start in range(0, len(x), BATCH):
        part = x[start : start + BATCH]
        wide = np.pad(part, [(0, BATCH - len(part)), (0, 0)], mode="edge")
        parts.append(np.asarray(apply(base.params, jnp.asarray(wide)))[: len(part)])
    return np.concatenate(parts)


def model(e: Experiment, classes: int) -> "Model":
    """The encoder with a fresh head for each seed, everything else as loaded."""
    from fedcl import models
    from fedcl._experiment_text import find

    assert e.data.labelled is not None
    r = e.data.labelled.reader
    changes = {"output": "classes", "num_classes": classes}
    if r.kind == "bytes":
        config = models.EncoderConfig(
            257, 16, 1, 2, 16, output="classes", num_classes=classes, pad=256
        )
        return models.encoder(config)
    allow = models.PERMISSIVE if r.allow is None else r.allow
    loaded = models.load(find(r), changes=changes, allow=allow, key=jax.random.key(0))
    if r.weights == "random":
        return loaded.model
    init = lambda key: {**loaded.params, "head": loaded.model.init(key)["head"]}
    return loaded.model._replace(init=init)
