"""Transforms per context against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fedcl import streams

sample = jax.jit(streams.Stream.sample)


def apply(domains, x):
    """Every row in every context, [K, M, ...]."""
    over_rows = jax.vmap(domains.transform, (None, None, 0))
    over_contexts = jax.vmap(over_rows, (None, 0, None))
    contexts = jnp.arange(domains.num_contexts)
    return np.asarray(jax.jit(over_contexts)(domains.tables, contexts, {"x": x})["x"])


def rotated(image: np.ndarray, angle: float) -> np.ndarray:
    """Counter-clockwise about the centre, bilinear, float64, pixel by pixel."""
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    out, (h, w) = np.zeros(image.shape), image.shape
    for i in range(h):
        for j in range(w):
            di, dj = i - (h - 1) / 2, j - (w - 1) / 2
            a = cos * di + sin * dj + (h - 1) / 2
            b = cos * dj - sin * di + (w - 1) / 2
            for p in (int(np.floor(a)), int(np.floor(a)) + 1):
                for q in (int(np.floor(b)), int(np.floor(b)) + 1):
                    if 0 <= p < h and 0 <= q < w:
                        out[i, j] += (
                            max(0, 1 - abs(a - p))
                            * max(0, 1 - abs(b - q))
                            * image[p, q]
                        )
    return out


def test_quarter_turns_are_exact():
    x = np.random.default_rng(0).random((2, 5, 5, 2)).astype(np.float32)
    turned = apply(streams.rotations([0, 90, 180, 270, -90]), x)
    for k, quarters in enumerate([0, 1, 2, 3, 3]):
        np.testing.assert_array_equal(turned[k], np.rot90(x, quarters, axes=(1, 2)))


def test_rotations_are_bilinear():
    x = np.random.default_rng(0).random((2, 6, 7)).astype(np.float32)
    angles = [30.0, -77.0]
    turned = apply(streams.rotations(angles), x)
    for k, angle in enumerate(angles):
        for m in range(2):
            expected = rotated(x[m].astype(np.float64), angle)
            np.testing.assert_allclose(turned[k, m], expected, atol=2e-6)
            known = ndimage.rotate(
                x[m].astype(np.float64), angle, reshape=False, order=1,
                mode="grid-constant",
            )  # fmt: skip
            np.testing.assert_allclose(turned[k, m], known, atol=2e-6)


def test_whole_numbers_become_floats():
    x = np.full((1, 3, 3, 1), 255, np.uint8)
    assert apply(streams.rotations([0]), x).dtype == np.float32


def test_permutations_follow_their_tables():
    x = np.random.default_rng(0).random((4, 2, 3)).astype(np.float32)
    domains = streams.permutations(3, (2, 3), seed=1)
    out = apply(domains, x)
    np.testing.assert_array_equal(out[0], x)
    for k in range(3):
        order = domains.tables[k]
        assert sorted(order.tolist()) == list(range(6))
        expected = x.reshape(4, 6)[:, order].reshape(4, 2, 3)
        np.testing.assert_array_equal(out[k], expected)
    assert (domains.tables[1] != domains.tables[2]).any()


def test_any_list_of_transforms():
    domains = streams.transforms([lambda b: b, lambda b: b | {"x": -b["x"]}])
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(apply(domains, x), np.stack([x, -x]))
    stream = streams.domain_incremental(
        {"x": x, "y": np.zeros(2, int)}, domains, num_clients=2, rounds_per_context=1,
        steps=1, batch_size=2,
    )  # fmt: skip
    signs = [sample(stream, jax.random.key(0), 1, t)["x"].mean() for t in (0, 1)]
    assert np.asarray(signs).tolist() == [1, -1]


def test_tables_are_arguments_not_constants():
    data = {"x": np.zeros((4, 32, 32), np.float32), "y": np.zeros(4, int)}
    stream = streams.domain_incremental(
        data, streams.permutations(3, (32, 32)), num_clients=1, rounds_per_context=1,
        steps=1, batch_size=2,
    )  # fmt: skip
    run = jax.jit(lambda s, k: s.sample(k, 0, 0))
    text = run.lower(stream, jax.random.key(0)).as_text()
    assert "tensor<3x1024xi32>" in text and len(text) < 60_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: streams.rotations([]),
        lambda: streams.rotations([np.nan]),
        lambda: streams.transforms([]),
        lambda: streams.permutations(0, (2,)),
    ],
)
def test_nothing_is_refused(call):
    with pytest.raises(ValueError, match=r"must be|at least"):
        call()
