"""θ is held once: what no round changes is not copied, not saved, and known again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import (
    _frozen,
    _program,
    algorithms,
    base,
    losses,
    memory,
    models,
    phases,
    testing,
    tree,
)
from fedcl.checkpoint import CheckpointError, Checkpoints

KEY = jax.random.key(4)
P = testing.toy_problem()


def federation(change=False):
    """Biases are trained; `change` adds one to the second leaf of θ in every round."""
    params = P.params | {"beside": jnp.arange(3.0)}
    loss_fn = lambda p, b, k: P.loss_fn({k: p[k] for k in P.params}, b, k)
    phi, theta = tree.partition(params, lambda path: path == "bias")
    algorithm = algorithms.fedavg(loss_fn, optax.sgd(0.1))
    mean = algorithm.aggregate

    def aggregate(server, messages):
        new = mean(server, messages)
        frozen = new.frozen | {"beside": new.frozen["beside"] + 1}
        return new._replace(frozen=frozen)

    if change:
        algorithm = algorithm._replace(aggregate=aggregate)
    init = lambda phi: algorithm.init(phi, P.stream.example(), 4, frozen=theta)
    return algorithm, init, phi


def ran(algorithm, state, key=KEY, **kw):
    kw = {"key": key, "rounds": 4, "every": 2, **kw}
    return fedcl.run(algorithm, state, P.stream, **kw)[0]


@pytest.mark.parametrize("change", [False, True])
def test_what_no_round_changes_is_the_array_that_was_given(change):
    algorithm, init, phi = federation(change)
    state = init(phi)
    ended = ran(algorithm, state)
    given, found = state.server.frozen, ended.server.frozen
    assert found["kernel"] is given["kernel"]
    assert (found["beside"] is given["beside"]) == (not change)
    np.testing.assert_array_equal(found["beside"], np.arange(3.0) + 4 * change)
    assert np.isfinite(given["beside"]).all()  # It was not donated.


def test_everything_else_is_donated():
    algorithm, init, phi = federation()
    state = init(phi)
    parts = (phases.federated(algorithm),)
    program = _program.Program(parts, P.stream, KEY, 2, True).of_state(state)
    begun = program.begun(state)
    donated = program.lower(begun).as_text().count("tf.aliasing_output")
    held = jax.tree.leaves(state.server.frozen)
    assert donated == len(jax.tree.leaves(begun)) - len(held) > 0


def test_a_state_may_be_used_up():
    algorithm, init, phi = federation(change=True)
    want = ran(algorithm, init(phi)).server.params["bias"]
    given = jax.tree.map(jnp.copy, init(phi))
    got = ran(algorithm, given, donate=True).server.params["bias"]
    np.testing.assert_array_equal(got, want)
    assert given.server.params["bias"].is_deleted()
    assert not given.server.frozen["beside"].is_deleted()


def test_an_array_that_is_held_twice_is_given_once():
    algorithm, init, phi = federation()
    state, parts = init(phi), (phases.federated(algorithm),)
    program = _program.Program(parts, P.stream, KEY, 2, True).of_state(state)
    bias = state.server.params["bias"]
    twice = state._replace(server=state.server._replace(shared={"also": bias}))
    own = program.own(twice, donate=True).server
    assert own.params["bias"] is bias and own.shared["also"] is not bias


def test_with_seeds_too():
    algorithm, init, phi = federation()
    keys = jax.random.split(KEY, 2)
    state = jax.vmap(lambda _: init(phi))(keys)
    ended = ran(algorithm, state, keys)
    assert ended.server.frozen["kernel"] is state.server.frozen["kernel"]
    one = ran(algorithm, init(phi), keys[1])
    gap = ended.server.params["bias"][1] - one.server.params["bias"]
    assert np.abs(gap).max() < 1e-6


def test_a_checkpoint_knows_theta_again_and_does_not_hold_it(tmp_path):
    algorithm, init, phi = federation(change=True)
    state = init(phi)
    whole = ran(algorithm, state)
    ran(algorithm, state, rounds=2, checkpoint=Checkpoints(tmp_path, every=2))
    again = ran(algorithm, state, checkpoint=Checkpoints(tmp_path), resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.server, again.server)
    assert again.server.frozen["kernel"] is state.server.frozen["kernel"]
    names = [p.name for p in (tmp_path / "steps" / "4").rglob("*")]
    saved = " ".join([*names, *map(str, _saved(tmp_path))])
    assert "beside" in saved and "kernel" not in saved
    server = state.server._replace(
        frozen=state.server.frozen | {"kernel": 2 * P.params["kernel"]}
    )
    with pytest.raises(CheckpointError, match="its frozen base θ differs"):
        other = state._replace(server=server)
        ran(algorithm, other, checkpoint=Checkpoints(tmp_path), resume=True)


def _saved(folder):
    from orbax.checkpoint import v1 as ocp

    found = ocp.checkpointables_metadata(folder / "steps" / "4")
    return [found.metadata["state"]]


def test_a_fingerprint_tells_order_sign_and_one_bit():
    x = jnp.linspace(-1.0, 1.0, 64)
    same = _frozen.fingerprint({"x": x})
    assert _frozen.fingerprint({"x": x + 0.0}) == same
    nudged = np.nextafter(np.float32(x[5]), np.float32(2))
    for other in (x[::-1], -x, x.at[5].set(nudged), x.astype(jnp.bfloat16)):
        assert _frozen.fingerprint({"x": other}) != same
    assert _frozen.fingerprint(None) == _frozen.fingerprint({"x": None})


def test_a_frozen_kernel_is_multiplied_once_for_all_clients():
    model = models.mlp((5, 7, 6))
    params = model.init(KEY)
    model, params = models.lora(model, params, rank=2, alpha=4.0, key=KEY)
    phi, theta = tree.partition(params, models.lora_only)
    algorithm = algorithms.fedavg(losses.softmax(model.apply), optax.sgd(0.1))
    state = algorithm.init(phi, P.stream.example(), 4, frozen=theta)
    parts = (phases.federated(algorithm),)
    step = lambda s: phases.step(parts, s, KEY, jnp.int32(0), P.stream)
    text = jax.jit(step).lower(phases.start(parts, state)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    with_base = [line for line in products if "tensor<5x7xf32>" in line]
    assert any("tensor<4x4x5xf32>, tensor<5x7xf32>" in line for line in with_base)
    assert "tensor<4x5x7xf32>" not in text  # Neither copied nor summed into.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Words(base.Stationary):
    """The same tokens for everybody."""

    num_clients: int = dataclasses.field(metadata={"static": True})

    def sample(self, key, client, round):
        tokens = jnp.ones((2, 1, 3), jnp.int32)
        return {"tokens": tokens, "segments": tokens, "mask": jnp.ones((2, 1))}


def needs(clients):
    """What a round of LoRA needs with all clients at once, and the bytes of θ."""
    config = models.DecoderConfig(
        vocab=16, width=256, depth=4, heads=4, hidden=256, kv_heads=2
    )
    model = models.decoder(config)
    params = jax.eval_shape(model.init, KEY)
    options = {"rank": 2, "alpha": 4.0, "key": KEY}
    adapt = lambda params: models.lora(model, params, **options)[1]
    adapted = models.lora(model, model.init(KEY), **options)[0]
    params = jax.eval_shape(adapt, params)
    phi, theta = tree.partition(params, models.lora_only)
    algorithm = algorithms.fedavg(losses.next_token(adapted.apply), optax.adam(1e-3))
    stream = Words(clients)
    init = lambda phi, theta: algorithm.init(phi, stream.example(), clients, theta)
    state = jax.eval_shape(init, phi, theta)
    told = memory.report(algorithm, state, stream, key=KEY, rounds=2)
    optimiser = jax.eval_shape(optax.adam(1e-3).init, phi)
    return told, tree.size(theta), tree.size((phi, optimiser))


def test_a_round_of_lora_needs_one_base():
    """≤ base + K × (φ + optimiser + message) + K × the activations of one."""
    alone, theta, own = needs(1)
    activations = alone.parts["temporaries"]
    assert activations < theta / 2  # So that a second base would be seen.
    for clients in (1, 4, 16, 64):
        told, theta, own = needs(clients)
        assert told.parts["base θ"] == theta
        assert told.parts["state passed in"] < theta / 3
        passed = sum(v for k, v in told.parts.items() if k != "temporaries")
        assert passed < theta + 3 * own + clients * own
        assert told.parts["temporaries"] <= clients * (own + activations)
        assert told.peak <= theta + 4 * own + clients * (2 * own + activations)
