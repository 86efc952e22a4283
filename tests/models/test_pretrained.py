"""Loading and saving: every leaf in its place, licences, and what is wrong by name."""

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

from fedcl import models
from fedcl.models._family import Family, Source, linear, under
from fedcl.models._model import leaves
from tests.oracles import checkpoints_on_disk as disk
from tests.oracles.goldens import placed

WEIGHTS = disk.tensors()


@pytest.fixture
def folder(tmp_path):
    return disk.write_folder(tmp_path / "base")


def expected(weights):
    family = models.families()["llama"]
    config = family.config(disk.CONFIG)
    return dict(leaves(placed(family, config, weights)))


def assert_same(params, wanted, dtype=None):
    found = dict(leaves(params))
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        want = wanted[path] if dtype is None else wanted[path].astype(dtype)
        assert leaf.dtype == want.dtype
        np.testing.assert_array_equal(leaf, want, err_msg=path)


def test_every_leaf_is_in_its_place_and_the_model_runs(folder):
    base = models.load(folder)
    assert_same(base.params, expected(WEIGHTS))
    logits = base.model.apply(base.params, jnp.ones((1, 3), jnp.int32))
    assert logits.shape == (1, 3, 13) and bool(jnp.isfinite(logits).all())


def test_the_card_says_what_was_loaded(folder):
    card = models.load(folder).card
    (digest,) = card["sha256"].values()
    assert json.loads(json.dumps(card)) == card
    assert card["licence"] == "apache-2.0" and card["licence_from"] == "README.md"
    assert card["source"] == str(folder) and card["format"] == "safetensors"
    assert len(digest) == 64 and card["tokenizer"] is None
    assert card["parameters"] == sum(x.size for x in WEIGHTS.values())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_parameters_are_cast(folder, name):
    base = models.load(folder, param_dtype=jnp.dtype(name))
    assert_same(base.params, expected(WEIGHTS), name)


def test_a_checkpoint_in_bfloat16_stays_so(tmp_path):
    half = {name: x.astype(jnp.bfloat16) for name, x in WEIGHTS.items()}
    base = models.load(disk.write_folder(tmp_path / "half", half))
    assert_same(base.params, expected(WEIGHTS), jnp.bfloat16)


def test_names_without_the_prefix_and_with_buffers(tmp_path):
    bare = {name.removeprefix("model."): x for name, x in WEIGHTS.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    base = models.load(disk.write_folder(tmp_path / "bare", bare))
    assert_same(base.params, expected(WEIGHTS))
    assert base.card["unread"] == ["layers.0.self_attn.rotary_emb.inv_freq"]


def test_in_parts_and_saved_in_parts_and_in_one(folder, tmp_path):
    base = models.load(folder)
    parts = models.save(tmp_path / "parts", base, max_bytes=20_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(names) > 2 and set(index["weight_map"].values()) == set(names)
    assert set(index["weight_map"]) == set(WEIGHTS)
    again = models.load(parts)
    assert_same(again.params, expected(WEIGHTS))
    assert again.config == base.config and again.card["licence"] == "apache-2.0"
    models.save(parts, again)  # In one file, over the parts.
    assert sorted(p.name for p in parts.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    stored = load_file(parts / "model.safetensors")
    assert stored.keys() == WEIGHTS.keys()
    for name, x in stored.items():
        np.testing.assert_array_equal(x, WEIGHTS[name])


def test_laid_over_a_mesh_by_rules(folder):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    rules = [
        (r"(q|k|v|gate|up)/kernel", PartitionSpec(None, None, "model")),
        (r"down/kernel", PartitionSpec(None, "model")),
    ]
    base = models.load(folder, mesh=mesh, rules=rules)
    assert_same(base.params, expected(WEIGHTS))
    block = base.params["blocks"]
    shard = lambda x: x.addressable_shards[0].data.shape
    assert shard(block["attention"]["q"]["kernel"]) == (2, 32, 16)
    assert shard(block["mlp"]["down"]["kernel"]) == (2, 32, 32)
    assert shard(block["attention"]["out"]["kernel"]) == (2, 32, 32)
    assert base.params["embed"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match="'embed'.*cannot be laid over the mesh"):
        models.load(folder, mesh=mesh, rules=[("embed", PartitionSpec("data"))])
    with pytest.raises(ValueError, match="pass it"):
        models.load(folder, rules=rules)


def test_one_tensor_at_a_time(folder, monkeypatch):
    """Of the layers that are stacked, no more are in memory than two."""
    from fedcl.models import _pretrained

    alive, tensor = [], _pretrained._tensor

    def watched(plan, source, name, dtype):
        found = tensor(plan, source, name, dtype)
        if "{layer}" in source.name:
            alive.append(weakref.ref(found))
        assert sum(one() is not None for one in alive) <= 2
        return found

    monkeypatch.setattr(_pretrained, "_tensor", watched)
    models.load(folder)
    assert len(alive) == 2 * len(disk.LAYER)


class Config(NamedTuple):
    width: int = 3
    classes: int = 2


class Net(nnx.Module):
    def __init__(self, config, *, rngs):
        self.body = nnx.Linear(config.width, config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x))


OWN = Family(
    kind="own",
    config=lambda raw: Config(raw["width"], raw["classes"]),
    hf_config=lambda c: {"model_type": "own", "width": c.width, "classes": c.classes},
    build=lambda c: models.from_nnx(lambda rngs: Net(c, rngs=rngs)),
    sources=lambda c: {
        **under("body", linear("body")),
        **under("head", linear("head")),
    },
    fresh=("head/",),
)


@pytest.fixture
def own(tmp_path):
    config = {"model_type": "own", "width": 3, "classes": 2, "license": "MIT"}
    base = models.from_nnx(lambda rngs: Net(Config(), rngs=rngs))
    params = base.init(jax.random.key(1))
    given = models.Pretrained(base, params, Config(), {"licence": "mit"}, OWN)
    out = models.save(tmp_path / "own", given)
    (out / "config.json").write_text(json.dumps(config))
    (out / "README.md").unlink()
    return out, params


def test_a_family_of_ones_own_and_a_new_head(own):
    out, params = own
    base = models.load(out, family=OWN)
    assert_same(base.params, dict(leaves(params)))
    assert base.card["licence_from"] == "config.json" and base.card["drawn"] == []
    stored = load_file(out / "model.safetensors")
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"classes": 5}))
    with pytest.raises(ValueError, match="pass a `key`"):
        models.load(out, family=OWN)
    new = models.load(out, family=OWN, key=jax.random.key(0))
    assert new.card["drawn"] == ["head/bias", "head/kernel"]
    assert new.params["head"]["kernel"].shape == (3, 5)
    np.testing.assert_array_equal(
        new.params["body"]["kernel"], params["body"]["kernel"]
    )
    save_file(
        {n: stored[n] for n in ("body.weight", "body.bias")}, out / "model.safetensors"
    )
    assert models.load(out, family=OWN, key=jax.random.key(0)).card["unread"] == []


def test_a_family_that_forgets_a_leaf(own):
    gap = OWN._replace(
        fresh=(), sources=lambda c: {"head/kernel": Source("head.weight")}
    )
    with pytest.raises(ValueError, match="body/bias"):
        models.load(own[0], family=gap)


def test_changes_of_the_configuration(folder):
    changed = models.load(folder, changes={"context": 8, "window": 4}).config
    assert (changed.context, changed.window) == (8, 4)
    with pytest.raises(ValueError, match=r"`changes` names wide.*has vocab, width"):
        models.load(folder, changes={"wide": 3})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'Apache 2.0'\n---\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\ntags:\n- x\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: [mit, bsd-3-clause]\n---\n", "mit, bsd-3-clause"),
    ],
)
def test_licences_declared_in_front_matter(folder, text, name):
    (folder / "README.md").write_text(text)
    assert models.load(folder).card["licence"] == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (None, "apache-2.0"),
        (
            "MIT License\n\nCopyright (c) X\n\nPermission is hereby granted, free of "
            "charge, to any person\n",
            "mit",
        ),
        ("Copyright X\n\nRedistribution and use in source and binary forms\n", "bsd"),
    ],
)
def test_licences_recognised_by_their_text(tmp_path, text, name):
    folder = disk.write_folder(tmp_path / "base", licence=None)
    own = Path(__file__).parents[2] / "LICENSE"
    (folder / "LICENSE").write_text(own.read_text() if text is None else text)
    card = models.load(folder).card
    assert (card["licence"], card["licence_from"]) == (name, "LICENSE")


def test_the_licence_gate(folder):
    readme = folder / "README.md"
    readme.write_text("---\nlicense: llama3\n---\n")
    with pytest.raises(
        ValueError, match=r"'llama3' \(says its README.md\).*allow=\['lla"
    ):
        models.load(folder)
    assert models.load(folder, allow=["llama3"]).card["licence"] == "llama3"
    assert models.load(folder, allow="any").card["licence"] == "llama3"
    readme.write_text("---\nlicense: [mit, llama3]\n---\n")
    with pytest.raises(ValueError, match="llama3"):
        models.load(folder, allow=("mit",))
    readme.write_text("# No front matter\n---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="declares no licence; looked for"):
        models.load(folder)
    (folder / "LICENSE").write_text("Modified MIT License\n" + "More terms. " * 200)
    with pytest.raises(ValueError, match="declares no licence"):
        models.load(folder)
    assert models.load(folder, allow="any").card["licence"] == "undeclared"


def broken(folder, what):
    path = folder / "model.safetensors"
    weights = dict(WEIGHTS)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "cut header":
        path.write_bytes(path.read_bytes()[:40])
    elif what == "nan":
        weights["model.layers.1.mlp.up_proj.weight"] = np.full((64, 32), np.nan, "f4")
        save_file(weights, path)
    elif what == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
        save_file(weights, path)
    elif what == "unexpected":
        save_file(weights | {"model.layers.2.mlp.up_proj.weight": np.ones(3)}, path)
    elif what == "shape":
        disk.write_folder(folder, config={"num_key_value_heads": 4})
    elif what == "fewer layers":
        disk.write_folder(folder, config={"num_hidden_layers": 1})
    elif what == "model type":
        disk.write_folder(folder, config={"model_type": "mamba"})
    elif what == "no type":
        disk.write_folder(folder, config={"model_type": None})
    elif what == "heads":
        disk.write_folder(folder, config={"num_attention_heads": 5})
    elif what == "activation":
        disk.write_folder(folder, config={"hidden_act": "gelu"})
    elif what == "json":
        (folder / "config.json").write_text("{")
    elif what == "pickled":
        path.rename(folder / "pytorch_model.bin")
    else:
        (folder / "config.json").unlink()


WRONG = {
    "truncated": r"model.safetensors is truncated or damaged .*Fetch it again",
    "cut header": r"model.safetensors is truncated or damaged",
    "nan": r"'model.layers.1.mlp.up_proj.weight' in .*model.safetensors holds NaN",
    "missing": r"missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
    "unexpected": r"unexpected: model.layers.2.mlp.up_proj.weight",
    "shape": r"shape: model.layers.0.self_attn.k_proj.weight \(16, 32\) for "
    r"blocks/attention/k/kernel \(2, 32, 32\)",
    "fewer layers": r"unexpected: model.layers.1",
    "model type": r"'mamba'; known are .*gpt2, llama",
    "no type": r"model_type None; known are",
    "heads": r"heads=5",
    "activation": r"hidden_act='gelu'",
    "json": r"config.json is not valid JSON",
    "pickled": r"no \*.safetensors file \(it has README.md, config.json, pytorch_model",
    "no config": r"no config.json \(it has README.md, model.safetensors\)",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(folder, what):
    broken(folder, what)
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[what]):
        models.load(folder)


def test_parts_that_are_missing_or_of_another_checkpoint(folder, tmp_path):
    parts = models.save(tmp_path / "parts", models.load(folder), max_bytes=20_000)
    last = sorted(parts.glob("*.safetensors"))[-1]
    spare = tmp_path / "spare"
    shutil.copy(last, spare)
    save_file({"other": np.ones(3)}, last)
    with pytest.raises(
        ValueError, match=r"index.json places tensors where they are not"
    ):
        models.load(parts)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {last.name}, which its model"):
        models.load(parts)
    (parts / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        models.load(parts)


def test_a_name_on_the_hub_without_a_network(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"Hub or its cache \(ConnectionError: no"
    ):
        models.load("someone/some-model")
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        models.load("nowhere.gguf")


def test_a_name_on_the_hub_from_its_cache(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: str(folder)
    )
    assert models.load("someone/some-model").card["source"] == "someone/some-model"


def test_saving_refuses_other_parameters(folder, tmp_path):
    base = models.load(folder)
    _, low = models.lora(
        base.model, base.params, rank=2, alpha=2.0, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"lora/a: given .*expected nothing"):
        models.save(tmp_path / "x", base, low)
    assert not (tmp_path / "x").exists()


def test_transformers_loads_what_was_saved(folder, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    base = models.load(folder)
    moved = jax.tree.map(lambda x: 1.5 * x, base.params)
    out = models.save(tmp_path / "out", base, moved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    x = np.array([[1, 2, 3, 12, 0]], np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(x, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(base.model.apply(moved, jnp.asarray(x)), want, atol=1e-4)


@pytest.mark.skipif("FEDCL_MINILM" not in os.environ, reason="needs the real weights")
def test_minilm_equals_torch():
    """Embeddings of two sentences, by transformers' BertModel in torch."""
    pytest.importorskip("torch")
    from tests.oracles import live

    assert live.minilm(os.environ["FEDCL_MINILM"]).gap < 1e-5
