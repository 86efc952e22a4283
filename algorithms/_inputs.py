"""What goes into the dense layers of a network, read off the program of its loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from fedcl import tree

CALLS = ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2")
SAME = ("convert_element_type", "copy")  # The kernel is still that kernel after them.


def layer_inputs(
    fn: Callable[..., Any], params: Any, kernels: Sequence[str], *args: Any
) -> dict[str, jax.Array]:
    r"""The x of every product :math:`x W` with a kernel W, [rows, d_in].

    `fn` is traced to a jaxpr, which is evaluated once more, and whatever a named kernel
    is multiplied with is put down; so any model will do, dense layers, convolutions by
    patches and low-rank adapters alike.

    Args:
      fn: `(params, *args) -> anything`.
      params: a tree of arrays.
      kernels: paths of leaves [d_in, d_out], such as "layers/0/kernel".
      *args: the other arguments.

    Returns:
      The inputs by path. A kernel that is used twice has the rows of both.

    Raises:
      ValueError: for a kernel that is not used, or otherwise than in x W: looked up,
        transposed, scanned over or multiplied with another kernel.

    Cost: a forward pass.

    >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    >>> x, p = jnp.ones((4, 3)), {"a": jnp.zeros((3, 2)), "b": jnp.zeros((2, 1))}
    >>> {k: v.shape for k, v in layer_inputs(fn, p, ["a", "b"], x).items()}
    {'a': (4, 3), 'b': (4, 2)}
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    leaves = jax.tree_util.tree_leaves_with_path((params, *args))
    first = [
        tree.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    names = [n if n in kernels else None for n in first]
    names += [None] * (len(leaves) - len(names))
    found: dict[str, list[jax.Array]] = {path: [] for path in kernels}
    _evaluate(closed.jaxpr, closed.consts, [x for _, x in leaves], names, found)
    for path, inputs in found.items():
        if not inputs:
            raise ValueError(f"The loss does not use the kernel {path!r}{_REMEDY}")
    return {path: jnp.concatenate(inputs) for path, inputs in found.items()}


_REMEDY = "; name the leaves to protect with where=, without this one."


def _evaluate(jaxpr: Jaxpr, consts, args, names, found):
    """The outputs of a jaxpr and which of them are kernels; fills `found`."""
    variables = [*jaxpr.constvars, *jaxpr.invars]
    value = dict(zip(variables, [*consts, *args], strict=True))
    name = dict(zip(variables, [None] * len(consts) + names, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else value[v]
    called = lambda v: None if isinstance(v, Literal) else name[v]
    for eqn in jaxpr.eqns:
        xs, labels = [*map(read, eqn.invars)], [*map(called, eqn.invars)]
        outs, labels = _step(eqn, xs, labels, found)
        value |= zip(eqn.outvars, outs, strict=True)
        name |= zip(eqn.outvars, labels, strict=True)
    return [*map(read, jaxpr.outvars)], [*map(called, jaxpr.outvars)]


def _step(eqn: JaxprEqn, xs, labels, found):
    """The outputs of one equation, and which of them are kernels."""
    primitive = eqn.primitive
    if primitive.name in CALLS:
        inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _evaluate(inner.jaxpr, inner.consts, xs, labels, found)
    kernels = [path for path in labels if path is not None]
    if kernels and primitive.name not in SAME:
        found[kernels[0]].append(_multiplied(eqn, xs, labels, kernels))
    outs = primitive.bind(*xs, **eqn.params)
    outs = outs if primitive.multiple_results else [outs]
    same = kernels[0] if kernels and primitive.name in SAME else None
    return outs, [same] * len(outs)


def _multiplied(eqn: JaxprEqn, xs, labels, kernels) -> jax.Array:
    """The other factor of a product with a kernel, [rows, d_in]."""
    if eqn.primitive.name == "dot_general" and len(kernels) == 1:
        contracted, batched = eqn.params["dimension_numbers"]
        at = labels.index(kernels[0])
        if tuple(contracted[at]) == (0,) and not batched[at]:
            x = jnp.moveaxis(xs[1 - at], contracted[1 - at][0], -1)
            return x.reshape(-1, x.shape[-1])
    raise ValueError(
        f"The kernel {kernels[0]!r} enters the operation {eqn.primitive.name!r} in another "
        f"way than as W in x W, so its inputs are not known{_REMEDY} A convolution needs "
        "form='patches'."
    )
