"""Minima over the probability simplex: the weights of a mixture of K reward models.

Both functions enumerate the 2^K - 1 faces of the simplex, so they are exact and meant for small K.
"""

from itertools import chain, combinations

import numpy as np


def nearest_mixture(residuals):
    """The simplex weights whose mixture of residuals has the least mean square.

    argmin_{w in simplex} mean_b (sum_k w_k e_kb)^2

    The minimum lies inside one of the simplex's faces, where it solves a least-squares problem.
    This function solves that problem on every face and returns the best solution.

    Args:
        residuals: e [K, B].

    Returns:
        Weights [K], non-negative, with sum 1. If several give the same mixture, one of them.
    Source: ours, for `objectives.hull_weights`.
    """
    models = np.argsort(np.mean(residuals**2, axis=1))
    candidates = [_nearest_on_face(residuals, face) for face in _faces(models)]
    return min(candidates, key=lambda weights: np.mean((weights @ residuals) ** 2))


def minimise_on_simplex(function, size, max_steps=200):
    """The minimiser of a smooth convex function over the simplex, by damped Newton steps.

    argmin_{w in simplex} f(w)

    The search stops where slope . w - min slope is no more than rounding. This gap bounds how far
    f(w) is from its minimum (Frank and Wolfe).

    Args:
        function: w [size] -> value, slope [size] and curvature [size, size]. The curvature is the
            exact one or above it.
        size: K, the number of weights.
        max_steps: the largest number of Newton steps.

    Returns:
        Weights [size], non-negative, with sum 1.
    Source: ours, for `tabular.maximin` and `tabular.hull_policy`.
    """
    point = np.full(size, 1 / size)
    state = function(point)
    for _ in range(max_steps):
        _, slope, _ = state
        if slope @ point - np.min(slope) <= 1e-13 * (1 + np.max(np.abs(slope))):
            break
        step = _newton_step(function, point, state)
        if step is None:
            break
        point, state = step
    return point


def _faces(vertices):
    """Every non-empty subset of the vertices, as a list, the small ones first."""
    sizes = range(1, len(vertices) + 1)
    return map(list, chain.from_iterable(combinations(vertices, size) for size in sizes))


def _nearest_on_face(residuals, face):
    """The weights of the point nearest to 0 in the plane of a face, clipped to the simplex.

    A clipped point is a point of the simplex too, so it is not below the true minimum.
    """
    first, *others = face
    weights = np.zeros(len(residuals))
    directions = (residuals[others] - residuals[first]).T
    weights[others] = np.linalg.lstsq(directions, -residuals[first])[0] if others else []
    weights[first] = 1.0 - np.sum(weights)
    return np.maximum(weights, 0.0) / np.sum(np.maximum(weights, 0.0))


def _newton_step(function, point, state):
    """The next point and its state, or None where no shorter step makes progress."""
    _, slope, curvature = state
    gap = slope @ point - np.min(slope)
    move = _quadratic_minimum(slope - curvature @ point, curvature) - point
    for halvings in range(30):
        scale = 0.5**halvings
        next_point = point + scale * move
        next_state = function(next_point)
        if _is_progress(state, gap, scale * move, next_point, next_state):
            return next_point, next_state
    return None


def _is_progress(state, gap, move, next_point, next_state):
    """Whether the value falls enough, or the gap halves while the values differ by rounding."""
    value, slope, _ = state
    next_value, next_slope, _ = next_state
    level = next_value <= value + 1e-13 * (1 + abs(value))
    next_gap = next_slope @ next_point - np.min(next_slope)
    return next_value < value + 0.1 * slope @ move or (level and next_gap < gap / 2)


def _quadratic_minimum(linear, matrix):
    """argmin of linear . w + w' matrix w / 2 over the simplex: the best minimum on a face."""
    size = len(linear)
    matrix = matrix + 1e-14 * (1 + np.trace(matrix)) * np.eye(size)
    minima = [_minimum_on_face(linear, matrix, face) for face in _faces(range(size))]
    inside = [weights for weights in minima if np.min(weights) >= 0]
    return min(inside, key=lambda w: linear @ w + w @ matrix @ w / 2)


def _minimum_on_face(linear, matrix, face):
    """The minimiser with sum 1 and zeros off the face, from the linear system of its Lagrangian."""
    ones = np.ones((len(face), 1))
    system = np.block([[matrix[np.ix_(face, face)], ones], [ones.T, np.zeros((1, 1))]])
    weights = np.zeros(len(linear))
    weights[face] = np.linalg.solve(system, np.append(-linear[face], 1.0))[:-1]
    return weights
