"""A PyTorch loop of the usual structure: copy the server, train, average; per context."""

import itertools

import numpy as np
import torch
from continual import WORK, Work, rows_of
from plain_torch import set_threads
from torch.nn import functional
from work import measured

Tensors = list[torch.Tensor]


class Client:
    """A reservoir, and one quadratic for all contexts so far."""

    def __init__(self, work: Work, shapes: list[torch.Size]) -> None:
        self.x = torch.zeros(work.capacity, work.sizes[0])
        self.y = torch.zeros(work.capacity, dtype=torch.long)
        self.seen, self.capacity = 0, work.capacity
        self.fisher = [torch.zeros(s) for s in shapes]
        self.anchor = [torch.zeros(s) for s in shapes]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Algorithm R."""
        n = torch.arange(self.seen, self.seen + len(x))
        drawn = (torch.rand(len(x)) * (n + 1)).long()
        slot = torch.where(n < self.capacity, n, drawn)
        kept = slot < self.capacity
        self.x[slot[kept]], self.y[slot[kept]] = x[kept], y[kept]
        self.seen += len(x)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        i = torch.randint(0, min(self.seen, self.capacity), (count,))
        return self.x[i], self.y[i]


def logits_of(values: Tensors, x: torch.Tensor) -> torch.Tensor:
    for w, b in zip(values[:-2:2], values[1:-2:2], strict=True):
        x = functional.relu(functional.linear(x, w, b))
    return functional.linear(x, *values[-2:])


def train(work: Work, client: Client, server: Tensors, x, y, context: int) -> Tensors:
    values = [v.clone().requires_grad_() for v in server]
    for _ in range(work.steps):
        i = torch.randint(0, len(x), (work.batch,))
        new = x[i], y[i]
        rows, labels = new
        if client.seen:
            past = client.draw(work.replayed)
            rows = torch.cat([rows, past[0]])
            labels = torch.cat([labels, past[1]])
        loss = functional.cross_entropy(logits_of(values, rows), labels)
        if context:
            gaps = [v - a for v, a in zip(values, client.anchor, strict=True)]
            each = zip(client.fisher, gaps, strict=True)
            loss = loss + work.strength / 2 * sum((f * g * g).sum() for f, g in each)
        grads = torch.autograd.grad(loss, values)
        with torch.no_grad():
            torch._foreach_add_(values, grads, alpha=-work.rate)
        client.add(*new)
    return [v.detach() for v in values]


def consolidate(client: Client, server: Tensors, x, y) -> None:
    """The mean square of the gradient of each row, and a new anchor."""
    values = [v.clone().requires_grad_() for v in server]
    for row, label in zip(x, y, strict=True):
        loss = functional.cross_entropy(logits_of(values, row[None]), label[None])
        grads = torch.autograd.grad(loss, values)
        for f, g in zip(client.fisher, grads, strict=True):
            f += g * g / len(x)
    client.anchor = server


def prepare(work: Work):
    """`() -> (accuracy, what else is told)`, a whole run."""
    x, y = map(torch.from_numpy, rows_of(work))
    y = y.long()
    classes = work.sizes[-1] // work.contexts

    def first() -> Tensors:
        pairs = itertools.pairwise(work.sizes)
        each = ((torch.randn(o, i) / i**0.5, torch.zeros(o)) for i, o in pairs)
        return [*itertools.chain(*each)]

    one = Client(work, [v.shape for v in first()])
    set_threads(lambda: train(work, one, first(), x[:100], y[:100], 1))

    def go() -> tuple[float, str]:
        rng, server = np.random.default_rng(1), first()
        clients = [Client(work, [v.shape for v in server]) for _ in range(work.clients)]
        for context in range(work.contexts):
            rows = rng.permutation(np.flatnonzero(y.numpy() // classes == context))
            own = torch.from_numpy(rows.reshape(work.clients, -1))
            for _ in range(work.rounds):
                drawn = rng.permutation(work.clients)[: work.cohort]
                total = [torch.zeros_like(v) for v in server]
                for n in drawn:
                    given = (work, clients[n], server, x[own[n]], y[own[n]], context)
                    torch._foreach_add_(total, train(*given))
                server = [v / work.cohort for v in total]
            for n, client in enumerate(clients):
                consolidate(client, server, x[own[n]], y[own[n]])
        right = logits_of(server, x).argmax(-1) == y
        return float(right.float().mean()), ""

    return go


if __name__ == "__main__":
    measured("torch", ["torch"], lambda: prepare(WORK))
