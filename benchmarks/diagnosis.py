"""`python -m benchmarks.diagnosis`: what the conformance kit says about seeded bugs, as a table.

Each bug is put into `reference/` and judged; the kit then has to name it. `tests/conformance/` has
the bugs, and the names that are right for each. The command writes `results/diagnosis.md`.
"""

import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.machine import describe
from reference.conformance import load_cases, run
from reference.conformance.diagnosis import Diagnosis
from reference.conformance.evidence import REFUSALS
from tests.conformance import faults, reported

RESULTS = Path(__file__).parent / "results" / "diagnosis.md"
VERDICTS = ("named", "unknown", "wrong")


class Said(NamedTuple):
    """What the kit says about one bug.

    Attributes:
        dialects: how many dialects fail by it.
        names: of dialects and mistakes, without the claimed dialect.
        verdict: "named": every wrong output is, and rightly; "unknown": not every one; "wrong": a
            name is not one of those that are right.
    """

    dialects: int
    names: tuple[str, ...]
    verdict: str


@cache
def said_of(name: str) -> Said:
    """What the kit says about a bug of `tests/conformance/faults.py`.

    Training is made of what the other cases test, whose bugs it need not name.

    Args:
        name: of the bug.

    Returns:
        The names, and whether they are right.
    """
    fault = faults.FAULTS[name]
    asked = [c for c in load_cases() if c.objective != "training" or "training" in fault.module]
    with np.errstate(all="ignore"):
        report = run(faults.read_anew(fault).dialects.adapter, asked, dtype=fault.dtype)
    names = tuple(dict.fromkeys(n for d in report.diagnoses for n in names_of(d)))
    wrong = set(names) - set(faults.NAMES[name])
    unknown = not report.diagnoses or not all(d.known for d in report.diagnoses)
    verdict = "wrong" if wrong else "unknown" if unknown else "named"
    return Said(len(report.diagnoses), names, verdict)


def names_of(diagnosis: Diagnosis) -> list[str]:
    """The names in a diagnosis, without the claimed dialect."""
    hypotheses = [h.name for part in diagnosis.parts for h in part.hypotheses]
    return [name.removeprefix(f"{diagnosis.dialect} ") for name in hypotheses]


def table(names: list[str]) -> str:
    """A row for each bug."""
    rows = ["| bug | failing dialects | the kit says | |", "|---|---|---|---|"]
    for name in names:
        said, words = said_of(name), "; ".join(said_of(name).names) or "nothing"
        title = f"{name} ({faults.LATER[name]})" if name in faults.LATER else name
        rows.append(f"| {title} | {said.dialects} | {words} | {said.verdict} |")
    return "\n".join(rows)


def totals(names: list[str]) -> str:
    """How many are named."""
    counts = Counter(said_of(name).verdict for name in names)
    return f"{len(names)} bugs: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS)


def names_for(bug: reported.Bug) -> list[str]:
    """What the kit says a client of `tests/conformance/reported.py` computes; nothing if unknown.

    Args:
        bug: the client.

    Returns:
        The names of the hypotheses, whatever inputs are refused.
    """
    with np.errstate(all="ignore"):
        report = run(reported.client(bug.function), load_cases(*bug.claimed.split("/")))
    parts = [p for d in report.diagnoses for p in d.parts if p.outputs != (REFUSALS,)]
    known = all(part.hypotheses for part in parts)
    return [h.name for part in parts for h in part.hypotheses] if known else []


def reports(bugs: dict[str, reported.Bug]) -> str:
    """The share that was named at first, and a row for each bug."""
    first = Counter(bug.first for bug in bugs.values())
    rows = ["| bug | it claims | at first | now the kit says |", "|---|---|---|---|"]
    for name, bug in bugs.items():
        words = "; ".join(names_for(bug)) or "unknown"
        rows.append(f"| {name} | {bug.claimed} | {bug.first} | {words} |")
    counts = ", ".join(f"{first[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{len(bugs)} bugs, at first {counts}.\n\n" + "\n".join(rows)


def main() -> None:
    """Write the page and print it."""
    start = time.perf_counter()
    first = [name for name in faults.FAULTS if name not in faults.LATER]
    paragraphs = [
        "`python -m benchmarks.diagnosis`",
        describe(),
        EXPLANATION,
        f"## The bugs that the search was made with\n\n{totals(first)}.\n\n{table(first)}",
        f"## Ten bugs that were written after the search\n\n{LATER}\n\n"
        f"{totals(list(faults.LATER))}.\n\n{table(list(faults.LATER))}",
        f"## Bugs that were written after each mending\n\n{TRIALS}",
        *(f"### {name}\n\n{reports(bugs)}" for name, bugs in zip(SETS, reported.SETS, strict=True)),
        f"{time.perf_counter() - start:.0f} s.",
    ]
    RESULTS.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


EXPLANATION = """A bug is one edit of the source of `reference/`. *Named*: every wrong output of
every dialect that fails is explained, and by nothing but right names (`tests/conformance/faults.py`
has them); where the vectors do not tell two hypotheses apart, both are listed. *Unknown*: a wrong
output has no hypothesis. Training's dialects are asked about training's own bugs alone."""
LATER = """Users of other libraries reported these; none was looked at before the family of mistakes
was complete. The first result was 3 named, 6 unknown and 1 with names that are true and say little
("with rejected detached", of a loss that is unknown). Then rows were added for five of them, the
row of the first token was corrected, and a gradient is no longer named where its loss is unknown.
The table has the result since."""

TRIALS = """Six sets of plain functions (`tests/conformance/reported.py`), with the gradients that
autodiff gives them. Each of the first four was written when the search was mended for the one
before, by the author of the search: those with a source from public reports that a search for DPO,
IPO, KL and reward bugs returned, the others as a tired engineer may write them. The first nine of
the first set met the search by families alone; then came constants with a second mistake. After the
second set came formulas, which name no mistake but write down the loss: L is -log sigmoid, h the
margin, h_w and h_l the log-ratios of chosen and rejected. One name of the third set was wrong: a
loss that two functions have on all cases, beside gradients that were given to a hypothesis whose
gradient may be anything. Since then a loss has no name where its gradients have none. The fifth set
has those of fourteen bugs of a user of the kit that had no name or a long one, with their
neighbours; the sixth, of twelve others and some more of another user, after that was mended. Of the
fourteen 8 were named rightly, 2 in part, 4 not; of the twelve 7, 1 and 4. None was named wrongly;
of ten more one was, by a formula with as many constants as the cases have values, and one ended the
kit with an error."""
SETS = ("First set", "Second set", "Third set", "Fourth set", "Fifth set", "Sixth set")


if __name__ == "__main__":
    main()
