"""`python -m benchmarks.diagnosis`: what the conformance kit says about seeded bugs, as a table.

Each bug is put into `reference/`, or is a client of its own, and judged; the kit then has to name
it. `tests/conformance/` has the bugs, and the names that are right for each. Each finished bug is
written to `results/diagnosis.csv` at once, so that a killed run goes on where the code is the same.
The command writes `results/diagnosis.md`.
"""

import hashlib
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import describe
from reference.conformance import load_cases, run
from reference.conformance.diagnosis import Diagnosis
from reference.conformance.evidence import REFUSALS
from scale.files import read_csv, write_csv
from tests.conformance import faults, reported

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = RESULTS / "diagnosis.csv"
COLUMNS = ("code", "bug", "dialects", "names", "verdict", "seconds")
VERDICTS = ("named", "unknown", "wrong")
CLIENTS = {name: bug for bugs in reported.SETS for name, bug in bugs.items()}


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


def said_of_client(bug: reported.Bug) -> Said:
    """What the kit says about a client of `tests/conformance/reported.py`.

    Args:
        bug: the client.

    Returns:
        The names, and whether the words that are due are in one of them.
    """
    names = names_for(bug)
    right = bool(bug.now) and any(bug.now in name for name in names)
    return Said(1, tuple(names), "unknown" if not names else "named" if right else "wrong")


def asked(bug: str) -> dict[str, Any]:
    """The row of one bug."""
    start = time.process_time()
    said = said_of_client(CLIENTS[bug]) if bug in CLIENTS else said_of(bug)
    return {
        "code": code(),
        "bug": bug,
        "dialects": said.dialects,
        "names": "; ".join(said.names),
        "verdict": said.verdict,
        "seconds": f"{time.process_time() - start:.1f}",
    }


@cache
def code() -> str:
    """The first letters of the SHA-256 of the kit's sources, and of the bugs'."""
    bugs = [ROOT / "tests" / "conformance" / f"{name}.py" for name in ("faults", "reported")]
    sources = [*sorted((ROOT / "reference").rglob("*.py")), *bugs]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def rows_of(bugs: list[str]) -> dict[str, dict[str, Any]]:
    """The row of each bug; those that are missing are asked for, on all cores."""
    rows = [row for row in (read_csv(ROWS) if ROWS.exists() else []) if row["code"] == code()]
    missing = [bug for bug in bugs if bug not in {row["bug"] for row in rows}]
    cores = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), cores) as pool:
        for done in as_completed([pool.submit(asked, bug) for bug in missing]):
            rows.append(done.result())
            print(*list(rows[-1].values())[1:], flush=True)
            write_csv(ROWS, COLUMNS, rows)
    return {row["bug"]: row for row in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each bug of `tests/conformance/faults.py`."""
    lines = ["| bug | failing dialects | the kit says | |", "|---|---|---|---|"]
    for row in rows:
        bug, words = row["bug"], row["names"] or "nothing"
        title = f"{bug} ({faults.LATER[bug]})" if bug in faults.LATER else bug
        lines.append(f"| {title} | {row['dialects']} | {words} | {row['verdict']} |")
    return f"{totals(rows)}.\n\n" + "\n".join(lines)


def totals(rows: list[dict[str, Any]]) -> str:
    """How many are named."""
    counts = Counter(row["verdict"] for row in rows)
    return f"{len(rows)} bugs: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS)


def reports(bugs: dict[str, reported.Bug], rows: dict[str, dict[str, Any]]) -> str:
    """A row for each client of one set, and the share that was named at first."""
    first = Counter(bug.first for bug in bugs.values())
    lines = ["| bug | it claims | at first | now the kit says | |", "|---|---|---|---|---|"]
    for name, bug in bugs.items():
        words, verdict = rows[name]["names"] or "nothing", rows[name]["verdict"]
        lines.append(f"| {name} | {bug.claimed} | {bug.first} | {words} | {verdict} |")
    counts = ", ".join(f"{first[verdict]} {verdict}" for verdict in VERDICTS)
    now = totals([rows[name] for name in bugs])
    return f"{now}; at first {counts}.\n\n" + "\n".join(lines)


def main() -> None:
    """Ask for every bug that has no row yet, write the page and print it."""
    every = [*faults.FAULTS, *CLIENTS]
    rows = rows_of(every)
    first = [rows[name] for name in faults.FAULTS if name not in faults.LATER]
    later = [rows[name] for name in faults.LATER]
    seconds = np.array([float(rows[name]["seconds"]) for name in every])
    paragraphs = [
        "`python -m benchmarks.diagnosis`",
        describe(),
        f"{EXPLANATION} {totals([rows[name] for name in every])}. A bug takes"
        f" {np.median(seconds):.0f} s of one core (median), at most {seconds.max():.0f} s.",
        f"## The bugs that the search was made with\n\n{table(first)}",
        f"## Ten bugs that were written after the search\n\n{LATER}\n\n{table(later)}",
        f"## Bugs that were written after each mending\n\n{TRIALS}",
        *(
            f"### {name} set\n\n{reports(bugs, rows)}"
            for name, bugs in zip(SETS, reported.SETS, strict=True)
        ),
    ]
    page = RESULTS / "diagnosis.md"
    page.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


EXPLANATION = """A bug is one edit of the source of `reference/`. *Named*: every wrong output of
every dialect that fails is explained, and by nothing but right names (`tests/conformance/faults.py`
has them); where the vectors do not tell two hypotheses apart, both are listed. *Unknown*: a wrong
output has no hypothesis. Training's dialects are asked about training's own bugs alone."""
LATER = """Users of other libraries reported these; none was looked at before the family of mistakes
was complete. The first result was 3 named, 6 unknown and 1 with names that are true and say little
("with rejected detached", of a loss that is unknown). Then rows were added for five of them, the
row of the first token was corrected, and a gradient is no longer named where its loss is unknown.
The table has the result since."""

TRIALS = """Twelve sets of plain functions (`tests/conformance/reported.py`), with the gradients of
autodiff. Each of the first four was written when the search was mended for the one before, by the
author of the search: those with a source from public reports that a search for DPO, IPO, KL and
reward bugs returned, the others as a tired engineer may write them. The first nine of the first set
met the search by families alone; then came constants with a second mistake. After the second set
came formulas, which name no mistake but write down the loss: L is -log sigmoid, h the margin, h_w
and h_l the log-ratios of chosen and rejected. One name of the third set was wrong: a loss that two
functions have on all cases, beside gradients that were given to a hypothesis whose gradient may be
anything. Since then a loss has no name where its gradients have none.

The later sets have what the kit did not name in trials, with neighbours. In a trial somebody who
knows the guide alone chooses bugs, writes them down, and only then puts them to the kit. Each
trial met the search as mended after the one before:

| trial | bugs | named rightly | in part | unknown | wrong |
|---|---|---|---|---|---|
| 1 | 14 | 8 | 2 | 4 | 0 |
| 2 | 12 | 7 | 1 | 4 | 0 |
| 3 | 10 | 7 | 1 | 2 | 0 |
| 4 | 12 | 6 | 0 | 6 | 0 |
| 5 | 12 | 9 | 0 | 3 | 0 |
| 6 | 12 | 8 | 0 | 4 | 0 |
| 7 | 12 | 9 | 1 | 2 | 0 |
| 8 | 12 | 9 | 1 | 1 | 0 |
| 9 | 12 | 11 | 1 | 0 | 0 |
| 10 | 12 | 10 | 1 | 1 | 0 |
| 11 | 10 | 10 | 0 | 0 | 0 |
| 12 | 12 | 7 | 0 | 4 | 0 |
| 13 | 12 | 10 | 1 | 1 | 0 |
| 14 | 10 | 9 | 0 | 1 | 0 |
| 15 | 12 | 8 | 1 | 3 | 0 |
| 16 | 12 | 11 | 0 | 1 | 0 |

The eleventh was asked for usual bugs, each in another dialect, the twelfth for bugs of tokens, data
and training runs, the thirteenth for bugs in code that dialects share, the fourteenth for the usual
one of each of ten dialects, the sixteenth for usual ones everywhere. Testers are language models,
which choose some bugs again and again; what is named in part has a true name that is hard to read,
or one only in some of its dialects. One bug of trial 8, which is missing, and one of trial 15 ended
the search with an error, which the kit reports beside everything else. Among further probes of the
trials' testers three got a wrong name (a formula with as many constants as the cases have values,
an accuracy beyond the reward margin and, in float32, an epsilon that was called a clip), and two
bugs passed all cases: both log-ratios sorted over the batch, as AOT does, and in trial 12 a
reference that is read in the order of the data. The cases `orders`, `chosen-truncated`, `steep`,
`shuffled` and `far-both` exist since."""
SETS = (
    *("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth"),
    *("Tenth", "Eleventh", "Twelfth", "Thirteenth"),
)


if __name__ == "__main__":
    main()
