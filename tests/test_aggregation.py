"""Reductions against NumPy, masks of absent clients, and what a chain refuses."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fedcl import aggregation as agg

RNG = np.random.default_rng(0)
U = RNG.normal(size=(7, 3, 2))
W = np.array([3.0, 1.0, 0.0, 2.0, 5.0, 0.0, 1.0])


def reduced(stage, u=U, w=W):
    tree = {"a": jnp.asarray(u, jnp.float32)}
    weights = jnp.asarray(w, jnp.float32)
    return np.asarray(stage.update(tree, stage.init(None), weights=weights)[0]["a"])


HERE = U[W > 0]
ORACLES = {
    "weighted_mean": (agg.weighted_mean(), np.average(U, axis=0, weights=W)),
    "mean": (agg.mean(), HERE.mean(axis=0)),
    "median": (agg.median(), np.median(HERE, axis=0)),
    "trimmed_mean": (agg.trimmed_mean(0.2), stats.trim_mean(HERE, 0.2, axis=0)),
    "trimmed_mean of nothing": (agg.trimmed_mean(0.0), HERE.mean(axis=0)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_reduction_equals_numpy_over_those_who_report(name):
    stage, want = ORACLES[name]
    np.testing.assert_allclose(reduced(stage), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_nobody_reports_is_zero(name):
    stage, _ = ORACLES[name]
    np.testing.assert_array_equal(reduced(stage, w=np.zeros(7)), 0)


def test_median_of_even_and_odd():
    for n in (1, 2, 5, 6):
        w = (np.arange(7) < n).astype(float)
        want = np.median(U[:n], axis=0)
        np.testing.assert_allclose(reduced(agg.median(), w=w), want, rtol=1e-5)


def test_per_client_clips_each_update():
    stage = agg.per_client(optax.clip_by_global_norm(1.0))
    out = stage.update({"a": jnp.asarray(U, jnp.float32)}, stage.init(None))[0]["a"]
    norms = np.linalg.norm(U.reshape(7, -1), axis=1)
    want = U / np.maximum(norms, 1)[:, None, None]
    np.testing.assert_allclose(out, want, rtol=1e-5)


def test_chain_needs_exactly_one_reduction():
    with pytest.raises(ValueError, match=r"this one has 0 among \(optax, per_client\)"):
        agg.server(optax.sgd(1.0), agg.per_client(optax.clip(1.0)))
    with pytest.raises(ValueError, match=r"has 2 among \(mean, median\)\. Keep one"):
        agg.server(agg.mean(), agg.median())
    assert agg.server(agg.server(agg.mean()), optax.adam(1.0)).linear


@pytest.mark.parametrize(
    "stages",
    [
        (agg.median(),),
        (agg.trimmed_mean(0.1),),
        (agg.per_client(optax.clip(1.0)), agg.mean()),
        (optax.scale(2.0), agg.mean()),
    ],
)
def test_sums_only_refuses_what_is_not_linear(stages):
    with pytest.raises(ValueError, match="the server sees only sums"):
        agg.server(*stages, sums_only=True)


def test_sums_only_accepts_clipping_on_the_client():
    clip = agg.per_client(optax.clip_by_global_norm(1.0), linear=True)
    chain = agg.server(clip, agg.mean(), optax.sgd(1.0), sums_only=True)
    assert chain.linear and len(chain.stages) == 3


def test_reduction_in_a_client_optimiser_says_so():
    with pytest.raises(ValueError, match="belongs in the `server` chain"):
        agg.mean().update({"a": jnp.ones(3)}, agg.mean().init(None))


def test_trimmed_mean_refuses_half():
    with pytest.raises(ValueError, match=r"`fraction` is 0.5"):
        agg.trimmed_mean(0.5)
