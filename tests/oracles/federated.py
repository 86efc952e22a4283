"""FedProx, SCAFFOLD, FedDyn and the adaptive servers, from their papers."""

import numpy as np

from tests.oracles.federation import LR, FedAvg, Mean, P, gradient


class FedProx(FedAvg):
    """Li et al., 2020."""

    def __init__(self, mu):
        self.mu = mu

    def gradient(self, m, theta, rows, step):
        return gradient(theta, rows) + self.mu * (theta - step.anchor)


class Scaffold(FedAvg):
    """Karimireddy et al., 2020, Algorithm 1, option II with its learning rate."""

    def memory(self, theta):
        return {"c": np.zeros(P)}

    def gradient(self, m, theta, rows, step):
        return gradient(theta, rows) - m["c"] + step.shared

    def end(self, m, theta, steps, ctx):
        if steps:
            moved = (ctx.anchor - theta) / (steps * LR)
            m["c"] = m["c"] - ctx.shared + moved
        return m["c"]


class FedDyn(FedAvg):
    """Acar et al., 2021, Algorithm 1, on the client."""

    def __init__(self, alpha):
        self.alpha = alpha

    def memory(self, theta):
        return {"grad": np.zeros(P)}

    def gradient(self, m, theta, rows, step):
        near = self.alpha * (theta - step.anchor)
        return gradient(theta, rows) - m["grad"] + near

    def end(self, m, theta, steps, ctx):
        m["grad"] = m["grad"] - self.alpha * (theta - ctx.anchor)
        return np.zeros(P)


class Unweighted(Mean):
    """Every reporting client counts the same."""

    def delta(self, theta, ends, n):
        return np.mean([ends[k] - theta for k in ends], axis=0)


class FedDynServer(Mean):
    """Acar et al., 2021, Algorithm 1, on the server."""

    def __init__(self, alpha):
        self.alpha, self.h = alpha, np.zeros(P)

    def step(self, theta, ends, n, population):
        moved = sum(end - theta for end in ends.values())
        self.h = self.h - self.alpha / population * moved
        return np.mean(list(ends.values()), axis=0) - self.h / self.alpha


class Momentum(Mean):
    """Hsu et al., 2019, Algorithm 1: v ← βv + Δ, θ ← θ + ηv."""

    def __init__(self, lr, beta):
        self.lr, self.beta, self.v = lr, beta, np.zeros(P)

    def step(self, theta, ends, n, population):
        self.v = self.beta * self.v + self.delta(theta, ends, n)
        return theta + self.lr * self.v


class Adaptive(Mean):
    """Reddi et al., 2021, Algorithm 2, from v = τ²."""

    def __init__(self, kind, lr, b1, b2, tau):
        self.kind, self.lr, self.b1, self.b2, self.tau = kind, lr, b1, b2, tau
        self.m, self.v = np.zeros(P), np.full(P, tau**2)

    def step(self, theta, ends, n, population):
        delta = self.delta(theta, ends, n)
        self.m = self.b1 * self.m + (1 - self.b1) * delta
        for j in range(P):
            self.v[j] = self.second(self.v[j], delta[j] ** 2)
        return theta + self.lr * self.m / (np.sqrt(self.v) + self.tau)

    def second(self, v, d2):
        if self.kind == "adagrad":
            return v + d2
        if self.kind == "adam":
            return self.b2 * v + (1 - self.b2) * d2
        return v - (1 - self.b2) * d2 * np.sign(v - d2)
