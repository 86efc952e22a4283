"""GGUF files: metadata, configuration and dequantised tensors, without llama.cpp.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks
are dequantised, and names translated, by the gguf package; its reader takes seconds
for the metadata of a large vocabulary, so that the header is read here.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedcl.models._safetensors import Array, Tensors

Config = dict[str, Any]
_SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY, _NESTED = 8, 9, 4
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


class Stored(NamedTuple):
    """A tensor in the file: its shape, its type's number, and its bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class Gguf(NamedTuple):
    """A file: `metadata`, and where each tensor lies in the mapped bytes `data`."""

    path: Path
    metadata: dict[str, Any]
    stored: dict[str, Stored]
    data: mmap.mmap


class _Cursor:
    """A place in the bytes that moves on as values are taken."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        self.need(count * struct.calcsize(f"<{code}"))
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return found

    def one(self, code: str) -> Any:
        return self.take(code)[0]

    def need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within its header")

    def text(self) -> str:
        size = self.one("Q")
        self.need(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.one(_SCALARS[kind])
        if kind != _ARRAY or depth > _NESTED:
            raise ValueError(f"a value of unknown type {kind}")
        inner, count = self.one("I"), self.one("Q")
        if inner in _SCALARS:
            return list(self.take(_SCALARS[inner], count))
        self.need(count)
        return [self.value(inner, depth + 1) for _ in range(count)]


def read(path: Path) -> Gguf:
    """The header of a GGUF file; the tensors stay on disk.

    Raises:
      ValueError: if it is not a GGUF file of version 2 or 3, or is damaged or
        truncated.
    """
    if path.stat().st_size < 24:
        raise ValueError(f"load: {path} is too short for a GGUF file; fetch it again.")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parsed(path, data)
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"load: {path} is truncated, damaged or no GGUF file: {error}. "
            "Fetch it again."
        ) from error


def _parsed(path: Path, data: mmap.mmap) -> Gguf:
    cursor = _Cursor(data)
    magic, version = bytes(cursor.take("B", 4)), cursor.one("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r} and version {version}")
    tensors, entries = cursor.one("Q"), cursor.one("Q")
    metadata = {}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.one("I"))
    infos = [_info(cursor) for _ in range(tensors)]
    align = int(metadata.get("general.alignment", 32))
    if align <= 0:
        raise ValueError(f"an alignment of {align}")
    start = -(-cursor.at // align) * align
    stored = {name: s._replace(start=start + s.start) for name, s in infos}
    for name, s in stored.items():
        if s.start + s.size > len(data):
            raise ValueError(
                f"tensor {name!r} goes to byte {s.start + s.size}, the file to "
                f"{len(data)}"
            )
    return Gguf(path, metadata, stored, data)


def _info(cursor: _Cursor) -> tuple[str, Stored]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, rank = cursor.text(), cursor.one("I")
    shape = tuple(reversed(cursor.take("Q", rank)))
    kind, offset = cursor.one("I"), cursor.one("Q")
    if kind not in [k.value for k in GGMLQuantizationType]:
        raise ValueError(f"tensor {name!r} is of unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if math.prod(shape) % block:
        raise ValueError(f"tensor {name!r} of shape {shape} in blocks of {block}")
    return name, Stored(shape, kind, offset, math.prod(shape) // block * size)


def dequantised(gguf: Gguf, name: str) -> Array:
    """One tensor in float32, whatever it is stored in."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    s = gguf.stored[name]
    kind = GGMLQuantizationType(s.kind)
    block, size = GGML_QUANT_SIZES[kind]
    width = s.shape[-1] // block * size if s.shape else size
    raw = np.frombuffer(gguf.data, np.uint8, s.size, s.start)
    try:
        return dequantize(raw.reshape(*s.shape[:-1], width), kind).reshape(s.shape)
    except NotImplementedError as error:
        raise ValueError(
            f"load: {name!r} in {gguf.path} is of type {kind.name}, which the gguf "
            "package cannot dequantise; take a file in Q8_0, F16 or another type."
        ) from error


class Architecture(NamedTuple):
    """How a GGUF architecture maps to Hugging Face's configuration and tensors.

    Attributes:
      kind: `model_type`.
      keys: `{key of config.json: key of the metadata, without the architecture}`.
      mend: `(name, array, config) -> array`, undoes what the converter did.
      repeats: whether the head is there even if it is the embedding again.
    """

    kind: str
    keys: Mapping[str, str]
    mend: Callable[[str, Array, Config], Array]
    repeats: bool = False


_LLAMA = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


def _unpermuted(name: str, x: Array, config: Config) -> Array:
    """Rows of q and k, which llama.cpp orders for interleaved rotary pairs."""
    heads = config["num_attention_heads"]
    if name.endswith(("attn_k.weight", "attn_k.bias")):
        heads = config.get("num_key_value_heads", heads)
    elif not name.endswith(("attn_q.weight", "attn_q.bias")):
        return x
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _conv1d(name: str, x: Array, config: Config) -> Array:
    """GPT-2's linear layers, which Hugging Face keeps as [in, out]."""
    linear = x.ndim == 2 and (".attn_" in name or ".ffn_" in name)
    return x.T if linear else x


def _as_is(name: str, x: Array, config: Config) -> Array:
    return x


ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, _unpermuted),
    "qwen2": Architecture("qwen2", _LLAMA, _as_is),
    "gpt2": Architecture("gpt2", _GPT2, _conv1d, repeats=True),
}


def config(gguf: Gguf) -> Config:
    """The dict that config.json would hold.

    Raises:
      ValueError: for an unknown architecture, missing keys, or what is not supported:
        experts, and rotary scaling other than linear.
    """
    arch = architecture(gguf)
    prefix = f"{gguf.metadata['general.architecture']}."
    own = {
        k[len(prefix) :]: v for k, v in gguf.metadata.items() if k.startswith(prefix)
    }
    _refuse(gguf, own)
    found = {k: _plain(own[at]) for k, at in arch.keys.items() if at in own}
    optional = {"head_dim", "rope_theta", "num_key_value_heads", "n_inner"}
    absent = [arch.keys[k] for k in arch.keys.keys() - found.keys() - optional]
    if absent or EMBEDDING not in gguf.stored:
        raise ValueError(
            f"load: {gguf.path} lacks {', '.join(sorted(absent)) or 'token_embd.weight'}"
            f" of architecture {prefix[:-1]!r}."
        )
    special = {
        name: gguf.metadata[f"tokenizer.ggml.{name}"]
        for name in ("bos_token_id", "eos_token_id")
        if f"tokenizer.ggml.{name}" in gguf.metadata
    }
    tied = HEAD not in gguf.stored or (arch.repeats and _repeated(gguf))
    vocab = gguf.stored[EMBEDDING].shape[0]
    shape = {"vocab_size": vocab, "tie_word_embeddings": tied}
    return {"model_type": arch.kind, **found, **_scaling(own), **special, **shape}


def _repeated(gguf: Gguf) -> bool:
    """Whether the head is the embedding, bit by bit."""
    one, other = gguf.stored[EMBEDDING], gguf.stored[HEAD]
    if one.shape != other.shape:
        return False
    if one.kind != other.kind:
        return np.array_equal(dequantised(gguf, EMBEDDING), dequantised(gguf, HEAD))
    raw = lambda s: np.frombuffer(gguf.data, np.uint8, s.size, s.start)
    return np.array_equal(raw(one), raw(other))


def architecture(gguf: Gguf) -> Architecture:
    """The architecture of a file, or an error that lists those known."""
    name = gguf.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"load: {gguf.path} is of architecture {name!r}; known are "
            f"{', '.join(ARCHITECTURES)}. Take the safetensors files of the model."
        )
    return ARCHITECTURES[name]


def tensors(gguf: Gguf, settings: Config, names: list[str]) -> Tensors:
    """The tensors under Hugging Face's names, as far as `names` has them.

    Args:
      gguf: from `read`.
      settings: from `config`.
      names: the names that the model's family wants; others keep GGUF's.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = architecture(gguf)
    known = {text: number for number, text in MODEL_ARCH_NAMES.items()}
    number = known[gguf.metadata["general.architecture"]]
    layers = settings.get("num_hidden_layers") or settings.get("n_layer", 0)
    table = get_tensor_name_map(number, layers)
    found = {name: table.get_name(name, (".weight", ".bias")) for name in names}
    at = {name: there for name, there in found.items() if there in gguf.stored}
    tied = {HEAD} if settings["tie_word_embeddings"] else set()
    taken = {*at.values(), *tied}
    at |= {name: name for name in gguf.stored if name not in taken}

    def read(name: str) -> Array:
        return arch.mend(at[name], dequantised(gguf, at[name]), settings)

    shapes = {name: _shape(arch, gguf, at[name], settings) for name in at}
    return Tensors(shapes, dict.fromkeys(at, gguf.path), read)


def _shape(
    arch: Architecture, gguf: Gguf, name: str, settings: Config
) -> tuple[int, ...]:
    empty = np.broadcast_to(np.int8(0), gguf.stored[name].shape)
    return arch.mend(name, empty, settings).shape


def _plain(x: Any) -> Any:
    """A float32 as it was written down: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def _scaling(own: Mapping[str, Any]) -> Config:
    if own.get("rope.scaling.type", "none") == "none":
        return {}
    factor = _plain(own.get("rope.scaling.factor", 1.0))
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _refuse(gguf: Gguf, own: Mapping[str, Any]) -> None:
    scaling = own.get("rope.scaling.type", "none")
    wrong = {
        f"{own.get('expert_count')} experts": bool(own.get("expert_count")),
        f"rotary scaling {scaling!r}": scaling not in ("none", "linear"),
        "rotary factors (rope_freqs.weight)": "rope_freqs.weight" in gguf.stored,
        "heads that differ by layer": isinstance(own.get("attention.head_count"), list),
    }
    found = [what for what, true in wrong.items() if true]
    if found:
        raise ValueError(
            f"load: {gguf.path} has {', '.join(found)}, which is not supported from "
            "GGUF; take the safetensors files of the model."
        )
