"""Hugging Face's `config.json` and our ModelConfig, each from the other."""

from pathlib import Path
from typing import Any

from scale.data.formats import LARGEST
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError
from scale.model.config import ModelConfig

Settings = dict[str, Any]


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FAMILIES: dict[str, Settings] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
"""Settings that our model can only have one value of, and what files may hold for it."""
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
LLAMA: Settings = {"block": "sequential", "norm": "rms", "scaled_logits": False}
"""What every architecture that we read and write has in common; PaLM has other values."""
OURS = {  # their name of a setting: ours
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "rope_theta": "rope_base",
}


def config_from(settings: Settings, path: Path) -> ModelConfig:
    """The shape that a `config.json` describes; missing settings have `transformers`' defaults.

    Args:
        settings: The object of the file.
        path: The file, for messages.

    Raises:
        InputError: The architecture is another one, or our model cannot do what a setting asks for.
    """
    family = settings.get("model_type")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise InputError(f"{path}: model_type {family!r} is not supported; those are {supported}")
    check(settings, path)
    rope_base, rope_scaling = rope(settings, path)
    vocab_size, d_model, d_ff, num_layers, num_heads = (
        positive(settings, name, None, path) for name in REQUIRED
    )
    head_dim = None if family == "qwen3" else d_model // num_heads
    return ModelConfig(
        vocab_size=vocab_size,
        max_seq_len=positive(settings, "max_position_embeddings", 2048, path),
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=positive(settings, "head_dim", head_dim, path),
        d_ff=d_ff,
        rope_base=rope_base,
        num_kv_heads=positive(settings, "num_key_value_heads", num_heads, path),
        norm_eps=number(settings, "rms_norm_eps", 1e-6, path),
        tie_embeddings=flag(settings, "tie_word_embeddings", path),
        rope_scaling=rope_scaling,
        **LLAMA,
        **FAMILIES[family],
    )


def positive(settings: Settings, name: str, default: int | None, path: Path) -> int:
    """A setting that is a positive integer, or its default."""
    value = default if settings.get(name) is None else settings[name]
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {name} must be a positive number, not {value!r}")
    return value


def number(settings: Settings, name: str, default: float | None, path: Path) -> float:
    """A setting that is a positive finite number, or its default."""
    value = default if settings.get(name) is None else settings[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise InputError(f"{path}: {name} must be a positive number, not {value!r}")
    return float(value)


def flag(settings: Settings, name: str, path: Path) -> bool:
    """A setting that is true or false; false where it is missing."""
    value = settings.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"{path}: {name} must be true or false, not {value!r}")
    return bool(value)


def check(settings: Settings, path: Path) -> None:
    """Refuse settings that our model cannot do."""
    for name, allowed in SUPPORTED.items():
        value = settings.get(name, allowed[0])
        if value not in allowed:
            raise InputError(f"{path}: {name} = {value!r} is not supported, only {allowed[0]!r}")
    positive(settings, "sliding_window", 1, path)
    window = sliding_window(settings)
    if window is not None and window < settings.get("max_position_embeddings", window + 1):
        raise InputError(f"{path}: sliding_window = {window} is not supported, only full attention")


def sliding_window(settings: Settings) -> int | None:
    """How far back some layer sees; None: all the way.

    Mistral's window is in use even where the file is silent, Qwen's only where the file says so.
    """
    if settings["model_type"] == "mistral":
        return settings.get("sliding_window", 4096)
    in_a_layer = "sliding_attention" in (settings.get("layer_types") or ())
    in_use = in_a_layer or settings.get("use_sliding_window")
    return settings.get("sliding_window", 4096) if in_use else None


def rope(settings: Settings, path: Path) -> tuple[float, tuple[float, float, float, int] | None]:
    """The base and Llama 3.1's scaling, which transformers 5 spells `rope_parameters`."""
    given = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InputError(f"{path}: RoPE must be an object, not {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    own = given if given.get("rope_theta") else settings
    base = number(own, "rope_theta", 10_000.0, path)
    by_layer = any(isinstance(value, dict) for value in given.values())
    if by_layer or kind not in ("default", "llama3") or given.get("partial_rotary_factor", 1) != 1:
        raise InputError(
            f"{path}: RoPE {given} is not supported, only rope_type 'default' and 'llama3'"
        )
    if kind == "default":
        return base, None
    filled = {LLAMA3[3]: settings.get("max_position_embeddings"), **given}
    missing = [name for name in LLAMA3 if filled.get(name) is None]
    if missing:
        raise InputError(f"{path}: RoPE 'llama3' without {', '.join(missing)}")
    factor, low, high, length = (number(filled, name, None, path) for name in LLAMA3)
    return base, (factor, low, high, int(length))


def settings_for(config: ModelConfig, tokenizer: Tokenizer) -> Settings:
    """The `config.json` of a model, with RoPE as every version of `transformers` reads it.

    Raises:
        InputError: No Llama architecture can hold the model; the message names the reason.
    """
    refuse_palm(config)
    family = family_of(config)
    scaling = config.rope_scaling and {
        "rope_type": "llama3",
        **dict(zip(LLAMA3, config.rope_scaling, strict=True)),
    }
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{name: getattr(config, ours) for name, ours in OURS.items()},
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rope_scaling": scaling,
        "sliding_window": None,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos if len(tokenizer.stops) == 1 else list(tokenizer.stops),
        "pad_token_id": tokenizer.pad,
    }


def refuse_palm(config: ModelConfig) -> None:
    """Refuse to export a PaLM-shaped model."""
    for name, value in LLAMA.items():
        if getattr(config, name) != value:
            raise InputError(
                f"a model with {name} = {getattr(config, name)!r} (PaLM) cannot be exported: "
                f"Hugging Face has an architecture for {value!r} only"
            )


def family_of(config: ModelConfig) -> str:
    """The architecture that holds a model.

    Mistral is a Llama whose heads need not divide its width, which `transformers` asks of a Llama.
    """
    if config.qkv_bias and config.qk_norm:
        raise InputError(
            "a model with qkv_bias and qk_norm cannot be exported: Hugging Face has either "
            "(Qwen2, Qwen3)"
        )
    if config.qkv_bias:
        return "qwen2"
    if config.qk_norm:
        return "qwen3"
    return "mistral" if config.d_model % config.num_heads else "llama"
