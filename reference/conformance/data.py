"""Level 3: rows as files hold them to prompt, chosen and rejected; token ids to what a model is trained on."""

from typing import Any

Values = dict[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def explicit(params: Values, inputs: Values) -> Values:
    """A prompt and the responses alone, as text or as a list with the assistant's one turn."""
    return {"prompt": inputs["prompt"], "chosen": _reply(inputs["chosen"]), "rejected": _reply(inputs["rejected"])}


def conversations(params: Values, inputs: Values) -> Values:
    """Two whole conversations that differ in their last turn alone, the assistant's: all before it is the prompt.

    Where there is a `prompt` of text too, it is the first user turn. Errors: ValueError.
    """
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    opening = [turn["content"] for turn in chosen if turn["role"] == "user"][:1]
    if chosen[:-1] != rejected[:-1] or opening != [inputs.get("prompt", *opening)]:
        raise ValueError("the conversations differ before the last turn")
    return {"prompt": chosen[:-1], "chosen": _reply(chosen[-1:]), "rejected": _reply(rejected[-1:])}


def hh_text(params: Values, inputs: Values) -> Values:
    """Anthropic HH's text, cut behind its last `\\n\\nAssistant:`. Errors: ValueError."""
    chosen, rejected = (_cut(inputs[name]) for name in ("chosen", "rejected"))
    if chosen[0] != rejected[0]:
        raise ValueError("the conversations differ before the last turn")
    return {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}


def tokens(keep_end: bool, params: Values, inputs: Values) -> Values:
    """A complete response ends with one EOS, a truncated one with none; an over-long prompt loses its start or end."""
    limit, prompt = params["max_prompt_length"], inputs["prompt_ids"]
    made = {"prompt_ids": prompt[-limit:] if keep_end else prompt[:limit]}
    for name in ("chosen", "rejected"):
        made[f"{name}_ids"] = inputs[f"{name}_ids"] + [params["eos_id"]] * inputs[f"{name}_complete"]
    return made


def _reply(value: str | list[Values]) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    return value[0]["content"]


def _cut(text: str) -> tuple[str, str]:
    head, mark, response = text.rpartition(ASSISTANT)
    if not mark or HUMAN in response or HUMAN not in head:
        raise ValueError("the text does not end with an assistant's turn")
    return head + mark, response
