"""What is made once: of the same arguments, or of the same shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax


class Same:
    """A value without a hash, equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def remembered(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.lru_cache` for any arguments: those without a hash by identity.

    >>> make, given = remembered(lambda a: object()), [1]
    >>> make(given) is make(given), make(given) is make([1])
    (True, False)
    """

    @functools.lru_cache(maxsize=64)
    def known(*keys):
        return fn(*(k.value if isinstance(k, Same) else k for k in keys))

    return functools.wraps(fn)(lambda *args: known(*map(_key, args)))


def _key(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return Same(x)
    return x


def per_shapes(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(static, *trees)`, remembered by `static` and the trees' shapes.

    `fn` is given `jax.ShapeDtypeStruct`s in place of arrays, and what it returns must not
    be changed.

    >>> import jax.numpy as jnp
    >>> size = per_shapes(lambda scale, a: scale * a["x"].size)
    >>> size(2, {"x": jnp.ones((2, 3))})
    12
    """

    @remembered
    def known(static, structure, shapes):
        return fn(static, *jax.tree.unflatten(structure, shapes))

    def asked(static, *trees):
        shapes, structure = jax.tree.flatten(jax.eval_shape(lambda *t: t, *trees))
        return known(static, structure, tuple(shapes))

    return functools.wraps(fn)(asked)
