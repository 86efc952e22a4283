"""What travels, from shapes, against what each method's paper says is sent."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from fedcl import (
    aggregation,
    metrics,
    models,
    phases,
    statistics,
    store,
    testing,
    tree,
)
from fedcl import algorithms as alg
from fedcl import losses as fedcl_losses
from fedcl.oracle import black_box

KEY, RANK = jax.random.key(0), 2
F, Y = testing.FEATURES, testing.CLASSES
P = testing.toy_problem()
PHI = 4 * (F * Y + Y)
ADAPTER = 4 * RANK * (F + Y)


def started(algorithm, params=P.params, theta=None):
    return algorithm.init(params, P.stream.example(), P.stream.num_clients, theta)


def sent(algorithm, params=P.params, theta=None, parts=()):
    state = started(algorithm, params, theta)
    return metrics.communication(algorithm, state, P.stream, parts)


def adapted(rank=None):
    """The toy problem's classifier with an adapter and an accumulator; loss, φ and θ."""
    model = models.from_nnx(lambda rngs: nnx.Linear(F, Y, rngs=rngs))
    where = {"rank": RANK, "alpha": 2.0, "where": lambda path: True, "key": KEY}
    model, params = models.lora(model, P.params, **where)
    model, params = models.accumulated(model, params, rank=rank)
    phi, theta = tree.partition(params, models.lora_only)
    return fedcl_losses.softmax(model.apply), phi, theta


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("stage", [alg.fedex_lora, lambda: alg.flora(KEY)])
def test_what_a_stage_puts_into_the_base_is_sent(stage, rank):
    """U as it is stored, in · out or R (in + out) numbers; otherwise it is the base."""
    loss, phi, theta = adapted(rank)
    of = lambda s: alg.fedavg(
        loss, optax.sgd(0.1), server=aggregation.server(s, optax.sgd(1.0))
    )
    update = 4 * (F * Y if rank is None else rank * (F + Y))
    lost, whole = 4, tree.size(theta)
    exact = sent(of(stage()), phi, theta)
    assert exact == (ADAPTER + 4, ADAPTER + update, whole - update - lost)
    assert sent(of(alg.fedit()), phi, theta) == (ADAPTER + 4, ADAPTER, whole)


def test_the_server_s_gradient_is_one_model_more():
    data = {"x": jnp.ones((3, F)), "y": jnp.zeros(3, jnp.int32)}
    algorithm = alg.fedavg(
        P.loss_fn, optax.sgd(0.1), transform=alg.gradient_transfer(0.5)
    )
    told = phases.gradient(P.loss_fn, data, batch_size=2)
    unheard = phases.aside(
        phases.public(
            P.loss_fn, optax.sgd(0.1), data, batch_size=2, switch=phases.always()
        )
    )
    parts = (told, unheard, phases.federated(algorithm), phases.join())
    assert sent(algorithm, parts=parts) == (PHI + 4, 2 * PHI, 0)
    plain = alg.fedavg(P.loss_fn, optax.sgd(0.1))
    parts = (told, unheard, phases.federated(plain), phases.join())
    assert sent(plain, parts=parts) == (PHI + 4, PHI, 0)


def test_what_is_personal_travels_neither_way():
    whole = alg.fedavg(P.loss_fn, optax.sgd(0.1))
    shared = alg.personal(whole, lambda path: path == "bias")
    assert sent(shared) == (4 * F * Y + 4, 4 * F * Y, 0)


def test_a_control_variate_doubles_both_ways():
    scaffold = alg.fedavg(P.loss_fn, optax.sgd(0.1), transform=alg.scaffold())
    assert sent(scaffold) == (2 * PHI + 4, 2 * PHI, 0)


def test_a_search_sends_its_own_numbers():
    size = 3
    search = alg.fedbpt(black_box(P.loss_fn), dimension=size, population=4)
    # m, the fitness and the deviations up; m, σ and C down; the map and its start once.
    once = PHI + 4 * (F * Y + Y) * size
    assert sent(search) == (4 * (size + 2) + 4, 4 * (size + 1 + size**2), once)


@pytest.mark.parametrize("adaptive", [False, True])
def test_seeds_travel_both_ways_if_clients_rebuild_the_model(adaptive):
    """And φ_0 once; otherwise they are handed the φ that the server rebuilt."""
    seeds = 7
    numbers = 4 * seeds * (3 if adaptive else 1)
    of = lambda **kw: alg.fedkseed(
        P.loss_fn, 0.1, num_seeds=seeds, adaptive=adaptive, **kw
    )
    assert sent(of(rebuild=True)) == (numbers + 4, numbers, PHI)
    drawn = 2 * 4 * seeds if adaptive else 0  # Which directions are steep.
    assert sent(of()) == (numbers + 4, PHI + drawn, 0)


def test_a_store_changes_nothing(tmp_path):
    algorithm = alg.fedavg(P.loss_fn, optax.sgd(0.1), transform=alg.scaffold())
    n, example = P.stream.num_clients, P.stream.example()
    state = store.init(algorithm, P.params, example, n, tmp_path)
    kept = metrics.communication(algorithm, state, P.stream)
    assert kept == sent(algorithm)


def test_sums_over_the_clients_are_sent():
    """LDA's counts, sums and one matrix of the features up; a merged Fisher both ways."""
    plain = alg.fedavg(P.loss_fn, optax.sgd(0.1))
    lda = alg.slda(Y, F, head="")(P.loss_fn)
    keep = lambda memory, params, fisher: memory
    merged = phases.consolidate(statistics.fisher(), keep, P.loss_fn, name="fisher")
    parts = (phases.federated(plain), lda, merged, alg.slca(Y, F, head="")(P.loss_fn))
    told = metrics.sums(P.params, parts)
    slda, slca = 4 * (Y + Y * F + F * F), 4 * Y * (1 + F + F * F)
    assert told == {"slda": (slda, 0), "fisher": (PHI + 4, PHI), "slca": (slca, 0)}


def test_a_merge_of_contexts_sends_grams_and_tells_the_base():
    loss, phi, _ = adapted()
    merge = alg.lorm_contexts(loss)
    assert metrics.sums(phi, (merge,)) == {"lorm": (4 * F * F, 4 * F * Y)}
