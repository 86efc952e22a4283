"""Federated continual learning methods, one per file."""

if __name__ != "fedcl.algorithms":
    raise ImportError(
        "import `fedcl.algorithms`, not `algorithms`: the repository root is on sys.path"
    )

from fedcl.algorithms._fedavg import fedavg as fedavg
