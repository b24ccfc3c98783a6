"""A claim of section 6, about all its methods. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import loglinear, tabular
from reference.claims.evidence import at_most, worst
from reference.methods import METHODS


def gradients_are_slopes(ref_logps, policy_logps, rewards, beta, rivals):
    """Every method's analytic gradient is the slope of its loss.

    Where reward models tie, the gradient lies between the slopes on the two sides. Slopes are
    differences over 1e-5, for responses of three draws.
    Source: section 6.
    """
    pairs = tabular.all_pairs(*ref_logps.shape)
    unordered = pairs[pairs[:, 1] < pairs[:, 2]]
    problem = tabular.problem(ref_logps, unordered, rewards)._replace(draws=3)
    direction = rivals[0]
    points = [policy_logps + step * direction for step in (-1e-5, 0.0, 1e-5)]
    evidence = []
    for method in METHODS.values():
        losses = [loglinear.loss(problem, method, point, beta, 0.5) for point in points]
        gradient = loglinear.gradient(problem, method, policy_logps, beta, 0.5)
        scale = 1 + losses[1] + beta**2 * np.max(direction**2)
        slope = np.sum(gradient * direction) / scale
        low, high = np.sort(np.diff(losses)) / 1e-5 / scale
        evidence += [at_most(low, slope, 1e-4), at_most(slope, high, 1e-4)]
    return worst(*evidence)
