"""The networks of the works: shapes, first weights, multiplications. NumPy only.

Weights are flat dicts by path, kernels [in, out], as fedcl names them; every peer makes
of them what it needs.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]
Product = tuple[int, int, int, int]  # Rows, in, out, and how many such products.


class MLP(NamedTuple):
    """Dense layers with ReLU between."""

    sizes: tuple[int, ...] = (784, 64, 62)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes[:1]

    @property
    def classes(self) -> int:
        return self.sizes[-1]

    def kernels(self) -> dict[str, tuple[int, ...]]:
        layers = [f"layers/{i}" for i in range(len(self.sizes) - 2)] + ["head"]
        return dict(zip(layers, itertools.pairwise(self.sizes), strict=True))

    def products(self) -> list[Product]:
        pairs = [*itertools.pairwise(self.sizes)]
        return [(1, *pair, 3 if i else 2) for i, pair in enumerate(pairs)]


class CNN(NamedTuple):
    """Two 3 x 3 convolutions without padding, 2 x 2 max pooling, two dense layers."""

    image: tuple[int, int, int] = (28, 28, 1)
    widths: tuple[int, int] = (32, 64)
    dense: int = 128
    classes: int = 62

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def pooled(self) -> tuple[int, int, int]:
        """Height, width and channels before the dense layers."""
        return (self.image[0] - 4) // 2, (self.image[1] - 4) // 2, self.widths[1]

    def kernels(self) -> dict[str, tuple[int, ...]]:
        (one, two), wide = self.widths, math.prod(self.pooled)
        return {
            "convs/0/linear": (9 * self.image[2], one),
            "convs/1/linear": (9 * one, two),
            "dense": (wide, self.dense),
            "head": (self.dense, self.classes),
        }

    def products(self) -> list[Product]:
        height, width, _ = self.image
        places = ((height - 2) * (width - 2), (height - 4) * (width - 4), 1, 1)
        each = zip(places, self.kernels().values(), (2, 3, 3, 3), strict=True)
        return [(rows, *kernel, n) for rows, kernel, n in each]


class ViT(NamedTuple):
    """A frozen vision transformer with LoRA in its attention, and a trained head."""

    image: tuple[int, int, int] = (32, 32, 3)
    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3
    classes: int = 100
    rank: int = 8
    alpha: float = 16.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def tokens(self) -> int:
        return self.image[0] * self.image[1] // self.patch**2

    def adapted(self) -> dict[str, tuple[int, int]]:
        """The layers of a block that have a LoRA."""
        d = self.width
        return {"attention/qkv": (d, 3 * d), "attention/out": (d, d)}

    def kernels(self) -> dict[str, tuple[int, ...]]:
        d, n = self.width, self.depth
        block = {**self.adapted(), "mlp/up": (d, 4 * d), "mlp/down": (4 * d, d)}
        return {
            "patch": (self.patch**2 * self.image[2], d),
            **{f"blocks/{name}": (n, *shape) for name, shape in block.items()},
            "head": (d, self.classes),
        }

    def products(self) -> list[Product]:
        """The base is run forward and back to its inputs; only the rest is trained."""
        d, n, t = self.width, self.depth, self.tokens
        low = [
            (t, i, o, 3 * n)
            for shape in self.adapted().values()
            for i, o in ((shape[0], self.rank), (self.rank, shape[1]))
        ]
        return [
            (t, self.patch**2 * self.image[2], d, 1),
            (t, d, 12 * d, 2 * n),
            (t, d, 2 * t, 3 * n),  # Scores, and what they weigh.
            *low,
            (1, d, self.classes, 3),
        ]


Net = MLP | CNN | ViT


def weights(net: Net, seed: int = 0) -> Weights:
    """The first weights: kernels of variance 1/in, biases and norms not quite trivial."""
    rng = np.random.default_rng(seed)
    normal = lambda shape, scale: scale * rng.standard_normal(shape)
    flat = {}
    for path, shape in net.kernels().items():
        flat[f"{path}/kernel"] = normal(shape, shape[-2] ** -0.5)
        flat[f"{path}/bias"] = normal((*shape[:-2], shape[-1]), 0.01)
    if isinstance(net, ViT):
        flat |= _rest(net, normal)
    return {path: np.asarray(value, np.float32) for path, value in flat.items()}


def _rest(net: ViT, normal) -> dict[str, np.ndarray]:
    d, n = net.width, net.depth
    flat = {"position": normal((net.tokens, d), 0.02)}
    for path, lead in (("blocks/norm1", (n,)), ("blocks/norm2", (n,)), ("norm", ())):
        flat[f"{path}/scale"] = 1 + normal((*lead, d), 0.01)
        flat[f"{path}/bias"] = normal((*lead, d), 0.01)
    for name, (i, o) in net.adapted().items():
        flat[f"blocks/{name}/lora/a"] = normal((n, i, net.rank), i**-0.5)
        flat[f"blocks/{name}/lora/b"] = normal((n, net.rank, o), 0.01)
    return flat


def trained(net: Net, path: str) -> bool:
    """Whether a weight is trained, sent and averaged."""
    return (
        not isinstance(net, ViT)
        or path.endswith(("lora/a", "lora/b"))
        or path.startswith("head/")
    )


def flops(net: Net) -> int:
    """Multiply-adds times two of one row of a training step."""
    return sum(2 * rows * i * o * times for rows, i, o, times in net.products())
