"""`python -m reference` checks every claim of the paper, every erratum and the corrected method.

Exits with 1 if a verdict differs from the one recorded here, else with 0.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference import claims
from reference.errata import ERRATA
from reference.instances import draw

WHAT = """\
Checks the paper "Robust Preference Optimization through Reward Model Distillation" in NumPy.

The first table has one line for each claim, tried on 100 random instances (a printed claim that is
false: on its counterexample). It shows the evidence that is closest to failing: the value that was
measured (of an identity, the error), the bound on it, and the margin by which the claim holds.

The second table has the pessimistic objective, Eq. 8, at its maximiser and where three methods end
as gamma -> 0: its mean, the worst gap to the maximiser, and how often the gap is at most 1e-6.

It takes half a minute and needs NumPy alone."""
EXIT = "Exits with 0 where every verdict is the recorded one, and with 1 otherwise."

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
PRINTED = "refuted as printed"
LIMITS = ("maximiser", "hull", "e-dpo: finite minimum", "mean")  # the order of `maximin_values`


class Claim(NamedTuple):
    """A row of the table.

    Attributes:
        function: the claim, of `claims` or `errata`.
        place: its place in the paper.
        expected: the recorded verdict.
        counterexample: the instance that refutes it; None where random instances are drawn.
    """

    function: Callable
    place: str
    expected: str
    counterexample: dict | None = None


CLAIMS = [Claim(claim, place, "holds") for place, group in HOLDS.items() for claim in group]
for erratum in ERRATA:
    CLAIMS.append(Claim(erratum.printed, erratum.place, PRINTED, erratum.counterexample))
    CLAIMS.append(Claim(erratum.corrected, erratum.place, "holds as corrected"))


def check(claim, instances=100, seed=0):
    """The evidence of a claim that is closest to failing, and the verdict.

    Args:
        claim: a row of `CLAIMS`.
        instances: how many random instances to draw, where it has no counterexample.
        seed: of the random instances.

    Returns:
        The evidence, and `claim.expected` or, in capitals, the verdict in its place.
    """
    rng = np.random.default_rng(seed)
    counterexamples = [claim.counterexample] if claim.counterexample else []
    tried = counterexamples or (draw(claim.function, rng) for _ in range(instances))
    evidence = claims.worst(*(claim.function(**instance) for instance in tried))
    refuted = not evidence.margin >= 0
    if refuted == (claim.expected == PRINTED):
        return evidence, claim.expected
    return evidence, "REFUTED" if refuted else "HOLDS AS PRINTED"


def print_claims():
    """Print one line for each claim.

    Returns:
        Whether all verdicts are the expected ones.
    """
    print(f"{'claim':29} {'where':23} {'measured':>8} {'bound':>8} {'margin':>8}  verdict")
    agrees = True
    for claim in CLAIMS:
        evidence, verdict = check(claim)
        numbers = " ".join(f"{number:8.1e}" for number in evidence)
        row = f"{claim.function.__name__:29} {claim.place:23} {numbers}  {verdict}"
        print(row, flush=True)
        agrees = agrees and verdict == claim.expected
    return agrees


def print_maximin(instances=50, seed=0):
    """Print the values of Eq. 8 that each method converges to as gamma -> 0.

    Args:
        instances: how many random instances of several reward models to draw.
        seed: of the random instances.
    """
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    while len(values) < instances:
        instance = draw(claims.maximin_values, rng)
        if len(instance["rewards"]) > 1:
            values.append(claims.maximin_values(**instance))
    print(f"\nEq. 8 (0 for pi_ref) on {instances} random instances of 2 to 4 models, as gamma -> 0")
    print(f"{'policy':32} {'mean value':>12} {'worst gap':>12} {'optimal in':>12}")
    best = np.array(values)[:, 0]
    for name, column in zip(LIMITS, np.transpose(values), strict=True):
        gaps = best - column
        numbers = f"{np.mean(column):12.6f} {np.max(gaps):12.1e} {np.sum(gaps <= 1e-6):12d}"
        print(f"{name:32} {numbers}")


def main(arguments=None):
    """Print both tables, or the help.

    Args:
        arguments: the command line; None reads `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("python -m reference", description=WHAT, epilog=EXIT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    try:
        agrees = print_claims()
        print_maximin()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has stopped; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
