"""From an experiment's sections to streams, models and algorithms."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedcl import _experiment_methods as _methods
from fedcl import _experiment_study as _study
from fedcl import aggregation, base, cohorts, losses, metrics, oracle, phases
from fedcl import chain as chained
from fedcl._experiment_checks import outputs_of
from fedcl._experiment_config import Arm, Client, Experiment, Tuned
from fedcl._experiment_tuned import adapted as adapted

PyTree = Any
INIT, RUN, PUBLIC, ADAPTER, SERVER = range(5)  # What each seed's key is folded with.


class Table(NamedTuple):
    """The rows of an experiment, cut into disjoint parts."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    public: dict[str, np.ndarray] | None
    classes: int
    shape: tuple[int, ...]  # Of one row of "x".


def table(e: Experiment) -> Table:
    """Reads the data and splits it by class into client, test and public rows."""
    from fedcl import streams

    d, public = e.data, e.public.fraction
    rows = _read(e, "all" if d.test != "official" else "train")
    classes = int(d.classes or 0)
    if rows["y"].max() >= classes:
        raise ValueError(
            f"data.classes is {classes}, but the data have a label {rows['y'].max()}."
        )
    shape = rows["x"].shape[1:]
    if d.test == "official":
        test, (train, *rest) = _read(e, "test"), [rows]
        if public:
            train, *rest = streams.split(rows, [1 - public, public], d.seed)
    else:
        shares = [d.test, 1 - d.test - public] + ([public] if public else [])
        test, train, *rest = streams.split(rows, shares, d.seed)
    train = _some(train, d.rows, d.seed)
    parts = [train, test, *rest]
    if d.standardise:
        mean, std = train["x"].mean(), train["x"].std()
        parts = [{**part, "x": (part["x"] - mean) / std} for part in parts]
    train, test, *rest = parts
    server = _study.public_rows(e, rest[0], angles(e)) if rest else None
    return Table(train, test, server, classes, shape)


def _some(table: dict, count: int | None, seed: int) -> dict[str, np.ndarray]:
    """`count` rows of the table, drawn without replacement; all of them if None."""
    rows = len(table["y"])
    if count is None:
        return table
    if count > rows:
        raise ValueError(f"data.rows is {count}, but there are {rows} training rows.")
    index = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    return {k: v[index] for k, v in table.items()}


def _read(e: Experiment, part: str) -> dict[str, np.ndarray]:
    """The rows of the source; `part` is "all", "train" or "test"."""
    from fedcl import _experiment_encoder as _encoder
    from fedcl import streams

    d, path = e.data, str(e.data.path)
    sources: dict[str, Callable[[], dict]] = {
        "digits": streams.digits,
        "npz": lambda: streams.npz(path),
        "idx": lambda: streams.arrays(streams.idx(path), streams.idx(str(d.labels))),
        "mnist": lambda: streams.mnist(path, part),
        "labelled": lambda: _encoder.rows(e),
        "tfds": lambda: streams.tfds_arrays(path, part, data_dir=d.data_dir),
    }
    rows = sources[d.source]()
    x = rows["x"]
    return {**rows, "x": x.astype(np.float32) / 255 if x.dtype == np.uint8 else x}


def stream(e: Experiment, rows: Table) -> Any:
    """The clients' stream."""
    from fedcl import streams

    s, f = e.stream, e.federation
    if s.kind == "mnist_360":
        return streams.mnist_360(rows.train, batch_size=f.batch_size, seed=s.seed)
    options: dict[str, Any] = {
        "num_clients": s.clients,
        "schedule": schedule(e),
        "steps": f.steps if s.draw == "replacement" else None,
        "batch_size": f.batch_size,
        "partition": _partition(s.partition),
        "draw": s.draw,
        "epochs": f.epochs,
        "empty": s.empty,
        "hidden": s.hidden,
        "seed": s.seed,
    }
    if grouped(e):
        contexts = groups(e, rows, rows.train["y"])
        return streams.domain_incremental(
            within(e, rows, rows.train), contexts=contexts, **options
        )
    if s.kind == "domain_incremental":
        domains = _domains(e, rows.shape)
        return streams.domain_incremental(rows.train, domains, **options)
    build = getattr(streams, s.kind)
    return build(
        rows.train,
        num_contexts=s.contexts,
        num_classes=rows.classes,
        order=s.order,
        **options,
    )


def validation(e: Experiment, stream: Any) -> tuple[Any, Any]:
    """What the clients train on, and what they hold out of it, or None."""
    from fedcl import streams

    if not e.data.validation:
        return stream, None
    return streams.validation(stream, e.data.validation, seed=e.stream.seed)


def grouped(e: Experiment) -> bool:
    """Whether contexts are groups of classes that share their labels."""
    return e.stream.domains is not None and e.stream.domains.kind == "class_groups"


def groups(e: Experiment, rows: Table, y: np.ndarray) -> np.ndarray:
    """The context of each label."""
    from fedcl import streams

    s = e.stream
    return streams.contexts_of(y, s.contexts, num_classes=rows.classes, order=s.order)


def within(e: Experiment, rows: Table, table: dict) -> dict[str, np.ndarray]:
    """The table with each label's position in its group."""
    order = np.argsort(e.stream.order or range(rows.classes))
    return {**table, "y": order[table["y"]] % (outputs_of(e) or 1)}


def schedule(e: Experiment) -> Any:
    """The drift, clients that join and leave included."""
    from fedcl import streams

    s = e.stream
    options = s.drift.model_dump(exclude={"kind"})
    if s.drift.kind == "staggered":
        spread = np.linspace(0, s.drift.lag, s.clients)
        options |= {"lag": np.round(spread).astype(int), "seed": s.seed}
    build = getattr(streams, s.drift.kind)
    made = build(s.contexts, s.clients, s.rounds_per_context, **options)
    if s.join is None and s.leave is None:
        return made
    return streams.join_leave(made, s.join, s.leave)


def _partition(p: Any) -> Any:
    from fedcl import streams

    return getattr(streams, p.kind)(**p.model_dump(exclude={"kind"}))


def angles(e: Experiment) -> Any:
    """Degrees of each context, if contexts are rotations."""
    d = e.stream.domains
    if d is None or d.kind != "rotations":
        return None
    drawn = np.random.default_rng(d.seed).uniform(0, d.upto, e.stream.contexts)
    return drawn if d.degrees is None else d.degrees


def _domains(e: Experiment, shape: tuple[int, ...]) -> Any:
    from fedcl import streams

    d, turns = e.stream.domains, angles(e)
    if turns is not None:
        return streams.rotations(turns)
    seed = d.seed if d is not None and d.kind == "permutations" else 0
    return streams.permutations(e.stream.contexts, shape, seed=seed)


def batched(s: Any, size: int | None) -> Any:
    """The stream in batches of another size, if one is given."""
    if size is None:
        return s
    steps = s.steps if s.draw == "replacement" else s.epochs * -(-s.capacity // size)
    return dataclasses.replace(s, batch_size=size, steps=steps)


def mixed(s: Any, joint: str, seed: int = 0) -> Any:
    """The stream whose every round mixes contexts, so that nothing is forgotten.

    Args:
      s: a stream; passes through the data become as many draws with replacement, but
        one client's single pass in order becomes that pass in a random order.
      joint: "all" contexts, or those met so "far" by any client.
      seed: of that random order.
    """
    if s.draw == "order":
        rows = np.random.default_rng(seed).permutation(np.asarray(s.rows))
        return dataclasses.replace(s, rows=jnp.asarray(rows))
    pi = s.pi()
    there = pi.sum(axis=2, keepdims=True) > 0
    met = np.cumsum(pi.sum(axis=1, keepdims=True), axis=0) > 0
    met = met | (joint == "all")
    even = np.where(there & met, 1.0, 0.0) / met.sum(axis=2, keepdims=True)
    table, clock = np.unique(
        even.reshape(-1, s.num_contexts), axis=0, return_inverse=True
    )
    # As many mixtures as before, so that arms with and without share a program.
    table = np.pad(table, [(0, max(len(s.table) - len(table), 0)), (0, 0)])
    return dataclasses.replace(
        s,
        table=jnp.asarray(table, s.table.dtype),
        clock=jnp.asarray(clock.reshape(s.clock.shape), s.clock.dtype),
        tasks=jnp.zeros_like(s.tasks),
        final=jnp.zeros_like(s.final),
        draw="replacement",
    )


def ends(e: Experiment, rounds: int) -> np.ndarray:
    """Rounds done when every client has finished its first, second, … context, [T]."""
    s = e.stream
    if s.kind == "mnist_360":
        return np.asarray([rounds])
    cycles = s.drift.cycles if s.drift.kind == "recurring" else 1
    lag = s.drift.lag if s.drift.kind == "staggered" else 0
    nominal = np.arange(1, s.contexts * cycles + 1) * s.rounds_per_context + lag
    return np.minimum(nominal, rounds)


def seen(e: Experiment, s: Any) -> np.ndarray:
    """The contexts tested that were met in the rounds before, [T + 1, K] bool."""
    there = s.pi().sum(axis=1) > 0
    if e.stream.kind == "mnist_360":
        there = there.any(axis=1, keepdims=True)
    met = np.cumsum(there, axis=0) > 0
    return np.concatenate([np.zeros((1, met.shape[1]), bool), met])


def evaluator(e: Experiment, rows: Table, s: Any, apply: Callable) -> Any:
    """Accuracies on the test rows, per context and as each client's data weigh them."""
    from fedcl import streams

    contexts, limit, chunk = None, e.evaluation.limit, e.evaluation.chunk
    weights = shares(s, outputs_of(e) or 0)
    if e.stream.kind == "mnist_360":
        batch = streams.mnist_360_test(rows.test, limit=limit)
        weights = weights.sum(axis=1, keepdims=True)
        return metrics.evaluator(apply, batch, weights, chunk=chunk)
    if e.stream.kind != "domain_incremental" or grouped(e):
        contexts = groups(e, rows, rows.test["y"])
    table = within(e, rows, rows.test) if grouped(e) else rows.test
    test = {k: v for k, v in table.items() if k in s.data}
    batch = streams.held_out(s, test, contexts, limit=limit)
    return metrics.evaluator(apply, batch, weights, chunk=chunk)


def shares(s: Any, classes: int) -> np.ndarray:
    """Each context's and class's share in a client's rows, [N, K, Y]."""
    y, rows = np.asarray(s.data["y"]), np.asarray(s.rows)
    start, size = np.asarray(s.start), np.asarray(s.size)
    out = np.zeros((s.num_clients, s.num_contexts, classes), np.float32)
    for k, n in np.ndindex(*start.shape):
        mine = y[rows[start[k, n] : start[k, n] + size[k, n]]]
        out[n, k] = np.bincount(mine, minlength=classes)
    return out / np.maximum(out.sum(axis=(1, 2), keepdims=True), 1)


def model(e: Experiment, rows: Table) -> Any:
    """The model, before any adapter."""
    from fedcl import _experiment_encoder as _encoder
    from fedcl import models

    options = e.model.model_dump(exclude={"kind", *Tuned.model_fields})
    outputs = outputs_of(e) or 0
    if e.model.kind == "encoder":
        return _encoder.model(e, outputs)
    if e.model.kind == "mlp":
        sizes = (int(np.prod(rows.shape)), *options.pop("hidden"), outputs)
        wide, act = options.pop("projection"), options.pop("activation")
        made = models.mlp(sizes, getattr(jax.nn, act), **options)
        return models.random_projection(made, wide) if wide else made
    image = rows.shape if len(rows.shape) == 3 else (*rows.shape, 1)
    build = getattr(models, e.model.kind)
    return build(image, num_classes=outputs, **options)


def dimension(made: Any, rows: Table) -> int:
    """Features of the model."""
    params = jax.eval_shape(made.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *rows.shape), rows.train["x"].dtype)
    return jax.eval_shape(made.outputs, params, x).features.shape[1]


def optimizer(c: Client) -> optax.GradientTransformation:
    """The clients' optimiser."""
    from fedcl import algorithms

    steps = {
        "sgd": lambda: optax.sgd(c.learning_rate, momentum=c.momentum or None),
        "adam": lambda: optax.adam(c.learning_rate),
        "adamw": lambda: optax.adamw(c.learning_rate, weight_decay=c.weight_decay),
    }
    before = [] if c.clip is None else [optax.clip(c.clip)]
    after = [] if c.backbone is None else [algorithms.slow_backbone(c.backbone)]
    return optax.chain(*before, steps[c.optimizer](), *after)


def algorithm(
    e: Experiment,
    arm: Arm,
    loss_fn: base.LossFn,
    optimizer: optax.GradientTransformation,
    dimension: int,
) -> base.Algorithm:
    """The arm's algorithm: federated averaging with its methods, or one of its own."""
    from fedcl import algorithms

    if arm.algorithm is not None:
        filled = {"loss_fn": loss_fn, "oracle": oracle.black_box(loss_fn)}
        return _methods.made(arm.algorithm, _methods.algorithms(), **filled)
    averaged = algorithms.fedavg(
        loss_fn,
        optimizer,
        server=server(e, arm),
        transform=transform(arm, dimension),
        opt_policy=(arm.client or e.federation.client).policy,
    )
    if arm.personal is None:
        return averaged
    return algorithms.personal(averaged, _methods.predicate(arm.personal))


def transform(arm: Arm, dimension: int) -> base.ClientTransform | None:
    """The arm's methods, chained."""
    from fedcl import algorithms

    known = _methods.methods()
    made = [_methods.made(link, known, dimension=dimension) for link in arm.chain]
    method = made[0] if len(made) == 1 else chained(*made) if made else None
    if method is None or arm.detector is None:
        return method
    known = _methods.detectors()
    detector = _methods.made(arm.detector, known, dimension=dimension)
    return algorithms.task_free(method, detector)


def review(e: Experiment, arm: Arm, algorithm: base.Algorithm) -> phases.Switch | None:
    """When contexts are reviewed; None: when they end."""
    if arm.review_every:
        return phases.every(arm.review_every, offset=arm.review_every - 1)
    if e.stream.hidden and algorithm.review is not None:
        raise ValueError(
            "stream.hidden hides where contexts end, and a method of this arm passes "
            "over their rows then: say how often with review_every = 10 (rounds)"
        )
    return None


def others(
    links: list[dict[str, Any]], dimension: int, loss_fn: base.LossFn
) -> list[phases.Phase]:
    """Phases beside the federated one."""
    known = _methods.makers()
    made = [_methods.made(link, known, dimension=dimension) for link in links]
    return [m if isinstance(m, phases.Phase) else m(loss_fn) for m in made]


def server(e: Experiment, arm: Arm) -> aggregation.Server:
    """The server chain of an arm; what it draws is the same for all seeds."""
    given = arm.server or e.federation.server
    key = jax.random.fold_in(jax.random.key(np.uint32(e.seeds[0])), SERVER)
    stage = _methods.made(given, _methods.servers(), key=key)
    clip = e.federation.clip
    before = [] if clip is None else [_clipped(clip)]
    after = [] if isinstance(stage, aggregation.Server) else [optax.sgd(1.0)]
    return aggregation.server(*before, stage, *after)


def _clipped(norm: float) -> aggregation.Stage:
    return aggregation.per_client(optax.clip_by_global_norm(norm), linear=True)


def sampler(e: Experiment, s: Any) -> cohorts.Sampler:
    """Who takes part in a round; of text, among the clients that are there."""
    f = e.federation
    if e.data.source == "text" and f.available == 1:
        here = jax.vmap(s.present, (0, None))
        table = jax.vmap(here, (None, 0))(
            jnp.arange(s.num_clients), jnp.arange(s.num_rounds)
        )
        return _drawn(f.cohort, f.shards, cohorts.recorded(table))
    available = cohorts.bernoulli(f.available) if f.available < 1 else None
    return _drawn(f.cohort, f.shards, available)


def _drawn(size: int, shards: int, on: cohorts.Process | None) -> cohorts.Sampler:
    if shards == 1:
        return cohorts.uniform(size, available=on)
    return cohorts.stratified(size, shards, available=on)


def switch(e: Experiment, arm: Arm, loss_fn: base.LossFn) -> phases.Switch | None:
    """When the server trains in the rounds of an arm; None: never."""
    if arm.switch is not None:
        return _study.switch(arm, loss_fn)
    on = e.public.every and arm.public
    return phases.every(e.public.every, e.public.steps_each) if on else None


def public_phase(
    e: Experiment, rows: Table, loss_fn: base.LossFn, switch: phases.Switch
) -> phases.Phase:
    """The server's phase, in the rounds that the switch says."""
    p = e.public
    data = {k: jnp.asarray(v) for k, v in (rows.public or {}).items()}
    adam = optax.adam(p.learning_rate)
    size = p.batch_size
    return phases.public(loss_fn, adam, data, batch_size=size, switch=switch)


def loss(made: Any, kind: str = "softmax") -> base.LossFn:
    """The classification loss on whole parameters, its features told."""
    return getattr(losses, kind)(made.outputs or made.apply)
