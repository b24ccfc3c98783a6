"""Named mistakes: each turns the function of a dialect into a mistaken one.

A mistake is a row of one of these tables. `diagnosis.py` says which tables a dialect is searched
with.
"""

from reference.conformance.mistakes.data import DATA
from reference.conformance.mistakes.kl import KL
from reference.conformance.mistakes.mistake import Mistake
from reference.conformance.mistakes.pairs import PAIRS as OF_LOSSES
from reference.conformance.mistakes.precision import PRECISION
from reference.conformance.mistakes.tokens import TOKENS
from reference.conformance.mistakes.training import TRAINING

PAIRS = OF_LOSSES + PRECISION

__all__ = ["DATA", "KL", "PAIRS", "TOKENS", "TRAINING", "Mistake"]
