"""Continual learning on one machine: SI and online EWC as loops over contexts."""

import numpy as np

from tests.oracles.federation import LR, P, Y, back, gradient, probabilities


def si(theta, contexts, strength, damping):
    """Zenke et al., 2017; `contexts` is a list of lists of batches."""
    omega, anchor = np.zeros(P), theta.copy()
    for batches in contexts:
        path, start = np.zeros(P), theta.copy()
        for rows in batches:
            g = gradient(theta, rows)
            pull = 2 * strength * omega * (theta - anchor)
            after = theta - LR * (g + pull)
            path += -g * (after - theta)
            theta = after
        omega = omega + np.maximum(path, 0) / ((theta - start) ** 2 + damping)
        anchor = theta.copy()
    return theta


def ewc(theta, contexts, strength, decay):
    """Online EWC with the empirical Fisher along the way."""
    fisher, anchor = np.zeros(P), theta.copy()
    for batches in contexts:
        squares, n = np.zeros(P), 0.0
        for rows in batches:
            error = probabilities(theta, rows) - np.eye(Y)[rows["y"]]
            for x, e, w in zip(rows["x"], error, rows["mask"], strict=True):
                squares += w * back(x[None], e[None]) ** 2
            n += rows["mask"].sum()
            pull = strength * fisher * (theta - anchor)
            theta = theta - LR * (gradient(theta, rows) + pull)
        fisher, anchor = decay * fisher + squares / n, theta.copy()
    return theta
