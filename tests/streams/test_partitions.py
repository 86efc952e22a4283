"""Partitions: statistics of who gets what."""

import numpy as np
import pytest

from fedcl import streams

LABELS = np.repeat(np.arange(5), 400)
ALL = [
    streams.iid(),
    streams.dirichlet(0.5),
    streams.shards(3),
    streams.quantity(0.5),
]


@pytest.mark.parametrize("partition", ALL, ids=lambda p: p.spec)
def test_every_row_has_one_client_and_the_seed_decides(partition):
    one, two, other = (partition.assign(seed, LABELS, 10) for seed in (0, 0, 1))
    assert one.shape == LABELS.shape and set(np.unique(one)) == set(range(10))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    rng = partition.assign(np.random.default_rng(0), LABELS, 10)
    np.testing.assert_array_equal(one, rng)


def test_iid_is_even():
    sizes = np.bincount(streams.iid().assign(0, np.zeros(103, int), 10))
    assert sorted(sizes.tolist()) == [10] * 7 + [11] * 3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 20.0])
def test_dirichlet_shares_have_the_moments_of_a_dirichlet(alpha):
    clients, draws = 4, 150
    partition = streams.dirichlet(alpha, min_rows=0)
    shares = []
    for seed in range(draws):
        owner = partition.assign(seed, LABELS, clients)
        counts = np.stack(
            [np.bincount(owner[y == LABELS], minlength=4) for y in range(5)]
        )
        shares.append(counts / 400)
    shares = np.concatenate(shares)  # [draws * classes, clients]
    mean, variance = (
        1 / clients,
        (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1),
    )
    samples = len(shares)
    np.testing.assert_allclose(
        shares.mean(0), mean, atol=4 * np.sqrt(variance / samples)
    )
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.25)


def test_quantity_shares_have_the_moments_of_a_dirichlet():
    partition = streams.quantity(0.5, min_rows=0)
    sizes = np.stack(
        [np.bincount(partition.assign(s, LABELS, 4), minlength=4) for s in range(400)]
    )
    np.testing.assert_allclose(
        (sizes / 2000).var(0), 0.25 * 0.75 / (4 * 0.5 + 1), rtol=0.25
    )


def test_min_rows_tops_up_the_poor_only():
    owner = streams.dirichlet(0.05, min_rows=7).assign(0, LABELS, 20)
    bare = streams.dirichlet(0.05, min_rows=0).assign(0, LABELS, 20)
    before, after = (np.bincount(o, minlength=20) for o in (bare, owner))
    assert before.min() < 7 <= after.min() and after.sum() == 2000
    poor = before < 7
    assert (after[poor] == 7).all() and (owner != bare).sum() == (
        7 - before[poor]
    ).sum()


def test_shards_bound_the_labels_of_a_client():
    owner = streams.shards(2).assign(0, LABELS, 10)
    sizes = np.bincount(owner, minlength=10)
    assert (sizes == 200).all()
    kinds = [len(np.unique(LABELS[owner == n])) for n in range(10)]
    assert max(kinds) <= 2


def test_natural_keeps_owners():
    owners = np.array([2, 0, 1, 2])
    assert streams.natural().assign(0, owners, 3).tolist() == owners.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streams.dirichlet(0.0), "alpha must be a finite number > 0, got 0.0"),
        (lambda: streams.dirichlet(float("nan")), "alpha"),
        (lambda: streams.quantity(-1.0), "alpha must be a finite number > 0, got -1.0"),
        (lambda: streams.shards(0), "per_client must be an integer of at least 1"),
        (
            lambda: streams.shards(5).assign(0, np.zeros(9, int), 2),
            "10 shards, but the context has 9 rows",
        ),
        (
            lambda: streams.dirichlet(1.0, min_rows=5).assign(0, np.zeros(9, int), 2),
            "9 rows cannot give 2 clients min_rows=5",
        ),
        (
            lambda: streams.natural("writer").assign(0, np.array([0, 3]), 3),
            '"writer" names 4 owners, but there are 3 clients',
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
