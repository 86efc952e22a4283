"""Sums of powers of each row's gradient: dense layers by products, others row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import losses, models
from fedcl._row_gradients import powers

B = 7
WEIGHT = jnp.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 0.25])


def of(model, shape):
    """The gradient of a row's loss, and seven rows."""
    params, loss = model.init(jax.random.key(0)), losses.softmax(model.apply)
    rows = jax.random.normal(jax.random.key(1), (B, 1, *shape)), jnp.arange(B) % 3

    def gradient(x, y):
        row = {"x": x, "y": y[None], "mask": jnp.ones(1)}
        return jax.grad(lambda p: loss(p, row, jax.random.key(2))[0])(params)

    return gradient, rows


def tied(x, y):
    """A kernel used twice: its gradient is a sum of two outer products."""
    w = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)
    return jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))(w)


CASES = {
    "mlp": lambda: of(models.mlp((6, 5, 3)), (6,)),
    "convnet": lambda: of(models.convnet((4, 4, 1), (2,), 3, groups=1), (4, 4, 1)),
    "tied": lambda: (tied, (jax.random.normal(jax.random.key(1), (B, 1, 4)), WEIGHT)),
}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_sum_over_rows(case, power):
    gradient, rows = CASES[case]()
    found = jax.jit(lambda w: powers(gradient, rows, w, power))(WEIGHT)
    one = jax.jit(gradient)
    each = [one(*(r[n] for r in rows)) for n in range(B)]
    total = jax.tree.map(
        lambda *g: sum(
            w * np.abs(np.float64(x)) ** power for w, x in zip(WEIGHT, g, strict=True)
        ),
        *each,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-9), found, total
    )


@pytest.mark.parametrize(("case", "formed"), [("mlp", False), ("tied", True)])
def test_a_dense_layer_forms_no_gradient_of_a_row(case, formed):
    gradient, rows = CASES[case]()
    program = jax.jit(lambda w: powers(gradient, rows, w, 2)).lower(WEIGHT).compile()
    shapes = {"mlp": ["7,6,5", "7,5,6"], "tied": ["7,4,4"]}[case]
    assert any(f"f32[{s}]" in program.as_text() for s in shapes) == formed


def test_clients_side_by_side_are_each_alone():
    gradient, (x, y) = CASES["mlp"]()
    many = jnp.stack([x, 2 * x])
    one = lambda x: powers(gradient, (x, y), WEIGHT, 2)
    both = jax.jit(jax.vmap(one))(many)
    for i in range(2):
        alone = jax.jit(one)(many[i])
        close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-9)
        jax.tree.map(close, jax.tree.map(lambda a, i=i: a[i], both), alone)
