"""Metrics of continual and federated learning, as pure functions.

`R` [T, K] is the accuracy matrix: row t after context t was learnt, column k on the
test data of context k. `A` [E, K] is the same at every evaluation of a run. `L` [T, K]
is a matrix of losses, lower is better, such as nats per token. All
functions are jit-able, so they can be computed inside a scan.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fedcl._evaluator import evaluator as evaluator
from fedcl._evaluator import loss_evaluator as loss_evaluator
from fedcl._traffic import Communication as Communication
from fedcl._traffic import Sums as Sums
from fedcl._traffic import communication as communication
from fedcl._traffic import sums as sums


def average_accuracy(R: ArrayLike) -> jax.Array:
    r"""Mean accuracy over contexts at the end, :math:`\frac1K\sum_k R_{T,k}`.

    Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840

    >>> average_accuracy([[0.9, 0.1], [0.5, 0.7]]).item()
    0.6000000238418579
    """
    return jnp.mean(_matrix(R)[-1])


def average_incremental(R: ArrayLike) -> jax.Array:
    r"""Mean over t of the mean accuracy on the contexts learnt so far.

    .. math:: \frac1T \sum_t \frac{1}{t+1} \sum_{k \le t} R_{t,k}

    Rebuffi et al., iCaRL, 2017, https://arxiv.org/abs/1611.07725
    """
    R = _matrix(R)
    return jnp.mean(jnp.sum(R * _learnt(R), axis=1) / jnp.sum(_learnt(R), axis=1))


def matrix_mean(R: ArrayLike) -> jax.Array:
    r"""Mean of the entries on and below the diagonal, learnt contexts alone.

    Díaz-Rodríguez et al., 2018, https://arxiv.org/abs/1810.13166
    """
    R = _matrix(R)
    return jnp.sum(R * _learnt(R)) / jnp.sum(_learnt(R))


def learning_accuracy(R: ArrayLike) -> jax.Array:
    r"""Accuracy on each context when it has just been learnt, :math:`\frac1K\sum R_{k,k}`.

    Riemer et al., 2019, https://arxiv.org/abs/1810.11910
    """
    return jnp.mean(jnp.diagonal(_matrix(R)))


def backward_transfer(R: ArrayLike) -> jax.Array:
    r"""BWT: what later learning did to earlier contexts, negative when they suffer.

    .. math:: \frac{1}{K-1} \sum_{k<K} (R_{T,k} - R_{k,k})

    Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840

    >>> round(backward_transfer([[0.9, 0.1], [0.5, 0.7]]).item(), 4)
    -0.4
    """
    R = _matrix(R)
    return _mean_earlier(R[-1] - jnp.diagonal(R))


def forward_transfer(R: ArrayLike, baseline: ArrayLike) -> jax.Array:
    r"""FWT: what is known of a context just before it is learnt.

    .. math:: \frac{1}{K-1} \sum_{k>1} (R_{k-1,k} - b_k)

    Args:
      R: [T, K].
      baseline: b, [K] or (): the accuracy of an untrained model.

    Returns:
      (); 0 for a single context.

    Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840
    """
    R = _matrix(R)
    gain = jnp.diagonal(R, offset=1) - jnp.broadcast_to(baseline, R.shape[1])[1:]
    return jnp.sum(gain) / max(R.shape[1] - 1, 1)


def intransigence(R: ArrayLike, joint: ArrayLike) -> jax.Array:
    r"""What a learner misses of a context for having learnt others before.

    .. math:: \frac1K \sum_k (R^*_k - R_{k,k})

    Args:
      R: [T, K].
      joint: R*, [K]: the accuracies of a model trained on all contexts at once.

    Chaudhry et al., 2018, https://arxiv.org/abs/1801.10112
    """
    R = _matrix(R)
    return jnp.mean(jnp.broadcast_to(joint, R.shape[1]) - jnp.diagonal(R))


CONVENTIONS = (
    "chaudhry",
    "mammoth",
    "avalanche",
    "fed_mammoth",
    "mfcl",
    "fot",
    "sequel",
)


def forgetting(R: ArrayLike, convention: str = "chaudhry") -> jax.Array:
    r"""Forgetting: how far accuracies fell, by one of the seven conventions in use.

    They differ in what is subtracted from and over what is averaged, so numbers of
    different code bases do not compare. With K contexts:

    - "chaudhry": the best value in any row before the last, minus the last, over the
      K − 1 earlier contexts; in [−1, 1]. Chaudhry et al., 2018,
      https://arxiv.org/abs/1801.10112
    - "mammoth" (and PILOT): the best value since the context was learnt, the last row
      included, so that it is never negative; over K − 1.
    - "avalanche": the value when learnt minus the last, over K − 1: −BWT.
    - "fed_mammoth": as "avalanche", but over K: the last context's 0 counts.
    - "mfcl": as "fed_mammoth", except that the first context enters as a fraction
      and all else in percent (a slip in that code, kept to recognise its numbers);
      given here in percent / 100.
    - "fot": the number of "avalanche", which that code logs as "BWT": there,
      positive means forgetting.
    - "sequel": the last value minus the best since learnt, over K: never positive.

    Args:
      R: [T, K].
      convention: one of the names above.

    Returns:
      (); 0 for a single context.

    Raises:
      ValueError: for another name.

    >>> R = [[0.9, 0.1], [0.5, 0.7]]
    >>> [round(forgetting(R, c).item(), 2) for c in ("chaudhry", "fed_mammoth", "sequel")]
    [0.4, 0.2, -0.2]
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"convention is {convention!r}; it must be one of {', '.join(CONVENTIONS)}."
        )
    R = _matrix(R)
    last, at_learning = R[-1], jnp.diagonal(R)
    since = jnp.max(jnp.where(_learnt(R) > 0, R, -jnp.inf), axis=0)
    if convention == "chaudhry":
        return _mean_earlier((jnp.max(R[:-1], axis=0) if len(R) > 1 else last) - last)
    if convention == "mammoth":
        return _mean_earlier(since - last)
    if convention in ("avalanche", "fot"):
        return _mean_earlier(at_learning - last)
    if convention == "sequel":
        return jnp.mean(last - since)
    first = 1.0 if convention == "fed_mammoth" else 0.01
    return jnp.mean(at_learning.at[0].mul(first) - last)


def loss_forgetting(L: ArrayLike, convention: str = "chaudhry") -> jax.Array:
    r"""Forgetting in the unit of the loss, such as nats per token: `forgetting` of −L.

    By default :math:`\frac{1}{K-1} \sum_{k<K} (L_{T,k} - \min_{t<T} L_{t,k})`: positive
    when the loss on earlier contexts has risen, negative when it still falls.

    Args:
      L: [T, K], losses, lower is better.
      convention: see `forgetting`; "sequel" alone has the opposite sign.

    Returns:
      ().

    >>> round(loss_forgetting([[2.0, 5.0], [2.5, 3.0]]).item(), 4)
    0.5
    """
    return forgetting(-_matrix(L), convention)


def loss_rise(L: ArrayLike) -> jax.Array:
    r"""How far each context's loss has risen since it was learnt, :math:`L_{T,k}-L_{k,k}`.

    Args:
      L: [T, K], losses, lower is better.

    Returns:
      [K], 0 for the last context; its mean over the earlier ones is the backward
      transfer of −L with the opposite sign.

    >>> loss_rise([[2.0, 5.0], [2.5, 3.0]]).tolist()
    [0.5, 0.0]
    """
    L = _matrix(L)
    _learnt(L)
    return L[-1] - jnp.diagonal(L)


def anytime_average(A: ArrayLike, seen: ArrayLike) -> jax.Array:
    r"""Average anytime accuracy: mean over evaluations of that on the seen contexts.

    Caccia et al., 2022, https://arxiv.org/abs/2104.05025

    Args:
      A: [E, K].
      seen: [E, K] bool, the contexts met before each evaluation; evaluations before
        the first context do not count.

    Returns:
      ().

    >>> anytime_average([[0.5, 0.0], [0.3, 0.7]], [[True, False], [True, True]]).item()
    0.5
    """
    A, seen = _matrix(A), jnp.asarray(seen, jnp.float32)
    per = jnp.sum(A * seen, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1)
    any_seen = jnp.any(seen > 0, axis=1)
    return jnp.sum(per * any_seen) / jnp.maximum(jnp.sum(any_seen), 1)


def min_acc(A: ArrayLike, learnt: ArrayLike) -> jax.Array:
    r"""min-ACC: each earlier context's lowest accuracy after it was learnt, averaged.

    .. math:: \frac{1}{K-1} \sum_{k<K} \min_{e > e_k} A_{e,k}

    De Lange et al., Continual evaluation for lifelong learning, 2023,
    https://arxiv.org/abs/2205.13452

    Args:
      A: [E, K].
      learnt: e_k, [K] int: the evaluation at which context k was learnt. Contexts
        without a later evaluation (the last one) do not count.

    Returns:
      ().
    """
    A, learnt = _matrix(A), jnp.asarray(learnt)
    later = jnp.arange(A.shape[0])[:, None] > learnt[None, :]
    lowest = jnp.min(jnp.where(later, A, jnp.inf), axis=0)
    counts = jnp.any(later, axis=0)
    return jnp.sum(jnp.where(counts, lowest, 0)) / jnp.maximum(jnp.sum(counts), 1)


def wc_acc(A: ArrayLike, learnt: ArrayLike) -> jax.Array:
    r"""Worst-case accuracy: the last context now, the earlier ones at their worst.

    .. math:: \frac1K A_{E,K} + (1 - \frac1K)\, \text{min-ACC}

    De Lange et al., 2023, https://arxiv.org/abs/2205.13452

    Args:
      A: [E, K].
      learnt: [K], see `min_acc`; the last context is the one learnt last.

    Returns:
      ().
    """
    A, learnt = _matrix(A), jnp.asarray(learnt)
    share = 1 / A.shape[1]
    return share * A[-1, jnp.argmax(learnt)] + (1 - share) * min_acc(A, learnt)


def windowed_forgetting(A: ArrayLike, window: int) -> jax.Array:
    r"""WF: the largest drop inside any window of evaluations, averaged over contexts.

    .. math:: \frac1K \sum_k \max_{0 \le e' - e < \Delta} (A_{e,k} - A_{e',k})

    De Lange et al., 2023, https://arxiv.org/abs/2205.13452

    Args:
      A: [E, K].
      window: Δ, evaluations.

    Returns:
      ().

    >>> windowed_forgetting([[0.5], [1.0], [0.25]], 2).item()
    0.75
    """
    return jnp.mean(_largest_fall(_matrix(A), window))


def windowed_plasticity(A: ArrayLike, window: int) -> jax.Array:
    """WP: the largest gain inside any window; see `windowed_forgetting`."""
    return jnp.mean(_largest_fall(-_matrix(A), window))


class Spread(NamedTuple):
    """How a value differs over clients."""

    mean: jax.Array  # ()
    std: jax.Array  # ()
    worst: jax.Array  # (), the minimum.
    worst_decile: jax.Array  # (), mean of the lowest tenth.


def spread(values: ArrayLike) -> Spread:
    """Mean, standard deviation, minimum and worst decile over clients.

    Args:
      values: [N]; the worst decile is the mean of the ceil(N / 10) lowest.

    >>> spread([0.5, 1.0]).worst_decile.item()
    0.5
    """
    v = jnp.sort(jnp.asarray(values, jnp.float32))
    return Spread(jnp.mean(v), jnp.std(v), v[0], jnp.mean(v[: -(-v.shape[0] // 10)]))


def R_of(A: ArrayLike, at: ArrayLike, ends: ArrayLike) -> jax.Array:
    """The rows of the anytime matrix that are R's.

    Args:
      A: [E, K].
      at: [E] rounds done at each evaluation, ascending.
      ends: [T] rounds done when each context ended.

    Returns:
      [T, K]: for each end the first evaluation at or after it, the last one if there
      is none.

    >>> R_of([[0.0], [0.1], [0.2], [0.3]], [0, 5, 10, 15], [5, 12]).ravel().tolist()
    [0.10000000149011612, 0.30000001192092896]
    """
    return _matrix(A)[rows_of(at, ends)]


def rows_of(at: ArrayLike, ends: ArrayLike) -> jax.Array:
    """Which evaluation each end is read from, [T] int; see `R_of`."""
    at = jnp.asarray(at)
    return jnp.minimum(jnp.searchsorted(at, jnp.asarray(ends)), at.shape[0] - 1)


def local_steps(rounds: dict[str, Any]) -> Any:
    """Local steps in a run: those of the clients that trained, summed over [T, C]."""
    return (rounds["steps"] * rounds["trained"]).sum(axis=(-2, -1))


def _matrix(R: ArrayLike) -> jax.Array:
    R = jnp.asarray(R, jnp.float32)
    if R.ndim != 2 or 0 in R.shape:
        raise ValueError(f"The matrix must be [T, K], got shape {list(R.shape)}.")
    return R


def _learnt(R: jax.Array) -> jax.Array:
    """[T, K], 1 where context k was learnt by row t."""
    if R.shape[0] < R.shape[1]:
        raise ValueError(
            f"R has {R.shape[0]} rows for {R.shape[1]} contexts; it needs a row for "
            "each. For a run's evaluations take `R_of` first."
        )
    return jnp.tril(jnp.ones(R.shape, R.dtype))


def _mean_earlier(values: jax.Array) -> jax.Array:
    """The mean over all contexts but the last, 0 if there is one."""
    return jnp.sum(values[:-1]) / max(values.shape[0] - 1, 1)


def _largest_fall(A: jax.Array, window: int) -> jax.Array:
    """[K], the largest fall within `window` evaluations."""
    if window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more evaluations.")
    falls = [jnp.zeros(A.shape[1])]
    for gap in range(1, min(window, A.shape[0])):
        falls.append(jnp.max(A[:-gap] - A[gap:], axis=0))
    return jnp.max(jnp.stack(falls), axis=0)
