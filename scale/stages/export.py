"""`export`: a policy as a Hugging Face folder."""

from dataclasses import dataclass, field
from pathlib import Path

from scale.console import console
from scale.io import model_folder
from scale.io.huggingface import export
from scale.parallel.mesh import RuntimeConfig, make_runtime


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a Hugging Face folder, which `transformers`, vLLM and llama.cpp's converter load."""

    policy: Path
    """The policy: a folder of ours, a Hugging Face folder, an id of its hub, a .gguf file, or
    smollm2. It began as a Llama, Mistral or Qwen (sequential block, RMSNorm)."""
    out: Path
    """Folder to write; it must be empty or not exist."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> None:
        policy = model_folder.load_policy(self.policy, make_runtime(self.runtime))
        export(self.out, policy.model, policy.tokenizer)
        console.print(f"{self.out}: written", markup=False)
