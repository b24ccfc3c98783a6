"""Tokenizers of other programs, as `transformers` reads them: a template writes conversations."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import jax
import tokenizers

from scale.data.chat_template import applied, template_of, written
from scale.data.tokenizer import (
    SPECIAL,
    Prompt,
    RefusedRow,
    Tokenizer,
    Turns,
    any_of,
    read_tokenizer,
    special_as_text,
)
from scale.errors import InputError, reason_of
from scale.files import read_json_object, require_file, write_json

# the texts of a conversation from which the template's own parts are read off
MARKS = "\ue100", "\ue101"  # of Unicode's private use area
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ChatTokenizer(Tokenizer):
    """Another program's tokenizer: its tokens are those of `transformers`, except for two things.

    - The name of a special token in a turn, such as `<|im_end|>`, is text: a user cannot end a
      turn. (This is `transformers`' own `sanitize_control_tokens`.)
    - The clock of a template (`strftime_now`) stands still: a prompt has the same tokens every day.

    A response is what the template writes after the prompt, up to the token that ends the turn.
    """

    theirs: Any
    """A `PreTrainedTokenizerFast`."""
    source: str = "tokenizer"
    """The name in messages."""
    generation: dict[str, Any] = field(default_factory=dict)
    """`generation_config.json`, which may name more tokens that end a response."""

    @property
    def identity(self) -> list[Any]:
        theirs = self.theirs
        special = {name: str(token) for name, token in theirs.special_tokens_map.items()}
        parts = version("transformers"), self.special.to_str(), self.template, special, self.eos
        return [*super().identity, *parts]

    @property
    def pad(self) -> int:
        return self.eos if self.theirs.pad_token_id is None else self.theirs.pad_token_id

    @property
    def eos(self) -> int:
        return self.theirs.eos_token_id

    @property
    def bos(self) -> int | None:
        own = self.theirs.bos_token_id
        return self.generation.get("bos_token_id") if own is None else own

    @cached_property
    def special(self) -> tokenizers.Tokenizer:
        """Reads the names of special tokens as those tokens; `backend` does not."""
        return self.theirs.backend_tokenizer

    @cached_property
    def template(self) -> str | None:
        """The chat template; an error where it cannot be used."""
        return template_of(self.theirs, self.source)

    @cached_property
    def names(self) -> re.Pattern[str]:
        return any_of(self.theirs.added_tokens_encoder)

    @cached_property
    def special_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return {i: t for i, t in self.theirs.added_tokens_decoder.items() if t.special}

    @cached_property
    def special_names(self) -> re.Pattern[str]:
        return any_of(token.content for token in self.special_tokens.values())

    @cached_property
    def cuts(self) -> re.Pattern[str]:
        """Matches special tokens before which a text can be cut: its parts have its tokens."""
        tokens = self.special_tokens.values()
        return any_of(t.content for t in tokens if not (t.lstrip or t.normalized or t.single_word))

    @cached_property
    def generation_prompt(self) -> list[int]:
        if self.template is None:
            return []
        [prompt] = self.rendered([self.example(*MARKS)[:-1]], True)
        return self.special_ids(prompt.rpartition(MARKS[0])[2] + self.header)

    @cached_property
    def header(self) -> str:
        """What the template writes before a reply although it writes no generation prompt.

        It is part of the prompt if it has a special token; otherwise, such as a space, it belongs
        to the response.
        """
        both = self.example(*MARKS)
        prompt, whole = self.rendered([both[:-1], both], False)
        if self.rendered([both[:-1]], True) != [prompt]:
            return ""
        opening = whole.removeprefix(prompt).partition(MARKS[1])[0]
        return opening if self.first_special(opening) is not None else ""

    @cached_property
    def end(self) -> int:
        """The token that ends a response: the first special one that the template writes after a
        reply, otherwise the end-of-sequence token."""
        if self.template is None:
            return self.eos
        [whole] = self.rendered([self.example(*MARKS)], False)
        end = self.first_special(whole.rpartition(MARKS[1])[2])
        return self.eos if end is None else end

    @property
    def stops(self) -> tuple[int, ...]:
        named = self.generation.get("eos_token_id")
        more = named if isinstance(named, list) else [named]
        return tuple(dict.fromkeys([self.eos, self.end, *(i for i in more if i is not None)]))

    def prompts_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of prompts up to where the response begins.

        With a template, a string is the turns of an Anthropic HH conversation if it is one, and
        one turn of the user otherwise. Without a template a string is encoded as it is.

        Raises:
            RefusedRow: A prompt is turns and there is no template, or the template refuses
                them.
        """
        if self.template is not None:
            return self.conversations_ids([conversation(prompt) for prompt in prompts], True)
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                reason = "the tokenizer has no chat template, so a prompt must be text, not turns"
                raise RefusedRow(i, f"{self.source}: {reason}")
        return [without_end(e) for e in self.backend.encode_batch(list(prompts))]

    def responses_ids(self, texts: Sequence[str], complete: Sequence[bool]) -> list[list[int]]:
        if self.template is None:
            return super().responses_ids(texts, complete)
        [start] = self.conversations_ids([self.example("x", "x")[:-1]], True)
        ids = self.conversations_ids([self.example("x", text) for text in texts], False)
        rests = [self.after(start, *pair) for pair in zip(ids, texts, strict=True)]
        return [r + [self.end] * whole for r, whole in zip(rests, complete, strict=True)]

    def example(self, prompt: str, response: str) -> Turns:
        """A conversation of one turn of each side, after a system turn if the template needs it."""
        return [*self.opening, *reply(prompt, response)]

    @cached_property
    def opening(self) -> Turns:
        """The turns without which the template refuses one of the user."""
        try:
            self.rendered([reply("x", "x")[:1]], True)
        except RefusedRow:
            return [{"role": "system", "content": "x"}]
        return []

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As in the middle of a text: SentencePiece puts a space before what begins one."""
        newline, *ids = super().texts_ids(["\n", *("\n" + text for text in texts)])
        n, alone = len(newline), super().texts_ids
        return [
            own[n:] if own[:n] == newline else alone([text])[0]
            for own, text in zip(ids, texts, strict=True)
        ]

    def after(self, start: list[int], ids: list[int], text: str) -> list[int]:
        """The tokens of a reply, up to its end, in a conversation that begins with `start`."""
        if ids[: len(start)] != start:  # its beginning merges with the end of the prompt
            return self.texts_ids([text])[0]
        rest = ids[len(start) :]
        return rest[: rest.index(self.end)] if self.end in rest else rest

    def conversations_ids(self, conversations: Sequence[Turns], prompts: bool) -> list[list[int]]:
        """Tokens of conversations, of prompts with what opens the response.

        As far as a special token, all texts begin alike: that part is encoded once.
        """
        header = self.header if prompts else ""
        texts = [text + header for text in self.rendered(conversations, prompts)]
        alike = commonprefix(texts)  # noqa: RUF071  (texts, no paths)
        cut = max((match.start() for match in self.cuts.finditer(alike)), default=0)
        opening = self.special_ids(texts[0][:cut]) if texts else []
        rests = self.special.encode_batch_fast([t[cut:] for t in texts], add_special_tokens=False)
        ids = [opening + rest.ids for rest in rests]
        for i, turns in enumerate(conversations):
            if any(self.names.search(turn["content"]) for turn in turns):
                ids[i] = applied(
                    self.theirs, self.template, turns, add_generation_prompt=prompts,
                    sanitize_control_tokens=True, return_dict=False,
                ) + self.special_ids(header)  # fmt: skip
        return ids

    def rendered(self, conversations: Sequence[Turns], generation_prompt: bool) -> list[str]:
        """The template's texts of conversations."""
        try:
            return written(self.theirs, self.template, conversations, generation_prompt)
        except Exception as error:  # a template may raise anything
            if len(conversations) == 1:
                reason = f"the chat template refuses the conversation: {reason_of(error)}"
                raise RefusedRow(0, f"{self.source}: {reason}") from error
        for i, turns in enumerate(conversations):
            try:
                self.rendered([turns], generation_prompt)
            except RefusedRow as error:
                raise RefusedRow(i, str(error)) from error
        raise RefusedRow(0, f"{self.source}: the chat template takes too much time or memory")

    def special_ids(self, text: str) -> list[int]:
        """Tokens of a text that the template writes, in which special tokens' names are those."""
        return self.special.encode(text, add_special_tokens=False).ids

    def first_special(self, text: str) -> int | None:
        """The first special token of a text that the template writes."""
        return next((i for i in self.special_ids(text) if i in self.special_tokens), None)

    def save(self, folder: Path) -> None:
        with TemporaryDirectory(prefix=f".{uuid4().hex}-", dir=folder) as temporary:
            self.theirs.save_pretrained(temporary)
            if self.generation:
                write_json(Path(temporary) / GENERATION, self.generation)
            if jax.process_index() == 0:
                for file in sorted(Path(temporary).iterdir()):
                    os.replace(file, folder / file.name)


def reply(prompt: str, response: str) -> Turns:
    """A conversation of one turn of each side."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def without_end(encoding: tokenizers.Encoding) -> list[int]:
    """The tokens of a text, without those that the post-processor puts after it."""
    own = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
    return encoding.ids[: own[-1] + 1] if own else encoding.ids


def conversation(prompt: Prompt) -> Turns:
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
    return read_chat_tokenizer(folder, tokenizer.get_vocab())


def read_chat_tokenizer(folder: Path, vocabulary: dict[str, int]) -> ChatTokenizer:
    """The tokenizer of another program's folder, whose `tokenizer.json` has this vocabulary.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    for pattern in ("*config.json", "*token*.json", "chat_template.*"):
        for file in folder.glob(pattern):
            require_file(file)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json_object(folder / name)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing
    from transformers import AutoTokenizer  # it takes a second to import

    try:
        theirs = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # `transformers` raises nothing narrower
        raise InputError(f"{folder}: the tokenizer cannot be read: {error}") from error
    eos = theirs.eos_token
    if eos and eos not in vocabulary:  # `transformers` adds a token that no model has
        raise InputError(f"{folder}: tokenizer: eos_token {eos!r} is not in the vocabulary")
    return chat_tokenizer(theirs, str(folder), read_generation(folder))


def chat_tokenizer(
    theirs: Any, source: str, generation: dict[str, Any] | None = None
) -> ChatTokenizer:
    """A `PreTrainedTokenizerFast`, without the padding and truncation that its file may have.

    Raises:
        InputError: It has no token that ends a response, or no length.
    """
    if theirs.eos_token is None:
        raise InputError(f"{source}: tokenizer: eos_token None is not in the vocabulary")
    if not isinstance(theirs.model_max_length, int | float):
        raise InputError(f"{source}: tokenizer: model_max_length must be a number")
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    return ChatTokenizer(special_as_text(backend), theirs, source, generation or {})


def read_generation(folder: Path) -> dict[str, Any]:
    """What `generation_config.json` says, or otherwise `config.json` of special tokens."""
    if (folder / GENERATION).exists():
        return read_json_object(folder / GENERATION)
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
