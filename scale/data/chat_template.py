"""Tokenizers of other programs: Hugging Face's files, whose chat template writes conversations.

A folder holds `tokenizer.json`, and `tokenizer_config.json` with the special tokens and the
template. `load_tokenizer` reads one, ours or another program's.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, cycle, groupby, islice
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scale.data.tokenizer import SPECIAL, Tokenizer, Turns, read_tokenizer, special_as_text
from scale.errors import InputError
from scale.files import read_json_object

MARKS = range(0xE000, 0xF900)  # Unicode's private use area


@dataclass(frozen=True)
class ChatTokenizer(Tokenizer):
    """Another program's tokenizer, used as `transformers` does except for three things.

    - A special token that a turn's text spells out, such as `<|im_end|>`, is encoded as text: a
      user cannot end a turn.
    - A response is encoded by itself, without white space at its ends (only where there is a
      template), and ended by `eos_token`: the tokens that follow the prompt when the model answers.
    - A template sees no clock (`strftime_now`), so that a prompt has the same tokens every day.
    """

    special: tokenizers.Tokenizer
    """Reads the names of special tokens as those tokens; `backend` does not."""
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    """`tokenizer_config.json`; `chat_template` may be missing."""
    source: str = "tokenizer"
    """The name in messages."""

    @property
    def settings(self) -> dict[str, Any]:
        return self.tokenizer_config

    @property
    def pad(self) -> int:
        return self.eos if self.named("pad_token") is None else self.token("pad_token")

    @cached_property
    def eos(self) -> int:
        return self.token("eos_token")

    @property
    def bos(self) -> int | None:
        return None if self.named("bos_token") is None else self.token("bos_token")

    @cached_property
    def generation_prompt(self) -> list[int]:
        if self.template is None:
            return []
        mark = chr(MARKS[0])
        after = self.rendered([{"role": "user", "content": mark}]).rpartition(mark)[2]
        return self.special.encode(after, add_special_tokens=False).ids

    @property
    def template(self) -> str | None:
        return self.tokenizer_config.get("chat_template")

    @cached_property
    def spelled(self) -> re.Pattern[str]:
        """Matches the special tokens' names."""
        tokens = self.special.get_added_tokens_decoder().values()
        names = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def named(self, name: str) -> str | None:
        """A special token's text."""
        value = self.tokenizer_config.get(name)
        return value["content"] if isinstance(value, dict) else value

    def token(self, name: str) -> int:
        """The id of a special token such as `eos_token`.

        Raises:
            InputError: The vocabulary lacks it.
        """
        text = self.named(name)
        token_id = self.special.token_to_id(text or "")
        if token_id is None:
            raise InputError(f"{self.source}: tokenizer: {name} {text!r} is not in the vocabulary")
        return token_id

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """Tokens of a prompt up to where the response begins.

        With a template, a string is the turns of an Anthropic HH conversation if it is one, and
        one turn of the user otherwise. Without a template a string is encoded as it is.

        Raises:
            InputError: The prompt is turns and there is no template, or the template refuses them.
        """
        if self.template is not None:
            return self.conversation_ids(conversation(prompt))
        if isinstance(prompt, str):
            return self.backend.encode(prompt).ids
        raise InputError(
            f"{self.source}: the tokenizer has no chat template, so a prompt must be text and not "
            "turns"
        )

    def conversation_ids(self, turns: Turns) -> list[int]:
        """Tokens of turns that the template writes.

        While it is filled in, two marks enclose each special token's name that a turn spells out.
        """
        used = "".join(turn["content"] for turn in turns)
        left, right = islice((mark for mark in map(chr, MARKS) if mark not in used), 2)
        marked = [
            {**turn, "content": self.spelled.sub(rf"{left}\g<0>{right}", turn["content"])}
            for turn in turns
        ]
        pieces = re.split(f"{left}([^{right}]*){right}", self.rendered(marked))
        readers = cycle((self.special, self.backend))
        ids = [
            reader.encode(piece, add_special_tokens=False).ids
            for piece, reader in zip(pieces, readers, strict=False)
        ]
        return list(chain.from_iterable(ids))

    def rendered(self, turns: Turns) -> str:
        """The template's text of a conversation, with the generation prompt."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: self.named(name) for name in names if self.named(name) is not None}
        try:
            template = compiled(str(self.template))
            return template.render(messages=turns, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(
                f"{self.source}: the chat template refuses the conversation: {error}"
            ) from error

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        return super().response_ids(text if self.template is None else text.strip(), complete)


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """A chat template in a sandbox, with the white space rules of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def refuse(message: str) -> None:
    raise TemplateError(message)


def conversation(prompt: str | Turns) -> Turns:
    """A prompt's turns: text is an Anthropic HH conversation, or one turn of the user.

    A blank line joins neighbouring turns of one HH speaker: many templates accept alternating turns
    only.
    """
    if not isinstance(prompt, str):
        return prompt
    text = prompt if prompt.startswith("\n\n") else "\n\n" + prompt
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    spoken = list(zip(parts[::2], parts[1::2], strict=True))
    if before or len(spoken) < 2 or spoken[-1][0] != "Assistant" or spoken[-1][1].strip():
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": "\n\n".join(words.strip() for _, words in turns)}
        for speaker, turns in groupby(spoken[:-1], key=lambda turn: turn[0])
    ]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: ours if its first tokens are our special ones.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] == SPECIAL:
        return Tokenizer(special_as_text(tokenizer))
    return chat_tokenizer(tokenizer, read_settings(folder), str(folder))


def chat_tokenizer(
    tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], source: str
) -> ChatTokenizer:
    """A tokenizer with its `tokenizer_config.json`.

    Raises:
        InputError: The settings name no end-of-sequence token of the vocabulary.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    backend = special_as_text(tokenizers.Tokenizer.from_str(tokenizer.to_str()))
    chat = ChatTokenizer(backend, tokenizer, settings, source)
    chat.token("eos_token")
    return chat


def read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` with one chat template: `chat_template.jinja`, or the default one.

    Raises:
        InputError: The file is missing or cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; it names the token that ends a response")
    settings = read_json_object(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {**settings, "chat_template": template} if template else settings
