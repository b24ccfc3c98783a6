"""`python -m reference`: every claim of the paper on random instances, every erratum, and the corrected method.

Exits with 1 if a verdict differs from the one recorded here.
"""

import sys
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np

from reference import claims
from reference.errata import ERRATA
from reference.instances import draw

HOLDS: dict[str, list[Callable]] = {
    "Eq. 1, 3": [claims.closed_form_is_optimal],
    "Eq. 3, 4": [claims.rewards_and_policies_invert],
    "Eq. 2, 5, 6": [claims.dpo_is_bradley_terry],
    "Proposition 1": [claims.proposition_1],
    "Corollary 1": [claims.corollary_1],
    "Section 4.1": [claims.bag_log_probability],
    "Proposition 2": [claims.proposition_2],
    "Proposition 3": [claims.proposition_3],
    "Eq. 7": [claims.distillation_is_symmetric],
    "Theorem 1": [claims.theorem_1],
    "Eq. 8": [claims.one_reward_model_is_rlhf],
    "Theorem 2": [claims.weak_duality, claims.hull_is_exact, claims.hull_policy_is_stationary],
    "Eq. 11": [claims.minimum_over_models, claims.sampled_kl_is_unbiased],
    "Footnote 5": [claims.minibatch_minima],
    "Proposition 4": [claims.proposition_4],
    "Eq. 13, 14": [claims.equation_14],
    "Section 6": [claims.gradients_are_slopes],
    "Proposition 5": [claims.proposition_5],
    "Section 7.1": [claims.ipo_and_pessimistic_dpo_agree],
    "Proposition 6": [claims.proposition_6],
    "Section 7.2": [claims.dpo_on_a_chain],
}


class Claim(NamedTuple):
    """A row of the table. `counterexample` is the instance of a claim that is refuted, else instances are drawn."""

    function: Callable
    place: str
    expected: str
    counterexample: dict | None = None


CLAIMS = [Claim(function, place, "holds") for place, functions in HOLDS.items() for function in functions]
for erratum in ERRATA:
    CLAIMS.append(Claim(erratum.printed, erratum.place, "refuted as printed", erratum.counterexample))
    CLAIMS.append(Claim(erratum.corrected, erratum.place, "holds as corrected"))


def check(claim, instances=100, seed=0):
    """The worst evidence on some instances, and the verdict: `expected`, or what it is instead."""
    rng = np.random.default_rng(seed)
    drawn = [claim.counterexample] if claim.counterexample else (draw(claim.function, rng) for _ in range(instances))
    evidence = claims.worst(*(claim.function(**instance) for instance in drawn))
    refuted = not evidence.margin >= 0
    if refuted == (claim.expected == "refuted as printed"):
        return evidence, claim.expected
    return evidence, "REFUTED" if refuted else "HOLDS AS PRINTED"


def print_claims():
    """One line a claim; returns whether all verdicts are the expected ones."""
    print(f"{'claim':32} {'where':26} {'tried':>5} {'measured':>9} {'bound':>9} {'worst margin':>12}  verdict")
    same = True
    for claim in CLAIMS:
        evidence, verdict = check(claim)
        tried = 1 if claim.counterexample else 100
        numbers = f"{evidence.measured:9.1e} {evidence.bound:9.1e} {evidence.margin:12.1e}"
        print(f"{claim.function.__name__:32} {claim.place:26} {tried:5} {numbers}  {verdict}")
        same = same and verdict == claim.expected
    return same


def print_maximin(instances=50, seed=0):
    """Eq. 8 at its maximiser, and by how much what each method converges to as gamma -> 0 falls short."""
    rng = np.random.default_rng(seed)
    ensembles = (each for each in iter(lambda: draw(claims.maximin_values, rng), None) if len(each["rewards"]) > 1)
    values = np.array([claims.maximin_values(**each) for each in islice(ensembles, instances)])
    print(f"\nEq. 8 (0 for pi_ref) on {instances} random instances of 2 to 4 reward models, as gamma -> 0")
    print(f"{'policy':32} {'mean value':>12} {'worst gap':>12} {'optimal in':>12}")
    for name, column in zip(("maximiser", "hull", "e-dpo: finite minimum", "mean"), values.T, strict=True):
        gaps = values[:, 0] - column
        print(f"{name:32} {np.mean(column):12.6f} {np.max(gaps):12.1e} {np.sum(gaps <= 1e-6):12d}")


def main():
    """Prints both tables; returns the exit status."""
    agrees = print_claims()
    print_maximin()
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
