"""The networks by hand in jax.numpy, and local SGD, for the floor and for DrJAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import nets

Weights = dict[str, jax.Array]
Local = Callable[[Weights, Weights, jax.Array, jax.Array], Weights]


def local_of(net: nets.Net, rate: float) -> Local:
    """`(φ, θ, x [S, B, ...], y [S, B]) -> φ` after S steps of SGD."""

    loss = loss_of(net)

    def local(phi, theta, x, y):
        def step(phi, rows):
            grads = jax.grad(loss)(phi, theta, *rows)
            return jax.tree.map(lambda p, g: p - rate * g, phi, grads), None

        return jax.lax.scan(step, phi, (x, y))[0]

    return local


def loss_of(net: nets.Net) -> Callable[..., jax.Array]:
    """`(φ, θ, x [B, ...], y [B]) -> ()`, the mean cross-entropy."""

    def loss(phi, theta, x, y):
        logits = logits_of(net, phi | theta, x)
        label = jax.nn.one_hot(y, net.classes)
        return -jnp.mean(jnp.sum(label * jax.nn.log_softmax(logits), axis=-1))

    return loss


def logits_of(net: nets.Net, w: Weights, x: jax.Array) -> jax.Array:
    """[B, ...] -> [B, Y]."""
    if isinstance(net, nets.MLP):
        for i in range(len(net.sizes) - 2):
            x = jax.nn.relu(_dense(w, f"layers/{i}", x))
        return _dense(w, "head", x)
    return _cnn(w, x) if isinstance(net, nets.CNN) else _vit(net, w, x)


def _dense(w: Weights, path: str, x: jax.Array) -> jax.Array:
    y = x @ w[f"{path}/kernel"] + w[f"{path}/bias"][None]
    if f"{path}/lora/a" in w:
        y = y + (x @ w[f"{path}/lora/a"]) @ (w["scale"] * w[f"{path}/lora/b"])
    return y


def _cnn(w: Weights, x: jax.Array) -> jax.Array:
    rows = x.shape[0]
    x = jax.nn.relu(_conv(w, "convs/0/linear", x))
    x = _conv(w, "convs/1/linear", x)
    height, width, depth = x.shape[1:]
    x = x.reshape(rows, height // 2, 2, width // 2, 2, depth)
    left, right = (jnp.maximum(x[:, :, 0, :, j], x[:, :, 1, :, j]) for j in (0, 1))
    x = jax.nn.relu(jnp.maximum(left, right)).reshape(rows, -1)
    return _dense(w, "head", jax.nn.relu(_dense(w, "dense", x)))


def _conv(w: Weights, path: str, x: jax.Array) -> jax.Array:
    """3 x 3 without padding: the nine neighbours side by side, and one product."""
    rows, height, width, _ = x.shape
    height, width = height - 2, width - 2
    near = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    flat = jnp.concatenate(near, axis=-1).reshape(rows * height * width, -1)
    return _dense(w, path, flat).reshape(rows, height, width, -1)


def _vit(net: nets.ViT, w: Weights, x: jax.Array) -> jax.Array:
    rows, t, p, d = x.shape[0], net.tokens, net.patch, net.width
    height, width, depth = net.image
    x = x.reshape(rows, height // p, p, width // p, p, depth)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows * t, p * p * depth)
    h = _dense(w, "patch", x).reshape(rows, t, d) + w["position"][None]
    own = lambda path: path.removeprefix("blocks/")
    blocks = {own(path): leaf for path, leaf in w.items() if own(path) != path}
    scale = jnp.float32(net.alpha / net.rank)

    def block(h, w):
        w = {**w, "scale": scale}
        qkv = _dense(w, "attention/qkv", _norm(w, "norm1", h))
        q, k, v = jnp.split(qkv.reshape(rows, t, -1), 3, axis=-1)
        heads = lambda a: a.reshape(rows, t, net.heads, -1)
        q, k, v = heads(q), heads(k), heads(v)
        score = jnp.einsum("btns,buns->bntu", q, k)
        score = jax.nn.softmax(score * (d // net.heads) ** -0.5)
        mixed = jnp.einsum("bntu,buns->btns", score, v).reshape(rows * t, d)
        h = h + _dense(w, "attention/out", mixed)
        up = jax.nn.gelu(_dense(w, "mlp/up", _norm(w, "norm2", h)))
        return h + _dense(w, "mlp/down", up), None

    h = jax.lax.scan(block, h.reshape(rows * t, d), blocks, unroll=net.depth)[0]
    h = _norm(w, "norm", h).reshape(rows, t, d)
    return _dense(w, "head", jnp.mean(h, axis=1))


def _norm(w: Weights, path: str, h: jax.Array) -> jax.Array:
    mean = jnp.mean(h, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(h - mean), axis=-1, keepdims=True)
    h = (h - mean) * jax.lax.rsqrt(var + 1e-6)
    return h * w[f"{path}/scale"][None] + w[f"{path}/bias"][None]
