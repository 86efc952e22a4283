"""What a compiled program needs besides its arguments, for K clients at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedcl import tree


class Need(NamedTuple):
    """Bytes of a local training of K clients over one frozen base."""

    base: int  # θ
    phi: int  # φ of one client
    optimiser: int  # and its optimiser's state
    temporary: int  # What the compiled program allocates besides what goes in and out.

    @property
    def trained(self) -> int:
        """What each client has of its own."""
        return self.phi + self.optimiser


def temporaries(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes of temporaries of `jax.jit(fn)`; arguments may be shapes alone."""
    memory: Any = jax.jit(fn).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes


def local_training(
    apply: Callable[..., Any], params: Any, where: Callable[[str], bool], x: Any, k: int
) -> Need:
    """A step of Adam on `k` clients under vmap; θ is given once, φ to each client.

    Args:
      apply: `(params, x) -> outputs`; the loss is their mean square.
      params: parameters or their shapes.
      where: which of them are trained.
      x: a client's batch, or its shape.
      k: K.
    """
    phi, theta = tree.partition(params, where)
    optimiser = optax.adam(1e-3)

    def local(phi, state, theta, x):
        loss = lambda phi: jnp.mean(jnp.square(apply(tree.merge(phi, theta), x)))
        updates, state = optimiser.update(jax.grad(loss)(phi), state)
        return optax.apply_updates(phi, updates), state

    many = lambda a: jax.ShapeDtypeStruct((k, *a.shape), a.dtype)
    state = jax.eval_shape(optimiser.init, phi)
    clients = jax.vmap(local, in_axes=(0, 0, None, 0))
    args = (*jax.tree.map(many, (phi, state)), theta, jax.tree.map(many, x))
    base, own, optimiser_ = map(tree.size, (theta, phi, state))
    return Need(base, own, optimiser_, temporaries(clients, *args))
