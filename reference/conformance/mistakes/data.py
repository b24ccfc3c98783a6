"""Mistakes between the rows of files, or token ids, and what is trained on."""

from collections.abc import Callable
from functools import partial
from typing import Any

from reference.conformance.data import ASSISTANT, HUMAN
from reference.conformance.mistakes.mistake import Function, Mistake, Values, at, on, on_case, then

SIDES = ("chosen", "rejected")


def replies(change: Callable[[str], str]) -> Callable[[Function], Function]:
    """Each response is a function of the right one."""
    return then(lambda made, p, x: {name: change(made[name]) for name in SIDES})


def beginning_cut(made: Values, params: Values, inputs: Values) -> Values:
    """What the responses begin with in common is no part of them."""
    differ = [a != b for a, b in zip(made["chosen"], made["rejected"], strict=False)]
    shared = differ.index(True) if True in differ else len(differ)
    return {name: made[name][shared:] for name in SIDES}


def split_texts(head_of: Callable) -> Callable[[Function], Function]:
    """Texts that are split otherwise: `head_of(text)` is the prompt and the response."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            (prompt, chosen), (other, rejected) = (head_of(inputs[name]) for name in SIDES)
            if prompt != other:
                raise ValueError("the conversations differ before the last turn")
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

        return mistaken

    return change


def at_mark(mark: str, cut: Callable, text: str) -> tuple[str, str]:
    """The text up to a mark, which has to be there, and the rest."""
    head, found, response = cut(text, mark)
    return head + _need(found), response


def lenient(absent: str, text: str) -> tuple[str, str]:
    """The right split but for one check: "mark", "human" before it, or none "after" it."""
    head, found, response = text.rpartition(ASSISTANT)
    _need(found or absent == "mark")
    _need(HUMAN in head or absent in ("mark", "human"))
    _need(HUMAN not in response or absent == "after")
    return head + found, response


def _need(good: Any) -> Any:
    if not good:
        raise ValueError("the text does not end with an assistant's turn")
    return good


def one_context(inputs: Values) -> Values:
    """The rejected conversation has the context of the chosen one."""
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    return {"rejected": [*chosen[:-1], rejected[-1]]}


def one_text_context(inputs: Values) -> Values:
    head, found, _ = inputs["chosen"].rpartition(ASSISTANT)
    return {"rejected": head + found + inputs["rejected"].rpartition(ASSISTANT)[2]}


def without_prompt(function: Function) -> Function:
    """The prompt of its own is not looked at."""
    return lambda p, x: function(p, {name: x[name] for name in SIDES})


def assistants(change: Callable[[list], list]) -> Callable[[Function], Function]:
    """Replies that are lists of turns are taken as other lists."""

    def inputs(inputs: Values) -> Values:
        turns = {name: inputs[name] for name in SIDES if isinstance(inputs[name], list)}
        return {name: change(value) for name, value in turns.items()}

    return on(inputs)


def as_assistant(turns: list[Values]) -> list[Values]:
    return [*turns[:-1], turns[-1] | {"role": "assistant"}]


def missing(name: str, value_of: Callable[[Values], Any]) -> Callable[[Function], Function]:
    """A field that is not there is `value_of(inputs)`."""
    return on(lambda inputs: {name: inputs[name] if name in inputs else value_of(inputs)})


def ids(change: Callable[[Values, list, bool], tuple[list, bool]]):
    """Each response's ids and whether it is complete are others: a function of params and both."""

    def inputs(params: Values, inputs: Values) -> Values:
        made: Values = {}
        for name in SIDES:
            complete = inputs[f"{name}_complete"]
            both = change(params, inputs[f"{name}_ids"], complete)
            made |= dict(zip((f"{name}_ids", f"{name}_complete"), both, strict=True))
        return made

    return on_case(inputs)


def ended_as(side: str, other: str, inputs: Values) -> Values:
    """One response is complete where the other one is."""
    return {f"{side}_complete": inputs[f"{other}_complete"]}


def swapped(made: Values, params: Values, inputs: Values) -> Values:
    ends = ("", "_ids")
    both = [(f"chosen{end}", f"rejected{end}") for end in ends if f"chosen{end}" in made]
    return {a: made[b] for pair in both for a, b in (pair, pair[::-1])}


def without_last(made: Values, params: Values, inputs: Values) -> Values:
    return {f"{name}_ids": made[f"{name}_ids"][:-1] for name in SIDES}


def cut_at_limit(made: Values, params: Values, inputs: Values) -> Values:
    names = [f"{name}_ids" for name in SIDES]
    return {name: made[name][: params["max_prompt_length"]] for name in names}


def negative_start(params: Values, prompt: list) -> list:
    """`ids[len(ids) - limit:]`, where the start of a short prompt is negative: from its end."""
    start = len(prompt) - params["max_prompt_length"]
    return prompt[start:] if start < 0 else prompt


def begun(made: Values, params: Values, inputs: Values) -> Values:
    has_system = made["prompt"][0]["role"] == "system"
    return {"prompt": [{"role": "system", "content": ""}] * (not has_system) + made["prompt"]}


def stripped(made: Values, params: Values, inputs: Values) -> Values:
    return {name: made[name].strip() for name in ("prompt", *SIDES)}


def without_padding(made: Values, params: Values, inputs: Values) -> Values:
    names = [f"{name}_ids" for name in SIDES]
    return {name: [i for i in made[name] if i != params["pad_id"]] for name in names}


# fmt: off
DATA = (
    Mistake("with the common beginning of the responses cut", "character-split",
        then(beginning_cut)),
    Mistake("with responses cut at `Assistant:` anywhere", "character-split",
        split_texts(partial(at_mark, "Assistant:", str.rpartition))),
    Mistake("with responses cut at the first mark", "last-turn",
        split_texts(partial(at_mark, ASSISTANT, str.partition))),
    Mistake("with a human's last turn accepted", "last-turn",
        split_texts(partial(lenient, "after"))),
    Mistake("with texts without human turns accepted", "missing-field",
        split_texts(partial(lenient, "human"))),
    Mistake("with texts without marks accepted", "missing-field",
        split_texts(partial(lenient, "mark"))),
    Mistake("with responses stripped", "white-space", replies(str.strip)),
    Mistake("with contexts not compared", "last-turn", on(one_context)),
    Mistake("with the contexts of texts not compared", "last-turn", on(one_text_context)),
    Mistake("with the prompt of its own not compared", "last-turn", without_prompt),
    Mistake("with any role's last turn as the response", "last-turn", assistants(as_assistant)),
    Mistake("with the first of several turns as the response", "last-turn",
        assistants(lambda turns: turns[:1])),
    Mistake("with system turns left out of the prompt", "last-turn", then(lambda made, p, x: {
        "prompt": [turn for turn in made["prompt"] if turn["role"] != "system"]})),
    Mistake("with an empty system turn where the conversation has none", "last-turn", then(begun)),
    Mistake("with the last user turn alone as the prompt", "last-turn",
        then(lambda made, p, x: {"prompt": made["prompt"][-1:]})),
    Mistake("with a missing rejected response as empty", "missing-field",
        missing("rejected", lambda x: "")),
    Mistake("with a missing chosen response as empty", "missing-field",
        missing("chosen", lambda x: "")),
    Mistake("with a missing prompt as empty", "missing-field", missing("prompt", lambda x: "")),
    Mistake("with the chosen response for a missing rejected one", "missing-field",
        missing("rejected", lambda x: x["chosen"])),
    Mistake("at max_prompt_length - 1", "truncation-side", at(max_prompt_length=lambda n: n - 1)),
    Mistake("at max_prompt_length + 1", "truncation-side", at(max_prompt_length=lambda n: n + 1)),
    Mistake("with a short prompt sliced from a negative start, len - max_prompt_length",
        "truncation-side",
        on_case(lambda p, x: {"prompt_ids": negative_start(p, x["prompt_ids"])})),
    Mistake("with the prompt not truncated", "truncation-side",
        then(lambda made, p, x: {"prompt_ids": x["prompt_ids"]})),
    Mistake("with chosen and rejected swapped", "sign", then(swapped)),
    Mistake("with the last token of each response lost", "eos-lost", then(without_last)),
    Mistake("with an end-of-sequence token on the prompt", "eos-doubled", then(
        lambda made, p, x: {"prompt_ids": [*made["prompt_ids"], p["eos_id"]]})),
    Mistake("with an end-of-sequence token on the prompt before it is cut", "eos-doubled",
        on_case(lambda p, x: {"prompt_ids": [*x["prompt_ids"], p["eos_id"]]})),
    Mistake("with white space at the responses' beginning removed", "white-space",
        replies(str.lstrip)),
    Mistake("with white space at the responses' end removed", "white-space", replies(str.rstrip)),
    Mistake("with the texts and the prompt stripped", "white-space", then(stripped)),
    Mistake("with the prompt's first token lost", "truncation-side",
        on(lambda x: {"prompt_ids": x["prompt_ids"][1:]})),
    Mistake("with the prompt's last token lost", "truncation-side",
        on(lambda x: {"prompt_ids": x["prompt_ids"][:-1]})),
    Mistake("without the end-of-sequence token", "eos-lost",
        ids(lambda p, i, complete: (i, False))),
    Mistake("without the end of an empty response", "eos-lost",
        ids(lambda p, i, complete: (i, complete and bool(i)))),
    Mistake("with the end-of-sequence token twice", "eos-doubled",
        ids(lambda p, i, complete: (i + [p["eos_id"]] * complete, complete))),
    Mistake("with truncated responses ended", "eos-on-truncated",
        ids(lambda p, i, complete: (i, True))),
    *(Mistake(f"with the end of the {side} response decided by {other}_complete",
        "eos-on-truncated", on(partial(ended_as, side, other)))
        for side, other in (SIDES, SIDES[::-1])),
    Mistake("with responses cut at max_prompt_length", "response-cut", ids(
        lambda p, i, complete: (
            i[: p["max_prompt_length"]], complete and len(i) < p["max_prompt_length"]))),
    Mistake("with responses, ended or not, cut at max_prompt_length", "response-cut",
        then(cut_at_limit)),
    Mistake("with padding removed by its id", "pad-is-eos", then(without_padding)),
)
# fmt: on
