import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minipref.batch import attention_mask
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.io.hf_config import config_from, settings_for
from scale.io.huggingface import INDEX, SINGLE, export, open_weights, save_weights
from scale.io.model_folder import identity
from scale.io.pretrained import pretrained
from scale.io.weight_table import tensors_of
from scale.model.attention import masked
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime

HERE = Runtime()
OURS = train_tokenizer(["the cat sat on the mat"], 300)
LLAMA = ModelConfig(
    vocab_size=300,
    num_layers=3,
    d_model=32,
    num_heads=4,
    head_dim=8,
    d_ff=48,
    num_kv_heads=2,
    block="sequential",
    norm="rms",
    norm_eps=1e-5,
    tie_embeddings=False,
    scaled_logits=False,
)
SCALING = (8.0, 1.0, 4.0, 16)
CONFIGS = {
    "llama": LLAMA,
    "llama tied, one key/value head": replace(LLAMA, tie_embeddings=True, num_kv_heads=1),
    "llama 3.1": replace(LLAMA, rope_base=500.0, rope_scaling=SCALING),
    "wide heads": replace(LLAMA, head_dim=24),
    "mistral": replace(LLAMA, num_heads=6, head_dim=4),
    "qwen2": replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=16),
}


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter random: norms and biases too, of which a fresh model has ones and zeros."""
    rng = np.random.default_rng(seed)
    like = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)


def logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = masked(attention_mask(jnp.zeros(tokens.shape, jnp.int32)))
    return np.asarray(model.hidden(jnp.asarray(tokens), positions, attend)[0] @ model.unembedding.T)


def assert_same(a: Transformer, b: Transformer) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_model_comes_back_bit_for_bit(tmp_path, name):
    model = random_model(replace(CONFIGS[name], max_seq_len=64))
    export(tmp_path / "out", model, OURS)
    weights, tokenizer = pretrained(tmp_path / "out")
    assert weights.config == replace(CONFIGS[name], max_seq_len=64)
    assert_same(weights.load(HERE), model)
    assert tokenizer.prompt_ids("the cat") == OURS.prompt_ids("the cat")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_files_hold_what_one_does(tmp_path):
    model = random_model(LLAMA)
    export(tmp_path / "one", model, OURS)
    export(tmp_path / "many", model, OURS)
    (tmp_path / "many" / "model.safetensors").unlink()
    limit = 4 * 300 * 32  # one embedding
    save_weights(tmp_path / "many", tensors_of(model), limit)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    parts = [load_file(file) for file in files]
    assert all(sum(array.nbytes for array in part.values()) <= limit for part in parts)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    of_files = zip(files, parts, strict=True)
    assert index["weight_map"] == {name: file.name for file, part in of_files for name in part}
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(model))
    assert_same(open_weights(tmp_path / "many").load(HERE), model)


def test_a_model_beside_the_shards_of_another(tmp_path):
    """`transformers` reads model.safetensors; an index whose shards are gone is not looked at."""
    new, old = (random_model(LLAMA, seed) for seed in (0, 1))
    export(tmp_path / "a", new, OURS)
    index, single = (tmp_path / "a" / name for name in (INDEX, SINGLE))
    whole = single.read_bytes()
    single.unlink()
    save_weights(tmp_path / "a", tensors_of(old), 4 * 300 * 32)
    assert_same(open_weights(tmp_path / "a").load(HERE), old)
    single.write_bytes(whole)
    with pytest.raises(InputError, match=r"model\.safetensors: and model\.safetensors\.ind"):
        open_weights(tmp_path / "a")
    next((tmp_path / "a").glob("model-00002-*")).unlink()
    assert index.exists()
    assert_same(open_weights(tmp_path / "a").load(HERE), new)


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path):
    model = random_model(LLAMA)
    broken = eqx.tree_at(lambda m: m.norm, model, model.norm.at[3].set(jnp.nan))
    export(tmp_path / "a", broken, OURS)
    with pytest.raises(InputError, match=r"a: a weight of model\.norm\.weight is not finite"):
        open_weights(tmp_path / "a").load(HERE)


def test_files_that_are_not_the_models_do_not_count(tmp_path):
    export(tmp_path / "a", random_model(LLAMA), OURS)
    before = identity(tmp_path / "a")
    for name in (".DS_Store", "README.md", "original.pth"):
        (tmp_path / "a" / name).write_bytes(b"\0")
        assert identity(tmp_path / "a") == before
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "a" / name
        file.write_text(file.read_text().replace("}", " }", 1))
        assert identity(tmp_path / "a") != before


def test_layouts_by_hand(tmp_path):
    """Each linear map of the file, a matrix [out, in], against the einsum of our parameter."""
    model = random_model(CONFIGS["qwen2"])
    export(tmp_path / "out", model, OURS)
    file = load_file(tmp_path / "out" / "model.safetensors")
    layer, x = "model.layers.1.", np.random.default_rng(0).normal(size=32).astype(np.float32)
    block = jax.tree.map(lambda a: np.asarray(a[1]), model.blocks)
    heads = {
        "q_proj": np.einsum("d,dhk->hk", x, block.query) + block.query_bias,
        "k_proj": np.einsum("d,dgk->gk", x, block.key_value[:, 0]) + block.key_value_bias[0],
        "v_proj": np.einsum("d,dgk->gk", x, block.key_value[:, 1]) + block.key_value_bias[1],
    }
    for name, ours in heads.items():
        theirs = file[f"{layer}self_attn.{name}.weight"] @ x + file[f"{layer}self_attn.{name}.bias"]
        np.testing.assert_allclose(theirs, ours.ravel(), rtol=1e-4, atol=1e-5)
    out = np.einsum("hk,hkd->d", x.reshape(4, 8), block.attention_out)
    theirs = file[f"{layer}self_attn.o_proj.weight"] @ x
    np.testing.assert_allclose(theirs, out, rtol=1e-4, atol=1e-5)
    for part, name in enumerate(("gate_proj", "up_proj")):
        np.testing.assert_array_equal(file[f"{layer}mlp.{name}.weight"], block.gate_up[:, part].T)
    np.testing.assert_array_equal(file[f"{layer}mlp.down_proj.weight"], block.mlp_out.T)
    norm = file[f"{layer}post_attention_layernorm.weight"]
    np.testing.assert_array_equal(norm, block.mlp_norm)
    np.testing.assert_array_equal(file["model.embed_tokens.weight"], model.embedding)
    assert "lm_head.weight" not in file


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_files_give_the_float32_that_they_stand_for(tmp_path, dtype):
    model = random_model(LLAMA)
    export(tmp_path / "out", model, OURS)
    file = tmp_path / "out" / "model.safetensors"
    save_file({name: array.astype(dtype) for name, array in load_file(file).items()}, file)
    loaded = open_weights(tmp_path / "out").load(HERE)
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(dtype).astype(np.float32), model)
    assert_same(loaded, rounded)


def test_what_transformers_ignores_is_ignored(tmp_path):
    model = random_model(CONFIGS["qwen2"])
    export(tmp_path / "out", model, OURS)
    file = tmp_path / "out" / "model.safetensors"
    more = {
        "lm_head.weight": np.zeros((300, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    save_file({**load_file(file), **more}, file)
    assert_same(open_weights(tmp_path / "out").load(HERE), model)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_zeros(name, *shape, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


FAULTS = {
    "missing": (
        without("model.layers.2.mlp.up_proj.weight"),
        r"out: tensor model\.layers\.2\.mlp\.up_proj\.weight is missing",
    ),
    "no head": (without("lm_head.weight"), r"tensor lm_head\.weight is missing"),
    "more layers": (
        with_zeros("model.layers.3.input_layernorm.weight", 32),
        r"tensor model\.layers\.3\.input_layernorm\.weight is unexpected",
    ),
    "a bias": (
        with_zeros("model.layers.0.self_attn.o_proj.bias", 32),
        r"tensor model\.layers\.0\.self_attn\.o_proj\.bias is unexpected",
    ),
    "transposed": (
        with_zeros("model.layers.1.mlp.down_proj.weight", 48, 32),
        r"model\.layers\.1\.mlp\.down_proj\.weight is \[48, 32\] in the file, \[32, 48\] by its",
    ),
    "integers": (
        with_zeros("model.norm.weight", 32, dtype=np.int8),
        r"model\.safetensors: tensor model\.norm\.weight is I8; supported are F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, name):
    change, message = FAULTS[name]
    export(tmp_path / "out", random_model(LLAMA), OURS)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / "out").load(HERE)


def test_files_that_are_missing_or_damaged_are_refused_by_name(tmp_path):
    export(tmp_path / "out", random_model(LLAMA), OURS)
    folder = tmp_path / "out"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file"):
        open_weights(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"model\.safetensors: no such file; .* never from a pickle"
    ):
        open_weights(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: not a JSON object"):
        open_weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        open_weights(folder)
    with pytest.raises(InputError, match="nowhere: no such model; 'smollm2'"):
        pretrained(Path("nowhere"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    size = OURS.vocab_size
    export(tmp_path / "out", random_model(replace(LLAMA, vocab_size=size - 1)), OURS)
    message = f"the tokenizer has {size} tokens, the model {size - 1}"
    with pytest.raises(InputError, match=message):
        pretrained(tmp_path / "out")


PALM = {"block": "parallel", "norm": "layer", "scaled_logits": True}


@pytest.mark.parametrize("name", PALM)
def test_a_palm_shaped_model_cannot_be_exported(tmp_path, name):
    model = random_model(replace(LLAMA, **{name: PALM[name]}))
    with pytest.raises(InputError, match=f"{name} = {PALM[name]!r} .PaLM. cannot be exported"):
        export(tmp_path / "out", model, OURS)
    assert not list(tmp_path.iterdir())


def test_the_current_folder_cannot_be_replaced_by_an_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the current folder; name a new one"):
        export(Path(), random_model(LLAMA), OURS)


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="out: exists and is not an empty folder"):
        export(tmp_path / "out", random_model(LLAMA), OURS)
    monkeypatch.setattr("scale.io.huggingface.save_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path / "new", random_model(LLAMA), OURS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


HUB = Path("config.json")
# The fields of the config.json of HuggingFaceTB/SmolLM2-135M that say something about the shape.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def test_a_config_from_the_hub():
    assert config_from(SMOLLM2, HUB) == ModelConfig(
        vocab_size=49152,
        num_layers=30,
        d_model=576,
        num_heads=9,
        head_dim=64,
        d_ff=1536,
        rope_base=100_000.0,
        num_kv_heads=3,
        block="sequential",
        norm="rms",
        norm_eps=1e-5,
        tie_embeddings=True,
        scaled_logits=False,
        max_seq_len=8192,
    )


def test_both_spellings_of_rope():
    old = {**SMOLLM2, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}
    older = {**old, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    parameters = {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}
    new = {**SMOLLM2, "rope_parameters": parameters}
    del new["rope_theta"], new["rope_scaling"]
    config = config_from(old, HUB)
    assert (config.rope_base, config.rope_scaling) == (500000.0, (32.0, 1.0, 4.0, 8192))
    assert config_from(new, HUB) == config_from(older, HUB) == config
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    assert config_from(plain, HUB) == config_from(SMOLLM2, HUB)


def test_what_an_old_config_leaves_out():
    left_out = "num_key_value_heads", "rope_theta", "tie_word_embeddings", "rms_norm_eps"
    config = config_from({k: v for k, v in SMOLLM2.items() if k not in left_out}, HUB)
    assert (config.num_kv_heads, config.rope_base) == (9, 10_000.0)
    assert (config.tie_embeddings, config.norm_eps) == (False, 1e-6)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
QWEN_WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 99}
QWEN_LAYERS = {
    "model_type": "qwen3",
    "head_dim": 64,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}
REFUSED = {
    "gpt2": (
        {"model_type": "gpt2"},
        "model_type 'gpt2' is not supported; those are llama, mistral, qwen2, qwen3",
    ),
    "nothing": ({"model_type": None}, "model_type None"),
    "activation": (
        {"hidden_act": "gelu"},
        "hidden_act = 'gelu' is not supported, only 'silu'",
    ),
    "o_proj bias": ({"attention_bias": True}, "attention_bias = True is not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "quantised": (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config = .*awq.* is not supported",
    ),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "RoPE .*yarn.* is not supported",
    ),
    "linear": ({"rope_parameters": LINEAR}, "RoPE .*linear"),
    "scaling beside plain parameters": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
        "RoPE .*linear",
    ),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "RoPE .*full_attention",
    ),
    "llama3 without": (
        {"rope_scaling": {"type": "llama3", "factor": 4.0}},
        "RoPE 'llama3' without low_freq_factor, high_freq_factor",
    ),
    "no width": ({"hidden_size": None}, "hidden_size must be a positive number, not None"),
    "text": (
        {"num_hidden_layers": "30"},
        "num_hidden_layers must be a positive number, not '30'",
    ),
    "window": (
        {"model_type": "mistral", "sliding_window": 4096},
        "sliding_window = 4096 is not supported",
    ),
    "mistral's default": ({"model_type": "mistral"}, "sliding_window = 4096"),
    "qwen window": (QWEN_WINDOW, "sliding_window = 99"),
    "qwen layers": (QWEN_LAYERS, "sliding_window = 8"),
    "qwen3 head": ({"model_type": "qwen3"}, "head_dim must be a positive number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_our_model_cannot_do_is_refused(tmp_path, name):
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        config_from({**SMOLLM2, **change}, tmp_path / "config.json")


def test_windows_that_are_not_in_use_are_accepted():
    config_from({**SMOLLM2, "model_type": "mistral", "sliding_window": None}, HUB)
    config_from({**SMOLLM2, "model_type": "mistral", "sliding_window": 8192}, HUB)
    config_from({**SMOLLM2, **QWEN_WINDOW, "use_sliding_window": False}, HUB)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_its_settings(name):
    config = replace(CONFIGS[name], max_seq_len=64)
    assert config_from(settings_for(config, OURS), HUB) == config


def test_biases_and_head_norms_together_are_no_ones_architecture(tmp_path):
    with pytest.raises(InputError, match="qkv_bias and qk_norm cannot be exported"):
        both = replace(LLAMA, qkv_bias=True, qk_norm=True)
        export(tmp_path / "out", random_model(both), OURS)


def start(script: str, *args: str, devices: int = 1) -> subprocess.Popen[str]:
    """A script in a process of its own with simulated devices. Its allocator gives freed memory
    back."""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **variables}, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        out, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return out


def run(script: str, *args: str, devices: int = 1) -> str:
    return finish(start(script, *args, devices=devices))


SHARDED = """
    import sys
    from pathlib import Path
    import jax
    import numpy as np
    from scale.io import huggingface
    from scale.parallel.mesh import Runtime, make_mesh
    from scale.parallel.sharding import shardings

    sizes, read = [], huggingface.read_box
    def counted(file, name, window):
        sizes.append((name, read(file, name, window).size))
        return read(file, name, window)
    huggingface.read_box = counted
    whole = huggingface.open_weights(Path(sys.argv[1])).load(Runtime())
    sizes.clear()
    mesh = make_mesh((2, 2, 2), jax.devices())
    split = huggingface.open_weights(Path(sys.argv[1])).load(Runtime(mesh))
    for a, b in zip(jax.tree.leaves(whole.blocks), jax.tree.leaves(split.blocks), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(np.asarray(whole.embedding), np.asarray(split.embedding))
    jax.tree.map(lambda a, s: None if a.sharding == s else 1 / 0, split, shardings(split, mesh))
    shards = split.blocks.query.addressable_shards
    assert {shard.data.shape for shard in shards} == {(3, 16, 2, 8)}
    for part in ("self_attn.q_proj", "input_layernorm"):
        print([size for name, size in sizes if name == f"model.layers.1.{part}.weight"])
"""


def test_each_device_gets_its_share_and_no_part_is_read_twice(tmp_path):
    export(tmp_path / "out", random_model(CONFIGS["qwen2"]), OURS)
    quarter = 32 * 32 // 4  # of a 32 x 32 matrix over fsdp 2 x tensor 2; data 2 holds copies
    printed = run(SHARDED, str(tmp_path / "out"), devices=8)
    assert printed.splitlines() == [str([quarter] * 4), str([16, 16])]


SHARED = """
    import sys
    from pathlib import Path
    import jax

    folder, out, port, process = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    from scale.io.huggingface import export
    from scale.io.pretrained import pretrained
    from scale.parallel.mesh import Runtime, make_mesh

    weights, tokenizer = pretrained(Path(folder))
    model = weights.load(Runtime(make_mesh((1, 2, 2), jax.devices())))
    assert not model.blocks.query.is_fully_addressable
    export(Path(out), model, tokenizer)
    assert (Path(out) / "config.json").exists()
"""


@pytest.mark.slow
def test_two_processes_load_and_export_one_model(tmp_path):
    export(tmp_path / "in", random_model(CONFIGS["qwen2"]), OURS)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    folders = (str(tmp_path / "in"), str(tmp_path / "out"))
    for process in [start(SHARED, *folders, port, str(i), devices=2) for i in range(2)]:
        finish(process)
    for file in (tmp_path / "in").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


PEAK = """
    import sys
    from pathlib import Path
    import jax
    from scale.io.huggingface import open_weights
    from scale.parallel.mesh import Runtime, make_mesh

    def status(name):
        line = next(line for line in open("/proc/self/status") if line.startswith(name))
        return int(line.split()[1]) * 1024

    devices = jax.devices()
    runtime = Runtime() if len(devices) == 1 else Runtime(make_mesh((1, 4, 2), devices))
    open_weights(Path(sys.argv[1])).load(runtime)
    weights = open_weights(Path(sys.argv[2]))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = weights.load(runtime)
    print(status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_holds_a_few_tensors_beside_the_model_whatever_its_size(tmp_path, devices):
    """On a CPU the devices' memory is the host's, so the model's own size is subtracted."""
    wide = replace(
        LLAMA,
        vocab_size=8000,
        num_layers=24,
        d_model=512,
        num_heads=8,
        head_dim=64,
        d_ff=1408,
    )
    models = {"small": LLAMA, "large": wide}
    for name, config in models.items():
        like = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
        export(tmp_path / name, jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), like), OURS)
    paths = [str(tmp_path / name) for name in models]
    peak, size = map(int, run(PEAK, *paths, devices=devices).split())
    largest = 4 * 8000 * 512
    assert size > 250e6
    assert peak - size < 3 * largest + 48e6


# ---- against transformers


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("torch", reason="extra 'peers' is not installed")
    return pytest.importorskip("transformers", reason="extra 'peers' is not installed")


def their_logits(peer, model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()


def random_peer(peer, name: str, **settings):
    """One of their models, with every parameter random, norms and biases too."""
    import torch

    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    config = getattr(peer, f"{name}Config")(**{**shape, **settings})
    model = getattr(peer, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 40))
THEIRS = {
    "Llama": {},
    "Llama, tied, one key/value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "Llama, wide heads": {"head_dim": 24, "num_key_value_heads": 4},
    "Llama 3.1": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "Mistral": {"sliding_window": None, "head_dim": 12},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_have_our_logits(peer, tmp_path, name):
    model = random_peer(peer, name.split(",")[0].split()[0], **THEIRS[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = logits(open_weights(tmp_path).load(HERE), TOKENS)
    np.testing.assert_allclose(ours, their_logits(peer, model, TOKENS), atol=1e-4)
    assert ours.std() > 0.3


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_has_the_logits_of_what_we_export(peer, tmp_path, name):
    model = random_model(replace(CONFIGS[name], max_seq_len=64))
    export(tmp_path / "out", model, OURS)
    theirs, report = peer.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype.itemsize == 4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, OURS.eos)
    np.testing.assert_allclose(
        their_logits(peer, theirs, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4
    )
