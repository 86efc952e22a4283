"""Adapters of every form: closed forms, identity at first, what is trained, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedcl import models, tree
from fedcl.models._decoder import DecoderConfig, decoder
from fedcl.models._model import leaves
from fedcl.models._vit import ViTConfig, image_encoder
from tests import memory
from tests.oracles import peft as oracle
from tests.prompted import random_like

IMAGE = (4, 4, 1)
KEY = jax.random.key(1)
last = lambda *names: lambda path: path.split("/")[-1] in names
FORMS = {
    "lora": (lambda m, p: models.lora(m, p, rank=2, alpha=3.0, key=KEY), "lora_only"),
    "bottleneck": (
        lambda m, p: models.bottleneck(m, p, width=3, key=KEY),
        "adapters_only",
    ),
    "ia3": (models.ia3, "ia3_only"),
    "biases": (
        lambda m, p: models.biases(m, p, where=last("q", "up")),
        "biases_only",
    ),
}


def base(model, seed=0):
    return random_like(jax.eval_shape(model.init, jax.random.key(0)), seed)


@functools.cache
def vit(pool="class"):
    """Without biases in its attention, so that BitFit has some to add."""
    config = ViTConfig(
        image=IMAGE,
        patch=2,
        width=8,
        depth=3,
        heads=2,
        hidden=6,
        output="classes",
        num_classes=3,
        pool=pool,
        class_token=pool == "class",
        activation="gelu_new",
        eps=1e-6,
        qkv_bias=False,
    )
    model = image_encoder(config)
    return model, base(model)


def images(n=3, seed=7):
    return jnp.asarray(
        np.random.default_rng(seed).normal(size=(n, *IMAGE)), jnp.float32
    )


def net(params, pool="class"):
    return oracle.Net(oracle.cast(params), patch=2, heads=2, pool=pool)


def new_leaves(params, where):
    return {path for path, _ in leaves(params) if where(path)}


def shaken(params, where, seed=3):
    """The same parameters with what `where` selects moved, so that it does something."""
    noise = random_like(params, seed)
    move = lambda at, p, n: p + n if where(tree.path_string(at)) else p
    return jax.tree_util.tree_map_with_path(move, params, noise)


@pytest.mark.parametrize("name", FORMS)
def test_identity_at_first_and_its_closed_form_after(name):
    add, only = FORMS[name]
    model, params = vit()
    x, where = images(), getattr(models, only)
    adapted, full = add(model, params)
    apply = jax.jit(adapted.apply)
    np.testing.assert_allclose(apply(full, x), model.apply(params, x), atol=1e-5)
    assert jax.tree.structure(full) == jax.tree.structure(
        jax.eval_shape(adapted.init, KEY)
    )
    moved = shaken(full, where)
    got, want = apply(moved, x), oracle.logits(net(moved), x)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    assert np.abs(want - oracle.logits(net(params), x)).max() > 1e-2


def test_all_forms_at_once():
    model, params = vit()
    forms = [FORMS[name] for name in ("biases", "lora", "bottleneck", "ia3")]
    for add, _ in forms:
        model, params = add(model, params)
    where = models.any_of(*(getattr(models, only) for _, only in forms))
    moved = shaken(params, where)
    got, want = model.apply(moved, images()), oracle.logits(net(moved), images())
    np.testing.assert_allclose(got, want, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", FORMS)
def test_only_the_form_is_trained(name):
    add, only = FORMS[name]
    adapted, params = add(*vit())
    where = getattr(models, only)
    phi, theta = tree.partition(shaken(params, where), where)
    loss = lambda phi: jnp.sum(adapted.apply(tree.merge(phi, theta), images()) ** 2)
    grads = dict(leaves(jax.jit(jax.grad(loss))(phi)))
    trained = {path for path, g in grads.items() if g is not None}
    assert trained == new_leaves(params, where)
    dead = {path for path in trained if not np.asarray(grads[path]).any()}
    assert not dead


def test_predicates_part_the_leaves():
    model, params = vit()
    for name in FORMS:
        model, params = FORMS[name][0](model, params)
    kinds = ("lora", "adapters", "ia3", "biases", "norms", "prompts", "head")
    only = {name: getattr(models, f"{name}_only") for name in kinds}
    paths = [path for path, _ in leaves(params)]
    chosen = {name: {p for p in paths if where(p)} for name, where in only.items()}
    assert all(chosen[name] for name in kinds if name != "prompts")
    apart = ("lora", "adapters", "ia3", "biases")
    for i, a in enumerate(apart):
        assert all(chosen[a].isdisjoint(chosen[b]) for b in apart[i + 1 :])
    assert chosen["norms"] == {p for p in paths if "norm" in p}
    assert "blocks/norm1/bias" in chosen["biases"] & chosen["norms"]


def test_one_layer_by_hand_and_the_fused_projection():
    model = models.from_nnx(lambda r: Fused(rngs=r))
    params = base(model)
    adapted, full = models.ia3(model, params)
    scale = jnp.arange(1.0, 5.0)
    assert full["qkv"]["ia3"]["output"].shape == (4,)
    full["qkv"]["ia3"]["output"] = scale
    plain = np.asarray(model.apply(params, jnp.eye(2)))
    got = adapted.apply(full, jnp.eye(2))
    np.testing.assert_allclose(got[:, :2], plain[:, :2], rtol=1e-6)
    np.testing.assert_allclose(got[:, 2:], plain[:, 2:] * scale[None], rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_scalings_merge_into_kernels_and_biases(fused):
    if fused:
        model = models.from_nnx(lambda r: Fused(rngs=r))
        params, x = base(model), jnp.eye(2)
        all_ = lambda path: True
        adapted, full = models.ia3(model, params, outputs=all_, inputs=all_)
    else:
        (model, params), x = FORMS["biases"][0](*vit()), images()
        either = lambda path: path.split("/")[-1] in ("k", "v", "down", "up")
        adapted, full = models.ia3(model, params, outputs=either)
    moved = shaken(full, models.ia3_only)
    merged = models.merge_ia3(moved)
    assert tree.describe(merged) == tree.describe(params)
    want = adapted.apply(moved, x)
    np.testing.assert_allclose(model.apply(merged, x), want, atol=1e-5, rtol=1e-5)
    assert not np.allclose(model.apply(params, x), want, atol=1e-2)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), moved, full)
    stacked = jax.vmap(models.merge_ia3)(both)
    for i, one in enumerate((merged, params)):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        for a, b in zip(jax.tree.leaves(row), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_scalings_that_cannot_be_merged_are_refused():
    model, params = models.ia3(*vit())
    down = lambda path: path.endswith("mlp/down")
    low = models.lora(model, params, rank=2, alpha=1.0, where=down, key=KEY)[1]
    with pytest.raises(ValueError, match="merge_ia3: .*mlp/down' carries lora as well"):
        models.merge_ia3(low)
    small = models.quantise(*vit(), how="int8", group=2)
    with pytest.raises(
        ValueError, match=r"merge_ia3: '.*quantised kernel \(int8, scale"
    ):
        models.merge_ia3(models.ia3(*small)[1])


class Fused(nnx.Module):
    def __init__(self, *, rngs):
        self.qkv = nnx.Linear(2, 6, rngs=rngs)

    def __call__(self, x):
        return self.qkv(x)


def test_lora_has_a_rank_for_each_layer():
    model, params = vit()
    ranks = {"blocks/attention/q": 1, "blocks/mlp/up": 4, "head": 2}
    adapted, full = models.lora(
        model, params, rank=ranks, alpha=4.0, where=last("q", "up"), key=KEY
    )
    low = {p: a for p, a in leaves(full) if p.endswith(("lora/a", "lora/scale"))}
    assert {p: a.shape for p, a in low.items() if p.endswith("/a")} == {
        "blocks/attention/q/lora/a": (3, 8, 1),
        "blocks/mlp/up/lora/a": (3, 8, 4),
    }
    np.testing.assert_array_equal(low["blocks/attention/q/lora/scale"], 4.0)
    np.testing.assert_array_equal(low["blocks/mlp/up/lora/scale"], 1.0)
    adapted.apply(full, images())


def test_unmerging_undoes_merging():
    model, params = vit()
    adapted, full = models.lora(
        model, params, rank=2, alpha=3.0, where=last("q", "up"), key=KEY
    )
    merge, unmerge = jax.jit(models.merge_lora), jax.jit(models.unmerge_lora)
    full = shaken(full, models.lora_only)
    merged = merge(full)
    np.testing.assert_allclose(
        model.apply(merged, images()), adapted.apply(full, images()), atol=2e-5
    )
    back = unmerge(merged, full)
    assert jax.tree.structure(back) == jax.tree.structure(full)
    for (path, a), (_, b) in zip(leaves(back), leaves(full), strict=True):
        # A kernel is rounded once on the way there and once on the way back.
        limit = 2**-22 if path.endswith("kernel") else 0
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= limit, path
    # Small whole numbers add without rounding: there the way back is exact.
    whole = jax.tree.map(lambda a: jnp.asarray(np.round(4 * np.asarray(a))), full)
    jax.tree.map(np.testing.assert_array_equal, unmerge(merge(whole), whole), whole)


def test_ranks_are_masks_and_may_be_traced():
    _, full = FORMS["lora"][0](*vit())
    some = models.with_rank(full, {"head": 1})
    assert some["head"]["lora"]["mask"].tolist() == [1, 0]
    assert some["patch"]["lora"]["mask"].tolist() == [1, 1]
    by_layer = models.with_rank(full, {"blocks/mlp/up": jnp.array([0, 1, 2])})
    assert by_layer["blocks"]["mlp"]["up"]["lora"]["mask"].tolist() == [
        [0, 0],
        [1, 0],
        [1, 1],
    ]
    clients = jax.vmap(lambda r: models.with_rank(full, r)["head"]["lora"]["mask"])
    assert jax.jit(clients)(jnp.array([2, 0, 1])).tolist() == [[1, 1], [0, 0], [1, 0]]


def test_dropout_on_the_path_alone():
    model, params = vit()
    adapted, full = models.lora(model, params, rank=2, alpha=2.0, dropout=0.5, key=KEY)
    plain = models.lora(model, params, rank=2, alpha=2.0, key=KEY)[0]
    moved, x = shaken(full, models.lora_only), images()
    apply = jax.jit(adapted.apply)
    np.testing.assert_allclose(apply(moved, x), plain.apply(moved, x), atol=1e-6)
    one, two = (apply(moved, x, jax.random.key(i)) for i in range(2))
    assert not np.allclose(one, two, atol=1e-3)
    np.testing.assert_allclose(apply(full, x, KEY), model.apply(params, x), atol=1e-5)


DECODER = DecoderConfig(vocab=16, width=256, depth=4, heads=4, hidden=256, kv_heads=2)
IN_MEMORY = {
    "lora": lambda m, p: models.lora(
        m, p, rank=1, alpha=2.0, where=last("q", "v"), key=KEY
    ),
    "bottleneck": lambda m, p: models.bottleneck(m, p, width=2, key=KEY),
    "ia3": models.ia3,
    "biases": models.biases,
    "prompt": lambda m, p: models.soft_prompt(m, p, length=2, key=KEY),
    "prefix": lambda m, p: models.prefix(m, p, length=2, key=KEY),
}
ALL = models.any_of(
    models.lora_only,
    models.adapters_only,
    models.ia3_only,
    models.biases_only,
    models.prompts_only,
)


def need(names, clients):
    model = decoder(DECODER)
    params = jax.eval_shape(model.init, KEY)
    for name in names:
        model, params = IN_MEMORY[name](model, params)
    x = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    return memory.local_training(model.apply, params, ALL, x, clients)


def test_no_form_copies_the_base():
    many = need(IN_MEMORY, 16)
    assert many.temporary < 4 * many.base


def test_memory_of_lora_grows_with_the_adapters_alone():
    table = {k: need(["lora"], k) for k in (1, 4, 16, 64)}
    activations = table[1].temporary
    assert activations < table[1].base / 3  # So that the bound can tell.
    for k, it in table.items():
        assert it.temporary <= it.base + k * (it.trained + activations)


def test_refusals():
    model, params = vit()
    with pytest.raises(ValueError, match=r"bottleneck: `where` selects no .*'head'"):
        models.bottleneck(model, params, width=2, where=lambda p: False, key=KEY)
    with pytest.raises(ValueError, match="`width` must be at least 1, got 0"):
        models.bottleneck(model, params, width=0, key=KEY)
    never = lambda path: False
    with pytest.raises(ValueError, match=r"ia3: `where` selects no .*attention/k"):
        models.ia3(model, params, outputs=never, inputs=never)
    with pytest.raises(ValueError, match=r"biases: `where` selects no .*attention/q"):
        models.biases(model, params, where=lambda path: path == "blocks/mlp/up")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"alpha is {alpha}.*positive"):
            models.lora(model, params, rank=1, alpha=alpha, key=KEY)
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\), got 1.0"):
        models.lora(model, params, rank=1, alpha=1.0, dropout=1.0, key=KEY)
    with pytest.raises(ValueError, match=r"lora: no layer 'tail'; known are .*'head'"):
        models.lora(model, params, rank={"tail": 1}, alpha=1.0, key=KEY)
    _, full = FORMS["lora"][0](model, params)
    with pytest.raises(ValueError, match="rank 3 for 'head'.*allowed are 0 to 2"):
        models.with_rank(full, {"head": 3})
    with pytest.raises(ValueError, match="no layer carries an adapter"):
        models.with_rank(params, 1)
    with pytest.raises(ValueError, match="unmerge_lora: the parameters have no"):
        models.unmerge_lora({"head": params["head"]}, full)
    kinds = {
        "dtype int8": jnp.ones((8, 3), jnp.int8),
        "nf4, scale": {"nf4": 1, "scale": 2},
    }
    for what, kernel in kinds.items():
        full["head"]["kernel"] = kernel
        with pytest.raises(ValueError, match=f"'head' has a quantised .*{what}"):
            models.merge_lora(full)
