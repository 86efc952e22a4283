"""Decoders: against transformers' logits, packed documents, precision, memory, size."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedcl import losses, models, tree
from fedcl.models import DecoderConfig, _attention
from fedcl.models._decoder_families import FAMILIES
from fedcl.models._model import leaves
from tests.oracles import attention as oracle
from tests.oracles.goldens import golden, placed

KINDS = {family.kind: family for family in FAMILIES}
GOLDENS = (
    "llama_gqa_tied",
    "llama_mha_untied",
    "llama_llama3",
    "llama_linear",
    "mistral",
    "qwen2",
    "gpt2",
    "gpt2_untied",
)
TINY = DecoderConfig(vocab=13, width=8, depth=2, heads=2, hidden=12, tied=False)
LLAMA = dataclasses.replace(TINY, kv_heads=1, window=3)
GPT2 = dataclasses.replace(
    TINY, layout="gpt2", context=9, qkv_bias=True, out_bias=True, mlp_bias=True
)
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def loaded(name, **changes):
    """The model of a golden, its parameters, and what transformers made of it."""
    found = golden(name)
    family = KINDS[found.config["model_type"]]
    config = family.config(found.config)
    params = placed(family, config, found.weights)
    return models.decoder(dataclasses.replace(config, **changes)), params, found


def drawn(model, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def rows(*shape, seed=1, vocab=13):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape), jnp.int32)


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_transformers(name):
    model, params, found = loaded(name)
    logits = jax.jit(model.apply)(params, found.given["tokens"])
    assert logits.dtype == jnp.float32
    assert np.std(found.out["logits"]) > 0.5
    np.testing.assert_allclose(logits, found.out["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_llama3", {"scaling": None}),
        ("llama_gqa_tied", {"theta": 90.0}),
        ("mistral", {"window": 6}),
    ],
)
def test_goldens_can_tell(name, change):
    model, params, found = loaded(name, **change)
    logits = jax.jit(model.apply)(params, found.given["tokens"])
    assert np.max(np.abs(logits - found.out["logits"])) > 1e-3


def test_logits_equal_transformers_live():
    """Other configurations and weights than the goldens', where torch is installed."""
    pytest.importorskip("torch")
    from tests.oracles import live

    worst = {row.name: row.gap for row in live.decoders()}
    assert len(worst) == 12 and max(worst.values()) < 1e-4, worst


def test_transformers_reads_our_config():
    transformers = pytest.importorskip("transformers")
    for name in GOLDENS:
        found = golden(name)
        family = KINDS[found.config["model_type"]]
        ours = family.config(found.config)
        raw = family.hf_config(ours)
        assert family.config(raw) == ours
        theirs = transformers.AutoConfig.for_model(raw["model_type"]).from_dict(raw)
        assert family.config(theirs.to_dict()) == ours


@pytest.mark.parametrize("name", GOLDENS)
def test_sources_are_the_parameters(name):
    found = golden(name)
    family = KINDS[found.config["model_type"]]
    config = family.config(found.config)
    model = models.decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {path for path, _ in leaves(shapes)} == set(family.sources(config))
    for path, source in family.sources(config).items():
        if "{layer}" not in source.name:
            a = found.weights[source.name]
            np.testing.assert_array_equal(source.write(source.read(a)), a, path)


@BOTH
def test_packed_documents_are_alone(config):
    model = models.decoder(config)
    params, x, apply = drawn(model), rows(2, 9), jax.jit(model.apply)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 3, 0, 0], [0, 7, 7, 7, 7, 7, 0, 4, 4]])
    packed = apply(params, {"tokens": x, "segments": segments})
    for row, (first, last) in [(0, (0, 4)), (0, (4, 6)), (1, (1, 6)), (1, (7, 9))]:
        alone = (
            jnp.zeros((2, 9), jnp.int32).at[0, : last - first].set(x[row, first:last])
        )
        want = apply(params, {"tokens": alone, "segments": jnp.ones((2, 9), jnp.int32)})
        got = packed[row, first:last]
        np.testing.assert_allclose(got, want[0, : last - first], atol=2e-5)
    mixed = apply(params, {"tokens": x, "segments": jnp.ones_like(x)})
    assert np.max(np.abs(packed[0, 4:6] - mixed[0, 4:6])) > 1e-2


@BOTH
def test_no_token_sees_a_later_one(config):
    model = models.decoder(config)
    params, x = drawn(model), rows(1, 6, vocab=9)
    apply = jax.jit(model.apply)
    before, after = apply(params, x), apply(params, x.at[0, 3].set(9))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    changed = np.max(np.abs(before - after), axis=(0, 2))
    assert (changed[3:] > 1e-4).all()


def test_rotary_positions_are_relative_and_learned_ones_are_not():
    for config, same in ((dataclasses.replace(LLAMA, theta=50.0), True), (GPT2, False)):
        model = models.decoder(config)
        params, x, apply = drawn(model), rows(2, 5), jax.jit(model.apply)
        places = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
        here = apply(params, {"tokens": x, "positions": places})
        there = apply(params, {"tokens": x, "positions": places + 3})
        assert bool(np.max(np.abs(here - there)) < 1e-4) == same


@pytest.mark.parametrize("kind", [_attention.Attention, _attention.FusedAttention])
@pytest.mark.parametrize("per_row", [False, True])
def test_attention_and_prefix_equal_the_oracle(kind, per_row):
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(lambda: kind(8, 4, kv_heads=2, size=6, rngs=nnx.Rngs(0)))
    shape = (3, 2, 5, 2, 6) if per_row else (2, 5, 2, 6)
    module.prefix = nnx.Param(jnp.zeros(shape))
    graph, state = nnx.split(module)
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32)
    state, x = jax.tree.map(draw, state), jnp.asarray(rng.normal(size=(3, 7, 8)))
    mask = (
        jnp.asarray(rng.random((3, 1, 7, 7)) < 0.5) | jnp.eye(7, dtype=bool)[None, None]
    )
    turn = _attention.rotation(rows(3, 7), _attention.frequencies(6, 20.0))
    run = lambda state, *sight: nnx.merge(graph, state)(x, _attention.Sight(*sight))
    got = jax.jit(run)(state, mask, turn)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
    want = oracle.attention(params, np.asarray(x), mask[:, 0], rows(3, 7), 20.0, 4, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_scaled_frequencies():
    rates = _attention.frequencies(8, 100.0)
    np.testing.assert_allclose(rates, [100.0 ** (-2 * i / 8) for i in range(4)])
    linear = _attention.frequencies(8, 100.0, _attention.Scaling("linear", 4.0))
    np.testing.assert_allclose(linear, rates / 4)
    llama3 = _attention.Scaling("llama3", 8.0, low=1.0, high=4.0, context=40)
    got = _attention.frequencies(8, 100.0, llama3)
    for rate, scaled in zip(rates, got, strict=True):
        wave = 2 * np.pi / rate
        if wave > 40 / 1.0:
            want = rate / 8
        elif wave < 40 / 4.0:
            want = rate
        else:
            s = (40 / wave - 1.0) / (4.0 - 1.0)
            want = (1 - s) * rate / 8 + s * rate
        np.testing.assert_allclose(scaled, want)
    assert got[0] == rates[0] and got[3] == rates[3] / 8


def gradient(config, params, **options):
    loss = losses.next_token(models.decoder(config, **options).apply)
    batch = {"tokens": rows(2, 6), "mask": jnp.ones(2)}
    return jax.jit(jax.grad(lambda p: loss(p, batch, None)[0]))(params)


@BOTH
def test_every_leaf_has_a_gradient(config):
    grads = gradient(config, drawn(models.decoder(config)))
    for path, leaf in leaves(grads):
        assert float(np.max(np.abs(leaf))) > 1e-6, path


def test_gradient_is_the_same_unrolled_and_with_remat():
    params = drawn(models.decoder(LLAMA))
    plain, other = (
        gradient(LLAMA, params, remat=on, unroll=on) for on in (False, True)
    )
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(same, plain, other)


@pytest.mark.parametrize("params_too", [False, True])
def test_half_precision(params_too):
    """Computed in, or also kept in: close to float32, and not equal to it."""
    config = dataclasses.replace(LLAMA, width=16, tied=params_too)
    params, x = drawn(models.decoder(config)), rows(2, 8)
    exact = jax.jit(models.decoder(config).apply)(params, x)
    name = "param_dtype" if params_too else "dtype"
    model = models.decoder(config, **{name: jnp.bfloat16})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    given = jax.tree.map(lambda a, s: np.asarray(a).astype(s.dtype), params, shapes)
    kind = "bfloat16" if params_too else "float32"
    assert {leaf.dtype.name for _, leaf in leaves(shapes)} == {kind}
    logits = jax.jit(model.apply)(given, x)
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.04


def test_full_precision_biases_on_a_half_precision_base():
    model = models.decoder(GPT2, param_dtype=jnp.bfloat16)
    params = drawn(model)
    full = lambda path, a: a.astype(jnp.float32) if models.biases_only(path) else a
    mixed = jax.tree_util.tree_map_with_path(
        lambda path, a: full(tree.path_string(path), a), params
    )
    logits = jax.eval_shape(model.apply, mixed, rows(2, 6))
    text = jax.eval_shape(
        lambda p: models.generate(model, p, rows(2, 4), steps=2), mixed
    )
    assert logits.shape == (2, 6, 13) and text.shape == (2, 2)


def test_init_is_that_of_gpt2():
    config = dataclasses.replace(LLAMA, vocab=40, width=64, hidden=96)
    params = models.decoder(config).init(jax.random.key(0))
    assert float(jnp.std(params["embed"])) == pytest.approx(0.02, rel=0.05)
    inner, into = params["blocks"]["mlp"]["up"], params["blocks"]["mlp"]["down"]
    assert float(jnp.std(inner["kernel"])) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(into["kernel"])) == pytest.approx(0.01, rel=0.05)
    assert (params["norm"]["scale"] == 1).all()


@BOTH
def test_program_does_not_grow_with_depth(config):
    def lines(depth):
        model = models.decoder(dataclasses.replace(config, depth=depth))
        params = jax.eval_shape(model.init, jax.random.key(0))
        loss = lambda p, x: jnp.sum(model.apply(p, x))
        x = jax.ShapeDtypeStruct((2, 6), jnp.int32)
        return len(jax.jit(jax.grad(loss)).lower(params, x).as_text().splitlines())

    assert lines(7) == lines(2)


def test_base_is_not_copied_per_client():
    config = DecoderConfig(vocab=64, width=128, depth=2, heads=2, hidden=256)
    model = models.decoder(config)
    key, adapted = jax.random.key(0), []

    def init(key):
        both = models.lora(
            model,
            model.init(key),
            rank=2,
            alpha=4.0,
            where=lambda path: path.endswith(("/q", "/v")),
            key=key,
        )
        adapted.append(both[0])
        return both[1]

    phi, theta = tree.partition(jax.eval_shape(init, key), models.lora_only)
    assert sorted(path for path, leaf in leaves(phi) if leaf is not None) == [
        f"blocks/attention/{name}/lora/{part}" for name in "qv" for part in "ab"
    ]

    def loss(phi, theta, batch):
        whole = tree.merge(phi, theta)
        return losses.next_token(adapted[0].apply)(whole, batch, None)[0]

    def temporaries(clients):
        shape = lambda a: jax.ShapeDtypeStruct((clients, *a.shape), a.dtype)
        batch = {"tokens": jnp.ones((1, 4), jnp.int32), "mask": jnp.ones(1)}
        step = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, 0)))
        lowered = step.lower(
            jax.tree.map(shape, phi), theta, jax.tree.map(shape, batch)
        )
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    per_client = (temporaries(16) - temporaries(4)) / 12
    assert tree.size(theta) > 1.2e6
    assert per_client < tree.size(theta) / 8


def test_layers_that_do_nothing_can_be_dropped():
    config = dataclasses.replace(GPT2, depth=4)
    model, x = models.decoder(config), rows(2, 5)
    params = drawn(model)
    quiet = np.array([1.0, 0.0, 1.0, 0.0], np.float32)
    for part in (params["blocks"]["attention"]["out"], params["blocks"]["mlp"]["down"]):
        part["kernel"] = np.asarray(part["kernel"]) * quiet[:, None, None]
        part["bias"] = np.asarray(part["bias"]) * quiet[:, None]
    emulator = models.decoder(dataclasses.replace(config, depth=2))
    kept = models.keep_layers(params, (0, 2))
    logits, apply = jax.jit(model.apply)(params, x), jax.jit(emulator.apply)
    np.testing.assert_allclose(apply(kept, x), logits, atol=1e-5)
    other = apply(models.keep_layers(params, (2, 0)), x)
    assert np.max(np.abs(other - logits)) > 1e-2
    with pytest.raises(ValueError, match=r"layers are 0 to 3, got \[4\]"):
        models.keep_layers(params, (4,))
    with pytest.raises(ValueError, match="no 'blocks', only"):
        models.keep_layers({"head": {}}, (0,))


def test_layers_at_even_distances():
    for depth in range(1, 20):
        for kept in range(2, depth + 1):
            want = [int(i * (depth - 1) / (kept - 1) + 0.5) for i in range(kept)]
            assert models.spread_layers(depth, kept) == tuple(want)
    assert models.spread_layers(5, 1) == (0,)
    with pytest.raises(ValueError, match=r"1 to 3 \(the depth\), got 4"):
        models.spread_layers(3, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.array([[1, 13]]), r"ids from 1 to 13, but the model has 13 tokens"),
        (jnp.array([[-1, 3]]), r"ids from -1 to 3"),
        (jnp.array([1, 3]), r"are \[B, T\], got {'tokens': \(2,\)}"),
        (
            {"ids": jnp.array([[1]])},
            "reads tokens, segments, positions.*got the keys ids",
        ),
        ({"tokens": rows(1, 4), "segments": rows(1, 3)}, r"\(1, 4\).*\(1, 3\)"),
        (rows(1, 10), r"rows of 10 tokens.*for 9 \(`context`\)"),
    ],
)
def test_refused_inputs(x, message):
    model = models.decoder(GPT2)
    with pytest.raises(ValueError, match=message):
        model.apply(drawn(model), x)


def test_refused_types_and_unknown_ids_under_jit():
    model = models.decoder(LLAMA)
    params = drawn(model)
    with pytest.raises(TypeError, match="integer ids, got float32"):
        model.apply(params, jnp.ones((1, 3)))
    for kind in (jnp.int32, jnp.int8):
        ids = jnp.array([[13, 1, 2], [-1, 1, 2], [12, 1, 2], [-13, 1, 2]], kind)
        logits = jax.jit(model.apply)(params, ids)
        unknown = jnp.isnan(logits).all(axis=(1, 2))
        assert unknown.tolist() == [True, True, False, True]
        assert jnp.isfinite(logits[2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads=3 must divide width=8"),
        ({"kv_heads": 3, "heads": 4}, "kv_heads=3 must divide heads=4"),
        ({"depth": 0, "vocab": -1}, "vocab=-1, depth=0 must be at least 1"),
        ({"layout": "bert"}, "layout='bert' must be"),
        ({"size": 3}, "size=3 of a head must be even"),
    ],
)
def test_refused_configurations(change, message):
    with pytest.raises(ValueError, match=f"DecoderConfig: {message}"):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama_gqa_tied", {"hidden_size": None}, "llama.*lacks hidden_size"),
        ("llama_gqa_tied", {"hidden_act": "relu"}, "llama: hidden_act='relu'.*'silu'"),
        (
            "llama_llama3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "llama: rope_parameters has rope_type='yarn'; supported.*'llama3'",
        ),
        (
            "llama_llama3",
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters has no 'factor'",
        ),
        ("qwen2", {"use_sliding_window": True}, "qwen2: use_sliding_window=True"),
        ("gpt2", {"n_head": None}, "gpt2.*lacks n_head"),
        ("gpt2", {"add_cross_attention": True}, "gpt2: add_cross_attention=True"),
    ],
)
def test_refused_config_json(name, change, message):
    raw = {**golden(name).config, **change}
    with pytest.raises(ValueError, match=message):
        KINDS[raw["model_type"]].config(raw)


def test_older_keys_of_rotary_positions():
    raw = {**golden("llama_llama3").config}
    rope = dict(raw.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    new = KINDS["llama"].config(
        {**raw, "rope_parameters": {**rope, "rope_theta": theta}}
    )
    old = KINDS["llama"].config({**raw, "rope_theta": theta, "rope_scaling": rope})
    assert old == new and old.theta == 100.0 and old.scaling.factor == 8.0
