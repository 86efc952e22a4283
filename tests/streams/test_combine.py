"""Later, blended, one after the other."""

from typing import Any

import jax
import numpy as np
import pytest

from fedcl import streams


def table(rows: int, offset: int = 0) -> dict[str, np.ndarray]:
    x = np.arange(offset, offset + rows, dtype=np.float32)[:, None]
    return {"x": x, "y": np.arange(rows, dtype=np.int32) % 2}


sample = jax.jit(streams.Stream.sample)


def build(rows=12, offset=0, **options) -> streams.Stream:
    given: dict[str, Any] = {
        "num_contexts": 2,
        "num_clients": 3,
        "rounds_per_context": 3,
    }
    given |= {"steps": 3, "batch_size": 4} | options
    return streams.class_incremental(table(rows, offset), **given)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_lagged_stream_is_the_stream_shifted():
    lag = np.array([0, 2, 5])
    prior = streams.label_drift([0.9, 0.1], [0.2, 0.8], 6)
    variants: list[dict[str, Any]] = [{}, {"prior": prior}]
    for options in variants:
        stream = build(**options)
        late = streams.lagged(stream, lag)
        for client in range(3):
            for t in range(6):
                then, key = max(t - lag[client], 0), jax.random.key(t)
                equal(sample(late, key, client, t), sample(stream, key, client, then))
                assert int(late.task(client, t)) == int(stream.task(client, then))


def test_lagged_schedules_agree_with_lagged_streams():
    schedule = streams.gradual(2, 3, 3, width=3)
    late = streams.lagged(schedule, [1, 0, 2])
    stream = build(schedule=schedule, rounds_per_context=None)
    np.testing.assert_array_equal(streams.lagged(stream, [1, 0, 2]).pi(), late.pi())
    for n, lag in enumerate([1, 0, 2]):
        expected = schedule.pi()[np.maximum(np.arange(6) - lag, 0), n]
        np.testing.assert_array_equal(late.pi()[:, n], expected)


def test_mixed_schedules_are_the_average():
    a, b = streams.gradual(3, 2, 4, width=4), streams.staggered(3, 2, 4, order="random")
    pi = streams.mixed(a, b, 0.25).pi()
    np.testing.assert_allclose(pi, 0.75 * a.pi() + 0.25 * b.pi(), atol=1e-6)
    gone = streams.join_leave(b, leave=[6, 0])
    pi = streams.mixed(a, gone, 0.25).pi()
    np.testing.assert_allclose(pi[:, 1], a.pi()[:, 1], atol=1e-6)
    np.testing.assert_allclose(pi.sum(-1), 1, atol=1e-6)


def test_concatenated_schedules():
    a, b = streams.abrupt(2, 3, 1), streams.blurry(2, 3, 2, blur=0.5)
    pi = streams.concatenated(a, b).pi()
    np.testing.assert_array_equal(pi, np.concatenate([a.pi(), b.pi()]))


def test_concatenated_streams_draw_what_each_draws():
    first, second = build(), build(20, 100, partition=streams.quantity(1.0))
    both = streams.concatenated(first, second)
    assert (both.num_rounds, both.num_contexts) == (12, 4)
    for t in (0, 5, 6, 11):
        key = jax.random.key(t)
        part = sample(first, key, 1, t) if t < 6 else sample(second, key, 1, t - 6)
        equal(sample(both, key, 1, t), part)
        equal_task = int(first.task(1, t)) if t < 6 else 2 + int(second.task(1, t - 6))
        assert int(both.task(1, t)) == equal_task


def test_joined_transforms_and_heads_stay_with_their_rows():
    shared: dict[str, Any] = {
        "num_clients": 1,
        "rounds_per_context": 1,
        "steps": 1,
        "batch_size": 8,
    }
    data = {"x": np.arange(8.0).reshape(2, 4), "y": np.array([0, 1])}
    turned = streams.permutations(2, (4,), seed=1)
    other = streams.permutations(3, (4,), seed=2)
    a = streams.domain_incremental(data, turned, head=np.eye(2), **shared)
    b = streams.domain_incremental(data, other, head=np.ones((3, 2)), **shared)
    both = streams.concatenated(a, b)
    for t, (stream, at) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]):
        key = jax.random.key(t)
        equal(sample(both, key, 0, t), sample(stream, key, 0, at))


def test_mixed_streams_keep_their_contexts_apart():
    a, b = build(), build(12, 100)
    both = streams.mixed(a, b, 0.5)
    assert both.num_contexts == 4
    np.testing.assert_allclose(both.pi()[0, 0], [0.5, 0, 0.5, 0])
    x = np.asarray(sample(both, jax.random.key(0), 0, 0)["x"]).ravel()
    assert (x < 100).any() and (x >= 100).any()


def test_epochs_of_joined_streams_fit_the_longer():
    options: dict[str, Any] = {"draw": "epochs", "steps": None}
    small, large = build(12, **options), build(48, 100, **options)
    both = streams.concatenated(small, large)
    assert both.steps == large.steps and both.capacity == large.capacity
    masks = [sample(both, jax.random.key(0), 0, t)["mask"].sum() for t in (0, 6)]
    assert np.asarray(masks).tolist() == [2, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streams.lagged(build(), [0, 1, 6]), r"lag must be in 0 .. 5.* 0 .. 6"),
        (lambda: streams.lagged(build(), [0, 1]), r"one whole number .* \[3\]"),
        (lambda: streams.lagged(build(), [0, -1, 0]), "lag must be in 0 .. 5"),
        (lambda: streams.mixed(build(), build(), 1.1), r"weight must be in \[0, 1\]"),
        (
            lambda: streams.mixed(
                streams.abrupt(2, 1, 1), streams.abrupt(2, 1, 2), 0.5
            ),
            r"same rounds and clients, got \(2, 1\) and \(4, 1\)",
        ),
        (
            lambda: streams.concatenated(
                streams.abrupt(2, 1, 1), streams.abrupt(3, 1, 1)
            ),
            "same number of contexts, got 2 and 3",
        ),
        (
            lambda: streams.concatenated(build(), build(steps=4)),
            "same steps, got 3 and 4",
        ),
        (
            lambda: streams.concatenated(build(), build(prior=[[[0.5, 0.5]]])),
            "label prior cannot be joined",
        ),
        (
            lambda: streams.concatenated(build(), build(head=np.eye(2))),
            "same classes in head, got None and 2",
        ),
    ],
)
def test_errors_name_both_sides(call, message):
    with pytest.raises(ValueError, match=message):
        call()
