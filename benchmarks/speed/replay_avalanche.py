"""Avalanche's own strategies doing the same steps: one epoch of as many rows a context.

Its buffers are filled at the end of a context, not in each step, so it does less work
than the other two; its logger and metrics are off.
"""

import itertools
from collections.abc import Callable

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset, make_avalanche_dataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import DER, Naive
from replay import Work, measure, mnist
from torch import nn
from torch.utils.data import TensorDataset


def prepare(work: Work, data: str) -> Callable[[], None]:
    torch.set_num_threads(2)
    x, y = map(torch.from_numpy, mnist(data))
    sizes = (784, *work.hidden, 10)
    contexts = [_context(x, y, context, work) for context in range(5)]

    def go() -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        strategy = _strategy(work, nn.Sequential(*layers[:-1]))
        for experience in benchmark_from_datasets(train=contexts).train_stream:
            strategy.train(experience)

    return go


def _context(x, y, context: int, work: Work):
    rows = torch.nonzero((y // 2) == context)[:, 0]
    rows = rows[torch.randint(0, len(rows), (work.steps * work.batch,))]
    labels = y[rows].tolist()
    return as_classification_dataset(
        make_avalanche_dataset(
            TensorDataset(x[rows], y[rows]),
            data_attributes=[
                DataAttribute(labels, "targets"),
                DataAttribute([0] * len(labels), "targets_task_labels", True),
            ],
        )
    )


def _strategy(work: Work, model: nn.Module):
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    given = {
        "model": model,
        "optimizer": kinds[work.optimizer](model.parameters(), lr=work.learning_rate),
        "train_mb_size": work.batch,
        "evaluator": EvaluationPlugin(),
    }
    if work.logits:
        memory = {"mem_size": work.capacity, "batch_size_mem": work.replayed}
        return DER(alpha=0.5, beta=0.5, **memory, **given)
    replay = ReplayPlugin(work.capacity, batch_size_mem=work.replayed)
    return Naive(plugins=[replay], **given)


if __name__ == "__main__":
    measure("avalanche", prepare)
