"""The options of `plan`: those of the stage that it plans, and the pod."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from minipref.methods import METHODS
from scale.data.dataset import Limits
from scale.data.layout import Layout
from scale.errors import InputError
from scale.io.model_folder import config_of
from scale.model.adapters import AdapterConfig
from scale.model.config import ModelConfig
from scale.model.presets import MODELS, published
from scale.parallel.mesh import RuntimeConfig
from scale.stages.align import Align, MethodName
from scale.stages.command_line import default_of
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.train.optimizer import OptimizerConfig

StageName = Literal["align", "reward", "sft", "score", "sample"]

TRAINED: dict[str, type] = {"align": Align, "reward": Reward, "sft": Sft}

RECIPES: dict[str, dict[str, Any]] = {  # what other options are by default
    "palm": {
        "optimizer": OptimizerConfig("adafactor", 1e-4),
        "runtime": RuntimeConfig(remat="full", dtype="bfloat16"),
    }
}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A stage, and the pod that it is compiled for."""

    stage: StageName = "align"
    """The stage whose step is compiled: the very function that the command runs."""
    model: str = "palm-8b"
    """Shape: palm-8b, palm-62b, palm-540b, llama-3-8b, llama-3-70b or smollm2-135m; or the
    folder or .gguf file of a model."""
    method: MethodName = "e-dpo"
    """The objective of `align`; README.md has the table."""
    topology: str = "v5e:4x4"
    """TPU generation and chips along each dimension of a slice."""
    slices: int = 1
    """Slices, joined by the data-center network; they lie along the mesh axis `data`."""
    batch: int | None = None
    """Rows of a step, over all devices; of `sample` prompts. Default: the most that fit."""
    accumulation: int = 1
    """Parts of a batch that pass through the model one after another."""
    num_reward_models: int = 5
    """Reward models of an ensemble method: those that `align` distils, `reward` trains and `score`
    asks."""
    recipe: Literal["palm"] | None = None
    """Options for pods that are given together. palm: Adafactor, z-loss 1e-4, bfloat16, remat full.
    An option that is also given by itself wins. `reward` takes no optimizer of it: it has Adam."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and z-loss of `align` and `sft`."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters, trained in place of the weights."""
    limits: Limits = field(default_factory=lambda: Limits(1024, 512))
    """Length limits, which on a TPU are the lengths of all rows."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision. Where no axis is given: one copy of the model in each slice,
    and the smallest tensor that divides the model."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        if self.model in MODELS or not Path(self.model).exists():
            return published(self.model, "--model")
        return config_of(Path(self.model))

    @property
    def layout(self) -> Layout:
        """How a row is divided: the prompt, and the responses that the stage reads."""
        has_samples = METHODS[self.method].gamma is not None
        of_stage = {"sft": 1, "reward": 2, "sample": 1}
        responses = of_stage.get(self.stage, 3 if has_samples else 2)
        return Layout(self.limits.prompt, self.limits.response, responses)

    @property
    def distilled(self) -> int:
        """How many reward models the method distils."""
        several = self.num_reward_models
        return {"none": 0, "single": 1, "ensemble": several}[METHODS[self.method].rewards]

    def require_used(self) -> None:
        """Refuse options that the stage does not have.

        Raises:
            InputError: Names the option.
        """
        trains, chooses = self.stage in TRAINED, self.stage in ("align", "sft")
        of_recipes = [OptimizerConfig(), *(each["optimizer"] for each in RECIPES.values())]
        unused = {
            "--accumulation": self.accumulation > 1 and not trains,
            "--adapter.rank": self.adapter.rank > 0 and not trains,
            "--optimizer": self.optimizer not in of_recipes and not chooses,
        }
        if named := [option for option, given in unused.items() if given]:
            raise InputError(f"{named[0]}: `{self.stage}` has no such option")

    def command(self, data: Path, **training: Any) -> Any:
        """The stage that is planned, on rows `data`; its other folders are examples.

        Args:
            data: The rows.
            **training: What its `TrainingConfig` has instead of the stage's own values.
        """
        common: dict[str, Any] = {"data": data, "limits": self.limits, "runtime": self.runtime}
        trained = common | {"adapter": self.adapter}
        if self.stage in TRAINED:
            own = next(f for f in fields(TRAINED[self.stage]) if f.name == "training")
            trained["training"] = replace(default_of(own), **training)
        out = Path("runs") / self.stage
        model = Path("MODEL") if self.model in MODELS else Path(self.model)
        match self.stage:
            case "align":
                return Align(
                    out=out, policy=model, method=self.method, optimizer=self.optimizer, **trained
                )
            case "reward":
                return Reward(
                    out=out, init=model, num_reward_models=self.num_reward_models, **trained
                )
            case "sft":
                return Sft(out=out, init=model, optimizer=self.optimizer, **trained)
            case "score":
                rewards = Path("runs/reward") if self.distilled else None
                return Score(
                    out=out, reference=model, rewards=rewards, method=self.method, **common
                )
            case "sample":
                return Sample(out=out, policy=model, **common)
