"""fedcl's side: one client, `fedcl.run`."""

from collections.abc import Callable

import jax
import optax
from replay import Work, measure, mnist

import fedcl
from fedcl import algorithms, losses, models, streams


def prepare(work: Work, data: str) -> Callable[[], None]:
    x, y = mnist(data)
    rounds = 10  # Per context.
    stream = streams.class_incremental(
        streams.arrays(x, y),
        num_contexts=5,
        num_clients=1,
        rounds_per_context=rounds,
        steps=work.steps // rounds,
        batch_size=work.batch,
    )
    model = models.mlp((784, *work.hidden, 10))
    replay = (
        algorithms.derpp(work.capacity, work.replayed, num_classes=10)
        if work.logits
        else algorithms.replay(work.capacity, work.replayed, past_only=True)
    )
    opt = getattr(optax, work.optimizer)(work.learning_rate)
    loss = losses.softmax(model.apply)
    algorithm = algorithms.fedavg(loss, opt, transform=replay, opt_policy="keep")
    state = algorithm.init(model.init(jax.random.key(0)), stream.example(), 1)

    def go() -> None:
        end = fedcl.run(
            algorithm, state, stream, key=jax.random.key(1), rounds=5 * rounds, every=10
        )[0]
        jax.block_until_ready(end)

    return go


if __name__ == "__main__":
    measure("fedcl", prepare)
