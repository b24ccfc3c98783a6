"""Folders with a fault: models of three programs, stages, training runs."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.fuzz import bases
from benchmarks.fuzz.mutations import as_text, damaged, mutated
from benchmarks.fuzz.readers import CHECKS, Whole
from benchmarks.fuzz.rows import fault_of
from benchmarks.fuzz.workers import Case
from scale.console import console
from scale.errors import InputError

NAMES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rope_scaling", "rope_theta",
    "rope_parameters", "sliding_window", "model_type", "tie_word_embeddings", "auto_map", "dtype",
    "shape", "data_offsets", "__metadata__", "added_tokens", "chat_template", "eos_token", "model",
    "weight_map", "stage", "options", "inputs", "findings", "trunk", "num_reward_models", "adapter",
    "normalizer", "pre_tokenizer", "post_processor", "quantization_config", "tokenizer_class",
)  # fmt: skip
TEMPLATE_PARTS = (
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}", "{{ 'x'.__class__.__mro__ }}", "{{ ''|center(99999999999) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% include 'x' %}", "{{ 'y' }}",
    "{{ messages[9] }}", "{{ '%*d' % (999999999, 1) }}", "{{ m.content.nothing.x }}", "{%",
    "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{{ bos_token }}",
    "{% for i in range(1000) %}{{ i }}{% endfor %}", "{% set messages = messages[1:] %}",
    "{{ 10 ** (10 ** 9) }}", "{{ eos_token }}", "{{ 1 / 0 }}",
)  # fmt: skip


def maker(base: Path) -> Case:
    """What damages a folder and reads it; the whole ones are made here, in `base`."""
    console.quiet = True
    whole = {}
    for kind, make in bases.KINDS.items():
        make(base / kind)
        whole[kind] = CHECKS[kind].whole(base / kind)
    return partial(folder_case, base, whole)


def folder_case(base: Path, whole: dict[str, Whole], rng: random.Random, home: Path) -> str:
    kind = rng.choice(sorted(whole))
    for name in (kind, "rows.jsonl", "trunk"):
        copy = shutil.copytree if (base / name).is_dir() else shutil.copy
        if (base / name).exists():
            copy(base / name, home / name)
    path = home / kind
    victim = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    what = f"{kind}/{victim.relative_to(path)}"
    damage(rng, victim)
    try:
        outcome = CHECKS[kind].read(path, whole[kind])
    except InputError as error:
        outcome = fault_of(error, path)
    except (FloatingPointError, OSError) as error:
        outcome = fault_of(InputError(str(error)), path)
    return outcome if outcome in ("accepted", "refused") else f"{outcome} [{what}]"


def damage(rng: random.Random, path: Path) -> None:
    """Change a file in the way of its kind, or in the way of any file."""
    change = STRUCTURED.get(path.suffix)
    draw = rng.random()
    if draw < 0.06:
        missing(rng, path)
    elif change and draw < 0.75:
        change(rng, path)
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))


def missing(rng: random.Random, path: Path) -> None:
    """No file, an empty one, a folder, or a link in its place."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 1:
        path.touch()
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to(path)


def change_json(rng: random.Random, path: Path) -> None:
    value = json.loads(path.read_text())
    if isinstance(value, dict) and isinstance(value.get("chat_template"), str):
        value["chat_template"] = changed_template(rng, value["chat_template"])
    value = several(rng, value)
    path.write_bytes(as_text(rng, value))


def several(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutated(rng, value, NAMES) if isinstance(value, dict | list) and value else value
    return value


def change_template(rng: random.Random, path: Path) -> None:
    path.write_text(changed_template(rng, path.read_text()))


def changed_template(rng: random.Random, text: str) -> str:
    """A template with a part that costs much, refuses, or reaches out."""
    place = rng.choice((0, len(text), text.find("{%", rng.randrange(len(text) + 1))))
    return text[:place] + rng.choice(TEMPLATE_PARTS) + text[place:]


def change_lines(rng: random.Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    if lines:
        i = rng.randrange(len(lines))
        lines[i] = as_text(rng, several(rng, json.loads(lines[i]))).decode()
    path.write_text("\n".join(lines) + "\n")


def change_header(rng: random.Random, path: Path) -> None:
    """A safetensors file whose header says something else, of the same bytes behind it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = as_text(rng, several(rng, json.loads(data[8 : 8 + size])))
    length = rng.choice((len(header),) * 8 + (2**60, len(header) + 1, 0))
    path.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])


def change_gguf(rng: random.Random, path: Path) -> None:
    """A GGUF file of other metadata, of other tensors, or with other bytes in its header."""
    config = bases.gguf_config()
    fields, tensors = bases.gguf_fields(config), bases.gguf_tensors(config)
    if rng.random() < 0.5:
        data = path.read_bytes()
        path.write_bytes(damaged(rng, data[:8000]) + data[8000:])
        return
    if rng.random() < 0.2:
        name = rng.choice(sorted(tensors))
        tensors[name] = rng.choice((tensors[name][:-1], tensors[name].T, tensors[name] * 1e39))
    else:
        template = changed_template(rng, fields["tokenizer.chat_template"])
        fields["tokenizer.chat_template"] = rng.choice((template, bases.CHATML))
        fields = several(rng, fields)
    temporary = path.with_suffix(".new")
    try:
        bases.write_gguf(temporary, fields, tensors)
        os.replace(temporary, path)
    except Exception:  # what the format cannot hold
        temporary.unlink(missing_ok=True)
        path.write_bytes(damaged(rng, path.read_bytes()))


STRUCTURED: dict[str, Callable[[random.Random, Path], None]] = {
    ".json": change_json,
    ".jinja": change_template,
    ".jsonl": change_lines,
    ".safetensors": change_header,
    ".gguf": change_gguf,
}
