"""`check_transform` finds each of five planted bugs, and passes honest methods."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedcl
from fedcl import reservoir, testing, tree


def l2(strength=1.0):
    """An honest method: stay near the parameters of the last boundary."""

    def begin(memory, params, ctx):
        return tree.where(ctx.boundary, params, memory)

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(params, memory)
        return strength * tree.vdot(gap, gap)

    return fedcl.transform(init=lambda params, example: params, begin=begin, loss=loss)


def stale_copy():
    """Bug 1: the penalty looks at a copy of the parameters that nobody trains."""

    def begin(memory, params, ctx):
        return {"anchor": memory["anchor"], "copy": params}

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(memory["copy"], memory["anchor"])
        return tree.vdot(gap, gap)

    init = lambda params, example: {"anchor": params, "copy": params}
    return fedcl.transform(init=init, begin=begin, loss=loss)


def frozen_anchor():
    """Bug 2: the anchor is read from a Python attribute when the step is traced."""
    box = {}

    def init(params, example):
        box["anchor"] = jax.tree.map(lambda x: jnp.asarray(np.array(x)), params)
        return ()

    def loss(memory, params, batch, aux, ctx):
        gap = tree.sub(params, box["anchor"])
        return tree.vdot(gap, gap)

    return fedcl.transform(init=init, loss=loss)


def shared_buffer():
    """Bug 3: remembered rows travel to the next client."""

    def begin(memory, params, ctx):
        rows = dict(memory.rows, x=memory.rows["x"] + ctx.shared)
        return memory._replace(rows=rows)

    def update(grads, memory, params, batch, aux, ctx):
        return grads, reservoir.add(memory, batch, ctx.key)

    return fedcl.transform(
        init=lambda params, example: reservoir.empty(example, 8),
        begin=begin,
        update=update,
        end=lambda memory, params, ctx: (memory, memory.rows["x"]),
    )


def key_by_position():
    """Bug 4: noise from a host generator, which follows the order of the cohort."""
    order = itertools.count()

    def update(grads, memory, params, batch, aux, ctx):
        host = lambda client: np.float32(next(order) % 7)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        noise = jax.pure_callback(host, shape, ctx.client, vmap_method="sequential")
        return jax.tree.map(lambda g: g + 0.1 * noise, grads), memory

    return fedcl.transform(update=update)


def growing_memory():
    """Bug 5: a memory that grows with every visit, so every round is another program."""

    def begin(memory, params, ctx):
        return jnp.concatenate([memory, jnp.zeros(1)])

    return fedcl.transform(init=lambda params, example: jnp.zeros(1), begin=begin)


PLANTED = {
    stale_copy: "its gradient is zero",
    frozen_anchor: "frozen at the first trace",
    shared_buffer: "holds rows of client 0",
    key_by_position: "depends on the position in the cohort",
    growing_memory: "Hook `begin` of the transform: its memory changed",
}


@pytest.mark.parametrize("bug", PLANTED, ids=lambda f: f.__name__)
def test_planted_bug_is_found(bug):
    with pytest.raises(AssertionError, match=PLANTED[bug]):
        testing.check_transform(bug())


def test_honest_method_passes_every_rule():
    rules = testing.check_transform(l2(), zero=l2(0.0))
    assert len(rules) == 10


def test_zero_strength_that_is_not_fedavg_is_found():
    with pytest.raises(AssertionError, match="zero strength is FedAvg"):
        testing.check_transform(l2(), zero=l2(1e-3))
