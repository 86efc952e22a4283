"""Public checks: does a transform, an algorithm or a stream keep the contract?

`check_transform(my_method())` runs a small federation over three contexts with
partial participation and reports every rule that does not hold. The rules are those
that published implementations broke: a penalty on a copy that is never trained, an
anchor frozen when the step was first traced, a buffer that reaches another client,
randomness by position in the cohort, a program that is compiled again and again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedcl import _engine, base, losses, tree
from fedcl.transforms import transform as make_transform

PyTree = Any
N, K, ROUNDS, STEPS, ROWS, FEATURES, CLASSES = 4, 3, 6, 3, 4, 5, 6


class Problem(NamedTuple):
    """What a method is checked on.

    Attributes:
      params: φ.
      loss_fn: `(params, batch, key) -> (loss, aux)`.
      stream: a stream of at least four clients and three contexts in six rounds.
    """

    params: base.Params
    loss_fn: base.LossFn
    stream: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyStream:
    """Two new classes per context, two rounds each; odd clients are a round late."""

    x: jax.Array  # [N, K, M, D]
    y: jax.Array  # [N, K, M]

    num_clients = N
    ragged = False

    def task(self, client, round):
        return jnp.clip((round - client % 2) // 2, 0, K - 1).astype(jnp.int32)

    def sample(self, key, client, round):
        k = self.task(client, round)
        rows = jax.random.randint(key, (STEPS, ROWS), 0, self.x.shape[2])
        mask = jnp.ones((STEPS, ROWS))
        return {
            "x": self.x[client, k][rows],
            "y": self.y[client, k][rows],
            "mask": mask,
        }

    def sweep(self, client, round):
        k = self.task(client, round)
        shape = (-1, ROWS)
        x = self.x[client, k].reshape(*shape, FEATURES)
        y = self.y[client, k].reshape(shape)
        return {"x": x, "y": y, "mask": jnp.ones(y.shape)}

    def present(self, client, round):
        return jnp.array(True)

    def ends(self, client, round):
        return self.task(client, round + 1) != self.task(client, round)

    def example(self):
        row = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((ROWS, *s), dtype)
        return {"x": row(FEATURES), "y": row(dtype=jnp.int32), "mask": row()}


def toy_problem(seed: int = 0) -> Problem:
    """A linear classifier on Gaussian classes: four clients, three contexts.

    >>> toy_problem().stream.num_clients
    4
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, FEATURES))
    y = 2 * np.arange(K)[None, :, None] + rng.integers(0, 2, (N, K, 12))
    x = centres[y] + 0.5 * rng.normal(size=(*y.shape, FEATURES))
    params = {
        "kernel": jnp.asarray(0.3 * rng.normal(size=(FEATURES, CLASSES)), jnp.float32),
        "bias": jnp.zeros(CLASSES),
    }
    apply = lambda p, x, key: x @ p["kernel"] + p["bias"][None]
    columns = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    return Problem(params, losses.softmax(apply), ToyStream(*columns))


class _Run:
    """Rounds of a problem, one at a time; programs are compiled when first used."""

    def __init__(self, algorithm: base.Algorithm, problem: Problem):
        self.problem = problem
        self.traces: list[str] = []
        self._key = jax.random.key(7)

        def counted(server, client, visit):
            self.traces.append("client_update")
            return algorithm.client_update(server, client, visit)

        self._algorithm = algorithm._replace(client_update=counted)
        self.vmap = self.step("vmap")
        self.scan = self.step("scan")
        # Contexts, rounds and clients in one program, traced once.
        self.reference = functools.cache(lambda: self.rounds(self.vmap, COHORTS))

    def step(self, schedule: _engine.Schedule) -> Callable:
        return jax.jit(_engine.round_fn(self._algorithm, schedule=schedule))

    def start(self) -> base.State:
        p = self.problem
        n = p.stream.num_clients
        return self._algorithm.init(p.params, p.stream.example(), n)

    def visits(self, clients: list[int], t: int, stream: Any = None) -> base.Visit:
        key, round = jax.random.fold_in(self._key, t), jnp.int32(t)
        visit = lambda c: _engine.visit_of(stream, key, c, round)
        stream = self.problem.stream if stream is None else stream
        return jax.vmap(visit)(jnp.asarray(clients, jnp.int32))

    def rounds(
        self,
        step: Callable,
        cohorts: list[list[int]],
        state: base.State | None = None,
        first: int = 0,
        stream: Any = None,
        present: bool = True,
    ) -> base.State:
        state = self.start() if state is None else state
        for t, clients in enumerate(cohorts, first):
            mask = jnp.full(len(clients), present)
            state = step(state, self.visits(clients, t, stream), mask, mask)[0]
        return state


COHORTS = [[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [1, 3]]


def check_algorithm(
    algorithm: base.Algorithm,
    problem: Problem | None = None,
    *,
    tolerance: float = 1e-5,
) -> list[str]:
    """Checks the contract of a federated algorithm.

    Args:
      algorithm: the algorithm, over the problem's loss.
      problem: parameters, loss and stream; `toy_problem()` by default.
      tolerance: largest difference between schedules, relative and absolute.

    Returns:
      The names of the rules that were checked.

    Raises:
      AssertionError: listing every rule that does not hold, and what was seen.

    Cost: compiles a handful of small rounds.
    """
    run = _Run(algorithm, problem or toy_problem())
    return _report(_algorithm_rules(run, tolerance))


def check_transform(
    method: base.ClientTransform,
    problem: Problem | None = None,
    *,
    zero: base.ClientTransform | None = None,
    tolerance: float = 1e-5,
) -> list[str]:
    """Checks the contract of a client transform inside federated averaging.

    Args:
      method: the transform, or a chain.
      problem: parameters, loss and stream; `toy_problem()` by default.
      zero: the same method at zero strength, to be FedAvg bit for bit.
      tolerance: largest difference between schedules, relative and absolute.

    Returns:
      The names of the rules that were checked.

    Raises:
      AssertionError: listing every rule that does not hold, and what was seen.

    Cost: compiles a handful of small rounds.

    >>> from fedcl import transform
    >>> check_transform(transform())[:2]
    ['memory keeps its structure', 'compiled once']
    """
    from fedcl import algorithms

    p = problem or toy_problem()
    compose = lambda m: algorithms.fedavg(p.loss_fn, optax.sgd(0.1), transform=m)
    run = _Run(compose(method), p)
    rules = _algorithm_rules(run, tolerance)
    rules["no array captured"] = lambda: _no_captured_arrays(method, p)
    rules["penalty moves the parameters"] = lambda: _live_penalty(method, run)
    if zero is not None:
        rules["zero strength is FedAvg"] = lambda: _same_bits(
            compose(zero), compose(make_transform()), p
        )
    return _report(rules)


def _report(rules: dict[str, Callable[[], str | None]]) -> list[str]:
    found = {}
    for name, rule in rules.items():
        try:
            complaint = rule()
        except Exception as e:
            complaint = f"{type(e).__name__}: {e}"
        if complaint:
            found[name] = complaint
    if found:
        lines = [f"- {name}: {complaint}" for name, complaint in found.items()]
        raise AssertionError(
            f"{len(found)} of {len(rules)} rules do not hold:\n" + "\n".join(lines)
        )
    return list(rules)


def _algorithm_rules(
    run: _Run, tolerance: float
) -> dict[str, Callable[[], str | None]]:
    return {
        "memory keeps its structure": lambda: _structure(run),
        "compiled once": lambda: _compiled_once(run),
        "three contexts, traced afresh or once": lambda: _fresh_traces(run, tolerance),
        "scan equals vmap": lambda: _schedules(run, tolerance),
        "order of the cohort is free": lambda: _permuted(run, tolerance),
        "no rows reach another client": lambda: _no_leak(run),
        "absent clients change nothing": lambda: _absent(run),
    }


def _structure(run: _Run) -> str | None:
    state = run.start()
    after = jax.eval_shape(run.vmap, state, run.visits(COHORTS[0], 0))[0]
    if tree.describe(after) != tree.describe(state):
        return "the state after a round has other shapes than before"
    return None


def _compiled_once(run: _Run) -> str | None:
    state = run.rounds(run.vmap, COHORTS[:1])
    once = len(run.traces)
    run.rounds(run.vmap, COHORTS[1:], state, first=1)
    if len(run.traces) > once:
        return f"traced {len(run.traces) - once} times more after the first round"
    return None


def _fresh_traces(run: _Run, tolerance: float) -> str | None:
    state = run.start()
    for t in range(0, len(COHORTS), 2):
        state = run.rounds(run.step("vmap"), COHORTS[t : t + 2], state, first=t)
    return _different(
        run.reference(),
        state,
        tolerance,
        "a program traced once and one traced anew in every context part: a hook reads "
        "Python state that was frozen at the first trace",
    )


def _schedules(run: _Run, tolerance: float) -> str | None:
    scan = run.rounds(run.scan, COHORTS)
    what = "the schedules vmap and scan part"
    return _different(run.reference(), scan, tolerance, what)


def _permuted(run: _Run, tolerance: float) -> str | None:
    return _different(
        run.reference(),
        run.rounds(run.vmap, [c[::-1] for c in COHORTS]),
        tolerance,
        "listing the cohort in another order changes a client's result: something "
        "depends on the position in the cohort, not on ctx.key and ctx.client",
    )


def _no_leak(run: _Run) -> str | None:
    """Client 0's inputs are changed; the rows that client 1 stores must not be."""
    stream = run.problem.stream
    if not isinstance(stream, ToyStream):
        return None
    other = dataclasses.replace(stream, x=stream.x.at[0].add(100.0))
    memories = []
    for data in (stream, other):
        state = run.rounds(run.vmap, [[0, 2], [0, 2]], stream=data)
        same = state.server._replace(params=run.problem.params)
        state = state._replace(server=same)
        state = run.rounds(run.vmap, [[1, 3], [1, 3]], state, first=2, stream=data)
        memories.append(tree.gather(state.clients.memory, jnp.int32(1)))
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, memories), strict=True)
    for (path, a), (_, b) in pairs:
        like_rows = a.ndim >= 2 and a.shape[-1] == FEATURES
        if like_rows and not np.array_equal(a, b):
            return (
                f"memory {jax.tree_util.keystr(path)} of client 1 holds rows of client "
                "0: a client's rows may only stay in its own memory, and what `end` "
                "tells goes to everyone"
            )
    return None


def _absent(run: _Run) -> str | None:
    after = run.rounds(run.vmap, COHORTS[:1], present=False)
    return _different(
        run.start(), after, 0.0, "a round without anyone changed the state"
    )


def _context(p: Problem, server: base.ServerState, client: int, t: int) -> base.Context:
    return base.Context(
        key=jax.random.key(t),
        client=jnp.int32(client),
        task=p.stream.task(jnp.int32(client), jnp.int32(t)),
        boundary=jnp.array(False),
        round=jnp.int32(t),
        step=jnp.int32(0),
        anchor=server.params,
        shared=server.shared,
        loss_fn=p.loss_fn,
    )


def _penalty(method: base.ClientTransform, p: Problem, state: base.State, client: int):
    """The method's own loss as a function of the parameters, late in the stream."""
    t = ROUNDS
    memory = tree.gather(state.clients.memory, jnp.int32(client))
    ctx = _context(p, state.server, client, t)
    visit = _engine.visit_of(p.stream, ctx.key, jnp.int32(client), jnp.int32(t))
    batch = method.batch(memory, tree.gather(visit.batches, jnp.int32(0)), ctx)

    def value(params):
        aux = p.loss_fn(params, batch, ctx.key)[1]
        return jnp.asarray(method.loss(memory, params, batch, aux, ctx), jnp.float32)

    return value


def _live_penalty(method: base.ClientTransform, run: _Run) -> str | None:
    p, state = run.problem, run.reference()
    moved = jax.tree.map(lambda x: x + 0.1, state.server.params)
    for client in range(2):
        value, grads = jax.value_and_grad(_penalty(method, p, state, client))(moved)
        if abs(float(value)) > 1e-6 and float(tree.vdot(grads, grads)) == 0:
            return (
                f"`loss` is {float(value):.3g} and its gradient is zero: it does not "
                "depend on the `params` (or `aux`) that it is given, but on a copy"
            )
    return None


def _no_captured_arrays(method: base.ClientTransform, p: Problem) -> str | None:
    """Arrays of the shape of a parameter that a hook closes over never move."""
    example = p.stream.example()
    memory = method.init(p.params, example)
    shapes = {x.shape for x in jax.tree.leaves(p.params) if x.ndim > 0}
    blank = {k: jnp.zeros(s.shape, s.dtype) for k, s in example.items()}
    aux = p.loss_fn(p.params, blank, jax.random.key(0))[1]
    told = jax.eval_shape(lambda m: method.end(m, p.params, _bare(p, ()))[1], memory)
    ctx = _bare(p, tree.zeros_like(told))
    hooks: dict[str, Callable] = {
        "begin": lambda m, q: method.begin(m, q, ctx),
        "loss": lambda m, q: method.loss(m, q, method.batch(m, blank, ctx), aux, ctx),
        "update": lambda m, q: method.update(q, m, q, blank, aux, ctx),
        "end": lambda m, q: method.end(m, q, ctx),
    }
    own = [ctx.anchor, ctx.shared, aux]
    known = {id(x) for x in jax.tree.leaves((own, blank))}
    for name, hook in hooks.items():
        consts = jax.make_jaxpr(hook)(memory, p.params).consts
        for x in consts:
            if jnp.shape(x) in shapes and id(x) not in known:
                return (
                    f"hook `{name}` closes over an array of shape {jnp.shape(x)}, like a "
                    "parameter's: it is frozen at the first trace. Keep it in the memory"
                )
    return None


def _bare(p: Problem, shared: PyTree) -> base.Context:
    params = jax.tree.map(jnp.copy, p.params)
    n, version = jnp.float32(p.stream.num_clients), jnp.int32(0)
    server = base.ServerState(params, None, (), shared, (), n, version)
    return _context(p, server, 0, 0)


def _same_bits(a: base.Algorithm, b: base.Algorithm, p: Problem) -> str | None:
    ends = [_Run(algorithm, p).reference().server.params for algorithm in (a, b)]
    return _different(*ends, 0.0, "the parameters part from FedAvg's")


def _different(a: PyTree, b: PyTree, tolerance: float, what: str) -> str | None:
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(a),
        jax.tree_util.tree_leaves_with_path(b),
        strict=True,
    )
    for (path, x), (_, y) in pairs:
        if not np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
            gap = float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float))))
            return f"{what} (at {jax.tree_util.keystr(path)}, by {gap:.3g})"
    return None


def check_stream(stream: Any, *, rounds: int = 4) -> list[str]:
    """Checks that a stream is a pure function of (key, client, round).

    Args:
      stream: any stream, see `fedcl.base.StreamLike`.
      rounds: how many rounds to look at.

    Returns:
      The names of the rules that were checked.

    Raises:
      AssertionError: listing every rule that does not hold.

    >>> len(check_stream(toy_problem().stream))
    5
    """
    key, n = jax.random.key(3), min(stream.num_clients, 4)
    one = lambda c, t: stream.sample(
        jax.random.fold_in(key, c), jnp.int32(c), jnp.int32(t)
    )
    grid = [(c, t) for t in range(rounds) for c in range(n)]

    def shapes() -> str | None:
        want = tree.describe(stream.example())
        got = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], one(0, 0)))
        if tree.describe(got) != want:
            return f"example() says {want}, a batch is {tree.describe(got)}"
        return None

    def deterministic() -> str | None:
        jitted = jax.jit(lambda k, c, t: stream.sample(k, c, t))
        for c, t in grid:
            again = jitted(jax.random.fold_in(key, c), jnp.int32(c), jnp.int32(t))
            told = _different(one(c, t), again, 1e-6, f"client {c}, round {t}")
            if told:
                return f"{told}: jitted and plain draws part"
        return None

    def by_identity() -> str | None:
        t = jnp.int32(0)
        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(n))
        together = jax.vmap(lambda k, c: stream.sample(k, c, t))(keys, jnp.arange(n))
        for c in range(n):
            row = tree.gather(together, jnp.int32(c))
            told = _different(one(c, 0), row, 1e-6, f"client {c}")
            if told:
                return f"{told}: a client's draw depends on who is drawn with it"
        return None

    def masks() -> str | None:
        for c, t in grid:
            batch = one(c, t)
            if not bool(jnp.all(batch["mask"] >= 0)):
                return f"client {c}, round {t}: a negative mask"
            real = float(jnp.sum(batch["mask"])) > 0
            if real != bool(stream.present(jnp.int32(c), jnp.int32(t))):
                return f"client {c}, round {t}: present() and the mask disagree"
            if not bool(tree.finite(batch)):
                return f"client {c}, round {t}: NaN or Inf in a batch"
        return None

    def tasks() -> str | None:
        for c, t in grid:
            k = stream.task(jnp.int32(c), jnp.int32(t))
            if jnp.shape(k) != () or k.dtype != jnp.int32 or int(k) < 0:
                return f"client {c}, round {t}: task is {k!r}, not an int32 from 0"
        return None

    return _report(
        {
            "shapes are those of example()": shapes,
            "pure under jit": deterministic,
            "by identity under vmap": by_identity,
            "masks are sound": masks,
            "tasks are sound": tasks,
        }
    )
