"""What a run will need, before it runs: bytes of the compiled programs, by part."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedcl import (
    _engine,
    _evaluation,
    _frozen,
    _hosts,
    _phase,
    _placement,
    _program,
    _stored,
    base,
    cohorts,
    phases,
    tree,
)
from fedcl._switches import NotStackedError
from fedcl._traffic import communication
from fedcl.store import Store

PyTree = Any
Shaped = jax.ShapeDtypeStruct
TEMPORARY = "temporaries"


class Report(NamedTuple):
    """Bytes of a run on one device; `str` makes a table of them.

    Attributes:
      parts: bytes by name; they add up to the peak, up to what a program need not keep.
      peak: the most that the rounds or the evaluation hold at once.
      limit: what there is, or None if the device does not say.
      cohort: bytes of the clients' messages held at once, a part of the temporaries.
      why: why so many messages are held.
      advice: what makes it smaller, the most promising first.
    """

    parts: dict[str, int]
    peak: int
    limit: int | None
    cohort: int
    why: str
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= self.limit

    def __str__(self) -> str:
        rows = [f"{name:<16}{_text(size):>12}" for name, size in self.parts.items()]
        held = f"  messages of the cohort held at once {_text(self.cohort)}: {self.why}"
        rows[-1] += held if self.why else ""
        peak = f"{'peak':<16}{_text(self.peak):>12}{self._there()}"
        return "\n".join([*rows, peak])

    def line(self) -> str:
        """The same in a line, without the parts that are empty."""
        parts = [f"{name} {_text(size)}" for name, size in self.parts.items() if size]
        held = f"; messages of the cohort held at once {_text(self.cohort)}: {self.why}"
        told = f"{_text(self.peak)}{self._there()}: {', '.join(parts)}"
        return told + (held if self.why else "")

    def _there(self) -> str:
        return "" if self.limit is None else f" of {_text(self.limit)}"


def report(
    algorithm: base.Algorithm | Sequence[phases.Phase],
    state: base.State,
    stream: base.StreamLike,
    *,
    key: jax.Array,
    rounds: int,
    cohort: cohorts.Sampler | None = None,
    schedule: _engine.Schedule = "vmap",
    mesh: Mesh | None = None,
    evaluate: Callable[[base.State], PyTree] | None = None,
    every: int | None = None,
    checkpoint: bool = False,
    donate: bool = False,
    limit: int | None = None,
) -> Report:
    """Bytes that `fedcl.run` with these arguments will need on one device.

    Args:
      algorithm: as in `fedcl.run`, like all others here.
      state: arrays, or `jax.ShapeDtypeStruct`s to ask before there are any; or from
        `fedcl.store.init`.
      stream: as in `fedcl.run`.
      key: as in `fedcl.run`.
      rounds: as in `fedcl.run`.
      cohort: as in `fedcl.run`.
      schedule: "vmap", "scan" or a chunk size.
      mesh: as in `fedcl.run`.
      evaluate: as in `fedcl.run`.
      every: as in `fedcl.run`.
      checkpoint: whether it saves itself, from a copy.
      donate: as in `fedcl.run`.
      limit: bytes that it may take; by default what the device has left, or on a CPU
        the machine, and what is there of the arguments.

    Returns:
      A `Report`.

    Raises:
      MemoryError: with the report and advice, if the peak is beyond the limit.

    Cost: compiles the run; a `fedcl.run` of the same list of phases, with the same
    arguments, finds the program ready.
    """
    program = _program.of(
        algorithm,
        stream,
        key=key,
        rounds=rounds,
        every=every,
        cohort=cohort,
        schedule=schedule,
        mesh=mesh,
    ).everywhere(mesh)
    if isinstance(state.clients, Store):
        _stored.check(algorithm, key, mesh, schedule)
        begun, lowered = _stored.lower(program.parts[0].federated, state, stream, key)
        begun = jax.eval_shape(program.begun, begun)
    else:
        program = program.of_state(state)
        begun = jax.eval_shape(program.begun, state)
        begun = _on(mesh, begun, program.seeded, state.server.frozen)
        lowered = program.lower(begun)
    temporary, held = _need(lowered.compile())
    test = _hosts.everywhere(_evaluation.as_tree(evaluate), mesh)
    if test is not None:
        temporary = max(temporary, _need(_tested(program, begun, test))[0])
    sizes = _sizes(begun, stream, program.parts, test)
    changing = _consumed(program, begun, state, mesh)
    passed = _bytes(changing[0].frozen if donate else changing)
    copy = _bytes((changing, begun.phases)) if checkpoint else 0
    sizes |= {"state passed in": passed, "checkpoint": copy, TEMPORARY: temporary}
    if limit is None:
        limit = _room(mesh, _resident((state, stream, program.parts, test)))
    found = Report(
        sizes,
        temporary + held + passed + copy + _bytes(test),
        limit,
        *_messages(program.parts, begun, stream, key, program.seeded),
        (),
    )
    found = found._replace(advice=_advice(found, program.parts))
    if not found.fits:
        listed = "\n".join(f"- {line}" for line in found.advice)
        raise MemoryError(f"This run will not fit:\n{found}\nWhat helps:\n{listed}")
    return found


def fits(compiled: Any, given: PyTree, mesh: Mesh | None) -> bool:
    """Whether a compiled program's temporaries and results fit beside its arguments."""
    room = _room(mesh, _resident(given))
    return room is None or sum(_need(compiled)) <= room


def _consumed(
    program: _program.Program, begun: base.State, state: base.State, mesh: Mesh | None
) -> tuple[base.ServerState, PyTree]:
    """What a run copies of the state that it is given, server and clients."""
    if isinstance(state.clients, Store):
        return begun.server, ()
    stays = lambda x, still: still and (mesh is None or _placement.lies_on(x, mesh))
    still = jax.tree.map(stays, state.server.frozen, program.still)
    copied = _frozen.without(begun, _frozen.held(begun, still))
    return copied.server, copied.clients


def _tested(program: _program.Program, state: base.State, test: Callable) -> Any:
    """The compiled evaluation."""
    parts, seeded = program.parts, program.seeded
    seen = jax.eval_shape(_evaluation.viewed(test, state, parts, seeded), state)
    return _evaluation.evaluated.lower(seen, test, seeded=seeded).compile()


def _need(compiled: Any) -> tuple[int, int]:
    """Bytes of temporaries, and of what goes in and out."""
    m = compiled.memory_analysis()
    own = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.temp_size_in_bytes, m.argument_size_in_bytes + max(own, 0)


def _on(
    mesh: Mesh | None, state: base.State, seeded: bool, frozen: PyTree
) -> base.State:
    """The shapes of a state, where `fedcl.run` places it; θ may lie there already."""
    if mesh is None:
        return state
    spec = _engine.P(None, _engine.AXIS) if seeded else _engine.P(_engine.AXIS)
    shaped = lambda x, where: Shaped(x.shape, x.dtype, sharding=where)

    def put(a, spec):
        where = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: shaped(x, where), a)

    def laid(x):
        there = _placement.lies_on(x, mesh)
        return shaped(x, x.sharding) if there else put(x, everywhere)

    everywhere = _engine.P()
    server = put(state.server._replace(frozen=None), everywhere)
    return base.State(
        server._replace(frozen=jax.tree.map(laid, frozen)),
        put(state.clients, spec),
        put(state.phases, everywhere),
    )


def _bytes(a: PyTree) -> int:
    """Of the arrays and shapes in a tree, on one device."""
    arrays = [x for x in jax.tree.leaves(a) if hasattr(x, "dtype")]
    where = [getattr(x, "sharding", None) for x in arrays]
    own = [
        x if w is None else Shaped(w.shard_shape(x.shape), x.dtype)
        for x, w in zip(arrays, where, strict=True)
    ]
    return tree.size(own)


def _sizes(state: base.State, stream, parts, evaluate) -> dict[str, int]:
    base_ = _bytes(state.server.frozen)
    return {
        "base θ": base_,
        "φ and server": _bytes(state.server) - base_,
        "client states": _bytes(state.clients),
        "phases": _bytes(state.phases) + _bytes([p.data for p in parts]),
        "stream": _bytes(stream),
        "evaluation": _bytes(evaluate),
    }


def _messages(parts, state, stream, key, seeded: bool) -> tuple[int, str]:
    """Bytes of messages that the federated phases hold at once, and why."""
    seeds = key.shape[0] if seeded else 1
    times = f"{seeds} seeds × " if seeds > 1 else ""
    if seeded:
        drop = lambda x: Shaped(x.shape[1:], x.dtype)
        state, key = jax.tree.map(drop, (state, key))
    total, told = 0, ""
    for part in parts:
        if part.federated is not None:
            held, why = _held(part.federated, parts, state, stream, key)
            size = communication(part.federated.algorithm, state, stream).up
            each = f" ({times}{held} × {_text(size)})"
            total, told = total + seeds * held * size, told or why + each
    return total, told


def _held(f: _phase.Federated, parts, state, stream, key) -> tuple[int, str]:
    n = stream.num_clients
    draw = lambda k: f.sampler.draw(k, jnp.int32(0), n).client
    c = jax.eval_shape(draw, key).shape[0]
    own = c // (1 if f.mesh is None else f.mesh.shape[_engine.AXIS])
    if not isinstance(f.algorithm.aggregate, base.Folding):
        return own, "the server needs each client's message, not their sum"
    if f.schedule == "vmap":
        return own, f'schedule="vmap" trains all {own} at once'
    if _reads_messages(parts, state, stream, key):
        return own, "another part of the round reads what each client sent"
    size = 1 if f.schedule == "scan" else min(int(f.schedule), own)
    return size, f"{size} at a time are added up"


def _reads_messages(parts, state, stream, key) -> bool:
    step = partial(_phase._step, parts, fold=True)
    try:
        jax.eval_shape(step, state, key, jnp.int32(0), stream)
    except NotStackedError:
        return True
    return False


def _advice(r: Report, parts: tuple[phases.Phase, ...]) -> tuple[str, ...]:
    """What helps, by how much it could."""
    at_once = any(p.federated and p.federated.schedule == "vmap" for p in parts)
    helps = [
        (
            r.parts["client states"],
            "fedcl.store.init, or federation.store in a file, keeps the clients' states "
            "in files, fedcl.offload in the host's memory",
        ),
        (
            r.parts[TEMPORARY] if at_once else 0,
            'schedule="scan", or a chunk size, trains fewer clients at a time',
        ),
        (
            r.cohort if "needs each" in r.why else 0,
            "a smaller cohort, or aggregation.weighted_mean() which adds messages up",
        ),
        (
            r.parts[TEMPORARY] // 2,
            "fedcl.compute: rematerialised (client.remat) keeps fewer activations, "
            "accumulated (client.accumulate) takes a batch in parts",
        ),
        (
            r.parts["evaluation"],
            "an evaluation of fewer rows, or in smaller chunks",
        ),
    ]
    ordered = sorted(helps, key=lambda h: -h[0])
    return tuple(text for size, text in ordered if size)


def _resident(a: PyTree) -> int:
    """Bytes of a run's arrays that are on a device already, and so not in its room."""
    return _bytes([x for x in jax.tree.leaves(a) if isinstance(x, jax.Array)])


def _room(mesh: Mesh | None, there: int) -> int | None:
    """Bytes that a run may hold on a device, beside what others do; None: unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        left = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        left = _machine() if jax.default_backend() == "cpu" else None
        left = left and left // (1 if mesh is None else len(mesh.local_devices))
    return _hosts.least(None if left is None else left + there)


def _machine() -> int | None:
    """Bytes left in the machine, and in the process's part of it."""
    memory, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not memory.exists():
        return None
    left = _numbers(memory)["MemAvailable:"] * 1024
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        used = int((group / "memory.current").read_text())
        files = _numbers(group / "memory.stat")["inactive_file"]
        left = min(left, int(limit.read_text()) - used + files)
    return max(left, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The first two words of each line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
