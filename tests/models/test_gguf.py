"""GGUF: the header against the gguf package's reader, tensors, tokenizer, damage."""

import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcl import models
from fedcl.models import _gguf
from fedcl.models._model import leaves
from tests.oracles import checkpoints_on_disk as disk

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
WEIGHTS = disk.tensors()
TEXTS = (
    "the cat's 12 hats, doesn't it?",
    "  two  spaces\tand a tab\r\n\n new lines ",
    "Ünïcödé, 日本語, 🎉!",
    "<|im_start|>user\nthe end<|im_end|>",
    "",
)


@pytest.fixture
def path(tmp_path):
    return disk.write_gguf(tmp_path / "tiny.gguf")


def same(a, b, tolerance=0.0):
    left, right = dict(leaves(a)), dict(leaves(b))
    assert left.keys() == right.keys()
    for name, x in left.items():
        np.testing.assert_allclose(x, right[name], rtol=0, atol=tolerance, err_msg=name)


def test_the_same_model_as_from_safetensors(path, tmp_path):
    base = models.load(path)
    plain = models.load(disk.write_folder(tmp_path / "plain"))
    same(base.params, plain.params)
    assert base.config == plain.config
    assert base.card["format"] == "gguf"
    assert base.card["licence_from"] == "general.license"
    assert base.card["tokenizer"] is None and base.card["unread"] == []


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_dequantised_as_the_gguf_package_has_it(tmp_path, kind):
    path = disk.write_gguf(tmp_path / "tiny.gguf", kind=kind)
    ours, theirs = _gguf.read(path), gguf.GGUFReader(path)
    assert len(theirs.tensors) == len(ours.stored)
    for t in theirs.tensors:
        want = gguf.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(_gguf.dequantised(ours, t.name), want)
    exact = models.load(disk.write_folder(tmp_path / "plain")).params
    steps = {"F16": 2e-3, "BF16": 8e-3, "Q8_0": 8e-3, "Q4_0": 0.2, "Q4_1": 0.1}
    same(models.load(path).params, exact, steps[kind])


def test_metadata_as_the_gguf_package_reads_them(tmp_path):
    values = {
        "add_token_list": ["a", "ü", ""],
        "add_token_scores": [0.5, -1.0, 2.0],
        "add_bos_token_id": 1,
        "add_add_bos_token": True,
        "add_rope_freq_base": 5e5,
    }
    path = disk.write_gguf(tmp_path / "tiny.gguf", **values)
    ours, theirs = _gguf.read(path).metadata, gguf.GGUFReader(path).fields
    named = {k: f.contents() for k, f in theirs.items() if not k.startswith("GGUF.")}
    assert ours == named
    assert _gguf.config(_gguf.read(path))["rope_theta"] == 5e5


def test_an_untied_head(tmp_path):
    weights = WEIGHTS | {"lm_head.weight": np.full((13, 32), 0.5, np.float32)}
    base = models.load(disk.write_gguf(tmp_path / "tiny.gguf", weights))
    assert not base.config.tied
    np.testing.assert_array_equal(base.params["head"]["kernel"], 0.5)


def test_qwen2_and_gpt2_undo_what_the_converter_did():
    rows = np.arange(12.0).reshape(6, 2)
    settings = {"num_attention_heads": 1}
    mend = {name: arch.mend for name, arch in _gguf.ARCHITECTURES.items()}
    q = disk.interleaved(rows, 1)
    np.testing.assert_array_equal(
        mend["llama"]("blk.0.attn_q.weight", q, settings), rows
    )
    np.testing.assert_array_equal(mend["qwen2"]("blk.0.attn_q.weight", q, settings), q)
    np.testing.assert_array_equal(mend["gpt2"]("blk.0.attn_qkv.weight", q, {}), q.T)
    np.testing.assert_array_equal(mend["gpt2"]("token_embd.weight", q, {}), q)


GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gpt2_name(name):
    *parts, last = name.removeprefix("transformer.").split(".")
    if parts[0] == "h":
        return f"blk.{parts[1]}.{GPT2['.'.join(parts[2:])]}.{last}"
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    return f"{top[parts[0]]}.{last}"


def write_gpt2(path, weights, head):
    """As llama.cpp does: linear layers turned to [out, in], and a head always there."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(3)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    for name, x in weights.items():
        linear = ".c_" in name and x.ndim == 2
        writer.add_tensor(gpt2_name(name), np.ascontiguousarray(x.T) if linear else x)
    if head is not None:
        writer.add_tensor("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return models.load(path, allow="any", remat=True)


PEFT_GPT2 = Path(__file__).parents[1] / "goldens" / "peft_gpt2" / "base"


@pytest.mark.parametrize("head", ["repeated", "absent"])
def test_gpt2_from_gguf_is_gpt2_from_safetensors(tmp_path, head):
    weights = load_file(PEFT_GPT2 / "model.safetensors")
    repeated = weights["transformer.wte.weight"] if head == "repeated" else None
    base = write_gpt2(tmp_path / "x.gguf", weights, repeated)
    plain = models.load(PEFT_GPT2, allow="any")
    same(base.params, plain.params)
    assert base.config == plain.config and base.config.tied
    assert base.card["unread"] == []


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_head_of_its_own_of_gpt2_is_read(tmp_path, kind):
    weights = load_file(PEFT_GPT2 / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    head = embedding[::-1].astype(kind)
    base = write_gpt2(tmp_path / "x.gguf", weights, head)
    assert not base.config.tied and base.card["unread"] == []
    np.testing.assert_array_equal(
        base.params["head"]["kernel"], head.T.astype(np.float32)
    )
    np.testing.assert_array_equal(base.params["embed"], embedding)
    tied = models.load(PEFT_GPT2, allow="any")
    tokens = jnp.array([[1, 5, 3]])
    got = base.model.apply(base.params, tokens)
    want = tied.model.apply(tied.params, tokens)[..., ::-1]
    np.testing.assert_allclose(got, want, atol=2e-2 if kind == np.float16 else 1e-5)


def test_a_head_in_another_type_that_is_the_embedding_is_tied(tmp_path):
    weights = load_file(PEFT_GPT2 / "model.safetensors")
    rounded = weights["transformer.wte.weight"].astype(np.float16)
    weights["transformer.wte.weight"] = rounded.astype(np.float32)
    base = write_gpt2(tmp_path / "x.gguf", weights, rounded)
    assert base.config.tied


DAMAGE = {
    "tensors": (lambda b: b[:-500], r"goes to byte \d+, the file to"),
    "header": (lambda b: b[:200], "within its header"),
    "start": (lambda b: b[:10], "too short"),
    "magic": (lambda b: b"GGML" + b[4:], "it starts with b'GGML'"),
    "version": (lambda b: b[:4] + struct.pack("<I", 99) + b[8:], "version 99"),
    "count": (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "damaged"),
    "text": (lambda b: b.replace(b"general.license", b"\xff" * 15), "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(path, what):
    change, match = DAMAGE[what]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"tiny.gguf is .*{match}"):
        models.load(path)


def test_what_cannot_be_expressed_is_refused(tmp_path):
    at = tmp_path / "tiny.gguf"
    refused = {
        "8 experts": {"add_expert_count": 8},
        "rotary scaling 'yarn'": {
            "add_rope_scaling_type": gguf.RopeScalingType.YARN,
        },
    }
    for match, metadata in refused.items():
        with pytest.raises(ValueError, match=match):
            models.load(disk.write_gguf(at, **metadata))
    linear = {
        "add_rope_scaling_type": gguf.RopeScalingType.LINEAR,
        "add_rope_scaling_factor": 2.0,
    }
    scaling = models.load(disk.write_gguf(at, **linear)).config.scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)
    with pytest.raises(ValueError, match="declares no licence"):
        models.load(disk.write_gguf(at, licence=None))
    broken = WEIGHTS | {"model.norm.weight": np.full(32, np.inf, np.float32)}
    with pytest.raises(
        ValueError, match=r"'model.norm.weight' in .*tiny.gguf holds NaN"
    ):
        models.load(disk.write_gguf(at, broken))


def test_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'mamba'; known are llama, qwen2, gpt2"):
        models.load(tmp_path / "x.gguf")


def trained():
    """A byte-level BPE of few merges, as GPT-2's, with two control tokens."""
    from tokenizers import decoders, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the cat has the hat and the end of it all"] * 3, trainer)
    return made


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The tokenizer, its JSON file, and a GGUF file with it."""
    import json

    made, folder = trained(), tmp_path_factory.mktemp("words")
    made.save(str(folder / "tokenizer.json"))
    merges = json.loads(made.to_str())["model"]["merges"]
    vocab = made.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    weights = WEIGHTS | {
        "model.embed_tokens.weight": np.ones((len(tokens), 32), np.float32)
    }
    at = disk.write_gguf(
        folder / "words.gguf",
        weights,
        add_tokenizer_model="gpt2",
        add_tokenizer_pre="gpt-2",
        add_token_list=tokens,
        add_token_merges=[" ".join(pair) for pair in merges],
        add_token_types=[3 if t.startswith("<|") else 1 for t in tokens],
        add_bos_token_id=0,
        add_eos_token_id=1,
        add_chat_template="{{ messages }}",
    )
    return made, folder / "tokenizer.json", at


def test_the_tokenizer_of_gguf_gives_the_same_ids(words):
    made, _, at = words
    found = models.tokenizer(at)
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids == made.encode(text).ids
        assert found.decode(ids) == text
    assert (found.bos_token, found.eos_token_id) == ("<|im_start|>", 1)
    assert found.chat_template == "{{ messages }}"


def test_numbers_are_split_as_the_metadata_say():
    from fedcl.models import _tokenizer

    cut = lambda pre, text: [
        part for part, _ in _tokenizer._splitting(pre).pre_tokenize_str(text)
    ]
    assert cut("gpt-2", "it 1234") == ["it", "Ġ1234"]
    assert cut("smollm", "it 1234") == ["it", "Ġ", "1", "2", "3", "4"]
    assert cut("llama-bpe", "it1234") == ["it", "123", "4"]
    assert cut("qwen2", "it12") == ["it", "1", "2"]


def test_a_tokenizer_is_known_by_its_fingerprint(words):
    made, json_file, at = words
    base = models.load(at)
    prints = [models.fingerprint(t) for t in (made, models.tokenizer(json_file))]
    assert {*prints, models.fingerprint(models.tokenizer(at))} == {
        base.card["tokenizer"]
    }
    models.check_tokenizer(made, base)
    other = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    )
    with pytest.raises(
        ValueError, match=r"\(2 tokens, .*the same ids mean other tokens"
    ):
        models.check_tokenizer(other, base)
    small = models.load(disk.write_gguf(at.with_name("small.gguf")))
    with pytest.raises(
        ValueError, match=r"has id 2\d\d, but .*small.gguf knows ids 0 to 12"
    ):
        models.check_tokenizer(made, small)


def test_the_fingerprint_of_a_folder(words, tmp_path):
    made, json_file, _ = words
    folder = disk.write_folder(tmp_path / "base")
    (folder / "tokenizer.json").write_text(json_file.read_text())
    assert models.load(folder).card["tokenizer"] == models.fingerprint(made)


def test_ids_out_of_the_vocabulary():
    models.check_ids(jnp.arange(6).reshape(2, 3), 6)
    with pytest.raises(ValueError, match=r"token id 6 at \(1, 2\) .* vocabulary of 6"):
        models.check_ids(jnp.arange(1, 7).reshape(2, 3), 6)


def test_tokenizers_that_are_not_there(tmp_path, words):
    with pytest.raises(ValueError, match="vocabulary of kind None"):
        models.tokenizer(disk.write_gguf(tmp_path / "none.gguf"))
    at = disk.write_gguf(
        tmp_path / "odd.gguf",
        add_tokenizer_model="gpt2",
        add_tokenizer_pre="odd",
        add_token_list=["a"],
        add_token_merges=["a a"],
    )
    with pytest.raises(ValueError, match="splits text by 'odd'; known are default"):
        models.tokenizer(at)
    with pytest.raises(FileNotFoundError, match="none could be had"):
        models.tokenizer(tmp_path)


@pytest.mark.skipif("FEDCL_SMOLLM2" not in os.environ, reason="needs the real weights")
def test_smollm2_speaks():
    """Its logits are compared with torch's in `test_smollm2_equals_torch`."""
    base = models.load(os.environ["FEDCL_SMOLLM2"])
    found = models.tokenizer(os.environ["FEDCL_SMOLLM2"])
    models.check_tokenizer(found, base)
    ids = found("The capital of France is")["input_ids"]
    logits = base.model.apply(base.params, jnp.asarray([ids], jnp.int32))
    assert found.decode(int(jnp.argmax(logits[0, -1]))) == " Paris"


@pytest.mark.skipif("FEDCL_SMOLLM2" not in os.environ, reason="needs the real weights")
@pytest.mark.filterwarnings("ignore")
def test_smollm2_equals_torch():
    pytest.importorskip("torch")
    import transformers

    from tests.oracles import live

    folder, name = os.path.split(os.environ["FEDCL_SMOLLM2"])
    words = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    found = models.tokenizer(os.environ["FEDCL_SMOLLM2"])
    for text in TEXTS:
        assert found(text)["input_ids"] == words(text)["input_ids"]
    assert live.smollm2(os.environ["FEDCL_SMOLLM2"]).gap < 2e-4
