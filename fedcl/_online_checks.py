"""What an online server refuses, before anything is touched."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import base, tree
from fedcl._online_desk import Desk
from fedcl._online_staleness import Rule, Scaling

PyTree = Any


class Refusal(Exception):
    """Why an arrival is not taken."""


def options(
    algorithm: base.Algorithm,
    stream: Any,
    num_clients: int,
    positive: dict[str, int],
    max_staleness: int,
    faults: str,
) -> None:
    """Checks a server's arguments against each other."""
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"Server: {name} is {value}; it must be 1 or more.")
    if max_staleness < 0:
        raise ValueError(
            f"Server: max_staleness is {max_staleness}; it must be 0 or more."
        )
    if faults not in ("raise", "drop"):
        raise ValueError(f'Server: faults is {faults!r}; it must be "raise" or "drop".')
    if stream is None and algorithm.review is not None:
        raise ValueError(
            "This algorithm passes once more over every context that ends (its hook "
            "`review`), which needs a stream: give stream=, or use a method that "
            "accumulates while it trains, such as ewc or mas."
        )
    if stream is not None and stream.num_clients != num_clients:
        raise ValueError(
            f"The state has {num_clients} clients and the stream "
            f"{stream.num_clients}: give algorithm.init the stream's num_clients."
        )


def scaled(rule: Rule, message: base.Message, params: base.Params) -> None:
    """Refuses a rule that scales updates of φ where messages hold something else."""
    phi, sent = tree.describe(params), tree.describe(message.delta)
    more = tree.describe(message.sums)
    if not isinstance(rule, Scaling) or (sent.items() <= phi.items() and not more):
        return
    lines = [f"  delta/{p}: {x}" for p, x in sent.items() if phi.get(p) != x]
    lines += [f"  sums/{p}: {x}" for p, x in more.items()]
    raise ValueError(
        "Server: staleness= is a rule that scales late updates of φ, and this "
        "algorithm's server steps by numbers that are no such updates:\n"
        + "\n".join(lines[:5])
        + "\nGive staleness=discount(constant()), with which every message counts as it "
        "was sent (max_staleness= says how late is too late), or a rule of your own."
    )


def like_params(
    algorithm: base.Algorithm, server: base.ServerState, buffer: base.Message
) -> None:
    """Refuses messages with updates like φ where the algorithm has another kind."""
    try:
        jax.eval_shape(lambda *a: algorithm.aggregate(*a), server, buffer)
    except Exception as e:
        raise ValueError(
            "Server: without a stream, messages were taken to hold an update like φ and "
            f"nothing else, and this algorithm's `aggregate` does not take them ({e}): "
            "give example=, that of algorithm.init, from which the server learns what "
            "its clients send."
        ) from e


def present(desk: Desk, client: Any, what: str, *, joined: bool = True) -> int:
    """The id of a client of the population that has joined."""
    n = len(desk.joined)
    if not isinstance(client, int | np.integer) or isinstance(client, bool):
        raise Refusal(f"Client {client!r} {what}: a client's id is an integer.")
    if not 0 <= client < n:
        raise Refusal(
            f"Client {client} {what}, and the population has clients 0 to {n - 1}: "
            "algorithm.init(…, num_clients=) says how many can ever join."
        )
    if joined and not desk.joined[client]:
        raise Refusal(f"Client {client} {what} and is not there: Join({client}) first.")
    return int(client)


def base_version(desk: Desk, event: Any, now: int) -> int:
    """The version that an update started from, if it may count."""
    client, held = event.client, int(desk.held[event.client])
    version = held if event.base is None else event.base
    if not isinstance(version, int | np.integer) or not 0 <= version <= now:
        raise Refusal(
            f"The update of client {client} says that it started from version "
            f"{version}, and the server is at version {now}: no such version was sent."
        )
    newer = event.base is not None and version > desk.sent[client]
    if not newer and not (desk.open[client] and version == held):
        raise Refusal(
            f"The update of client {client} from version {version} is a duplicate, or it "
            f"comes without a download: its last one accepted was from version "
            f"{desk.sent[client]}. A client that trains again sends Download({client}) "
            "before."
        )
    return int(version)


def real_message(like: base.Message, message: Any, client: int) -> base.Message:
    """A message of the right structure and of a real weight."""
    message = fitting(like, message, f"client {client}'s message")
    weight = float(message.weight)
    if not (math.isfinite(weight) and weight >= 0):
        raise Refusal(
            f"The message of client {client} has weight {weight}: it must be finite and "
            "0 or more."
        )
    return message


def fitting(like: PyTree, given: PyTree, what: str) -> PyTree:
    """`given` on the device, if it has the structure, shapes and types of `like`."""
    given = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), given)
    want, got = _described(like), _described(given)
    shape_of: Any = jax.tree.structure  # Its type does not know equality.
    same = shape_of(like) == shape_of(given)
    if want == got and same:
        return jax.tree.map(jnp.asarray, given)
    paths = [p for p in {**want, **got} if want.get(p) != got.get(p)]
    lines = [
        f"  {p}: expected {want.get(p, 'nothing')}, got {got.get(p, 'nothing')}"
        for p in paths[:5]
    ]
    tree_ = [f"  expected {jax.tree.structure(like)}, got {jax.tree.structure(given)}"]
    raise Refusal(f"{what} does not fit this federation:\n" + "\n".join(lines or tree_))


def _described(a: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(a)[0]
    name = jax.tree_util.keystr
    return {name(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}
