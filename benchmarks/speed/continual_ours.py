"""fedcl's side of the continual work."""

import jax
import optax
from continual import WORK, Work, rows_of
from work import measured

import fedcl
from fedcl import algorithms, cohorts, losses, models, phases, streams, tree


def prepare(work: Work):
    """`() -> (accuracy, what else is told)`, a whole run."""
    x, y = rows_of(work)
    stream = streams.class_incremental(
        streams.arrays(x, y),
        num_contexts=work.contexts,
        num_clients=work.clients,
        rounds_per_context=work.rounds,
        steps=work.steps,
        batch_size=work.batch,
    )
    model = models.mlp(work.sizes)
    method = fedcl.chain(
        algorithms.replay(work.capacity, work.replayed),
        algorithms.ewc_consolidated(
            work.strength, fisher="empirical", anchors="online"
        ),
    )
    loss, opt = losses.softmax(model.apply), optax.sgd(work.rate)
    algorithm = algorithms.fedavg(loss, opt, transform=method)
    params = model.init(jax.random.key(0))
    state = algorithm.init(params, stream.example(), work.clients)
    parts = [phases.federated(algorithm, cohort=cohorts.uniform(work.cohort))]
    own = tree.size(state.clients) / work.clients

    def go() -> tuple[float, str]:
        end, _ = fedcl.run(
            parts,
            state,
            stream,
            key=jax.random.key(1),
            rounds=work.contexts * work.rounds,
            every=work.rounds,
        )
        right = model.apply(end.server.params, x).argmax(axis=-1) == y
        return float(right.mean()), f"{own:.0f} bytes of state per client;"

    return go


if __name__ == "__main__":
    measured("fedcl", ["fedcl-jax", "jax"], lambda: prepare(WORK))
