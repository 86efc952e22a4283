"""Client states in files: populations that no device holds.

A store has a row for every client and a file for every leaf, mapped into memory, so
that the operating system keeps what is used. A client that has not taken part yet is
nowhere on disk: its row is the one that everybody starts from. A round reads the rows
of its cohort, runs on the device, and writes them back.

With checkpoints, a round first writes aside what it will overwrite, `undo/T.npz`, so
that after a kill the rows are taken back to the last whole checkpoint.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import base, tree

PyTree = Any
Mode = Literal["r+", "w+"]
MANIFEST = "store.json"


class Store:
    """The states of N clients in a folder; made by `init`, `move` or `open_`.

    Attributes:
      num_clients: N.
      folder: where the files are.
    """

    def __init__(
        self, folder: Path, row: base.ClientState, num_clients: int, mode: Mode
    ):
        self.folder, self.num_clients = folder, num_clients
        leaves, self._shape = jax.tree.flatten(row)
        self._first = [np.asarray(x) for x in leaves]
        each = enumerate(self._first)
        self._rows = [self._map(f"{i}.rows", x.dtype, x.shape, mode) for i, x in each]
        self._begun = self._map("begun.rows", np.dtype(bool), (), mode)
        self._done = np.memmap(folder / "round", np.int64, mode, shape=(1,))
        (folder / "undo").mkdir(exist_ok=True)

    def _map(self, name: str, dtype: np.dtype, shape: tuple, mode: Mode) -> np.ndarray:
        shape = (self.num_clients, *shape)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.folder / name, dtype, mode, shape=shape)

    def shapes(self, size: int) -> base.ClientState:
        """Those of the states of so many clients."""
        leaf = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)
        return jax.tree.unflatten(self._shape, list(map(leaf, self._first)))

    def gather(self, ids: np.ndarray) -> base.ClientState:
        """The states of some clients, [C, ...] per leaf; unknown ids read the last."""
        ids = np.clip(ids, 0, self.num_clients - 1)
        begun = self._begun[ids]

        def leaf(rows, first):
            flags = begun.reshape(-1, *[1] * first.ndim)
            return np.where(flags, rows[ids], first[None])

        read = map(leaf, self._rows, self._first)
        return jax.tree.unflatten(self._shape, list(read))

    def scatter(self, ids: np.ndarray, states: base.ClientState) -> None:
        """Writes the states of some clients; unknown ids are left out."""
        known = (ids >= 0) & (ids < self.num_clients)
        for rows, new in zip(self._rows, jax.tree.leaves(states), strict=True):
            rows[ids[known]] = np.asarray(new)[known]
        self._begun[ids[known]] = True

    def step(self, t: int, ids: np.ndarray, states: base.ClientState, undo: bool):
        """Writes the states after round `t`; `undo` keeps what they were."""
        if undo:
            self._remember(t, ids)
        self.scatter(ids, states)
        self._done[0] = t + 1

    def rewind(self, t: int) -> None:
        """Takes all rows back to the end of round `t`.

        Raises:
          ValueError: if the rounds since then cannot be undone.
        """
        done = int(self._done[0])
        if done < t:
            raise ValueError(
                f"The store {self.folder} has seen {done} rounds and the run goes on "
                f"after {t}: it is not the store of this run."
            )
        # A kill may come between what is written aside and the round itself.
        for at in sorted(self._undone(), reverse=True):
            if at >= t:
                self._undo(at)
        left = int(self._done[0])
        if left != t:
            raise ValueError(
                f"The store {self.folder} has seen {left} rounds, which cannot be undone "
                f"to {t}: they ran without checkpoints. Remove it to start again."
            )

    def forget(self, before: int) -> None:
        """Drops what rounds before `before` wrote aside."""
        for at in self._undone():
            if at < before:
                self._aside(at).unlink()

    def settle(self) -> None:
        """After a run: what it wrote is there to stay, and rounds count from 0 again."""
        self.flush()
        self._done[0] = 0
        self.forget(2**62)

    def flush(self) -> None:
        """Waits until everything is on disk."""
        for rows in (*self._rows, self._begun, self._done):
            if isinstance(rows, np.memmap):
                rows.flush()

    def _aside(self, t: int) -> Path:
        return self.folder / "undo" / f"{t:09d}.npz"

    def _undone(self) -> list[int]:
        names = (p.name for p in (self.folder / "undo").iterdir())
        return [int(n[:-4]) for n in names if re.fullmatch(r"\d+\.npz", n)]

    def _remember(self, t: int, ids: np.ndarray) -> None:
        ids = ids[(ids >= 0) & (ids < self.num_clients)]
        old: dict[str, Any] = {f"{i}": r[ids] for i, r in enumerate(self._rows)}
        partial = self._aside(t).with_suffix(".tmp")
        with open(partial, "wb") as file:
            np.savez(file, ids=ids, begun=self._begun[ids], **old)
        os.replace(partial, self._aside(t))

    def _undo(self, t: int) -> None:
        with np.load(self._aside(t), allow_pickle=False) as old:
            for i, rows in enumerate(self._rows):
                rows[old["ids"]] = old[f"{i}"].view(rows.dtype)
            self._begun[old["ids"]] = old["begun"]
        self._done[0] = min(t, int(self._done[0]))
        self._aside(t).unlink()


def init(
    algorithm: base.Algorithm,
    params: base.Params,
    example: PyTree,
    num_clients: int,
    folder: str | os.PathLike,
    *,
    frozen: base.Params = None,
    resume: bool = False,
) -> base.State:
    """`algorithm.init`, with the clients' states in files.

    `fedcl.run` and `fedcl.loop` take the state as any other, for one seed on one device,
    and give the same federation; what they return has the same store, changed. An
    evaluation sees the server alone.

    Args:
      algorithm: whose clients all start alike, as those of `fedavg` do.
      params: φ.
      example: shapes of a batch, `stream.example()`.
      num_clients: N.
      folder: for the files; made if absent.
      frozen: θ.
      resume: continue with the store that is there, if there is one.

    Returns:
      The federation; `state.clients` is a `Store`.

    Raises:
      ValueError: if the folder holds a store and `resume` is False, if that is of
        another federation, or if clients do not start alike, see `move`.

    Cost: disk for the clients that took part; on the device, the states of a cohort.

    >>> import tempfile, optax
    >>> from fedcl import algorithms, testing
    >>> p, folder = testing.toy_problem(), tempfile.mkdtemp()
    >>> a = algorithms.fedavg(p.loss_fn, optax.sgd(0.1))
    >>> state = init(a, p.params, p.stream.example(), 10**6, f"{folder}/clients")
    >>> state.clients.gather(np.array([7, 999_999])).task
    array([-1, -1], dtype=int32)
    """
    two = algorithm.init(params, example, 2, frozen)
    each = jax.tree.map(lambda x: np.asarray(x), two.clients)
    if any((x[0] != x[1]).any() for x in jax.tree.leaves(each)):
        raise ValueError(
            "store.init: the clients of this algorithm do not start alike: make all of "
            "them with algorithm.init and take store.move(state, folder)."
        )
    row = jax.tree.map(lambda x: x[0], each)
    store: Any = _made(Path(folder), row, num_clients, resume)
    population = jnp.asarray(num_clients, two.server.population.dtype)
    return two._replace(
        server=two.server._replace(population=population), clients=store
    )


def move(state: base.State, folder: str | os.PathLike) -> base.State:
    """The same federation with its clients' states in files, whatever they are.

    Args:
      state: from `algorithm.init` or a run of one seed.
      folder: a new one.
    """
    rows = jax.tree.map(np.asarray, state.clients)
    n = jax.tree.leaves(rows)[0].shape[0]
    row = jax.tree.map(lambda x: x[0], rows)
    store: Any = _made(Path(folder), row, n, resume=False)
    store.scatter(np.arange(n), rows)
    return state._replace(clients=store)


def _made(folder: Path, row: base.ClientState, n: int, resume: bool) -> Store:
    here = {"clients": n, "row": tree.describe(row)}
    there = folder / MANIFEST
    if there.exists() and not resume:
        raise ValueError(
            f"{folder} already holds a store: continue it with resume=True, or choose "
            "another folder."
        )
    if there.exists():
        found = json.loads(there.read_text())
        if found != here:
            raise ValueError(
                f"The store {folder} is of another federation: it has {found}, this one "
                f"{here}. Choose another folder."
            )
        return Store(folder, row, n, "r+")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files: choose a folder for the store.")
    aside = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    Store(aside, row, n, "w+").flush()
    (aside / MANIFEST).write_text(json.dumps(here))
    os.replace(aside, folder)
    return Store(folder, row, n, "r+")
