"""Losses of foundation models equal their loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import base, losses, metrics, models, tree
from tests.oracles import language

V, LENGTH, B = 11, 7, 4
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, LENGTH))
SEGMENTS = np.array(
    [[1] * 7, [1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
)
WEIGHTS = RNG.uniform(0, 2, (B, LENGTH)) * (np.arange(LENGTH) > 1)
MASK = np.array([1.0, 0.5, 1.0, 1.0])
TABLE = RNG.normal(size=(V, V))


def single(**columns):
    kind = lambda a: jnp.int32 if np.asarray(a).dtype.kind == "i" else jnp.float32
    return {n: jnp.asarray(a, kind(a)) for n, a in columns.items()}


def bigram(params, x, key=None):
    tokens = x["tokens"] if isinstance(x, dict) else x
    return params[tokens]


PARAMS = jnp.asarray(TABLE, jnp.float32)
TEXTS = {
    "plain": {},
    "packed": {"segments": SEGMENTS},
    "supervised": {"segments": SEGMENTS, "weights": WEIGHTS},
}


@pytest.mark.parametrize("name", TEXTS)
def test_next_token(name):
    own = TEXTS[name]
    batch = single(tokens=TOKENS, mask=MASK, **own)
    loss, aux = losses.next_token(bigram)(PARAMS, batch, None)
    want = language.next_token(TABLE[TOKENS], TOKENS, MASK, **own)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert aux.shape == (B, LENGTH, V)
    count = float(losses.predictions(batch).sum())
    pairs = [(b, t) for b in range(B) for t in range(1, LENGTH)]
    same = lambda b, t: not own or SEGMENTS[b, t] == SEGMENTS[b, t - 1] > 0
    weight = lambda b, t: own.get("weights", np.ones((B, LENGTH)))[b, t] * MASK[b]
    want = sum(weight(b, t) for b, t in pairs if same(b, t))
    np.testing.assert_allclose(count, want, rtol=1e-6)


def test_rows_that_are_not_real_and_padding_do_not_count():
    batch = single(tokens=TOKENS, mask=MASK, **TEXTS["supervised"])
    loss = losses.next_token(bigram)
    grad = jax.grad(lambda p, b: loss(p, b, None)[0])
    want, gone = grad(PARAMS, batch), {n: x[None] for n, x in batch.items()}
    gone = {n: jnp.concatenate([x[0], 7 - x[0]]) for n, x in gone.items()}
    gone["mask"] = jnp.concatenate([batch["mask"], jnp.zeros(B)])
    np.testing.assert_allclose(grad(PARAMS, gone), want, atol=1e-7)
    nobody = {**batch, "mask": jnp.zeros(B)}
    assert loss(PARAMS, nobody, None)[0] == 0
    assert not np.any(grad(PARAMS, nobody))


def test_a_model_reads_what_is_there():
    read = losses.inputs
    assert read(single(tokens=TOKENS, mask=MASK)).shape == TOKENS.shape
    batch = single(tokens=TOKENS, segments=SEGMENTS, weights=WEIGHTS, mask=MASK)
    assert set(read(batch)) == {"tokens", "segments"}
    assert read({"x": 1, "tokens": 2}) == 1
    with pytest.raises(ValueError, match="the batch has mask, y"):
        read({"y": 1, "mask": 2})


def test_masked_tokens():
    n = 200
    tokens = np.tile(TOKENS, (n, 1))
    batch = single(
        tokens=tokens,
        segments=np.tile(SEGMENTS, (n, 1)),
        weights=np.tile(WEIGHTS, (n, 1)),
        mask=np.tile(MASK, n),
    )
    seen = []

    def model(params, x, key):
        if not isinstance(params, jax.core.Tracer):
            seen.append(np.asarray(x["tokens"]))
        return params[x["tokens"]]

    mask_id, loss = 10, losses.masked_tokens(model, 0.3, 10)
    value, _ = loss(PARAMS, batch, jax.random.key(0))
    (read,) = seen
    counts = np.asarray(batch["mask"])[:, None] * batch["weights"]
    counts = counts * (batch["segments"] > 0)
    k_hide = jax.random.split(jax.random.key(0))[0]
    k_chosen = jax.random.split(k_hide, 3)[0]
    chosen = np.asarray(jax.random.bernoulli(k_chosen, 0.3, tokens.shape)) & (
        counts > 0
    )
    want = language.masked_tokens(TABLE[read], tokens, chosen, counts)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.array_equal(read[~chosen], tokens[~chosen])
    among, was = read[chosen], tokens[chosen]
    share = np.mean(among[was != mask_id] == mask_id)
    assert abs(share - (0.8 + 0.1 / V)) < 0.03
    kept = np.mean(among[was != mask_id] == was[was != mask_id])
    assert abs(kept - (0.1 + 0.1 / V)) < 0.03
    assert abs(chosen[counts > 0].mean() - 0.3) < 0.03
    again, _ = loss(PARAMS, batch, jax.random.key(1))
    assert again != value
    with pytest.raises(ValueError, match="give a key"):
        loss(PARAMS, batch, None)
    with pytest.raises(ValueError, match="`rate` is 1.5"):
        losses.masked_tokens(model, 1.5, 0)


def adapted(params, x, key=None):
    tokens = x["tokens"] if isinstance(x, dict) else x
    lora = params["head"]["lora"]
    return params["head"]["kernel"][tokens] + lora["scale"] * lora["b"][tokens]


@pytest.mark.parametrize("kind", ["adapters", "a reference of one's own"])
def test_dpo(kind):
    tokens = RNG.integers(0, V, (B, 2, LENGTH))
    weights = RNG.uniform(0, 1, tokens.shape) * (np.arange(LENGTH) > 2)
    moved = RNG.normal(size=(V, V))
    batch = single(tokens=tokens, weights=weights, mask=MASK)
    lora = {"scale": jnp.float32(2.0), "b": jnp.asarray(moved, jnp.float32)}
    params = {"head": {"kernel": PARAMS, "lora": lora}}
    loss, old = losses.dpo(adapted, 0.3), TABLE
    if kind != "adapters":
        half = lambda p: {"head": {**p["head"], "kernel": p["head"]["kernel"] / 2}}
        loss, old = losses.dpo(adapted, 0.3, half), TABLE / 2 + 2 * moved
    value, aux = loss(params, batch, None)
    both = (TABLE + 2 * moved)[tokens], old[tokens]
    want, rewards = language.dpo(*both, tokens, weights, MASK, 0.3)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(aux, rewards, rtol=1e-4, atol=1e-5)
    fixed = losses.adapters_off(params)
    at_start = {"head": {"kernel": PARAMS, "lora": fixed["head"]["lora"]}}
    assert np.isclose(losses.dpo(adapted)(at_start, batch, None)[0], np.log(2))


def test_dpo_learns_the_chosen_and_leaves_the_reference_out_of_the_gradient():
    tokens = RNG.integers(0, V, (B, 2, LENGTH))
    batch = single(tokens=tokens, mask=MASK)
    lora = {"scale": jnp.float32(1.0), "b": jnp.zeros((V, V))}
    params = {"head": {"kernel": PARAMS, "lora": lora}}
    loss = lambda p: losses.dpo(adapted, 1.0)(p, batch, None)
    grads, rewards = jax.grad(loss, has_aux=True)(params)
    g = grads["head"]["lora"]["b"]
    np.testing.assert_allclose(grads["head"]["kernel"], g, atol=1e-6)
    step = {"scale": lora["scale"], "b": -0.1 * g}
    after = loss({"head": {"kernel": PARAMS, "lora": step}})[1]
    assert np.all(rewards == 0) and np.sum((after[:, 0] - after[:, 1]) * MASK) > 0
    with pytest.raises(ValueError, match=r"\[4, 7\]; they must be pairs"):
        losses.dpo(adapted)(params, single(tokens=TOKENS, mask=MASK), None)


def low_rank(accumulator=None, how=None):
    """A decoder, and it with adapters on a base that may be quantised."""
    config = models.DecoderConfig(V, 8, 2, 2, 16, layout="llama")
    plain = models.decoder(config)
    start = plain.init(jax.random.key(0))
    if how:
        plain, start = models.quantise(plain, start, how=how, group=4)
    made = models.lora(plain, start, rank=2, alpha=4.0, key=jax.random.key(1))
    if accumulator:
        made = models.accumulated(
            *made, rank={"dense": None, "factors": 2}[accumulator]
        )
    return (plain, start), made


def drawn_at(params, *names):
    def leaf(path, x):
        chosen = tree.path_string(path).endswith(names)
        return jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) if chosen else x

    rng = np.random.default_rng(3)
    return jax.tree_util.tree_map_with_path(leaf, params)


LEARNED = ("lora/b", "accumulator/update", "accumulator/a", "accumulator/b")


@pytest.mark.parametrize("how", [None, "nf4"])
@pytest.mark.parametrize("accumulator", [None, "dense", "factors"])
def test_dpo_refers_to_the_base_beneath_adapters(accumulator, how):
    (plain, start), (model, params) = low_rank(accumulator, how)
    tokens = np.random.default_rng(4).integers(0, V, (B, 2, LENGTH))
    batch = single(tokens=tokens, mask=MASK)
    moved = drawn_at(params, *LEARNED)
    assert not np.allclose(model.apply(moved, TOKENS), plain.apply(start, TOKENS), 0.1)
    back = model.apply(losses.adapters_off(moved), TOKENS)
    np.testing.assert_allclose(back, plain.apply(start, TOKENS), atol=1e-6)
    phi, theta = tree.partition(moved, models.lora_only)
    loss = lambda p: losses.dpo(model.apply, 1.0)(tree.merge(p, theta), batch, None)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(phi)
    both = [
        m.apply(p, tokens.reshape(-1, LENGTH))
        for m, p in ((model, moved), (plain, start))
    ]
    both = [np.asarray(z, float).reshape(B, 2, LENGTH, V) for z in both]
    want, _ = language.dpo(*both, tokens, np.ones(tokens.shape), MASK, 1.0)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    assert abs(value - np.log(2)) > 1e-3
    assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["full fine-tuning", "bottleneck adapters"])
def test_dpo_refuses_a_model_without_adapters_to_switch_off(kind):
    (model, params), _ = low_rank()
    if kind != "full fine-tuning":
        key = jax.random.key(1)
        model, params = models.bottleneck(model, params, width=2, key=key)
    tokens = np.random.default_rng(4).integers(0, V, (B, 2, LENGTH))
    batch = single(tokens=tokens, mask=MASK)
    with pytest.raises(ValueError, match=r"`lora/scale`.*blocks/.*a `reference`"):
        losses.dpo(model.apply)(params, batch, None)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    own = losses.dpo(model.apply, 1.0, reference=lambda p: params)
    assert abs(own(moved, batch, None)[0] - np.log(2)) > 1e-3


@pytest.mark.parametrize("named", [False, True])
def test_contrastive(named):
    z = RNG.normal(size=(5, 5)) * 2
    mask = np.array([1.0, 0.0, 0.5, 1.0, 1.0])
    out = losses.Output(params := jnp.asarray(z, jnp.float32), jnp.zeros((5, 2)))
    model = lambda p, x, key: out._replace(logits=p) if named else p
    value, aux = losses.contrastive(model)(params, single(x=z, mask=mask), None)
    np.testing.assert_allclose(value, language.contrastive(z, mask), rtol=1e-6)
    assert isinstance(aux, losses.Output) == named
    grad = jax.grad(
        lambda p: losses.contrastive(model)(p, single(x=z, mask=mask), 0)[0]
    )
    g = grad(params)
    assert not np.any(g[1]) and not np.any(g[:, 1]) and np.all(np.diag(g)[[0, 2, 3, 4]])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence(temperature):
    teacher, student = RNG.normal(size=(2, 3, 4, V))
    got = losses.divergence(
        *(single(x=z)["x"] for z in (teacher, student)), temperature
    )
    want = language.divergence(teacher, student, temperature)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_real_is_the_mask_and_no_padding():
    batch = single(tokens=TOKENS, segments=SEGMENTS, mask=MASK)
    want = MASK[:, None] * (SEGMENTS > 0)
    np.testing.assert_array_equal(losses.real(batch, jnp.zeros((B, LENGTH))), want)
    np.testing.assert_array_equal(losses.real(batch, jnp.zeros(B)), MASK)


def state_of(params):
    n, zero = jnp.float32(1), jnp.int32(0)
    server = base.ServerState(params, None, (), (), (), n, zero)
    return base.State(server, base.ClientState((), (), (), jnp.zeros(1), jnp.zeros(1)))


@pytest.mark.parametrize("chunk", [None, 3])
def test_nats_per_token_of_each_context_and_client(chunk):
    tokens = RNG.integers(0, V, (3, B, LENGTH))
    segments = np.stack([SEGMENTS, SEGMENTS[::-1], 0 * SEGMENTS])
    mask = np.stack([MASK, 1 - 0 * MASK, MASK])
    test = single(tokens=tokens, segments=segments, mask=mask)
    shares = RNG.uniform(size=(2, 3))
    evaluate = metrics.loss_evaluator(
        losses.next_token(bigram), test, shares.astype(np.float32), chunk=chunk
    )
    got = jax.jit(lambda e, s: e(s))(evaluate, state_of(PARAMS))
    each = [
        language.next_token(TABLE[tokens[k]], tokens[k], mask[k], segments[k])
        for k in range(2)
    ]
    np.testing.assert_allclose(got["loss"][:2], each, rtol=1e-5)
    assert np.isnan(got["loss"][2])  # A context without a token to predict.
    want = shares[:, :2] @ each / shares[:, :2].sum(axis=1)
    np.testing.assert_allclose(got["per_client"], want, rtol=1e-5)


def test_loss_evaluator_of_a_classifier_and_without_clients():
    x, y = RNG.normal(size=(2, 5, V)), RNG.integers(0, V, (2, 5))
    test = single(x=x, y=y, mask=np.ones((2, 5)))
    loss = losses.softmax(lambda params, x, key: x @ params)
    evaluate = metrics.loss_evaluator(loss, test, chunk=2)
    got = evaluate(state_of(PARAMS))
    nats = language.log_softmax(x @ TABLE)
    want = [-np.mean([nats[k, i, y[k, i]] for i in range(5)]) for k in range(2)]
    assert set(got) == {"loss"}
    np.testing.assert_allclose(got["loss"], want, rtol=1e-5)
    with pytest.raises(ValueError, match="chunk is 0"):
        metrics.loss_evaluator(loss, test, chunk=0)


def test_forgetting_in_nats_is_positive_when_losses_rise():
    L = np.array([[2.0, 6.0, 7.0], [2.4, 3.0, 6.5], [2.9, 3.1, 2.5]])
    want = ((2.9 - 2.0) + (3.1 - 3.0)) / 2
    np.testing.assert_allclose(metrics.loss_forgetting(L), want, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss_rise(L), [0.9, 0.1, 0.0], atol=1e-6)
    mean = np.mean(metrics.loss_rise(L)[:-1])
    np.testing.assert_allclose(metrics.backward_transfer(-L), -mean, rtol=1e-5)
    better = L.copy()
    better[2, 0] = 1.5
    assert metrics.loss_forgetting(better) < 0
    with pytest.raises(ValueError, match="R has 2 rows for 3"):
        metrics.loss_rise(L[:2])
