"""`tune`: your preferences and your model, in one command."""

from dataclasses import dataclass
from typing import Any

from scale.console import console
from scale.stages.rates import Rates, rates_for
from scale.stages.stage import Stage, execute
from scale.tune.options import Options
from scale.tune.pipeline import Pipeline, shares_of
from scale.tune.plan import Work, print_plan
from scale.tune.report import write_report
from scale.tune.survey import Survey, survey, usable


@dataclass(frozen=True, kw_only=True)
class Tune(Options):
    """Align a model with preferences: split, reward models, columns, policy, judge, report.

    It is a composition of the other commands, which it prints; it computes what the method reads
    and nothing more. The same command resumes, stage by stage.
    """

    def run(self) -> dict[str, Any]:
        refused: list[str] | None = [] if self.bad_rows == "skip" else None
        rows = usable(self.data, refused)[: self.used_rows]
        shares = shares_of(len(rows), self.quick)
        surveyed = survey(self, rows, shares)
        pairs = {name: len(lengths) for name, lengths in surveyed.kept.items()}
        stages = Pipeline(self, shares, surveyed.limits, self.rates(surveyed), pairs).stages
        if self.quick:
            console.print("  REHEARSAL (--quick): a few rows and steps; the model gets no better")
        work = Work(surveyed, self.num_reward_models, self.adapter, self.runtime.dtype)
        print_plan(stages, work, refused or [])
        findings = {name: run(stage) for name, stage in stages.items()}
        return write_report(self, stages, findings, surveyed, refused or [])

    def rates(self, surveyed: Survey) -> Rates:
        """The learning rates: those of the model's size, scaled to --learning-rate."""
        rates = rates_for(surveyed.parameters, adapters=self.adapter.rank > 0)
        factor = (self.learning_rate or rates.policy) / rates.policy
        return Rates(rates.policy * factor, rates.reward * factor)


def run(stage: Any) -> dict[str, Any]:
    """Run a stage unless it is complete; `export` writes its folder whole or not at all."""
    if isinstance(stage, Stage):
        return execute(stage)
    if stage.out.exists():
        console.print(f"{stage.out}: complete", markup=False)
    else:
        stage.run()
    return {}
