"""The dual encoder: against transformers, each half alone, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import models, tree
from fedcl.models._families import families
from fedcl.models._model import leaves
from tests.oracles.checkpoints import parameters
from tests.oracles.goldens import golden

CLIP = families()["clip"]
IMAGE = models.ViTConfig(
    (4, 4, 2),
    2,
    8,
    1,
    2,
    12,
    projection=6,
    unit=True,
    embed_norm=True,
    patch_bias=False,
)
TEXT = models.ClipTextConfig(13, 8, 2, 2, 12, projection=6, context=6)
TINY = models.ClipConfig(IMAGE, TEXT)
TOKENS = jnp.array([[1, 5, 7, 12, 0, 0], [1, 3, 12, 12, 0, 0]])


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def images(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


def given(arrays):
    rows = jnp.asarray(arrays["images"].transpose(0, 2, 3, 1))
    return {"images": rows, "tokens": arrays["tokens"]}


def loaded(name, **changes):
    found = golden(name)
    config = CLIP.config(found.config)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, **changes)
    )
    return models.clip(config), parameters(CLIP, config, found.weights), found, config


def gaps(out, want):
    pairs = ((out.logits, "logits"), (out.images, "image"), (out.texts, "text"))
    return [float(np.abs(ours - want[name]).max()) for ours, name in pairs]


@pytest.mark.parametrize("name", ["clip", "clip_legacy"])
def test_outputs_equal_transformers(name):
    model, params, found, config = loaded(name)
    out = jax.jit(model.apply)(params, given(found.given))
    assert config.text.eos == (20 if name == "clip" else None)
    assert np.std(found.out["logits"]) > 1
    assert max(gaps(out, found.out)) < 2e-5


def test_goldens_can_tell():
    for changes in ({"eos": None}, {"activation": "gelu"}, {"eps": 1e-3}):
        _, params, found, config = loaded("clip", **changes)
        apply = jax.jit(models.clip_text(config.text).apply)
        texts = apply(params["text"], found.given["tokens"])
        assert np.abs(texts - found.out["text"]).max() > 1e-4, changes


def test_outputs_equal_transformers_live():
    """Another shape and other weights than the goldens', where torch is installed."""
    pytest.importorskip("torch")
    from tests.oracles import live

    worst = {(row.name, row.output): row.gap for row in live.encoders("clip")}
    assert len(worst) == 6 and max(worst.values()) < 1e-4, worst


def test_each_half_is_a_model_of_its_own():
    model = models.clip(TINY)
    params, x = drawn(model), {"images": images(3, 4, 4, 2), "tokens": TOKENS}
    apply = jax.jit(model.apply)
    both = apply(params, x)
    seen, read = (apply(params, {name: x[name]}) for name in ("images", "tokens"))
    assert seen.logits is None and seen.texts is None and read.images is None
    same = np.testing.assert_allclose
    same(seen.images, both.images, atol=1e-6)
    same(read.texts, both.texts, atol=1e-6)
    image, text = models.image_encoder(IMAGE), models.clip_text(TEXT)
    same(jax.jit(image.apply)(params["image"], x["images"]), both.images, atol=1e-6)
    same(jax.jit(text.apply)(params["text"], TOKENS), both.texts, atol=1e-6)
    # Kept embeddings give the logits.
    scale = np.exp(params["logit_scale"])
    same(both.logits, scale * (both.images @ both.texts.T), atol=1e-5)
    same(np.linalg.norm(both.texts, axis=1), 1, atol=1e-5)


def test_a_text_ends_where_it_ends():
    config = dataclasses.replace(TEXT, eos=7)
    params = drawn(models.clip_text(TEXT))
    apply = jax.jit(models.clip_text(config).apply)
    later = TOKENS.at[0, 3:].set(9)
    np.testing.assert_allclose(
        apply(params, later)[0], apply(params, TOKENS)[0], atol=1e-6
    )
    earlier = apply(params, TOKENS.at[0, 1].set(9))
    assert np.abs(earlier[0] - apply(params, TOKENS)[0]).max() > 1e-2
    highest = jax.jit(models.clip_text(TEXT).apply)
    only = highest(params, TOKENS[:, :4])
    np.testing.assert_allclose(only, highest(params, TOKENS), atol=1e-6)
    assert np.isfinite(apply(params, jnp.zeros_like(TOKENS))).all()


def test_unknown_ids_under_jit():
    model = models.clip_text(TEXT)
    tokens = jnp.array([[13, 5, 12], [-1, 5, 12], [1, 5, 12]])
    out = jax.jit(model.apply)(drawn(model), tokens)
    assert jnp.isnan(out).all(axis=1).tolist() == [True, True, False]
    assert jnp.isfinite(out[2]).all()


def test_every_leaf_has_a_gradient_and_adapters_map_over_clients():
    model = models.clip(TINY)
    x = {"images": images(2, 4, 4, 2), "tokens": TOKENS}
    where = lambda path: path.endswith(("attention/q", "attention/v"))
    adapted, params = models.lora(
        model, drawn(model), rank=2, alpha=2.0, where=where, key=jax.random.key(0)
    )
    low = sorted({p.rpartition("/lora/")[0] for p, _ in leaves(params) if "lora" in p})
    assert low == [
        f"{half}/blocks/attention/{n}" for half in ("image", "text") for n in "qv"
    ]
    loss = lambda p: jnp.sum(jnp.sin(adapted.apply(p, x).logits))
    for path, grad in leaves(jax.jit(jax.grad(loss))(params)):
        still = ("k/bias", "lora/a", "lora/scale", "lora/mask")  # B is 0 at first.
        assert path.endswith(still) or np.abs(grad).max() > 1e-7, path
    phi, theta = tree.partition(params, models.lora_only)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a + 0.3]), phi)
    apply = lambda phi: adapted.apply(tree.merge(phi, theta), x).logits
    both = jax.jit(jax.vmap(apply))(stacked)
    alone = jax.jit(apply)(jax.tree.map(lambda a: a[1], stacked))
    np.testing.assert_allclose(both[1], alone, atol=2e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_temperature_at_first_and_precision():
    model = models.clip(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0))
    assert float(params["logit_scale"]) == pytest.approx(np.log(1 / 0.07), rel=1e-2)
    assert {leaf.dtype.name for _, leaf in leaves(params)} == {"bfloat16"}
    x = {"images": images(2, 4, 4, 2), "tokens": TOKENS}
    out = jax.eval_shape(model.apply, params, x)
    assert {a.dtype.name for a in out} == {"float32"} and out.logits.shape == (2, 2)


@pytest.mark.parametrize("name", ["clip", "clip_legacy"])
def test_configurations_come_back(name):
    config = CLIP.config(golden(name).config)
    raw = CLIP.hf_config(config)
    assert CLIP.config(raw) == config
    plain = dataclasses.replace(config.image, patch_bias=True)
    with pytest.raises(ValueError, match="CLIP's own encoder of images"):
        CLIP.hf_config(dataclasses.replace(config, image=plain))
    for part in ("vision_config", "text_config"):
        wrong = {**raw, part: {**raw[part], "hidden_act": "mish"}}
        with pytest.raises(
            ValueError, match="clip: hidden_act='mish' is not supported"
        ):
            CLIP.config(wrong)


def test_saved_and_loaded_again(tmp_path):
    model, params, _, config = loaded("clip")
    base = models.Pretrained(model, params, config, {}, CLIP)
    again = models.load(models.save(tmp_path, base), allow="any")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_missing_keys_are_those_of_the_first_clip():
    config = CLIP.config({"model_type": "clip"})
    assert (config.image.width, config.image.patch, config.text.width) == (768, 32, 512)
    assert (config.text.vocab, config.text.context, config.image.projection) == (
        49408,
        77,
        512,
    )


def test_wrong_configurations_and_inputs_are_refused():
    with pytest.raises(ValueError, match="the same width, got 6 and 5"):
        dataclasses.replace(TINY, text=dataclasses.replace(TEXT, projection=5))
    with pytest.raises(ValueError, match="output='embedding', projection=None"):
        dataclasses.replace(TINY, image=dataclasses.replace(IMAGE, projection=None))
    with pytest.raises(ValueError, match="heads=3, width=8"):
        dataclasses.replace(TEXT, heads=3)
    model = models.clip(TINY)
    params = drawn(model)
    for x, message in (
        ({}, "images, tokens or both, got none"),
        (TOKENS, "images, tokens or both, got Array"),
        ({"image": images(1, 4, 4, 2)}, "got image"),
        ({"tokens": jnp.ones((1, 7), jnp.int32)}, "texts of 7 tokens.*positions for 6"),
        ({"tokens": jnp.full((1, 3), 13)}, "13 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(params, x)
