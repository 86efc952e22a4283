r"""Losses of foundation models: tokens to predict, preferences, pairs.

A batch of text has the columns "tokens" [B, T] int32; "segments" [B, T] int32, the
number of the document that a token is of, 0 for padding, if rows hold several or are
padded; "weights" [B, T], how much it counts to predict each token from those before
it, 0 for a prompt (supervised fine-tuning); and "mask" [B] as everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedcl import base, tree
from fedcl._classification import (
    HIDDEN,
    cross_entropy,
    inputs,
    logits_of,
    masked_mean,
)

Apply = Callable[..., Any]


def real(batch: base.Batch, like: jax.Array) -> jax.Array:
    """How much each output counts: the mask, and 0 at padding; of the shape of `like`.

    Args:
      batch: a batch.
      like: [B] or, for text, [B, T].
    """
    rows = batch["mask"].reshape(-1, *[1] * (like.ndim - 1))
    if like.ndim > 1 and "segments" in batch:
        rows = rows * (batch["segments"] > 0)
    return jnp.broadcast_to(rows, like.shape).astype(jnp.float32)


def _targets(batch: base.Batch) -> jax.Array:
    """How much it counts to predict tokens 1, 2, …; [B, T - 1]."""
    tokens = batch["tokens"]
    weight = batch["mask"][:, None] * jnp.ones(tokens.shape)
    weight = weight * batch["weights"] if "weights" in batch else weight
    if "segments" in batch:
        s = batch["segments"]
        same = (s[:, 1:] == s[:, :-1]) & (s[:, 1:] > 0)
        return weight[:, 1:] * same
    return weight[:, 1:]


def _nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each next token, [B, T - 1], in float32 whatever the model computes in."""
    return cross_entropy(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])


def next_token(apply: Apply) -> base.LossFn:
    r"""Mean cross-entropy of each next token, in nats; `aux` is the logits [B, T, V].

    .. math:: \frac{-1}{\sum_{b,t} w_{b,t}} \sum_{b,t} w_{b,t} \log p(x_{b,t} | x_{b,<t})

    With "weights" that are 0 on prompts this is supervised fine-tuning.

    Args:
      apply: `(params, x, key) -> logits [B, T, V]`, where x is what `inputs` gives.

    Returns:
      A loss over batches of text. w is mask × weights where a token follows one of its
      own segment, and 0 elsewhere.

    >>> loss = next_token(lambda params, tokens, key: params[tokens])
    >>> batch = {"tokens": jnp.array([[0, 1, 1]]), "mask": jnp.ones(1)}
    >>> round(loss(jnp.zeros((2, 2)), batch, None)[0].item(), 4)
    0.6931
    """

    def loss_fn(params, batch, key):
        out = apply(params, inputs(batch), key)
        nats = _nats(logits_of(out), batch["tokens"])
        return masked_mean(nats.reshape(-1), _targets(batch).reshape(-1)), out

    return loss_fn


def predictions(batch: base.Batch) -> jax.Array:
    """How many predictions each row stands for, [B], the weight behind its mean loss.

    Tokens that have one before them in their segment, for text without labels; otherwise
    1. Times mask.

    >>> predictions({"tokens": jnp.ones((2, 5)), "mask": jnp.array([1.0, 0.0])})
    Array([4., 0.], dtype=float32)
    """
    if "tokens" not in batch or "y" in batch or "images" in batch:
        return batch["mask"]
    return jnp.sum(_targets(batch), axis=1)


def masked_tokens(apply: Apply, rate: float, mask_id: int) -> base.LossFn:
    """BERT's masked language modelling; `aux` is the logits [B, T, V].

    Each token that counts is chosen with probability `rate`. Of those chosen 80 % are
    replaced by the mask, 10 % by a token drawn uniformly, and 10 % stay; the loss is
    the mean cross-entropy of what they were.

    Args:
      apply: `(params, x, key) -> logits [B, T, V]`, where x is what `inputs` gives.
      rate: 0.15 in the paper.
      mask_id: the token in place of those hidden.

    Returns:
      A loss over batches of text, which needs a key. Tokens of weight 0 (padding,
      markers of beginning and end, see "weights") are never chosen.

    Raises:
      ValueError: if `rate` is not in (0, 1], or without a key.

    Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805
    """
    if not 0 < rate <= 1:
        raise ValueError(f"masked_tokens: `rate` is {rate}; it must lie in (0, 1].")

    def loss_fn(params, batch, key):
        if key is None:
            raise ValueError("masked_tokens draws which tokens are hidden: give a key.")
        k_hide, k_model = jax.random.split(key)
        shape = jax.eval_shape(lambda p: apply(p, inputs(batch), k_model), params)
        words = logits_of(shape).shape[-1]
        counts = _tokens_that_count(batch)
        hidden, chosen = _hide(k_hide, batch["tokens"], counts, rate, mask_id, words)
        out = apply(params, inputs({**batch, "tokens": hidden}), k_model)
        nats = cross_entropy(logits_of(out).astype(jnp.float32), batch["tokens"])
        weight = jnp.where(chosen, counts, 0)
        return masked_mean(nats.reshape(-1), weight.reshape(-1)), out

    return loss_fn


def _tokens_that_count(batch: base.Batch) -> jax.Array:
    weight = real(batch, batch["tokens"])
    return weight * batch["weights"] if "weights" in batch else weight


def _hide(key, tokens, counts, rate, mask_id, words) -> tuple[jax.Array, jax.Array]:
    """The tokens with some hidden, and which were chosen."""
    k_chosen, k_kind, k_word = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(k_chosen, rate, tokens.shape) & (counts > 0)
    kind = jax.random.uniform(k_kind, tokens.shape)
    word = jax.random.randint(k_word, tokens.shape, 0, words, tokens.dtype)
    other = jnp.where(kind < 0.8, jnp.asarray(mask_id, tokens.dtype), word)
    return jnp.where(chosen & (kind < 0.9), other, tokens), chosen


def adapters_off(params: base.Params) -> base.Params:
    """The same parameters with every low-rank path switched off: the base model.

    What a server has added up beside the kernels (`accumulator`) is switched off too.

    Args:
      params: parameters with adapters of `fedcl.models.lora`, φ and θ merged.

    Returns:
      Them with zeros in `lora/scale` and in all of `accumulator`.

    Raises:
      ValueError: if no leaf is a `lora/scale`: nothing could be switched off.

    >>> adapters_off({"q": {"kernel": 1.0, "lora": {"scale": jnp.float32(2)}}})
    {'q': {'kernel': 1.0, 'lora': {'scale': Array(0., dtype=float32)}}}
    """
    known = [path.split("/") for path in tree.describe(params)]
    if not any(names[-2:] == ["lora", "scale"] for names in known):
        listed = ", ".join("/".join(names) for names in known[:8])
        raise ValueError(
            "adapters_off: no parameter is a `lora/scale`, so that the reference would "
            f"be the policy itself; the paths are {listed}"
            f"{', …' if len(known) > 8 else ''}. Train adapters of fedcl.models.lora, "
            "or give dpo a `reference` of your own, such as lambda params: start."
        )

    def leaf(path, x):
        names = tree.path_string(path).split("/")
        off = names[-2:] == ["lora", "scale"] or "accumulator" in names
        return jnp.zeros_like(x) if off else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def dpo(
    apply: Apply,
    beta: float = 0.1,
    reference: Callable[[base.Params], base.Params] = adapters_off,
) -> base.LossFn:
    r"""Direct preference optimisation; `aux` is the rewards [B, 2].

    .. math::
       -\log \sigma(r_{chosen} - r_{rejected}), \qquad
       r = \beta \log \frac{\pi(y|x)}{\pi_{ref}(y|x)}

    The reference is a function of the parameters: with adapters it is the frozen base
    that they stand beside, so nothing is copied.

    Args:
      apply: `(params, x, key) -> logits [B, T, V]`, where x is what `inputs` gives.
      beta: β.
      reference: `(params) -> params` of the reference, all of φ and θ given. By
        default what is trained must be adapters of `fedcl.models.lora`.

    Returns:
      A loss over batches of pairs, the chosen text first and the rejected one second:
      "tokens" [B, 2, T], "weights" and "segments" alike if there are, and "mask" [B].
      Weights 1 on the answer and 0 on the prompt.

    Raises:
      ValueError: if the tokens are not pairs, or there are no adapters to switch off.

    Rafailov et al., 2023, https://arxiv.org/abs/2305.18290

    Cost: one forward pass beside the usual two.
    """

    def loss_fn(params, batch, key):
        texts = _unpaired(batch)
        own = _log_probability(apply, params, texts, key)
        old = _log_probability(apply, reference(params), texts, key)
        rewards = beta * (own - jax.lax.stop_gradient(old)).reshape(-1, 2)
        rows = jax.nn.softplus(rewards[:, 1] - rewards[:, 0])
        return masked_mean(rows, batch["mask"]), rewards

    return loss_fn


def _unpaired(batch: base.Batch) -> base.Batch:
    """Pairs [B, 2, T] as rows [2 B, T], each with a mask of 1."""
    shape = batch["tokens"].shape
    if len(shape) != 3 or shape[1] != 2:
        raise ValueError(
            f"dpo: tokens have the shape {list(shape)}; they must be pairs [B, 2, T], "
            "chosen and rejected."
        )
    names = ("tokens", "segments", "positions", "weights")
    texts: base.Batch = {
        n: batch[n].reshape(-1, shape[-1]) for n in names if n in batch
    }
    return texts | {"mask": jnp.ones(2 * shape[0])}


def _log_probability(apply, params, texts: base.Batch, key) -> jax.Array:
    """Of each text's weighted tokens, [B]."""
    told = {n: x for n, x in texts.items() if n != "weights"}
    logits = logits_of(apply(params, inputs(told), key))
    return -jnp.sum(_nats(logits, texts["tokens"]) * _targets(texts), axis=1)


def contrastive(apply: Apply) -> base.LossFn:
    r"""CLIP's symmetric InfoNCE over the pairs of a batch; `aux` is what `apply` gives.

    .. math::
       \frac1{2B} \sum_i -\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
       - \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}}

    Args:
      apply: `(params, x, key) -> logits z [B, B]` of every image against every text, or
        a tuple that names them `logits`; x is what `inputs` gives.

    Returns:
      A loss over batches such as "images", "tokens" and "mask". A pair of mask 0 is no
      other pair's rival either.

    Radford et al., 2021, https://arxiv.org/abs/2103.00020

    >>> loss = contrastive(lambda params, x, key: x @ params)
    >>> batch = {"x": jnp.eye(2), "mask": jnp.ones(2)}
    >>> round(loss(jnp.zeros((2, 2)), batch, None)[0].item(), 4)
    0.6931
    """

    def loss_fn(params, batch, key):
        out = apply(params, inputs(batch), key)
        z, mask = logits_of(out).astype(jnp.float32), batch["mask"]
        own = jnp.arange(z.shape[0])
        open_ = (mask > 0)[None, :]
        each = [cross_entropy(jnp.where(open_, a, HIDDEN), own) for a in (z, z.T)]
        return masked_mean((each[0] + each[1]) / 2, mask), out

    return loss_fn
