"""Low-rank adapters as ordinary leaves of the parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedcl.models._init import normals
from fedcl.models._model import Factory, Model, Params, from_nnx
from fedcl.models._trainable import Predicate

Shapes = dict[str, tuple[int, ...]]
PARTS = ("a", "b", "scale", "mask")


class LowRank(nnx.Module):
    """The leaves of one adapter and its path, s (x A) diag(mask) B."""

    def __init__(self, parts: Params) -> None:
        self.a = nnx.Param(parts["a"])
        self.b = nnx.Param(parts["b"])
        self.scale = nnx.Param(parts["scale"])
        self.mask = nnx.Param(parts["mask"])

    def weights(self) -> tuple[jax.Array, jax.Array]:
        gate = jax.lax.stop_gradient(self.scale[...] * self.mask[...])
        return self.a[...], self.b[...] * gate[:, None]


@functools.cache
def _adapted(base: type[nnx.Linear]) -> type[nnx.Linear]:
    """The subclass of a linear layer that adds the path of its `lora` leaves."""

    def __call__(self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        y = base.__call__(self, inputs, *args, **kwargs)
        parts = (inputs, *self.lora.weights())
        x, a, b = self.promote_dtype(parts, dtype=self.dtype)
        return y + ((x @ a) @ b).astype(y.dtype)

    return type(f"LoRA{base.__name__}", (base,), {"__call__": __call__})


def lora(
    model: Model,
    params: Params,
    *,
    rank: int,
    alpha: float | jax.Array,
    where: Predicate = lambda path: True,
    key: jax.Array,
) -> tuple[Model, Params]:
    """Puts a low-rank path beside linear layers: y = x W + (alpha / r) (x A) B.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685. A is normal with variance 1 / in and B is zero,
    so the outputs do not change at first. The path is taken in activation space:
    under vmap over clients W stays one array and is never copied or summed into.

    Args:
      model: a model from `from_nnx`, or one of fedcl's own. Every `nnx.Linear` in
        it is a candidate; layers that already carry an adapter are passed over.
      params: its parameters.
      rank: r, at most the smaller side of each kernel.
      alpha: the path is scaled by alpha / r.
      where: `(path) -> bool` over layers, e.g. `"blocks/attention/qkv"`.
      key: draws A.

    Returns:
      The adapted model and parameters. Beside each chosen `kernel` [..., in, out]
      lies `lora`, a dict of `a` [..., in, r], `b` [..., r, out], `scale` [...] and
      `mask` [..., r]. The mask multiplies the rank: zeros switch directions off, for
      clients of different ranks. Scale and mask get no gradient and no predicate of
      this module selects them.

    Raises:
      ValueError: if `model` has no Flax NNX module, no layer is chosen, or the rank
        does not fit a chosen layer.

    Cost: r (in + out) parameters a layer, and as many multiplications a row.

    >>> from fedcl.models import mlp
    >>> model = mlp((6, 8, 4))
    >>> params = model.init(jax.random.key(0))
    >>> model, params = lora(model, params, rank=2, alpha=4.0,
    ...                      where=lambda path: path != "head", key=jax.random.key(1))
    >>> jax.tree.map(jnp.shape, params["layers"]["0"]["lora"])
    {'a': (6, 2), 'b': (2, 8), 'mask': (2,), 'scale': ()}
    """
    if model.factory is None:
        raise ValueError(
            "lora: the model has no Flax NNX module to adapt (`model.factory` is "
            "None); build it with fedcl.models.from_nnx."
        )
    kernels = _targets(model.factory, params, where)
    _check_rank(kernels, rank)
    factory = functools.partial(_build, model.factory, kernels, rank)

    def init(key: jax.Array, shapes: Params) -> Params:
        base, low = jax.random.split(key)
        return _extend(model.init(base), kernels, rank, alpha, low)

    adapted = from_nnx(factory, init=init)
    return adapted, _extend(params, kernels, rank, alpha, key)


def merge_lora(params: Params) -> Params:
    """Adds the adapters into their kernels, W + (alpha / r) A diag(mask) B.

    Args:
      params: parameters with adapters; stacked over clients under `jax.vmap`.

    Returns:
      Parameters of the model before `lora`; `params` itself is left alone.

    Raises:
      ValueError: if a kernel is quantised (an integer, or fewer than 16 bits), where
        a small update is lost to rounding.

    >>> kernel, a, b = jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2))
    >>> adapter = dict(a=a, b=b, scale=jnp.float32(0.5), mask=jnp.ones(1))
    >>> merge_lora({"kernel": kernel, "lora": adapter})["kernel"][0].tolist()
    [0.5, 0.5]
    """
    if not isinstance(params, Mapping):
        return params
    if not _carries(params):
        return {name: merge_lora(child) for name, child in params.items()}
    rest = {name: leaf for name, leaf in params.items() if name != "lora"}
    return rest | {"kernel": _merged(params["kernel"], params["lora"])}


def _merged(kernel: jax.Array, parts: Params) -> jax.Array:
    if not jnp.issubdtype(kernel.dtype, jnp.floating) or kernel.dtype.itemsize < 2:
        raise ValueError(
            f"merge_lora: a kernel of dtype {kernel.dtype} would round the update "
            "away; keep the adapter, or dequantise the base to float32 first."
        )
    gate = parts["scale"][..., None] * parts["mask"]
    update = parts["a"] @ (parts["b"] * gate[..., None])
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


def _carries(params: Any) -> bool:
    part = params.get("lora") if isinstance(params, Mapping) else None
    return isinstance(part, Mapping) and set(part) == set(PARTS)


def _linears(module: nnx.Module) -> dict[str, nnx.Linear]:
    return {
        "/".join(str(part) for part in path): node
        for path, node in nnx.iter_modules(module)
        if isinstance(node, nnx.Linear)
    }


def _targets(factory: Factory, params: Params, where: Predicate) -> Shapes:
    """The kernel shapes of the chosen layers, by path."""
    layers = _linears(nnx.eval_shape(lambda: factory(nnx.Rngs(0))))
    free = sorted(path for path in layers if not _carries(_at(params, path)))
    chosen = {path: layers[path].kernel.shape for path in free if where(path)}
    if not chosen:
        listed = ", ".join(repr(path) for path in free) or "none"
        raise ValueError(
            "lora: `where` selects no linear layer. Candidates (every nnx.Linear "
            f"without an adapter): {listed}."
        )
    return chosen


def _check_rank(kernels: Shapes, rank: int) -> None:
    for path, shape in kernels.items():
        most = min(shape[-2:])
        if not 1 <= rank <= most:
            raise ValueError(
                f"lora: rank {rank} does not fit {path!r}, whose kernel is "
                f"{shape[-2]} x {shape[-1]}; allowed are 1 to {most}. Take a smaller "
                "rank or leave the layer out with `where`."
            )


def _build(factory: Factory, kernels: Shapes, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    """The module with its chosen layers turned into adapted ones, in place.

    The layer stays the same object with the same attributes, so that code which
    reads them, shares the layer or stacks it is not affected.
    """
    module = factory(rngs)
    layers = _linears(module)
    for path, shape in kernels.items():
        layer: Any = layers[path]
        kind: Any = type(layer)
        layer.__class__ = _adapted(kind)
        layer.lora = LowRank(_parts(jnp.zeros((*shape[:-1], rank)), shape, rank, 1.0))
    return module


def _parts(
    a: jax.Array, shape: tuple[int, ...], rank: int, alpha: float | jax.Array
) -> Params:
    lead = shape[:-2]
    return {
        "a": a,
        "b": jnp.zeros((*lead, rank, shape[-1])),
        "scale": jnp.full(lead, alpha / rank, jnp.float32),
        "mask": jnp.ones((*lead, rank)),
    }


def _extend(
    params: Params, kernels: Shapes, rank: int, alpha: float | jax.Array, key: jax.Array
) -> Params:
    shapes = [(*shape[:-1], rank) for shape in kernels.values()]
    for (path, shape), noise in zip(kernels.items(), normals(key, shapes), strict=True):
        parts = _parts(shape[-2] ** -0.5 * noise, shape, rank, alpha)
        params = _insert(params, path.split("/") if path else [], parts)
    return params


def _insert(params: Params, path: list[str], parts: Params) -> Params:
    if not path:
        return {**params, "lora": parts}
    return {**params, path[0]: _insert(params[path[0]], path[1:], parts)}


def _at(params: Any, path: str) -> Any:
    node = params
    for name in path.split("/") if path else ():
        if not isinstance(node, Mapping) or name not in node:
            raise ValueError(
                f"lora: the parameters have no {path!r}, which the model has; pass "
                "parameters of this model's `init`."
            )
        node = node[name]
    return node
