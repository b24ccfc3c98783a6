"""What a claim returns: two numbers and by how much the claim holds on one instance."""

from typing import NamedTuple

import numpy as np


class Evidence(NamedTuple):
    """The result of one measurement: how far a claim is from failing.

    A positive margin says that the claim holds, and by how much: the measured value could grow by
    this much. Zero says that the claim just holds. A negative margin, or NaN, says that the claim
    fails on this instance.

    Attributes:
        measured: the value that the claim bounds from above; for an identity the largest error.
        bound: the largest value that the claim allows; for an identity the tolerance.
        margin: bound - measured, plus the slack that rounding is allowed.
    """

    measured: float
    bound: float
    margin: float


def identity(measured, expected, tolerance=1e-9):
    """Evidence that two values are equal.

    max |measured - expected| <= tolerance (1 + max |expected|)

    Args:
        measured: an array or scalar.
        expected: an array or scalar of the same unit; the two broadcast.
        tolerance: the error allowed, relative to 1 + max |expected|.

    Returns:
        Evidence, with the largest error as `measured` and the allowed error as `bound`.
    """
    error = np.max(np.abs(measured - expected))
    allowed = tolerance * (1 + np.max(np.abs(expected)))
    return Evidence(float(error), float(allowed), float(allowed - error))


def at_most(measured, bound, slack=1e-9):
    """Evidence that a value is nowhere above its bound, up to rounding.

    measured <= bound + slack (1 + |bound|)

    Args:
        measured: an array or scalar.
        bound: an array or scalar of the same unit; the two broadcast.
        slack: the excess allowed, relative to 1 + |bound|; below 0 it asks for a strict inequality.

    Returns:
        Evidence at the entry with the smallest margin.
    """
    measured, bound = np.broadcast_arrays(np.asarray(measured, float), np.asarray(bound, float))
    margins = (bound - measured + slack * (1 + np.abs(bound))).ravel()
    index = int(np.argmin(margins))
    return Evidence(float(measured.flat[index]), float(bound.flat[index]), float(margins[index]))


def worst(*evidence):
    """The piece of evidence with the smallest margin; NaN counts as the smallest.

    Args:
        evidence: one or more `Evidence`.

    Returns:
        One of them.
    """
    return min(evidence, key=lambda item: -np.inf if np.isnan(item.margin) else item.margin)
