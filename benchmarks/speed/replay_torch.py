"""A minimal PyTorch loop doing the same: no data loader, no framework."""

import itertools
from collections.abc import Callable

import torch
from replay import Work, measure, mnist
from torch import nn
from torch.nn import functional


class Reservoir:
    """Rows (and logits) in preallocated tensors; Algorithm R."""

    def __init__(self, capacity: int, logits: bool):
        self.x = torch.zeros(capacity, 784)
        self.y = torch.zeros(capacity, dtype=torch.long)
        self.z = torch.zeros(capacity, 10) if logits else None
        self.capacity, self.seen = capacity, 0

    def add(self, x, y, z) -> None:
        n = torch.arange(self.seen, self.seen + len(x))
        drawn = (torch.rand(len(x)) * (n + 1)).long()
        slot = torch.where(n < self.capacity, n, drawn)
        kept = slot < self.capacity
        self.x[slot[kept]], self.y[slot[kept]] = x[kept], y[kept]
        if self.z is not None:
            self.z[slot[kept]] = z[kept]
        self.seen += len(x)

    def draw(self, n: int):
        i = torch.randint(0, min(self.seen, self.capacity), (n,))
        return self.x[i], self.y[i], None if self.z is None else self.z[i]


def prepare(work: Work, data: str) -> Callable[[], None]:
    torch.set_num_threads(2)
    x, y = map(torch.from_numpy, mnist(data))
    sizes = (784, *work.hidden, 10)

    def go() -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        opt = kinds[work.optimizer](net.parameters(), lr=work.learning_rate)
        memory = Reservoir(work.capacity, work.logits)
        step = _derpp if work.logits else _er
        for context in range(5):
            rows = torch.nonzero((y // 2) == context)[:, 0]
            for _ in range(work.steps):
                i = rows[torch.randint(0, len(rows), (work.batch,))]
                step(net, opt, memory, x[i], y[i], work, context)

    return go


def _er(net, opt, memory, x, y, work: Work, context: int) -> None:
    new = (x, y)
    if context:
        past = memory.draw(work.replayed)
        x, y = torch.cat([x, past[0]]), torch.cat([y, past[1]])
    loss = functional.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    memory.add(*new, None)


def _derpp(net, opt, memory, x, y, work: Work, context: int) -> None:
    if memory.seen == 0:
        z = net(x)
        loss = functional.cross_entropy(z, y)
    else:
        a, b = memory.draw(work.replayed), memory.draw(work.replayed)
        out = net(torch.cat([x, a[0], b[0]]))
        z, za, zb = out.split([len(x), work.replayed, work.replayed])
        loss = functional.cross_entropy(z, y)
        loss = loss + 0.5 * functional.mse_loss(za, a[2])
        loss = loss + 0.5 * functional.cross_entropy(zb, b[1])
    opt.zero_grad()
    loss.backward()
    opt.step()
    memory.add(x, y, z.detach())


if __name__ == "__main__":
    measure("torch", prepare)
