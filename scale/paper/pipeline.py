"""Section 6 from corpus to figures, over several seeds."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax

from scale.console import console
from scale.data.rows import read
from scale.errors import InputError, option_name
from scale.files import read_json, write_csv, write_json
from scale.paper.comparisons import SUMMARY, summaries
from scale.paper.options import Options
from scale.paper.presets import OPTIONS
from scale.paper.repetition import REWARD_MODELS, Repetition
from scale.paper.report import prompt_text, terminal_table, write_report
from scale.paper.results import Outcome, Policy, write_results
from scale.parallel.workers import execute_all, usable_cores, workers
from scale.stages.align import require_steps
from scale.stages.stage import Stage, describe, execute, needs
from scale.stages.sweep import require_distinct

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]  # means over prompts; a row for each


@dataclass(frozen=True, kw_only=True)
class Paper(Options):
    """Section 6 end to end: corpus, SFT, labels, biased data, reward models, policies, report.

    The defaults are those of the miniature.
    """

    def run(self) -> dict[str, Any]:
        self.check()
        repetitions = [Repetition(self, seed) for seed in range(self.seed, self.seed + self.seeds)]
        policies = [
            policy
            for repetition in repetitions
            for rho in self.rhos
            for method in self.methods
            for policy in repetition.policies(rho, method)
        ]
        side_by_side = jax.default_backend() == "cpu" and jax.process_count() == 1
        with workers(len(usable_cores())) if side_by_side else nullcontext() as pool:
            self.train(pool, repetitions, policies)
            policies = self.validate(pool, policies)
            selected = [best(cell, self.most_kl) for cell in by_cell(policies)]
            outcomes = self.test(pool, selected)
        self.report(repetitions, policies, outcomes)
        return {"policies": len(policies)}

    def check(self) -> None:
        """Refuse what would fail in a later stage, or let two runs write one folder."""
        for name in ("rhos", "methods", "length_biases"):
            if not getattr(self, name):
                raise InputError(f"{option_name(name)}: none")
        require_distinct(self, ("rhos", "methods", "betas", "learning_rates"))
        require_steps(self.snapshots, self.align.steps)

    def train(
        self,
        pool: ProcessPoolExecutor | None,
        repetitions: Sequence[Repetition],
        policies: Sequence[Policy],
    ) -> None:
        """Stages 1 to 6 of all repetitions, each as soon as those before it are complete.

        A worker takes all policies of a method, so that it compiles the step once. With one
        repetition, stages 1 to 3 have all cores, one after the other.
        """
        shared = [stage for r in repetitions for stage in r.shared_stages().values()]
        if len(repetitions) == 1:
            for stage in shared:
                execute(stage)
            shared = []
        chains: list[list[Stage]] = [[stage] for stage in shared]
        chains += [
            repetition.reward_stages(rho, name)
            for repetition in repetitions
            for rho in self.rhos
            for name in REWARD_MODELS  # neighbours compile different steps
        ]
        for method in self.methods:
            group = [policy for policy in policies if policy.method == method]
            chains.append([Repetition(self, policy.seed).alignment(policy) for policy in group])
        execute_all(pool, chains, "stages 1 to 6", execute, needs(chains))

    def validate(
        self, pool: ProcessPoolExecutor | None, policies: Sequence[Policy]
    ) -> list[Policy]:
        """The policies; where there is a choice, with their values on validation prompts."""
        candidates = [policy for cell in by_cell(policies) if len(cell) > 1 for policy in cell]
        paths = {policy: [policy.path] for policy in candidates}
        values: dict[Path, dict[str, Any]] = {
            path: {"validation": findings["advantage"], "validation_kl": findings["kl"]}
            for path, (findings, _) in self.evaluate(pool, "validation", paths).items()
        }
        return [policy._replace(**values.get(policy.path, {})) for policy in policies]

    def test(self, pool: ProcessPoolExecutor | None, selected: Sequence[Policy]) -> list[Outcome]:
        """The selected policies on test prompts, at each snapshot and at the end."""
        points = {policy: Repetition(self, policy.seed).points(policy) for policy in selected}
        paths = {policy: list(points[policy].values()) for policy in selected}
        evaluations = self.evaluate(pool, "test", paths)
        outcomes = []
        for policy in selected:
            findings, rows = zip(*(evaluations[path] for path in paths[policy]), strict=True)
            outcomes.append(Outcome(policy, list(points[policy]), list(rows), list(findings)))
        return outcomes

    def evaluate(
        self,
        pool: ProcessPoolExecutor | None,
        part: str,
        paths: dict[Policy, list[Path]],
    ) -> dict[Path, Evaluation]:
        """Evaluate model folders on a part of the corpus; each seed and rho is one stage, which
        keeps the order of the policies."""
        key = attrgetter("seed", "rho")
        cells = groupby(sorted(paths, key=key), key=key)
        stages = [
            Repetition(self, seed).evaluation(part, rho, [path for p in cell for path in paths[p]])
            for (seed, rho), cell in cells
        ]
        if not stages:
            return {}
        chains = [[stage] for stage in stages]
        results = execute_all(pool, chains, f"evaluation on {part}", execute)
        evaluations = {}
        for stage, [findings] in zip(stages, results, strict=True):
            rows = read(stage.out / "rows.parquet", need=("prompt",))
            for i, path in enumerate(stage.policies):
                own = [row for row in rows if row["policy"] == i]
                evaluations[path] = (findings["policies"][i], own)
        return evaluations

    def report(
        self,
        repetitions: Sequence[Repetition],
        policies: Sequence[Policy],
        outcomes: Sequence[Outcome],
    ) -> None:
        """Write what the run found, and print the table."""
        has_truth = self.data is None
        write_results(self.out / "results.csv", policies, outcomes, has_truth)
        rows = summaries(outcomes)
        write_csv(self.out / "summary.csv", SUMMARY, rows)
        write_json(self.out / "config.json", describe(self)["options"])
        findings = {
            name: [findings_of(repetition.shared_stages()[name]) for repetition in repetitions]
            for name in repetitions[0].shared_stages()
        }
        tests = read(repetitions[0].out / "corpus/test.parquet", need=("prompt", "completion"))
        completions = {prompt_text(row["prompt"]): row["completion"] for row in tests}
        write_report(self.out, outcomes, findings, completions, self.length_biases, has_truth)
        console.print(terminal_table(rows))
        console.print(f"{self.seeds} seed{'s' * (self.seeds > 1)}; {self.out / 'report.md'}")


PRESETS = {name: Paper(**options) for name, options in OPTIONS.items()}


def findings_of(stage: Stage) -> dict[str, Any]:
    """What a complete stage recorded."""
    return read_json(stage.out / "stage.json")["findings"]


def by_cell(policies: Sequence[Policy]) -> list[list[Policy]]:
    """The candidates of each (seed, rho, method), in order."""
    cells = groupby(policies, key=lambda p: (p.seed, p.rho, p.method))
    return [list(cell) for _, cell in cells]


def best(cell: Sequence[Policy], most_kl: float | None) -> Policy:
    """The best candidate within the KL budget; the nearest to pi_ref where none is within it."""
    near = [p for p in cell if most_kl is None or (p.validation_kl or 0.0) <= most_kl]
    if near:
        return max(near, key=lambda policy: policy.validation or 0.0)
    return min(cell, key=lambda policy: policy.validation_kl or 0.0)
