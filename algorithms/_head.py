"""The last layer of a classifier, logits = f W + b, by its place in φ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedcl import base, phases, statistics, tree


class Head(NamedTuple):
    """A linear classifier."""

    kernel: jax.Array  # [D, Y]
    bias: jax.Array  # [Y]


def read_head(params: base.Params, head: str = "head") -> Head:
    """The last layer.

    Args:
      params: φ.
      head: its path, `"head"` or `"decoder/head"`; "" if φ itself is the layer.

    Returns:
      A `Head`.

    Raises:
      ValueError: if there is no layer with a kernel [D, Y] and a bias [Y] there, or
        if it is frozen.

    >>> read_head({"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}).bias
    Array([0., 0.], dtype=float32)
    """
    node: Any = params
    for name in filter(None, head.split("/")):
        node = node.get(name) if isinstance(node, dict) else None
    layer = node if isinstance(node, dict) else {}
    kernel, bias = layer.get("kernel"), layer.get("bias")
    if kernel is None or bias is None or jnp.shape(bias) != jnp.shape(kernel)[1:]:
        found = ", ".join(tree.describe(params)) or "nothing"
        raise ValueError(
            f"No trainable layer {head!r} with a kernel [D, Y] and a bias [Y]: the "
            f"parameters φ are {found}. Say where the last layer is with head=, and "
            "leave it among the trainable ones."
        )
    return Head(kernel, bias)


def write_head(
    params: base.Params, kernel: jax.Array, bias: jax.Array, head: str = "head"
) -> base.Params:
    """The parameters with another last layer.

    Args:
      params: φ.
      kernel: [D, Y].
      bias: [Y].
      head: the layer's path, see `read_head`.

    Returns:
      A tree like φ.

    Raises:
      ValueError: as `read_head`, and for other shapes than the layer has.

    >>> params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> write_head(params, jnp.zeros((3, 2)), jnp.ones(2))["head"]["bias"]
    Array([1., 1.], dtype=float32)
    """
    old = read_head(params, head)
    if kernel.shape != old.kernel.shape or bias.shape != old.bias.shape:
        raise ValueError(
            f"A classifier of shapes {kernel.shape} and {bias.shape} does not fit the "
            f"layer {head!r} of shapes {old.kernel.shape} and {old.bias.shape}: give "
            "dimension= and num_classes= of the model."
        )
    new = (kernel.astype(old.kernel.dtype), bias.astype(old.bias.dtype))
    return _put(params, tuple(filter(None, head.split("/"))), Head(*new))


def _put(node: dict[str, Any], path: tuple[str, ...], new: Head) -> dict[str, Any]:
    if not path:
        return {**node, "kernel": new.kernel, "bias": new.bias}
    return {**node, path[0]: _put(node[path[0]], path[1:], new)}


def in_head(head: str = "head", leaf: str = "") -> Callable[[base.Params], Any]:
    """`(params) -> tree of bool`: the leaves of the last layer, or that leaf of it.

    >>> in_head()({"head": {"bias": 1}, "layers": {"bias": 1}})
    {'head': {'bias': True}, 'layers': {'bias': False}}
    """
    start = f"{head}/{leaf}" if head else leaf
    own = lambda path, x: tree.path_string(path).startswith(start)
    return lambda params: jax.tree_util.tree_map_with_path(own, params)


Revise = Callable[[Head, Any, Any, jax.Array], Head]


def revised_head(
    statistic: statistics.Statistic,
    revise: Revise,
    loss_fn: base.LossFn,
    *,
    head: str = "head",
    mesh: jax.sharding.Mesh | None = None,
    switch: phases.Switch | None = None,
    name: str = "head",
) -> phases.Phase:
    """A phase that changes the last layer, in place, when contexts end.

    Args:
      statistic: what is summed over the rows of the contexts that end.
      revise: `(head, before, now, key) -> head`, with the sum over all contexts that
        ended in earlier rounds and the sum over those that end now.
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      head: the layer's path, see `read_head`.
      mesh: where the clients live.
      switch: when; by default when some client's context ends.
      name: prefixes its metric, "clients", how many contexts ended.

    Returns:
      A `Phase`; training goes on from the new layer.
    """
    total = phases.sum_over_clients(statistic, loss_fn, None, mesh)

    def init(data, state):
        return tree.strong(statistic.init(state.server.params, None))

    def apply(data, steps, state, memory, facts):
        now, clients = total(state, facts)
        params = state.server.params
        k_revise = jax.random.fold_in(facts.key, facts.num_clients)
        new = revise(read_head(params, head), memory, now, k_revise)
        params = tree.where(clients > 0, write_head(params, *new, head), params)
        state = state._replace(server=state.server._replace(params=params))
        return state, statistic.merge(memory, now), {"clients": clients}

    sums = lambda params: (statistic.init(params, None), ())
    switch = switch or phases.context_ends()
    return phases.Phase((), name, init, apply, switch, sums=sums)
