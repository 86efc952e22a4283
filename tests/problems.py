"""Small federations that several tests share."""

import jax
import jax.numpy as jnp

from fedcl import testing


def many(problem: testing.Problem, n: int) -> testing.Problem:
    """The toy problem with n clients, a multiple of four, some of them alike."""
    again = lambda a: jnp.concatenate([jnp.roll(a, i, axis=2) for i in range(n // 4)])

    class Many(testing.ToyStream):
        num_clients = n

    jax.tree_util.register_dataclass(Many)
    s = problem.stream
    return problem._replace(stream=Many(again(s.x), again(s.y)))
