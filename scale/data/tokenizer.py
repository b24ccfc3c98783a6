"""Our own byte-level BPE: text to token ids, with a token for each role of a conversation.

A string prompt is one piece of text; a conversation is its turns, each opened by its role's token.
Either way the prompt ends with the assistant's token, so that the place where the response begins
is never a guess. `chat_tokenizer.py` has the tokenizers of other programs.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from scale.errors import InputError
from scale.files import atomic, require_file, write_json

PAD, EOS = 0, 1
SPECIAL = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALLEST = 256 + len(SPECIAL)
MOST_IDS = 2**24  # of tokens: `tokenizers` takes memory for every number up to the largest
ROLE_IDS = {name.strip("<|>"): i for i, name in enumerate(SPECIAL) if i > EOS}

TEMPLATE = (
    "{% for turn in messages %}{{ '<|' + turn['role'] + '|>' + turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}

Turns = list[dict[str, Any]]
Prompt = str | Turns


class RefusedRow(InputError):
    """One of several rows has no tokens, for instance because a template refuses it.

    Attributes:
        index: Which one.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, str(self))  # as it comes back from another process


@dataclass(frozen=True)
class Tokenizer:
    """Our own tokenizer; `ChatTokenizer` has the same methods for those of other programs."""

    backend: tokenizers.Tokenizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process: a copy of the backend has forgotten that special tokens are text."""
        self.__dict__.update(state)
        special_as_text(self.backend)

    @property
    def identity(self) -> list[Any]:
        """All that the tokens of a text depend on, as JSON, besides the code of this package."""
        return [type(self).__name__, version("tokenizers"), self.backend.to_str()]

    @property
    def pad(self) -> int:
        """The token that fills up rows; its position masks it, never its value."""
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
    def vocab_size(self) -> int:
        """One more than the largest token."""
        return 1 + max(self.backend.get_vocab().values())

    @property
    def generation_prompt(self) -> list[int]:
        """The tokens after the text of a prompt's last turn, up to where the response begins."""
        return [ROLE_IDS["assistant"]]

    @cached_property
    def names(self) -> re.Pattern[str]:
        """Matches the names of the tokens that are not made of text."""
        return any_of(SPECIAL)

    @property
    def special_names(self) -> re.Pattern[str]:
        """Matches the names of special tokens, which are text where a text spells them."""
        return self.names

    @property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json`, with which `transformers` encodes conversations as we do."""
        special = {"pad_token": SPECIAL[PAD], "eos_token": SPECIAL[EOS]}
        return {**PLAIN, **special, "chat_template": TEMPLATE}

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a sample."""
        return (self.eos,)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text, in which a special token's name is text like any other."""
        return self.texts_ids([text])[0]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, a string or turns, up to where the response begins."""
        return self.prompts_ids([prompt])[0]

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        """Tokens of a response; one that was not cut short has the token that ends it."""
        return self.responses_ids([text], [complete])[0]

    def prompts_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`prompt_ids` of many prompts, faster."""
        turns: list[Turns] = [
            [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        texts = iter(self.texts_ids([turn["content"] for prompt in turns for turn in prompt]))
        opening: dict[str, list[int]] = {role: [i] for role, i in ROLE_IDS.items()} | {"": []}
        return [
            [i for turn in prompt for i in (*opening[turn["role"]], *next(texts))]
            + self.generation_prompt
            for prompt in turns
        ]

    def responses_ids(self, texts: Sequence[str], complete: Sequence[bool]) -> list[list[int]]:
        """`response_ids` of many texts, faster."""
        ids = self.texts_ids(texts)
        return [own + [self.eos] * whole for own, whole in zip(ids, complete, strict=True)]

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of tokens, without special ones."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder that exists."""
        with atomic(folder / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))
        write_json(folder / "tokenizer_config.json", self.settings)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a BPE of at most `vocab_size` tokens, the 256 bytes and the special ones included.

    Raises:
        InputError: Bytes and special tokens alone are more.
    """
    if vocab_size < SMALLEST:
        raise InputError(
            f"--model.vocab-size {vocab_size}: bytes and special tokens alone are {SMALLEST}"
        )
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(special_as_text(tokenizer))


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizer.json`.

    Raises:
        InputError: The file is missing or no tokenizer, or an id is larger than any vocabulary.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; a slow tokenizer's files are not read")
    require_file(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(f"{path}: not a tokenizer: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MOST_IDS:
        raise InputError(f"{path}: not a tokenizer: it has a token {largest}")
    return tokenizer


def special_as_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make text that spells a special token plain text: no user ends a turn by `<|eos|>`."""
    tokenizer.encode_special_tokens = True
    return tokenizer
