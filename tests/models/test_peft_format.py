"""Adapters in PEFT's layout: against what PEFT itself has saved, and its logits."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedcl import models
from fedcl.models._model import leaves

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def base(kind):
    return models.load(GOLDENS / f"peft_{kind}" / "base", allow="any")


@pytest.fixture
def adapter(tmp_path):
    """PEFT's Llama adapter, to be changed."""
    return Path(shutil.copytree(GOLDENS / "peft_llama" / "adapter", tmp_path / "a"))


def edit(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@KINDS
def test_logits_equal_pefts(kind):
    found = models.load_adapter(GOLDENS / f"peft_{kind}" / "adapter", base(kind))
    expected = load_file(GOLDENS / f"peft_{kind}" / "expected.safetensors")
    got = jax.jit(found.model.apply)(found.params, jnp.asarray(expected["tokens"]))
    np.testing.assert_allclose(got, expected["logits"], atol=1e-5)


@KINDS
def test_saved_again_it_is_what_peft_saved(kind, tmp_path):
    folder = GOLDENS / f"peft_{kind}" / "adapter"
    plain = base(kind)
    found = models.load_adapter(folder, plain)
    out = models.save_adapter(tmp_path / "out", plain, found.params)
    theirs = load_file(folder / "adapter_model.safetensors")
    ours = load_file(out / "adapter_model.safetensors")
    # Modules that an adapter leaves out come back with one rank of zeros.
    extra = {name for name in ours if ".1." in name} if kind == "gpt2" else set()
    assert ours.keys() - extra == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)
    assert not any(ours[name].any() for name in extra if "lora_B" in name)
    raw = json.loads((out / "adapter_config.json").read_text())
    given = json.loads((folder / "adapter_config.json").read_text())
    for key in ("peft_type", "r", "fan_in_fan_out", "bias", "task_type"):
        assert raw[key] == given[key]
    assert sorted(raw["target_modules"]) == sorted(given["target_modules"])
    again = models.load_adapter(out, plain)
    left, right = dict(leaves(found.params)), dict(leaves(again.params))
    scaled = lambda flat, at: flat[f"{at}/b"] * flat[f"{at}/scale"][..., None, None]
    for path in left:
        if path.endswith("lora/b"):
            at = path[:-2]
            np.testing.assert_allclose(scaled(right, at), scaled(left, at), rtol=1e-6)


def test_ranks_and_scales_by_hand():
    found = models.load_adapter(GOLDENS / "peft_llama" / "adapter", base("llama"))
    attention, mlp = (found.params["blocks"][name] for name in ("attention", "mlp"))
    low = attention["q"]["lora"]
    assert low["mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_allclose(low["scale"], [5 / 3, 5 / 2, 5 / 3])
    np.testing.assert_allclose(mlp["down"]["lora"]["scale"], [5 / 3, 5 / 3, 7 / 3])
    assert "lora" not in attention["k"]
    rooted = models.load_adapter(GOLDENS / "peft_gpt2" / "adapter", base("gpt2"))
    low = rooted.params["blocks"]["attention"]["qkv"]["lora"]
    np.testing.assert_allclose(low["scale"], [6 / 2**0.5, 0, 6 / 2**0.5], rtol=1e-6)
    assert low["mask"].tolist() == [[1, 1], [0, 0], [1, 1]]


def trained(plain, where, seed=0):
    """A base with adapters that do something."""
    model, params = models.lora(
        plain.model,
        plain.params,
        rank=2,
        alpha=3.0,
        where=where,
        key=jax.random.key(seed),
    )
    rng = np.random.default_rng(seed)
    drawn = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: drawn(x) if path[-1].key == "b" else x, params
    )


def test_our_own_adapters_come_back(tmp_path):
    plain = base("llama")
    model, params = trained(plain, lambda path: path.endswith(("q", "up")))
    mask = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    params["blocks"]["attention"]["q"]["lora"]["mask"] = mask
    back = models.load_adapter(models.save_adapter(tmp_path, plain, params), plain)
    x = jnp.arange(9, dtype=jnp.int32)[None]
    want = model.apply(params, x)
    np.testing.assert_allclose(back.model.apply(back.params, x), want, atol=1e-5)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"]) == (2, 3.0)
    at = "model.layers.{}.self_attn.q_proj"
    assert raw["rank_pattern"] == {at.format(0): 1, at.format(1): 1}
    assert raw["alpha_pattern"] == {at.format(0): 1.5, at.format(1): 1.5}


def test_names_that_other_modules_share_become_an_expression(tmp_path):
    """GPT-2 calls the outputs of attention and MLP both `c_proj`."""
    import re

    plain = base("gpt2")
    _, params = trained(plain, lambda path: path.endswith("attention/out"))
    models.save_adapter(tmp_path, plain, params)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["transformer.h.2.attn.c_proj", "transformer.h.2.mlp.c_proj"]
    matched = [re.fullmatch(raw["target_modules"], name) for name in names]
    assert [bool(m) for m in matched] == [True, False]


def test_a_quantised_base_takes_an_adapter(tmp_path):
    plain = base("llama")
    _, params = trained(plain, lambda path: path.endswith("q"))
    folder = models.save_adapter(tmp_path, plain, params)
    model, small = models.quantise(plain.model, plain.params, group=8)
    found = models.load_adapter(folder, plain._replace(model=model, params=small))
    full = models.load_adapter(folder, plain)
    x = jnp.arange(9, dtype=jnp.int32)[None]
    want = full.model.apply(full.params, x)
    np.testing.assert_allclose(found.model.apply(found.params, x), want, atol=0.1)


def test_what_would_be_lost_is_refused(tmp_path):
    plain = base("llama")
    with pytest.raises(ValueError, match="no `lora` leaves"):
        models.save_adapter(tmp_path / "x", plain, plain.params)
    _, params = trained(plain, lambda path: path.endswith("q"))
    with pytest.raises(ValueError, match="besides adapters there are prompt"):
        models.save_adapter(tmp_path / "x", plain, params | {"prompt": jnp.ones(3)})
    with pytest.raises(ValueError, match="odd carry adapters, but are no linear"):
        low = params["blocks"]["attention"]["q"]["lora"]
        models.save_adapter(tmp_path / "x", plain, params | {"odd": {"lora": low}})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_other_than_plain_lora_is_refused(adapter, entry):
    edit(adapter, **entry)
    with pytest.raises(ValueError, match=f"has {next(iter(entry))}=.*only plain LoRA"):
        models.load_adapter(adapter, base("llama"))


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga"]
)
def test_starts_that_change_the_base_are_refused(adapter, start):
    edit(adapter, init_lora_weights=start)
    message = (
        rf"adapter_config.json has init_lora_weights='{start}'.*kernels of the base"
    )
    with pytest.raises(ValueError, match=message):
        models.load_adapter(adapter, base("llama"))


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_are_read(adapter, start):
    want = models.load_adapter(adapter, base("llama")).params
    edit(adapter, init_lora_weights=start)
    got = models.load_adapter(adapter, base("llama")).params
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


@pytest.mark.parametrize("alpha", [None, "16", True])
def test_an_adapter_without_its_scale_is_refused(adapter, alpha):
    edit(adapter, lora_alpha=alpha)
    with pytest.raises(ValueError, match=f"json has lora_alpha={alpha!r}; .*a number"):
        models.load_adapter(adapter, base("llama"))
    path = adapter / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "lora_alpha"}))
    with pytest.raises(ValueError, match=r"adapter_config.json has no 'lora_alpha'"):
        models.load_adapter(adapter, base("llama"))


def test_an_adapter_of_another_base_is_refused(adapter):
    with pytest.raises(ValueError, match="tensors that match no linear module"):
        models.load_adapter(adapter, base("gpt2"))
    more = lambda found: found | {f"{Q}.lora_E.weight": np.ones(2, np.float32)}
    edit_tensors(adapter, more)
    with pytest.raises(ValueError, match=r"match no linear module .*lora_E.weight"):
        models.load_adapter(adapter, base("llama"))
    wide = {f"{Q}.lora_A.weight": np.ones((3, 20), np.float32)}
    edit_tensors(adapter, lambda found: {**found, **wide})
    with pytest.raises(
        ValueError, match=r"A \(3, 20\) and B \(16, 3\), but .* takes 16"
    ):
        models.load_adapter(adapter, base("llama"))


def test_files_that_are_damaged_or_missing(adapter):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated"):
        models.load_adapter(adapter, base("llama"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        models.load_adapter(adapter, base("llama"))


@KINDS
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_was_saved(kind, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    plain = base(kind)
    chosen = ("q", "qkv", "out", "up")
    model, params = trained(plain, lambda path: path.endswith(chosen))
    models.save_adapter(tmp_path, plain, params)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDENS / f"peft_{kind}" / "base"
    )
    theirs = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    x = np.arange(9)[None]
    with torch.no_grad():
        want = theirs(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(x, jnp.int32)), want, atol=1e-4
    )
