"""Small federations that several tests share."""

import gzip
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fedcl
from fedcl import _experiment_run as _run
from fedcl import losses, metrics, models, phases, reservoir, testing, tree


def replaying():
    """Memory, randomness and a boundary in one small transform."""

    def batch(memory, params, batch, ctx):
        return fedcl.append(batch, reservoir.sample(memory, 2, ctx.key))

    def update(grads, memory, params, batch, aux, ctx):
        return grads, reservoir.add(memory, batch, jax.random.fold_in(ctx.key, 1))

    init = lambda params, example: reservoir.empty(example, 6)
    return fedcl.transform(init=init, batch=batch, update=update)


def many(problem: testing.Problem, n: int) -> testing.Problem:
    """The toy problem with n clients, a multiple of four, some of them alike."""
    again = lambda a: jnp.concatenate([jnp.roll(a, i, axis=2) for i in range(n // 4)])

    class Many(testing.ToyStream):
        num_clients = n

    jax.tree_util.register_dataclass(Many)
    s = problem.stream
    return problem._replace(stream=Many(again(s.x), again(s.y)))


def deep(hidden: int = 7) -> testing.Problem:
    """The toy problem with a hidden layer whose activations are the loss's features."""
    problem, key = testing.toy_problem(), jax.random.key(4)
    draw = lambda i, *shape: 0.5 * jax.random.normal(jax.random.fold_in(key, i), shape)
    params = {
        "lower": draw(0, testing.FEATURES, hidden),
        "kernel": draw(1, hidden, testing.CLASSES),
    }

    def outputs(params, x, key):
        features = jnp.tanh(x @ params["lower"])
        return losses.Output(features @ params["kernel"], features)

    return problem._replace(params=params, loss_fn=losses.softmax(outputs))


def sigmoids() -> testing.Problem:
    """The toy problem with a sigmoid for each class, its inputs as features."""
    outputs = lambda p, x, key: losses.Output(x @ p["kernel"] + p["bias"][None], x)
    return testing.toy_problem()._replace(loss_fn=losses.sigmoid(outputs))


def idx_bytes(array: np.ndarray, code: int) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def mnist_files(directory, sizes=(6, 4)):
    rng = np.random.default_rng(0)
    for part, n in zip(("train", "t10k"), sizes, strict=True):
        x = rng.integers(0, 256, (n, 28, 28), np.uint8)
        y = np.arange(n, dtype=np.uint8) % 3
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            path = directory / f"{part}-{name}-ubyte"
            content = idx_bytes(array, 8)
            if part == "t10k":
                path, content = (
                    path.with_name(f"{path.name}.gz"),
                    gzip.compress(content),
                )
            path.write_bytes(content)


def adapted_problem(accumulator: int | None = None):
    """The toy problem's classifier with an adapter and an accumulator; model, params."""
    problem, rank = testing.toy_problem(), 2
    model = models.from_nnx(
        lambda rngs: nnx.Linear(testing.FEATURES, testing.CLASSES, rngs=rngs)
    )
    adapted = models.lora(
        model, problem.params, rank=rank, alpha=4.0, key=jax.random.key(5)
    )
    model, params = models.accumulated(*adapted, rank=accumulator)
    noise = 0.3 * jax.random.normal(jax.random.key(6), params["lora"]["b"].shape)
    params = params | {"lora": params["lora"] | {"b": noise}}
    return problem._replace(loss_fn=losses.softmax(model.apply)), model, params


def adapters() -> testing.Problem:
    """The toy problem with an adapter beside its kernel, all of them φ."""
    problem, _, params = adapted_problem()
    rest = {name: x for name, x in params.items() if name != "accumulator"}
    model = models.from_nnx(
        lambda rngs: nnx.Linear(testing.FEATURES, testing.CLASSES, rngs=rngs)
    )
    bare = {name: x for name, x in rest.items() if name != "lora"}
    model, _ = models.lora(model, bare, rank=2, alpha=4.0, key=jax.random.key(5))
    return problem._replace(params=rest, loss_fn=losses.softmax(model.apply))


def bytes_up(given: Any) -> dict[str, int]:
    """What a client of each arm sends; the arm's round fits the engine, by its shapes."""
    quiet = lambda event: None
    made = _run._ready(given, _run.prepare(given, quiet), quiet)
    return {arm: _sent(ready) for arm, ready in made.items()}


def _sent(ready: _run.Ready) -> int:
    parts, stream = ready.parts, ready.stream
    one = jax.tree.map(lambda x: x[0], ready.begin())
    begun = jax.eval_shape(lambda s: phases.start(parts, s), one)
    step = lambda s, key: phases.step(parts, s, key, jnp.int32(0), stream)
    after = jax.eval_shape(step, begun, jax.random.key(0))[0]
    assert tree.describe(after) == tree.describe(begun)
    return metrics.communication(ready.algorithm, one, stream, parts).up
