"""`sample`: responses of a policy to prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.dataset import Limits
from scale.data.rows import read, write
from scale.io import model_folder
from scale.model.inference import generate
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.stage import TOKENS, Stage


@dataclass(frozen=True, kw_only=True)
class Sample(Stage):
    """Sample responses from a policy: the rows of --data with columns `samples` and `complete`."""

    policy: Path
    """The policy: a folder of ours, a Hugging Face folder, an id of its hub, a .gguf file, or
    smollm2."""
    data: Path
    """Rows with `prompt`."""
    prompts: int | None = None
    """Only the first so many rows. Default: all."""
    n: int = 4
    """Samples of each prompt."""
    temperature: float = 1.0
    """1 samples from the policy itself; 0 is greedy."""
    seed: int = 0
    """Seed of the samples."""
    limits: Limits = field(default_factory=Limits)
    """Length limits; `response` is the most tokens a sample may have."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> dict[str, Any]:
        policy = model_folder.load_policy(self.policy, make_runtime(self.runtime))
        rows = read(self.data, need=("prompt",))[: self.prompts]
        dataset = policy.make_dataset(rows, [], self.limits, str(self.data))
        samples = generate(
            policy.model, policy.tokenizer, dataset, n=self.n, max_new_tokens=self.limits.response,
            seed=self.seed, temperature=self.temperature, label="sample",
            cache=self.out / TOKENS,
        )  # fmt: skip
        sampled = [
            row | {"samples": [s.text for s in own], "complete": [s.complete for s in own]}
            for row, own in zip(dataset.select(rows), samples, strict=True)
        ]
        write(self.out / "rows.parquet", sampled, policy.hashes)
        share = float(np.mean([row["complete"] for row in sampled]))
        return {"prompts": len(sampled), "share of samples that end by themselves": share}
