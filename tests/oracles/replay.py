"""Replay, DER, DER++ and A-GEM, from their papers.

Which rows are kept and drawn comes from `fedcl.reservoir`, which has its own tests,
run on the ids of the rows alone; all else is NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedcl import _random, reservoir
from tests.oracles.federation import FedAvg, Y, back, gradient, logits, row, weights

_add = jax.jit(reservoir.add)
_sample = jax.jit(reservoir.sample, static_argnums=1)


class Ids:
    """A reservoir of row ids."""

    def __init__(self, capacity, groups=1):
        like = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
        example = {"id": like(jnp.int32), "mask": like(jnp.float32)}
        self.kept = reservoir.empty(example, capacity, groups)

    def offer(self, ids, rows, key, group=None):
        mask = jnp.asarray(rows["mask"], jnp.float32)
        batch = {"id": jnp.asarray(ids, jnp.int32), "mask": mask}
        group = None if group is None else jnp.asarray(group, jnp.int32)
        self.kept = _add(self.kept, batch, key, group)

    def draw(self, n, key):
        """Ids, none if there is nothing to draw from."""
        drawn = _sample(self.kept, n, key)
        ids = np.asarray(drawn["id"])
        return ids if (np.asarray(drawn["mask"]) > 0).all() else ids[:0]

    def draw_where(self, allowed, n, key):
        """Ids among those stored that are allowed."""
        rows = jax.tree.map(np.asarray, self.kept.rows)
        stored = rows["id"][rows["mask"] > 0]
        ids = np.array([i for i in stored if allowed(int(i))], np.int64)
        return (
            ids[np.asarray(_random.below(key, (n,), max(len(ids), 1)))]
            if len(ids)
            else ids
        )


class Replay(FedAvg):
    """Chaudhry et al., 2019: one weighted mean over new and remembered rows."""

    def __init__(self, capacity, per_batch, classes=None, strength=1.0):
        self.size, self.n = (capacity, classes or 1), per_batch
        self.balanced, self.strength = classes is not None, strength

    def memory(self, theta):
        return {"ids": Ids(*self.size)}

    def gradient(self, m, theta, rows, step):
        past = row(step.data, m["ids"].draw(self.n, step.key))
        past["mask"] = self.strength * past["mask"]
        group = rows["y"] if self.balanced else None
        m["ids"].offer(step.ids, rows, jax.random.fold_in(step.key, 1), group)
        both = {k: np.concatenate([rows[k], past[k]]) for k in rows}
        return gradient(theta, both)


class DER(FedAvg):
    """Buzzega et al., 2020, equations 4 to 6; β = None is DER."""

    def __init__(self, capacity, per_batch, alpha, beta=None):
        self.capacity, self.n, self.alpha, self.beta = capacity, per_batch, alpha, beta

    def memory(self, theta):
        return {"ids": Ids(self.capacity), "logits": {}}

    def gradient(self, m, theta, rows, step):
        g = gradient(theta, rows) + self.alpha * self.distil(m, theta, step)
        if self.beta is not None:
            k_labels = jax.random.fold_in(step.key, 2)
            past = row(step.data, m["ids"].draw(self.n, k_labels))
            g = g + self.beta * gradient(theta, past)
        for i, z in zip(step.ids, logits(theta, rows["x"]), strict=True):
            m["logits"][int(i)] = z
        m["ids"].offer(step.ids, rows, jax.random.fold_in(step.key, 1))
        return g

    def distil(self, m, theta, step):
        ids = m["ids"].draw(self.n, step.key)
        if not len(ids):
            return 0.0
        past = row(step.data, ids)
        then = np.stack([m["logits"][int(i)] for i in ids])
        gap = 2 / Y * (logits(theta, past["x"]) - then)
        return back(past["x"], weights(past["mask"])[:, None] * gap)


class AGEM(FedAvg):
    """Chaudhry et al., 2019b, equation 11."""

    def __init__(self, capacity, per_batch, past_only=True):
        self.capacity, self.n, self.past_only = capacity, per_batch, past_only
        self.projections = 0

    def memory(self, theta):
        return {"ids": Ids(self.capacity), "context": 0, "of": {}}

    def begin(self, m, theta, boundary):
        m["context"] += int(boundary)

    def gradient(self, m, theta, rows, step):
        g = gradient(theta, rows)
        k_sample, _, k_add = jax.random.split(step.key, 3)
        earlier = lambda i: m["of"].get(i, m["context"]) < m["context"]
        allowed = earlier if self.past_only else lambda i: True
        ids = m["ids"].draw_where(allowed, self.n, k_sample)
        m["ids"].offer(step.ids, rows, k_add)
        m["of"].update({int(i): m["context"] for i in step.ids})
        if not len(ids):
            return g
        r = gradient(theta, row(step.data, ids))
        self.projections += int(g @ r < 0)
        return g - (g @ r) / (r @ r) * r if g @ r < 0 else g
