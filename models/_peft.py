"""Small trained parts beside a frozen network: adapters, scalings, biases."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedcl.models import _layers
from fedcl.models._init import normals
from fedcl.models._lora import check_plain
from fedcl.models._model import Model, Params
from fedcl.models._trainable import Predicate

Call = Callable[[jax.Array], jax.Array]


def ends_sublayer(path: str) -> bool:
    """The last layer of an attention or an MLP, after both of which Houlsby adapts.

    >>> ends_sublayer("blocks/attention/out"), ends_sublayer("blocks/mlp/up")
    (True, False)
    """
    return path.split("/")[-1] in ("out", "down")


def gives_keys_or_values(path: str) -> bool:
    """The layers of an attention whose outputs (IA)³ scales; `qkv` has both.

    >>> gives_keys_or_values("blocks/attention/v"), gives_keys_or_values("head")
    (True, False)
    """
    return path.split("/")[-1] in ("k", "v", "qkv")


def reads_hidden(path: str) -> bool:
    """The last layer of an MLP, whose inputs (IA)³ scales.

    >>> reads_hidden("blocks/mlp/down"), reads_hidden("blocks/attention/out")
    (True, False)
    """
    return path.split("/")[-1] == "down"


def bottleneck(
    model: Model,
    params: Params,
    *,
    width: int,
    where: Predicate = ends_sublayer,
    key: jax.Array,
) -> tuple[Model, Params]:
    """Puts an adapter behind layers: y <- y + W_up gelu(W_down y + b_down) + b_up.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019,
    https://arxiv.org/abs/1902.00751: behind attention and MLP, before the residual sum.
    Behind the MLP alone (`where=lambda path: path.endswith("mlp/down")`), Pfeiffer et
    al., "AdapterFusion", 2021, https://arxiv.org/abs/2005.00247. W_down is normal with
    variance 1 / D and the rest is zero, so the outputs do not change at first.

    Args:
      model: a model of Flax NNX modules; every `nnx.Linear` is a candidate.
      params: its parameters.
      width: of the bottleneck.
      where: `(path) -> bool` over layers.
      key: draws W_down.

    Returns:
      The adapted model and parameters: beside each chosen `kernel` [..., in, D] lies
      `adapter`, a dict of `down` and `up`, each of a `kernel` [..., D, width] or
      [..., width, D] and a `bias`. `adapters_only` selects them.

    Raises:
      ValueError: if no layer is chosen (the candidates are listed) or `width` < 1.

    Cost: 2 D width parameters a layer, and as many multiplications a row.

    >>> from fedcl.models import mlp
    >>> model = mlp((6, 8, 4))
    >>> model, params = bottleneck(model, model.init(jax.random.key(0)), width=2,
    ...     where=lambda path: path != "head", key=jax.random.key(1))
    >>> jax.tree.map(jnp.shape, params["layers"]["0"]["adapter"]["down"])
    {'bias': (2,), 'kernel': (8, 2)}
    """
    if width < 1:
        raise ValueError(f"bottleneck: `width` must be at least 1, got {width}.")
    shapes = _chosen("bottleneck", "adapter", model, params, where)

    def draw(key: jax.Array) -> dict[str, Params]:
        noise = normals(key, [(*s[:-2], s[-1], width) for s in shapes.values()])
        return {
            path: _adapter(shape[-1] ** -0.5 * down)
            for (path, shape), down in zip(shapes.items(), noise, strict=True)
        }

    change = _layers.adapted("adapter", _behind)
    return _layers.attach(model, params, "adapter", change, draw, key)


def ia3(
    model: Model,
    params: Params,
    *,
    outputs: Predicate = gives_keys_or_values,
    inputs: Predicate = reads_hidden,
) -> tuple[Model, Params]:
    """(IA)³: learned scalings of keys, values and the inner activations of the MLP.

    K <- l_k ⊙ K, V <- l_v ⊙ V and (l_ff ⊙ γ(W_up x)) W_down. Liu et al., "Few-Shot
    Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    2022, https://arxiv.org/abs/2205.05638. All ones at first.

    Args:
      model: a model of Flax NNX modules; every `nnx.Linear` is a candidate.
      params: its parameters.
      outputs: layers whose outputs are scaled. Of a layer called `qkv`, which gives
        queries, keys and values side by side, only the last two thirds are.
      inputs: layers whose inputs are scaled.

    Returns:
      The adapted model and parameters: beside each chosen `kernel` lies `ia3`, a dict
      of `output` [..., out] or `input` [..., in], or both. `ia3_only` selects them,
      `merge_ia3` puts them into the kernels.

    Raises:
      ValueError: if no layer is chosen; the candidates are listed.

    >>> from fedcl.models import vit
    >>> model = vit((4, 4, 1), patch=2, width=8, depth=1, heads=2, num_classes=3)
    >>> model, params = ia3(model, model.init(jax.random.key(0)))
    >>> jax.tree.map(jnp.shape, params["blocks"]["mlp"]["down"]["ia3"])
    {'input': (1, 32)}
    """
    either = lambda path: outputs(path) or inputs(path)
    shapes = _chosen("ia3", "ia3", model, params, either)

    def scales(path: str, shape: tuple[int, ...]) -> Params:
        out = shape[-1] * 2 // 3 if path.split("/")[-1] == "qkv" else shape[-1]
        sizes = {"output": out} if outputs(path) else {}
        sizes |= {"input": shape[-2]} if inputs(path) else {}
        return {name: jnp.ones((*shape[:-2], n)) for name, n in sizes.items()}

    draw = lambda key: {path: scales(path, shape) for path, shape in shapes.items()}
    change = _layers.adapted("ia3", _scaled)
    return _layers.attach(model, params, "ia3", change, draw, jax.random.key(0))


def merge_ia3(params: Params) -> Params:
    """Multiplies the scalings of (IA)³ into kernels and biases.

    W <- diag(l_in) W diag(l_out) and b <- l_out ⊙ b.

    Args:
      params: parameters with scalings; stacked over clients under `jax.vmap`.

    Returns:
      Parameters of the model before `ia3`; `params` itself is left alone.

    Raises:
      ValueError: if a kernel is quantised (an integer, or fewer than 16 bits), or a
        layer with scalings carries something else as well.

    >>> node = {"kernel": jnp.ones((3, 2)), "ia3": {"output": jnp.array([1.0, 4.0])}}
    >>> merge_ia3({"head": node})["head"]["kernel"][0].tolist()
    [1.0, 4.0]
    """
    return _merged(params, "")


def _merged(params: Any, path: str) -> Any:
    if not isinstance(params, Mapping):
        return params
    under = f"{path}/" if path else ""
    rest: Params = {n: _merged(child, under + n) for n, child in params.items()}
    if "ia3" not in rest:
        return rest
    scales: Any = rest.pop("ia3")
    kernel: Any = rest.get("kernel")
    check_plain("merge_ia3", path, kernel)
    others = sorted(rest.keys() - {"kernel", "bias"})
    if others:
        raise ValueError(
            f"merge_ia3: {path or 'the layer'!r} carries {', '.join(others)} as well, "
            "and its parameters do not say which acts first; merge it before, if it was "
            "put there before (IA)³."
        )
    new = kernel.astype(jnp.float32)
    if "input" in scales:
        new = scales["input"][..., None] * new
    if "output" in scales:
        out = _whole(scales["output"], kernel.shape[-1])
        new = new * out[..., None, :]
        bias = rest.get("bias")
        rest |= {} if bias is None else {"bias": (out * bias).astype(bias.dtype)}
    return rest | {"kernel": new.astype(kernel.dtype)}


def _whole(scale: jax.Array, size: int) -> jax.Array:
    """Ones before the scales, so that there are `size` of them."""
    lead, missing = scale.shape[:-1], size - scale.shape[-1]
    return jnp.concatenate([jnp.ones((*lead, missing), scale.dtype), scale], axis=-1)


def biases(
    model: Model, params: Params, *, where: Predicate = lambda path: True
) -> tuple[Model, Params]:
    """Gives layers that have no bias a zero one, for BitFit: only biases are trained.

    Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for
    Transformer-based Masked Language-models", 2022, https://arxiv.org/abs/2106.10199.
    A network whose layers all have biases needs `biases_only` alone.

    Args:
      model: a model of Flax NNX modules.
      params: its parameters.
      where: `(path) -> bool` over the layers without a bias.

    Returns:
      The model and parameters with a `bias` [..., out] beside each chosen kernel.

    Raises:
      ValueError: if no layer is chosen; the candidates are listed.

    >>> from fedcl.models import from_nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, use_bias=False, rngs=rngs))
    >>> model, params = biases(model, model.init(jax.random.key(0)))
    >>> params["bias"].shape
    (2,)
    """
    shapes = _chosen("biases", "bias", model, params, where)
    blank = lambda shape: jnp.zeros((*shape[:-2], shape[-1]))
    draw = lambda key: {path: blank(shape) for path, shape in shapes.items()}
    return _layers.attach(model, params, "bias", _biased, draw, jax.random.key(0))


def _chosen(
    what: str, name: str, model: Model, params: Params, where: Predicate
) -> _layers.Shapes:
    """The kernel shapes of the chosen layers that have no leaf `name` yet."""
    layers = _layers.candidates(model, what)
    free = {
        path: layer
        for path, layer in layers.items()
        if name not in _layers.at(params, path, what)
    }
    found = _layers.chosen(what, params, free, where)
    return {path: layers[path].kernel.shape for path in found}


def _adapter(down: jax.Array) -> Params:
    *lead, wide, narrow = down.shape
    return {
        "down": {"kernel": down, "bias": jnp.zeros((*lead, narrow))},
        "up": {
            "kernel": jnp.zeros((*lead, narrow, wide)),
            "bias": jnp.zeros((*lead, wide)),
        },
    }


def _behind(call: Call, layer: Any, inputs: jax.Array) -> jax.Array:
    y = call(inputs)
    hidden = jax.nn.gelu(_dense(layer, layer.adapter.down, y))
    return y + _dense(layer, layer.adapter.up, hidden).astype(y.dtype)


def _dense(layer: Any, part: Any, x: jax.Array) -> jax.Array:
    parts = (x, part.kernel[...], part.bias[...])
    x, kernel, bias = layer.promote_dtype(parts, dtype=layer.dtype)
    return x @ kernel + bias.reshape(*[1] * (x.ndim - 1), -1)


def _scaled(call: Call, layer: Any, inputs: jax.Array) -> jax.Array:
    part = layer.ia3
    x = _times(inputs, part.input[...]) if hasattr(part, "input") else inputs
    y = call(x)
    return _times(y, part.output[...]) if hasattr(part, "output") else y


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The last coordinates of x scaled; as many as there are scales."""
    scale = _whole(scale, x.shape[-1]).astype(x.dtype)
    return x * scale.reshape(*[1] * (x.ndim - 1), -1)


def _biased(layer: Any, parts: Any, rngs: nnx.Rngs) -> None:
    layer.bias, layer.use_bias = nnx.Param(parts), True
