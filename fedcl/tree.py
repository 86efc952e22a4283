"""Small pytree algebra."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def where(pred: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Selects whole trees: `a` if `pred` else `b`.

    Args:
      pred: () bool.
      a: a tree of arrays.
      b: a tree of the same structure and shapes.

    Returns:
      A tree like `a`.

    >>> where(jnp.array(True), {"w": 1}, {"w": 2})["w"].item()
    1
    """

    def leaf(x, y):
        same = x is y and isinstance(x, jax.Array)  # Such as θ, of any size.
        return x if same else jnp.where(pred, x, y)

    return jax.tree.map(leaf, a, b)


def add(a: PyTree, b: PyTree) -> PyTree:
    """`a + b`, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """`a − b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(c: jax.Array | float, a: PyTree) -> PyTree:
    """`c·a`, leaf by leaf, in each leaf's own type."""
    return jax.tree.map(lambda x: jnp.asarray(c, x.dtype) * x, a)


def square(a: PyTree) -> PyTree:
    """Elementwise square."""
    return jax.tree.map(jnp.square, a)


def zeros_like(a: PyTree) -> PyTree:
    """Zeros in the shapes of `a`, which may be `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), a)


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product of two trees, ().

    >>> vdot({"w": jnp.ones(3)}, {"w": 2 * jnp.ones(3)}).item()
    6.0
    """
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jnp.asarray(sum(jax.tree.leaves(products), start=jnp.float32(0)))


def finite(a: PyTree) -> jax.Array:
    """Whether every inexact leaf of the tree is finite, () bool."""
    leaves = [x for x in jax.tree.leaves(a) if jnp.issubdtype(x.dtype, jnp.inexact)]
    flags = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def gather(a: PyTree, index: jax.Array) -> PyTree:
    """Rows `index` of every leaf."""
    return jax.tree.map(lambda x: x[index], a)


def scatter(a: PyTree, index: jax.Array, rows: PyTree) -> PyTree:
    """`a` with rows `index` of every leaf replaced."""
    return jax.tree.map(lambda x, y: x.at[index].set(y), a, rows)


def stack(a: PyTree, n: int) -> PyTree:
    """`n` copies of a tree along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), a)


def path_string(path: tuple) -> str:
    """A tree path as text with slashes: `"blocks/0/kernel"`."""
    names = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(n) for n in names)


def partition(
    params: PyTree, trainable: Callable[[str], bool]
) -> tuple[PyTree, PyTree]:
    """Splits parameters into trainable φ and frozen θ by a path predicate.

    Args:
      params: a tree of arrays.
      trainable: `(path) -> bool`, where a path reads `"blocks/0/kernel"`.

    Returns:
      Two trees of the structure of `params`, with `None` in each other's place.

    Raises:
      ValueError: if no leaf is trainable.

    >>> phi, theta = partition({"a": 1, "b": 2}, lambda path: path == "b")
    >>> phi, theta
    ({'a': None, 'b': 2}, {'a': 1, 'b': None})
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    if not any(trainable(path_string(p)) for p, _ in paths):
        known = ", ".join(path_string(p) for p, _ in paths[:8])
        raise ValueError(
            "The predicate `trainable` selects none of the parameters; their paths "
            f"are {known}{', …' if len(paths) > 8 else ''}."
        )

    def pick(keep: bool) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda p, x: x if trainable(path_string(p)) == keep else None, params
        )

    return pick(True), pick(False)


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Undoes `partition`: fills the holes of one tree from the other.

    >>> merge({"a": None, "b": 2}, {"a": 1, "b": None})
    {'a': 1, 'b': 2}
    """
    if frozen is None:
        return trainable
    return jax.tree.map(
        lambda t, f: f if t is None else t,
        trainable,
        frozen,
        is_leaf=lambda x: x is None,
    )


def members(a: PyTree, kind: type) -> list[Any]:
    """The nodes of one class in a tree, such as one method's memory in a chain's.

    >>> from fedcl import base
    >>> members((base.Message(1.0, 2.0), 3.0), base.Message)[0].weight
    2.0
    """
    own = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(a, is_leaf=own) if own(node)]


def size(a: PyTree) -> int:
    """Bytes of all leaves, arrays or `jax.ShapeDtypeStruct`s, from static shapes.

    >>> size({"w": jnp.ones((2, 3))})
    24
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a))


def describe(a: PyTree) -> dict[str, str]:
    """`{path: "float32[3, 4]"}`, for messages and checks."""
    leaves = jax.tree_util.tree_flatten_with_path(a)[0]
    return {
        path_string(p): f"{jnp.result_type(x)}{list(jnp.shape(x))}" for p, x in leaves
    }


def strong(a: PyTree) -> PyTree:
    """Arrays with a type of their own, not a Python number's weak one.

    A weak type in a state would compile the round a second time.
    """

    def leaf(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.asarray(x, dtype=x.dtype)

    return jax.tree.map(leaf, a)
