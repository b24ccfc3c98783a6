"""Named mistakes: each turns the function of a dialect into a mistaken one.

A mistake is a row of one of these tables. `hypotheses.py` says which tables a dialect is searched
with. Of two mistakes the one that comes first here is applied first: functions of the margin, then
what the margin is made of.
"""

from reference.conformance.mistakes.columns import COLUMNS
from reference.conformance.mistakes.counts import COUNTS
from reference.conformance.mistakes.data import DATA
from reference.conformance.mistakes.ensembles import ENSEMBLES
from reference.conformance.mistakes.kl import KL as COMMON_KL
from reference.conformance.mistakes.kl import ODD_KL
from reference.conformance.mistakes.links import LINKS
from reference.conformance.mistakes.mistake import Mistake
from reference.conformance.mistakes.pairs import PAIRS as OF_LOSSES
from reference.conformance.mistakes.precision import PRECISION
from reference.conformance.mistakes.quantities import OF_QUANTITIES
from reference.conformance.mistakes.reductions import ODD, REDUCTIONS
from reference.conformance.mistakes.scores import SCORES_OF_TOKENS
from reference.conformance.mistakes.segments import SEGMENTS
from reference.conformance.mistakes.smoothing import SMOOTHING
from reference.conformance.mistakes.tokens import TOKENS as OF_MASKS
from reference.conformance.mistakes.training import TRAINING

KL = COMMON_KL + ODD_KL
TOKENS = SCORES_OF_TOKENS + COUNTS + OF_MASKS + SEGMENTS
OF_BOTH = OF_LOSSES + SMOOTHING + COLUMNS + REDUCTIONS + ODD
OF_WHOLE = PRECISION + OF_BOTH
"""Those that may also be made around a dialect that is built on a loss of pairs."""
PAIRS = PRECISION + LINKS + ENSEMBLES + OF_QUANTITIES + OF_BOTH
OF_CLAIMED = frozenset(LINKS + ENSEMBLES + OF_QUANTITIES + COLUMNS + ODD + ODD_KL)
"""These are not looked for in a dialect that is not the claimed one."""
RARE = OF_CLAIMED | frozenset(PRECISION)
"""Two of these are not looked for together."""

ERASING = frozenset(
    row for row in OF_LOSSES if row.name.startswith("without") or "own reference" in row.name
)
ERASED = frozenset(row for row in OF_QUANTITIES if "margin" not in row.name)
"""A function of what is erased is a constant: not the mistake that anyone made."""
FITTED = (
    "with {c} added to the margin",
    "with {c} added to beta times the margin",
    "with the margin clipped at {c} and -{c}",
    "with beta times the margin clipped at {c} and -{c}",
    "with label smoothing {c}",
    "with {c} times the rewards",
    "at {c} beta",
    "at {c} gamma",
    "times {c}",
    "plus {c}",
    "plus {c} times the chosen response's negative log-likelihood",
    "plus {c} times the chosen response's negative log-likelihood per token",
)
"""Mistakes with a constant that come with another mistake: with one of these."""
PARTNERS = (
    "with chosen and rejected swapped",
    "with the policy's chosen and rejected swapped",
    "with the reference's chosen and rejected swapped",
    "with the rewards of chosen and rejected swapped",
    "without the reference",
    "without the reference and averaged over tokens",
    "with log-probabilities averaged over tokens",
    "with the pairs added, not averaged",
    "at beta 1: beta is dropped",
    "times beta",
    "over beta",
)

__all__ = [
    "DATA",
    "ERASED",
    "ERASING",
    "FITTED",
    "KL",
    "OF_CLAIMED",
    "OF_WHOLE",
    "PAIRS",
    "PARTNERS",
    "RARE",
    "TOKENS",
    "TRAINING",
    "Mistake",
]
