"""A chat template is foreign code: it runs in the sandbox of `transformers`, within bounds."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment

from scale.errors import InputError, as_input_error
from scale.memory import bounded

SECONDS, SECONDS_EACH = 1.0, 0.05  # for a call, and for each conversation of it
MEMORY, MEMORY_EACH = 2**28, 2**20  # bytes, likewise
LONGEST = 2**24  # characters of a conversation
STILL_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def template_of(theirs: Any, source: str) -> str | None:
    """The template of a tokenizer of `transformers`, with a clock that stands still.

    Args:
        theirs: The tokenizer.
        source: Its name in messages.

    Returns:
        The template; None where it has none.

    Raises:
        InputError: There are several, and none is the default; it is no template; or it computes a
            power: a single one can take for ever, and no signal ends it.
    """
    if not theirs.chat_template:
        return None
    with as_input_error(Path(source)):
        template = theirs.get_chat_template()
        lexed = Environment().lex(template)
        texts = [(kind, text) for _, kind, text in lexed if kind != "whitespace"]
    powers = (before for (_, before), own in pairwise(texts) if own == ("operator", "**"))
    if any(before not in ("(", ",") for before in powers):  # there it is `f(**options)`
        raise InputError(f"{source}: the chat template computes a power, which may take for ever")
    return STILL_CLOCK + template if "strftime_now" in template else template


def applied(theirs: Any, template: str | None, conversations: Any, **options: Any) -> Any:
    """What a tokenizer of `transformers` makes of a conversation, or of several of them.

    Raises:
        Exception: Whatever a template raises; TimeoutError or MemoryError where it takes too much.
    """
    n = len(conversations)
    with bounded(SECONDS + SECONDS_EACH * n, MEMORY + MEMORY_EACH * n):
        return theirs.apply_chat_template(conversations, chat_template=template, **options)


def written(
    theirs: Any, template: str | None, conversations: Sequence[Any], generation_prompt: bool
) -> list[str]:
    """The texts of conversations; errors as those of `applied`."""
    texts = applied(
        theirs, template, list(conversations), tokenize=False,
        add_generation_prompt=generation_prompt,
    )  # fmt: skip
    if max(map(len, texts), default=0) > LONGEST:
        raise ValueError(f"it writes more than {LONGEST} characters")
    return texts
