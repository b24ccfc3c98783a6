"""Our own byte-level BPE: text to token ids, with a token for each role of a conversation.

A string prompt is one piece of text; a conversation is its turns, each opened by its role's token.
Either way the prompt ends with the assistant's token, so that the place where the response begins
is never a guess. `chat_template.py` has the tokenizers of other programs, and `load_tokenizer`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from scale.errors import InputError
from scale.files import atomic, write_json

PAD, EOS = 0, 1
SPECIAL = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALLEST = 256 + len(SPECIAL)
ROLE_IDS = {name.strip("<|>"): i for i, name in enumerate(SPECIAL) if i > EOS}

TEMPLATE = (
    "{% for turn in messages %}{{ '<|' + turn['role'] + '|>' + turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Tokenizer:
    """Our own tokenizer; `ChatTokenizer` has the same methods for those of other programs."""

    backend: tokenizers.Tokenizer

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

    @property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json`, with which `transformers` encodes conversations as we do."""
        special = {"pad_token": SPECIAL[PAD], "eos_token": SPECIAL[EOS]}
        return {**PLAIN, **special, "chat_template": TEMPLATE}

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text, in which a special token's name is text like any other."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, prompt: str | Turns) -> list[int]:
        """Tokens of a prompt, a string or turns, with the generation prompt at the end."""
        if isinstance(prompt, str):
            return [*self.text_ids(prompt), *self.generation_prompt]
        turns = [[ROLE_IDS[turn["role"]], *self.text_ids(turn["content"])] for turn in prompt]
        return [*chain.from_iterable(turns), *self.generation_prompt]

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        """Tokens of a response; an end-of-sequence token ends it unless it was cut short."""
        return self.text_ids(text) + [self.eos] * complete

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of tokens, without special ones."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder that exists."""
        with atomic(folder / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))
        write_json(folder / "tokenizer_config.json", self.settings)


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
        InputError: The file is missing or no tokenizer.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; a slow tokenizer's files are not read")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(f"{path}: not a tokenizer: {error}") from error


def special_as_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make text that spells a special token plain text: no user ends a turn by `<|eos|>`."""
    tokenizer.encode_special_tokens = True
    return tokenizer
