"""What each kind of folder must read as: by `transformers`, `safetensors`, `gguf`, or as before."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fuzz import bases
from minipref.batch import attention_mask
from scale.io.arrays import named
from scale.io.model_folder import ModelFolder, load_policy, load_rewards
from scale.io.weight_table import tensors_of
from scale.model.attention import masked
from scale.model.transformer import Transformer
from scale.stages.stage import execute

TURNS = [{"role": "user", "content": "the cat, é"}]
TEXT = "the bat <|im_end|>"
IDS = np.array([[5, 70, 90, 200, 17, 3]])
TOLERANCE = 2e-4  # of logits of size one
Whole = Any  # what the whole folder read as, where the reader is the run before


@dataclass(frozen=True)
class Check:
    """A kind of folder."""

    read: Callable[[Path, Whole], str]
    """Reads it here and elsewhere; the outcome is `accepted` or `wrong: ...`."""
    whole: Callable[[Path], Whole] = lambda path: None
    """What to compare with, of the folder without a fault."""


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """`accepted`, or the first name under which two readers have different values."""
    for name in ours.keys() | theirs.keys():
        if not same(ours.get(name), theirs.get(name)):
            return f"wrong: {name}: {ours.get(name)!r:.200} for {theirs.get(name)!r:.200}"
    return "accepted"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = masked(attention_mask(jnp.zeros(tokens.shape, jnp.int32)))
    return np.asarray(model.hidden(jnp.asarray(tokens), positions, attend)[0] @ model.unembedding.T)


def weights_of(model: Transformer) -> dict[str, np.ndarray]:
    return {name: tensor.array() for name, tensor in tensors_of(model).items()}


def huggingface(path: Path, _: Whole) -> str:
    """Weights as `safetensors`, logits and tokens as `transformers` read them."""
    folder = load_policy(path)
    ids = folder.tokenizer.prompt_ids(TURNS)
    response = folder.tokenizer.response_ids(TEXT)
    ours = logits(folder.model, IDS)
    try:
        their_ids = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        encoded, without = (
            their_ids.apply_chat_template(TURNS, add_generation_prompt=asks, return_dict=False)
            for asks in (True, False)
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        theirs = model(torch.tensor(IDS)).logits[0].detach().numpy()
    except Exception as error:
        return f"wrong: read, but transformers says {error!r:.300}"
    if ids != encoded and (without != encoded or ids[: len(encoded)] != encoded):
        # where a template writes no generation prompt, what opens its replies belongs to the prompt
        return f"wrong: tokens {ids} for {encoded}"
    if not response or folder.tokenizer.vocab_size > folder.config.vocab_size:
        return f"wrong: response {response}"
    distance = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    if np.isfinite(theirs).all() and not distance < TOLERANCE:
        return f"wrong: logits differ by {distance:.2g}"
    return first_difference(weights_of(folder.model), their_weights(path, folder.model))


def their_weights(path: Path, model: Transformer) -> dict[str, np.ndarray]:
    """The tensors of the files that count, as float32, without those that no model has."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files = [single]
    if not single.exists():
        files = [path / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        arrays |= load_file(file)
    return {name: arrays[name].astype(np.float32) for name in tensors_of(model)}


def gguf(path: Path, _: Whole) -> str:
    """Weights and the shape as the `gguf` library reads them."""
    folder = load_policy(path / "model.gguf")
    folder.tokenizer.prompt_ids(TURNS)
    logits(folder.model, IDS)
    reader = GGUFReader(path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = folder.config
    named_fields = {
        "llama.block_count": config.num_layers,
        "llama.embedding_length": config.d_model,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.num_heads,
        "llama.context_length": config.max_seq_len,
    }
    outcome = first_difference(named_fields, {name: fields[name] for name in named_fields})
    if outcome != "accepted":
        return outcome
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    query = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    ours = weights_of(folder.model)
    pattern = "(heads pairs two) d -> (heads two pairs) d"
    theirs = {
        "model.embed_tokens.weight": dequantize(embedding.data, embedding.tensor_type),
        "model.layers.0.self_attn.q_proj.weight": einops.rearrange(
            dequantize(query.data, query.tensor_type), pattern, two=2, heads=config.num_heads
        ),
    }
    return first_difference({name: ours[name] for name in theirs}, theirs)


def ours(load: Callable[[Path], ModelFolder], path: Path) -> str:
    """Weights as `safetensors` reads them, the shape as `json`, tokens as `tokenizers`."""
    folder = load(path)
    record = json.loads((path / "config.json").read_text())["model"]
    config = {name: value for name, value in asdict(folder.config).items() if name in record}
    outcome = first_difference(config, record)
    tokens = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokens.encode_special_tokens = True
    if folder.tokenizer.text_ids(TEXT) != tokens.encode(TEXT, add_special_tokens=False).ids:
        return "wrong: tokens"
    if folder.config.rope_scaling is None and folder.trunk is None:
        arrays = {name: np.asarray(leaf) for name, leaf in named(folder.model).items()}
        outcome = max(outcome, first_difference(arrays, load_file(path / "weights.safetensors")))
    if load is load_policy:
        logits(folder.model, IDS)
    return outcome


def files_of(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in names}


PARTS = tuple(f"{name}.parquet" for name in ("train", "validation", "test"))


def stage(path: Path, whole: Whole) -> str:
    """A stage that is skipped, or made again: its record is the one of its options."""
    execute(bases.corpus(path))
    record = stage_record(path)
    record["options"] = {name: record["options"].get(name) for name in whole["options"]}
    names = ("stage", "options", "inputs")
    return first_difference(*({name: r[name] for name in names} for r in (record, whole)))


def stage_record(path: Path) -> Whole:
    return json.loads((path / "stage.json").read_text())


def run(path: Path, whole: Whole) -> str:
    """A run that goes on to the bit where the undisturbed one ends."""
    model = {name: np.asarray(leaf, np.float32) for name, leaf in bases.run(path).items()}
    return first_difference(model, whole)


def whole_run(path: Path) -> Whole:
    beside = path.with_name("whole")
    return {name: np.asarray(leaf, np.float32) for name, leaf in bases.run(beside).items()}


CHECKS = {
    "huggingface": Check(huggingface, lambda path: huggingface(path, None)),
    "shards": Check(huggingface),
    "qwen": Check(huggingface),
    "gguf": Check(gguf),
    "policy": Check(lambda path, _: ours(load_policy, path)),
    "rewards": Check(lambda path, _: ours(load_rewards, path)),
    "adapters": Check(lambda path, _: ours(load_policy, path)),
    "stage": Check(stage, stage_record),
    "run": Check(run, whole_run),
}
assert CHECKS.keys() == bases.KINDS.keys()
jax.config.update("jax_enable_compilation_cache", False)
