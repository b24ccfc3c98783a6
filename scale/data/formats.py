r"""The formats of a row that files may hold, and the one form that the program works with.

In memory a row's `prompt` is a string or a list of `{role, content}` turns; `chosen`, `rejected`
and `completion` are strings, the response alone. One file holds one of these formats:

- Any of the four as a list of turns. A response's list is the assistant's reply alone, or the whole
  conversation, which must begin with `prompt` where the row has one (UltraFeedback has both).
- Whole conversations without a `prompt`: lists of turns, or Anthropic HH text, `\n\nHuman: ...`,
  `\n\nAssistant: ...`, whose prompt ends with its last `\n\nAssistant:`. Turns stay whole.
- LLaMA-Factory's ShareGPT rows: `conversations` of `{from, value}` turns is the prompt, and
  `chosen` and `rejected` are one such turn each.
- OpenAI's summarize-from-feedback comparisons. The prompt is `r/` `info.subreddit`, `info.title`
  and `info.post`, as far as the row has them, with blank lines between; `choice` is the index of
  the better of the two `summaries`.

A turn's content may be a list of parts of type "text", which are joined. A column `system` opens
the conversation. Nulls are missing values. Unknown columns stay where they hold text, numbers,
booleans or lists of these, and are dropped otherwise.
"""

import sys
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Prompt = str | list[Row]

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")  # suffixes of files with a row in each line
ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of the roles
SIDES = ("chosen", "rejected")
RESPONSES = (*SIDES, "completion")
SCORES = ("score_chosen", "score_rejected")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps")
COMPARISON = ("info", "summaries", "choice")
LARGEST = 2.0**128 - 2.0**104  # of float32
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class FieldError(ValueError):
    """What is wrong with one field of a row."""

    def __init__(self, field: str, fault: str):
        super().__init__(f"field {field!r}: {fault}")


def parse_row(record: Row, need: tuple[str, ...]) -> Row:
    """A row in the one form of this module.

    Args:
        record: A row in any format that the module's docstring lists.
        need: Fields that the row must have; a missing `completion` is the row's `chosen`.

    Raises:
        FieldError: A field is missing or malformed, or two fields contradict each other.
    """
    record = {_text(name, name): value for name, value in _without_nulls(record).items()}
    if "tools" in record:
        raise FieldError("tools", "a prompt with tools is not supported")
    record = _from_comparison(record) if "summaries" in record else record
    record = _from_sharegpt(record) if "conversations" in record else record
    extras = {name: value for name, value in record.items() if _is_extra(name, value)}
    row = {**_prompt_and_responses(record), **extras}
    if "completion" in need and "chosen" in row:
        row.setdefault("completion", row["chosen"])
    for name in need:
        if name not in row:
            raise FieldError(name, f"missing; the row has {', '.join(record) or 'nothing'}")
    row = {name: _COLUMNS.get(name, _extra)(name, value) for name, value in row.items()}
    chosen, rejected = (score_width(row.get(name)) for name in SCORES)
    if chosen != rejected:
        raise FieldError(SCORES[1], f"{rejected}, but {SCORES[0]!r} has {chosen}")
    return row


def format_name(record: Row) -> str:
    """The text fields of a row and what each holds: `prompt (text), chosen (reply)`."""
    if record.get("summaries") is not None:
        return "a summarize-from-feedback comparison"
    names = [name for name in ("prompt", *RESPONSES) if record.get(name) is not None]
    return ", ".join(f"{name} ({_text_form(name, record[name])})" for name in names)


def score_width(score: float | list[float] | None) -> str:
    """How many numbers a score has: `a number`, `a list of 3`, `no score`."""
    if score is None:
        return "no score"
    return f"a list of {len(score)}" if isinstance(score, list) else "a number"


def type_name(value: Any) -> str:
    """What JSON calls a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    other = "a number" if isinstance(value, int | float) else type(value).__name__
    return names.get(type(value), other)


def _text_form(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    one = isinstance(value, dict) or len(value) == 1
    return "turns" if name == "prompt" else "reply" if one else "conversation"


def _without_nulls(record: Row) -> Row:
    return {name: value for name, value in record.items() if value is not None}


def _is_extra(name: str, value: Any) -> bool:
    if name in ("prompt", "system", *RESPONSES):
        return False
    items = value if isinstance(value, list) else [value]
    return name in _COLUMNS or all(isinstance(item, str | int | float) for item in items)


def _prompt_and_responses(record: Row) -> Row:
    """The prompt and the responses, split from each other."""
    prompt = _prompt(record["prompt"]) if "prompt" in record else None
    splits = {
        name: _split_response(prompt, name, record[name]) for name in RESPONSES if name in record
    }
    prompts = {name: before for name, (before, _) in splits.items()}
    prompt = next(iter(prompts.values()), prompt)
    for name, before in prompts.items():
        if before != prompt:
            raise FieldError(name, "the conversations differ before the last turn")
    row = {name: response for name, (_, response) in splits.items()}
    if "system" in record:
        prompt = _with_system(prompt, record["system"])
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        raise FieldError("rejected", "identical to 'chosen'")
    return row if prompt is None else {"prompt": prompt, **row}


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _non_blank("prompt", value)
    turns = _turns("prompt", value, last="user")
    _non_blank("prompt", turns[-1]["content"])
    return turns


def _with_system(prompt: Prompt | None, system: Any) -> Prompt:
    """The prompt as a conversation that the text of the column `system` opens."""
    if prompt is None:
        raise FieldError("system", "there is no prompt that it could open")
    if isinstance(prompt, str) and ASSISTANT in "\n\n" + prompt:
        raise FieldError("system", "beside Anthropic HH text; give the prompt as turns")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns[0]["role"] == "system":
        raise FieldError("system", "the conversation has a system turn of its own")
    return [{"role": "system", "content": _non_blank("system", system)}, *turns]


def _split_response(prompt: Prompt | None, name: str, value: Any) -> tuple[Prompt, str]:
    """A response's prompt and its own text."""
    if isinstance(value, str):
        before, response = _split_text(name, value) if prompt is None else (prompt, value)
    else:
        turns = _turns(name, [value] if isinstance(value, dict) else value, last="assistant")
        before, response = _prompt_of_turns(prompt, name, turns[:-1]), turns[-1]["content"]
    return before, response if name == "rejected" else _non_blank(name, response)


def _split_text(name: str, text: str) -> tuple[str, str]:
    """The prompt and the last reply of an Anthropic HH conversation."""
    before, mark, response = text.rpartition(ASSISTANT)
    if HUMAN in response:
        raise FieldError(name, "the conversation does not end with an assistant turn")
    if not mark or HUMAN not in "\n\n" + before:
        turns = f"{HUMAN!r} and {ASSISTANT!r} turns"
        raise FieldError("prompt", f"missing, and {name!r} has no {turns} to split")
    return before + mark, response


def _prompt_of_turns(prompt: Prompt | None, name: str, before: list[Row]) -> Prompt:
    """The turns before a reply; where the row has a `prompt` too, they must begin with it."""
    if prompt is None:
        if not before:
            raise FieldError("prompt", f"missing, and {name!r} is a reply alone")
        return _prompt(before)
    if not before:
        return prompt
    opening = [turn for turn in before if turn["role"] != "system"][:1]
    if before != prompt and [turn["content"] for turn in opening] != [prompt]:
        raise FieldError(name, "the conversation does not begin with the prompt")
    return _prompt(before)


def _turns(name: str, value: Any, last: str) -> list[Row]:
    if not isinstance(value, list):
        raise FieldError(name, f"must be text or a list of turns, not {type_name(value)}")
    turns = [_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    if not turns or turns[-1]["role"] != last:
        raise FieldError(name, f"must end with {'an' if last == 'assistant' else 'a'} {last} turn")
    return turns


def _turn(name: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise FieldError(name, f"must be an object with role and content, not {type_name(value)}")
    turn = _without_nulls(value)
    if turn.keys() == {"from", "value"}:
        speaker = _text(f"{name}.from", turn["from"])
        turn = {"role": SHAREGPT.get(speaker, speaker), "content": turn["value"]}
    if turn.keys() != {"role", "content"}:
        keys = ", ".join(turn) or "none"
        raise FieldError(name, f"a turn's keys are role and content, not {keys}")
    if turn["role"] not in ROLES:
        raise FieldError(name, f"role must be one of {', '.join(ROLES)}, not {turn['role']!r}")
    return {"role": turn["role"], "content": _content(f"{name}.content", turn["content"])}


def _content(name: str, value: Any) -> str:
    """A turn's text, which may be in parts."""
    if not isinstance(value, list):
        return _text(name, value)
    texts = []
    for i, part in enumerate(value):
        part = _without_nulls(part) if isinstance(part, dict) else {}
        if part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise FieldError(f"{name}[{i}]", "must be a part of type 'text'; others are not read")
        texts.append(_text(f"{name}[{i}].text", part["text"]))
    return "".join(texts)


def _from_comparison(record: Row) -> Row:
    """A summarize-from-feedback row as prompt, chosen and rejected."""
    info, summaries, choice = (record.get(name) for name in COMPARISON)
    if not isinstance(info, dict) or info.get("post") is None:
        raise FieldError("info.post", "missing")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise FieldError("summaries", "must be a list of two")
    if type(choice) is not int or choice not in (0, 1):
        fault = "missing" if choice is None else f"must be 0 or 1, not {choice!r}"
        raise FieldError("choice", fault)
    texts = [_summary(f"summaries[{i}].text", summary) for i, summary in enumerate(summaries)]
    rest = {name: value for name, value in record.items() if name not in COMPARISON}
    return {**rest, "prompt": _post(info), "chosen": texts[choice], "rejected": texts[1 - choice]}


def _from_sharegpt(record: Row) -> Row:
    """A row whose prompt is called `conversations`."""
    if "prompt" in record:
        raise FieldError("conversations", "the row has a 'prompt' too")
    rest = {name: value for name, value in record.items() if name != "conversations"}
    return {**rest, "prompt": record["conversations"]}


def _summary(name: str, summary: Any) -> str:
    return _non_blank(name, summary.get("text") if isinstance(summary, dict) else None)


def _post(info: Row) -> str:
    names = ("subreddit", "title", "post")
    subreddit, title, post = (_text(f"info.{name}", info.get(name) or "") for name in names)
    _non_blank("info.post", post)
    return "\n\n".join(text for text in (subreddit and f"r/{subreddit}", title, post) if text)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"must be text, not {type_name(value)}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise FieldError(name, "invalid Unicode: half of a surrogate pair")
    return value


def _non_blank(name: str, value: Any) -> str:
    if not _text(name, value).strip():
        raise FieldError(name, "empty")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(name, f"must be a number, not {type_name(value)}")
    if not abs(value) <= sys.float_info.max:
        raise FieldError(name, f"must be finite, not {value}")
    if abs(value) > LARGEST:
        raise FieldError(name, f"too large for float32: {value}")
    return float(value)


def _score(name: str, value: Any) -> float | list[float]:
    if not isinstance(value, list):
        return _number(name, value)
    if not value:
        raise FieldError(name, "an empty list of scores")
    return [_number(f"{name}[{i}]", score) for i, score in enumerate(value)]


def _logp(name: str, value: Any) -> float:
    number = _number(name, value)
    if number > 0:
        raise FieldError(name, f"a log-probability must be at most 0, not {value}")
    return number


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise FieldError(name, "must be a list of token ids")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FieldError(name, f"must be true or false, not {type_name(value)}")
    return value


def _extra(name: str, value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            _text(name, item)
    return value


_COLUMNS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(SCORES, _score),
    **dict.fromkeys(LOGPS, _logp),
    "ref_sample": _text,
    "ref_sample_ids": _token_ids,
    **dict.fromkeys((f"{name}_complete" for name in (*RESPONSES, "ref_sample")), _flag),
}
"""How the columns that the stages add are checked; all others go through `_extra`."""
