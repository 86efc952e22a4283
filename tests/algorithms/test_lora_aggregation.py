"""What a server makes of drifted factors: exactness, defects that are known, refusals."""

import csv
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedcl import aggregation as agg
from fedcl import algorithms as alg
from fedcl import base, models, tree
from fedcl.models._accumulator import _empty
from tests.oracles import lora as oracle
from tests.problems import adapted_problem

KEY = jax.random.key(3)


def chain(stage, *rest):
    return agg.server(stage, *(rest or (optax.sgd(1.0),)))


def dense(params) -> np.ndarray:
    """U + s A B of a layer, in float64."""
    node = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    u, parts = node["accumulator"], node["lora"]
    left = u["update"] if "update" in u else u["a"] @ u["b"]
    gate = parts["scale"][..., None] * parts["mask"]
    return left + parts["a"] @ (gate[..., None] * parts["b"])


# Cohorts of drifted factors: a stack of three layers and one layer beside it.
SIDES = {"blocks": (3, 7, 5), "head": (5, 9)}
DRIFTS = (0.05, 0.2, 0.5, 1.0)
P = np.array([3.0, 1.0, 0.0, 4.0])


def moved(x, drift, rng):
    noise = drift * np.linalg.norm(x) / np.sqrt(x.size)
    return x[None] + noise * rng.normal(size=(len(P), *x.shape))


def drifted(drift, seed=0, rank=3, accumulator=None):
    """Whole parameters, and the factors of four clients that moved apart by a share."""
    rng = np.random.default_rng(seed)
    single = lambda x: np.asarray(x, np.float32)
    params, ends = {}, {}
    for name, (*lead, n_in, n_out) in SIDES.items():
        a0, b0 = (
            rng.normal(size=(*lead, n_in, rank)),
            rng.normal(size=(*lead, rank, n_out)),
        )
        ends[name] = tuple(moved(x, drift, rng) for x in (a0, b0))
        u = _empty(tuple(lead), n_in, n_out, accumulator)
        params[name] = {
            "kernel": np.zeros((*lead, n_in, n_out), np.int8),  # A quantised base.
            "lora": {
                "a": single(a0),
                "b": single(b0),
                "scale": single(np.full(lead, 2.0)),
                "mask": single(np.ones((*lead, rank))),
            },
            "accumulator": u,
        }
    return jax.tree.map(jnp.asarray, params), ends


def ideal(ends, scale=2.0) -> dict[str, np.ndarray]:
    p = P / P.sum()
    mix = lambda a, b: scale * np.einsum("c,c...ir,c...ro->...io", p, a, b)
    return {name: mix(*ab) for name, ab in ends.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def aggregated(tx, where, params, factors, weights=P):
    phi, theta = tree.partition(params, where)
    delta = {
        name: {
            "kernel": None,
            "accumulator": jax.tree.map(lambda x: None, params[name]["accumulator"]),
            "lora": {
                part: params[name]["lora"][part][None] - end
                if where(f"{name}/lora/{part}")
                else None
                for part, end in zip("ab", ab, strict=True)
            }
            | {"scale": None, "mask": None},
        }
        for name, ab in factors.items()
    }
    zero = jnp.zeros((), jnp.int32)
    server = base.ServerState(phi, theta, tx.init(phi), (), (), jnp.float32(4), zero)
    message = base.Message(delta, jnp.asarray(weights, jnp.float32))
    new = agg.server_step(tx, server, message)
    return tree.merge(new.params, new.frozen), agg.reported(new.opt_state)


def error(tx, drift, accumulator=None, **kw) -> tuple[float, dict, dict]:
    """The error of the effective update, relative to the ideal one."""
    params, ends = drifted(drift, accumulator=accumulator, **kw)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    after, told = aggregated(tx, models.lora_only, params, factors)
    want = ideal(ends)
    off = sum(np.sum((dense(after[n]) - want[n]) ** 2) for n in want)
    return np.sqrt(off / sum(np.sum(w**2) for w in want.values())), after, told


def nearest(whole: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrices of a rank."""
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


SERVERS = {
    "fedit": chain(alg.fedit()),
    "fedex": chain(alg.fedex_lora()),
    "fedex adam": chain(alg.fedex_lora(), optax.adam(0.1)),
    "flora": chain(alg.flora(KEY)),
    "flora in turns": chain(alg.flora(KEY, every=3)),
    "flexlora": chain(alg.flexlora()),
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("name", ["fedex", "fedex adam", "flora", "flora in turns"])
def test_what_is_exact_is_exact(name, drift):
    assert error(SERVERS[name], drift)[0] < 1e-6


def test_a_low_accumulator_is_exact_while_it_holds_the_rank():
    err, after, _ = error(SERVERS["fedex"], 0.5, accumulator=5)
    assert err < 1e-5 and all(
        after[n]["accumulator"]["lost"].max() < 1e-4 for n in SIDES
    )
    err, after, _ = error(SERVERS["fedex"], 0.5, accumulator=2)
    gap, want = {}, ideal(drifted(0.5)[1])
    for n in SIDES:
        gap[n] = np.linalg.norm(dense(after[n]) - want[n], axis=(-2, -1))
        np.testing.assert_allclose(after[n]["accumulator"]["lost"], gap[n], rtol=1e-4)
    assert err > 0.01


@pytest.mark.parametrize("drift", DRIFTS)
def test_fedit_tells_its_bias(drift):
    err, _, told = error(SERVERS["fedit"], drift)
    np.testing.assert_allclose(told["lora_bias"], err, rtol=1e-4)


@pytest.mark.parametrize("drift", DRIFTS)
def test_flexlora_is_the_best_of_its_rank(drift):
    _, ends = drifted(drift)
    err, after, _ = error(SERVERS["flexlora"], drift)
    for n, want in ideal(ends).items():
        gap = np.linalg.norm(dense(after[n]) - nearest(want, 3)) / np.linalg.norm(want)
        assert gap < 1e-5
        a = after[n]["lora"]["a"]
        eye = np.broadcast_to(np.eye(3), (*a.shape[:-2], 3, 3))
        np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, eye, atol=1e-5)
    assert err < error(SERVERS["fedit"], drift)[0]


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("part", ["a", "b"])
def test_one_factor_at_a_time_is_exact(part, drift):
    """FFA-LoRA moves B; RoLoRA B and A in turn."""
    params, ends = drifted(drift)
    rest = 1 - "ab".index(part)
    for name, pair in ends.items():
        still = np.asarray(params[name]["lora"]["ab"[rest]], np.float64)
        pair[rest][:] = still[None]
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    where = lambda path: path.endswith(f"lora/{part}")
    after, _ = aggregated(agg.default_server(), where, params, factors)
    for n, want in ideal(ends).items():
        gap = np.linalg.norm(dense(after[n]) - want) / np.linalg.norm(want)
        start = np.linalg.norm(dense(params[n]) - want) / np.linalg.norm(want)
        assert gap < 1e-6 < 1e-3 < start


RANKS = (3, 1, 2, 2)


def of_ranks(drift):
    """Drifted factors of clients that hold their first directions alone."""
    params, ends = drifted(drift)
    held = np.arange(3) < np.array(RANKS)[:, None]
    for name, (a, b) in ends.items():
        lead = (1,) * (a.ndim - 3)
        open_ = held.reshape(len(RANKS), *lead, 3)
        ends[name] = a * open_[..., None, :], b * open_[..., None]
    return params, ends


@pytest.mark.parametrize("drift", DRIFTS)
def test_hetlora_weighs_clients_of_any_rank_by_the_size_of_their_updates(drift):
    """Layer by layer, in float64; it is not the mean of the products, nor of factors."""
    params, ends = of_ranks(drift)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    tx = chain(alg.hetlora_mean())
    after, _ = aggregated(tx, models.lora_only, params, factors)
    plain = ideal(ends)
    for n, (a, b) in ends.items():
        size = [np.linalg.norm(2 * a[k] @ b[k]) for k in range(len(P))]
        q = P * size / np.dot(P, size)
        want_a, want_b = np.tensordot(q, a, 1), np.tensordot(q, b, 1)
        for part, want in (("a", want_a), ("b", want_b)):
            got = np.asarray(after[n]["lora"][part], np.float64)
            assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-6
        want = 2 * want_a @ want_b
        gap = np.linalg.norm(dense(after[n]) - want) / np.linalg.norm(want)
        means = (np.tensordot(P / P.sum(), x, 1) for x in (a, b))
        fedit = 2 * np.matmul(*means)
        assert gap < 1e-6
        assert np.linalg.norm(fedit - want) / np.linalg.norm(want) > 1e-3
        assert np.linalg.norm(plain[n] - want) / np.linalg.norm(want) > 1e-3


@pytest.mark.parametrize("drift", DRIFTS)
def test_flexlora_of_clients_of_any_rank_and_scale(drift):
    """A client's own scale s_k = α / r_k is its B's, times s_k / s: the stage has one s."""
    params, ends = of_ranks(drift)
    own = 6.0 / np.array(RANKS)
    p, sent, want = P / P.sum(), {}, {}
    for n, (a, b) in ends.items():
        sent[n] = a, b * (own / 2.0).reshape(-1, *[1] * (b.ndim - 1))
        each = np.stack([s * x @ y for s, x, y in zip(own, a, b, strict=True)])
        want[n] = np.tensordot(p, each, 1)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sent)
    after, _ = aggregated(SERVERS["flexlora"], models.lora_only, params, factors)
    exact, _ = aggregated(SERVERS["fedex"], models.lora_only, params, factors)
    for n, whole in want.items():
        size = np.linalg.norm(whole)
        assert np.linalg.norm(dense(after[n]) - nearest(whole, 3)) / size < 1e-5
        assert np.linalg.norm(dense(exact[n]) - whole) / size < 1e-6
        unscaled = ideal(ends)[n]
        assert np.linalg.norm(unscaled - whole) / size > 0.01


def test_published_defects_would_show():
    """No α / r on the residual, a transposed residual, weights on both factors."""
    _, ends = drifted(0.5)
    p, want = P / P.sum(), ideal(ends)["head"]
    a, b = ends["head"]
    mean_a, mean_b = np.tensordot(p, a, 1), np.tensordot(p, b, 1)
    residual = want / 2 - mean_a @ mean_b
    wrong = {
        "no scale": 2 * mean_a @ mean_b + residual,
        "both weighted": 2 * np.einsum("c,cir,cro->io", p**2, a, b),
    }
    size = np.linalg.norm(want)
    for value in wrong.values():
        assert np.linalg.norm(value - want) / size > 0.03
    assert residual.T.shape != want.shape
    right = dense(error(SERVERS["fedex"], 0.5)[1]["head"])
    assert np.linalg.norm(right - want) / size < 1e-6


def test_the_base_stays_as_it_is_and_closed_directions_stay_closed():
    _, after, _ = error(SERVERS["fedex"], 0.5)
    assert all(after[n]["kernel"].dtype == jnp.int8 for n in SIDES)
    params, ends = drifted(0.5)
    mask = jnp.array([1.0, 0.0, 1.0])
    params["head"]["lora"]["mask"] = mask
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    p, (a, b) = P / P.sum(), ends["head"]
    want = 2 * np.einsum("c,cir,cro->io", p, a * np.asarray(mask), b)
    for name in ("fedex", "flora"):
        after, _ = aggregated(SERVERS[name], models.lora_only, params, factors)
        np.testing.assert_allclose(dense(after["head"]), want, atol=1e-5)
    after, _ = aggregated(SERVERS["flexlora"], models.lora_only, params, factors)
    np.testing.assert_allclose(
        dense(after["head"]), oracle.truncated(want, 2), atol=1e-5
    )


def test_nobody_reports_changes_nothing():
    """Also where the engine does not take the old server back by itself."""
    params, ends = drifted(0.5)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    for name in ("fedex", "flora", "flexlora"):
        after, _ = aggregated(SERVERS[name], models.lora_only, params, factors, 0 * P)
        for n in SIDES:
            np.testing.assert_allclose(dense(after[n]), dense(params[n]), atol=2e-5)


def test_no_dense_matrix_for_the_bias_or_the_svd():
    """Compiled for sides of 512, neither needs as much as one dense matrix."""
    side, clients, rank = 512, 4, 2
    part = {"a": jnp.ones((side, rank)), "b": jnp.ones((rank, side))}
    params = {"lora": part | {"scale": jnp.ones(()), "mask": jnp.ones(rank)}}
    delta = jax.tree.map(lambda x: jnp.ones((clients, *x.shape)), params)

    def temporaries(stage):
        tx = chain(stage)
        run = lambda u, p, w: tx.update(u, tx.init(p), p, weights=w, frozen=None)[0]
        compiled = jax.jit(run).lower(delta, params, jnp.ones(clients)).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    dense_bytes = 4 * side * side
    assert temporaries(alg.fedit()) < dense_bytes / 4
    assert temporaries(alg.flexlora()) < dense_bytes / 2


def test_strength_zero_of_hetlora_is_the_mean_bit_for_bit():
    params, ends = drifted(0.5)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ends)
    run = lambda tx: aggregated(tx, models.lora_only, params, factors)[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        run(chain(alg.hetlora_mean(0.0))),
        run(agg.default_server()),
    )


@pytest.mark.parametrize(
    "stage",
    [alg.fedit(), alg.fedex_lora(), alg.flora(KEY), alg.flexlora(), alg.hetlora_mean()],
    ids=lambda s: s.label,
)
def test_what_needs_factors_is_refused_where_only_sums_are_seen(stage):
    with pytest.raises(ValueError, match="needs each client's update by itself"):
        agg.server(stage, optax.sgd(1.0), sums_only=True)


def test_what_is_linear_is_not():
    ends = agg.weighted_mean(), alg.rolora(optax.adam(1.0))
    assert agg.server(*ends, sums_only=True).linear


def test_closed_form_merge_over_contexts_is_least_squares():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 4)) for n in (30, 9)]
    u = [rng.normal(size=(4, 3)) for _ in x]
    want = np.linalg.lstsq(
        np.vstack(x), np.vstack([a @ b for a, b in zip(x, u, strict=True)]), rcond=None
    )[0]
    single = lambda parts: jnp.asarray(np.stack(parts), jnp.float32)
    got = alg.closed_form_merge(single([a.T @ a for a in x]), single(u))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_refusals():
    problem, _, params = adapted_problem()
    phi, theta = tree.partition(params, models.lora_only)
    problem = problem._replace(params=phi)
    example = problem.stream.example()
    opt = optax.sgd(0.1)
    avg = lambda stage, **kw: alg.fedavg(
        problem.loss_fn, opt, server=chain(stage, *kw.values())
    )
    with pytest.raises(ValueError, match="fedex_lora: θ is None"):
        avg(alg.fedex_lora()).init(problem.params, example, 4)
    with pytest.raises(ValueError, match="fedex_lora: θ is None.*aggregation.server"):
        raw = optax.chain(alg.fedex_lora(), optax.sgd(1.0))
        alg.fedavg(problem.loss_fn, opt, server=raw).init(
            problem.params, example, 4, theta
        )
    bare = {k: v for k, v in theta.items() if k != "accumulator"}
    phi = {k: v for k, v in problem.params.items() if k != "accumulator"}
    with pytest.raises(ValueError, match="no 'accumulator' beside the adapter 'lora'"):
        avg(alg.flora(KEY)).init(phi, example, 4, bare)
    with pytest.raises(ValueError, match=r"flexlora: φ has no adapter.*kernel"):
        avg(alg.flexlora()).init({"kernel": jnp.ones((2, 2))}, example, 4)
    only_b, rest = tree.partition(tree.merge(problem.params, theta), alg.ffa_lora)
    with pytest.raises(ValueError, match="only one factor of 'lora' is trained"):
        avg(alg.flexlora()).init(only_b, example, 4, rest)
    with pytest.raises(ValueError, match=r"ranks are \[1, 3\] for 4 clients.*1 to 2"):
        alg.client_ranks(avg(alg.fedit()), [1, 3]).init(
            problem.params, example, 4, theta
        )
    with pytest.raises(ValueError, match="not told `version`"):
        tx = alg.rolora(optax.sgd(1.0))
        tx.update({"lora": {"b": jnp.ones(1)}}, tx.init({}))
    with pytest.raises(ValueError, match="every is 0"):
        alg.flora(KEY, every=0)
    with pytest.raises(ValueError, match="rank is 0"):
        alg.fedex_lora(rank=0)
    with pytest.raises(ValueError, match="lorm_contexts: θ has no 'accumulator/upd"):
        state = avg(alg.fedit()).init(phi, example, 4, bare)
        alg.lorm_contexts(problem.loss_fn).init((), state)
    with pytest.raises(ValueError, match="clients keep no leaves"):
        state = avg(alg.fedit()).init(problem.params, example, 4, theta)
        alg.own_params(state, jnp.int32(0))


def test_the_committed_table_is_of_that_script():
    folder = Path(__file__).parent.parent.parent / "benchmarks" / "foundation"
    spec = importlib.util.spec_from_file_location("exactness", folder / "exactness.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with (folder / "exactness.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    own = (*script.FEDSA, *script.LORMS)
    assert [*rows] == [*script.METHODS, *own, *script.DEFECTS]
    for of, name in (
        (script.error, "FedIT (mean of factors)"),
        (script.fedsa, "FedSA-LoRA, against what each client trained"),
        (script.lorm, "LoRM, inputs unlike"),
    ):
        errors = [of(name, 0.5, seed) for seed in range(script.SEEDS)]
        assert np.isclose(float(rows[name]["drift 0.5"]), np.mean(errors), rtol=0.01)
