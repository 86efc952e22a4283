"""A plain PyTorch loop over the clients: no framework, no data loader."""

import time
from collections.abc import Callable

import nets
import numpy as np
import torch
from torch.nn import functional
from work import ORDERS, Peer, Work, cores, measure, rows_of

Tensors = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(work: Work) -> Peer:
    flat = to_torch(work.net, nets.weights(work.net))
    phi = {path: v for path, v in flat.items() if nets.trained(work.net, path)}
    theta = {path: v for path, v in flat.items() if path not in phi}
    rows = rows_of(work)
    x, y = (torch.from_numpy(a).to(DEVICE) for a in (rows.x, rows.y.astype(np.int64)))
    x = x.movedim(-1, 1).contiguous() if x.ndim == 4 else x
    order = torch.from_numpy(rows.order.astype(np.int64)).to(DEVICE)

    def client(server: Tensors, index: torch.Tensor) -> list[torch.Tensor]:
        own = {p: v.clone().requires_grad_() for p, v in server.items()}
        values = [*own.values()]
        for i in index:
            logits = logits_of(work.net, own | theta, x[i])
            loss = functional.cross_entropy(logits, y[i])
            grads = torch.autograd.grad(loss, values)
            with torch.no_grad():
                torch._foreach_add_(values, grads, alpha=-work.rate)
        return values

    def go() -> Tensors:
        server = phi
        for t, who in enumerate(rows.who):
            total = [torch.zeros_like(v) for v in server.values()]
            for n in who:
                end = client(server, order[n, t % ORDERS])
                with torch.no_grad():
                    torch._foreach_add_(total, end)
            server = {p: v / len(who) for p, v in zip(server, total, strict=True)}
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return server

    set_threads(lambda: client(phi, order[0, 0]))
    return Peer(go, lambda end: from_torch(work.net, end))


def set_threads(one: Callable[[], object]) -> None:
    """As many threads as are faster for one client: all cores, or one."""

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        one()
        start = time.perf_counter()
        one()
        return time.perf_counter() - start

    torch.set_num_threads(min((1, cores()), key=seconds))


def logits_of(net: nets.Net, w: Tensors, x: torch.Tensor) -> torch.Tensor:
    if isinstance(net, nets.MLP):
        for i in range(len(net.sizes) - 2):
            x = functional.relu(_dense(w, f"layers/{i}", x))
        return _dense(w, "head", x)
    return _cnn(w, x) if isinstance(net, nets.CNN) else _vit(net, w, x)


def _dense(w: Tensors, path: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, w[f"{path}/kernel"], w[f"{path}/bias"])


def _cnn(w: Tensors, x: torch.Tensor) -> torch.Tensor:
    for i in range(2):
        path = f"convs/{i}/linear"
        x = functional.conv2d(x, w[f"{path}/kernel"], w[f"{path}/bias"])
        x = functional.relu(x)
    x = functional.max_pool2d(x, 2).flatten(1)
    return _dense(w, "head", functional.relu(_dense(w, "dense", x)))


def _vit(net: nets.ViT, w: Tensors, x: torch.Tensor) -> torch.Tensor:
    rows, depth, height, width = x.shape
    p, d = net.patch, net.width
    x = x.reshape(rows, depth, height // p, p, width // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(rows, net.tokens, p * p * depth)
    h = _dense(w, "patch", x) + w["position"]
    own = lambda path: path.removeprefix("blocks/")
    stacked = {own(path): leaf for path, leaf in w.items() if own(path) != path}
    for i in range(net.depth):
        b = {path: leaf[i] for path, leaf in stacked.items()}
        qkv = _adapted(net, b, "attention/qkv", _norm(b, "norm1", h))
        q, k, v = qkv.reshape(rows, net.tokens, 3, net.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(rows, net.tokens, d)
        h = h + _adapted(net, b, "attention/out", mixed)
        up = _dense(b, "mlp/up", _norm(b, "norm2", h))
        h = h + _dense(b, "mlp/down", functional.gelu(up, approximate="tanh"))
    return _dense(w, "head", _norm(w, "norm", h).mean(1))


def _adapted(net: nets.ViT, w: Tensors, path: str, x: torch.Tensor) -> torch.Tensor:
    low = (x @ w[f"{path}/lora/a"]) @ w[f"{path}/lora/b"]
    return _dense(w, path, x) + net.alpha / net.rank * low


def _norm(w: Tensors, path: str, h: torch.Tensor) -> torch.Tensor:
    scale, bias = w[f"{path}/scale"], w[f"{path}/bias"]
    return functional.layer_norm(h, scale.shape, scale, bias, 1e-6)


def to_torch(net: nets.Net, flat: nets.Weights) -> Tensors:
    """Kernels as torch has them: [..., out, in], and [out, in, 3, 3]."""
    out = {}
    for path, value in flat.items():
        if path.endswith("kernel"):
            value = _kernel(net, path, value)
        out[path] = torch.from_numpy(np.ascontiguousarray(value)).to(DEVICE)
    return out


def _kernel(net: nets.Net, path: str, k: np.ndarray) -> np.ndarray:
    if path.startswith("convs"):
        return k.reshape(3, 3, -1, k.shape[-1]).transpose(3, 2, 0, 1)
    if isinstance(net, nets.CNN) and path == "dense/kernel":
        maps = k.reshape(*net.pooled, net.dense).transpose(3, 2, 0, 1)
        return maps.reshape(net.dense, -1)
    return k.swapaxes(-1, -2)


def from_torch(net: nets.Net, tensors: Tensors) -> nets.Weights:
    """Undoes `to_torch`."""
    out = {path: v.detach().cpu().numpy() for path, v in tensors.items()}
    for path, k in out.items():
        if path.startswith("convs") and path.endswith("kernel"):
            out[path] = k.transpose(2, 3, 1, 0).reshape(-1, len(k))
        elif isinstance(net, nets.CNN) and path == "dense/kernel":
            height, width, depth = net.pooled
            maps = k.reshape(-1, depth, height, width).transpose(2, 3, 1, 0)
            out[path] = maps.reshape(-1, net.dense)
        elif path.endswith("kernel"):
            out[path] = k.swapaxes(-1, -2)
    return out


if __name__ == "__main__":
    measure("torch", ["torch"], prepare)
