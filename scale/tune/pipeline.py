"""The stages of `tune`: which reads what. Each is a command of its own."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scale.data.dataset import Limits
from scale.parallel.mesh import make_runtime
from scale.stages.align import Align
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.export import Export
from scale.stages.rates import Rates
from scale.stages.reward import Reward
from scale.stages.score import Score
from scale.train.loop import TrainingConfig
from scale.tune.options import Options
from scale.tune.survey import HELD_OUT_ROWS

WARMUP = 0.1  # of the steps
LOOKS = 6  # at the held-out rows, besides the first
QUICK_STEPS, QUICK_BATCH = 2, 2
PURPOSES = {
    "data": "split by prompt",
    "rewards": "reward models",
    "scored": "what the method reads",
    "held-out": "the same of held-out rows, with samples for the KL",
    "policy": "policy",
    "judge": "judge, of rows that no policy trains on",
    "evaluation": "samples before and after, judged",
    "hf": "Hugging Face folder",
}


def shares_of(rows: int, quick: bool) -> dict[str, float]:
    """The share of each part of so many rows: the judge learns from `validation`, and policies are
    compared on `test`; both are a part of small files and at most some rows of large ones."""
    validation, test = (0.25, 0.25) if quick else (min(0.2, 2000 / rows), min(0.1, 200 / rows))
    return {"train": 1 - validation - test, "validation": validation, "test": test}


@dataclass(frozen=True)
class Pipeline:
    """The stages of one run.

    Attributes:
        options: Those of `tune`.
        shares: The share of each part of the rows.
        limits: Length limits.
        rates: Peak learning rates.
        pairs: How many pairs each part has.
    """

    options: Options
    shares: dict[str, float]
    limits: Limits
    rates: Rates
    pairs: dict[str, int]

    @cached_property
    def stages(self) -> dict[str, Any]:
        """The stages in order, under names of `PURPOSES`."""
        return {
            "data": self.split(),
            **({"rewards": self.reward_models()} if self.rewards else {}),
            "scored": self.scored(),
            "held-out": self.held_out(),
            "policy": self.policy(),
            "judge": self.judge(),
            "evaluation": self.evaluation(),
            "hf": self.export(),
        }

    def part(self, name: str) -> Path:
        return self.options.out / f"data/{name}.parquet"

    @property
    def rewards(self) -> Path | None:
        """The folder of the reward models, if the method distils any."""
        return self.options.out / "rewards" if self.options.num_reward_models else None

    @cached_property
    def devices(self) -> int:
        """Among how many a batch is split."""
        return make_runtime(self.options.runtime).batch_shards

    @property
    def common(self) -> dict[str, Any]:
        """Options that most stages have."""
        return {"limits": self.limits, "runtime": self.options.runtime}

    @property
    def trained(self) -> dict[str, Any]:
        """Options of stages that train a model."""
        return {"log": self.options.log, "adapter": self.options.adapter, **self.common}

    @property
    def columns(self) -> dict[str, Any]:
        """Options of `score`."""
        options = self.options
        return {"rewards": self.rewards, "reference": options.model, "seed": options.seed}

    def split(self) -> Corpus:
        options, shares = self.options, self.shares
        return Corpus(
            out=options.out / "data", data=options.data, validation=shares["validation"],
            test=shares["test"], seed=options.seed, bad_rows=options.bad_rows,
            rows=options.used_rows, preferences=True,
        )  # fmt: skip

    def reward_models(self) -> Reward:
        return Reward(
            out=self.options.out / "rewards", data=self.part("train"), init=self.options.model,
            validation=self.part("validation"), num_reward_models=self.options.num_reward_models,
            training=self.training(self.rates.reward, "train"), **self.trained,
        )  # fmt: skip

    def scored(self) -> Score:
        return Score(
            out=self.options.out / "scored", data=self.part("train"), method=self.options.method,
            **self.columns, **self.common,
        )  # fmt: skip

    def held_out(self) -> Score:
        return Score(
            out=self.options.out / "held-out", data=self.part("test"), rows=HELD_OUT_ROWS,
            **self.columns, **self.common,
        )  # fmt: skip

    def policy(self) -> Align:
        options, training = self.options, self.training(self.rates.policy, "train")
        return Align(
            out=options.out / "policy", data=self.scored().out / "rows.parquet",
            policy=options.model, method=options.method, beta=options.beta,
            validation=self.held_out().out / "rows.parquet", training=training,
            every=training.steps if options.quick else max(1, training.steps // LOOKS),
            **self.trained,
        )  # fmt: skip

    def judge(self) -> Reward:
        return Reward(
            out=self.options.out / "judge", data=self.part("validation"), init=self.options.model,
            validation=self.part("test"), training=self.training(self.rates.reward, "validation"),
            **self.trained,
        )  # fmt: skip

    def evaluation(self) -> Evaluate:
        options = self.options
        return Evaluate(
            out=options.out / "evaluation", data=self.part("test"), policies=(self.policy().out,),
            reference=options.model, rewards=self.judge().out, n=1, seed=options.seed,
            **self.common,
        )  # fmt: skip

    def export(self) -> Export:
        options = self.options
        return Export(policy=self.policy().out, out=options.hf, runtime=options.runtime)

    def training(self, rate: float, part: str) -> TrainingConfig:
        """A run of the epochs asked for over the pairs of a part."""
        options, pairs = self.options, self.pairs[part]
        devices = self.devices
        size = min(QUICK_BATCH if options.quick else options.batch_size, pairs)
        size = devices * max(1, size // devices)
        epochs = QUICK_STEPS * size / pairs if options.quick else options.epochs
        training = TrainingConfig(
            batch_size=size, learning_rate=rate, seed=options.seed, epochs=epochs,
            accumulation=parts_of(
                size // devices, options.batch_size // options.accumulation // devices
            ),
        ).for_rows(pairs)  # fmt: skip
        return replace(training, warmup=max(1, round(WARMUP * training.steps)))


def parts_of(batch_size: int, most: int) -> int:
    """In how many equal parts, each of at most so many rows, a batch is cut; as few as possible."""
    sizes = range(1, batch_size + 1)
    return next(n for n in sizes if batch_size % n == 0 and batch_size // n <= max(most, 1))
