"""TODO scale.data.chat_template."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scale.data.tokenizer import SPECIAL, Tokenizer, Turns, json_object, literal, read_tokenizer
from scale.errors import InputError

MARKS = range(0xE000, 0xF900)  # Unicode's private use area


@dataclass(frozen=True)
class ChatTokenizer(Tokenizer):
    """Another's tokenizer, as `transformers` would use it, but for the three things below.

    - A special token that a turn's text spells out, such as `<|im_end|>`, is encoded as text: a user cannot end a turn.
    - A response is encoded by itself, after its white space is stripped at both ends, and ended by `eos_token`: the
      tokens that follow the prompt when the model answers. (Without a template it is not stripped.)
    - A template sees no clock (`strftime_now`), so that a prompt has the same tokens on every day.
    """

    special: tokenizers.Tokenizer
    """Reads the names of special tokens as those tokens; `backend` does not."""
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    """`tokenizer_config.json`; `chat_template` may be missing."""
    source: str = "tokenizer"
    """What errors call it."""

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
        names = [token.content for token in self.special.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def named(self, name: str) -> str | None:
        """A special token's text."""
        value = self.tokenizer_config.get(name)
        return value["content"] if isinstance(value, dict) else value

    def token(self, name: str) -> int:
        found = self.special.token_to_id(self.named(name) or "")
        if found is None:
            raise InputError(f"{self.source}: tokenizer: {name} {self.named(name)!r} is not in the vocabulary")
        return found

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """Tokens of a prompt up to where the response begins.

        With a template, a string is Anthropic HH's turns where it is such a conversation, else one user turn. Without
        one, a string is encoded as it is, and turns are a InputError.
        """
        if self.template is not None:
            return self.conversation_ids(conversation(prompt))
        if isinstance(prompt, str):
            return self.backend.encode(prompt).ids
        raise InputError(f"{self.source}: the tokenizer has no chat template, so a prompt must be text and not turns")

    def conversation_ids(self, turns: Turns) -> list[int]:
        """Special tokens' names in the turns stand between two marks while the template is filled in."""
        used = "".join(turn["content"] for turn in turns)
        left, right = [chr(mark) for mark in MARKS if chr(mark) not in used][:2]
        marked = [{**turn, "content": self.spelled.sub(rf"{left}\g<0>{right}", turn["content"])} for turn in turns]
        pieces = re.split(f"{left}([^{right}]*){right}", self.rendered(marked))
        readers = (self.special, self.backend)
        return [i for n, piece in enumerate(pieces) for i in readers[n % 2].encode(piece, add_special_tokens=False).ids]

    def rendered(self, turns: Turns) -> str:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: self.named(name) for name in names if self.named(name) is not None}
        try:
            return compiled(str(self.template)).render(messages=turns, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"{self.source}: the chat template refuses the conversation: {error}") from error

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        return super().response_ids(text if self.template is None else text.strip(), complete)


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """A chat template in a sandbox, with the white space rules of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def refuse(message: str) -> None:
    raise TemplateError(message)


def conversation(prompt: str | Turns) -> Turns:
    """A prompt's turns; of text, those of an Anthropic HH conversation, else one of the user's.

    Neighbouring turns of one HH speaker are joined by a blank line: many templates accept alternating turns only.
    """
    if not isinstance(prompt, str):
        return prompt
    text = prompt if prompt.startswith("\n\n") else "\n\n" + prompt
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    spoken = list(zip(parts[::2], parts[1::2], strict=True))
    if before or len(spoken) < 2 or spoken[-1][0] != "Assistant" or spoken[-1][1].strip():
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": "\n\n".join(words.strip() for _, words in turns)}
            for speaker, turns in groupby(spoken[:-1], key=lambda turn: turn[0])]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: our own where its first tokens are our special ones, else another's.

    Errors: InputError for files that are missing or cannot be read.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] == SPECIAL:
        return Tokenizer(literal(tokenizer))
    return chat_tokenizer(tokenizer, read_settings(folder), str(folder))


def chat_tokenizer(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], source: str) -> ChatTokenizer:
    """Errors: InputError where the settings name no end-of-sequence token of the vocabulary."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    backend = literal(tokenizers.Tokenizer.from_str(tokenizer.to_str()))
    chat = ChatTokenizer(backend, tokenizer, settings, source)
    chat.token("eos_token")
    return chat


def read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, its chat template one text: that of `chat_template.jinja`, or of several the default."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; it names the token that ends a response")
    settings = json_object(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {**settings, "chat_template": template} if template else settings
