"""The programs of an online server: each compiled once, whatever arrives when."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedcl import _engine, base, losses, tree
from fedcl._online_drift import Detector
from fedcl._online_staleness import Rule

PyTree = Any
LAST = 0x7FFFFFFF  # A fold that no split of a visit's key comes to.


class Sent(NamedTuple):
    """What clients download; a ring of past versions has it as [R + 1, ...]."""

    params: base.Params
    shared: PyTree
    client_opt: PyTree
    rest: PyTree  # What else clients read and aggregations change, None elsewhere.


class Core(NamedTuple):
    """What an online server holds on the device, without θ."""

    server: base.ServerState  # `frozen` is None: θ stays outside.
    clients: base.ClientState  # [N, ...]
    ring: Sent  # [R + 1, ...], version v at v mod (R + 1).
    buffer: base.Message  # [B, ...]
    detectors: PyTree  # [N, ...]


class Trained(NamedTuple):
    """What the host is told of an update."""

    finite: jax.Array  # () bool
    reported: jax.Array  # () bool: it is in the buffer.
    metrics: PyTree


def start(
    state: base.State,
    message: base.Message,
    rest: PyTree,
    buffer: int,
    versions: int,
    detector: Detector | None,
) -> Core:
    """The server before anything has arrived."""
    server, clients = jax.tree.map(
        jnp.copy, (state.server._replace(frozen=None), state.clients)
    )
    n = jax.tree.leaves(clients)[0].shape[0]
    seen = tree.strong(() if detector is None else detector.init())
    rows = lambda a, k: jax.tree.map(jnp.array, tree.stack(a, k))
    shape = lambda x: jnp.zeros((buffer, *x.shape), x.dtype)
    slots = jax.tree.map(shape, message)
    ring = rows(sent(server, rest), versions)
    return Core(server, clients, ring, slots, rows(seen, n))


def message_like(state: base.State) -> base.Message:
    """The structure of a message whose update is like φ, from what the server holds."""
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    row = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    weight: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return base.Message(
        jax.tree.map(like, state.server.params),
        weight,
        jax.tree.map(row, state.clients.told),
        jax.tree.map(like, state.server.client_opt),
    )


def visit_like(example: PyTree) -> base.Visit:
    """A visit of one step, from the example of a batch."""
    one = lambda x: jnp.zeros((1, *x.shape), x.dtype)
    zero, key = jnp.int32(0), jax.random.key(0)
    visit = lambda: base.Visit(jax.tree.map(one, example), zero, zero, zero, key)
    return jax.eval_shape(visit)


def sent(server: base.ServerState, rest: PyTree) -> Sent:
    """What clients download; `rest` is None where they need nothing more."""
    keep = lambda r, x: None if r is None else x
    more = jax.tree.map(keep, rest, server, is_leaf=lambda r: r is None)
    return Sent(server.params, server.shared, server.client_opt, more)


def _slot(ring: Sent, version: jax.Array) -> jax.Array:
    return version % jax.tree.leaves(ring)[0].shape[0]


def _then(core: Core, version: jax.Array, frozen: PyTree) -> base.ServerState:
    """The server as the clients that started from a version saw it."""
    old = tree.gather(core.ring, _slot(core.ring, version))
    server = tree.merge(old.rest, core.server)
    own = {"params": old.params, "shared": old.shared, "client_opt": old.client_opt}
    return server._replace(**own, version=version, frozen=frozen)


@jax.jit
def draw(
    stream: PyTree,
    key: jax.Array,
    client: jax.Array,
    round: jax.Array,
    again: jax.Array,
) -> tuple[base.Visit, jax.Array]:
    """A client's visit, with the keys of `fedcl.run`, and whether it has any rows.

    `again` counts the client's visits in the round: the first draws what `run` draws.
    """
    key = _round_key(key, round)
    first = jax.random.split(key)[1]
    later = jax.random.fold_in(jax.random.fold_in(key, 3), again)
    own = jax.lax.select(again == 0, first, later)
    visit = _engine.visit_of(stream, own, client, round)
    return visit, jnp.asarray(stream.present(client, round))


def _round_key(key: jax.Array, round: jax.Array) -> jax.Array:
    """That of phase 0 of a round, see `fedcl.phases.step`."""
    return jax.random.fold_in(jax.random.fold_in(key, round), 0)


@partial(jax.jit, static_argnames=("loss_fn", "detector"), donate_argnums=1)
def watch(
    server: base.ServerState,
    detectors: PyTree,
    frozen: PyTree,
    visit: base.Visit,
    *,
    loss_fn: base.LossFn,
    detector: Detector | None,
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Test, then train: the served model's loss on a visit, and the detector's word.

    Returns:
      The detectors, the mean loss (), NaN without rows, and whether drift was seen.
    """
    key, no = jax.random.fold_in(visit.key, LAST), jnp.array(False)
    bound = lambda p, b, k: loss_fn(tree.merge(p, frozen), b, k)

    def context(step: jax.Array) -> base.Context:
        here = (visit.client, visit.task, no, visit.round, step)
        own = jax.random.fold_in(key, step)
        return base.Context(own, *here, server.params, server.shared, bound)

    def one(state, xs):
        step, batch = xs
        ctx = context(step)
        loss, aux = bound(server.params, batch, ctx.key)
        rows = jnp.sum(batch["mask"])
        if detector is not None:
            new = detector.observe(state, losses.logits_of(aux), batch, ctx)
            state = tree.where(rows > 0, new, state)
        return state, (jnp.where(rows > 0, loss, 0).astype(jnp.float32), rows)

    steps = visit.batches["mask"].shape[0]
    state = tree.gather(detectors, visit.client)
    state, (loss, rows) = jax.lax.scan(one, state, (jnp.arange(steps), visit.batches))
    fired = no
    if detector is not None:
        fired, state = detector.fired(state, context(jnp.int32(steps)))
    mean = jnp.sum(loss * rows) / jnp.sum(rows)
    return tree.scatter(detectors, visit.client, state), mean, fired


@partial(jax.jit, static_argnames=("algorithm", "rule"), donate_argnums=(0, 1))
def train(
    clients: base.ClientState,
    buffer: base.Message,
    core: Core,
    frozen: PyTree,
    visit: base.Visit,
    version: jax.Array,
    place: jax.Array,
    heard: jax.Array,
    *,
    algorithm: base.Algorithm,
    rule: Rule,
) -> tuple[base.ClientState, base.Message, Trained]:
    """Runs a client from the version it started from; its message goes to a place.

    Args:
      clients: [N, ...].
      buffer: [B, ...].
      core: the rest of the core: its server and its ring.
      frozen: θ.
      visit: what the client trains on.
      version: of the server when it started.
      place: in the buffer, for a message that is reported.
      heard: whether the message reaches the server.
      algorithm: as everywhere.
      rule: what a late message counts.
    """
    then, now = _then(core, version, frozen), core.server

    def one(shared, client, member):
        message, new, metrics = algorithm.client_update(then, client, member)
        new = _engine.same_types(client, new, "The client state in `client_update`")
        message = rule(message, now.version - version, now.params, then.params)
        finite = tree.finite(message)
        reported = finite & heard & (message.weight > 0)
        new = tree.where(finite, new, client)
        new = new._replace(told=tree.where(reported, new.told, client.told))
        return new, (message, Trained(finite, reported, metrics))

    run = _engine.map_cohort(one, "scan", None)
    clients, (messages, told) = run(
        (), clients, visit.client[None], jax.tree.map(lambda x: x[None], visit)
    )
    only = lambda a: jax.tree.map(lambda x: x[0], a)
    return clients, tree.scatter(buffer, place, only(messages)), only(told)


@partial(jax.jit, static_argnames=("rule",), donate_argnums=(0, 1))
def deliver(
    clients: base.ClientState,
    buffer: base.Message,
    core: Core,
    message: base.Message,
    client: jax.Array,
    version: jax.Array,
    place: jax.Array,
    *,
    rule: Rule,
) -> tuple[base.ClientState, base.Message, Trained]:
    """Takes a message from a real device, as `train` takes one that it computes."""
    then, now = _then(core, version, None), core.server
    message = rule(message, now.version - version, now.params, then.params)
    finite = tree.finite(message)
    reported = finite & (message.weight > 0)
    told = jax.tree.map(
        lambda table, change: table.at[client].add(jnp.where(reported, change, 0)),
        clients.told,
        message.told,
    )
    seen = clients.version.at[client].set(
        jnp.where(reported, version, clients.version[client])
    )
    clients = clients._replace(told=told, version=seen)
    return clients, tree.scatter(buffer, place, message), Trained(finite, reported, ())


@partial(jax.jit, static_argnames=("algorithm",), donate_argnums=2)
def aggregate(
    server: base.ServerState,
    buffer: base.Message,
    ring: Sent,
    frozen: PyTree,
    fill: jax.Array,
    *,
    algorithm: base.Algorithm,
) -> tuple[base.ServerState, Sent, jax.Array]:
    """One server step over the first `fill` messages; nothing if it is not finite."""
    there = jnp.arange(buffer.weight.shape[0]) < fill
    real = lambda x: there.reshape(-1, *[1] * (x.ndim - 1))
    messages = jax.tree.map(lambda x: jnp.where(real(x), x, jnp.zeros_like(x)), buffer)
    new = algorithm.aggregate(server._replace(frozen=frozen), messages)
    _check_frozen(frozen, new.frozen)
    new = new._replace(frozen=None)
    new = _engine.same_types(server, new, "The server state in `aggregate`")
    new = new._replace(version=server.version + 1)
    whole = tree.finite(new)
    new = tree.where(whole, new, server)
    ring = tree.scatter(ring, _slot(ring, new.version), sent(new, ring.rest))
    return new, ring, whole


def _check_frozen(old: PyTree, new: PyTree) -> None:
    """Refuses an `aggregate` that writes into θ, of which past versions are not kept."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    if any(a is not b for a, b in pairs):
        raise TypeError(
            "`aggregate` changes the frozen parameters θ. An online server keeps past "
            "versions of φ alone, so late clients would train on a base that is gone: "
            "keep what changes, such as a residual, in φ."
        )


@partial(jax.jit, static_argnames=("algorithm",), donate_argnums=0)
def review(
    clients: base.ClientState,
    server: base.ServerState,
    frozen: PyTree,
    stream: PyTree,
    key: jax.Array,
    client: jax.Array,
    round: jax.Array,
    task: jax.Array,
    *,
    algorithm: base.Algorithm,
) -> base.ClientState:
    """A client looks once more at all rows that it had in a round, now past."""

    def one(shared, client, member):
        sweep = stream.sweep(member, round)
        own = jax.random.fold_in(jax.random.fold_in(_round_key(key, round), 2), member)
        visit = base.Visit(sweep, task, member, round, own)
        assert algorithm.review is not None
        whole = server._replace(frozen=frozen)
        new = algorithm.review(whole, client, visit)
        return _engine.same_types(client, new, "The client state in `review`"), ()

    return _engine.map_cohort(one, "scan", None)(
        (), clients, client[None], client[None]
    )[0]
