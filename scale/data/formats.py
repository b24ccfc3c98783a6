"""Rows of data: JSONL or Parquet in, plain dicts in memory, Parquet with its provenance out.

In memory a row's `prompt` is a string or a list of `{role, content}` turns; `chosen`, `rejected` and
`completion` are strings, the response alone. What a file may hold instead (one format a file):

- any of the four as a list of turns: a response's list is the assistant's reply alone, or the whole
  conversation, which must then begin with `prompt` where there is one (UltraFeedback has both);
- whole conversations without a `prompt`: lists of turns, or Anthropic HH text, `\n\nHuman: ...`,
  `\n\nAssistant: ...`, whose prompt ends with its last `\n\nAssistant:`. The split is between turns,
  never inside one;
- OpenAI's summarize-from-feedback comparisons: the prompt is `r/` `info.subreddit`, `info.title` and
  `info.post`, those that are there, with blank lines between; `choice` is the index of the better of the two
  `summaries`.

Nulls are missing values. Unknown columns are kept where they hold text, numbers, booleans or lists of
these, else dropped.
"""

import sys
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


ROLES = ("system", "user", "assistant")


RESPONSES = ("chosen", "rejected", "completion")


SCORES = ("score_chosen", "score_rejected")


LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps")


COMPARISON = ("info", "summaries", "choice")


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class _Fault(ValueError):
    def __init__(self, field: str, what: str):
        super().__init__(f"field {field!r}: {what}")


def _row(raw: Row, need: tuple[str, ...]) -> Row:
    raw = _present(raw)
    raw = _comparison(raw) if "summaries" in raw else raw
    row = {**_texts(raw), **{name: value for name, value in raw.items() if _is_extra(name, value)}}
    if "completion" in need and "chosen" in row:
        row.setdefault("completion", row["chosen"])
    for name in need:
        if name not in row:
            raise _Fault(name, f"missing; the row has {', '.join(raw) or 'nothing'}")
    row = {name: _COLUMNS.get(name, _extra)(name, value) for name, value in row.items()}
    chosen, rejected = (_width(row.get(name)) for name in SCORES)
    if chosen != rejected:
        raise _Fault(SCORES[1], f"{rejected}, but {SCORES[0]!r} has {chosen}")
    return row


def _present(raw: Row) -> Row:
    return {name: value for name, value in raw.items() if value is not None}


def _is_extra(name: str, value: Any) -> bool:
    if name in ("prompt", *RESPONSES):
        return False
    flat = value if isinstance(value, list) else [value]
    return name in _COLUMNS or all(isinstance(item, str | int | float) for item in flat)


def _texts(raw: Row) -> Row:
    """The prompt and the responses, split from each other."""
    prompt = _prompt(raw["prompt"]) if "prompt" in raw else None
    pieces = {name: _divided(prompt, name, raw[name]) for name in RESPONSES if name in raw}
    contexts = {name: context for name, (context, _) in pieces.items()}
    prompt = next(iter(contexts.values()), prompt)
    for name, context in contexts.items():
        if context != prompt:
            raise _Fault(name, "the conversations differ before the last turn")
    row = {name: response for name, (_, response) in pieces.items()}
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        raise _Fault("rejected", "identical to 'chosen'")
    return row if prompt is None else {"prompt": prompt, **row}


def _prompt(value: Any) -> str | list[Row]:
    if isinstance(value, str):
        return _spoken("prompt", value)
    turns = _turns("prompt", value, last="user")
    _spoken("prompt", turns[-1]["content"])
    return turns


def _divided(prompt: str | list[Row] | None, name: str, value: Any) -> tuple[str | list[Row], str]:
    """A response's prompt and its own text."""
    if isinstance(value, str):
        context, response = _split_text(name, value) if prompt is None else (prompt, value)
    else:
        turns = _turns(name, value, last="assistant")
        context, response = _context(prompt, name, turns[:-1]), turns[-1]["content"]
    return context, response if name == "rejected" and response else _spoken(name, response)


def _split_text(name: str, text: str) -> tuple[str, str]:
    head, mark, response = text.rpartition(ASSISTANT)
    if HUMAN in response:
        raise _Fault(name, "the conversation does not end with an assistant turn")
    if not mark or HUMAN not in "\n\n" + head:
        raise _Fault("prompt", f"missing, and {name!r} has no {HUMAN!r} and {ASSISTANT!r} turns to split")
    return head + mark, response


def _context(prompt: str | list[Row] | None, name: str, before: list[Row]) -> str | list[Row]:
    """The turns before a reply, which must be those of `prompt` where both are there."""
    if prompt is None:
        return _prompt(before) if before else _no_prompt(name)
    if not before:
        return prompt
    opening = [turn for turn in before if turn["role"] != "system"][:1]
    if before != prompt and [turn["content"] for turn in opening] != [prompt]:
        raise _Fault(name, "the conversation does not begin with the prompt")
    return _prompt(before)


def _no_prompt(name: str) -> str:
    raise _Fault("prompt", f"missing, and {name!r} is a reply alone")


def _turns(name: str, value: Any, last: str) -> list[Row]:
    if not isinstance(value, list):
        raise _Fault(name, f"must be text or a list of turns, not {_kind(value)}")
    turns = [_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value)]
    if not turns or turns[-1]["role"] != last:
        raise _Fault(name, f"must end with {'an' if last == 'assistant' else 'a'} {last} turn")
    return turns


def _turn(name: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise _Fault(name, f"must be an object with role and content, not {_kind(value)}")
    turn = _present(value)
    if turn.keys() != {"role", "content"}:
        raise _Fault(name, f"a turn's keys are role and content, not {', '.join(turn) or 'none'}")
    if turn["role"] not in ROLES:
        raise _Fault(name, f"role must be one of {', '.join(ROLES)}, not {turn['role']!r}")
    return {"role": turn["role"], "content": _text(f"{name}.content", turn["content"])}


def _comparison(raw: Row) -> Row:
    """A summarize-from-feedback row as prompt, chosen and rejected."""
    info, summaries, choice = (raw.get(name) for name in COMPARISON)
    if not isinstance(info, dict) or info.get("post") is None:
        raise _Fault("info.post", "missing")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise _Fault("summaries", "must be a list of two")
    if type(choice) is not int or choice not in (0, 1):
        raise _Fault("choice", "missing" if choice is None else f"must be 0 or 1, not {choice!r}")
    texts = [_summary(f"summaries[{i}].text", summary) for i, summary in enumerate(summaries)]
    rest = {name: value for name, value in raw.items() if name not in COMPARISON}
    return {**rest, "prompt": _post(info), "chosen": texts[choice], "rejected": texts[1 - choice]}


def _summary(name: str, summary: Any) -> str:
    return _spoken(name, summary.get("text") if isinstance(summary, dict) else None)


def _post(info: Row) -> str:
    found = {name: _text(f"info.{name}", info.get(name) or "") for name in ("subreddit", "title", "post")}
    _spoken("info.post", found["post"])
    lines = (found["subreddit"] and f"r/{found['subreddit']}", found["title"], found["post"])
    return "\n\n".join(line for line in lines if line)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Fault(name, f"must be text, not {_kind(value)}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Fault(name, "invalid Unicode: half of a surrogate pair")
    return value


def _spoken(name: str, value: Any) -> str:
    if not _text(name, value).strip():
        raise _Fault(name, "empty")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Fault(name, f"must be a number, not {_kind(value)}")
    if not abs(value) <= sys.float_info.max:
        raise _Fault(name, f"must be finite, not {value}")
    return float(value)


def _score(name: str, value: Any) -> float | list[float]:
    if not isinstance(value, list):
        return _number(name, value)
    if not value:
        raise _Fault(name, "an empty list of scores")
    return [_number(f"{name}[{i}]", score) for i, score in enumerate(value)]


def _logp(name: str, value: Any) -> float:
    number = _number(name, value)
    if number > 0:
        raise _Fault(name, f"a log-probability must be at most 0, not {value}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Fault(name, f"must be true or false, not {_kind(value)}")
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
    "ref_sample_complete": _flag,
}


def _width(score: float | list[float] | None) -> str:
    if score is None:
        return "no score"
    return f"a list of {len(score)}" if isinstance(score, list) else "a number"


def _format(raw: Row) -> str:
    """A row's fields and what each holds, such as `prompt (text), chosen (reply), rejected (reply)`."""
    if raw.get("summaries") is not None:
        return "a summarize-from-feedback comparison"
    names = [name for name in ("prompt", *RESPONSES) if raw.get(name) is not None]
    return ", ".join(f"{name} ({_form(name, raw[name])})" for name in names)


def _form(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "turns" if name == "prompt" else "reply" if len(value) == 1 else "conversation"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
