"""The picture shows the schedule."""

import matplotlib.image
import numpy as np

from fedcl import streams


def cells(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_colours_follow_the_contexts(tmp_path):
    schedule = streams.staggered(3, 4, 2, lag=[0, 1, 2, 3])
    figure = streams.draw(schedule, tmp_path / "stream.png")
    shown = cells(figure)
    assert shown.shape == (4, 9, 3)
    colors = np.stack([shown[0, 0], shown[0, 2], shown[0, 4]])
    assert len(np.unique(colors, axis=0)) == 3
    expected = colors[schedule.pi().argmax(-1)].transpose(1, 0, 2)
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    image = matplotlib.image.imread(tmp_path / "stream.png")
    assert image.shape[0] > 100 and image.std() > 0.05


def test_mixtures_mix_and_the_absent_are_grey():
    pi = [[[1, 0], [1, 0]], [[0, 1], [0, 0]], [[0.5, 0.5], [0, 1]]]
    shown = cells(streams.draw(streams.Schedule.of(pi)))
    np.testing.assert_allclose(shown[0, 2], (shown[0, 0] + shown[0, 1]) / 2, atol=1e-6)
    assert np.ptp(shown[1, 1]) == 0 and shown[1, 1, 0] > 0.9


def test_clients_without_rows_are_grey_too():
    data = {"x": np.zeros((6, 1)), "y": np.arange(6) % 2, "client": np.zeros(6, int)}
    stream = streams.class_incremental(
        data, num_contexts=2, num_clients=2, rounds_per_context=1, steps=1,
        partition=streams.natural(), empty="absent",
    )  # fmt: skip
    figure = streams.draw(stream)
    shown = cells(figure)
    assert np.ptp(shown[1], axis=-1).max() == 0 < np.ptp(shown[0], axis=-1).min()
    assert figure.axes[0].get_xlabel() == "round (grey: absent)"


def test_many_contexts_have_their_own_colours():
    shown = cells(streams.draw(streams.abrupt(25, 1, 1)))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 25
