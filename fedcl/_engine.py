"""How one function of one client becomes a round: schedules, meshes, masks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedcl import _placement, aggregation, base, cohorts, tree

PyTree = Any
Schedule = str | int
AXIS = "clients"


def check_schedule(schedule: Schedule) -> None:
    """Refuses anything but "vmap", "scan" or a positive chunk size."""
    is_chunk = isinstance(schedule, int) and not isinstance(schedule, bool)
    if schedule in ("vmap", "scan") or (is_chunk and int(schedule) > 0):
        return
    raise ValueError(
        f'The client schedule is {schedule!r}; it must be "vmap", "scan", a chunk size '
        'of at least 1, or, in `fedcl.run`, "auto".'
    )


def mapped(fn: Callable, schedule: Schedule) -> Callable:
    """`fn` over the leading axis, by the schedule."""
    check_schedule(schedule)
    if schedule == "vmap":
        return jax.vmap(fn)
    if schedule == "scan":
        return lambda xs: jax.lax.map(fn, xs)
    return lambda xs: jax.lax.map(fn, xs, batch_size=int(schedule))


def map_cohort(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    schedule: Schedule,
    mesh: Mesh | None,
) -> Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[PyTree, PyTree]]:
    """Maps `fn(shared, row, member) -> (row, out)` over a cohort's rows of a table.

    Args:
      fn: a function of one client.
      schedule: "vmap", "scan" or a chunk size.
      mesh: with an axis "clients" over which the table and the cohort are sharded,
        or None. Each device gathers and scatters its own rows only.

    Returns:
      `(shared, table [N, ...], ids [C], members [C, ...]) -> (table, outs [C, ...])`.
    """

    def local(shared, table, ids, members, offset=0):
        index = ids - offset
        one = lambda x: fn(shared, *x)
        if schedule == "scan" and _placement.any_offloaded(table):
            return _placement.one_by_one(one, table, index, members)
        rows = _placement.gather(table, index)
        rows, outs = mapped(one, schedule)((rows, members))
        return _placement.scatter(table, index, rows), outs

    return _over_devices(local, mesh)


def in_parts(schedule: Schedule, size: int, mesh: Mesh | None) -> bool:
    """Whether a cohort of `size` clients is taken in more than one part by a device."""
    own = size // (1 if mesh is None else mesh.shape[AXIS])
    return schedule != "vmap" and own > (1 if schedule == "scan" else int(schedule))


def add_cohort(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, tuple[PyTree, PyTree]]],
    part: Callable[[PyTree, PyTree], PyTree],
    schedule: Schedule,
    mesh: Mesh | None,
) -> Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[PyTree, PyTree, PyTree]]:
    """As `map_cohort`, but what `part` makes of the messages is added up.

    A chunk's rows are gathered, trained and scattered before the next one's, so that
    memory does not grow with the cohort.

    Args:
      fn: `(shared, row, member) -> (row, (message, out))`, of one client.
      part: `(shared, messages [c, ...]) -> sums`.
      schedule: "scan" or a chunk size.
      mesh: as in `map_cohort`; the sums are all that crosses it.

    Returns:
      `(shared, table [N, ...], ids [C], members [C, ...]) -> (table, outs [C, ...],
      sums)`.
    """
    size = 1 if schedule == "scan" else int(schedule)

    def local(shared, table, ids, members, offset=0):
        each = mapped(
            lambda x: fn(shared, *x), "scan" if schedule == "scan" else "vmap"
        )

        def visit(table, x):
            index, member = x
            rows = _placement.gather(table, index)
            rows, (messages, outs) = each((rows, member))
            return _placement.scatter(table, index, rows), outs, part(shared, messages)

        def add(carry, x):
            table, sums = carry
            table, outs, more = visit(table, x)
            return (table, tree.add(sums, more)), outs

        xs = (ids - offset, members)
        count, rest = divmod(ids.shape[0], size)
        whole = count * size
        chunked = lambda x: x[:whole].reshape(count, size, *x.shape[1:])
        chunks = jax.tree.map(chunked, xs)
        first = jax.tree.map(lambda x: x[0], chunks)
        sums = tree.zeros_like(jax.eval_shape(visit, table, first)[2])
        (table, sums), outs = jax.lax.scan(add, (table, sums), chunks)
        outs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outs)
        if rest:
            last = jax.tree.map(lambda x: x[whole:], xs)
            (table, sums), more = add((table, sums), last)
            outs = jax.tree.map(lambda *x: jnp.concatenate(x), outs, more)
        return table, outs, sums

    def summed(*args):
        table, outs, sums = local(*args)
        return table, outs, jax.lax.psum(sums, AXIS)

    if mesh is None:
        return local
    return _over_devices(summed, mesh, (P(AXIS), P(AXIS), P()))


def _over_devices(
    local: Callable[..., PyTree], mesh: Mesh | None, out: PyTree = P(AXIS)
) -> Callable[..., PyTree]:
    """`local(shared, table, *each, offset)` on every device's own rows of a table.

    Args:
      local: what a device does; its first row is row `offset` of the whole table.
      mesh: with an axis "clients", over which table and `each` are sharded, or None.
      out: how the results are.

    Returns:
      `(shared, table, *each) -> results`.
    """
    if mesh is None:
        return local

    def own(shared, table, *each):
        n_local = jax.tree.leaves(table)[0].shape[0]
        return local(shared, table, *each, jax.lax.axis_index(AXIS) * n_local)

    def spread(shared, table, *each):
        # check_vma=True would sum the gradient of replicated parameters over the mesh.
        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(P(), P(AXIS), *[P(AXIS)] * len(each)),
            out_specs=out,
            axis_names={AXIS},  # Other axes, over which θ may lie, are the compiler's.
            check_vma=False,
        )(shared, table, *each)

    return spread


def check_mesh(mesh: Mesh | None, num_clients: int, shards: int | None = None) -> None:
    """Refuses a mesh that the population or the cohort sampler does not fit."""
    if mesh is None:
        return
    if AXIS not in mesh.axis_names:
        raise ValueError(
            f"The mesh has axes {mesh.axis_names}; fedcl shards clients over an axis "
            f'"{AXIS}". Build it with fedcl.tpu.mesh().'
        )
    devices = mesh.shape[AXIS]
    if num_clients % devices:
        raise ValueError(
            f"{num_clients} clients do not split over {devices} devices: choose a "
            f"population that is a multiple of {devices}."
        )
    if shards is not None and shards % devices:
        raise ValueError(
            f"The cohort is drawn in {shards} part(s), the mesh has {devices} devices: "
            "draw it with cohorts.stratified(size, shards) and a multiple of "
            f"{devices} shards, so that each device meets its own clients."
        )


def place(state: base.State, mesh: Mesh | None, seeded: bool = False) -> base.State:
    """Puts the server on every device and each client on its own.

    Frozen leaves that already lie on the mesh stay as they are, see `fedcl.tpu.shard`.
    """
    if mesh is None:
        return state
    clients = P(None, AXIS) if seeded else P(AXIS)
    put = lambda t, spec: _placement.put(t, mesh, spec)
    laid = lambda x: x if _placement.lies_on(x, mesh) else put(x, P())
    frozen = jax.tree.map(laid, state.server.frozen)
    server = put(state.server._replace(frozen=None), P())._replace(frozen=frozen)
    return base.State(server, put(state.clients, clients), put(state.phases, P()))


def same_types(old: PyTree, new: PyTree, what: str) -> PyTree:
    """`new` if it has the structure, shapes and types of `old`; names what differs."""
    before, after = tree.describe(old), tree.describe(new)
    shape_of: Any = jax.tree.structure  # Its type does not know equality.
    if before != after or shape_of(old) != shape_of(new):
        paths = [p for p in {**before, **after} if before.get(p) != after.get(p)]
        lines = [
            f"  {p}: expected {before.get(p, 'nothing')}, got {after.get(p, 'nothing')}"
            for p in paths[:5]
        ]
        raise TypeError(
            f"{what} changed its structure, so a scan could not carry it:\n"
            + "\n".join(lines or [f"  {jax.tree.structure(new)}"])
            + "\nReturn the same tree with the same shapes and types."
        )

    def strong(o, n):
        as_is = n is o or jnp.issubdtype(o.dtype, jax.dtypes.prng_key)
        return n if as_is else jnp.asarray(n, dtype=o.dtype)

    return jax.tree.map(strong, old, new)


def cohort_fn(
    algorithm: base.Algorithm,
    draw: Callable[[PyTree, PyTree], base.Visit],
    schedule: Schedule,
    mesh: Mesh | None,
) -> Callable[..., tuple[base.State, dict[str, jax.Array]]]:
    """Builds `(state, cohort, data, members, fold=True) -> (state, metrics)`: a round.

    With `fold`, a cohort taken in parts is added up if the algorithm can.

    Args:
      algorithm: the federated algorithm.
      draw: `(data, member) -> visit`, of one client.
      schedule: how clients are mapped.
      mesh: where they live.
    """

    def one(shared, client, member):
        server, data = shared
        (train, report), member = member
        visit = draw(data, member)
        message, new, metrics = algorithm.client_update(server, client, visit)
        new = same_types(client, new, "The client state in `client_update`")
        finite = tree.finite(message)
        trained = train & finite
        reported = trained & report & (message.weight > 0)
        new = tree.where(trained, new, client)
        new = new._replace(told=tree.where(reported, new.told, client.told))
        message = tree.where(reported, message, tree.zeros_like(message))
        facts = {"trained": trained, "reported": reported}
        return new, (message, {**metrics, **facts, "nonfinite": train & ~finite})

    check_schedule(schedule)
    how = algorithm.aggregate

    def stacked(server, *args):
        clients, (messages, metrics) = map_cohort(one, schedule, mesh)(*args)
        sent = base.Sent(server.params, messages)
        return clients, metrics, how(server, messages), sent

    def added(server, *args):
        assert isinstance(how, base.Folding)
        part = lambda shared, messages: how.part(shared[0], messages)
        clients, metrics, sums = add_cohort(one, part, schedule, mesh)(*args)
        return clients, metrics, how.finish(server, sums), base.Added()

    def apply(
        state: base.State,
        cohort: cohorts.Cohort,
        data: PyTree,
        members: PyTree,
        fold: bool = True,
    ):
        check_mesh(mesh, jax.tree.leaves(state.clients)[0].shape[0])
        masks = (cohort.train, cohort.report)
        fold = fold and isinstance(how, base.Folding)
        fold = fold and in_parts(schedule, cohort.client.shape[0], mesh)
        clients, metrics, server, sent = (added if fold else stacked)(
            state.server,
            (state.server, data),
            state.clients,
            cohort.client,
            (masks, members),
        )
        server = same_types(state.server, server, "The server state in `aggregate`")
        server = tree.where(jnp.any(metrics["reported"]), server, state.server)
        return state._replace(server=server, clients=clients, sent=sent), {
            **metrics,
            **aggregation.reported(server.opt_state),
            "client": cohort.client,
            "fault": _fault(cohort.client, jax.tree.leaves(clients)[0].shape[0]),
        }

    return apply


def review_fn(
    algorithm: base.Algorithm, mesh: Mesh | None
) -> Callable[..., base.State]:
    """Builds `(state, stream, key, round, on=None) -> state`: clients review a context.

    `on` is () bool, whether all clients present do; None: those whose context ends.
    Clients are taken one after another, so that a client whose context goes on costs
    nothing and the rows of one context are in memory at a time.

    Args:
      algorithm: the federated algorithm.
      mesh: where the clients live.
    """

    def due(stream, client, round, on):
        ends = stream.ends(client, round) if on is None else on
        return ends & stream.present(client, round)

    def look(shared, member, client):
        server, stream, key, round, _ = shared
        sweep = stream.sweep(member, round)
        task, own = stream.task(member, round), jax.random.fold_in(key, member)
        visit = base.Visit(sweep, task, member, round, own)
        assert algorithm.review is not None
        new = algorithm.review(server, client, visit)
        return same_types(client, new, "The client state in `review`")

    def local(shared, table, ids, offset=0):
        _, stream, _, round, on = shared
        whose = jax.vmap(lambda i: due(stream, i, round, on))(ids)

        def visit(i, table):
            at = (ids[i] - offset)[None]
            row = jax.tree.map(lambda x: x[0], _placement.gather(table, at))
            do = lambda row: look(shared, ids[i], row)
            row = jax.lax.cond(whose[i], do, lambda row: row, row)
            return _placement.scatter(table, at, jax.tree.map(lambda x: x[None], row))

        # A loop changes the table in place; a cond around it, or a map, copies it.
        turns = jnp.where(jnp.any(whose), len(ids), 0)
        return jax.lax.fori_loop(0, turns, visit, table)

    run_all = _over_devices(local, mesh)

    def review(state, stream, key, round, on=None):
        if algorithm.review is None:
            return state
        ids = jnp.arange(jax.tree.leaves(state.clients)[0].shape[0])
        shared = (state.server, stream, key, round, on)
        return state._replace(clients=run_all(shared, state.clients, ids))

    return review


def _fault(ids: jax.Array, n: int) -> jax.Array:
    """[C] bool: the id is a duplicate or outside the population."""
    order = jnp.sort(ids)
    before, upto = (jnp.searchsorted(order, ids, side=s) for s in ("left", "right"))
    twice = upto - before > 1
    return twice | (ids < 0) | (ids >= n)


def round_fn(
    algorithm: base.Algorithm, *, schedule: Schedule = "vmap", mesh: Mesh | None = None
) -> Callable[..., tuple[base.State, dict[str, jax.Array]]]:
    """Builds one round of federated learning over visits given as arrays.

    Args:
      algorithm: the federated algorithm.
      schedule: "vmap" (all clients at once), "scan" (one after another) or a chunk
        size. The result is the same up to the order of sums.
      mesh: a mesh with an axis "clients", or None. Cohort position i must then hold
        a client of the device that holds position i, see `cohorts.stratified`.

    Returns:
      `round(state, visits, train=None, report=None) -> (state, metrics)` with visits
      stacked to [C, ...], masks [C] bool, and metrics with "client" [C], "trained",
      "reported", "nonfinite" and "fault" (duplicate or unknown id) beside the
      algorithm's own. A client whose message is not finite is left out of the
      aggregation and keeps its former state. If nobody reports the server is
      unchanged.

    Raises:
      ValueError: for an unknown schedule or a mesh that does not fit.
    """
    check_schedule(schedule)
    apply = cohort_fn(algorithm, lambda _, visit: visit, schedule, mesh)

    def round_(
        state: base.State,
        visits: base.Visit,
        train: jax.Array | None = None,
        report: jax.Array | None = None,
    ) -> tuple[base.State, dict[str, jax.Array]]:
        everybody = jnp.ones(visits.client.shape, bool)
        masks = [everybody if m is None else m for m in (train, report)]
        state, metrics = apply(state, cohorts.Cohort(visits.client, *masks), (), visits)
        return state._replace(sent=()), metrics

    return round_


def visit_of(
    stream: base.StreamLike, key: jax.Array, client: jax.Array, round: jax.Array
) -> base.Visit:
    """One client's visit, all of its randomness keyed by the client's id."""
    key = jax.random.fold_in(key, client)
    k_data, k_visit = jax.random.split(key)
    batches = stream.sample(k_data, client, round)
    live = jnp.any(batches["mask"] > 0, axis=-1) if stream.ragged else None
    return base.Visit(batches, stream.task(client, round), client, round, k_visit, live)
