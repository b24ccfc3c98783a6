"""Signs that a run goes wrong, said while it runs and recorded with its findings.

Each function returns a sentence for each sign, under its name; no sign means that nothing was
noticed. The limits are wide: what they catch is broken, what they pass may still be bad.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from scale.console import console

WINDOW = 20  # steps whose mean stands for the start or the end of a run
MOST_MARGIN = 5.0  # nats: under Bradley-Terry the chosen response wins with probability .993
MOST_FALL = 0.1  # of the log-probability of chosen responses at the start
MOST_REPETITION = 0.1  # beyond pi_ref's
LEAST_DIVERSITY = 0.7  # of pi_ref's
NGRAM = 4  # tokens
MOST_SPIKE = 5.0  # ranges of the values of a window, above the largest of them
OF_BATCH = {"loss": "loss", "grad_norm": "the norm of the gradient"}
"""What the rows of a step's batch decide, in words."""

WARNINGS = "warnings"  # the finding that holds the signs
Record = dict[str, Any]
Signs = dict[str, str]


def as_findings(sentences: Iterable[str]) -> dict[str, list[str]]:
    """What the signs say, as a stage records it."""
    warnings = list(sentences)
    return {WARNINGS: warnings} if warnings else {}


def warn(sentences: Iterable[str]) -> None:
    for sign in sentences:
        console.print(f"  warning: {sign}", style="yellow", markup=False)


def policy_signs(records: Sequence[Record], beta: float) -> Signs:
    """What the records of a policy's training say at their end.

    - margins beta h above `MOST_MARGIN`: no preferences are that certain;
    - KL(pi_ref || pi) above `MOST_MARGIN` / beta: the policy of Eq. 1, pi_ref exp(r / beta) / Z, is
      at most (max r - min r) / beta away from pi_ref, whatever r;
    - log-probability of chosen responses `MOST_FALL` below that of the start: they become less
      likely, and what becomes likelier is not in the data (section 4.1, Figure B.1).

    Held-out metrics count before those of the batches.

    Args:
        records: The lines of `metrics.jsonl`, in order.
        beta: The method's beta.
    """
    first, last = state(records[:WINDOW][::-1]), state(records[-WINDOW:])
    signs = {}
    margin, kl = last.get("rewards/margins", 0.0), last.get("kl", 0.0)
    if margin > MOST_MARGIN:
        signs["margins"] = (
            f"the margins of implicit rewards are {margin:.1f} nats, more certain than preferences "
            "are: try a lower learning rate or fewer epochs"
        )
    if kl > MOST_MARGIN / beta:
        signs["kl"] = (
            f"KL(pi_ref || pi) is {kl:.3g} nats, beyond the {MOST_MARGIN / beta:.3g} that beta "
            f"{beta:g} allows: try a lower learning rate"
        )
    start, end = (values.get("logps/chosen", 0.0) for values in (first, last))
    if end < start - MOST_FALL * abs(start):
        signs["chosen"] = (
            f"the log-probability of chosen responses fell from {start:.0f} to {end:.0f} nats: try "
            "a larger beta, a lower learning rate, or a method with a KL term"
        )
    return signs


def spike_signs(records: Sequence[Record], new: int) -> Signs:
    """Steps whose loss or gradient is far above those of the `WINDOW` steps before.

    Args:
        records: The lines of `metrics.jsonl`, in order.
        new: How many of them, at the end, are looked at.
    """
    signs = {}
    for name, words in OF_BATCH.items():
        with_it = [record for record in records[-new - WINDOW :] if name in record]
        peaks = [float(np.max(record[name])) for record in with_it]
        for i in range(max(WINDOW, len(peaks) - new), len(peaks)):
            before, step = peaks[i - WINDOW : i], with_it[i]["step"]
            most = max(before)
            if peaks[i] > max(most + MOST_SPIKE * (most - min(before)), 2 * most):
                signs[f"{name} at {step}"] = (
                    f"{words} is {peaks[i]:.3g} at step {step}, at most {most:.3g} in the {WINDOW} "
                    "steps before: look at that step's rows if it does not come back"
                )
    return signs


def state(records: Sequence[Record]) -> dict[str, float]:
    """The means of the batches' metrics; in place of them those on held-out rows, of the last of
    these records that has them."""
    held_out = "validation/"
    merged = dict(chain.from_iterable(record.items() for record in records))
    means = {
        name: float(np.mean([record[name] for record in records if name in record]))
        for name in ("rewards/margins", "kl", "logps/chosen")
        if name in merged
    }
    return means | {
        name.removeprefix(held_out): value
        for name, value in merged.items()
        if name.startswith(held_out)
    }


def reward_signs(accuracies: Sequence[float], longer: float, pairs: int) -> Signs:
    """Reward models that are no better than picking the longer, or the shorter, response.

    Args:
        accuracies: Of each reward model on held-out pairs.
        longer: The accuracy of picking the longer response.
        pairs: How many held-out pairs there are.
    """
    baseline = max(longer, 1 - longer)
    poor = [i for i, accuracy in enumerate(accuracies, 1) if accuracy <= baseline]
    if not poor:
        return {}
    side = "longer" if longer >= 0.5 else "shorter"
    values = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    models = f"reward model{'s' * (len(poor) > 1)} {', '.join(map(str, poor))}"
    return {
        "rewards": f"{models}: no better than picking the {side} response ({baseline:.2f}; "
        f"accuracies {values} on {pairs} held-out pairs): try more "
        "rows, more epochs or a larger model"
    }


def sample_signs(
    name: str, ids: Sequence[Sequence[int]], reference_ids: Sequence[Sequence[int]]
) -> Signs:
    """Samples that repeat themselves, or resemble each other, more than pi_ref's.

    Args:
        name: The policy.
        ids: The tokens of its samples.
        reference_ids: The tokens of pi_ref's samples.
    """
    signs = {}
    own, ref = repetition(ids), repetition(reference_ids)
    if own > ref + MOST_REPETITION:
        signs["repetition"] = (
            f"the samples of {name} repeat themselves: {own:.0%} of their {NGRAM}-grams stood in "
            f"them before, {ref:.0%} in those of pi_ref"
        )
    own, ref = diversities(ids, reference_ids)
    if own < LEAST_DIVERSITY * ref:
        signs["diversity"] = (
            f"the samples of {name} resemble each other: {own:.0%} of their pairs of neighbouring "
            f"tokens are distinct, {ref:.0%} in those of pi_ref"
        )
    return signs


def repetition(samples: Sequence[Sequence[int]]) -> float:
    """The share of n-grams that stood in the same sample before."""
    grams = [ngrams(ids, NGRAM) for ids in samples]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else 0.0


def diversities(*groups: Sequence[Sequence[int]]) -> list[float]:
    """The share of distinct pairs of tokens in each group of samples, among equally many."""
    pairs = [[pair for ids in samples for pair in ngrams(ids, 2)] for samples in groups]
    fewest = min(map(len, pairs))
    return [len(set(own[:fewest])) / max(fewest, 1) for own in pairs]


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n)), strict=False))
