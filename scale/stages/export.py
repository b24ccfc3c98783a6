"""`export`: a policy as a Hugging Face folder, or its adapters as one of PEFT."""

from dataclasses import dataclass, field
from pathlib import Path

from scale.console import console
from scale.io.huggingface import export
from scale.io.model_folder import load_policy, load_trunk, trunk_path
from scale.io.peft import export_adapters
from scale.model.adapters import AdapterConfig
from scale.parallel.mesh import RuntimeConfig, make_runtime


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a Hugging Face folder, which `transformers`, vLLM and llama.cpp's converter load.

    The adapters of a policy are added to its weights.
    """

    policy: Path
    """The policy: a folder of ours, a Hugging Face folder, an id of its hub, a .gguf file, or
    smollm2. It began as a Llama, Mistral or Qwen (sequential block, RMSNorm)."""
    out: Path
    """Folder to write; it must be empty or not exist."""
    adapters: bool = False
    """Write the adapters of the policy alone, as `peft` loads them beside the model below them."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> None:
        runtime = make_runtime(self.runtime)
        if self.adapters:
            policy = load_policy(self.policy, runtime)
            export_adapters(self.out, policy.model, str(trunk_path(self.policy)))
        else:
            policy = load_trunk(self.policy, runtime, AdapterConfig(), seed=0)
            export(self.out, policy.model, policy.tokenizer)
        console.print(f"{self.out}: written", markup=False)
