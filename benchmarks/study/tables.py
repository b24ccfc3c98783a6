"""What the seeds of the study say: tables of means with their intervals, from rows of text.

A cell is a `Contrast` whose `what` names it; its mean and 95% interval are over seeds.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.study.protocol import BY_ORACLE, BY_TRUTH
from minipref.methods import METHODS
from scale.paper import claims, figures
from scale.paper.claims import Contrast, Difference, Verdict, judge, measured
from scale.paper.comparisons import Seeds, Values, minus
from scale.paper.pipeline import PRESETS
from scale.statistics import seed_means, value_at

Row = dict[str, str]
FAR = (0.1, 0.15)  # of the true reward; chosen after the seeds
BIASES = np.array(PRESETS["miniature"].length_biases)


def cell(what: str, seeds: Seeds) -> Contrast:
    """A mean over seeds; no test is made of it."""
    return measured(Difference(what, seeds), p=1.0)


def column(rows: Iterable[Row], name: str) -> Values:
    """A column of each (rho, method), the numbers of each seed, in the order of `METHODS`."""
    order = list(METHODS)
    cells: Values = {}
    for row in sorted(rows, key=lambda row: (float(row["rho"]), order.index(row["method"]))):
        numbers = np.array(row[name].split(), float)
        if numbers.size:
            cells.setdefault((float(row["rho"]), row["method"]), []).append(numbers)
    return cells


def means(rows: Sequence[Row], name: str) -> dict[tuple[float, str], float]:
    """The mean over seeds; of a column of several numbers, over those too."""
    return {key: float(seed_means(seeds).mean()) for key, seeds in column(rows, name).items()}


def verdicts(rows: Sequence[Row], varied: Sequence[Row]) -> list[Verdict]:
    """The verdict on each claim, the paper's and ours."""
    advantages = column(rows, "advantage")
    return judge(
        {claim.text: claim.differences(advantages) for claim in claims.CLAIMS}
        | {
            claims.LOWER_KL: with_kl_term(rows, "forward_kl", -1),
            claims.HIGHER_CHOSEN: with_kl_term(rows, "chosen_logps", 1),
            claims.HIGHER_REJECTED: with_kl_term(rows, "rejected_logps", 1),
            claims.OPPOSITE: opposite(rows),
            claims.ANNEALING: annealing(rows, varied),
        }
    )


def with_kl_term(rows: Sequence[Row], name: str, sign: int) -> list[Difference]:
    """What the KL term changes on held-out pairs by the end of training, the mean over the rhos."""
    values = column(rows, name)
    rhos = sorted({rho for rho, _ in values})
    differences = []
    for without, with_kl in figures.COLLAPSE:
        ours, theirs = (claims.over_rhos(values, rhos, name) for name in (with_kl, without))
        signed = [sign * difference for difference in minus(ours, theirs)]
        differences.append(Difference(f"{with_kl} against {without}", signed))
    return differences


def opposite(rows: Sequence[Row]) -> list[Difference]:
    """How far the mean length bias of e-dpo's nearest models lies across .5 from rho."""
    return [
        Difference(
            f"rho {rho:g}", [np.array([np.sign(0.5 - rho) * (s @ BIASES - 0.5)]) for s in seeds]
        )
        for (rho, method), seeds in column(rows, "nearest").items()
        if method == "e-dpo" and rho != 0.5
    ]


def annealing(rows: Sequence[Row], varied: Sequence[Row]) -> list[Difference]:
    """e-dpo with an annealed gamma and with a constant one, the mean over the rhos."""
    both = gammas(rows, varied)
    rhos = sorted({rho for rho, name in both[0] if name == "e-dpo"})
    annealed, constant = (claims.over_rhos(values, rhos, "e-dpo") for values in both)
    return [
        Difference("annealed - constant", minus(annealed, constant), -claims.LITTLE),
        Difference("constant - annealed", minus(constant, annealed), -claims.LITTLE),
    ]


def gammas(rows: Sequence[Row], varied: Sequence[Row]) -> tuple[Values, Values]:
    """The advantages with an annealed gamma and with a constant one, of the same seeds."""
    constant = of_experiment(varied, "gamma")
    return column(same_cells(rows, constant), "advantage"), column(constant, "advantage")


def same_cells(rows: Sequence[Row], varied: Sequence[Row]) -> list[Row]:
    """The rows of the seeds, rhos and methods that were varied."""
    keys = {(row["seed"], row["rho"], row["method"]) for row in varied}
    return [row for row in rows if (row["seed"], row["rho"], row["method"]) in keys]


def same_seeds(rows: Sequence[Row], varied: Sequence[Row]) -> list[Row]:
    """The rows of the seeds that were varied."""
    seeds = {row["seed"] for row in varied}
    return [row for row in rows if row["seed"] in seeds]


def of_experiment(varied: Sequence[Row], name: str) -> list[Row]:
    return [row for row in varied if row["experiment"] == name]


def nearest(rows: Sequence[Row]) -> dict[float, tuple[np.ndarray, Contrast]]:
    """For each rho the shares of e-dpo's pairs nearest to each model, and their mean bias - .5."""
    return {
        rho: (
            np.mean(seeds, axis=0),
            cell("", [np.array([shares @ BIASES - 0.5]) for shares in seeds]),
        )
        for (rho, method), seeds in column(rows, "nearest").items()
        if method == "e-dpo"
    }


def behind_the_mean(rows: Sequence[Row], method: str, by: float) -> list[tuple[float, int]]:
    """The (rho, place of the seed) at which a method is more than this behind `mean`."""
    advantages = column(rows, "advantage")
    return [
        (rho, i)
        for rho, name in advantages
        if name == method
        for i, values in enumerate(minus(advantages[rho, method], advantages[rho, "mean"]))
        if values.mean() < -by
    ]


def failures(rows: Sequence[Row]) -> dict[str, Any]:
    """How often e-dpo and hull are behind the mean of the same ensemble, over all rhos and seeds.

    And the share of pairs nearest to the first reward model where e-dpo is far behind, and
    elsewhere.
    """
    failed = behind_the_mean(rows, "e-dpo", FAR[-1])
    shares = {
        (rho, i): values[0]
        for (rho, method), seeds in column(rows, "nearest").items()
        if method == "e-dpo"
        for i, values in enumerate(seeds)
    }
    accuracies = column([row for row in rows if row["method"] == "e-dpo"], "reward_accuracy")
    return {
        "counts": {
            by: [len(behind_the_mean(rows, method, by)) for method in ("e-dpo", "hull")]
            for by in FAR
        },
        "of": len(shares),
        "bias": BIASES[0],
        "accuracy": np.mean([own[0] for seeds in accuracies.values() for own in seeds]),
        "there": np.mean([share for key, share in shares.items() if key in failed] or [0.0]),
        "elsewhere": np.mean([share for key, share in shares.items() if key not in failed]),
    }


def candidates(searched: Sequence[Row]) -> dict[float, dict[str, dict[float, float]]]:
    """rho -> method -> beta -> mean validation advantage, at the better learning rate."""
    every: dict[tuple[float, str, float, str], list[float]] = {}
    for row in searched:
        key = (float(row["rho"]), row["method"], float(row["beta"]), row["learning_rate"])
        every.setdefault(key, []).append(float(row["validation_advantage"]))
    table: dict[float, dict[str, dict[float, float]]] = {}
    for (rho, method, beta, _), values in sorted(every.items(), key=lambda item: item[0][2]):
        betas = table.setdefault(rho, {}).setdefault(method, {})
        betas[beta] = max(betas.get(beta, -np.inf), float(np.mean(values)))
    return {rho: {name: table[rho][name] for name in figures.in_order([*table[rho]])}
            for rho in sorted(table)}  # fmt: skip


def annealed_table(rows: Sequence[Row], varied: Sequence[Row]) -> list[Contrast]:
    """Annealed minus constant, for each rho and method."""
    annealed, constant = gammas(rows, varied)
    return [
        cell(f"{method}, rho {rho:g}", minus(annealed[rho, method], constant[rho, method]))
        for rho, method in annealed
    ]


def longer_table(
    rows: Sequence[Row], varied: Sequence[Row]
) -> list[tuple[float, str, list[float], list[Contrast]]]:
    """For each rho and method the accuracy of the reward models, and the advantage and what it is
    over dpo's, of the study and with longer training, and the gain; all in the same seeds."""
    longer = of_experiment(varied, "longer")
    short = same_cells(rows, longer)
    accuracies = [means(part, "reward_accuracy") for part in (short, longer)]
    before, after = (column(part, "advantage") for part in (short, longer))
    plain = column(same_seeds(rows, longer), "advantage")
    table = []
    for key in after:
        over_dpo = [minus(values[key], plain[key[0], "dpo"]) for values in (before, after)]
        values = (before[key], after[key], minus(after[key], before[key]), *over_dpo)
        table.append((*key, [known[key] for known in accuracies], [cell("", v) for v in values]))
    return table


def epochs_table(varied: Sequence[Row]) -> dict[tuple[int, float], dict[str, Contrast]]:
    """(pairs, epochs) -> method -> advantage."""
    seeds: dict[tuple[int, float], dict[str, Seeds]] = {}
    for row in of_experiment(varied, "epochs"):
        key = (int(row["pairs"]), round(float(row["epochs"]), 1))
        value = np.array([float(row["advantage"])])
        seeds.setdefault(key, {}).setdefault(row["method"], []).append(value)
    return {
        key: {method: cell(method, values) for method, values in methods.items()}
        for key, methods in sorted(seeds.items())
    }


def equal_kl(
    rows: Sequence[Row],
) -> tuple[dict[tuple[float, str], Contrast], dict[float, tuple[float, float]]]:
    """The advantage of each (rho, method) at the largest KL that all methods reach in that seed.

    Between pi_ref, the snapshot and the end, it is taken to be linear in the KL.

    Returns:
        The advantages, and for each rho the mean of that KL, and in which share of the methods and
        seeds it is below the KL of the snapshot.
    """
    advantages, budgets = {}, {}
    names = ("snapshot_kl", "kl", "snapshot_advantage", "advantage")
    by_rho: dict[float, list[str]] = {}
    for rho, method in column(rows, "kl"):
        by_rho.setdefault(rho, []).append(method)
    values = {name: column(rows, name) for name in names}
    for rho, methods in by_rho.items():
        reached = [np.max([values[n][rho, m] for n in names[:2]], axis=0) for m in methods]
        budget = np.min(reached, axis=0)[:, 0]  # of each seed
        below = [budget < np.array(values["snapshot_kl"][rho, m])[:, 0] for m in methods]
        budgets[rho] = float(budget.mean()), float(np.mean(below))
        for method in methods:
            paths = [
                np.stack([values[n][rho, method][i] for n in names]) for i in range(len(budget))
            ]
            seeds = [
                value_at(kl, np.array([0.0, *path[:2, 0]]), np.vstack([[0.0], path[2:]]))
                for kl, path in zip(budget, paths, strict=True)
            ]
            advantages[rho, method] = cell(method, seeds)
    return advantages, budgets


def protocol_agreement(rows: Sequence[Row], varied: Sequence[Row]) -> dict[str, Any]:
    """What the paper's protocol says, beside the truth, of the same seeds and rhos."""
    by_oracle = column(of_experiment(varied, BY_ORACLE), "advantage")
    by_truth = column(of_experiment(varied, BY_TRUTH), "advantage")
    same = same_seeds(rows, of_experiment(varied, BY_ORACLE))
    truth = column(same, "advantage")
    truth = {key: truth[key] for key in by_oracle}
    words = [claims.verdicts(values) for values in (truth, by_oracle)]
    return {
        "num_seeds": len({row["seed"] for row in same}),
        "words": [(a.claim, a.word, b.word) for a, b in zip(*words, strict=True)],
        "orders": [same_orders(by_oracle, by_truth), same_orders(by_oracle, truth)],
        "cells": {
            key: [cell(key[1], v[key]) for v in (by_oracle, by_truth, truth)] for key in truth
        },
    }


def same_orders(a: Values, b: Values) -> tuple[int, int]:
    """In how many of the pairs of methods at one rho the same one is ahead, and of how many."""
    pairs = [(x, y) for x, y in combinations(a, 2) if x[0] == y[0]]
    leads = [[seed_means(minus(v[x], v[y])).mean() for x, y in pairs] for v in (a, b)]
    return int(np.sum(np.sign(leads[0]) == np.sign(leads[1]))), len(pairs)


def unbiased(varied: Sequence[Row]) -> dict[str, dict[str, Contrast]]:
    """Table 1: dpo and e-dpo against pi_ref, and against each other, at the natural bias."""
    rows = of_experiment(varied, "unbiased")
    table: dict[str, dict[str, Seeds]] = {}
    for row in rows:
        name = f"{row['method']} against {row['baseline'] or 'pi_ref'}"
        for column_name in ("win", "tie", "loss", "advantage", "rho"):
            value = np.array([float(row[column_name])])
            table.setdefault(name, {}).setdefault(column_name, []).append(value)
    return {name: {c: cell(c, v) for c, v in columns.items()} for name, columns in table.items()}
