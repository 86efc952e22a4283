"""A picture of a stream: contexts over rounds per client."""

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcl.streams._schedules import Schedule
from fedcl.streams._stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ABSENT = (0.93, 0.93, 0.93)


def draw(
    stream: Stream | Schedule,
    path: str | PathLike[str] | None = None,
    *,
    title: str = "Contexts over rounds",
) -> "Figure":
    """A heat map of who is in which context when; mixtures mix their colours.

    Args:
      stream: a stream or a schedule.
      path: where to save it; the suffix names the format.
      title: above the map.

    Returns:
      A matplotlib `Figure`, which belongs to no window.

    >>> from fedcl import streams
    >>> figure = streams.draw(streams.staggered(3, 4, 5, lag=[0, 2, 4, 6]))
    >>> figure.axes[0].get_xlabel()
    'round'
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count, rounds, clients = stream.num_contexts, stream.num_rounds, stream.num_clients
    colors = _colors(count)
    height = float(np.clip(1.4 + 0.22 * clients, 2.4, 9.0))
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    # Row and column edges, so that client 0, round 0 is a whole cell.
    extent = (-0.5, rounds - 0.5, clients - 0.5, -0.5)
    cells = colored(stream, colors)
    axes.imshow(cells, aspect="auto", interpolation="nearest", extent=extent)
    absent = (cells == _ABSENT).all(axis=-1).any()
    note = "round (grey: absent)" if absent else "round"
    axes.set(xlabel=note, ylabel="client", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes, colors)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def colored(stream: Stream | Schedule, colors: np.ndarray) -> np.ndarray:
    """The picture's cells, [N, T, 3] in [0, 1]: `pi @ colors`, grey where absent."""
    table = np.asarray(stream.table)
    shades = table @ colors
    shades[table.sum(axis=1) == 0] = _ABSENT
    cells = shades[np.asarray(stream.clock)]
    if isinstance(stream, Stream):
        cells[~_present(stream)] = _ABSENT
    return np.clip(cells, 0, 1).transpose(1, 0, 2)


def _present(stream: Stream) -> np.ndarray:
    import jax

    over_clients = jax.vmap(lambda s, n, t: s.present(n, t), (None, 0, None))
    over_rounds = jax.vmap(over_clients, (None, None, 0))
    clients, rounds = np.arange(stream.num_clients), np.arange(stream.num_rounds)
    return np.asarray(jax.jit(over_rounds)(stream, clients, rounds))


def _colors(count: int) -> np.ndarray:
    import matplotlib

    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))[:, :3]
    return matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))[:, :3]


def _legend(figure: "Figure", axes: Any, colors: np.ndarray) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(colors)
    norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    mappable = ScalarMappable(norm=norm, cmap=ListedColormap(colors))
    ticks = np.unique(np.linspace(0, count - 1, min(count, 10)).astype(int))
    bar = figure.colorbar(mappable, ax=axes, ticks=ticks, label="context")
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
