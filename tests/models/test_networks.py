"""The networks: against a NumPy oracle, against lax.conv, and their initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedcl import models
from fedcl.models._conv import patches, pooled
from fedcl.models._model import leaves
from tests.oracles import vit as oracle

TINY = {"image": (4, 6, 2), "patch": 2, "width": 8, "heads": 2, "num_classes": 3}


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, shapes)


def images(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("unroll", [False, True])
def test_vit_equals_the_oracle(pool, unroll):
    model = models.vit(**TINY, depth=2, pool=pool, unroll=unroll)
    params, x = drawn(model), images(3, 4, 6, 2)
    want = oracle.forward(params, np.asarray(x), patch=2, heads=2, pool=pool)
    assert want.shape == (3, 3)
    np.testing.assert_allclose(model.apply(params, x), want, atol=1e-4, rtol=1e-4)


def test_vit_stacks_its_blocks_and_takes_flat_rows():
    model = models.vit(**TINY, depth=3, hidden=5, pool="class")
    params, x = drawn(model), images(5, 4, 6, 2)
    assert params["blocks"]["mlp"]["up"]["kernel"].shape == (3, 8, 5)
    assert params["position"].shape == (7, 8)
    apply = jax.jit(model.apply)
    logits = apply(params, x)
    np.testing.assert_allclose(apply(params, x.reshape(5, -1)), logits, atol=1e-6)
    order = jnp.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(apply(params, x[order]), logits[order], atol=1e-5)


def test_vit_program_does_not_grow_with_depth():
    def lines(depth):
        model = models.vit(**TINY, depth=depth)
        params = jax.eval_shape(model.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, 4, 6, 2), jnp.float32)
        return len(jax.jit(model.apply).lower(params, x).as_text().splitlines())

    assert lines(5) == lines(2)


@pytest.mark.parametrize("form", ["patches", "conv"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 1), (5, 3)])
def test_patch_conv_equals_lax_conv(kernel, stride, padding, form):
    options = {"stride": stride, "padding": padding, "form": form}
    conv = nnx.eval_shape(
        lambda: models.PatchConv(2, 4, kernel, **options, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(conv)
    rng = np.random.default_rng(1)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
    state, x = jax.tree.map(draw, state), images(2, 7, 8, 2)

    def ours(state, x):
        return nnx.merge(graphdef, state)(x)

    def theirs(state, x):
        linear = state["linear"]
        kernels = linear["kernel"][...].reshape(kernel, kernel, 2, 4)
        y = jax.lax.conv_general_dilated(
            x,
            kernels,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + linear["bias"][...].reshape(1, 1, 1, 4)

    def both(f):
        loss = lambda s, x: (jnp.sum(jnp.sin(f(s, x))), f(s, x))
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x)

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, both(ours), both(theirs))


def uses_lax_conv(form, adapted=False):
    model = models.convnet((8, 8, 2), widths=(4,), num_classes=3, form=form)
    params = model.init(jax.random.key(0))
    if adapted:
        options = {"rank": 2, "alpha": 1.0, "key": jax.random.key(1)}
        model, params = models.lora(model, params, **options)
    program = jax.make_jaxpr(model.apply)(params, jnp.ones((5, 8, 8, 2)))
    return "conv_general_dilated" in str(program)


def test_the_form_of_a_convolution_is_that_of_the_backend(monkeypatch):
    assert uses_lax_conv("conv") and not uses_lax_conv("patches")
    for backend in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda found=backend: found)
        assert uses_lax_conv(None) == (backend != "cpu")


def test_a_convolution_with_an_adapter_is_by_patches():
    assert not uses_lax_conv("conv", adapted=True)


def test_patches_follow_the_order_of_the_kernel():
    x = jnp.arange(18.0).reshape(1, 3, 3, 2)
    got = patches(x, 2, 1, "VALID")
    np.testing.assert_array_equal(got[0, 1, 0], [6, 7, 8, 9, 12, 13, 14, 15])


def test_pooling_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(pooled(x, 2, "max")[0, :, :, 0], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(
        pooled(x, 2, "avg")[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]]
    )


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_convnet_by_hand(pool):
    model = models.convnet((4, 4, 1), (4,), 2, kernel=1, groups=2, pool=pool)
    p, x = drawn(model), images(3, 4, 4, 1)
    p64 = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    conv, norm = p64["convs"]["0"]["linear"], p64["norms"]["0"]
    h = np.asarray(x, np.float64) @ conv["kernel"] + conv["bias"]
    g = h.reshape(3, 4, 4, 2, 2)
    mean, var = (f(g, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    h = ((g - mean) / np.sqrt(var + 1e-6)).reshape(h.shape)
    h = np.maximum(h * norm["scale"] + norm["bias"], 0).reshape(3, 2, 2, 2, 2, 4)
    h = (np.max if pool == "max" else np.mean)(h, axis=(2, 4)).reshape(3, -1)
    want = h @ p64["head"]["kernel"] + p64["head"]["bias"]
    np.testing.assert_allclose(model.apply(p, x), want, atol=1e-4)


def test_mlp_by_hand():
    model = models.mlp((6, 5, 4, 3), jnp.tanh)
    p, x = drawn(model), images(2, 3, 2)
    h = np.asarray(x, np.float64).reshape(2, 6)
    for layer in (p["layers"]["0"], p["layers"]["1"]):
        h = np.tanh(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
    want = h @ np.asarray(p["head"]["kernel"]) + np.asarray(p["head"]["bias"])
    np.testing.assert_allclose(model.apply(p, x), want, atol=1e-5)


@pytest.fixture(scope="module")
def initial():
    """Parameters of three seeds, [3, ...] per leaf, drawn under one vmap."""
    model = models.vit((8, 8, 1), 2, 32, 2, 2, 10, pool="class")
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    return jax.jit(jax.vmap(model.init))(keys)


def test_init_has_lecun_scales(initial):
    for path, leaf in leaves(initial):
        name, values = path.rsplit("/", 1)[-1], np.asarray(leaf)
        if name == "kernel":
            want = values.shape[-2] ** -0.5
        elif name in ("position", "class_token"):
            want = 0.02
        else:
            np.testing.assert_array_equal(values, float(name == "scale"), path)
            continue
        error = 4 * want / np.sqrt(values.size)
        assert abs(values.mean()) < error, path
        assert abs(values.std() - want) < error, path


def test_init_draws_are_independent_between_leaves_and_seeds(initial):
    drawn = ("kernel", "position", "class_token")
    rows = [
        np.asarray(leaf[seed]).ravel()
        for path, leaf in leaves(initial)
        if path.endswith(drawn)
        for seed in range(3)
    ]
    assert len(rows) == 3 * 8
    for i, one in enumerate(rows):
        for other in rows[:i]:
            n = min(one.size, other.size)
            assert abs(np.corrcoef(one[:n], other[:n])[0, 1]) < 4.5 / np.sqrt(n)


def test_init_depends_on_the_key_alone():
    model = models.mlp((4, 3))
    one, again, other = (model.init(jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one["head"]["kernel"], again["head"]["kernel"])
    assert not np.array_equal(one["head"]["kernel"], other["head"]["kernel"])


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (models.mlp, {"sizes": (4,)}, r"inputs and outputs, got \(4,\)"),
        (models.vit, {"patch": 3}, "side 3 do not tile an image of 8 x 8"),
        (models.vit, {"width": 30, "heads": 4}, "heads=4, width=30"),
        (models.vit, {"pool": "max"}, "'mean' or 'class', got 'max'"),
        (models.convnet, {"image": (6, 8, 1)}, "multiples of 4, got 6 x 8"),
        (models.convnet, {"widths": (6,)}, r"groups=4.*widths=\(6,\)"),
        (models.convnet, {"pool": "mean"}, "'max' or 'avg', got 'mean'"),
        (models.convnet, {"form": "fft"}, "'patches', 'conv' or None, got 'fft'"),
    ],
)
def test_wrong_sizes_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_mlp_drops_hidden_units_in_training_alone():
    model, plain = models.mlp((6, 64, 3), dropout=0.5), models.mlp((6, 64, 3))
    params, x = drawn(plain), images(4, 6)
    np.testing.assert_array_equal(model.apply(params, x), plain.apply(params, x))
    one = lambda seed: model.apply(params, x, jax.random.key(seed))
    np.testing.assert_array_equal(one(0), one(0))
    assert not np.allclose(one(0), one(1))
    many = jax.vmap(lambda k: model.outputs(params, x, k).features)
    kept = many(jax.random.split(jax.random.key(2), 400)).mean(axis=0)
    np.testing.assert_allclose(kept, plain.outputs(params, x).features, atol=0.6)
    with pytest.raises(ValueError, match="in \\[0, 1\\), got 1"):
        models.mlp((6, 3), dropout=1.0)


def test_torch_init_is_uniform_within_one_over_root_of_the_inputs():
    model = models.mlp((400, 100, 3), init="torch")
    params = model.init(jax.random.key(0))
    for layer, inputs in ((params["layers"]["0"], 400), (params["head"], 100)):
        for leaf in layer.values():
            assert jnp.abs(leaf).max() <= inputs**-0.5
            assert jnp.abs(leaf).max() > 0.9 * inputs**-0.5 or leaf.size < 30
    kernel = params["layers"]["0"]["kernel"]
    np.testing.assert_allclose(kernel.var(), 1 / (3 * 400), rtol=0.02)
    with pytest.raises(ValueError, match="'lecun', 'torch'.*got 'he'"):
        models.mlp((6, 3), init="he")  # type: ignore[arg-type]
