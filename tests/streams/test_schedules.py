"""Drift shapes against what their formulas say."""

import numpy as np
import pytest

from fedcl import streams


def test_of_is_lossless_and_small():
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(3), 4).astype(np.float32)
    mixtures[0] = 0
    pi = mixtures[rng.integers(0, 4, (7, 5))]
    schedule = streams.Schedule.of(pi)
    np.testing.assert_array_equal(schedule.pi(), pi)
    assert schedule.table.shape == (4, 3) and schedule.clock.dtype == np.int32


@pytest.mark.parametrize(
    ("pi", "message"),
    [
        ([[[1.5, -0.5]]], r"not negative, got -0.5 at \[0, 0, 1\]"),
        ([[[1.0, 0.0]], [[0.5, 0.4]]], r"sum to 1 \(or 0.*got 0.9 at \[1, 0\]"),
        ([[[np.nan, 1.0]]], "finite"),
        ([[1.0, 0.0]], r"\[rounds, clients, contexts\], got shape \(1, 2\)"),
    ],
)
def test_of_refuses_what_is_not_a_schedule(pi, message):
    with pytest.raises(ValueError, match=message):
        streams.Schedule.of(pi)


def test_used_is_where_a_client_ever_goes():
    schedule = streams.join_leave(streams.abrupt(3, 2, 2), leave=[6, 4])
    assert schedule.used().tolist() == [[True, True], [True, True], [True, False]]


def test_abrupt_and_recurring():
    once = np.repeat([0, 1, 2], 2)
    assert streams.abrupt(3, 2, 2).pi().argmax(-1).T.tolist() == [once.tolist()] * 2
    again = streams.recurring(3, 1, 2, cycles=3).pi().argmax(-1)[:, 0]
    assert again.tolist() == np.tile(once, 3).tolist()


@pytest.mark.parametrize("width", [1, 3, 4, 6])
def test_gradual_is_a_line_between_contexts(width):
    pi = streams.gradual(3, 2, 6, width=width).pi()
    for t in range(18):
        expected = np.zeros(3)
        for k in range(3):  # Trapezoids: up about k * 6, down about (k + 1) * 6.
            up = 1 if k == 0 else (t + 0.5 - k * 6) / width + 0.5
            down = 1 if k == 2 else ((k + 1) * 6 - t - 0.5) / width + 0.5
            expected[k] = max(0, min(1, up, down))
        np.testing.assert_allclose(pi[t, 1], expected, atol=1e-6)
    np.testing.assert_allclose(pi.sum(-1), 1, atol=1e-6)


def test_gradual_of_width_one_is_abrupt():
    abrupt = streams.abrupt(3, 2, 5).pi()
    np.testing.assert_array_equal(streams.gradual(3, 2, 5, width=1).pi(), abrupt)


def test_blurry_keeps_the_rest_for_the_others():
    pi = streams.blurry(4, 2, 3, blur=0.3).pi()
    own = np.repeat(np.eye(4), 3, axis=0)[:, None]
    np.testing.assert_allclose(pi, np.tile(own * 0.6 + 0.1, (1, 2, 1)), atol=1e-6)


def test_staggered_lags_and_orders():
    order = [[0, 1, 2], [2, 0, 1]]
    schedule = streams.staggered(3, 2, 2, lag=[0, 3], order=order)
    assert schedule.clock.T.tolist() == [
        [0, 0, 1, 1, 2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2, 0, 0, 1, 1],
    ]


def test_staggered_draws_from_its_seed():
    build = lambda seed: streams.staggered(4, 30, 2, lag=5, order="random", seed=seed)
    one, two, other = build(1), build(1), build(2)
    np.testing.assert_array_equal(one.clock, two.clock)
    assert one.clock.shape != other.clock.shape or (one.clock != other.clock).any()
    firsts = np.unique(one.clock[0])
    assert firsts.tolist() == [0, 1, 2, 3]
    for client in one.clock.T:
        assert sorted(np.unique(client).tolist()) == [0, 1, 2, 3]


def test_join_leave_is_absence_outside():
    pi = streams.join_leave(streams.abrupt(2, 3, 2), [0, 1, 3], [4, 3, 4]).pi()
    assert pi.sum(-1).T.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: streams.abrupt(0, 1, 1),
            "num_contexts must be an integer of at least",
        ),
        (lambda: streams.abrupt(2, 0, 1), "num_clients must be an integer"),
        (lambda: streams.gradual(2, 1, 3, width=4), r"width \(4\) must not exceed"),
        (lambda: streams.blurry(2, 1, 3, blur=1.5), r"blur must be in \[0, 1\]"),
        (lambda: streams.recurring(2, 1, 1, cycles=0), "cycles"),
        (lambda: streams.staggered(2, 2, 1, lag=-1), "lag must be >= 0, got -1"),
        (lambda: streams.staggered(2, 2, 1, lag=[1, 2, 3]), "one per client"),
        (lambda: streams.staggered(2, 2, 1, lag=[0.5, 1]), "whole number"),
        (lambda: streams.staggered(2, 2, 1, order="rand"), "same, random; got 'rand'"),
        (lambda: streams.staggered(2, 1, 1, order=[[0, 0]]), "permutation of 0 .. 1"),
        (lambda: streams.join_leave(streams.abrupt(1, 2, 1), [1]), r"join .* \[2\]"),
        (lambda: streams.label_drift([0.5, 0.4], [1, 0], 2), "must sum to 1"),
        (lambda: streams.label_drift([1, 0], [1, 0, 0], 2), r"\(2,\) and \(3,\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
