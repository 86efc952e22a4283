"""What an experiment asks of the engine: how local steps are computed, where clients'
states are, and what a run needs before it runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedcl import _stored, base, compute, rounds, store
from fedcl import memory as _memory
from fedcl._host import History
from fedcl.checkpoint import Checkpoints

if TYPE_CHECKING:
    from fedcl._experiment_config import Client, Experiment
    from fedcl._experiment_run import Ready, Tell

MEMORY = ("refuse", "report", "ignore")
Told = Callable[[str, tuple, dict[str, Any]], None]


def problems(e: "Experiment") -> Iterator[str]:
    """What cannot work, one text each."""
    clients = {"federation.client": (e.federation.client, e.federation.batch_size)}
    for name, arm in e.arms.items():
        size = arm.batch_size or e.federation.batch_size
        key = f"arms.{name}.client" if arm.client else "federation.client"
        clients[key] = (arm.client or e.federation.client, size)
    for key, (client, size) in clients.items():
        yield from _steps(key, client, size)
    if e.federation.store is not None:
        yield from _store(e)


def _steps(key: str, c: "Client", batch_size: int) -> Iterator[str]:
    if c.accumulate > batch_size:
        yield (
            f"{key}.accumulate: given {c.accumulate}; a batch of {batch_size} rows has "
            f"no more parts. Allowed: 1 to {batch_size}"
        )
    if c.remat and c.accumulate > 1:
        yield (
            f"{key}.remat: given with accumulate = {c.accumulate}, which computes the "
            "activations of each part again. Leave one out"
        )


def _store(e: "Experiment") -> Iterator[str]:
    key, f = "federation.store", e.federation
    if f.schedule == "auto":
        yield f'{key}: given with schedule = "auto". Allowed: "vmap", "scan" or a number'
    if e.grid and key not in e.grid:
        yield f"{key}: given with a grid, whose points need one each: list it in the grid"
    only = "; states in files are for a round of the federated phase alone"
    if e.public.every:
        yield f"{key}: given with public.every = {e.public.every}{only}"
    if e.data.validation:
        yield f"{key}: given with data.validation = {e.data.validation}{only}"
    for name, arm in e.arms.items():
        for part in ("before", "phases", "switch", "review_every"):
            if getattr(arm, part):
                yield f"{key}: given with arms.{name}.{part}{only}"


def check(e: "Experiment", mesh: Mesh | None, memory: str) -> None:
    """Refuses what the file alone does not show."""
    if memory not in MEMORY:
        raise ValueError(f"memory: given {memory!r}; allowed: {', '.join(MEMORY)}.")
    if mesh is not None and e.federation.store is not None:
        raise ValueError(
            f"federation.store: given {e.federation.store!r} with several devices; "
            "states in files are for one. Leave out one of them."
        )


def clients_made(e: "Experiment", algorithm: base.Algorithm, stream: Any) -> int:
    """How many clients' states to make at first: in a store, one to know its shapes."""
    if e.federation.store is None:
        return stream.num_clients
    _stored.check(algorithm, jax.random.key(0), None, e.federation.schedule)
    return 1


def local_loss(
    c: "Client",
    loss_fn: base.LossFn,
    of: Callable[[Any], base.LossFn],
    model: Any,
) -> base.LossFn:
    """The loss as the clients' steps compute it.

    Args:
      c: how.
      loss_fn: the loss.
      of: `(model) -> loss`, which made it.
      model: of which model.
    """
    if c.precision != "float32":
        short = lambda f: f and compute.mixed(f, jnp.dtype(c.precision))
        outputs = short(model.outputs)
        loss_fn = of(model._replace(apply=short(model.apply), outputs=outputs))
    if c.remat:
        loss_fn = compute.rematerialised(loss_fn)
    return compute.accumulated(loss_fn, c.accumulate)


def schedule(
    asked: Any,
    tell: "Tell",
    algorithm: base.Algorithm,
    begin: Callable[[], base.State],
    key: jax.Array,
    stream: base.StreamLike,
    **where: Any,
) -> Any:
    """The schedule that the file asks for; "auto" is timed on the first seed."""
    from fedcl._experiment_run import Event

    if asked != "auto":
        return asked
    one = jax.tree.map(lambda x: x[0], begin())
    say = lambda text: tell(Event(text))
    return rounds.choose_schedule(algorithm, one, key, stream, tell=say, **where)


def tell_memory(
    how: str, tell: "Tell", name: str, given: tuple, options: dict[str, Any]
) -> None:
    """Tells what an arm needs.

    Raises:
      MemoryError: if it will not fit and `how` is "refuse".
    """
    from fedcl._experiment_run import Event

    if how == "ignore":
        return
    try:
        tell(Event(f"{name}: needs {_memory.report(*given, **options).line()}"))
    except MemoryError as error:
        if how == "refuse":
            raise MemoryError(f"arm {name}: {error}") from None
        tell(Event(f"{name}: {error}"))


def finished(saved: Checkpoints | None, resume: bool, rounds: int) -> bool:
    """Whether nothing is left to run."""
    return resume and saved is not None and saved.latest() == rounds


def in_files(
    e: "Experiment",
    name: str,
    ready: "Ready",
    saved: Callable[[str], Checkpoints | None],
    told: Told,
    *,
    key: jax.Array,
    resume: bool,
    progress: Callable[[rounds.Progress], None],
    nonfinite: str,
    **options: Any,
) -> History:
    """`fedcl.run` of one seed after another, the clients' states in files.

    Args:
      e: the experiment.
      name: of the arm.
      ready: the arm, of one client.
      saved: `(name) -> checkpoints`.
      told: tells what memory a run needs.
      key: [S].
      resume: as in `fedcl.run`.
      progress: as in `fedcl.run`, of several seeds.
      nonfinite: as in `fedcl.run`.
      options: as in `fedcl.run` and `fedcl.memory.report`.
    """
    f: Any = ready.parts[0].federated
    options |= {"cohort": f.sampler, "schedule": f.schedule}
    show = lambda p: progress(p._replace(evaluation=_with_axis(p.evaluation)))
    more: dict[str, Any] = {"resume": resume, "nonfinite": nonfinite, "progress": show}
    begin = lambda server, folder: store.init(
        ready.algorithm,
        server.params,
        ready.stream.example(),
        ready.stream.num_clients,
        folder,
        frozen=server.frozen,
        resume=resume,
    )
    found, first = [], ready.begin().server
    for i, seed in enumerate(e.seeds):
        server = jax.tree.map(lambda x, i=i: x[i], first)
        state = begin(server, Path(str(e.federation.store)) / name / str(seed))
        own, more["checkpoint"] = {**options, "key": key[i]}, saved(f"{name}.{seed}")
        if i == 0 and not finished(more["checkpoint"], resume, options["rounds"]):
            needs = own | {"checkpoint": more["checkpoint"] is not None}
            told(name, (ready.algorithm, state, ready.stream), needs)
        ended = rounds.run(ready.algorithm, state, ready.stream, **own, **more)
        found.append(ended[1])
    stacked = jax.tree.map(lambda *x: np.stack(x), *found)
    return stacked._replace(at=found[0].at)


def _with_axis(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.asarray(v)[None] for k, v in columns.items()}
