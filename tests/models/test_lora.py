"""LoRA: identity at first, exact merging, rank masks, and a base that is not copied."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedcl import models, tree
from fedcl.models._model import leaves


def numpy_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def base(model, seed=0):
    return numpy_like(jax.eval_shape(model.init, jax.random.key(0)), seed)


def shaken(params, seed=3):
    """The same parameters with adapters that do something (b is 0 at first)."""
    noise = numpy_like(params, seed)
    move = lambda path, p, n: n if tree.path_string(path).endswith("lora/b") else p
    return jax.tree_util.tree_map_with_path(move, params, noise)


class Shared(nnx.Linear):
    """A subclass with a mind of its own, and a layer used twice."""

    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


class User(nnx.Module):
    def __init__(self, *, rngs):
        self.one = Shared(6, 6, rngs=rngs)
        self.two = self.one
        self.list = nnx.List([nnx.Linear(6, 3, use_bias=False, rngs=rngs)])

    def __call__(self, x):
        return self.list[0](self.two(self.one(x)))


IMAGE = (4, 4, 1)
CASES = {
    "mlp": (lambda: models.mlp((16, 8, 4)), (5, 16)),
    "convnet": (lambda: models.convnet(IMAGE, (4,), 3), (5, *IMAGE)),
    "vit": (lambda: models.vit(IMAGE, 2, 8, 2, 2, 4), (5, *IMAGE)),
    "root": (lambda: models.from_nnx(lambda r: nnx.Linear(6, 4, rngs=r)), (5, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_identity_at_first_and_merged_equals_applied(name):
    build, shape = CASES[name]
    model = build()
    params = base(model)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    adapted, full = models.lora(model, params, rank=2, alpha=3.0, key=jax.random.key(0))
    plain, apply = jax.jit(model.apply), jax.jit(adapted.apply)
    before = plain(params, x)
    np.testing.assert_allclose(apply(full, x), before, rtol=1e-6, atol=1e-6)
    moved = shaken(full)
    merged = models.merge_lora(moved)
    assert not np.allclose(apply(moved, x), before, atol=1e-2)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    got = plain(merged, x)
    scale = float(jnp.max(jnp.abs(got)))
    np.testing.assert_allclose(apply(moved, x) / scale, got / scale, atol=1e-6)


def test_a_users_module_with_a_shared_layer_by_hand():
    model = models.from_nnx(lambda rngs: User(rngs=rngs))
    adapted, params = models.lora(
        model,
        base(model),
        rank=2,
        alpha=4.0,
        where=lambda path: path == "one",
        key=jax.random.key(0),
    )
    params = shaken(params)
    x = np.random.default_rng(1).normal(size=(5, 6))
    one = jax.tree.map(lambda a: np.asarray(a, np.float64), params["one"])
    low = one["lora"]
    h = x
    for _ in range(2):
        path = 2.0 * (h @ low["a"]) @ low["b"]
        h = np.tanh(h @ one["kernel"] + one["bias"]) + path
    want = h @ np.asarray(params["list"]["0"]["kernel"], np.float64)
    got = adapted.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_leaves_and_their_shapes():
    model = models.vit(IMAGE, 2, 8, 3, 2, 4)
    adapted, params = models.lora(
        model,
        base(model),
        rank=2,
        alpha=6.0,
        where=lambda path: path.endswith("qkv"),
        key=jax.random.key(0),
    )
    low = {path: leaf for path, leaf in leaves(params) if "/lora/" in path}
    at = "blocks/attention/qkv/lora/"
    assert {path: leaf.shape for path, leaf in low.items()} == {
        at + "a": (3, 8, 2),
        at + "b": (3, 2, 24),
        at + "scale": (3,),
        at + "mask": (3, 2),
    }
    np.testing.assert_array_equal(low[at + "scale"], 3.0)
    assert low[at + "scale"].dtype == jnp.float32
    assert not low[at + "b"].any() and low[at + "a"].all()
    fresh = jax.eval_shape(adapted.init, jax.random.key(1))
    shape = lambda t: jax.tree.map(lambda a: (a.shape, a.dtype), t)
    assert shape(fresh) == shape(params)


def test_rank_mask_switches_directions_off():
    model = models.mlp((6, 5, 4))
    params = base(model)
    adapted, full = models.lora(model, params, rank=3, alpha=3.0, key=jax.random.key(0))
    full, x, apply = shaken(full), jnp.ones((2, 6)), jax.jit(adapted.apply)
    mask = jnp.array([1.0, 0.0, 0.0])
    where = lambda path, value, old: (
        value if tree.path_string(path).endswith("lora/mask") else old
    )
    masked, none = (
        jax.tree_util.tree_map_with_path(lambda p, a, m=m: where(p, m, a), full)
        for m in (mask, jnp.zeros(3))
    )
    cut = jax.tree_util.tree_map_with_path(
        lambda p, a: a * mask[:, None] if tree.path_string(p).endswith("lora/b") else a,
        full,
    )
    out = apply(masked, x)
    np.testing.assert_allclose(out, apply(cut, x), atol=1e-6)
    np.testing.assert_allclose(
        out, model.apply(models.merge_lora(masked), x), atol=1e-5
    )
    np.testing.assert_allclose(apply(none, x), model.apply(params, x), atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x) ** 2)))(masked)
    low = grads["head"]["lora"]
    assert not low["a"][:, 1:].any() and not low["b"][1:].any()
    assert low["a"][:, 0].any() and low["b"][0].any()


def test_predicates_select_the_trained_leaves():
    model = models.mlp((6, 5, 4))
    adapted, params = models.lora(
        model, base(model), rank=2, alpha=2.0, key=jax.random.key(0)
    )
    trained = lambda where: {
        path
        for path, leaf in leaves(tree.partition(params, where)[0])
        if leaf is not None
    }
    low = {f"{at}/lora/{part}" for at in ("layers/0", "head") for part in "ab"}
    kernels = {
        f"{at}/{part}" for at in ("layers/0", "head") for part in ("kernel", "bias")
    }
    head = {"head/kernel", "head/bias"}
    assert trained(models.lora_only) == low
    assert trained(models.head_only) == head | {"head/lora/a", "head/lora/b"}
    assert trained(models.any_of(models.lora_only, models.head_only)) == low | head
    assert trained(models.everything) == low | kernels

    phi, theta = tree.partition(shaken(params), models.lora_only)
    loss = lambda phi: jnp.sum(adapted.apply(tree.merge(phi, theta), jnp.ones((2, 6))))
    grads = jax.jit(jax.grad(loss))(phi)
    assert {path for path, g in leaves(grads) if g is not None and g.any()} == low


def test_scale_and_mask_have_no_gradient():
    model = models.mlp((6, 4))
    adapted, params = models.lora(
        model, base(model), rank=2, alpha=2.0, key=jax.random.key(0)
    )
    loss = lambda p: jnp.sum(adapted.apply(p, jnp.ones((2, 6))))
    low = jax.jit(jax.grad(loss))(shaken(params))["head"]["lora"]
    assert low["a"].any() and low["b"].any()
    assert not low["scale"].any() and not low["mask"].any()


def test_base_is_not_copied_per_client():
    side, clients = 256, 16
    model = models.mlp((side, side, side, 4))
    adapted = models.lora(
        model,
        base(model),
        rank=2,
        alpha=2.0,
        where=lambda path: path != "head",
        key=jax.random.key(0),
    )
    phi, theta = tree.partition(adapted[1], models.lora_only)
    stacked = jax.tree.map(lambda a: jnp.stack([a] * clients), phi)
    x = jnp.ones((clients, 4, side))

    def temporaries(apply, phi):
        loss = lambda phi, x: jnp.sum(apply(phi, x) ** 2)
        step = jax.jit(jax.vmap(jax.grad(loss)))
        memory: Any = step.lower(phi, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    applied = lambda phi, x: adapted[0].apply(tree.merge(phi, theta), x)
    merged = lambda phi, x: model.apply(models.merge_lora(tree.merge(phi, theta)), x)
    copies = clients * 2 * side * side * 4
    assert temporaries(applied, stacked) < copies / 8
    assert temporaries(merged, stacked) > copies / 2  # The test can tell.


def test_vmap_over_adapters_equals_the_loop():
    model = models.vit(IMAGE, 2, 8, 2, 2, 4)
    adapted, params = models.lora(
        model, base(model), rank=2, alpha=2.0, key=jax.random.key(0)
    )
    phi, theta = tree.partition(params, models.lora_only)
    phis = [numpy_like(phi, seed) for seed in range(3)]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, *IMAGE)), jnp.float32)
    apply = lambda phi, theta, x: adapted.apply(tree.merge(phi, theta), x)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *phis)
    got = jax.jit(jax.vmap(apply, in_axes=(0, None, 0)))(stacked, theta, x)
    alone = jax.jit(apply)
    for i in range(3):
        np.testing.assert_allclose(got[i], alone(phis[i], theta, x[i]), atol=2e-4)


def test_two_adapters_of_different_ranks():
    model = models.mlp((6, 5, 4))
    args = {"alpha": 2.0, "key": jax.random.key(0)}
    head = lambda path: path == "head"
    adapted, params = models.lora(model, base(model), rank=1, where=head, **args)
    adapted, params = models.lora(adapted, params, rank=3, **args)
    assert params["head"]["lora"]["a"].shape == (5, 1)
    assert params["layers"]["0"]["lora"]["a"].shape == (6, 3)
    assert adapted.apply(params, jnp.ones((2, 6))).shape == (2, 4)


def test_half_precision_base_stays_half_precision():
    factory = lambda rngs: nnx.Linear(
        6, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
    )
    model = models.from_nnx(factory)
    adapted, params = models.lora(
        model, base(model), rank=2, alpha=2.0, key=jax.random.key(0)
    )
    assert params["lora"]["b"].dtype == jnp.float32
    assert adapted.apply(params, jnp.ones((2, 6))).dtype == jnp.bfloat16
    assert models.merge_lora(params)["kernel"].dtype == jnp.bfloat16


def test_refusals():
    model = models.mlp((6, 5, 4))
    params, key = base(model), jax.random.key(0)
    args = {"alpha": 1.0, "key": key}
    with pytest.raises(
        ValueError, match=r"selects no linear layer.*'head', 'layers/0'"
    ):
        models.lora(model, params, rank=1, where=lambda path: path == "tail", **args)
    with pytest.raises(ValueError, match=r"rank 5 does not fit 'head'.*5 x 4.*1 to 4"):
        models.lora(model, params, rank=5, **args)
    with pytest.raises(ValueError, match="rank 0 does not fit"):
        models.lora(model, params, rank=0, **args)
    with pytest.raises(ValueError, match="have no 'layers/0'"):
        models.lora(model, {"head": params["head"]}, rank=1, **args)
    foreign = models.from_linen(linen.Dense(3), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"model.factory.*from_nnx"):
        models.lora(foreign, params, rank=1, **args)
    _, low = models.lora(model, params, rank=1, **args)
    low["head"]["kernel"] = low["head"]["kernel"].astype(jnp.int8)
    with pytest.raises(ValueError, match="dtype int8"):
        models.merge_lora(low)
