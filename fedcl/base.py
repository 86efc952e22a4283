"""The vocabulary of the library: what a client sees, what a method is, what runs.

Axes are named once and for all: `C` clients of a cohort, `N` clients of the
population, `B` rows of a batch, `S` local steps, `T` rounds, `K` contexts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PyTree = Any
Params = PyTree  # The trainable leaves φ. Frozen leaves θ travel separately.
Batch = dict[str, jax.Array]  # Every leaf is [B, ...]; "mask" [B] weighs the rows.
Aux = PyTree  # What the loss returns besides the scalar, rows first: [B, ...].
Memory = PyTree  # What a method remembers on one client.
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Aux]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Everything a hook may read besides its own memory.

    Attributes:
      key: a PRNG key, one per transform and step: every hook of a step sees the
        same key, so `loss` can re-draw what `batch` drew. Fold in to get more.
      client: the client's id, ().
      task: the stream's task for this visit, (); 0 throughout if it is hidden.
      boundary: whether the task has changed since this client's last visit, ().
      round: the round, ().
      step: local step within the visit, ().
      anchor: the parameters the server sent at the start of the visit.
      shared: the mean over all clients of what the method's `end` told.
      loss_fn: the task's loss, with frozen parameters already bound.
      news: what the server's phases say to the clients of this round, by name, see
        `ServerState.news`.
    """

    key: jax.Array
    client: jax.Array
    task: jax.Array
    boundary: jax.Array
    round: jax.Array
    step: ArrayLike
    anchor: Params
    shared: PyTree
    loss_fn: LossFn = dataclasses.field(metadata={"static": True})
    news: PyTree = ()


class ClientTransform(NamedTuple):
    """A continual or federated learning method, as pure functions of one client.

    A local step is: draw a batch, differentiate a loss, update the parameters. A
    method may add rows to the batch, a term to the loss, or a change to the
    gradient; it may remember; and it may look once more at all rows of a context
    that ends. Every field has an identity default, see `fedcl.transform`; transforms
    compose with `fedcl.chain`.

    Attributes:
      init: `(params, example) -> memory`, an empty memory. `example` is the
        `jax.ShapeDtypeStruct` tree of one batch.
      begin: `(memory, params, ctx) -> memory`, once at the start of a visit; this
        is where memories are committed when `ctx.boundary` is set.
      batch: `(memory, params, batch, ctx) -> batch`, appends rows, see `fedcl.append`.
      loss: `(memory, params, batch, aux, ctx) -> scalar`, is added to the loss.
      update: `(grads, memory, params, batch, aux, ctx) -> (grads, memory)`, as in
        optax; `batch` is the stream's own batch, and its rows come first in `aux`.
      end: `(memory, params, ctx) -> (memory, told)`, once at the end of a visit
        with the client's final parameters; `told` is averaged over all clients
        into `ctx.shared` (a client that has not yet reported counts as zero), which
        this one hook must not read.
      review: `(memory, params, sweep, ctx) -> memory`, after the last round of the
        client's context: `sweep` is every row of it once, [S', B, ...], and `params`
        are the server's after that round. None: no such pass is made.
    """

    init: Callable[[Params, PyTree], Memory]
    begin: Callable[[Memory, Params, Context], Memory]
    batch: Callable[[Memory, Params, Batch, Context], Batch]
    loss: Callable[[Memory, Params, Batch, Aux, Context], ArrayLike]
    update: Callable[
        [Params, Memory, Params, Batch, Aux, Context], tuple[Params, Memory]
    ]
    end: Callable[[Memory, Params, Context], tuple[Memory, PyTree]]
    review: Callable[[Memory, Params, Batch, Context], Memory] | None = None


class ClientState(NamedTuple):
    """What persists on a client between visits; stacked to [N, ...], by client id."""

    memory: Memory
    told: PyTree  # What the server last heard from this client's `end`.
    opt_state: PyTree  # () unless the client keeps its optimiser between visits.
    task: jax.Array  # The task of the last visit, () int32; -1 before the first.
    version: jax.Array  # The server version last received, () int32; -1 likewise.
    kept: PyTree = ()  # What transformations of the algorithm keep, as `personal` does.


class ServerState(NamedTuple):
    """What the server holds and broadcasts."""

    params: Params  # φ
    frozen: Params  # θ, None if everything is trained.
    opt_state: PyTree  # Of the server chain.
    shared: PyTree  # Mean over the population of what clients told.
    client_opt: PyTree  # Averaged client optimiser state, () unless asked for.
    population: jax.Array  # N, () float32.
    version: jax.Array  # Aggregations so far, () int32.
    news: PyTree = ()  # A dict that phases write for later ones; () between rounds.


class State(NamedTuple):
    """The whole federation: one pytree, one checkpoint."""

    server: ServerState
    clients: ClientState
    phases: PyTree = ()  # One memory per phase, see `fedcl.phases`.
    sent: PyTree = ()  # `Sent`, after a federated phase; () between rounds.


class Visit(NamedTuple):
    """One client's part in one round."""

    batches: Batch  # [S, B, ...]
    task: jax.Array  # () int32
    client: jax.Array  # () int32
    round: jax.Array  # () int32
    key: jax.Array
    live: jax.Array | None = None  # [S] bool: steps with real rows; None means all.


class Message(NamedTuple):
    """What a client sends."""

    delta: Params  # Pseudo-gradient, anchor − params.
    weight: jax.Array  # () float32, 0 for a client that does not report.
    told: PyTree = ()  # Change of what the client tells, summed into `shared`.
    opt_state: PyTree = ()  # For the policy "average".
    sums: PyTree = ()  # What else the server adds up, such as Grams.


class Sent(NamedTuple):
    """What a cohort sent, for the later phases of the same round."""

    anchor: Params  # What every client of the cohort started from.
    messages: Message  # [C, ...]; weight 0 and zeros for who did not report.


class Added(NamedTuple):
    """In place of `Sent`, when the cohort was added up and its messages are gone."""


class Folding(NamedTuple):
    """An `aggregate` that can take a cohort in parts, whose sums are added.

    Attributes:
      whole: `(server, messages [C, ...]) -> server`.
      part: `(server, messages [c, ...]) -> sums`, of some of the clients; sums are a
        tree of arrays that add up.
      finish: `(server, sums) -> server`; equal to `whole` up to rounding.
    """

    whole: Callable[[ServerState, Message], ServerState]
    part: Callable[[ServerState, Message], PyTree]
    finish: Callable[[ServerState, PyTree], ServerState]

    def __call__(self, server: ServerState, messages: Message) -> ServerState:
        return self.whole(server, messages)


class Algorithm(NamedTuple):
    """A federated algorithm: pure functions of one client, and of one server.

    Attributes:
      init: `(params, example, num_clients, frozen=None) -> State`.
      client_update: `(server, client, visit) -> (message, client, metrics)`. No
        client axis: `fedcl.round_fn` maps it over the cohort.
      aggregate: `(server, messages) -> server`. Messages carry the cohort axis
        first; a client that does not report has weight 0 and zeros. If it is a
        `Folding`, a cohort taken client by client or in chunks is never stacked.
      review: `(server, client, visit) -> client`, of a client whose context ends,
        with every row of it once as the visit; None if there is nothing to do.
    """

    init: Callable[..., State]
    client_update: Callable[
        [ServerState, ClientState, Visit], tuple[Message, ClientState, PyTree]
    ]
    aggregate: Callable[[ServerState, Message], ServerState]
    review: Callable[[ServerState, ClientState, Visit], ClientState] | None = None


class StreamLike(Protocol):
    """What the engine asks of a stream; `fedcl.streams.Stream` is one."""

    @property
    def num_clients(self) -> int: ...

    @property
    def ragged(self) -> bool:
        """Whether a step of a present client may have no real rows."""
        ...

    def sample(self, key: jax.Array, client: jax.Array, round: jax.Array) -> Batch:
        """Batches of one visit, [S, B, ...], a pure function of its arguments."""
        ...

    def sweep(self, client: jax.Array, round: jax.Array) -> Batch:
        """Every row of the client's current context once, [S', B, ...]."""
        ...

    def task(self, client: jax.Array, round: jax.Array) -> jax.Array:
        """The task, () int32."""
        ...

    def present(self, client: jax.Array, round: jax.Array) -> jax.Array:
        """Whether the client takes part at all, () bool."""
        ...

    def ends(self, client: jax.Array, round: jax.Array) -> jax.Array:
        """Whether the client's context changes after this round, () bool."""
        ...

    def example(self) -> PyTree:
        """`jax.ShapeDtypeStruct`s of one batch, without the steps axis."""
        ...


class Stationary:
    """A stream of one context that never ends, for whoever has `sample` and no drift.

    Sub-classes are pytrees with `num_clients` and `sample`, and with `sweep` if a method
    asks for every row of a context.

    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Noise(Stationary):
    ...     num_clients = 3
    ...     def sample(self, key, client, round):
    ...         return {"x": jax.random.normal(key, (5, 4, 2)), "mask": jnp.ones((5, 4))}
    >>> Noise().example()["x"]
    ShapeDtypeStruct(shape=(4, 2), dtype=float32)
    """

    sample: Callable[..., Batch]
    ragged = False

    def task(self, client: jax.Array, round: jax.Array) -> jax.Array:
        return jnp.int32(0)

    def present(self, client: jax.Array, round: jax.Array) -> jax.Array:
        return jnp.array(True)

    def ends(self, client: jax.Array, round: jax.Array) -> jax.Array:
        return jnp.array(False)

    def example(self) -> PyTree:
        visit = jax.eval_shape(self.sample, jax.random.key(0), 0, 0)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), visit)
