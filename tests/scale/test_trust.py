"""Files that attack, and the smallest faulty inputs that `benchmarks.fuzz` found.

Each is refused in one line, in little time and memory.
"""

import gzip
import json
import os
import re
import resource
import threading
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from scale import files
from scale.data import chat_template, pieces, token_cache
from scale.data.chat_tokenizer import ChatTokenizer, chat_tokenizer
from scale.data.dataset import Limits, make_dataset
from scale.data.rows import read
from scale.data.tokenizer import train_tokenizer
from scale.errors import LONGEST, InputError, as_input_error, one_line
from scale.files import LARGEST_TEXT, read_json, read_json_object
from scale.io.huggingface import export, open_weights, save_weights, tensor_shapes, weight_files
from scale.io.model_folder import ModelFolder, config_of, load_policy, save, tokenizer_of
from scale.io.weight_table import tensors_of
from scale.memory import bounded
from scale.model.config import ModelConfig, checked
from scale.model.transformer import Transformer
from scale.parallel import workers
from scale.parallel.mesh import Runtime
from scale.stages import judge
from scale.stages.corpus import Corpus
from scale.stages.reward import RewardBatches
from scale.stages.score import finite
from scale.stages.stage import execute
from scale.train.batches import BatchPlan
from scale.train.loop import require_finite as finite_records
from scale.train.metrics import drop_after, logged

TURNS = [{"role": "user", "content": "the cat"}]
SHAPE = ModelConfig(
    vocab_size=300, num_layers=1, d_model=8, num_heads=1, head_dim=8, d_ff=8, block="sequential",
    norm="rms", tie_embeddings=False, scaled_logits=False,
)  # fmt: skip


def refused(call, *named: str) -> str:
    """The message of a refusal: one line that has these words."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) <= LONGEST + 4
    for word in named:
        assert word in text
    return text


def words(template: str) -> ChatTokenizer:
    """A tokenizer of words with this template."""
    tokens = ["<eos>", "<unk>", "the", "cat", "x"]
    model = WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    named = {"eos_token": "<eos>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)
    return chat_tokenizer(theirs, "made")


def model() -> Transformer:
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, SHAPE, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), like)


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A Hugging Face folder."""
    export(tmp_path / "theirs", model(), words("{{ messages[0].content }}"))
    return tmp_path / "theirs"


@pytest.fixture
def ours(tmp_path) -> Path:
    """A policy of ours."""
    tokenizer = train_tokenizer(["the cat"], 300)
    save(ModelFolder(tmp_path / "ours", model(), SHAPE, tokenizer))
    return tmp_path / "ours"


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- messages


def test_an_error_is_one_line_that_controls_no_terminal_and_has_an_end():
    assert str(InputError("a\nb\x1b[31m c\u2028d")) == "a b [31m c d"
    assert one_line("x" * 10**6) == "x" * LONGEST + " ..."


def test_an_error_without_words_has_its_kind():
    def fail():
        with as_input_error(Path("f")):
            raise MemoryError

    refused(fail, "f: cannot be read: MemoryError")


# ---- chat templates

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS, "it takes more than"),
        (DOUBLED, "MemoryError"),
        ("{{ 'x' * 99999999999 }}", "MemoryError"),
        ("{{ 'x' | center(99999999999) }}", "MemoryError"),
        ("{% for i in range(999) %}{{ 'x' * 99 }}{% endfor %}", "it writes more than 5000 char"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ 2 ** (messages | length) }}", "computes a power"),
        ("{{ '}' }", "unexpected '}'"),
    ],
)
def test_a_template_that_takes_too_much_is_refused_soon(monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "MEMORY", 2**28)
    monkeypatch.setattr(chat_template, "LONGEST", 5000)
    begun = time.process_time()
    refused(lambda: words(template).prompt_ids(TURNS), "made: ", reason)
    assert time.process_time() - begun < 20  # forever, without bounds


def test_two_stars_in_a_text_are_no_power():
    text = "**the** {{ '2 ** 3' }} {{ dict(**{'a': 1}) and '' }}{{ dict(a=1, ** {}) and '' }} cat"
    assert words(text).prompt_ids(TURNS)[-1] == 3


def test_what_is_bounded_leaves_the_bounds_as_they_were():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), bounded(1.0, 2**27):
        bytearray(2**28)
    with pytest.raises(TimeoutError), bounded(0.1, 2**27):
        while True:
            pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(2**28)) == 2**28


# ---- names and links


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hosts", "a/b", "..", "", 3, None])
def test_a_shards_name_is_that_of_a_file_beside_its_index(theirs, name):
    (theirs / "model.safetensors").rename(theirs.parent / "other.safetensors")
    index = theirs / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: open_weights(theirs), "index.json: weight_map:", repr(name))
    index.write_text(json.dumps({"weight_map": [name]}))
    refused(lambda: open_weights(theirs), "index.json: weight_map:")


def test_a_shard_is_no_link_out_of_its_folder_except_into_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a/snapshots/main", tmp_path / "models--a/blobs"
    for folder in (snapshot, blobs, tmp_path / "secret"):
        folder.mkdir(parents=True)
    save_weights(snapshot, tensors_of(model()), 2**12)
    names = sorted(path.name for path in snapshot.glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert [file.name for file in weight_files(snapshot)] == names
    (blobs / names[0]).rename(tmp_path / "secret/x")
    (snapshot / names[0]).unlink()
    (snapshot / names[0]).symlink_to(tmp_path / "secret/x")
    refused(lambda: weight_files(snapshot), names[0], "leads out of the folder")
    (snapshot / names[0]).unlink()
    (snapshot / names[0]).symlink_to(names[0])
    refused(lambda: weight_files(snapshot), names[0])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_device_in_place_of_a_file_is_not_read(theirs, name):
    (theirs / name).unlink()
    (theirs / name).symlink_to("/dev/zero")
    refused(lambda: load_policy(theirs), f"{name}: is not a file")
    (theirs / "model.safetensors").unlink()
    (theirs / "model.safetensors").symlink_to("/dev/zero")
    refused(lambda: tensor_shapes(theirs / "model.safetensors"), "model.s")


def test_a_pipe_and_a_link_to_itself_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").symlink_to("b.json")
    for name in ("a.json", "b.json"):
        refused(lambda name=name: read_json_object(tmp_path / name), name)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    refused(lambda: read_json_object(tmp_path / "config.json"), "config.json: has 268435457 bytes")


# ---- sizes in headers


def test_forty_bytes_that_claim_many_numbers(theirs):
    huge = {"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}
    header = json.dumps(huge).encode()
    for size in (len(header), 2**60):
        (theirs / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)
        refused(lambda: open_weights(theirs), "model.safetensors: not a safetensors file")


def test_forty_bytes_of_gguf_that_claim_many_fields(tmp_path):
    gguf = pytest.importorskip("scale.io.gguf")
    for fields, tensors in ((2**60, 0), (0, 2**60)):
        head = b"GGUF" + (3).to_bytes(4, "little")
        counts = tensors.to_bytes(8, "little") + fields.to_bytes(8, "little")
        (tmp_path / "m.gguf").write_bytes(head + counts + bytes(16))
        refused(lambda: gguf.open_gguf(tmp_path / "m.gguf"), "m.gguf: ")


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim"]
)
def test_a_config_of_a_huge_model_takes_neither_time_nor_memory(theirs, name):
    for value in (2**40, 2**70):
        changed(theirs / "config.json", **{name: value})
        refused(lambda: load_policy(theirs), " by its config")


# ---- code and pickles


def test_no_code_of_a_model_folder_runs(theirs):
    evil = f"open({str(theirs / 'ran')!r}, 'w').close()\n"
    for name in ("evil.py", "tokenization_evil.py", "setup.py", "__init__.py"):
        (theirs / name).write_text(evil)
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    for name in ("config.json", "tokenizer_config.json"):
        changed(theirs / name, auto_map=auto_map, trust_remote_code=True)
    changed(theirs / "tokenizer_config.json", tokenizer_class="Evil")
    try:
        tokenizer_of(theirs)
        load_policy(theirs)
    except InputError:
        pass
    assert not (theirs / "ran").exists()


class Pickled:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_no_pickle_of_a_model_folder_is_read(theirs):
    import pickle

    data = pickle.dumps(Pickled(theirs / "ran"))
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors", "tokenizer.pkl"):
        (theirs / name).write_bytes(data)
    refused(lambda: open_weights(theirs), "not a safetensors file")
    (theirs / "model.safetensors").unlink()
    refused(lambda: open_weights(theirs), "never from a pickle")
    assert not (theirs / "ran").exists()


# ---- archives


@pytest.fixture
def small(monkeypatch):
    """The bounds of archives, thousands of times smaller."""
    monkeypatch.setattr(pieces, "LONGEST", 10**5)
    monkeypatch.setattr(pieces, "LEAST", 10**6)


def test_a_line_without_an_end(tmp_path, small):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "' + b"x" * 10**7))
    refused(lambda: read(tmp_path / "a.jsonl.gz"), "a.jsonl.gz:1: the line has more than 100000")


def test_blank_lines_without_an_end(tmp_path, small):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**7))
    refused(lambda: read(tmp_path / "a.jsonl.gz"), "a.jsonl.gz: expands to more than 200 times")


def test_rows_that_repeat_themselves(tmp_path, small):
    row = {"prompt": "x" * 900, "chosen": "a", "rejected": "b"}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n") * 1)
    assert len(read(tmp_path / "a.jsonl.gz")) == 1
    lines = (json.dumps(row).encode() + b"\n") * 5000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    refused(lambda: read(tmp_path / "a.jsonl.gz"), "a.jsonl.gz: expands to more than 200 times")
    pq.write_table(pa.Table.from_pylist([row] * 10_000), tmp_path / "a.parquet")
    refused(lambda: read(tmp_path / "a.parquet"), "a.parquet: expands to more than 200 times")


# ---- the smallest inputs that `benchmarks.fuzz` found


def test_blank_lines_among_rows_are_told_by_their_lines(tmp_path):
    row = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    (tmp_path / "a.jsonl").write_text(f"{row}\n\n \n{row}\n\n")
    refused_rows: list[str] = []
    assert len(read(tmp_path / "a.jsonl", refused=refused_rows)) == 2
    assert [line.split(" ")[0][-2:] for line in refused_rows] == ["2:", "3:"]


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-6", -1, 0, True, [1], 1e309])
def test_a_number_of_a_config_is_one(theirs, name, value):
    if (name, value) != ("rope_theta", 0):  # as if it were missing
        changed(theirs / "config.json", **{name: value})
        refused(lambda: open_weights(theirs), f"config.json: {name} must be a positive number")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": []},
        {"tie_word_embeddings": "no"},
        {"rope_scaling": "llama3"},
        {"sliding_window": {}},
        {"rope_scaling": {"rope_type": "llama3", "factor": {}, "low_freq_factor": 1,
                          "high_freq_factor": 4, "original_max_position_embeddings": 8}},
    ],
)  # fmt: skip
def test_a_config_of_other_types(theirs, values):
    changed(theirs / "config.json", **values)
    refused(lambda: open_weights(theirs), "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_model", 0), ("d_model", "8"), ("num_layers", 2**60), ("d_ff", True), ("norm_eps", "x"),
        ("norm_eps", float("nan")), ("rope_scaling", "abcd"), ("rope_scaling", [1]),
        ("block", "both"), ("norm", None), ("tie_embeddings", 1), ("unknown", 1),
    ],
)  # fmt: skip
def test_a_shape_of_ours_that_is_none(ours, name, value):
    record = json.loads((ours / "config.json").read_text())
    record["model"][name] = value
    (ours / "config.json").write_text(json.dumps(record))
    for call in (lambda: load_policy(ours), lambda: config_of(ours)):
        refused(call, "ours", name)


def test_every_shape_that_is_one_is_accepted():
    scaled = replace(SHAPE, rope_scaling=(8.0, 1.0, 4.0, 16), norm_eps=1e-5, qk_norm=True)
    for shape in (ModelConfig(), SHAPE, scaled):
        assert asdict(checked(shape)) == asdict(shape)


def test_a_length_of_a_tokenizer_that_is_none(theirs):
    changed(theirs / "tokenizer_config.json", model_max_length="many")
    refused(lambda: tokenizer_of(theirs), "theirs", "model_max_length must be a number")


def test_a_token_whose_number_would_take_gigabytes(theirs):
    path = theirs / "tokenizer.json"
    record = json.loads(path.read_text())
    [*_, last] = record["model"]["vocab"]
    record["model"]["vocab"][last] = 2**31
    path.write_text(json.dumps(record))
    refused(lambda: tokenizer_of(theirs), "tokenizer.json: not a tokenizer: it has a token 214748")


@pytest.mark.parametrize("line", ["", "x", "[]", '{"step": "1"}', '{"loss": 1}', '{"step": {}}'])
def test_a_damaged_log_is_refused_by_name(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    refused(lambda: drop_after(path, 1), "metrics.jsonl: cannot be read")
    assert path.read_text() == f'{{"step": 1}}\n{line}\n'
    if line in ("", "x"):
        refused(lambda: logged(path), "metrics.jsonl: cannot be read")


def write_rows(path: Path, n: int) -> Path:
    rows = ({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(folder: Path) -> Corpus:
    """A stage that takes no time."""
    data = write_rows(folder / "rows.jsonl", 30)
    return Corpus(out=folder / "o", data=data, validation=0.2, test=0.2)


@pytest.mark.parametrize(
    ("name", "value"), [("inputs", None), ("options", []), ("stage", 1), ("findings", "done")]
)
def test_a_record_of_a_stage_that_is_none(tmp_path, name, value):
    stage = split(tmp_path)
    findings = execute(stage)
    assert execute(stage) == findings
    changed(tmp_path / "o/stage.json", **{name: value})
    refused(lambda: execute(stage), f"stage.json: {name!r} is not what a stage records")
    (tmp_path / "o/stage.json").write_text("[]")
    refused(lambda: execute(stage), "stage.json: not a JSON object")


def test_tensors_of_another_dtype_are_refused(theirs):
    save_file({"x": np.arange(3)}, theirs / "model.safetensors")
    refused(lambda: open_weights(theirs), "model.safetensors: tensor x is I64")


# ---- runs that are disturbed; `benchmarks.chaos` kills them


def test_a_stage_whose_rows_change_while_it_runs_is_refused(tmp_path, monkeypatch):
    stage, run = split(tmp_path), Corpus.run

    def changing(self):
        findings = run(self)
        write_rows(self.data, 31)
        return findings

    monkeypatch.setattr(Corpus, "run", changing)
    refused(lambda: execute(stage), "--data: has changed while", "was made of it")
    assert "findings" not in read_json(stage.out / "stage.json")
    refused(lambda: execute(stage), "contents of the inputs")


def test_a_stage_whose_rows_are_only_written_again_is_complete(tmp_path, monkeypatch):
    stage, run = split(tmp_path), Corpus.run

    def touching(self):
        os.utime(self.data, (1, 1))
        return run(self)

    monkeypatch.setattr(Corpus, "run", touching)
    execute(stage)
    assert "findings" in read_json(stage.out / "stage.json")


def test_what_a_killed_command_left_is_removed_and_nothing_else(tmp_path):
    stage = split(tmp_path)
    left = [f".{uuid.uuid4().hex}-train.parquet", f".{uuid.uuid4().hex}-x"]
    (stage.out / left[1]).mkdir(parents=True)
    (stage.out / left[1] / "config.json").write_text("{}")
    (stage.out / left[0]).write_text("half")
    (stage.out / ".mine").write_text("x")
    execute(stage)
    parts = {f"{name}.parquet" for name in ("train", "validation", "test")}
    assert {path.name for path in stage.out.iterdir()} == {".mine", "stage.json", *parts}


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path):
    left = tmp_path / f".{uuid.uuid4().hex}-hf"
    other = tmp_path / f".{uuid.uuid4().hex}-other"
    for folder in (left, other):
        folder.mkdir()
    export(tmp_path / "hf", model(), train_tokenizer(["the cat"], 300))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", other.name}


def test_a_clock_that_jumps_removes_nothing_that_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    for _ in range(2):
        folder, value = token_cache.entry(["x"], lambda path: made.append(path) or 7)
        assert folder.exists() and value == 7
        now = time.time()
        monkeypatch.setattr(files.time, "time", lambda now=now: now + 3e9)
    assert len(made) == 1


# ---- numbers


def test_a_column_that_is_not_finite_names_its_row(tmp_path):
    rows = [{"score_chosen": [0.0, 1.0], "score_rejected": [0.0, 1.0]} for _ in range(3)]
    assert list(finite(tmp_path, rows)) == rows
    rows[1]["score_rejected"] = [0.0, float("nan")]
    with pytest.raises(FloatingPointError, match="score_rejected of row 2 is not finite"):
        list(finite(tmp_path, rows))
    with pytest.raises(FloatingPointError, match="ref_chosen_logps of row 1 is not finite"):
        list(finite(tmp_path, [{"ref_chosen_logps": float("-inf")}]))


def test_the_rows_of_a_batch_are_those_of_the_file(tmp_path):
    """The second row has no tokens within the limits, so the third is the dataset's second."""
    rows = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in (1, 90, 2, 3)]
    tokenizer = train_tokenizer(["abc"], 300)
    dataset = make_dataset(tokenizer, rows, ("chosen", "rejected"), Limits(8, 8), "f", False)
    plan = BatchPlan(dataset, np.array([[2, 0], [1, 2]]), [], Runtime())
    assert [plan.names(step) for step in (0, 1)] == [[1, 4], [3, 4]]
    orders = [plan.rows, plan.rows[::-1]]
    both = RewardBatches(dataset, orders, dataset.shape(2), Runtime(), 1)
    assert both.names([0, 1], 0) == [1, 3, 4]


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": np.array([1.0, np.nan])}]
    with pytest.raises(FloatingPointError, match="at step 2, of rows 3, 14; lower the"):
        finite_records(records, {}, tmp_path, {1: [3, 14]}.__getitem__)


def test_a_reward_that_is_not_finite_names_its_row_and_models():
    values = np.zeros((3, 2, 1))
    judge.require_finite(values, Path("lm/judge"), "a.jsonl")
    values[1, 1, 0] = np.inf
    said = re.escape("a.jsonl: row 2 of those that are kept: a reward of lm/judge is not finite")
    with pytest.raises(FloatingPointError, match=said):
        judge.require_finite(values, Path("lm/judge"), "a.jsonl")


# ---- workers


def test_a_signal_interrupts_the_chain_that_runs_and_no_idle_worker(monkeypatch):
    monkeypatch.setattr(workers, "interrupted", threading.Event())
    monkeypatch.setattr(workers, "working", threading.Event())

    def during_it(stage):
        workers.interrupt(2, None)

    with pytest.raises(KeyboardInterrupt):
        workers.run_in_worker(during_it, ["stage"])
    assert not workers.working.is_set()
    workers.interrupted.clear()
    workers.interrupt(2, None)
    with pytest.raises(KeyboardInterrupt):
        workers.run_in_worker(print, ["another stage"])
