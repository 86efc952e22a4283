"""The adapter from Flax Linen modules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from fedcl.models._model import Model, Params


def _plain(module: Any, x: Any, train: bool) -> Any:
    return module(x)


def from_linen(
    module: Any,
    example_x: Any,
    *,
    call: Callable[[Any, Any, bool], Any] = _plain,
) -> Model:
    """The model of a Flax Linen module.

    Args:
      module: a `flax.linen.Module`.
      example_x: an input, [B, ...], or its `jax.ShapeDtypeStruct`; only its shape
        and dtype are used.
      call: `(module, x, train) -> outputs`, for modules that want to be told whether
        they train, e.g. `lambda m, x, train: m(x, deterministic=not train)`.

    Returns:
      The model. With a key, `apply` calls the module with `train=True` and every
      random stream seeded from that key; without one with `train=False`.

    Raises:
      ValueError: if the module has variables outside the collection `"params"`, such
        as the running statistics of BatchNorm.

    >>> from flax import linen
    >>> model = from_linen(linen.Dense(2), jnp.ones((1, 3)))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3))).shape
    (5, 2)
    """
    shape = jax.eval_shape(lambda x: x, example_x)

    def variables(key: jax.Array) -> Any:
        x = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        return module.init(key, x, method=lambda m, x: call(m, x, False))

    _refuse_collections(jax.eval_shape(variables, jax.random.key(0)))

    def init(key: jax.Array) -> Params:
        return meta.unbox(dict(variables(key)["params"]))

    def apply(params: Params, x: Any, key: jax.Array | None = None) -> Any:
        rngs = None if key is None else {"params": key}
        method = lambda m, x: call(m, x, key is not None)
        return module.apply({"params": params}, x, rngs=rngs, method=method)

    return Model(init, apply)


def _refuse_collections(variables: Any) -> None:
    extra = sorted(set(variables) - {"params"})
    if extra or "params" not in variables:
        raise ValueError(
            f"from_linen: the module has the collections {sorted(variables)}, allowed "
            "is 'params' alone. A model is a pure function of its parameters; in place "
            "of linen.BatchNorm use linen.GroupNorm or linen.LayerNorm."
        )
