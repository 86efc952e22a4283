"""Text encoders: against transformers, pooling, padding, packing, heads, classifiers."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, losses, models, streams, tree
from fedcl.models._families import families
from fedcl.models._model import leaves
from fedcl.models._pooling import unit
from tests.oracles import classifiers
from tests.oracles.checkpoints import parameters
from tests.oracles.goldens import golden

TINY = models.EncoderConfig(13, 8, 2, 2, 12, context=9)
CLASSES = dataclasses.replace(TINY, output="classes", num_classes=4)
TOKENS = jnp.array([[2, 7, 9, 5, 3, 0, 0], [4, 1, 3, 6, 12, 8, 3]])


def loaded(name, **changes):
    found = golden(name)
    family = families()[found.config["model_type"]]
    config = dataclasses.replace(family.config(found.config), **changes)
    return models.encoder(config), parameters(family, config, found.weights), found


def given(found):
    """What went in, with padding by the configuration's own token; one type is none."""
    one = found.config["type_vocab_size"] == 1
    return {k: v for k, v in found.given.items() if not (one and k == "types")}


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name", ["bert", "bert_masked_lm", "bert_classes", "roberta"])
def test_outputs_equal_transformers(name):
    model, params, found = loaded(name)
    want = found.out["logits" if "logits" in found.out else "tokens"]
    got = jax.jit(model.apply)(params, given(found))
    real = found.given["tokens"] != found.config["pad_token_id"]
    gap = np.abs(got - want) if want.ndim == 2 else np.abs(got - want)[real]
    assert np.std(want) > 0.3
    assert gap.max() < 2e-5


def test_goldens_can_tell():
    for changes in ({"activation": "gelu_new"}, {"eps": 1e-3}, {"pad": None}):
        model, params, found = loaded("bert", **changes)
        got = jax.jit(model.apply)(params, given(found))
        assert np.abs(got - found.out["tokens"])[:, 0].max() > 1e-4, changes


def test_outputs_equal_transformers_live():
    """Another shape and other weights than the goldens', where torch is installed."""
    pytest.importorskip("torch")
    from tests.oracles import live

    worst = {row.name: row.gap for row in live.encoders("bert", "roberta")}
    assert len(worst) == 4 and max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("pool", ["pooler", "cls", "mean"])
def test_pooling_equals_transformers(pool):
    changes = {"output": "embedding", "pool": pool, "unit": pool == "mean"}
    model, params, found = loaded("bert", **changes)
    got = jax.jit(model.apply)(params, given(found))
    last, real = found.out["tokens"], found.given["tokens"] != 0
    want = found.out["pooler_output"] if pool == "pooler" else last[:, 0]
    if pool == "mean":
        mean = np.stack([h[r].mean(0) for h, r in zip(last, real, strict=True)])
        want = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("output", ["embedding", "masked_lm"])
def test_padding_changes_nothing(output):
    model = models.encoder(dataclasses.replace(TINY, output=output))
    params, apply = drawn(model), jax.jit(model.apply)
    long, short = apply(params, TOKENS)[0], apply(params, TOKENS[:1, :5])[0]
    np.testing.assert_allclose(
        long[:5] if output == "masked_lm" else long, short, atol=1e-5
    )
    marked = jnp.array([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    other = TOKENS.at[0, 5:].set(11)
    got = apply(params, {"tokens": other, "segments": marked})
    same = slice(0, 5) if output == "masked_lm" else slice(None)
    np.testing.assert_allclose(got[0][same], long[same], atol=1e-5)
    assert np.abs(apply(params, other)[0] - long).max() > 1e-3


def test_a_row_of_padding_is_finite_with_finite_gradients():
    model = models.encoder(dataclasses.replace(CLASSES, unit=True))
    params, mask = drawn(model), jnp.array([1.0, 0.0])
    loss = losses.softmax(model.apply)
    batch = {"x": TOKENS.at[1].set(0), "y": jnp.array([1, 2]), "mask": mask}
    run = lambda p, x: loss(p, {**batch, "x": x}, None)[0]
    run = jax.jit(jax.value_and_grad(run))
    value, grads = run(params, batch["x"])
    np.testing.assert_allclose(value, run(params, TOKENS)[0], atol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_packed_documents_are_alone():
    model = models.encoder(TINY)
    params, apply = drawn(model), jax.jit(model.apply)
    row = jnp.array([[5, 6, 7, 0, 8, 2, 2, 9, 10, 11, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0]])
    packed = apply(params, {"tokens": row, "segments": segments})[0]
    for number, start, end in ((1, 0, 4), (2, 4, 6), (3, 6, 10)):
        alone = {
            "tokens": row[:, start:end],
            "segments": jnp.full((1, end - start), number),
        }
        np.testing.assert_allclose(
            packed[start:end], apply(params, alone)[0], atol=1e-5
        )


def test_types_count():
    model = models.encoder(TINY)
    params, apply = drawn(model), jax.jit(model.apply)
    zeros, ones = jnp.zeros_like(TOKENS), jnp.ones_like(TOKENS)
    typed = lambda types: apply(params, {"tokens": TOKENS, "types": types})
    plain = apply(params, TOKENS)
    np.testing.assert_allclose(typed(zeros), plain, atol=1e-6)
    assert np.abs(typed(ones) - plain).max() > 1e-2


def test_outputs_are_the_head_of_the_features_and_every_leaf_has_a_gradient():
    for pool in ("mean", "pooler"):
        model = models.encoder(dataclasses.replace(CLASSES, pool=pool))
        params = drawn(model)
        out = jax.jit(model.outputs)(params, TOKENS)
        head = params["head"]
        want = out.features @ head["kernel"] + head["bias"][None]
        np.testing.assert_allclose(out.logits, want, atol=1e-5)
    got = jax.jit(model.apply)(params, TOKENS)
    np.testing.assert_array_equal(got, out.logits)
    loss = lambda p: jnp.sum(jnp.sin(model.apply(p, TOKENS)))
    for path, grad in leaves(jax.jit(jax.grad(loss))(params)):
        # A bias of keys moves no softmax.
        assert path.endswith("k/bias") or np.abs(grad).max() > 1e-6, path


def test_program_does_not_grow_and_options_do_not_change_results():
    def lines(depth):
        model = models.encoder(dataclasses.replace(TINY, depth=depth))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(jax.jit(model.apply).lower(params, TOKENS).as_text().splitlines())

    assert lines(5) == lines(2)
    plain = models.encoder(TINY)
    params, loss = (
        drawn(plain),
        lambda m: lambda p: jnp.sum(jnp.sin(m.apply(p, TOKENS))),
    )
    grad = lambda m: jax.jit(jax.grad(loss(m)))(params)
    other = models.encoder(TINY, remat=True, unroll=True)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, grad(plain), grad(other))


@pytest.mark.parametrize("output", ["classes", "masked_lm"])
def test_half_precision(output):
    classes = 4 if output == "classes" else None
    config = dataclasses.replace(TINY, output=output, num_classes=classes)
    params = drawn(models.encoder(config))
    exact = jax.jit(models.encoder(config).apply)(params, TOKENS)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    stored = models.encoder(config, param_dtype=jnp.bfloat16)
    computed = models.encoder(config, dtype=jnp.bfloat16)
    for model, own in ((stored, half), (computed, params)):
        got = jax.jit(model.apply)(own, TOKENS)
        assert got.dtype == jnp.float32
        error = jnp.sqrt(jnp.mean((got - exact) ** 2) / jnp.mean(exact**2))
        assert 1e-4 < error < 0.05
    shapes = jax.eval_shape(stored.init, jax.random.key(0))
    assert {leaf.dtype.name for _, leaf in leaves(shapes)} == {"bfloat16"}


def test_initial_deviations():
    config = dataclasses.replace(TINY, vocab=200, width=64, output="masked_lm")
    for path, leaf in leaves(models.encoder(config).init(jax.random.key(0))):
        if path.endswith(("kernel", "embed", "position", "type")):
            error = 4 * 0.02 / np.sqrt(leaf.size)
            assert abs(np.std(leaf) - 0.02) < error, path
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), path)


def test_lora_finds_every_linear_layer_and_maps_over_clients():
    model = models.encoder(dataclasses.replace(CLASSES, pool="pooler"))
    adapted, params = models.lora(
        model, drawn(model), rank=2, alpha=2.0, key=jax.random.key(0)
    )
    kernels = {
        path[: -len("/kernel")] for path, _ in leaves(params) if "kernel" in path
    }
    found = {path[: -len("/lora/a")] for path, _ in leaves(params) if "lora/a" in path}
    blocks = {f"blocks/attention/{name}" for name in ("q", "k", "v", "out")}
    assert (
        found
        == kernels
        == blocks | {"blocks/mlp/up", "blocks/mlp/down", "pooler", "head"}
    )
    phi, theta = tree.partition(params, models.lora_only)
    phis = [jax.tree.map(lambda a, c=c: a + 0.1 * c, phi) for c in (1, 2)]
    apply = lambda phi: adapted.apply(tree.merge(phi, theta), TOKENS)
    both = jax.jit(jax.vmap(apply))(jax.tree.map(lambda *a: jnp.stack(a), *phis))
    alone = jax.jit(apply)
    for one, part in zip(phis, both, strict=True):
        np.testing.assert_allclose(part, alone(one), atol=2e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "bert_classes", "bert_masked_lm", "roberta"])
def test_configurations_come_back(name):
    family = families()[golden(name).config["model_type"]]
    config = family.config(golden(name).config)
    changes = [{}, {"output": "classes", "pool": "cls", "num_classes": 7, "unit": True}]
    for change in changes:
        own = dataclasses.replace(config, **change)
        raw = family.hf_config(own)
        assert family.config(raw) == own
        # Transformers has no such head, and must not take ours for one of its own.
        assert not change or raw["architectures"][0].endswith("Model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "bert: .* lacks hidden_size; .*'bert'"),
        ("position_embedding_type", "relative_key", "'relative_key' is not supported"),
        ("is_decoder", True, "is_decoder=True is not supported, only False"),
        ("hidden_act", "mish", "hidden_act='mish' is not supported, only 'gelu'"),
        ("tie_word_embeddings", False, "tie_word_embeddings=False is not supported"),
    ],
)
def test_what_the_family_cannot_express_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        families()["bert"].config({**golden("bert").config, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads=3, width=8"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"output": "class"}, "'tokens', 'embedding', 'classes' or 'masked_lm', got"),
        ({"pool": "max"}, "`pool` must be 'mean', 'cls' or 'pooler', got 'max'"),
        ({"num_classes": 3}, "num_classes=3 and output='tokens'"),
        ({"output": "classes"}, "num_classes=None and output='classes'"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((1, 10), jnp.int32), "rows of 10 tokens.*positions for 9"),
        (jnp.full((1, 3), 13), "13 tokens"),
        ({"input_ids": TOKENS}, "input_ids"),
        ({"tokens": TOKENS, "segments": TOKENS[:1]}, r"\(1, 7\)"),
        ({"tokens": TOKENS, "types": TOKENS[:1]}, r"types.*\(1, 7\).*\(2, 7\)"),
    ],
)
def test_wrong_inputs_are_refused(x, message):
    model = models.encoder(TINY)
    with pytest.raises(ValueError, match=message):
        model.apply(drawn(model), x)


def test_unknown_ids_under_jit():
    model = models.encoder(TINY)
    params, apply = drawn(model), jax.jit(model.apply)
    out = apply(params, jnp.array([[1, 2, 13], [1, 2, -1], [1, 2, 12]]))
    assert jnp.isnan(out).all(axis=(1, 2)).tolist() == [True, True, False]
    assert jnp.isfinite(out[2]).all()
    types = jnp.array([[0, 0, 2], [0, 0, -1], [0, 0, 1]])
    out = apply(params, {"tokens": jnp.ones((3, 3), jnp.int32), "types": types})
    assert jnp.isnan(out).all(axis=(1, 2)).tolist() == [True, True, False]


def test_unit_length():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(unit(x))))(x)).all()


def test_classifiers_from_statistics_on_a_frozen_encoder():
    """Nearest mean and ridge on text, class by class, as on all rows together."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 12)
    words = rng.integers(1, 4, (48, 7)) + 3 * y[:, None]
    x = words * (np.arange(7)[None] < rng.integers(2, 8, (48, 1)))
    model = models.encoder(CLASSES)
    phi, theta = tree.partition(drawn(model), models.head_only)
    loss = losses.softmax(model.outputs)
    stream = streams.class_incremental(
        {"x": x.astype(np.int32), "y": y},
        num_contexts=2,
        num_clients=2,
        rounds_per_context=1,
        steps=1,
        batch_size=4,
    )
    makers = (algorithms.ncm(4, 8), algorithms.ranpac(4, 8, 0.5))
    parts = [make(loss) for make in makers]
    start = algorithms.fedavg(loss, optax.sgd(0.1)).init(
        phi, stream.example(), 2, frozen=theta
    )
    state, _ = fedcl.run(parts, start, stream, key=jax.random.key(1), rounds=2)
    run = jax.jit(lambda x: model.outputs(tree.merge(phi, theta), x).features)
    features = run(jnp.asarray(x))
    f, w = np.asarray(features, float), np.ones(48)
    served = [
        part.serve(state, memory.own).server.params["head"]
        for part, memory in zip(parts, state.phases, strict=True)
    ]
    ncm, ridge = jax.tree.map(lambda a: np.asarray(a, float), served)
    found = np.argmax(f @ ncm["kernel"] + ncm["bias"], axis=1)
    np.testing.assert_array_equal(found, classifiers.nearest_mean(f, y, w, f))
    assert np.mean(found == y) > 0.4
    want = classifiers.ridge(f, y, w, 0.5, 4)
    np.testing.assert_allclose(ridge["kernel"], want, rtol=1e-3, atol=1e-4)


def test_a_new_head_is_drawn_and_comes_back(tmp_path):
    model, params, found = loaded("bert", output="embedding", pool="pooler")
    family = families()["bert"]
    config = dataclasses.replace(
        family.config(found.config), output="embedding", pool="pooler"
    )
    models.save(tmp_path, models.Pretrained(model, params, config, {}, family))
    asked = {"output": "classes", "num_classes": 5, "pool": "mean"}
    key = jax.random.key(0)
    new = models.load(tmp_path, allow="any", changes=asked, key=key)
    assert new.card["drawn"] == ["head/bias", "head/kernel"]
    again = models.load(models.save(tmp_path / "new", new), allow="any")
    assert again.config == new.config and again.card["drawn"] == []
    jax.tree.map(np.testing.assert_array_equal, again.params, new.params)


@pytest.mark.skipif("FEDCL_MINILM" not in os.environ, reason="needs the real weights")
def test_the_real_minilm():
    real = golden("minilm")
    changes = {"output": "embedding", "unit": True}
    got = models.load(os.environ["FEDCL_MINILM"], changes=changes)
    embedding = got.model.apply(got.params, real.given["tokens"])
    np.testing.assert_allclose(embedding, real.out["embedding"], atol=1e-5)
