"""What depends on shapes alone is traced once."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def per_shapes(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(static, *trees)`, remembered by `static` and the trees' shapes.

    `fn` is given `jax.ShapeDtypeStruct`s in place of arrays, and what it returns must not
    be changed.

    >>> import jax.numpy as jnp
    >>> size = per_shapes(lambda scale, a: scale * a["x"].size)
    >>> size(2, {"x": jnp.ones((2, 3))})
    12
    """

    @functools.lru_cache(maxsize=64)
    def known(static, structure, shapes):
        return fn(static, *jax.tree.unflatten(structure, shapes))

    def asked(static, *trees):
        shapes, structure = jax.tree.flatten(jax.eval_shape(lambda *t: t, *trees))
        return known(static, structure, tuple(shapes))

    return functools.wraps(fn)(asked)
