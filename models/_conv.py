"""Convolution by patches and a matrix product where that is faster, and a small network."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fedcl.models._init import lecun_init
from fedcl.models._model import Model, from_nnx

Padding = Literal["SAME", "VALID"]
Form = Literal["patches", "conv"]


def patches(
    x: jax.Array, kernel: int, stride: int = 1, padding: Padding = "SAME"
) -> jax.Array:
    """The k x k neighbourhood of every output pixel, laid out along the channels.

    Args:
      x: images, [B, H, W, D].
      kernel: k, the side of the window.
      stride: step of the window.
      padding: `"SAME"` or `"VALID"`, as in `jax.lax.conv_general_dilated`.

    Returns:
      [B, H', W', k * k * D]; the order is that of a [k, k, D, out] kernel reshaped
      to [k * k * D, out].

    >>> patches(jnp.ones((2, 8, 8, 3)), 3, 2).shape
    (2, 4, 4, 27)
    """
    sides = x.shape[1:3]
    pads = jax.lax.padtype_to_pads(sides, (kernel, kernel), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    ends = [side + sum(pad) - kernel + 1 for side, pad in zip(sides, pads, strict=True)]
    views = [
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return jnp.concatenate(views, axis=-1)


def pooled(x: jax.Array, size: int, kind: Literal["max", "avg"]) -> jax.Array:
    """Max or average over size x size tiles, by a reshape.

    Args:
      x: [B, H, W, D], H and W multiples of `size`.
      size: side of a tile.
      kind: `"max"` or `"avg"`.

    Returns:
      [B, H / size, W / size, D].

    >>> pooled(jnp.arange(4.0).reshape(1, 2, 2, 1), 2, "avg").item()
    1.5
    """
    rows, height, width, depth = x.shape
    tiles = x.reshape(rows, height // size, size, width // size, size, depth)
    if kind == "avg":
        return jnp.mean(tiles, axis=(2, 4))
    # The gradient of `jnp.max` takes twice as long on a CPU.
    each = [tiles[:, :, i, :, j] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.maximum, each)


class PatchConv(nnx.Module):
    """A 2-d convolution, by patches and one matrix product or by `lax.conv`.

    `jax.lax.conv_general_dilated` under vmap over clients with their own kernels is
    a grouped convolution, about 20 times slower than patches on a CPU; other
    accelerators have units for it. The kernel lives in `linear`, [k * k * in, out],
    whatever the form, so that LoRA can be put beside it: then, and where a method
    asks what goes into the kernel (GPM), patches are the form.

    Args:
      in_features: channels that come in.
      out_features: channels that go out.
      kernel: k, the side of the window.
      stride: step of the window.
      padding: `"SAME"` or `"VALID"`.
      form: `"patches"` or `"conv"`; None: patches if JAX's default backend is a CPU.
      rngs: where the parameters come from.

    Cost: patches take k² times the memory of the input.

    >>> conv = PatchConv(3, 8, 3, rngs=nnx.Rngs(0))
    >>> conv(jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = "SAME",
        form: Form | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.linear = nnx.Linear(kernel * kernel * in_features, out_features, rngs=rngs)
        self.window = (kernel, stride, padding)
        self.form = form

    def __call__(self, x: jax.Array) -> jax.Array:
        form = self.form or ("patches" if jax.default_backend() == "cpu" else "conv")
        if form == "conv" and type(self.linear) is nnx.Linear:
            return _convolved(self.linear, x, *self.window)
        return self.linear(patches(x, *self.window))


def _convolved(
    linear: nnx.Linear, x: jax.Array, kernel: int, stride: int, padding: Padding
) -> jax.Array:
    """What `linear` gives on patches, by `lax.conv`."""
    assert linear.bias is not None
    w, bias = linear.kernel[...], linear.bias[...]
    x, w, bias = linear.promote_dtype((x, w, bias), dtype=linear.dtype)
    w = w.reshape(kernel, kernel, x.shape[-1], linear.out_features)
    order = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=order
    )
    return y + bias.reshape(1, 1, 1, -1)


class ConvNet(nnx.Module):
    """Stages of convolution, GroupNorm, activation and 2 x 2 pooling, then `head`."""

    def __init__(
        self,
        image: tuple[int, int, int],
        widths: Sequence[int],
        num_classes: int,
        kernel: int,
        groups: int,
        activation: Callable[[jax.Array], jax.Array],
        pool: Literal["max", "avg"],
        form: Form | None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        pairs = list(zip((image[2], *widths[:-1]), widths, strict=True))
        convs = [PatchConv(m, n, kernel, form=form, rngs=rngs) for m, n in pairs]
        norms = [nnx.GroupNorm(n, num_groups=groups, rngs=rngs) for n in widths]
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        side = 2 ** len(widths)
        features = image[0] // side * (image[1] // side) * widths[-1]
        self.head = nnx.Linear(features, num_classes, rngs=rngs)
        self.image, self.activation = image, activation
        self.pool: Literal["max", "avg"] = pool

    def features(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], *self.image)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = pooled(self.activation(norm(conv(x))), 2, self.pool)
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


def convnet(
    image: tuple[int, int, int] = (8, 8, 1),
    widths: Sequence[int] = (16, 32),
    num_classes: int = 10,
    *,
    kernel: int = 3,
    groups: int = 4,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    pool: Literal["max", "avg"] = "max",
    form: Form | None = None,
) -> Model:
    """A small convolutional network with GroupNorm.

    One stage per width: convolution ("SAME"), GroupNorm (Wu and He, "Group
    Normalization", 2018, https://arxiv.org/abs/1803.08494), activation, 2 x 2
    pooling; then a linear head on the flattened features.

    Args:
      image: height, width, channels.
      widths: channels of the stages; each halves height and width.
      num_classes: outputs.
      kernel: side of the convolution windows.
      groups: groups of GroupNorm; must divide every width.
      activation: elementwise.
      pool: `"max"` or `"avg"`.
      form: how to convolve, `"patches"` or `"conv"`, as in `PatchConv`.

    Returns:
      A model with parameters `convs/0/linear`, `norms/0`, …, `head`; `apply` takes
      [B, H, W, D] (or rows flattened) and gives [B, num_classes].

    Raises:
      ValueError: if an image side is not a multiple of 2 ** len(widths), a width is
        not a multiple of `groups`, or `pool` or `form` is none of those named.

    Cost: that of `PatchConv`.

    >>> model = convnet((8, 8, 1), widths=(4,), num_classes=3)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.ones((5, 8, 8, 1))).shape
    (5, 3)
    """
    _check(image, widths, groups, pool, form)
    options = (kernel, groups, activation, pool, form)
    return from_nnx(
        lambda rngs: ConvNet(image, widths, num_classes, *options, rngs=rngs),
        init=lecun_init,
    )


def _check(
    image: tuple[int, int, int],
    widths: Sequence[int],
    groups: int,
    pool: str,
    form: str | None,
) -> None:
    side = 2 ** len(widths)
    if image[0] % side or image[1] % side:
        raise ValueError(
            f"convnet: {len(widths)} stages halve the image {len(widths)} times, so "
            f"its sides must be multiples of {side}, got {image[0]} x {image[1]}; pass "
            "fewer widths or pad the images."
        )
    if not widths or any(width % groups for width in widths):
        raise ValueError(
            f"convnet: every width must be a multiple of groups={groups} and there "
            f"must be at least one, got widths={tuple(widths)}."
        )
    if pool not in ("max", "avg"):
        raise ValueError(f"convnet: `pool` must be 'max' or 'avg', got {pool!r}.")
    if form not in (None, "patches", "conv"):
        raise ValueError(
            f"convnet: `form` must be 'patches', 'conv' or None, got {form!r}."
        )
