"""Every method beside its oracle, and both run on the same federation.

The strength of a method is an argument of the compiled run, so one program serves
the oracle's strength and zero.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedcl import aggregation, base, cohorts, losses, phases, statistics, transform
from fedcl import algorithms as fc
from tests.oracles import federated, federation, regularisation, replay
from tests.oracles.federation import LR, N, S, T, Y

Server = Callable[[Any], Any]


class Case(NamedTuple):
    """A method, its oracle, and what zero strength must give."""

    oracle: Callable[[float], federation.FedAvg]
    method: Callable[[Any], base.ClientTransform | None]
    strength: float = 1.0
    server: Server | None = None
    oracle_server: Callable[[float], federation.Mean] = lambda s: federation.Mean()
    statistic: statistics.Statistic | None = None
    commit: Callable = fc.fisher_commit()
    heads: bool = False
    zero: str | None = None  # At zero strength: "bits" of, or "close" to, `zero_case`.
    zero_case: str = "fedavg"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    """The oracle's data as a stream."""

    batches: base.Batch  # [T, N, S, B, ...]
    tasks: jax.Array  # [T, N]
    train: jax.Array  # [T, N]

    num_clients = N
    ragged = True

    def sample(self, key, client, round):
        return {k: v[round, client] for k, v in self.batches.items()}

    def sweep(self, client, round):
        return {k: v[round, client] for k, v in self.batches.items()}

    def task(self, client, round):
        return self.tasks[round, client]

    def present(self, client, round):
        return self.train[round, client]

    def ends(self, client, round):
        after = self.tasks[jnp.minimum(round + 1, T - 1), client]
        return after != self.tasks[round, client]

    def example(self):
        like = lambda v: jax.ShapeDtypeStruct(v.shape[3:], v.dtype)
        return jax.tree.map(like, self.batches)


def recorded(d: federation.Data, heads: bool = False) -> Recorded:
    """The data on the device."""
    batches = {"x": d.x, "y": d.y, "mask": d.mask} | ({"head": d.head} if heads else {})
    kind = lambda a: jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32)
    tasks = jnp.asarray(d.task, jnp.int32)
    return Recorded(jax.tree.map(kind, batches), tasks, jnp.asarray(d.train))


def heard(report: jax.Array) -> cohorts.Sampler:
    """Everybody trains, and `report` [T, N] says who is heard."""
    everybody = jnp.arange(N), jnp.ones(N, bool)
    draw = lambda key, round, n: cohorts.Cohort(*everybody, report[round])
    return cohorts.Sampler(draw, shards=None)


def linear(params, x, key=None):
    """The classifier of the oracles."""
    return x @ params["kernel"] + params["bias"][None]


loss_fn = losses.softmax(linear)


def params_of(theta: np.ndarray) -> dict[str, jax.Array]:
    """The oracle's vector as parameters."""
    kernel, bias = federation.kernel_bias(theta)
    single = lambda a: jnp.asarray(a, jnp.float32)
    return {"kernel": single(kernel), "bias": single(bias)}


def parts(case: Case, strength: Any, report: jax.Array):
    """The algorithm of a case and the phases of its round."""
    server = None if case.server is None else case.server(strength)
    opt, method = optax.sgd(LR), case.method(strength)
    algorithm = fc.fedavg(loss_fn, opt, server=server, transform=method)
    one = phases.federated(algorithm, cohort=heard(report))
    if case.statistic is None:
        return algorithm, (one,)
    return algorithm, (one, phases.consolidate(case.statistic, case.commit, loss_fn))


@functools.partial(jax.jit, static_argnums=0)
def simulate(case: Case, strength, stream, params, report) -> base.State:
    """All rounds of a case."""
    algorithm, each = parts(case, strength, report)
    state = algorithm.init(params, stream.example(), N)
    one = lambda s, t: (phases.step(each, s, jax.random.key(5), t, stream)[0], None)
    return jax.lax.scan(one, phases.start(each, state), jnp.arange(T))[0]


def final(case: Case, strength: float | None = None, seed: int = 0) -> base.State:
    """fedcl's state after all rounds."""
    d = federation.data(seed)
    strength = case.strength if strength is None else strength
    stream, report = recorded(d, case.heads), jnp.asarray(d.report)
    return simulate(case, jnp.float32(strength), stream, params_of(d.theta), report)


def theta_of(state: base.State) -> np.ndarray:
    """The server's parameters as the oracle's vector."""
    kernel, bias = state.server.params["kernel"], state.server.params["bias"]
    return federation.vector(np.asarray(kernel), np.asarray(bias)).astype(np.float64)


@functools.cache
def keys(seed: int) -> jax.Array:
    """The keys [N, T, S] that a transform sees, told by one that remembers them."""

    def update(grads, memory, params, batch, aux, ctx):
        return grads, memory.at[ctx.round, ctx.step].set(jax.random.key_data(ctx.key))

    blank = jnp.zeros((T, S, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32)
    probe = transform(init=lambda params, example: blank, update=update)
    case = CASES["fedavg"]._replace(method=lambda s: probe)
    return jax.random.wrap_key_data(final(case, seed=seed).clients.memory)


def oracle(name: str, seed: int = 0) -> np.ndarray:
    """The oracle's θ after all rounds."""
    case, d = CASES[name], federation.data(seed)
    # What float32 makes of a strength is part of the problem, not an error.
    s = float(np.float32(case.strength))
    method, server = case.oracle(s), case.oracle_server(s)
    key_of = lambda t, k, s: keys(seed)[k, t, s]
    return federation.run(d, method, server, key_of, case.heads)


def mean_server(s: Any) -> aggregation.Server:
    return aggregation.server(aggregation.mean(), optax.sgd(1.0))


def _servers() -> dict[str, Case]:
    none, plain = (lambda s: None), (lambda s: federation.FedAvg())

    def case(server, oracle_server, strength, zero=None):
        return Case(plain, none, strength, server, oracle_server, zero=zero)

    adaptive = lambda kind, b1=0.9: lambda s: federated.Adaptive(kind, s, b1, 0.9, 0.05)
    kw = {"b2": 0.9, "tau": 0.05}
    return {
        "fedavg": Case(plain, none),
        "fedavg_heads": Case(plain, none, heads=True),
        "fedavg_unweighted": case(mean_server, lambda s: federated.Unweighted(), 1.0),
        "fedavgm": case(
            lambda s: fc.fedavgm(1.0, s),
            lambda s: federated.Momentum(1.0, s),
            0.6,
            "bits",
        ),
        "fedadam": case(lambda s: fc.fedadam(s, **kw), adaptive("adam"), 0.1),
        "fedyogi": case(lambda s: fc.fedyogi(s, **kw), adaptive("yogi"), 0.1),
        "fedadagrad": case(
            lambda s: fc.fedadagrad(s, tau=0.05), adaptive("adagrad", 0.0), 0.1
        ),
    }


def _federated() -> dict[str, Case]:
    return {
        "fedprox": Case(federated.FedProx, fc.fedprox, 0.5, zero="bits"),
        "scaffold": Case(
            lambda s: federated.Scaffold(),
            lambda s: fc.scaffold(),
            server=mean_server,
            oracle_server=lambda s: federated.Unweighted(),
        ),
        "feddyn": Case(
            federated.FedDyn,
            fc.feddyn,
            0.5,
            fc.feddyn_server,
            federated.FedDynServer,
            zero="bits",
            zero_case="fedavg_unweighted",
        ),
    }


def _regularisation() -> dict[str, Case]:
    r = regularisation
    ewc = lambda kind, decay: Case(
        lambda s: r.EWC(s, decay, kind),
        lambda s: fc.ewc(s, decay, kind),
        10.0,
        zero="bits",
    )
    si = lambda kind: Case(
        lambda s: r.SI(s, 0.1, kind == "total"),
        lambda s: fc.si(s, 0.1, kind),
        2.0,
        zero="bits",
    )
    return {
        "l2_anchor": Case(r.L2Anchor, fc.l2_anchor, 0.5, zero="bits"),
        "ewc_empirical": ewc("empirical", 1.0),
        "ewc_exact": ewc("exact", 0.7),
        "ewc_sampled": ewc("sampled", 1.0),
        "ewc_batched": ewc("batched", 1.0),
        "ewc_consolidated": Case(
            lambda s: r.EWC(s, 0.7, "exact", consolidated=True),
            fc.ewc_consolidated,
            10.0,
            statistic=statistics.fisher("exact"),
            commit=fc.fisher_commit(0.7),
            zero="bits",
        ),
        "mas": Case(
            lambda s: r.MAS(s, 0.9), lambda s: fc.mas(s, 0.9), 0.1, zero="bits"
        ),
        "mas_consolidated": Case(
            lambda s: r.MAS(s, consolidated=True),
            fc.mas_consolidated,
            0.1,
            statistic=statistics.sensitivity(),
            commit=fc.fisher_commit(),
            zero="bits",
        ),
        "si_task": si("task"),
        "si_total": si("total"),
        "lwf": Case(r.LwF, lambda s: fc.lwf(s, Y), 1.5, zero="bits"),
        "lwf_heads": Case(
            lambda s: r.LwF(s, heads=True),
            lambda s: fc.lwf(s, Y),
            1.5,
            heads=True,
            zero="bits",
            zero_case="fedavg_heads",
        ),
    }


def _replay() -> dict[str, Case]:
    r = replay
    return {
        "replay": Case(
            lambda s: r.Replay(7, 3, None, s),
            lambda s: fc.replay(7, 3, strength=s),
            0.8,
            zero="close",
        ),
        "replay_balanced": Case(
            lambda s: r.Replay(12, 4, Y, s),
            lambda s: fc.replay(12, 4, Y, s),
            1.0,
            zero="close",
        ),
        "der": Case(
            lambda s: r.DER(7, 3, s), lambda s: fc.der(7, 3, Y, s), 2.0, zero="close"
        ),
        "derpp": Case(
            lambda s: r.DER(7, 3, s, s / 2),
            lambda s: fc.derpp(7, 3, Y, s, s / 2),
            1.0,
            zero="close",
        ),
        "agem": Case(lambda s: r.AGEM(9, 4), lambda s: fc.agem(9, 4)),
        "agem_all": Case(
            lambda s: r.AGEM(9, 4, False), lambda s: fc.agem(9, 4, past_only=False)
        ),
    }


CASES = _servers() | _federated() | _regularisation() | _replay()
