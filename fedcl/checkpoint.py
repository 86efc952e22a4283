"""Saving and resuming runs: whole checkpoints or none.

A directory holds `steps/N/`, the federation after N rounds (orbax, written aside
and renamed when complete), and `history/A-B.npz`, what rounds A to B recorded. A
resumed run reads the newest whole step and the history up to it, so what follows is
bit-identical to a run that was never stopped.
"""

import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import _frozen, _hosts, _placement, base, tree

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or a directory that cannot be written."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything was saved. `exit_code` is the shell's convention."""

    exit_code = 130


class Saved(NamedTuple):
    """What `Checkpoints.open` found."""

    state: base.State
    round: int
    rounds: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    at: np.ndarray


class Checkpoints:
    """Where, and how often, a run saves itself.

    The one object of the library with a state of its own, as files have. Of several
    processes each writes its own part of the state, and the first all the rest: they
    need one directory that all of them see. What they saved, one process can resume.

    Args:
      directory: a directory of its own; made if absent.
      every: rounds between checkpoints; saved at the first look from the host at or
        after each multiple, and at the end.
      identity: what makes the run what it is (a resolved experiment, say); a
        checkpoint with another identity is refused. JSON values.
      keep: how many of the newest checkpoints stay.

    Raises:
      CheckpointError: if the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: int = 1,
        identity: Mapping[str, Any] | None = None,
        keep: int = 2,
    ):
        if every < 1 or keep < 1:
            raise ValueError(
                f"every is {every} and keep {keep}; both must be 1 or more."
            )
        self.directory = Path(directory).absolute()
        self._every = every
        self._keep = keep
        self._identity = json.loads(json.dumps(identity or {}))
        self._orbax: Any = None
        self._seeded = False
        self._known = ""
        self._saved = 0
        self._recorded = 0
        self._failed = False
        _make_writable(self.directory / "history")
        _make_writable(self.directory / "steps")

    def open(
        self, state: base.State, key: jax.Array, *, resume: bool, frozen: PyTree = None
    ) -> Saved | None:
        """Starts or resumes.

        Args:
          state: the state at round 0, for structure, types and placement.
          key: the run's key.
          resume: whether to continue from what is there.
          frozen: what of θ is no part of `state`, as it does not change. It is not
            saved; with another one it is another experiment.

        Returns:
          What to continue from, or None to start at round 0.

        Raises:
          CheckpointError: if there are checkpoints and `resume` is False, or if they
            are of another experiment.
        """
        self._seeded = key.ndim == 1
        self._known = _frozen.fingerprint(frozen)
        step = self.latest()
        if step is None:
            self._forget_after(-1)
            return None
        if not resume:
            raise CheckpointError(
                f"{self.directory} already holds a run at round {step}: continue it with "
                "resume=True (--resume), or choose another directory."
            )
        self._check_same(step, state, key)
        arrays = self._load(step, state, key)
        self._forget_after(step)
        self._saved = self._recorded = step
        rounds, evaluations, at = self._history()
        return Saved(_unpack(arrays, state), step, rounds, evaluations, at)

    def latest(self) -> int | None:
        """The round of the newest whole checkpoint."""
        return _hosts.agreed(self._latest())

    def _latest(self) -> int | None:
        return max(self.whole(), default=None)

    def whole(self) -> list[int]:
        """The rounds of all whole checkpoints."""
        return [
            int(p.name)
            for p in (self.directory / "steps").iterdir()
            if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").is_file()
        ]

    def record(self, done: int, fresh: Any) -> None:
        """Writes what the rounds up to `done` recorded, whole or not at all."""
        if _hosts.agreed(not _hosts.first() or self._write(done, fresh)):
            self._recorded = done

    def _write(self, done: int, fresh: Any) -> bool:
        name = f"{self._recorded:09d}-{done:09d}.npz"
        columns = {f"rounds:{k}": v for k, v in fresh.rounds.items()}
        columns |= {f"evaluations:{k}": v for k, v in fresh.evaluations.items()}
        path = self.directory / "history" / name
        aside = path.with_suffix(".tmp")
        try:
            with open(aside, "wb") as file:
                np.savez(file, at=fresh.at, **columns)
            os.replace(aside, path)
        except OSError as e:
            self._cannot_write(e)
            return False
        return True

    def due(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` rounds."""
        return done // self._every > self._saved // self._every

    def save(
        self, done: int, state: base.State, key: jax.Array, *, force: bool = False
    ) -> None:
        """Saves in the background if a checkpoint is due.

        A failing disk does not end the run: it warns, and the last whole checkpoint
        stays.
        """
        wanted = (self.due(done) or force) and done != self._saved
        if not wanted or self._recorded < done:
            return
        manifest = {"round": done, **self._about(state, key)}
        # The copy outlives the donation of `state` to the next round.
        arrays = {k: jnp.copy(v) for k, v in _pack(state).items()}
        try:
            self._checkpointer().save_checkpointables_async(
                done, {"state": arrays, "manifest": manifest}, force=True
            )
        except (OSError, ValueError) as e:
            self._cannot_write(e)
            return
        self._saved = done

    def close(self) -> None:
        """Waits until everything is on disk."""
        if self._orbax is not None:
            try:
                self._orbax.close()
            except (OSError, ValueError) as e:
                self._cannot_write(e)
            self._orbax = None

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            from orbax.checkpoint import v1 as ocp

            training: Any = ocp.training
            self._orbax = training.Checkpointer(
                self.directory / "steps",
                preservation_policy=training.preservation_policies.LatestN(self._keep),
                save_decision_policy=_Always(),
                cleanup_tmp_directories=True,
            )
        return self._orbax

    def _about(self, state: base.State, key: jax.Array) -> dict[str, Any]:
        """What another run's checkpoint differs in."""
        return {
            "identity": self._identity,
            "state": tree.describe(state),
            "frozen base θ": self._known,
            "key": _key_text(key),
        }

    def _load(self, step: int, state: base.State, key: jax.Array) -> dict:
        abstract = {k: _abstract(v) for k, v in _pack(state).items()}
        try:
            loaded = self._checkpointer().load_checkpointables(
                step, {"state": abstract}
            )
        except Exception as e:
            raise CheckpointError(
                f"The checkpoint {self.directory / 'steps' / str(step)} cannot be read: "
                f"{e}. Remove that directory to continue from the one before it."
            ) from e
        return loaded["state"]

    def _check_same(self, step: int, state: base.State, key: jax.Array) -> None:
        loaded = self._checkpointer().load_checkpointables(step, {"manifest": None})
        there = loaded["manifest"]
        here = self._about(state, key)
        for what in here:
            if there.get(what) != here[what]:
                raise CheckpointError(
                    f"The checkpoint in {self.directory} belongs to another experiment; "
                    f"its {what} differs:\n{_differences(there.get(what), here[what])}\n"
                    "Choose another directory, or go back to the settings it had."
                )

    def _segments(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in (self.directory / "history").iterdir():
            match = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            if match:
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)

    def _forget_after(self, step: int) -> None:
        late = [path for _, stop, path in self._segments() if stop > step]
        for path in late if _hosts.first() else ():
            path.unlink()
        _hosts.agreed(None)  # The others read the directory after that.

    def _history(self) -> tuple[dict, dict, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        for _, _, path in self._segments():
            with np.load(path, allow_pickle=False) as columns:
                for name in columns.files:
                    parts.setdefault(name, []).append(columns[name])
        axis = lambda name: int(self._seeded and name != "at")
        joined = {k: np.concatenate(v, axis=axis(k)) for k, v in parts.items()}
        pick = lambda kind: {
            k.removeprefix(kind): v for k, v in joined.items() if k.startswith(kind)
        }
        return pick("rounds:"), pick("evaluations:"), joined["at"]

    def _cannot_write(self, error: Exception) -> None:
        if not self._failed:
            warnings.warn(
                f"{self.directory} cannot be written ({error}). The run goes on; the "
                f"last whole checkpoint is of round {self._saved}.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._failed = True


class _Always:
    """When to save is decided by `Checkpoints.save`."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise CheckpointError(
            f"{directory} cannot be written: {e.strerror or e}. Choose a directory you "
            "may write to, with room on its disk."
        ) from e


def _pack(state: base.State) -> dict[str, jax.Array]:
    """Leaves by path; those of no size have nothing to save."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {tree.path_string(p).replace("/", "."): x for p, x in leaves if x.size}


def _unpack(arrays: dict[str, jax.Array], like: base.State) -> base.State:
    def leaf(path, x):
        saved: Any = arrays.get(tree.path_string(path).replace("/", "."), x)
        return _placement.placed_like(x, saved)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _key_text(key: jax.Array) -> str:
    return f"{key.dtype} {jax.random.key_data(key).tolist()}"


def _differences(there: Any, here: Any) -> str:
    if not isinstance(there, dict):
        return f"  saved: {there}\n  given: {here}"
    there, here = _flat(there), _flat(here)
    names = [n for n in {**there, **here} if there.get(n) != here.get(n)]
    lines = [
        f"  {n}: saved {there.get(n, 'nothing')}, given {here.get(n, 'nothing')}"
        for n in names[:8]
    ]
    return "\n".join(lines)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for name, v in value.items():
        out |= _flat(v, f"{prefix}{name}.")
    return out


class Interrupt:
    """Turns Ctrl-C into a request that a run honours when it can save.

    A second Ctrl-C interrupts at once.

    Args:
      active: whether there is anything to save to; else Ctrl-C works as usual.
    """

    def __init__(self, active: bool):
        self.requested = False
        main = threading.current_thread() is threading.main_thread()
        self._active = active and main
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _on(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this segment …", file=sys.stderr)

    def error(self, done: int, rounds: int, directory: Path) -> Interrupted:
        """The exception that ends the run."""
        return Interrupted(
            f"Stopped after round {done} of {rounds}; saved in {directory}. Continue "
            "with resume=True (--resume)."
        )
