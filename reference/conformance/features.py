"""What the failing cases of a dialect share."""

from collections.abc import Callable

import numpy as np

from reference.conformance.cases import Case
from reference.conformance.evidence import Evidence, differs, evaluated
from reference.conformance.hypotheses import Hypothesis


def shared(cases: list[Case], failed: set[str]) -> str:
    """What all failing cases have, and no other case with numbers.

    Args:
        cases: all cases of a dialect.
        failed: ids of those that failed.

    Returns:
        A clause, or "" where no feature tells them apart.
    """
    known = [case for case in cases if case.result == "value"]
    failing = [case for case in known if case.id in failed]
    if not failing or len(failing) == len(known):
        return ""
    for words, has in FEATURES.items():
        if [case for case in known if has(case)] == failing:
            return f"all failing cases have {words}, and no other case has"
    return ""


def first_losses_differ(usual: Hypothesis, evidence: Evidence) -> bool | None:
    """Whether the first loss of a run is wrong: that before any update.

    Args:
        usual: the dialect as it is.
        evidence: the answers.

    Returns:
        None where there are no runs.
    """
    firsts = []
    for case, answer in evidence.asked:
        made = evaluated(usual, case)
        if case.result == "value" and made and answer and "losses" in made.keys() & answer.keys():
            due, given = ({"losses": np.ravel(of["losses"])[:1]} for of in (made, answer))
            firsts.append(differs(case, "losses", due, given, evidence.dtype))
    return any(firsts) if firsts else None


def _rows(case: Case) -> int:
    """The number of pairs, or of rows; 0 where there are neither."""
    if "input_ids" in case.inputs:
        return len(case.inputs["input_ids"])
    columns = [case.inputs[n] for n in ("ref_chosen_logps", "score_chosen") if n in case.inputs]
    return columns[0].shape[-1] if columns else 0


def _prompt_beyond_limit(case: Case) -> int:
    """How much longer the prompt is than its limit; 0 where there is no limit."""
    limit = case.params.get("max_prompt_length")
    return len(case.inputs["prompt_ids"]) - limit if limit else 0


FEATURES: dict[str, Callable[[Case], bool]] = {
    "several pairs": lambda case: "input_ids" not in case.inputs and _rows(case) > 1,
    "several rows": lambda case: "input_ids" in case.inputs and _rows(case) > 1,
    "an odd number of pairs above 1": lambda case: (
        "input_ids" not in case.inputs and _rows(case) > 1 and _rows(case) % 2 == 1
    ),
    "several micro-batches a step": lambda case: np.shape(case.inputs.get("batches", [[]]))[1] > 1,
    "a prompt that is longer than the limit": lambda case: _prompt_beyond_limit(case) > 0,
    "a prompt that is shorter than the limit": lambda case: _prompt_beyond_limit(case) < 0,
    "masked positions after the first": lambda case: (
        0 in np.asarray(case.inputs.get("completion_mask", [[]]))[:, 1:]
    ),
    "padding": lambda case: 0 in case.inputs.get("attention_mask", ()),
    "lengths": lambda case: "chosen_lengths" in case.inputs,
}
"""What may tell failing cases from the others."""
