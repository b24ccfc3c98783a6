"""Prompt, chosen and rejected of a row, written anew from the page on formats.

`json` and `pyarrow` read the file; here a record becomes texts. It shares no code with
`scale.data`. What it cannot make sense of raises `Unclear`.
"""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

Turns = list[tuple[str, str]]  # (role, text)
Answer = tuple[Any, str, str]  # prompt, chosen, rejected
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user"}
ROLES["assistant"] = "assistant"


class Unclear(ValueError):
    """A row that the formats do not describe."""


def answers(path: Path) -> list[Answer]:
    """The rows of a file.

    Raises:
        Exception: The file or a row cannot be read.
    """
    return [answer(record) for record in records(path)]


def records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in data.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")]


def answer(record: Any) -> Answer:
    require(isinstance(record, dict))
    row = {name: value for name, value in record.items() if value is not None}
    if "summaries" in row:
        row = comparison(row)
    if "conversations" in row:
        require("prompt" not in row)
        row["prompt"] = row["conversations"]
    prompt = turns_of(row["prompt"]) if "prompt" in row else None
    (before, chosen), (also, rejected) = (
        reply(prompt, row[name]) for name in ("chosen", "rejected")
    )
    require(before == also and before is not None)
    if "system" in row:
        own = [("user", before)] if isinstance(before, str) else before
        before = [("system", row["system"]), *own]
    return before, chosen, rejected


def comparison(row: dict[str, Any]) -> dict[str, Any]:
    info, summaries = row["info"], row["summaries"]
    parts = [info.get("subreddit") and "r/" + info["subreddit"], info.get("title"), info["post"]]
    texts = [summary["text"] for summary in summaries]
    require(len(texts) == 2 and type(row["choice"]) is int)
    extra = {name: row[name] for name in row if name == "system"}
    chosen, rejected = texts[row["choice"]], texts[1 - row["choice"]]
    prompt = "\n\n".join(part for part in parts if part)
    return extra | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def reply(prompt: Any, value: Any) -> tuple[Any, str]:
    """What is before a response, and its text."""
    if isinstance(value, str):
        if prompt is not None:
            return prompt, value
        place = value.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        return value[:place], value[place:]
    turns = turns_of([value] if isinstance(value, dict) else value)
    require(isinstance(turns, list) and turns[-1][0] == "assistant")
    *before, (_, text) = turns
    if not before:
        return prompt, text
    if isinstance(prompt, str):
        require(prompt == next(words for role, words in before if role != "system"))
    elif prompt is not None:
        spoken = [words for role, words in before if role != "system"]
        require(prompt == before or (len(prompt) == 1 and [prompt[0][1]] == spoken[:1]))
    return before, text


def turns_of(value: Any) -> Any:
    """Text as it is, or turns."""
    return value if isinstance(value, str) else [turn_of(turn) for turn in value]


def turn_of(turn: dict[str, Any]) -> tuple[str, str]:
    turn = {name: value for name, value in turn.items() if value is not None}
    names = ("from", "value") if "from" in turn else ("role", "content")
    require(turn.keys() == set(names))
    role, content = (turn[name] for name in names)
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if require(part["type"] == "text"))
    require(isinstance(content, str))
    return ROLES[role], content


def require(condition: bool) -> bool:
    if not condition:
        raise Unclear
    return True
