"""Running an experiment: every arm on the same start, data, cohorts and keys."""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedcl import _experiment_engine as _engine
from fedcl import _experiment_grid as _grid
from fedcl import _experiment_results as _results
from fedcl import _frozen, _hosts, base, checkpoint, metrics, phases, rounds, tree
from fedcl._host import History

if TYPE_CHECKING:
    from fedcl._experiment_config import Arm, Experiment

PyTree = Any


class Event(NamedTuple):
    """What `run` tells while it works.

    Attributes:
      text: a sentence for a log, or "".
      arm: the arm that runs, or "".
      done: rounds done.
      rounds: of how many.
      accuracy: mean over seeds and the contexts met so far; of a metric "nats" the
        loss in nats per token.
      metric: "accuracy" or "nats".
    """

    text: str = ""
    arm: str = ""
    done: int = 0
    rounds: int = 0
    accuracy: float = float("nan")
    metric: str = "accuracy"


Tell = Callable[[Event], None]


class Result(NamedTuple):
    """What a run found.

    Attributes:
      summary: what summary.json holds.
      history: what history.npz holds.
      out: where both are, or None.
      unwritten: why they are not all there, or "".
    """

    summary: dict[str, Any]
    history: dict[str, np.ndarray]
    out: Path | None
    unwritten: str = ""


class Setup(NamedTuple):
    """What all arms share."""

    stream: Any
    model: Any
    loss_fn: base.LossFn
    params: PyTree  # φ after the public phase, [S, ...].
    frozen: PyTree  # θ, [S, ...] or None.
    evaluate: Callable[[base.State], PyTree]
    keys: jax.Array  # [S]
    table: Any  # Of images, or of texts.
    ends: np.ndarray
    seen: np.ndarray  # [T + 1, K]: contexts met in the rounds before.
    metric: str = "accuracy"  # Or "nats", per token.
    card: dict[str, Any] | None = None  # Of the pre-trained model and the texts.
    random: tuple[PyTree, PyTree] | None = None  # φ and θ before the public phase.
    mesh: Mesh | None = None  # Over which the clients live.
    held: Any = None  # The stream of the rows that clients hold out, if they do.


def run(
    experiment: "Experiment",
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: Tell | None = None,
    mesh: Mesh | None = None,
    memory: str = "refuse",
) -> Result:
    """Runs every arm and writes what it found.

    Seeds run side by side by `vmap`; the public phase runs once, and all arms start
    from its parameters. Arms see the same data, cohorts and keys, so that they differ
    in their methods alone.

    Args:
      experiment: from `load`.
      out: a directory for results and checkpoints; None: nothing is written.
      resume: continue from the checkpoints in `out`.
      progress: is told what happens; of several processes, in the first alone.
      mesh: devices over which the clients are spread, see `fedcl.tpu.mesh`; those of
        several processes if all run this. The first writes the results, and all need
        to see `out`. The experiment's federation.shards must be a multiple of its
        clients' parts, so that the result is that of one device.
      memory: "refuse" tells before each arm what it needs and refuses it if it will
        not fit, see `fedcl.memory.report`; "report" tells and goes on; or "ignore".

    Returns:
      The result, complete even if it could not be written.

    Raises:
      CheckpointError: before anything is computed, if `out` cannot be written, or
        holds other results, or is not to be resumed.
      Interrupted: after Ctrl-C, when everything is saved.
      ValueError: if the data are not what the experiment says.
      FaultError: if a client sends NaN or Inf, see `federation.nonfinite`.
      MemoryError: if an arm will not fit.
    """
    _engine.check(experiment, mesh, memory)
    tell = progress if progress and _hosts.first() else lambda event: None
    _check_mesh(experiment, mesh)
    folder = None if out is None else _folder(Path(out), experiment, resume)
    if experiment.grid:
        on_mesh = functools.partial(run, mesh=mesh, memory=memory)
        return _grid.run(experiment, folder, resume, progress, on_mesh)
    setup = prepare(experiment, tell)._replace(mesh=mesh)
    ready = _ready(experiment, setup, tell)
    told = functools.partial(_engine.tell_memory, memory, tell)
    arms = {
        name: _arm(experiment, setup, name, ready[name], folder, resume, tell, told)
        for name in experiment.arms
    }
    summary, history = _results.collect(experiment, setup, arms)
    if folder is None:
        return Result(summary, history, None)
    written = _results.write(folder, summary, history) if _hosts.first() else ""
    return Result(summary, history, folder, _hosts.agreed(written))


def _check_mesh(e: "Experiment", mesh: Mesh | None) -> None:
    """Refuses a mesh over which the file's cohorts cannot be drawn."""
    parts = 1 if mesh is None else mesh.shape["clients"]
    for key, given in (
        ("stream.clients", e.stream.clients),
        ("federation.shards", e.federation.shards),
    ):
        if given % parts:
            raise ValueError(
                f"{key}: given {given}; the clients are spread over {parts} devices, so "
                f"it must be a multiple of {parts}. With the same federation.shards, one "
                "device gives the same result."
            )


def _folder(out: Path, e: "Experiment", resume: bool) -> Path:
    """The directory, made by the first process; all are refused alike."""
    refusal = ""
    try:
        if _hosts.first():
            _results.prepare(out, e, resume)
    except checkpoint.CheckpointError as error:
        refusal = str(error)
    refusal = _hosts.agreed(refusal)
    if refusal:
        raise checkpoint.CheckpointError(refusal)
    return out.absolute()


def prepare(e: "Experiment", tell: Tell) -> Setup:
    """Data, stream, model, and the public phase."""
    from fedcl import _experiment_build as _build

    if e.data.source == "text":
        from fedcl import _experiment_text as _text

        return _text.prepare(e, tell)
    table = _build.table(e)
    stream, held = _build.validation(e, _build.stream(e, table))
    made = _build.model(e, table)
    seeds = np.asarray(e.seeds, np.uint32)
    keys = jax.vmap(jax.random.key)(seeds)
    fold = lambda n: jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)
    first = params = jax.jit(jax.vmap(made.init))(fold(_build.INIT))
    if e.public.steps:
        params = _public(e, table, stream, made, params, fold(_build.PUBLIC), tell)
    drawn = _build.adapted(e, made, first, fold(_build.ADAPTER))[1:]
    made, trained, frozen = _build.adapted(e, made, params, fold(_build.ADAPTER))
    return Setup(
        stream,
        made,
        _build.loss(made),
        trained,
        frozen,
        _build.evaluator(e, table, stream, made.apply),
        fold(_build.RUN),
        table,
        _build.ends(e, stream.num_rounds),
        _build.seen(e, stream),
        random=drawn,
        held=held,
    )


def stream_of(e: "Experiment") -> Any:
    """The stream alone."""
    from fedcl import _experiment_build as _build

    if e.data.source == "text":
        return prepare(e, lambda event: None).stream
    return _build.stream(e, _build.table(e))


def _public(e, table, stream, made, params, keys, tell: Tell) -> PyTree:
    """The parameters after the server trained on public data, before round 0."""
    from fedcl import _experiment_build as _build
    from fedcl.algorithms import fedavg

    start = time.perf_counter()
    loss_fn = _build.loss(made)
    algorithm = fedavg(loss_fn, _build.optimizer(e.federation.client))
    example, n = stream.example(), stream.num_clients
    state = jax.jit(jax.vmap(lambda p: algorithm.init(p, example, n)))(params)
    once = phases.until(1, e.public.steps)
    part = _build.public_phase(e, table, loss_fn, once)
    state, history = rounds.run([part], state, stream, key=keys, rounds=1)
    loss = history.rounds["public/loss"][:, 0].mean()
    steps = int(history.rounds["public/steps"][0, 0])
    again = f"every {e.public.every} rounds" if e.public.every else "as each arm says"
    tell(
        Event(
            f"public phase: switch on for {steps} steps on {len(table.public['y'])} "
            f"rows of the server, loss {loss:.3f} ({time.perf_counter() - start:.1f} s); "
            f"from round 0 on: {again}"
        )
    )
    return state.server.params


class Ready(NamedTuple):
    """An arm that can be run: `begin` makes the state, of which `shapes` are known."""

    algorithm: base.Algorithm
    parts: tuple[phases.Phase, ...]
    begin: Callable[[], base.State]
    shapes: base.State
    stream: Any
    evaluate: Callable[[base.State], PyTree]


def _ready(e: "Experiment", setup: Setup, tell: Tell) -> dict[str, Ready]:
    """All arms; those that differ in their stream alone share one program."""
    from fedcl import _experiment_build as _build

    made: dict[str, Ready] = {}
    arms: dict[str, Ready] = {}
    text = setup.metric == "nats"
    width = 0 if text else _build.dimension(setup.model, setup.table)
    for name, arm in e.arms.items():
        # Of text, who is there depends on the stream.
        shared = set() if text else {"joint"}
        key = json.dumps(arm.model_dump(exclude=shared), sort_keys=True)
        if key not in made:
            begun = _begun(setup, arm)
            own = _own(e, begun, arm)
            loss_fn = own.loss_fn
            algorithm = own.wrap(
                _build.algorithm(e, arm, own.steps, own.optimizer, width)
            )
            stream = _build.batched(setup.stream, arm.batch_size)
            if text and arm.joint:
                stream = _build.mixed(stream, arm.joint, e.stream.seed)
            n = _engine.clients_made(e, algorithm, stream)
            example = stream.example()
            init = lambda p, f, a=algorithm, x=example, n=n: a.init(p, x, n, frozen=f)
            begin, shapes = _beginning(jax.vmap(init), own)
            inner = _federated(
                e,
                setup._replace(loss_fn=loss_fn) if text else setup,
                arm,
                algorithm,
                begin,
                stream,
                tell,
            )
            before, after = (
                _build.others(links, width, loss_fn)
                for links in (arm.before, arm.phases)
            )
            parts = (*before, *inner, *after)
            made[key] = Ready(algorithm, parts, begin, shapes, stream, own.evaluate)
        arms[name] = made[key]
        if arm.joint and not text:
            mixed = _build.mixed(made[key].stream, arm.joint, e.stream.seed)
            arms[name] = made[key]._replace(stream=mixed)
    return arms


def _beginning(
    init: Callable[..., base.State], own: "Own"
) -> tuple[Callable[[], base.State], base.State]:
    """What makes the state, and its shapes; one θ for all arms, however large."""
    # A jitted function would hand back a copy of θ.
    bare = jax.jit(lambda *given: _frozen.with_frozen(init(*given), None))
    whole = lambda state: _frozen.with_frozen(state, own.frozen)
    given = own.params, own.frozen
    return lambda: whole(bare(*given)), whole(jax.eval_shape(bare, *given))


def _begun(setup: Setup, arm: "Arm") -> Setup:
    """The setup with the parameters that an arm starts from."""
    if arm.start == "public" or setup.random is None:
        return setup
    params, frozen = setup.random
    return setup._replace(params=params, frozen=frozen)


class Own(NamedTuple):
    """What may differ between arms beside their methods."""

    loss_fn: base.LossFn
    steps: base.LossFn  # The same, as the clients' steps compute it.
    params: PyTree
    frozen: PyTree
    evaluate: Callable[[base.State], PyTree]
    optimizer: Any
    wrap: Callable[[base.Algorithm], base.Algorithm] = lambda algorithm: algorithm


def _own(e: "Experiment", setup: Setup, arm: "Arm") -> Own:
    from fedcl import _experiment_build as _build

    client = arm.client or e.federation.client
    optimizer = _build.optimizer(client)
    if setup.metric == "nats":
        from fedcl import _experiment_text as _text

        return _text.own(e, setup, arm, optimizer)
    loss_fn = _build.loss(setup.model, arm.loss)
    of = lambda m: _build.loss(m, arm.loss)
    steps = _engine.local_loss(client, loss_fn, of, setup.model)
    return Own(loss_fn, steps, setup.params, setup.frozen, setup.evaluate, optimizer)


def _arm(
    e: "Experiment",
    setup: Setup,
    name: str,
    ready: Ready,
    folder: Path | None,
    resume: bool,
    tell: Tell,
    told: Callable,
) -> _results.Arm:
    start, arm = time.perf_counter(), e.arms[name]
    total = ready.stream.num_rounds
    tell(Event(arm=name, rounds=total))

    def report(p: rounds.Progress) -> None:
        seen = p.evaluation[_results.COLUMN[setup.metric]][:, setup.seen[p.done]]
        tell(Event("", name, p.done, p.rounds, float(seen.mean()), setup.metric))

    options: dict[str, Any] = {
        "key": setup.keys,
        "rounds": total,
        "evaluate": ready.evaluate,
        "every": e.evaluation.every,
    }
    saved = functools.partial(_checkpoints, e, arm=arm, folder=folder)
    more: dict[str, Any] = {
        "nonfinite": e.federation.nonfinite,
        "resume": resume,
        "progress": report,
    }
    if arm.frozen:
        history = _still(ready.begin(), **options)
    elif e.federation.store:
        history = _engine.in_files(e, name, ready, saved, told, **options, **more)
    else:
        options |= {"mesh": setup.mesh, "donate": True}
        more["checkpoint"] = saved(name)
        if not _engine.finished(more["checkpoint"], resume, total):
            saves = {"checkpoint": more["checkpoint"] is not None}
            told(name, (ready.parts, ready.shapes, ready.stream), options | saves)
        state = ready.begin()
        history = rounds.run(ready.parts, state, ready.stream, **options, **more)[1]
    first = lambda a: jax.eval_shape(lambda a: tree.gather(a, jnp.int32(0)), a)
    one = first(ready.shapes)
    sent = metrics.communication(ready.algorithm, one, ready.stream, ready.parts)
    summed = metrics.sums(one.server.params, () if arm.frozen else ready.parts)
    kept = tree.size(first(one.clients))
    seconds = time.perf_counter() - start
    return _results.Arm(history, sent, summed, kept, seconds)


def _still(state, *, key, rounds: int, evaluate, every: int) -> History:
    """The history of a federation in which nobody trains."""
    found = jax.jit(jax.vmap(evaluate))(state)
    at = np.unique(np.append(np.arange(0, rounds, min(every, rounds)), rounds))
    repeated = lambda x: np.repeat(np.asarray(x)[:, None], len(at), axis=1)
    none = np.zeros((len(key), rounds, 1), np.float32)
    told: dict[str, Any] = dict.fromkeys(("loss", "reported", "trained", "steps"), none)
    return History(told, jax.tree.map(repeated, found), at)


def _federated(
    e, setup: Setup, arm: "Arm", algorithm, begin, stream, tell: Tell
) -> list[phases.Phase]:
    """The federated phase, after the public one if that is in the rounds."""
    from fedcl import _experiment_build as _build

    sampler = _build.sampler(e, stream)
    where: dict[str, Any] = {"cohort": sampler, "mesh": setup.mesh}
    given = (algorithm, begin, setup.keys[0], stream)
    schedule = _engine.schedule(e.federation.schedule, tell, *given, **where)
    review = _build.review(e, arm, algorithm)
    parts = [phases.federated(algorithm, schedule=schedule, review=review, **where)]
    if setup.held is not None:
        held = _build.batched(setup.held, arm.batch_size)
        parts.append(phases.validation(setup.loss_fn, held, mesh=setup.mesh))
    switch = _build.switch(e, arm, setup.loss_fn)
    if switch is not None:
        public = _build.public_phase(e, setup.table, setup.loss_fn, switch)
        parts.insert(0, public)
    return parts


def _checkpoints(
    e: "Experiment", name: str, arm: "Arm", folder: Path | None
) -> checkpoint.Checkpoints | None:
    if folder is None or not e.checkpoint.every:
        return None
    others = {"name", "about", "arms", "checkpoint"}
    identity = e.model_dump(exclude=others, exclude_none=True)
    return checkpoint.Checkpoints(
        folder / "checkpoints" / name,
        every=e.checkpoint.every,
        identity={**identity, "arm": arm.model_dump(exclude_none=True)},
        keep=e.checkpoint.keep,
    )
