"""Published model shapes, for `plan` and for training from scratch."""

from dataclasses import replace

from scale.errors import InputError
from scale.model.config import ModelConfig

PALM_8B = ModelConfig(
    vocab_size=256_000, num_layers=32, d_model=4096, num_heads=16, head_dim=256, d_ff=16_384
)
LLAMA_3_8B = ModelConfig(
    vocab_size=128_256, num_layers=32, d_model=4096, num_heads=32, head_dim=128, d_ff=14_336,
    rope_base=500_000.0, num_kv_heads=8, block="sequential", norm="rms", norm_eps=1e-5,
    tie_embeddings=False, scaled_logits=False, max_seq_len=8192,
)  # fmt: skip
SMOLLM2_135M = replace(
    LLAMA_3_8B, vocab_size=49_152, num_layers=30, d_model=576, num_heads=9, head_dim=64, d_ff=1536,
    rope_base=100_000.0, num_kv_heads=3, tie_embeddings=True,
)  # fmt: skip

MODELS: dict[str, ModelConfig] = {
    "palm-8b": PALM_8B,  # arXiv 2204.02311, Table 1
    "palm-62b": replace(PALM_8B, num_layers=64, d_model=8192, num_heads=32, d_ff=32_768),
    "palm-540b": replace(PALM_8B, num_layers=118, d_model=18_432, num_heads=48, d_ff=73_728),
    "llama-3-8b": LLAMA_3_8B,  # arXiv 2407.21783, Table 3
    "llama-3-70b": replace(LLAMA_3_8B, num_layers=80, d_model=8192, num_heads=64, d_ff=28_672),
    "smollm2-135m": SMOLLM2_135M,  # arXiv 2502.02737
}


def published(name: str, option: str) -> ModelConfig:
    """The published shape `name`.

    Raises:
        InputError: `MODELS` has no such name; the message starts with `option`.
    """
    if name not in MODELS:
        raise InputError(f"{option} {name}: not one of {', '.join(MODELS)}")
    return MODELS[name]
