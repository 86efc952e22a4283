"""Which algorithms an online server takes, with what messages and what discounts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedcl
from fedcl import (
    _online_core,
    aggregation,
    base,
    losses,
    metrics,
    models,
    online,
    testing,
    tree,
)
from fedcl import algorithms as alg
from fedcl.online import Download, Join, Tick, Update
from fedcl.oracle import black_box
from tests.problems import adapted_problem

KEY = jax.random.key(3)
P = testing.toy_problem()
EXAMPLE = P.stream.example()
PLAIN = alg.fedavg(P.loss_fn, optax.sgd(0.1))
AS_SENT = online.discount(online.constant())


class Case(NamedTuple):
    """An algorithm, what it starts from, and whether its messages are updates."""

    algorithm: base.Algorithm
    updates: bool
    params: Any = P.params
    frozen: Any = None
    guessed: bool = False  # Whether an update like φ is what it sends.

    def state(self):
        return self.algorithm.init(self.params, EXAMPLE, 4, self.frozen)

    def server(self, **kw):
        kw = {"buffer": 1, "max_staleness": 3, "key": KEY, "stream": P.stream, **kw}
        return online.Server(self.algorithm, self.state(), **kw)

    def message(self, server, client):
        """What a client sends that starts from a server's state."""
        which = map(jnp.int32, (client, 0, 0))
        visit, _ = _online_core.draw(P.stream, KEY, *which)
        row = tree.gather(self.state().clients, client)
        return jax.jit(self.algorithm.client_update)(server, row, visit)[0]


@functools.cache
def adapters():
    """A toy classifier with an adapter: its loss, the tapped one, φ and θ."""
    problem, model, params = adapted_problem()
    phi, theta = tree.partition(params, models.lora_only)
    tapped = losses.softmax(models.tapped(model, params).apply)
    return problem.loss_fn, tapped, phi, theta


@functools.cache
def cases():
    loss, tapped, phi, theta = adapters()
    low = alg.fedavg(loss, optax.sgd(0.1))
    search = alg.fedbpt(black_box(P.loss_fn), dimension=3, population=4)
    pro = alg.fedkseed(P.loss_fn, 0.1, num_seeds=7, adaptive=True)
    rebuilt = alg.fedkseed(P.loss_fn, 0.1, num_seeds=7, rebuild=True)
    return {
        "fedavg": Case(PLAIN, True, guessed=True),
        "personal": Case(alg.personal(PLAIN, lambda path: path == "bias"), True),
        "fedsa": Case(alg.fedsa_lora(low), True, phi, theta),
        "fedkseed": Case(alg.fedkseed(P.loss_fn, 0.1, num_seeds=7), False),
        "fedkseed-pro": Case(pro, False),
        "rebuilt": Case(rebuilt, False),
        "fedbpt": Case(search, False),
        "lorm": Case(alg.lorm(low, tapped), False, phi, theta),
    }


NAMES = ["fedavg", "personal", "fedsa", "fedkseed", "fedkseed-pro", "rebuilt"]
NAMES += ["fedbpt", "lorm"]
OTHERS = [name for name in NAMES if name != "fedavg"]
RULES = {
    "default": None,
    "discount": online.discount(online.hinge()),
    "mixing": online.mixing(),
    "distance": online.distance(),
}


def served(server, *events):
    return list(online.serve(server, [Join(0), Join(1), *events]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_only_updates_are_scaled_by_their_age(name, rule):
    case, staleness = cases()[name], RULES[rule]
    if not case.updates:
        with pytest.raises(ValueError, match=r"no such updates:\n(.|\n)*constant"):
            case.server(staleness=staleness)
        return
    case.server(staleness=staleness)


def test_what_is_no_update_is_named():
    with pytest.raises(ValueError, match=r"delta/mean: float32\[3\]"):
        cases()["fedbpt"].server()
    with pytest.raises(ValueError, match=r"  sums/0/lora/b/g: float32\[2, 2\]"):
        cases()["lorm"].server()


@pytest.mark.parametrize("name", NAMES)
def test_late_messages_count_as_they_were_sent(name):
    """From what the client downloaded, though the server has gone on since."""
    case = cases()[name]
    server = case.server(staleness=AS_SENT, buffer=2)
    fresh, whole = case.state().server, server.state().server
    served(server, Update(0), Tick(flush=True), Update(1))
    late = jax.tree.map(lambda x: x[0], server._engine.core.buffer)
    want = case.message(whole, 1)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(near, late, want)
    now = case.message(server.state().server._replace(version=fresh.version), 1)
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), now, want)
    assert max(jax.tree.leaves(gaps)) > 1e-4


@pytest.mark.parametrize("name", OTHERS)
def test_real_devices_of_any_algorithm(name):
    case = cases()[name]
    at_home = case.server(staleness=AS_SENT)
    afar = case.server(staleness=AS_SENT, stream=None, example=EXAMPLE)
    assert afar.message == at_home.message
    total = served(at_home, Update(0))[-1].totals
    bytes_ = metrics.communication(case.algorithm, case.state(), P.stream)
    assert total.up_bytes == bytes_.up
    assert total.down_bytes == 2 * (bytes_.down + bytes_.once)  # Two have joined.
    sent = case.message(case.state().server, 0)
    served(afar, Update(0, base=0, message=sent))
    assert afar.version == 1
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(near, afar.params, at_home.params)


@pytest.mark.parametrize("name", NAMES)
def test_without_an_example_messages_are_like_the_parameters(name):
    case = cases()[name]
    if case.guessed:
        server = case.server(staleness=AS_SENT, stream=None)
        assert server.message == case.server().message
        return
    with pytest.raises(ValueError, match=r"give example=, that of algorithm\.init"):
        case.server(staleness=AS_SENT, stream=None)


def scaled_by(rule, moved):
    """What a rule makes of the update 1 when the server has moved so far since."""
    ones = jax.tree.map(jnp.ones_like, P.params)
    now = jax.tree.map(lambda x: x + moved, ones)
    delta = ones | {"bias": None}
    sent = base.Message(delta, jnp.float32(1))
    out = rule(sent, jnp.int32(1), now, ones).delta
    assert out["bias"] is None
    return np.asarray(out["kernel"], np.float64)


def test_personal_leaves_are_left_out_of_how_far_the_server_moved():
    size = P.params["kernel"].size
    mixed = scaled_by(online.mixing(0.5, online.constant()), 3.0)
    np.testing.assert_allclose(mixed, 0.5 * (3 + 1), rtol=1e-6)
    far = 3 * np.sqrt(size) / np.sqrt(size)
    scaled = scaled_by(online.distance(2.0, 1.0), 3.0)
    np.testing.assert_allclose(scaled, 2 / (far + 1), rtol=1e-6)


@pytest.mark.parametrize("stream", [None, P.stream])
@pytest.mark.parametrize("stage", [alg.fedex_lora, lambda: alg.flora(KEY)])
def test_who_writes_into_the_base_is_refused_before_anything_arrives(stage, stream):
    loss, _, phi, theta = adapters()
    chain = aggregation.server(stage(), optax.sgd(1.0))
    writing = alg.fedavg(loss, optax.sgd(0.1), server=chain)
    with pytest.raises(TypeError, match="changes the frozen parameters θ"):
        Case(writing, True, phi, theta).server(stream=stream)


def test_a_visit_that_cannot_be_traced_changes_nothing():
    which = map(jnp.int32, (0, 0, 0))
    visit, _ = _online_core.draw(P.stream, KEY, *which)
    rest = {name: x for name, x in visit.batches.items() if name != "y"}
    case = Case(PLAIN, True)
    server, other = (case.server(stream=None) for _ in range(2))
    with pytest.raises(KeyError, match="y"):
        served(server, Update(0, visit=visit._replace(batches=rest)))
    server.handle(Download(0))
    server.handle(Update(0, visit=visit))
    served(other, Download(0), Update(0, visit=visit))
    jax.tree.map(np.testing.assert_array_equal, server.state(), other.state())


def test_an_event_that_failed_half_way_ends_the_server():
    def broken(*args, **kw):
        raise ValueError("broken")

    server = Case(PLAIN, True).server(loss_fn=P.loss_fn)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(_online_core, "train", broken)
        with pytest.raises(ValueError, match="broken"):
            served(server, Update(0))
    with pytest.raises(RuntimeError, match="resume=True"):
        server.handle(Tick())


def test_messages_with_personal_leaves_are_refused():
    shared = alg.personal(PLAIN, lambda path: path == "bias")
    state = shared.init(P.params, EXAMPLE, 2)
    whole = fedcl.Message(tree.stack(P.params, 2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"\['bias', 'kernel'\], and the shared ones"):
        shared.aggregate(state.server, whole)
