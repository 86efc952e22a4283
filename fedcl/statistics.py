r"""Statistics that add: exact under any partition over clients and any order.

A statistic :math:`s(D) = \sum_{x\in D} s(x)` is accumulated batch by batch, merged
over clients by addition, and solved once. Importance weights (Fisher, MAS), Gram
matrices, class Gaussians and histograms all have this form.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedcl import base, losses, tree
from fedcl._row_gradients import powers

PyTree = Any


class Statistic(NamedTuple):
    """A sum over rows.

    Attributes:
      init: `(params, example) -> value`, the value of no data; zeros.
      accumulate: `(value, params, batch, loss_fn, key) -> value`.
      merge: `(value, value) -> value`, associative and commutative.
      solve: `(value) -> result`; safe on the value of no data.
    """

    init: Callable[[base.Params, PyTree], PyTree]
    accumulate: Callable[
        [PyTree, base.Params, base.Batch, base.LossFn, jax.Array], PyTree
    ]
    merge: Callable[[PyTree, PyTree], PyTree]
    solve: Callable[[PyTree], PyTree]


class Sum(NamedTuple):
    """A weighted sum over rows and the weight behind it."""

    total: PyTree
    rows: jax.Array  # () float32


def mean(value: Sum) -> PyTree:
    """The mean behind a `Sum`; zeros if there were no rows."""
    return jax.tree.map(lambda t: t / jnp.maximum(value.rows, 1e-12), value.total)


def merge_all(statistic: Statistic, values: PyTree) -> PyTree:
    """Merges values stacked along a leading axis."""
    first = tree.gather(values, jnp.int32(0))
    rest = jax.tree.map(lambda x: x[1:], values)
    merge = lambda a, b: (statistic.merge(a, b), None)
    return jax.lax.scan(merge, first, rest)[0]


def over(
    statistic: Statistic,
    params: base.Params,
    sweep: base.Batch,
    loss_fn: base.LossFn,
    key: jax.Array,
) -> PyTree:
    """The value of a statistic over batches [S, B, ...]."""

    def add(value, xs):
        batch, k = xs
        return statistic.accumulate(value, params, batch, loss_fn, k), None

    keys = jax.random.split(key, sweep["mask"].shape[0])
    empty = tree.strong(statistic.init(params, None))
    return jax.lax.scan(add, empty, (sweep, keys))[0]


def one_by_one(batch: base.Batch) -> base.Batch:
    """Rows as batches of one, each with mask 1, [B, 1, ...]."""
    rows = jax.tree.map(lambda x: x[:, None], batch)
    return {**rows, "mask": jnp.ones_like(rows["mask"])}


def _sum_statistic(total: Callable) -> Statistic:
    """The mean over rows, from `total(params, rows, weight, loss_fn, keys)`, their sum.

    `rows` are batches of one, [B, 1, ...], and `weight` is their mask.
    """

    def init(params, example):
        return Sum(tree.zeros_like(params), jnp.float32(0))

    def accumulate(value, params, batch, loss_fn, key):
        mask = batch["mask"]
        keys = jax.random.split(key, mask.shape[0])
        added = total(params, one_by_one(batch), mask, loss_fn, keys)
        return Sum(tree.add(value.total, added), value.rows + jnp.sum(mask))

    return Statistic(init, accumulate, tree.add, mean)


def fisher(kind: str = "exact") -> Statistic:
    r"""The diagonal of the Fisher information, averaged over rows.

    ========== ==================================================================
    exact      :math:`E_x E_{y\sim p(y|x)} [\nabla \log p(y|x)]^2`, one backward per
               class and row
    sampled    one draw :math:`y \sim p(y|x)` per row
    empirical  the label of the data, :math:`E_{(x,y)} [\nabla \log p(y|x)]^2`
    batched    the square of the *batch-mean* gradient; cheap, not a Fisher: it
               shrinks with the batch size, and so it depends on the batches
    ========== ==================================================================

    Args:
      kind: one of the four names; `aux` of the loss must be logits [B, Y] for
        "exact" and "sampled".

    Returns:
      A `Statistic` whose result is a tree like φ.

    Raises:
      ValueError: for another name.

    Cost: rows × (Y, 1, 1) backward passes; "batched" one per batch.

    Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796; van de Ven, 2025,
    https://arxiv.org/abs/2502.11756

    >>> loss = lambda p, b, k: (0.0, jnp.broadcast_to(p["w"], (1, 2)))
    >>> s, p = fisher("exact"), {"w": jnp.zeros(2)}
    >>> batch = {"mask": jnp.ones(3)}
    >>> s.solve(s.accumulate(s.init(p, None), p, batch, loss, jax.random.key(0)))["w"]
    Array([0.25, 0.25], dtype=float32)
    """
    if kind == "batched":
        return _batched_fisher()
    if kind not in _ROW_FISHERS:
        raise ValueError(
            f"fisher: {kind!r} is none of {[*_ROW_FISHERS, 'batched']}; see the table in "
            "its docstring."
        )
    return _sum_statistic(_ROW_FISHERS[kind])


def _log_probabilities(params, row, loss_fn, key):
    logits = losses.logits_of(loss_fn(params, row, key)[1])
    return jax.nn.log_softmax(logits.reshape(logits.shape[-1]))


def _exact(params, rows, weight, loss_fn, keys):
    told = lambda p, row, k: _log_probabilities(p, row, loss_fn, k)
    probability = jnp.exp(jax.vmap(told, (None, 0, 0))(params, rows, keys))

    # Scanned over classes: the gradients of one class in memory at a time.
    def add(total, y):
        score = lambda row, k: jax.grad(lambda p: told(p, row, k)[y])(params)
        w = weight * probability[:, y]
        return tree.add(total, powers(score, (rows, keys), w, 2)), None

    classes = jnp.arange(probability.shape[1])
    return jax.lax.scan(add, tree.zeros_like(params), classes)[0]


def _sampled(params, rows, weight, loss_fn, keys):
    def score(row, key):
        k_loss, k_draw = jax.random.split(key)
        told = lambda p: _log_probabilities(p, row, loss_fn, k_loss)
        y = jax.random.categorical(k_draw, told(params))
        return jax.grad(lambda p: told(p)[y])(params)

    return powers(score, (rows, keys), weight, 2)


def _empirical(params, rows, weight, loss_fn, keys):
    score = lambda row, key: jax.grad(lambda p: loss_fn(p, row, key)[0])(params)
    return powers(score, (rows, keys), weight, 2)


_ROW_FISHERS: dict[str, Callable] = {
    "exact": _exact,
    "sampled": _sampled,
    "empirical": _empirical,
}


def _batched_fisher() -> Statistic:
    def init(params, example):
        return Sum(tree.zeros_like(params), jnp.float32(0))

    def accumulate(value, params, batch, loss_fn, key):
        squared = tree.square(jax.grad(lambda p: loss_fn(p, batch, key)[0])(params))
        real = (jnp.sum(batch["mask"]) > 0).astype(jnp.float32)
        total = jax.tree.map(lambda t, s: t + real * s, value.total, squared)
        return Sum(total, value.rows + real)

    return Statistic(init, accumulate, tree.add, mean)


def sensitivity() -> Statistic:
    r"""MAS's importance :math:`E_x |\partial \|f(x)\|_2^2 / \partial\theta|`.

    Returns:
      A `Statistic` whose result is a tree like φ; f is the loss's `aux`.

    Cost: one backward pass per row.

    Aljundi et al., 2018, https://arxiv.org/abs/1711.09601
    """

    def total(params, rows, weight, loss_fn, keys):
        logits = lambda p, row, key: losses.logits_of(loss_fn(p, row, key)[1])
        norm = lambda p, *given: jnp.sum(jnp.square(logits(p, *given)))
        score = lambda *given: jax.grad(norm)(params, *given)
        return powers(score, (rows, keys), weight, 1)

    return _sum_statistic(total)


class Moments(NamedTuple):
    """Per-class counts, sums and second moments of features."""

    n: jax.Array  # [Y]
    first: jax.Array  # [Y, D]
    second: jax.Array  # [Y, D, D]


class Gaussians(NamedTuple):
    """One Gaussian per class."""

    n: jax.Array  # [Y]
    mean: jax.Array  # [Y, D]
    covariance: jax.Array  # [Y, D, D], divided by n.


Features = Callable[[base.Params, base.Batch, base.LossFn, jax.Array], jax.Array]


def features(
    params: base.Params, batch: base.Batch, loss_fn: base.LossFn, key: jax.Array
) -> jax.Array:
    """The features [B, D] that the loss tells, see `fedcl.losses.Output`."""
    return losses.features_of(loss_fn(params, batch, key)[1])


def gaussians(
    num_classes: int, dimension: int, features: Features = features
) -> Statistic:
    """Mean and covariance of the features of each class.

    Args:
      num_classes: Y.
      dimension: D.
      features: `(params, batch, loss_fn, key) -> [B, D]`; those of the loss's `aux`.

    Returns:
      A `Statistic` whose result is `Gaussians`; a class without rows has zeros.

    Cost: one forward pass per row and Y·D² memory.
    """

    def init(params, example):
        y, d = num_classes, dimension
        return Moments(jnp.zeros(y), jnp.zeros((y, d)), jnp.zeros((y, d, d)))

    def accumulate(value, params, batch, loss_fn, key):
        f = features(params, batch, loss_fn, key)
        hot = jax.nn.one_hot(batch["y"], num_classes) * batch["mask"][:, None]
        added = Moments(
            jnp.sum(hot, axis=0), hot.T @ f, jnp.einsum("by,bd,be->yde", hot, f, f)
        )
        return tree.add(value, added)

    def solve(value):
        n = jnp.where(value.n > 0, value.n, 1)
        mu = value.first / n[:, None]
        outer = jnp.einsum("yd,ye->yde", mu, mu)
        return Gaussians(value.n, mu, value.second / n[:, None, None] - outer)

    return Statistic(init, accumulate, tree.add, solve)


class Sums(NamedTuple):
    """Per-class counts and sums of features."""

    n: jax.Array  # [Y]
    first: jax.Array  # [Y, D]


class Means(NamedTuple):
    """The mean of each class."""

    n: jax.Array  # [Y]
    mean: jax.Array  # [Y, D]


def class_means(
    num_classes: int, dimension: int, features: Features = features
) -> Statistic:
    """Mean features of each class.

    Args:
      num_classes: Y.
      dimension: D.
      features: as in `gaussians`.

    Returns:
      A `Statistic` whose result is `Means`; a class without rows has zeros.

    Cost: one forward pass per row and Y·D memory.

    >>> s = class_means(2, 1, lambda params, batch, loss_fn, key: batch["x"])
    >>> rows = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.array([1, 1]),
    ...         "mask": jnp.ones(2)}
    >>> s.solve(s.accumulate(s.init(None, None), None, rows, None, None)).mean
    Array([[0.],
           [2.]], dtype=float32)
    """

    def init(params, example):
        return Sums(jnp.zeros(num_classes), jnp.zeros((num_classes, dimension)))

    def accumulate(value, params, batch, loss_fn, key):
        hot = jax.nn.one_hot(batch["y"], num_classes) * batch["mask"][:, None]
        f = features(params, batch, loss_fn, key)
        return tree.add(value, Sums(jnp.sum(hot, axis=0), hot.T @ f))

    def solve(value):
        n = jnp.where(value.n > 0, value.n, 1)
        return Means(value.n, value.first / n[:, None])

    return Statistic(init, accumulate, tree.add, solve)


class Gram(NamedTuple):
    """The normal equations of least squares."""

    xx: jax.Array  # [D, D]
    xy: jax.Array  # [D, Y]


def ridge(
    num_classes: int, dimension: int, strength: float, features: Features = features
) -> Statistic:
    r"""Ridge regression of one-hot labels on features, in closed form.

    .. math:: W = (\sum_i f_i f_i^\top + \lambda I)^{-1} \sum_i f_i y_i^\top

    Args:
      num_classes: Y.
      dimension: D.
      strength: λ > 0.
      features: as in `gaussians`.

    Returns:
      A `Statistic` whose result is W, [D, Y].

    Cost: D² memory, D³ once.
    """

    def init(params, example):
        return Gram(
            jnp.zeros((dimension, dimension)), jnp.zeros((dimension, num_classes))
        )

    def accumulate(value, params, batch, loss_fn, key):
        f = features(params, batch, loss_fn, key)
        weighted = f * batch["mask"][:, None]
        y = jax.nn.one_hot(batch["y"], num_classes)
        return tree.add(value, Gram(weighted.T @ f, weighted.T @ y))

    def solve(value):
        a = value.xx + strength * jnp.eye(dimension)
        return jnp.linalg.solve(a, value.xy)

    return Statistic(init, accumulate, tree.add, solve)


def histogram(num_classes: int) -> Statistic:
    """How many rows of each label there are, [Y].

    >>> s = histogram(3)
    >>> batch = {"y": jnp.array([0, 2, 2]), "mask": jnp.ones(3)}
    >>> s.accumulate(s.init(None, None), None, batch, None, None)
    Array([1., 0., 2.], dtype=float32)
    """

    def accumulate(value, params, batch, loss_fn, key):
        hot = jax.nn.one_hot(batch["y"], num_classes)
        return value + jnp.sum(hot * batch["mask"][:, None], axis=0)

    return Statistic(
        lambda p, e: jnp.zeros(num_classes), accumulate, jnp.add, lambda v: v
    )


def joint(*parts: Statistic) -> Statistic:
    """Several statistics of the same rows, in one pass over them.

    Args:
      *parts: the statistics.

    Returns:
      A `Statistic` whose value and result are tuples, one entry for each part.

    >>> s = joint(histogram(2), histogram(3))
    >>> [v.shape for v in s.init(None, None)]
    [(2,), (3,)]
    """

    def init(params, example):
        return tuple(s.init(params, example) for s in parts)

    def accumulate(value, params, batch, loss_fn, key):
        rows = (params, batch, loss_fn, key)
        return tuple(s.accumulate(v, *rows) for s, v in zip(parts, value, strict=True))

    def merge(a, b):
        return tuple(s.merge(x, y) for s, x, y in zip(parts, a, b, strict=True))

    def solve(value):
        return tuple(s.solve(v) for s, v in zip(parts, value, strict=True))

    return Statistic(init, accumulate, merge, solve)
