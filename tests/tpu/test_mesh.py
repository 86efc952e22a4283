"""A large base beside the clients, and pmap: the same round, and who talks to whom."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import fedcl
from fedcl import (
    _program,
    aggregation,
    algorithms,
    base,
    cohorts,
    losses,
    models,
    testing,
    tpu,
)
from fedcl import tree as t
from tests.problems import many, replaying

KEY = jax.random.key(3)
CONFIG = models.DecoderConfig(
    vocab=16, width=8, depth=2, heads=4, hidden=12, tied=False
)
CLIENTS, STEPS, ROWS, TOKENS = 8, 2, 4, 6
COHORT = cohorts.stratified(4, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts(base.Stationary):
    """Every client meets its own rows, drawn anew in every round."""

    tokens: jax.Array  # [N, M, T]

    num_clients = CLIENTS

    def sample(self, key, client, round):
        which = jax.random.randint(key, (STEPS, ROWS), 0, self.tokens.shape[1])
        rows = self.tokens[client][which]
        ones = jnp.ones((STEPS, ROWS))
        return {"tokens": rows, "segments": jnp.ones_like(rows), "mask": ones}


def federation(layout=None, spread=None):
    """A LoRA federation of a decoder, its θ laid over a mesh by rules."""
    model = models.decoder(CONFIG)
    params = model.init(jax.random.key(0))
    adapted, params = models.lora(model, params, rank=2, alpha=4.0, key=KEY)
    phi, theta = t.partition(params, models.lora_only)
    move = lambda x: x + 0.1 * jax.random.normal(KEY, x.shape)  # b is 0 at first.
    phi = jax.tree.map(move, phi)
    loss = losses.next_token(adapted.apply)
    if layout is not None:
        theta = tpu.shard(theta, tpu.decoder_rules(*layout[1:]), layout[0])
    if spread is not None:
        loss = tpu.split_rows(loss, spread)
    algorithm = algorithms.fedavg(loss, optax.sgd(0.1), transform=replaying())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab, (CLIENTS, 5, TOKENS))
    stream = Texts(jnp.asarray(tokens, jnp.int32))
    state = algorithm.init(phi, stream.example(), CLIENTS, theta)
    return algorithm, state, stream


def ends(algorithm, state, stream, where=None):
    kw = {"key": KEY, "rounds": 2, "every": 1, "cohort": COHORT, "mesh": where}
    return fedcl.run(algorithm, state, stream, **kw)[0]


@pytest.fixture(scope="module")
def plain():
    """The federation on one device."""
    algorithm, state, stream = federation()
    end = ends(algorithm, state, stream)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.server, end.server)
    assert max(jax.tree.leaves(moved.params)) > 1e-2
    return end


def assert_close(a, b, tolerance=2e-5):
    one = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    jax.tree.map(one, a, b)


LAYOUTS = {
    "tensor": ({"model": 4}, ("model", None)),
    "tensor and fully sharded": ({"model": 2, "data": 2}, ("model", "data")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_base_over_devices_gives_the_same_federation(plain, name):
    axes, rules = LAYOUTS[name]
    where = tpu.mesh(2, **axes)
    spread = where if "data" in axes else None
    algorithm, state, stream = federation((where, *rules), spread)
    before = _program._compiled._cache_size()
    end = ends(algorithm, state, stream, where)
    assert_close(end, plain)
    assert _program._compiled._cache_size() == before + 1
    frozen = lambda s: t.describe(jax.tree.map(lambda x: x, s.server.frozen))
    assert frozen(end) == frozen(state)
    kernel = end.server.frozen["blocks"]["attention"]["q"]["kernel"]
    parts = 4  # Of model, or of data times model.
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    memory = jax.tree.leaves(end.clients)[0]
    assert memory.addressable_shards[0].data.shape[0] * 2 == CLIENTS


def collectives(text):
    """`(operation, elements that it moves, groups of devices)` of a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\((.*)", text)
    for shapes, kind, rest in found:
        sizes = re.findall(r"\[([\d,]*)\]", shapes.split("{")[0] + shapes)
        size = max(np.prod([int(n) for n in s.split(",") if n]) for s in sizes)
        yield kind, int(size), groups(rest)


def groups(rest):
    """Devices that talk with each other, in any of XLA's three notations."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest)
    if listed:
        return [[int(i) for i in g.split(",")] for g in listed[1][1:-1].split("},{")]
    named = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest)
    if named:
        sizes = {k: int(n) for k, n in re.findall(r"('\w+')=(\d+)", named[1])}
        axes = [list(sizes).index(name) for name in named[2].split(",")]
        ids = np.arange(np.prod(list(sizes.values()))).reshape(*sizes.values())
        last = range(-len(axes), 0)
        inside = np.prod([ids.shape[i] for i in axes])
        return np.moveaxis(ids, axes, last).reshape(-1, int(inside)).tolist()
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    )
    assert iota, rest
    shape, dims = ([int(n) for n in g.split(",")] for g in iota.groups()[:2])
    ids = np.arange(np.prod(dims)).reshape(dims)
    if iota[3]:
        ids = ids.transpose([int(n) for n in iota[3].split(",")])
    return ids.reshape(shape).tolist()


CROSSINGS = {
    "clients alone": (8, 1, "vmap"),
    "beside a model": (2, 4, "vmap"),
    "added up client by client": (4, 1, "scan"),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_only_the_reduction_crosses_the_clients_axis(name):
    devices, inner, schedule = CROSSINGS[name]
    where = tpu.mesh(devices, model=inner)
    algorithm, state, stream = federation(
        (where, *LAYOUTS["tensor"][1]) if inner > 1 else None
    )
    spread = {"cohort": cohorts.stratified(8, devices), "mesh": where}
    part = fedcl.phases.federated(algorithm, schedule=schedule, **spread)
    state = fedcl._engine.place(fedcl.phases.start((part,), state), where)
    one = jax.jit(lambda *a: fedcl.phases.step((part,), *a))
    text = one.lower(state, KEY, jnp.int32(0), stream).compile().as_text()
    crossing = [
        (kind, size)
        for kind, size, found in collectives(text)
        if any(len({i // inner for i in group}) > 1 for group in found)
    ]
    largest = max(x.size for x in jax.tree.leaves(state.server.params))
    sums = [size for kind, size in crossing if kind == "all-reduce"]
    others = [size for kind, size in crossing if kind != "all-reduce"]
    assert sums and max(sums) <= largest  # φ's leaves, and weights.
    assert max(others, default=0) <= CLIENTS  # Ids, to draw and check the cohort.
    assert max(x.size for x in jax.tree.leaves(state.clients)) > 4 * CLIENTS


SERVERS = {"linear": aggregation.weighted_mean, "robust": aggregation.median}


@pytest.mark.parametrize("name", SERVERS)
def test_pmap_gives_the_same_rounds(name):
    problem = many(testing.toy_problem(), 8)
    server = aggregation.server(SERVERS[name](), optax.adam(0.1))
    algorithm = algorithms.fedavg(
        problem.loss_fn, optax.sgd(0.1), server=server, transform=replaying()
    )
    state = algorithm.init(problem.params, problem.stream.example(), 8)
    want = got = state
    got = got._replace(clients=tpu.per_device(state.clients, 4))
    plain = jax.jit(fedcl.round_fn(algorithm))
    mapped = tpu.pmap_round(algorithm, devices=jax.devices()[:4])
    sampler = cohorts.reporting(
        cohorts.stratified(4, 4, available=cohorts.bernoulli(0.8)),
        cohorts.bernoulli(0.7),
    )
    part = lambda a: tpu.per_device(a, 4)
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        who = sampler.draw(key, jnp.int32(i), 8)
        visits = jax.vmap(
            lambda c, i=i, k=key: fedcl._engine.visit_of(problem.stream, k, c, i)
        )(who.client)
        want, told = plain(want, visits, who.train, who.report)
        got, seen = mapped(got, *map(part, (visits, who.train, who.report)))
        assert_close(seen, told)
    assert not told["fault"].any() and told["reported"].any()
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), got.clients)
    assert_close(got._replace(clients=flat), want)
    assert jax.tree.leaves(got.clients)[0].sharding.device_set == set(jax.devices()[:4])
    # A client of another device is no member of this one.
    stray = visits._replace(client=visits.client[::-1])
    assert mapped(got, part(stray))[1]["fault"].any()
    with pytest.raises(ValueError, match=r"must be \[4, C/4\]"):
        mapped(got, visits)


def test_meshes_have_the_axes_that_are_used():
    assert dict(tpu.mesh().shape) == {"clients": 8}
    assert dict(tpu.mesh(model=4).shape) == {"clients": 2, "model": 4}
    assert tpu.mesh(2, data=2, model=2).axis_names == ("clients", "data", "model")
    for asked in ({"clients": 9}, {"clients": 4, "model": 4}, {"model": 0}):
        with pytest.raises(ValueError, match="devices, was asked for; there are 8"):
            tpu.mesh(**asked)


BASE = {"q": {"kernel": np.ones((6, 8), np.float32)}}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel", P("model"))], r"'q/kernel' \(6, 8\) cannot be laid over"),
        ([("kernel", P("clients"))], 'splits over "clients"'),
        ([("kernel", P(None, "data"))], r"the axis \"data\"; the mesh has"),
        ([("nowhere", P())], r"no rule fits any leaf.*q/kernel"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        tpu.shard(BASE, rules, tpu.mesh(2, model=4))


def test_rows_and_clients_must_divide():
    with pytest.raises(ValueError, match='names the axis "data"'):
        tpu.split_rows(lambda p, b, k: (0.0, ()), tpu.mesh())
    loss = tpu.split_rows(lambda p, b, k: (b["x"].sum(), ()), tpu.mesh(data=2))
    assert jax.jit(loss)((), {"x": jnp.ones(4)}, KEY)[0] == 4
    with pytest.raises(ValueError, match="3 rows does not split into 2"):
        loss((), {"x": jnp.ones(3)}, KEY)
    with pytest.raises(ValueError, match="5 clients do not split over 4"):
        tpu.per_device(jnp.ones(5), 4)


def test_the_rules_of_decoders_name_their_large_leaves():
    for layout in ("llama", "gpt2"):
        biased = {"qkv_bias": True, "mlp_bias": True}
        config = dataclasses.replace(CONFIG, layout=layout, tied=False, **biased)
        shapes = jax.eval_shape(models.decoder(config).init, KEY)
        paths = [
            t.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(shapes)
        ]
        laid = {p: tpu._shard._spec(p, tpu.decoder_rules()) for p in paths}
        whole = [p for p, spec in laid.items() if "model" not in spec]
        small = r"norm|position|(out|down)/bias"
        assert all(re.search(small, p) for p in whole), whole
