"""A round is a list of phases, each behind a switch.

Federated learning is one phase; FFM's Algorithm 2 is a public phase before it; FedDF
distils the cohort's models after it; an exact Fisher at the end of a context is a
consolidation phase. The switch is a small function of the round's facts and says how
many steps a phase runs: 0 skips it without cost. docs/ffm.md has the formulas.
"""

import jax
from jax.sharding import Mesh

from fedcl import _engine, base, cohorts
from fedcl._consolidate import consolidate as consolidate
from fedcl._consolidate import solve as solve
from fedcl._consolidate import sum_over_clients as sum_over_clients
from fedcl._distil import distil as distil
from fedcl._phase import Carried as Carried
from fedcl._phase import Federated as Federated
from fedcl._phase import Maker as Maker
from fedcl._phase import Phase as Phase
from fedcl._phase import check_switch
from fedcl._phase import served as served
from fedcl._phase import start as start
from fedcl._phase import step as step
from fedcl._public import aside as aside
from fedcl._public import client_gradient as client_gradient
from fedcl._public import gradient as gradient
from fedcl._public import join as join
from fedcl._public import public as public
from fedcl._switches import Facts as Facts
from fedcl._switches import Switch as Switch
from fedcl._switches import Watched as Watched
from fedcl._switches import all_of as all_of
from fedcl._switches import always as always
from fedcl._switches import any_of as any_of
from fedcl._switches import available as available
from fedcl._switches import budget as budget
from fedcl._switches import conflict as conflict
from fedcl._switches import context_ends as context_ends
from fedcl._switches import every as every
from fedcl._switches import mean_sent as mean_sent
from fedcl._switches import plateau as plateau
from fedcl._switches import sent as sent
from fedcl._switches import until as until
from fedcl._validation import validation as validation


def federated(
    algorithm: base.Algorithm,
    *,
    cohort: cohorts.Sampler | None = None,
    schedule: _engine.Schedule = "vmap",
    mesh: Mesh | None = None,
    switch: Switch | None = None,
    review: Switch | None = None,
    name: str = "",
) -> Phase:
    """A cohort trains on its stream and the server aggregates.

    Then every client whose context ends with this round, whether it took part or not,
    reviews it, if the algorithm asks for that.

    Args:
      algorithm: the federated algorithm.
      cohort: who takes part; everyone by default.
      schedule: "vmap", "scan" or a chunk size.
      mesh: a mesh with an axis "clients", or None.
      switch: in which rounds; None: in all.
      review: when all clients present review their rows, for streams that hide their
        boundaries, such as `every(10)`; None: each when its own context ends.
      name: prefixes its metrics.

    Returns:
      A `Phase`.

    Raises:
      ValueError: for an unknown schedule, for `review` if the algorithm has nothing to
        review, or when the round is built, for a mesh that the population or the cohort
        does not fit.
    """
    sampler = cohort or cohorts.everyone()
    if review is not None and algorithm.review is None:
        raise ValueError(
            "federated: review= says when clients look at all their rows again, and no "
            "method of this algorithm does (none has the hook `review`): leave it out."
        )

    def draw(data, client):
        stream, key, round = data
        return _engine.visit_of(stream, key, client, round)

    check_switch(review, "federated: `review`")
    run_cohort = _engine.cohort_fn(algorithm, draw, schedule, mesh)
    review_now = _engine.review_fn(algorithm, mesh)

    def apply(data, steps, state, memory, facts):
        _engine.check_mesh(mesh, facts.num_clients, sampler.shards)
        k_cohort, k_clients = jax.random.split(facts.key)
        who = sampler.draw(k_cohort, facts.round, facts.num_clients)
        present = jax.vmap(facts.stream.present, in_axes=(0, None))
        who = who._replace(train=who.train & present(who.client, facts.round))
        told = (facts.stream, k_clients, facts.round)
        state, metrics = run_cohort(state, who, told, who.client, facts.fold)
        k_review = jax.random.fold_in(facts.key, 2)
        on = None if review is None else review.decide((), state, facts) > 0
        state = review_now(state, facts.stream, k_review, facts.round, on)
        return state, memory, metrics

    def init(data, state):
        if review is not None and jax.tree.leaves(review.init(state)):
            raise ValueError(
                "federated: review= takes a switch without memory, such as every(10)."
            )
        return ()

    built = Federated(algorithm, sampler, schedule, mesh)
    return Phase((), name, init, apply, switch, sampler.shards, federated=built)
