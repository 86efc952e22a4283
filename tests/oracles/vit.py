"""The forward pass of the small ViT in NumPy float64, written from its paper.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021: equations 1 to 4, with
pre-norm blocks (LayerNorm epsilon 1e-6, biased variance) and the tanh form of GELU
(Hendrycks and Gimpel, 2016). Loops over rows, patches and heads; no JAX.
"""

from typing import Any

import numpy as np

Params = dict[str, Any]


def _dense(p: Params, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def _norm(p: Params, x: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attention(p: Params, x: np.ndarray, heads: int) -> np.ndarray:
    width = x.shape[1]
    size = width // heads
    qkv = _dense(p["qkv"], x)
    out = np.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        q, k, v = (qkv[:, i * width : (i + 1) * width][:, part] for i in range(3))
        scores = q @ k.T / np.sqrt(size)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, part] = scores / scores.sum(-1, keepdims=True) @ v
    return _dense(p["out"], out)


def _patches(image: np.ndarray, patch: int) -> np.ndarray:
    height, width, _ = image.shape
    return np.stack(
        [
            image[i : i + patch, j : j + patch].ravel()
            for i in range(0, height, patch)
            for j in range(0, width, patch)
        ]
    )


def forward(
    params: Params, images: np.ndarray, *, patch: int, heads: int, pool: str
) -> np.ndarray:
    """Logits [B, classes] of images [B, H, W, D], in float64."""
    params = _cast(params)
    return np.stack([_one(params, image, patch, heads, pool) for image in images])


def _cast(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _cast(child) for name, child in tree.items()}
    return np.asarray(tree, np.float64)


def _one(p: Params, image: np.ndarray, patch: int, heads: int, pool: str) -> np.ndarray:
    z = _dense(p["patch"], _patches(image.astype(np.float64), patch))
    if pool == "class":
        z = np.concatenate([p["class_token"], z])
    z = z + p["position"]
    for i in range(len(p["blocks"]["norm1"]["scale"])):
        block = _at(p["blocks"], i)
        z = z + _attention(block["attention"], _norm(block["norm1"], z), heads)
        hidden = _gelu(_dense(block["mlp"]["up"], _norm(block["norm2"], z)))
        z = z + _dense(block["mlp"]["down"], hidden)
    z = _norm(p["norm"], z)
    return _dense(p["head"], z[0] if pool == "class" else z.mean(0))


def _at(tree: Any, i: int) -> Any:
    if isinstance(tree, dict):
        return {name: _at(child, i) for name, child in tree.items()}
    return tree[i]
