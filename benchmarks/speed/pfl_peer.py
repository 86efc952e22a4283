"""pfl-research: FederatedAveraging on its SimulatedBackend, one process.

In an environment of its own, with PyTorch: `pip install "pfl[pytorch]==0.6.0"`.
"""

import itertools

import nets
import numpy as np
import plain_torch
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional
from work import ORDERS, Peer, Work, measure, rows_of


class Net(torch.nn.Module):
    """A network of the works, with the two methods that pfl calls."""

    def __init__(self, net: nets.Net) -> None:
        super().__init__()
        self.net = net
        flat = plain_torch.to_torch(net, nets.weights(net))
        self.names = {path.replace("/", "_"): path for path in flat}
        for name, path in self.names.items():
            own = nets.trained(net, path)
            parameter = torch.nn.Parameter(flat[path], requires_grad=own)
            self.register_parameter(name, parameter)

    def tensors(self) -> plain_torch.Tensors:
        return {path: getattr(self, name) for name, path in self.names.items()}

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = plain_torch.logits_of(self.net, self.tensors(), x)
        return functional.cross_entropy(logits, y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict:
        return {}


def prepare(work: Work) -> Peer:
    rows = rows_of(work)
    x, y = torch.from_numpy(rows.x), torch.from_numpy(rows.y.astype(np.int64))
    x = x.movedim(-1, 1).contiguous() if x.ndim == 4 else x
    x, y = x.to(plain_torch.DEVICE), y.to(plain_torch.DEVICE)
    order = torch.from_numpy(rows.order.astype(np.int64))

    def data(user: tuple[int, int]) -> PyTorchTensorDataset:
        t, n = user
        index = order[n, t % ORDERS].flatten()
        return PyTorchTensorDataset((x[index], y[index]), user_id=str(n))

    def go() -> Net:
        net = Net(work.net)
        trained = [p for p in net.parameters() if p.requires_grad]
        model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(trained, lr=1.0))
        users = ((t, int(n)) for t in itertools.count() for n in _who(rows, t))
        dataset = FederatedDataset(data, lambda: next(users))
        backend = SimulatedBackend(training_data=dataset, val_data=dataset)
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=work.rounds,
                evaluation_frequency=work.rounds + 1,
                train_cohort_size=work.size,
                val_cohort_size=None,
            ),
            backend=backend,
            model=model,
            model_train_params=NNTrainHyperParams(
                local_num_epochs=1,
                local_learning_rate=work.rate,
                local_batch_size=work.batch,
            ),
            model_eval_params=NNEvalHyperParams(local_batch_size=work.batch),
        )
        return net

    plain_torch.set_threads(
        lambda: Net(work.net).loss(x[: work.batch], y[: work.batch])
    )

    def read(end: Net) -> nets.Weights:
        own = {p: v for p, v in end.tensors().items() if v.requires_grad}
        return plain_torch.from_torch(work.net, own)

    return Peer(go, read)


def _who(rows, t: int) -> np.ndarray:
    return rows.who[t % len(rows.who)]


if __name__ == "__main__":
    measure("pfl", ["pfl", "torch"], prepare)
