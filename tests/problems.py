"""Small federations that several tests share."""

import jax
import jax.numpy as jnp

from fedcl import testing


def eight(problem):
    """The toy stream with eight clients, for eight devices."""
    double = lambda a: jnp.concatenate([a, a[::-1]])

    class Eight(testing.ToyStream):
        num_clients = 8

    jax.tree_util.register_dataclass(Eight)
    s = problem.stream
    return problem._replace(stream=Eight(double(s.x), double(s.y)))
