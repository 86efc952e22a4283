"""from_nnx and from_linen: the adapted module is the module, as a pure function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedcl import models


class Net(nnx.Module):
    """A list, a stack of two scanned layers, a norm and dropout."""

    def __init__(self, rate: float = 0.0, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        stack = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
        self.stack = nnx.split_rngs(splits=2)(stack)(rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.drop1 = nnx.Dropout(rate, rngs=rngs)
        self.drop2 = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        graphdef, stacked = nnx.split(self.stack)
        step = lambda x, s: (jnp.tanh(nnx.merge(graphdef, s)(x)), None)
        x = jax.lax.scan(step, x, stacked)[0]
        return self.drop2(self.drop1(self.norm(x)))


class BatchNormed(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


def drawn(model: models.Model, seed: int) -> Any:
    """Parameters from NumPy: quicker than compiling the initialisers."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.float32)


def test_nnx_equals_the_module():
    model = models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(jax.random.key(5)))
    params = model.init(jax.random.key(5))
    x = inputs(6, 4)
    np.testing.assert_array_equal(params["kernel"], module.kernel[...])
    np.testing.assert_array_equal(model.apply(params, x), module(x))


def test_nnx_names_are_nested_strings():
    shapes = jax.eval_shape(
        models.from_nnx(lambda rngs: Net(rngs=rngs)).init, jax.random.key(0)
    )
    assert sorted(shapes) == ["layers", "norm", "stack"]
    assert sorted(shapes["layers"]) == ["0", "1"]
    assert shapes["stack"]["kernel"].shape == (2, 4, 4)


def test_nnx_uses_every_parameter_where_it_belongs():
    model = models.from_nnx(lambda rngs: Net(rngs=rngs))
    p, x = drawn(model, 0), inputs(6, 4)
    h = np.asarray(x, np.float64)
    for layer in (p["layers"]["0"], p["layers"]["1"]):
        h = np.tanh(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
    for i in range(2):
        k, b = np.asarray(p["stack"]["kernel"][i]), np.asarray(p["stack"]["bias"][i])
        h = np.tanh(h @ k + b)
    g = h.reshape(6, 2, 2)
    g = (g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-6)
    want = g.reshape(6, 4) * np.asarray(p["norm"]["scale"]) + np.asarray(
        p["norm"]["bias"]
    )
    np.testing.assert_allclose(model.apply(p, x), want, atol=2e-5)


def test_vmap_over_stacked_parameters_equals_the_loop():
    model = models.from_nnx(lambda rngs: Net(rngs=rngs))
    trees, x = [drawn(model, i) for i in range(3)], inputs(3, 5, 4)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *trees)
    loss = lambda p, x: jnp.sum(model.apply(p, x) ** 2)
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked, x)
    step = jax.jit(jax.value_and_grad(loss))
    for i, tree in enumerate(trees):
        alone = step(tree, x[i])
        chosen = jax.tree.map(lambda a, i=i: a[i], mapped)
        for a, b in zip(jax.tree.leaves(chosen), jax.tree.leaves(alone), strict=True):
            error = np.max(np.abs(a - b)) / np.max(np.abs(b))
            assert error < 1e-4


def test_dropout_follows_the_key():
    model = models.from_nnx(lambda rngs: Net(0.5, rngs=rngs))
    plain = models.from_nnx(lambda rngs: Net(0.0, rngs=rngs))
    params, x = drawn(model, 0), inputs(200, 4)
    calm = model.apply(params, x)
    one, again, other = (model.apply(params, x, jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(calm, plain.apply(params, x))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    kept = np.asarray(one) != 0
    np.testing.assert_allclose(one[kept], 4 * calm[kept], rtol=1e-6)
    # Two layers at rate 1/2 with masks of their own keep a quarter, with the same
    # mask they would keep a half.
    assert 0.2 < kept.mean() < 0.3


def test_nnx_refuses_state_that_is_no_parameter():
    with pytest.raises(ValueError, match=r"norm/mean \(BatchStat\).*GroupNorm"):
        models.from_nnx(lambda rngs: BatchNormed(rngs=rngs))


def test_nnx_refuses_a_factory_of_something_else():
    factory: Any = lambda rngs: jnp.ones(3)
    with pytest.raises(TypeError, match=r"must return an nnx[.]Module, got"):
        models.from_nnx(factory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"kernel": p["kernel"]}, r"bias: given nothing, expected \(3,\)"),
        (lambda p: p | {"extra": jnp.ones(2)}, r"extra: given \(2,\), expected noth"),
        (
            lambda p: jax.tree.map(lambda a: jnp.stack([a, a]), p),
            r"kernel: given \(2, 4, 3\), expected \(4, 3\)(.|\n)*jax.vmap",
        ),
    ],
)
def test_nnx_refuses_parameters_that_do_not_fit(change, message):
    model = models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        model.apply(change(params), jnp.ones((2, 4)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x = linen.relu(linen.Dense(5)(x))
        return linen.Dropout(0.5)(x, deterministic=deterministic)


def test_linen_equals_the_module():
    model = models.from_linen(linen.Dense(3), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    params, x = model.init(jax.random.key(2)), inputs(6, 4)
    want = linen.Dense(3).init(jax.random.key(2), x)
    np.testing.assert_array_equal(params["kernel"], want["params"]["kernel"])
    np.testing.assert_array_equal(model.apply(params, x), linen.Dense(3).apply(want, x))


def test_linen_is_told_whether_it_trains():
    model = models.from_linen(
        LinenNet(),
        jnp.ones((1, 4)),
        call=lambda m, x, train: m(x, deterministic=not train),
    )
    params, x = drawn(model, 0), inputs(50, 4)
    calm, one, again, other = (
        model.apply(params, x, k)
        for k in (None, *(jax.random.key(s) for s in (1, 1, 2)))
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    kept = np.asarray(one) != 0
    np.testing.assert_allclose(one[kept], 2 * calm[kept], rtol=1e-6)


def test_linen_refuses_other_collections():
    module = linen.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=r"batch_stats.*linen.GroupNorm"):
        models.from_linen(module, jnp.ones((1, 4)))
