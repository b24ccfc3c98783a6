"""Level 3: from the rows of files to prompt, chosen and rejected, and from token ids to what is
trained on.

Each function takes the params and inputs of a case and returns its outputs.
"""

from typing import Any

Values = dict[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def explicit(params: Values, inputs: Values) -> Values:
    """A prompt and the responses alone, as text or as a list with one turn of the assistant."""
    return {
        "prompt": inputs["prompt"],
        "chosen": _reply(inputs["chosen"]),
        "rejected": _reply(inputs["rejected"]),
    }


def conversations(params: Values, inputs: Values) -> Values:
    """Two whole conversations that differ in the assistant's last turn; the rest is the prompt.

    Where there is a `prompt` of text too, it is the first user turn.

    Raises:
        ValueError: the conversations differ before the last turn, or that is not the assistant's.
    """
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    opening = [turn["content"] for turn in chosen if turn["role"] == "user"][:1]
    if chosen[:-1] != rejected[:-1] or opening != [inputs.get("prompt", *opening)]:
        raise ValueError("the conversations differ before the last turn")
    return {"prompt": chosen[:-1], "chosen": _reply(chosen[-1:]), "rejected": _reply(rejected[-1:])}


def hh_text(params: Values, inputs: Values) -> Values:
    """Anthropic HH's text, cut behind its last `\\n\\nAssistant:`.

    Raises:
        ValueError: the texts differ before that mark, or do not end with an assistant's turn.
    """
    chosen, rejected = (_cut(inputs[name]) for name in ("chosen", "rejected"))
    if chosen[0] != rejected[0]:
        raise ValueError("the conversations differ before the last turn")
    return {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}


def tokens(keep_end: bool, params: Values, inputs: Values) -> Values:
    """Token ids as they are trained on: a complete response ends with one EOS, a truncated one not.

    A prompt that is too long loses its start (`keep_end`) or its end.
    """
    limit, prompt = params["max_prompt_length"], inputs["prompt_ids"]
    made = {"prompt_ids": prompt[-limit:] if keep_end else prompt[:limit]}
    for name in ("chosen", "rejected"):
        made[f"{name}_ids"] = (
            inputs[f"{name}_ids"] + [params["eos_id"]] * inputs[f"{name}_complete"]
        )
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
