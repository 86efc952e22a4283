"""Flower's simulation: FedAvg over Ray, each client a compiled JAX program.

In an environment of its own: `pip install "flwr[simulation]" jax`. Only works in which
every client takes part. The start of Ray is part of the first run, and so of "compile".
"""

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = HERE  # Of Ray's processes.

import flower_client  # noqa: E402
import nets  # noqa: E402
from flwr.app import ConfigRecord  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from work import WORKS, Peer, Work, measure  # noqa: E402

server = ServerApp()


@server.main()
def main(grid, context) -> None:
    packages = ["flwr", "ray", "jax"]
    measure("flower", packages, lambda work: prepare(work, sys.argv[1], grid))


def prepare(work: Work, name: str, grid) -> Peer:
    flat = nets.weights(work.net)
    phi = {path: v for path, v in flat.items() if nets.trained(work.net, path)}
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=work.clients,
        min_available_nodes=work.clients,
    )

    def go():
        return strategy.start(
            grid,
            flower_client.to_record(phi),
            num_rounds=work.rounds,
            train_config=ConfigRecord({"work": name}),
        )

    return Peer(go, lambda end: flower_client.to_numpy(end.arrays))


if __name__ == "__main__":
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(
        server,
        flower_client.app,
        WORKS[sys.argv[1]].clients,
        backend_config={"client_resources": resources},
    )
