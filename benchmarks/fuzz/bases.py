"""Whole folders of each kind, small: what the cases damage."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from minipref.reward_models import RewardModel, stack
from minipref.training import Hyperparameters, TrainState
from scale.data.chat_tokenizer import chat_tokenizer
from scale.data.tokenizer import train_tokenizer
from scale.io import model_folder
from scale.io.hf_config import settings_for
from scale.io.huggingface import export, save_weights
from scale.io.model_folder import ModelFolder, load_policy
from scale.io.weight_table import tensors_of
from scale.model.adapters import AdapterConfig, adapted
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.stages.corpus import Corpus
from scale.stages.stage import execute
from scale.train.loop import train

LLAMA = ModelConfig(
    vocab_size=300, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=16, num_kv_heads=1,
    block="sequential", norm="rms", tie_embeddings=False, scaled_logits=False, max_seq_len=256,
)  # fmt: skip
TEXT = "the cat sat on the mat and the bat sat on the cat"
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = 6


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter random."""
    rng = np.random.default_rng(seed)
    like = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)


def their_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of another program, with a chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "he", "at", "the"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, [("h", "e"), ("a", "t"), ("t", "he")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    named = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **named)


def huggingface(path: Path, shards: bool, **more: Any) -> None:
    """A folder in one file, or in shards with an index."""
    model = random_model(replace(LLAMA, **more))
    tokenizer = chat_tokenizer(their_tokenizer(), "made")
    if not shards:
        export(path, model, tokenizer)
        return
    path.mkdir()
    tokenizer.save(path)
    (path / "config.json").write_text(json.dumps(settings_for(model.config, tokenizer)))
    save_weights(path, tensors_of(model), 2**14)


def gguf_fields(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a file."""
    alphabet = sorted(ByteLevel.alphabet())
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.d_model,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*SPECIAL, *alphabet, "he", "at", "the"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 259,
        "tokenizer.ggml.merges": ["h e", "a t", "t he"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }


def gguf_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights under llama.cpp's names."""
    rng, d, f = np.random.default_rng(1), config.d_model, config.d_ff
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config.vocab_size, d), "output_norm": (d,), "output": (config.vocab_size, d)
    }  # fmt: skip
    layer = {
        "attn_norm": (d,), "ffn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d),
        "attn_output": (d, q), "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f),
    }  # fmt: skip
    for i in range(config.num_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A file of any metadata that its format can hold.

    Raises:
        Exception: It cannot hold these.
    """
    writer = gguf.GGUFWriter(path, str(fields.get("architecture", "llama")))
    add: dict[type, Callable[..., None]] = {
        bool: writer.add_bool, str: writer.add_string, int: writer.add_int64,
        float: writer.add_float32, list: writer.add_array,
    }  # fmt: skip
    for name, value in fields.items():
        if name != "architecture":
            add[type(value)](name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_config() -> ModelConfig:
    return replace(LLAMA, vocab_size=262, norm_eps=float(np.float32(1e-6)))


def gguf_folder(path: Path) -> None:
    """A folder with a GGUF file."""
    path.mkdir()
    config = gguf_config()
    write_gguf(path / "model.gguf", gguf_fields(config), gguf_tensors(config))


def policy(path: Path) -> None:
    """A policy of ours, with a tokenizer of ours."""
    tokenizer = train_tokenizer([TEXT], 300)
    model_folder.save(ModelFolder(path, random_model(LLAMA), LLAMA, tokenizer))


def rewards(path: Path) -> None:
    """Two reward models of ours."""
    tokenizer = train_tokenizer([TEXT], 300)
    keys = jax.random.split(jax.random.key(0))
    models = [RewardModel(random_model(LLAMA, i), 16, key) for i, key in enumerate(keys)]
    model_folder.save(ModelFolder(path, stack(models), LLAMA, tokenizer))


def adapters(path: Path) -> None:
    """A policy with adapters, beside the model below them."""
    trunk = path.with_name("trunk")
    if not trunk.exists():
        policy(trunk)
    below = load_policy(trunk)
    model = adapted(below.model, AdapterConfig(2), jax.random.key(1))
    model_folder.save(ModelFolder(path, model, LLAMA, below.tokenizer, below))


def corpus(path: Path) -> Corpus:
    """The stage whose folder `stage` makes."""
    return Corpus(out=path, data=path.parent / "rows.jsonl", validation=0.2, test=0.2)


def stage(path: Path) -> None:
    """A complete stage."""
    rows = [{"prompt": f"p {i}", "chosen": f"c {i}", "rejected": "r"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (path.parent / "rows.jsonl").write_text(lines)
    execute(corpus(path))


def begin() -> TrainState:
    """A training state of small integers."""
    model = {"matrix": jnp.arange(64.0).reshape(8, 8), "half": jnp.ones(8, "bfloat16")}
    hyperparameters = Hyperparameters(jnp.float32(1e-3), jnp.zeros(2))
    state = TrainState(model, (model, None), hyperparameters, jnp.int32(0), jnp.int32(STEPS))
    return jax.device_put(state)


@jax.jit
def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    """A step whose result depends on all steps before it."""
    model = jax.tree.map(lambda a: jnp.sin(3 * a + batch), state.model)
    return state._replace(model=model, step=state.step + 1), {"loss": model["matrix"].sum()}


def run(path: Path, steps: int = STEPS) -> Any:
    """A training run in which there is a checkpoint after every second step."""
    record = {"seed": 0}
    return train(step, begin(), float, steps, path, "run", every=2, record=record)


def interrupted(path: Path) -> None:
    """A run that was ended between two checkpoints."""
    run(path, 5)


KINDS: dict[str, Callable[[Path], None]] = {
    "huggingface": partial(huggingface, shards=False),
    "shards": partial(huggingface, shards=True),
    "qwen": partial(huggingface, shards=False, qk_norm=True),
    "gguf": gguf_folder,
    "policy": policy,
    "rewards": rewards,
    "adapters": adapters,
    "stage": stage,
    "run": interrupted,
}
