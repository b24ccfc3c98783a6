"""Section 6.1's own protocol in the village, where the truth is known.

A reward model of human completions over samples of pi_ref (the oracle) labels pairs and judges
policies. The true reward judges the same policies, too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.study.variations import labelled
from scale.data.rows import write
from scale.data.village import village
from scale.io.model_folder import VILLAGE
from scale.paper.pipeline import PRESETS, Paper, findings_of
from scale.paper.repetition import Repetition
from scale.stages.stage import execute

BY_ORACLE, BY_TRUTH = "oracle", "oracle, by the truth"


def run(paper: Paper) -> Iterator[dict[str, Any]]:
    """The rows of one seed, like those of `variations`; `paper` is its run with true rewards."""
    data = paper.out / "village.parquet"
    write(data, village(paper.pages, paper.seed), {})
    rhos = PRESETS["miniature"].rhos
    protocol = replace(paper, out=paper.out / "protocol", data=data, rhos=rhos, snapshots=0)
    execute(protocol)
    repetition = Repetition(protocol, protocol.seed)
    for rho in rhos:
        policies = [p for method in paper.methods for p in repetition.policies(rho, method)]
        by_oracle = repetition.evaluation("test", rho, [policy.path for policy in policies])
        out = by_oracle.out.with_name("test-truth")
        by_truth = replace(by_oracle, out=out, rewards=VILLAGE)
        execute(by_truth)
        for experiment, evaluation in ((BY_ORACLE, by_oracle), (BY_TRUTH, by_truth)):
            for policy, values in zip(policies, findings_of(evaluation)["policies"], strict=True):
                yield labelled(experiment, policy.seed, rho, policy.method, values)
