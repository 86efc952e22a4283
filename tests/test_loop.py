"""The host loop is the fused run, row for row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import algorithms, cohorts, losses, streams

KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def pair():
    data = streams.digits()
    flat = {"x": data["x"].reshape(len(data["y"]), -1), "y": data["y"]}
    kw = {"num_contexts": 5, "num_clients": 4, "rounds_per_context": 1}
    kw |= {"steps": 3, "batch_size": 5, "draw": "replacement"}
    on_device = streams.class_incremental(flat, **kw)
    return on_device, streams.Hosted(on_device, flat)


def start(stream):
    apply = lambda p, x, key: x @ p
    algorithm = algorithms.fedavg(losses.softmax(apply), optax.sgd(0.1))
    params = jnp.zeros((64, 10))
    return algorithm, algorithm.init(params, stream.example(), stream.num_clients)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_loop_equals_run(pair, prefetch):
    on_device, hosted = pair
    algorithm, state = start(on_device)
    evaluate = lambda s: {"norm": jnp.sum(s.server.params**2)}
    kw = {"key": KEY, "rounds": 5, "every": 2, "cohort": cohorts.uniform(3)}
    want, h = fedcl.run(algorithm, state, on_device, evaluate=evaluate, **kw)
    got, g = fedcl.loop(
        algorithm, state, hosted, evaluate=evaluate, prefetch=prefetch, **kw
    )
    np.testing.assert_allclose(got.server.params, want.server.params, atol=1e-6)
    np.testing.assert_array_equal(g.rounds["client"], h.rounds["client"])
    np.testing.assert_allclose(g.rounds["loss"], h.rounds["loss"], rtol=1e-5)
    np.testing.assert_allclose(
        g.evaluations["norm"], h.evaluations["norm"], rtol=1e-5, atol=1e-7
    )


def test_a_loader_that_fails_names_its_error(pair):
    on_device, hosted = pair
    algorithm, state = start(on_device)

    class Broken:
        stream, num_clients, ragged = hosted.stream, hosted.num_clients, False

        def fetch(self, index, mask, context):
            raise OSError("row 7 of train.idx is gone")

    with pytest.raises(OSError, match="row 7 of train.idx is gone"):
        fedcl.loop(algorithm, state, Broken(), key=KEY, rounds=2)
