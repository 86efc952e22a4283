"""What a model has beside its network, and what of it is trained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from fedcl import tree
from fedcl._experiment_config import Experiment, Tuned

PyTree = Any


def adapted(e: Experiment, made: Any, params: PyTree, keys: jax.Array) -> Any:
    """The model and its parameters [S, ...], split into φ and θ.

    Returns:
      (model, φ, θ or None).
    """
    from fedcl import models

    given: Any = e.model  # Of the kinds that say what is trained.
    if given.train == "full":
        return made, params, None
    if given.train == "head":
        return made, *tree.partition(params, models.head_only)
    put, trained = _beside(given)
    first = jax.tree.map(lambda x: x[0], params)
    new = put(made, first, keys[0])[0]
    params = jax.jit(jax.vmap(lambda p, k: put(made, p, k)[1]))(params, keys)
    both = models.any_of(trained, models.head_only)
    return new, *tree.partition(params, both)


def _beside(given: Tuned) -> tuple[Callable[..., Any], Callable[[str], bool]]:
    """`(model, params, key) -> (model, params)` with new leaves, and which they are."""
    from fedcl import models

    if given.train == "prompt":
        length = given.prompt
        put = lambda m, p, k: models.soft_prompt(m, p, length=length, key=k)
        return put, models.prompts_only
    if given.train == "dual_adapters":
        wide = given.adapter
        put = lambda m, p, k: models.dual_adapters(m, p, width=wide, key=k)
        return put, models.shared_or_own
    inner = lambda path: path.split("/")[0] in ("blocks", "layers")
    low = partial(models.lora, rank=given.rank, alpha=given.alpha, where=inner)
    return lambda m, p, k: low(m, p, key=k), models.lora_only
