"""Low-rank adapters as ordinary leaves of the parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike

from fedcl.models import _layers
from fedcl.models._init import normals
from fedcl.models._model import Model, Params
from fedcl.models._trainable import Predicate

Ranks = int | Mapping[str, int]
PARTS = ("a", "b", "scale", "mask")


def lora(
    model: Model,
    params: Params,
    *,
    rank: Ranks,
    alpha: float | jax.Array,
    where: Predicate = lambda path: True,
    dropout: float = 0.0,
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
      rank: r, at most the smaller side of each kernel; or a rank for each layer by
        its path, which then are the layers that `where` chooses from.
      alpha: the path is scaled by alpha / r.
      where: `(path) -> bool` over layers, e.g. `"blocks/attention/q"`.
      dropout: probability that an input of the path is left out of a training step.
      key: draws A.

    Returns:
      The adapted model and parameters. Beside each chosen `kernel` [..., in, out]
      lies `lora`, a dict of `a` [..., in, r], `b` [..., r, out], `scale` [...] and
      `mask` [..., r]. The mask multiplies the rank: zeros switch directions off, for
      clients of different ranks, see `with_rank`. Scale and mask get no gradient and
      no predicate of this module selects them.

    Raises:
      ValueError: if `model` has no Flax NNX module, no layer is chosen, the rank
        does not fit a chosen layer, alpha is not positive, or dropout is no
        probability.

    Cost: r (in + out) parameters a layer, and as many multiplications a row.

    >>> from fedcl.models import mlp
    >>> model = mlp((6, 8, 4))
    >>> params = model.init(jax.random.key(0))
    >>> model, params = lora(model, params, rank=2, alpha=4.0,
    ...                      where=lambda path: path != "head", key=jax.random.key(1))
    >>> jax.tree.map(jnp.shape, params["layers"]["0"]["lora"])
    {'a': (6, 2), 'b': (2, 8), 'mask': (2,), 'scale': ()}
    """
    _check_numbers(alpha, dropout)
    layers = _layers.candidates(model, "lora")
    ranks = _ranks(rank, layers, params, where)
    shapes = {path: layers[path].kernel.shape for path in ranks}
    _check_ranks(shapes, ranks)

    def draw(key: jax.Array) -> dict[str, Params]:
        noise = normals(key, [(*s[:-1], ranks[p]) for p, s in shapes.items()])
        return {
            path: _parts(shape[-2] ** -0.5 * a, shape, alpha)
            for (path, shape), a in zip(shapes.items(), noise, strict=True)
        }

    change = functools.partial(_change, dropout)
    return _layers.attach(model, params, "lora", change, draw, key)


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

    def merged(path: str, node: Params) -> Params:
        rest = {name: leaf for name, leaf in node.items() if name != "lora"}
        return rest | {"kernel": _moved(path, node.get("kernel"), node["lora"], 1.0)}

    return _over_adapted(params, merged)


def unmerge_lora(merged: Params, adapted: Params) -> Params:
    """Takes the adapters out again, W − (alpha / r) A diag(mask) B.

    Args:
      merged: what `merge_lora` gave, perhaps trained on or averaged since.
      adapted: the parameters it was given; their adapters are taken.

    Returns:
      Parameters of the adapted model: the leaves of `merged`, and the adapters of
      `adapted`. Kernels come back to the rounding of one addition in their type.

    Raises:
      ValueError: as `merge_lora`, and if `merged` lacks a layer of `adapted`.

    >>> kernel, a, b = jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2))
    >>> adapter = dict(a=a, b=b, scale=jnp.float32(0.5), mask=jnp.ones(1))
    >>> params = {"head": {"kernel": kernel, "lora": adapter}}
    >>> back = unmerge_lora(merge_lora(params), params)
    >>> bool(jnp.all(back["head"]["kernel"] == kernel)), "lora" in back["head"]
    (True, True)
    """
    for path, parts in _adapters(adapted):
        node = _layers.at(merged, path, "unmerge_lora")
        kernel = _moved(path, node.get("kernel"), parts, -1.0)
        for name, value in (("kernel", kernel), ("lora", parts)):
            merged = _layers.insert(merged, [*_layers.split(path), name], value)
    return merged


def with_rank(params: Params, ranks: ArrayLike | Mapping[str, ArrayLike]) -> Params:
    """Switches all but the first directions of every adapter off.

    The scale stays alpha / r of the r that was built, so that clients of different
    ranks agree on what a direction is worth.

    Args:
      params: parameters with adapters.
      ranks: how many directions stay: one number, an array [L] over stacked layers,
        or either by the layer's path. It may be traced: a rank per client is an
        argument that `jax.vmap` maps over.

    Returns:
      The parameters with `mask` = (0, …, r − 1) < rank; layers that a mapping does
      not name are left alone.

    Raises:
      ValueError: if there is no adapter, a mapping names a layer without one, or a
        rank lies outside 0 to r.

    >>> adapter = dict(a=jnp.ones((3, 2)), b=jnp.ones((2, 2)), scale=1.0,
    ...                mask=jnp.ones(2))
    >>> with_rank({"kernel": jnp.ones((3, 2)), "lora": adapter}, 1)["lora"]["mask"]
    Array([1., 0.], dtype=float32)
    """
    found = dict(_adapters(params))
    wanted = ranks if isinstance(ranks, Mapping) else dict.fromkeys(found, ranks)
    _check_known("with_rank", wanted, found)
    for path, rank in wanted.items():
        old = found[path]["mask"]
        _check_within(path, rank, old.shape[-1])
        limit = jnp.asarray(rank)[..., None]
        mask = jnp.arange(old.shape[-1]).reshape(*[1] * (limit.ndim - 1), -1) < limit
        mask = jnp.broadcast_to(mask, old.shape).astype(old.dtype)
        where = [*_layers.split(path), "lora", "mask"]
        params = _layers.insert(params, where, mask)
    return params


def _change(dropout: float, layer: Any, parts: Params, rngs: nnx.Rngs) -> None:
    _layers.adapted("lora", _beside)(layer, parts, rngs)
    if dropout:
        build = lambda rngs: nnx.Dropout(dropout, rngs=rngs)
        for size in reversed(parts["scale"].shape):
            build = _stacked(build, size)
        layer.lora.dropout = build(rngs)


def _stacked(build: Callable[[nnx.Rngs], Any], size: int) -> Callable[[nnx.Rngs], Any]:
    return lambda rngs: nnx.split_rngs(splits=size)(nnx.vmap(build))(rngs)


def _beside(
    call: Callable[[jax.Array], jax.Array], layer: Any, inputs: jax.Array
) -> jax.Array:
    low, y = layer.lora, call(inputs)
    gate = jax.lax.stop_gradient(low.scale[...] * low.mask[...])
    parts = (inputs, low.a[...], low.b[...] * gate[:, None])
    x, a, b = layer.promote_dtype(parts, dtype=layer.dtype)
    x = low.dropout(x) if hasattr(low, "dropout") else x
    return y + ((x @ a) @ b).astype(y.dtype)


def _moved(path: str, kernel: Any, parts: Params, sign: float) -> jax.Array:
    check_plain("merge_lora", path, kernel)
    gate = parts["scale"][..., None] * parts["mask"]
    update = parts["a"] @ (parts["b"] * gate[..., None])
    return (kernel.astype(jnp.float32) + sign * update).astype(kernel.dtype)


def check_plain(who: str, path: str, kernel: Any) -> None:
    """Refuses a kernel of fewer than 16 bits, or of integers."""
    kind = getattr(kernel, "dtype", None)
    plain = kind is not None and jnp.issubdtype(kind, jnp.floating)
    if not plain or kernel.dtype.itemsize < 2:
        what = ", ".join(kernel) if isinstance(kernel, Mapping) else f"dtype {kind}"
        raise ValueError(
            f"{who}: {path or 'the layer'!r} has a quantised kernel ({what}), "
            "which would round the update away; keep the adapter, or dequantise the "
            "base to float32 first."
        )


def _carries(params: Any) -> bool:
    part = params.get("lora") if isinstance(params, Mapping) else None
    return isinstance(part, Mapping) and set(part) == set(PARTS)


def _over_adapted(
    params: Any, fn: Callable[[str, Params], Params], path: str = ""
) -> Any:
    """`fn(path, node)` in place of every node that carries an adapter."""
    if not isinstance(params, Mapping):
        return params
    if _carries(params):
        return fn(path, dict(params))
    under = f"{path}/" if path else ""
    return {n: _over_adapted(c, fn, under + n) for n, c in params.items()}


def _adapters(params: Params) -> list[tuple[str, Params]]:
    found: list[tuple[str, Params]] = []

    def see(path: str, node: Params) -> Params:
        found.append((path, node["lora"]))
        return node

    _over_adapted(params, see)
    return found


def _ranks(
    rank: Ranks, layers: Mapping[str, Any], params: Params, where: Predicate
) -> dict[str, int]:
    """The rank of each chosen layer, by path."""
    given = rank if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    if isinstance(rank, Mapping):
        _check_known("lora", given, layers)
    free = {
        path: layer
        for path, layer in layers.items()
        if path in given and not _carries(_layers.at(params, path, "lora"))
    }
    return {path: given[path] for path in _layers.chosen("lora", params, free, where)}


def _parts(
    a: jax.Array, shape: tuple[int, ...], alpha: float | jax.Array
) -> dict[str, jax.Array]:
    lead, rank = shape[:-2], a.shape[-1]
    return {
        "a": a,
        "b": jnp.zeros((*lead, rank, shape[-1])),
        "scale": jnp.full(lead, alpha / rank, jnp.float32),
        "mask": jnp.ones((*lead, rank)),
    }


def _check_numbers(alpha: Any, dropout: float) -> None:
    if not isinstance(alpha, Tracer) and not alpha > 0:
        raise ValueError(
            f"lora: alpha is {alpha}; the path is scaled by alpha / rank, so it must "
            "be positive. To switch an adapter off, use with_rank(params, 0)."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: `dropout` must be in [0, 1), got {dropout}.")


def _check_ranks(shapes: _layers.Shapes, ranks: Mapping[str, int]) -> None:
    for path, shape in shapes.items():
        most = min(shape[-2:])
        if not 1 <= ranks[path] <= most:
            raise ValueError(
                f"lora: rank {ranks[path]} does not fit {path!r}, whose kernel is "
                f"{shape[-2]} x {shape[-1]}; allowed are 1 to {most}. Take a smaller "
                "rank or leave the layer out with `where`."
            )


def _check_within(path: str, rank: Any, most: int) -> None:
    if isinstance(rank, Tracer):
        return
    if jnp.any((jnp.asarray(rank) < 0) | (jnp.asarray(rank) > most)):
        raise ValueError(
            f"with_rank: rank {rank} for {path!r}, whose adapter was built with {most} "
            f"directions; allowed are 0 to {most}."
        )


def _check_known(what: str, named: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    missing = sorted(set(named) - set(known))
    if missing or not known:
        raise ValueError(
            f"{what}: no layer {', '.join(map(repr, missing)) or 'carries an adapter'}; "
            f"known are {', '.join(map(repr, sorted(known))) or 'none'}."
        )
