"""`report.md`: what a run found, in tables, figures and sentences that are all computed from its outcomes."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from minipref.methods import METHODS
from scale.files import atomic
from scale.paper import figures
from scale.paper.figures import Point
from scale.paper.results import Outcome
from scale.statistics import bootstrap_interval, holm, seed_interval, value_at, wald_p

Key = tuple[float, str]


Values = dict[Key, np.ndarray]


SIGNIFICANT = 0.05


REFERENCE = "pi_ref"


SHOWN = 4


class Comparison(NamedTuple):
    """`a` minus `b` at one rho: the mean over prompts, and the Wald test's p after Holm's adjustment."""

    rho: float
    a: str
    b: str
    difference: float
    p: float

    def oriented(self) -> "Comparison":
        """With the better one as `a`."""
        return self if self.difference >= 0 else self.flipped()

    def flipped(self) -> "Comparison":
        return Comparison(self.rho, self.b, self.a, -self.difference, self.p)

    @property
    def significant(self) -> bool:
        return self.p < SIGNIFICANT


class Claim(NamedTuple):
    """That each of `better` beats each of `worse` at the rhos for which `where` holds."""

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    where: Callable[[float], bool] = lambda rho: True


PAPERS = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")


DISTILLED = ("d-dpo", "dp-dpo", "e-dpo")


def others(method: str) -> tuple[str, ...]:
    return tuple(name for name in PAPERS if name != method)


CLAIMS = (
    Claim("the paper's six improve on pi_ref", PAPERS, (REFERENCE,)),
    Claim("d-dpo, dp-dpo and e-dpo beat dpo and ipo, rho <= 0.5", DISTILLED, ("dpo", "ipo"), lambda rho: rho <= 0.5),
    Claim("e-dpo beats d-dpo and dp-dpo, rho <= 0.5", ("e-dpo",), ("d-dpo", "dp-dpo"), lambda rho: rho <= 0.5),
    Claim("e-dpo is the best of the paper's six, rho < 0.5", ("e-dpo",), others("e-dpo"), lambda rho: rho < 0.5),
    Claim("d-dpo is the best of the paper's six, rho > 0.6", ("d-dpo",), others("d-dpo"), lambda rho: rho > 0.6),
    Claim("d-dpo beats dpo and ipo, rho > 0.6", ("d-dpo",), ("dpo", "ipo"), lambda rho: rho > 0.6),
    Claim("d-dpo, dp-dpo and e-dpo beat p-dpo", DISTILLED, ("p-dpo",)),
    Claim("ours: hull beats e-dpo", ("hull",), ("e-dpo",)),
    Claim("ours: hull beats the plain mean", ("hull",), ("mean",)),
    Claim("ours: e-dpo beats the plain mean", ("e-dpo",), ("mean",)),
)


DEFINITIONS = f"""\
- rho: share of the training pairs whose longer response is preferred (longer: at least 10% more tokens).
- Advantage: oracle reward of the policy's samples minus that of pi_ref's samples to the same prompt, each the mean
  over that prompt's samples; then the mean over test prompts. pi_ref is at 0; the unit is a logit of the oracle.
- [low, high]: percentile bootstrap 95% interval over prompts.
- Win, tie, loss: percentages of pairs of a sample of the policy and one of pi_ref in which the oracle scores the
  policy's higher, equal (the same text, as a rule) or lower.
- KL: reverse KL(policy || pi_ref) in nats, the mean over the policy's own samples of log policy - log pi_ref. An
  estimate, so it can be slightly negative. (The KL of the pessimistic methods' penalty, and of collapse.png, is the
  forward one, at pi_ref's samples.)
- Tokens: mean length of a sample, its end-of-sequence token included. KL and tokens are of the sample's text, which
  may encode to other tokens, and to more, than were sampled.
- Wald: mean paired difference over its standard error against N(0, 1), two-sided. Adjusted: Holm's step-down method
  over the tests named beside it. Significant: adjusted p < {SIGNIFICANT:g}.
- hull: distils the nearest mixture of the reward models; mean: distils their average. Both are this project's.
"""


def write_report(out: Path, outcomes: Sequence[Outcome], facts: dict[str, Any], human: dict[str, str]) -> None:
    """`report.md` and its figures; `facts` holds earlier stages' findings, `human` the completion of each prompt."""
    cells = by_cell(outcomes)
    parts = [
        "# Section 6 in miniature",
        section("The run", the_run(facts)),
        section("Results", results(out, cells)),
        section("Equal KL", equal_kl(cells)),
        section("The paper's claims", claims(cells)),
        section("Likelihood collapse", collapse(out, outcomes)),
        section("Reward models of the ensemble", ensemble(out, outcomes, facts.get("biases", ()))),
        section("Samples", samples(cells, human)),
        section("Definitions", DEFINITIONS),
    ]
    with atomic(out / "report.md") as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part).strip() + "\n", encoding="utf-8")


def section(title: str, body: str) -> str:
    return f"## {title}\n\n{body.strip()}" if body else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_cell(outcomes: Sequence[Outcome]) -> dict[Key, list[Outcome]]:
    """The seeds of each (rho, method): by rho, then in the methods' order."""
    order = list(METHODS)
    keys = sorted({(o.policy.rho, o.policy.method) for o in outcomes}, key=lambda k: (k[0], order.index(k[1])))
    return {key: [o for o in outcomes if (o.policy.rho, o.policy.method) == key] for key in keys}


def rhos_of(cells: Iterable[Key]) -> list[float]:
    return sorted({rho for rho, _ in cells})


def final(cells: dict[Key, list[Outcome]]) -> Values:
    """Per-prompt advantages at the end of training, the mean over seeds."""
    return {key: np.mean([o.advantages() for o in seeds], axis=0) for key, seeds in cells.items()}


def best_of(points: dict[Key, Point]) -> dict[float, str]:
    return {rho: max((k for k in points if k[0] == rho), key=lambda k: points[k][0])[1] for rho in rhos_of(points)}


# The run
def the_run(facts: dict[str, Any]) -> str:
    rows = [(name, key, shown(value)) for name, found in facts.items() for key, value in named(found)]
    return table(("stage", "finding", "value"), rows) if rows else ""


def named(found: Any) -> Iterable[tuple[str, Any]]:
    return found.items() if isinstance(found, dict) else [("", found)]


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


# Results
def results(out: Path, cells: dict[Key, list[Outcome]]) -> str:
    values = final(cells)
    points = {key: point(v) for key, v in values.items()}
    figures.figure2(out / "figure2.png", points)
    return "\n\n".join([
        main_table(cells, points),
        "The best of each rho is bold. Beta is ipo's tau. Each policy is that of the last step.",
        "![Advantage over length bias](figure2.png)",
        about_seeds(cells),
        over_reference(values),
        pairwise(compare(values)),
    ])


def point(values: np.ndarray) -> Point:
    """Mean, low and high."""
    return float(values.mean()), *bootstrap_interval(values)


def interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def main_table(cells: dict[Key, list[Outcome]], points: dict[Key, Point]) -> str:
    best = best_of(points)
    header = ("rho", "method", "advantage", "win / tie / loss %", "KL", "tokens", "beta", "learning rate")
    return table(header, [[f"{key[0]:g}", *marked(key, points[key], best), *details(seeds)]
                          for key, seeds in cells.items()])


def marked(key: Key, found: Point, best: dict[float, str]) -> list[str]:
    """Method and advantage, bold where it is the best of its rho."""
    mark = "**" * (best[key[0]] == key[1])
    return [f"{mark}{text}{mark}" for text in (key[1], interval(*found))]


def details(seeds: list[Outcome]) -> list[str]:
    mean = {name: np.mean([o.findings[-1][name] for o in seeds]) for name in ("win", "tie", "loss", "kl", "tokens")}
    return [
        " / ".join(f"{abs(100 * mean[name]):.0f}" for name in ("win", "tie", "loss")),
        f"{mean['kl']:.2f}", f"{mean['tokens']:.1f}",
        distinct(o.policy.beta for o in seeds), distinct(o.policy.learning_rate for o in seeds),
    ]


def distinct(values: Iterable[float]) -> str:
    """Seeds may have selected different values."""
    return ", ".join(f"{v:g}" for v in dict.fromkeys(values))


def about_seeds(cells: dict[Key, list[Outcome]]) -> str:
    n = max(map(len, cells.values()))
    cover = "Intervals and tests cover the choice of test prompts, not that of training seeds"
    if n == 1:
        return f"One seed. {cover}: another seed could change them by more than they say."
    rows = [seed_row(key, seeds) for key, seeds in cells.items() if len(seeds) > 1]
    note = f"{n} seeds, averaged for each prompt. {cover}. Over seeds, Student's 95% interval of the seeds' means:"
    return f"{note}\n\n{table(('rho', 'method', 'seeds', 'advantage', 'each seed'), rows)}"


def seed_row(key: Key, seeds: list[Outcome]) -> list[str]:
    means = np.array([o.advantages().mean() for o in seeds])
    each = ", ".join(f"{m:+.3f}" for m in means)
    return [f"{key[0]:g}", key[1], str(len(seeds)), interval(float(means.mean()), *seed_interval(means)), each]


def against_reference(values: Values) -> list[Comparison]:
    return adjusted({(rho, name, REFERENCE): v for (rho, name), v in values.items()})


def compare(values: Values) -> list[Comparison]:
    """Every pair of methods at each rho."""
    return adjusted({(a[0], a[1], b[1]): values[a] - values[b] for a, b in same_rho(values)})


def adjusted(differences: dict[tuple[float, str, str], np.ndarray]) -> list[Comparison]:
    p = holm({key: wald_p(d) for key, d in differences.items()})
    return [Comparison(*key, float(d.mean()), p[key]) for key, d in differences.items()]


def over_reference(values: Values) -> str:
    found = against_reference(values)
    better = [c for c in found if c.significant and c.difference > 0]
    worse = [c for c in found if c.significant and c.difference < 0]
    neither = [c for c in found if not c.significant]
    lines = [f"Against pi_ref (Wald, Holm-adjusted over all {count(found, 'cell')}):"]
    lines += [f"- significantly better: {listed(better)}", f"- significantly worse: {listed(worse)}",
              f"- not significantly different: {listed(neither)}"]
    return "\n".join(lines)


def listed(found: list[Comparison]) -> str:
    """`0.2: dpo, ipo; 0.5: dpo`, with how many."""
    rhos = dict.fromkeys(c.rho for c in found)
    names = "; ".join(f"rho {rho:g}: {', '.join(c.a for c in found if c.rho == rho)}" for rho in rhos)
    return f"{len(found)} ({names})" if found else "none"


def count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def pairwise(found: list[Comparison]) -> str:
    """The significant differences, and how many are not."""
    if not found:
        return "No two methods can be compared at one rho."
    real = [c.oriented() for c in found if c.significant]
    tests = (f"Between methods (Wald on paired advantages, Holm-adjusted over all {count(found, 'pair')} of methods "
             "at the same rho):")
    if not real:
        return f"{tests} no difference is significant, of {len(found)}."
    split = f"{len(real)} of {len(found)} differences are significant, {len(found) - len(real)} not"
    return f"{tests} {split}. By what and, in brackets, with which adjusted p:\n\n{win_table(real)}"


def win_table(real: list[Comparison]) -> str:
    """A row for each method that is significantly better than others of its rho."""
    winners = dict.fromkeys((c.rho, c.a) for c in sorted(real, key=lambda c: c.rho))
    rows = [[f"{rho:g}", name, ", ".join(win(c) for c in real if (c.rho, c.a) == (rho, name))] for rho, name in winners]
    return table(("rho", "method", "is better than"), rows)


def win(c: Comparison) -> str:
    return f"{c.b} {c.difference:+.3f} ({p_text(c.p)})"


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


# Equal KL
def equal_kl(cells: dict[Key, list[Outcome]]) -> str:
    found = at_equal_kl(cells)
    return f"{about_equal_kl(cells, len(found))}\n\n{pairwise(found)}"


def about_equal_kl(cells: dict[Key, list[Outcome]], known: int) -> str:
    points = len(next(iter(cells.values()))[0].steps) + 1
    return (
        "A policy that moved further from pi_ref had more room to gain. Here each two methods of one rho are compared "
        f"at the KL that both reach, read off where the path of {points} points of each (pi_ref, snapshots, end) first "
        "comes to it, each prompt's advantage linear in KL between neighbouring points. Pairs of which one's first "
        "point after pi_ref is beyond that KL are left out: "
        f"{known} of {len(same_rho(cells))} pairs remain "
        "(`--snapshots` adds points). The tests leave out the error of the KL estimates and of the interpolation."
    )


def same_rho(keys: Iterable[Key]) -> list[tuple[Key, Key]]:
    return [(a, b) for a, b in combinations(keys, 2) if a[0] == b[0]]


def at_equal_kl(cells: dict[Key, list[Outcome]]) -> list[Comparison]:
    """Each two methods of one rho at the largest KL that all seeds of both reach, where their paths are known there."""
    differences = {}
    for a, b in same_rho(cells):
        kl = min(reach(o) for o in cells[a] + cells[b])
        if all(trace(o)[0][1] <= kl for o in cells[a] + cells[b]):
            ours, theirs = (np.mean([value_at(kl, *trace(o)) for o in cells[key]], axis=0) for key in (a, b))
            differences[a[0], a[1], b[1]] = ours - theirs
    return adjusted(differences)


def trace(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """KL [P] and per-prompt advantages [P, N] along training, from pi_ref on."""
    values = [outcome.advantages(i) for i in range(len(outcome.steps))]
    return np.array([0.0, *(f["kl"] for f in outcome.findings)]), np.stack([np.zeros_like(values[0]), *values])


def reach(outcome: Outcome) -> float:
    return float(trace(outcome)[0].max())


# The paper's claims
def claims(cells: dict[Key, list[Outcome]]) -> str:
    values = final(cells)
    tables = [claim_table(found) for found in (against_reference(values) + compare(values), at_equal_kl(cells))]
    return "\n\n".join([
        "Section 6.2's claims, and this project's own, as comparisons of two methods at one rho. Verdict: `yes` if all "
        "are significant, `in part` if some are and none the other way, `no` if some are the other way only, `mixed` "
        "if both, `undecided` if no difference is significant. (The paper's own tests are unadjusted, at p < 0.01.)",
        "At the end of training:", tables[0], "At equal KL:", tables[1],
    ])


def claim_table(found: list[Comparison]) -> str:
    header = ("claim", "comparisons", "ahead", "significantly ahead", "significantly behind", "verdict")
    return table(header, [claim_row(claim, found) for claim in CLAIMS])


def claim_row(claim: Claim, found: list[Comparison]) -> list[str]:
    tested = evidence(claim, found)
    ahead = [c for c in tested if c.difference > 0]
    real = [c.difference > 0 for c in tested if c.significant]
    counts = (len(tested), len(ahead), sum(real), len(real) - sum(real))
    return [claim.text, *map(str, counts), verdict(len(tested), sum(real), len(real) - sum(real))]


def evidence(claim: Claim, found: list[Comparison]) -> list[Comparison]:
    """The comparisons that the claim is about, as better minus worse."""
    both = [c for each in found if claim.where(each.rho) for c in (each, each.flipped())]
    return [c for c in both if c.a in claim.better and c.b in claim.worse]


def verdict(tested: int, ahead: int, behind: int) -> str:
    """From the numbers of comparisons, of those significantly ahead and of those significantly behind."""
    if not tested:
        return "not tested"
    if ahead == tested:
        return "yes"
    if ahead:
        return "mixed" if behind else "in part"
    return "no" if behind else "undecided"


# Figures B.1 and B.3
def collapse(out: Path, outcomes: Sequence[Outcome]) -> str:
    rho = figures.collapse(out / "collapse.png", outcomes)
    if rho is None:
        return ""
    return (f"Figure B.1 at rho = {rho:g}: held-out log-probabilities and KL, and advantage, over training, with and "
            "without the KL penalty.\n\n![Likelihood collapse](collapse.png)")


def ensemble(out: Path, outcomes: Sequence[Outcome], biases: Sequence[float]) -> str:
    if not figures.ensemble(out / "ensemble.png", outcomes, biases):
        return ""
    found = {key: weights.mean(0) for key, (_, weights) in figures.ensemble_weights(outcomes).items()}
    names = figures.member_names(biases, max(map(len, found.values())))
    rows = [[f"{rho:g}", name, *(f"{w:.2f}" for w in weights)] for (rho, name), weights in found.items()]
    parts = ["Weight of each reward model (trained at length bias b), mean over training. Of e-dpo it is the share of "
             "pairs to which that model was the nearest (Figure B.3), and of batches, over which its loss takes the "
             "minimum (footnote 5).",
             table(("rho", "choice", *names), rows), opposite(found, biases), "![Reward models](ensemble.png)"]
    return "\n\n".join(part for part in parts if part)


def opposite(found: dict[Key, np.ndarray], biases: Sequence[float]) -> str:
    """Section 6.2: at rho < 0.5 the nearest reward models have a high b, and vice versa."""
    lean = [(rho - 0.5) * (weights @ np.array(biases) - np.mean(biases)) for (rho, choice), weights in found.items()
            if choice == next(iter(figures.CHOICES)) and rho != 0.5 and len(biases) == len(weights)]
    if not lean:
        return ""
    across = f"{sum(each < 0 for each in lean)} of {len(lean)} rhos other than 0.5"
    return ("In the paper, e-dpo's pairs prefer reward models of the bias opposite to rho's. Here their mean b is on "
            f"the other side of the members' average at {across}.")


# Samples
def samples(cells: dict[Key, list[Outcome]], human: dict[str, str]) -> str:
    """A sample of each method for prompts at fixed places of the test set."""
    rhos = rhos_of(cells)
    rho = rhos[len(rhos) // 2]
    rows = {name: seeds[0].rows[-1] for (r, name), seeds in cells.items() if r == rho}
    n = len(next(iter(rows.values())))
    places = sorted({n * i // SHOWN for i in range(SHOWN)})
    head = f"First samples at rho = {rho:g} of {count(places, 'prompt')} at fixed places of the test set, not picked."
    return "\n\n".join([head, *(sample_table({name: each[i] for name, each in rows.items()}, human) for i in places)])


def sample_table(rows: dict[str, dict[str, Any]], human: dict[str, str]) -> str:
    prompt = prompt_text(next(iter(rows.values()))["prompt"])
    found = [["human", escape(human.get(prompt, "")), ""], *(sample_row(*each) for each in rows.items())]
    return f"> {escape(cut(prompt))}\n\n{table(('', 'summary', 'advantage at this prompt'), found)}"


def sample_row(name: str, row: dict[str, Any]) -> list[str]:
    return [name, escape(row["sample"]), f"{row['reward'] - row['reference_reward']:+.2f}"]


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: the key of `human`."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def escape(text: str) -> str:
    """One line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


# The terminal
def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """Methods by rhos: advantage, with half the width of its 95% interval."""
    points = {key: point(v) for key, v in final(by_cell(outcomes)).items()}
    best, rhos = best_of(points), rhos_of(points)
    shown = Table(title="oracle reward over pi_ref (± half the 95% interval)", title_justify="left")
    shown.add_column("method")
    for rho in rhos:
        shown.add_column(f"rho {rho:g}", justify="right")
    for name in figures.in_order(outcomes):
        shown.add_row(name, *(terminal_cell(points.get((rho, name)), best[rho] == name) for rho in rhos))
    return shown


def terminal_cell(found: Point | None, best: bool) -> str:
    if found is None:
        return ""
    mean, low, high = found
    text = f"{mean:+.3f} ± {(high - low) / 2:.3f}"
    return f"[bold]{text}[/]" if best else text
