"""Seeds side by side: each is the run that it is alone, whatever the phases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedcl
from fedcl import algorithms, cohorts, phases, testing

P, RATE, ROUNDS = testing.toy_problem(), 0.1, 6


def parts():
    """Two-way gradient transfer, a switch of three rules, and distillation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, testing.FEATURES)).astype(np.float32)
    y = rng.integers(0, testing.CLASSES, 12).astype(np.int32)
    rows, size = {"x": jnp.asarray(x), "y": jnp.asarray(y)}, 4
    step, strength = RATE * testing.STEPS, 0.5
    adaptive = phases.any_of(
        phases.plateau(0.05, 2), phases.conflict(P.loss_fn, 1, batch_size=size)
    )
    beside = phases.public(
        P.loss_fn,
        optax.sgd(RATE, momentum=0.5),
        rows,
        switch=phases.all_of(phases.budget(5), adaptive),
        transfer=phases.client_gradient(step, strength),
        batch_size=size,
    )
    algorithm = algorithms.fedavg(
        P.loss_fn, optax.sgd(RATE), transform=algorithms.gradient_transfer(strength)
    )
    apply = lambda p, x, key=None: x @ p["kernel"] + p["bias"][None]
    every = phases.every(2, 2)
    return algorithm, (
        phases.gradient(P.loss_fn, rows, switch=every, batch_size=size),
        phases.aside(beside),
        phases.federated(algorithm, cohort=cohorts.uniform(2)),
        phases.join(0.5),
        phases.distil(apply, optax.sgd(RATE), rows, switch=every, batch_size=size),
    )


def test_two_seeds_in_one_program_are_two_runs():
    algorithm, round_ = parts()
    keys = jax.random.split(jax.random.key(3), 2)
    starts = jax.tree.map(lambda p: jnp.stack([p, -2 * p + 0.1]), P.params)
    begin = lambda p: algorithm.init(p, P.stream.example(), P.stream.num_clients)
    go = lambda state, key: fedcl.run(round_, state, P.stream, key=key, rounds=ROUNDS)
    both, history = go(jax.vmap(begin)(starts), keys)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for s in range(2):
        one = lambda x, s=s: x[s]
        alone, told = go(begin(jax.tree.map(one, starts)), keys[s])
        jax.tree.map(close, jax.tree.map(one, both), alone)
        assert told.rounds.keys() == history.rounds.keys()
        for name, column in told.rounds.items():
            close(history.rounds[name][s], column)
    steps = history.rounds["public/steps"]
    assert (steps[0] != steps[1]).any() and (steps.sum(axis=1) > 0).all()
