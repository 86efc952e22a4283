"""Pre-trained vision transformers: against transformers, patches, pools, projections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import models
from fedcl.models._families import families
from fedcl.models._model import leaves
from tests.oracles.checkpoints import parameters
from tests.oracles.goldens import golden

VIT = families()["vit"]
TINY = models.ViTConfig((4, 6, 2), 2, 8, 2, 2, 12)


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def rows_last(images):
    """[B, channels, H, W] of torch to [B, H, W, channels]."""
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def images(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


def loaded(**changes):
    found = golden("vit")
    config = dataclasses.replace(VIT.config(found.config), **changes)
    params = parameters(VIT, config, found.weights)
    return models.image_encoder(config), params, found


@pytest.mark.parametrize("output", ["classes", "tokens", "embedding"])
def test_outputs_equal_transformers(output):
    changes = {} if output == "classes" else {"output": output, "num_classes": None}
    model, params, found = loaded(**changes)
    tokens = found.out["tokens"]
    want = {"classes": found.out["logits"], "embedding": tokens[:, 0], "tokens": tokens}
    got = jax.jit(model.apply)(params, rows_last(found.given["images"]))
    assert np.std(want[output]) > 0.3
    np.testing.assert_allclose(got, want[output], atol=2e-5)


def test_goldens_can_tell():
    for changes in ({"activation": "gelu_new"}, {"eps": 1e-3}):
        model, params, found = loaded(**changes)
        got = jax.jit(model.apply)(params, rows_last(found.given["images"]))
        assert np.abs(got - found.out["logits"]).max() > 1e-4, changes


def test_outputs_equal_transformers_live():
    """Another shape and other weights than the golden's, where torch is installed."""
    pytest.importorskip("torch")
    from tests.oracles import live

    (row,) = live.encoders("vit")
    assert row.gap < 1e-4 < row.size


def test_a_mean_leaves_the_class_token_out():
    tokens = models.image_encoder(dataclasses.replace(TINY, output="tokens"))
    params, x = drawn(tokens), images(3, 4, 6, 2)
    mean = models.image_encoder(dataclasses.replace(TINY, pool="mean", unit=True))
    want = np.asarray(jax.jit(tokens.apply)(params, x))[:, 1:].mean(axis=1)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(jax.jit(mean.apply)(params, x), want, atol=1e-5)


def test_three_layers_are_the_fused_one():
    fused = models.image_encoder(dataclasses.replace(TINY, fused=True))
    whole, x = drawn(fused), images(3, 4, 6, 2)
    inner = whole["blocks"]["attention"]
    cut = lambda i: jax.tree.map(lambda a: a[..., 8 * i : 8 * i + 8], inner["qkv"])
    parts = {"q": cut(0), "k": cut(1), "v": cut(2), "out": inner["out"]}
    split = {**whole, "blocks": {**whole["blocks"], "attention": parts}}
    want = jax.jit(fused.apply)(whole, x)
    got = jax.jit(models.image_encoder(TINY).apply)(split, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_outputs_are_the_head_of_the_projected_features():
    changes = {
        "output": "classes",
        "num_classes": 3,
        "projection": 5,
        "qkv_bias": False,
    }
    config = dataclasses.replace(TINY, **changes, pool="mean", class_token=False)
    model = models.image_encoder(config)
    params, x = drawn(model), images(3, 4, 6, 2)
    assert "bias" not in params["blocks"]["attention"]["q"]
    assert "bias" in params["blocks"]["attention"]["out"]
    out, head = jax.jit(model.outputs)(params, x), params["head"]
    assert out.features.shape == (3, 5)
    want = out.features @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(out.logits, want, atol=1e-5)
    loss = lambda p: jnp.sum(jnp.sin(model.apply(p, x)))
    for path, grad in leaves(jax.jit(jax.grad(loss))(params)):
        assert np.abs(grad).max() > 1e-6, path


def test_patches_of_a_checkpoint_that_are_not_square_images():
    config = dataclasses.replace(TINY, qkv_bias=False)
    model = models.image_encoder(config)
    params, sources = drawn(model), VIT.sources(config)
    assert {path for path, _ in leaves(params)} == sources.keys()
    kernel = np.asarray(params["patch"]["kernel"])
    stored = sources["patch/kernel"].write(kernel)
    assert stored.shape == (8, 2, 2, 2)
    for y, x, channel in np.ndindex(2, 2, 2):
        row = (y * 2 + x) * 2 + channel
        np.testing.assert_array_equal(stored[:, channel, y, x], kernel[row])
    np.testing.assert_array_equal(sources["patch/kernel"].read(stored), kernel)
    raw = VIT.hf_config(config)
    assert raw["image_size"] == [4, 6] and VIT.config(raw) == config


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_half_precision(dtype):
    config = dataclasses.replace(TINY, output="classes", num_classes=3)
    plain, x = models.image_encoder(config), images(3, 4, 6, 2)
    params = drawn(plain)
    model = models.image_encoder(config, dtype=dtype, remat=True)
    got, exact = (jax.jit(m.apply)(params, x) for m in (model, plain))
    assert got.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2))
    assert error == 0 if dtype is None else 1e-4 < error < 0.05


def test_configurations_come_back():
    config = VIT.config(golden("vit").config)
    tokens = dataclasses.replace(config, output="tokens", num_classes=None)
    for own in (config, tokens, dataclasses.replace(config, pool="mean", unit=True)):
        raw = VIT.hf_config(own)
        assert VIT.config(raw) == own
        named = "ForImageClassification" in raw["architectures"][0]
        assert named == (own == config)
    with pytest.raises(ValueError, match="fused=True has no place.*only False"):
        VIT.hf_config(dataclasses.replace(config, fused=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "side 3 do not tile an image of 4 x 6"),
        ({"heads": 3}, "heads=3, width=8"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"output": "logits"}, "'tokens', 'embedding' or 'classes', got 'logits'"),
        ({"class_token": False}, "pool='class' needs class_token=True"),
        ({"num_classes": 3}, "num_classes=3 and output='embedding'"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_missing_keys_are_named():
    raw = {k: v for k, v in golden("vit").config.items() if k != "hidden_size"}
    with pytest.raises(ValueError, match="vit: the configuration lacks hidden_size"):
        VIT.config(raw)
