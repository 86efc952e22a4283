"""Samplers draw distinct clients, by their probabilities, whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import cohorts


def draws(sampler, n, times=400):
    keys = jax.random.split(jax.random.key(0), times)
    return jax.vmap(lambda k: sampler.draw(k, jnp.int32(0), n))(keys)


SAMPLERS = {
    "everyone": cohorts.everyone(),
    "uniform": cohorts.uniform(4),
    "weighted": cohorts.weighted(4, np.arange(1, 9)),
    "stratified": cohorts.stratified(4, 2),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_clients_are_distinct_and_in_the_population(name):
    who = np.asarray(draws(SAMPLERS[name], 8).client)
    assert who.min() >= 0 and who.max() < 8
    assert all(len(set(row)) == len(row) for row in who)


def test_uniform_draws_every_client_equally_often():
    who = np.asarray(draws(cohorts.uniform(4), 8, 2000).client)
    counts = np.bincount(who.ravel(), minlength=8)
    # Binomial(2000, 1/2): six standard deviations.
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(2000 / 4)


def test_weighted_draws_in_proportion_and_never_weight_zero():
    who = np.asarray(draws(cohorts.weighted(1, [0, 1, 2, 3]), 4, 3000).client)
    counts = np.bincount(who.ravel(), minlength=4) / 3000
    np.testing.assert_allclose(counts, [0, 1 / 6, 2 / 6, 3 / 6], atol=0.04)
    assert counts[0] == 0


def test_stratified_draws_each_part_alike_on_any_mesh_that_divides_it():
    who = np.asarray(draws(cohorts.stratified(4, 4), 8).client)
    np.testing.assert_array_equal(who // 2, np.tile(np.arange(4), (400, 1)))


def test_too_few_available_clients_leave_places_empty():
    only = lambda key, client, round: client < 3
    who = draws(cohorts.uniform(5, available=only), 8, 50)
    np.testing.assert_array_equal(np.asarray(who.train).sum(axis=1), 3)
    assert np.asarray(who.client)[np.asarray(who.train)].max() < 3


def test_masks_follow_the_client_not_the_place():
    process, key = cohorts.bernoulli(0.5), jax.random.key(1)
    a = cohorts.training(cohorts.fixed(jnp.arange(8)), process)
    b = cohorts.training(cohorts.fixed(jnp.arange(8)[::-1]), process)
    first, second = (s.draw(key, jnp.int32(0), 8).train for s in (a, b))
    np.testing.assert_array_equal(first, second[::-1])
    assert 0 < int(first.sum()) < 8


def test_training_and_reporting_are_two_masks():
    sampler = cohorts.reporting(cohorts.everyone(), lambda k, c, t: c % 2 == 0)
    who = sampler.draw(jax.random.key(0), jnp.int32(0), 4)
    assert who.train.all()
    np.testing.assert_array_equal(who.report, [True, False, True, False])


def test_diurnal_follows_the_day():
    process = cohorts.diurnal(24, 0.0, 1.0)
    keys = jax.random.split(jax.random.key(0), 500)
    at = lambda t: jax.vmap(lambda k: process(k, jnp.int32(0), jnp.int32(t)))(keys)
    assert at(0).all() and not at(12).any()
    assert 0.35 < at(6).mean() < 0.65


def test_recorded_availability_repeats_its_last_row():
    process = cohorts.recorded([[True, False], [False, True]])
    on = [bool(process(None, 0, t)) for t in range(4)]
    assert on == [True, False, False, False]


def test_bad_sizes_are_refused():
    draw = lambda sampler, n: sampler.draw(jax.random.key(0), 0, n)
    with pytest.raises(ValueError, match="cohort of 5 cannot be drawn.*of 4 clients"):
        draw(cohorts.uniform(5), 4)
    with pytest.raises(ValueError, match="cohort of 5 does not split into 2"):
        cohorts.stratified(5, 2)
    with pytest.raises(ValueError, match="7 clients do not split into 2"):
        draw(cohorts.stratified(4, 2), 7)
    with pytest.raises(ValueError, match="3 weights for a population of 4"):
        draw(cohorts.weighted(1, [1, 2, 3]), 4)
    with pytest.raises(ValueError, match="smallest weight is -1"):
        cohorts.weighted(1, [1, -1])
