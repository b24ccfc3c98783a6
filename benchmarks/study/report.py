"""`results/study.md`: what the seeds say, from the rows of the study's tables alone."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.study import tables
from benchmarks.study.tables import Row, column, means
from minipref.methods import METHODS
from scale.files import atomic, read_csv, write_csv
from scale.paper import figures
from scale.paper.comparisons import SIGNIFICANT, SUMMARY, summary
from scale.paper.report import STUDY, points_of
from scale.templates import load_template

FIGURE = "study.png"
TEMPLATE = Path(__file__).parent / "study.md.jinja"
CONTENTS = ("facts", "false", "repeated", "padded", "words", "true_reward")
HELD_OUT = ("chosen_logps", "rejected_logps", "forward_kl", "implicit_accuracy")


def write_report(out: Path, rows: Sequence[Row], varied: Sequence[Row]) -> None:
    """Write `study.md`, its figure, and the summary that the package carries.

    Args:
        out: The folder; it has the results of the search, and the verdicts of the bandit.
        rows: Those of `study.csv`.
        varied: Those of `variations.csv`.
    """
    values = column(rows, "advantage")
    rows_of_summary = [summary(*cell) for cell in values.items()]
    write_csv(STUDY, SUMMARY, rows_of_summary)
    points = points_of(rows_of_summary)
    figures.figure2(out / FIGURE, points, behind={})
    verdicts = tables.verdicts(rows, varied)
    bandit = read_csv(out / "section6_verdicts.csv")
    context = {
        "machine": describe(),
        "num_seeds": len({row["seed"] for row in rows}),
        "num_varied": len({row["seed"] for row in varied}),
        "significant": SIGNIFICANT,
        "rhos": sorted({rho for rho, _ in values}),
        "methods": figures.in_order([method for _, method in values]),
        "points": points,
        "verdicts": verdicts,
        "by_word": {
            word: [v.claim for v in verdicts if v.word == word]
            for word in ("confirmed", "refuted", "undecided")
        },
        "bandit": {row["claim"]: row["verdict"] for row in bandit},
        "nearest": tables.nearest(rows),
        "failures": tables.failures(rows),
        "contents": {name: means(rows, name) for name in CONTENTS},
        "held_out": {name: means(rows, name) for name in HELD_OUT},
        "kl": means(rows, "kl"),
        "accuracies": {
            key: accuracy
            for key, accuracy in means(rows, "reward_accuracy").items()
            if METHODS[key[1]].rewards != "none"
        },
        "candidates": tables.candidates(read_csv(out / "search.csv")),
        "annealed": tables.annealed_table(rows, varied),
        "longer": tables.longer_table(rows, varied),
        "epochs": tables.epochs_table(varied),
        "equal_kl": tables.equal_kl(rows),
        "protocol": tables.protocol_agreement(rows, varied),
        "unbiased": tables.unbiased(varied),
    }
    text = load_template(TEMPLATE).render(context)
    with atomic(out / "study.md") as temporary:
        temporary.write_text(text.strip() + "\n", encoding="utf-8")
