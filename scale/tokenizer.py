"""Text to tokens: a byte-level BPE (Hugging Face `tokenizers`) with the turns of a conversation as special tokens.

A string prompt is one piece of text; a conversation is its turns, each opened by its role's token. Either way the
prompt ends with the assistant's token, so that where the response begins is never a guess.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from scale.rows import DataError

PAD, EOS = 0, 1
SPECIAL = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALLEST = 256 + len(SPECIAL)
ROLES = {name.strip("<|>"): i for i, name in enumerate(SPECIAL) if i > EOS}


@dataclass(frozen=True)
class Codec:
    tokenizer: Tokenizer

    @property
    def vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def prompt_ids(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Tokens of a prompt, a string or turns, up to and including the assistant's opening token."""
        if isinstance(prompt, str):
            return [*self.text_ids(prompt), ROLES["assistant"]]
        turns = [i for turn in prompt for i in (ROLES[turn["role"]], *self.text_ids(turn["content"]))]
        return [*turns, ROLES["assistant"]]

    def response_ids(self, text: str, complete: bool = True) -> list[int]:
        """Tokens of a response; an end-of-sequence token ends it unless it was cut short."""
        return self.text_ids(text) + [EOS] * complete

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        self.tokenizer.save(str(path))


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
    return literal(tokenizer)


def load_codec(path: Path) -> Codec:
    return literal(Tokenizer.from_file(str(path)))


def literal(tokenizer: Tokenizer) -> Codec:
    """Text that spells a special token is text: a user cannot end a turn by writing `<|eos|>`."""
    tokenizer.encode_special_tokens = True
    return Codec(tokenizer)
