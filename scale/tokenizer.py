"""Text to tokens: our own byte-level BPE with a token for each role, or a tokenizer in Hugging Face's files.

Our own: a string prompt is one piece of text; a conversation is its turns, each opened by its role's token. Either way
the prompt ends with the assistant's token, so that where the response begins is never a guess. Another's tokenizer
writes conversations through its own chat template.

A folder holds `tokenizer.json`, and `tokenizer_config.json` with the special tokens and the template.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from scale.files import atomic, read_json, write_json
from scale.rows import DataError

PAD, EOS = 0, 1
SPECIAL = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALLEST = 256 + len(SPECIAL)
ROLES = {name.strip("<|>"): i for i, name in enumerate(SPECIAL) if i > EOS}
TEMPLATE = (
    "{% for turn in messages %}{{ '<|' + turn['role'] + '|>' + turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
MARKS = range(0xE000, 0xF900)  # Unicode's private use area

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Codec:
    """Our own tokenizer; `TemplateCodec` has the same methods for another's."""

    tokenizer: Tokenizer

    @property
    def pad(self) -> int:
        """The token that fills up rows; it is masked by its position, never by what it is."""
        return PAD

    @property
    def eos(self) -> int:
        """The token that ends a response."""
        return EOS

    @property
    def bos(self) -> int | None:
        """The token that some tokenizers put before a text."""
        return None

    @cached_property
    def vocab(self) -> int:
        """One more than the largest token."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def closing(self) -> list[int]:
        """The tokens after the text of a prompt's last turn, up to where the response begins."""
        return [ROLES["assistant"]]

    @property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json`, with which `transformers` encodes conversations as we do."""
        return {**PLAIN, "pad_token": SPECIAL[PAD], "eos_token": SPECIAL[EOS], "chat_template": TEMPLATE}

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text, in which a special token's name is text like any other."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """Tokens of a prompt, a string or turns, up to and including the assistant's opening token."""
        if isinstance(prompt, str):
            return [*self.text_ids(prompt), ROLES["assistant"]]
        turns = [i for turn in prompt for i in (ROLES[turn["role"]], *self.text_ids(turn["content"]))]
        return [*turns, ROLES["assistant"]]

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        """Tokens of a response; an end-of-sequence token ends it unless it was cut short."""
        return self.text_ids(text) + [self.eos] * complete

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder that exists."""
        with atomic(folder / "tokenizer.json") as temporary:
            self.tokenizer.save(str(temporary))
        write_json(folder / "tokenizer_config.json", self.settings)


@dataclass(frozen=True)
class TemplateCodec(Codec):
    """Another's tokenizer, as `transformers` would use it, but for the three things below.

    - A special token that a turn's text spells out, such as `<|im_end|>`, is encoded as text: a user cannot end a turn.
    - A response is encoded by itself, after its white space is stripped at both ends, and ended by `eos_token`: the
      tokens that follow the prompt when the model answers. (Without a template it is not stripped.)
    - A template sees no clock (`strftime_now`), so that a prompt has the same tokens on every day.
    """

    special: Tokenizer
    """Reads the names of special tokens as those tokens; `tokenizer` does not."""
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
    def closing(self) -> list[int]:
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
            raise DataError(f"{self.source}: tokenizer: {name} {self.named(name)!r} is not in the vocabulary")
        return found

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """Tokens of a prompt up to where the response begins.

        With a template, a string is Anthropic HH's turns where it is such a conversation, else one user turn. Without
        one, a string is encoded as it is, and turns are a DataError.
        """
        if self.template is not None:
            return self.conversation_ids(conversation(prompt))
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).ids
        raise DataError(f"{self.source}: the tokenizer has no chat template, so a prompt must be text and not turns")

    def conversation_ids(self, turns: Turns) -> list[int]:
        """Special tokens' names in the turns stand between two marks while the template is filled in."""
        used = "".join(turn["content"] for turn in turns)
        left, right = [chr(mark) for mark in MARKS if chr(mark) not in used][:2]
        marked = [{**turn, "content": self.spelled.sub(rf"{left}\g<0>{right}", turn["content"])} for turn in turns]
        pieces = re.split(f"{left}([^{right}]*){right}", self.rendered(marked))
        readers = (self.special, self.tokenizer)
        return [i for n, piece in enumerate(pieces) for i in readers[n % 2].encode(piece, add_special_tokens=False).ids]

    def rendered(self, turns: Turns) -> str:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: self.named(name) for name in names if self.named(name) is not None}
        try:
            return compiled(str(self.template)).render(messages=turns, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"{self.source}: the chat template refuses the conversation: {error}") from error

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


def train_codec(texts: Iterable[str], vocab: int) -> Codec:
    """Learn a BPE of at most `vocab` tokens, the 256 bytes and the special ones included."""
    if vocab < SMALLEST:
        raise DataError(f"--model.vocab {vocab}: bytes and special tokens alone are {SMALLEST}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return Codec(literal(tokenizer))


def load_codec(folder: Path) -> Codec:
    """The tokenizer of a folder: our own where its first tokens are our special ones, else another's.

    Errors: DataError for files that are missing or cannot be read.
    """
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] == SPECIAL:
        return Codec(literal(tokenizer))
    return template_codec(tokenizer, read_settings(folder), str(folder))


def template_codec(tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> TemplateCodec:
    """Errors: DataError where the settings name no end-of-sequence token of the vocabulary."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    codec = TemplateCodec(literal(Tokenizer.from_str(tokenizer.to_str())), tokenizer, settings, source)
    codec.token("eos_token")
    return codec


def read_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise DataError(f"{path}: no such file; a slow tokenizer's files are not read")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise DataError(f"{path}: not a tokenizer: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, its chat template one text: that of `chat_template.jinja`, or of several the default."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        raise DataError(f"{path}: no such file; it names the token that ends a response")
    settings = json_object(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {**settings, "chat_template": template} if template else settings


def json_object(path: Path) -> dict[str, Any]:
    """Errors: DataError naming the file, where it is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells a special token is text: a user cannot end a turn by writing `<|eos|>`."""
    tokenizer.encode_special_tokens = True
    return tokenizer
