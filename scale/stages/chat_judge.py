"""A language model as the judge of pairs of responses, behind an OpenAI-compatible endpoint.

Each pair is asked about in both orders, since such judges favour a place. A response wins where it
is preferred in both, and where the answer changes with the order it is a tie. Answers are kept in a
file under a hash of the question, so that none is paid for twice.

The key is that of `OPENAI_API_KEY`; it is not written anywhere.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from scale.console import track
from scale.errors import InputError
from scale.health import warn
from scale.statistics import bootstrap_interval

CONCURRENT = 8  # questions at a time
RETRIES = 5  # of a question, with the client's growing pauses
SECONDS = 120.0  # for an answer
KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # a server on one's own machine asks for none
QUESTION = """\
Compare two responses to the same prompt. The better one is more helpful, true and harmless; a
longer one is not better for its length.

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

Which response is better? Answer with one word: A, B or tie."""
ANSWER = re.compile(r"\W*(?:answer|response)?\W*(?:a (tie)\b|(A|B|tie)\b(?!\s+\w))", re.IGNORECASE)
A, B, TIE, REFUSED, MALFORMED = "a", "b", "tie", "refused", "malformed"
WIN, LOSS = (A, B), (B, A)  # answers to the question with ours first, and with ours second


@dataclass(frozen=True)
class ChatJudge:
    """A judge.

    Attributes:
        url: The endpoint, such as `http://localhost:8000/v1`.
        model: The name of the model there.
        kept: The file that keeps the answers.
    """

    url: str
    model: str
    kept: Path

    @cached_property
    def client(self) -> Any:
        """The client of the `openai` package.

        Raises:
            InputError: The package is missing, or the URL holds a password.
        """
        if "@" in urlsplit(self.url).netloc:
            raise InputError(f"--judge: a password in the URL; put the key into {KEY}")
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise InputError("--judge: needs pip install -e '.[judge]'") from error
        key = os.environ.get(KEY) or NO_KEY
        return OpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=SECONDS)

    def check(self) -> None:
        """Ask for a word, to refuse a judge that does not answer before any work.

        Raises:
            InputError: It does not answer.
        """
        answer = self.ask("Answer with one word: A, B or tie.", max_retries=0)
        if answer == MALFORMED:
            expected = "asked for one word, A, B or tie, it wrote something else"
            warn([f"{self.model}: {expected}; such answers are counted and left out"])

    def ask(self, question: str, **options: Any) -> str:
        """The answer to a question, in one of five words.

        Raises:
            InputError: None came, after all tries.
        """
        client = self.client.with_options(**options)
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=16,
            )
        except Exception as error:  # the client's own, and what its transport and parsers raise
            reason = " ".join(str(error).split()).replace(os.environ.get(KEY) or NO_KEY, "...")
            raise InputError(f"--judge {self.url}: {type(error).__name__}: {reason}") from None
        return word_of(reply)

    def answers(self, questions: Sequence[str]) -> list[str]:
        """The answers to questions; those that were asked before are read from the file."""
        known, lock = self.read(), threading.Lock()
        keys = [self.key(question) for question in questions]
        missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in known}
        self.kept.parent.mkdir(parents=True, exist_ok=True)

        def ask(item: tuple[str, str]) -> None:
            key, question = item
            known[key] = self.ask(question)
            with lock, self.kept.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": key, "answer": known[key]}))

        with ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                asked = pool.map(ask, missing.items())
                for _ in track(range(len(missing)), f"judged by {self.model}"):
                    next(asked)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [known[key] for key in keys]

    def key(self, question: str) -> str:
        return hashlib.sha256(json.dumps([self.model, question]).encode()).hexdigest()

    def read(self) -> dict[str, str]:
        """The answers in the file, in which a kill may have left a line incomplete."""
        known: dict[str, str] = {}
        lines = self.kept.read_text(encoding="utf-8").split("\n") if self.kept.exists() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                known[record["key"]] = record["answer"]
        return known

    def compare(
        self, prompts: Sequence[Any], ours: Sequence[str], theirs: Sequence[str]
    ) -> dict[str, Any]:
        """Shares of wins, ties and losses of our responses, each with its 95% interval.

        Args:
            prompts: Texts or turns [N].
            ours: Responses [N].
            theirs: Responses [N].

        Returns:
            `win`, `tie` and `loss`, each [share, low, high], over the pairs that were answered in
            both orders; how many these are; of how many the same place was named in both orders;
            how many answers were refused and malformed.
        """
        texts = [conversation(prompt) for prompt in prompts]
        both = [
            QUESTION.format(prompt=prompt, first=first, second=second)
            for prompt, own, other in zip(texts, ours, theirs, strict=True)
            for first, second in ((own, other), (other, own))
        ]
        answers = self.answers(both)
        pairs = list(zip(answers[::2], answers[1::2], strict=True))
        usable = [pair for pair in pairs if not {REFUSED, MALFORMED} & set(pair)]
        outcomes = {
            "win": np.array([pair == WIN for pair in usable], float),
            "loss": np.array([pair == LOSS for pair in usable], float),
        }
        outcomes["tie"] = 1 - outcomes["win"] - outcomes["loss"]
        shares = {name: with_interval(outcomes[name]) for name in ("win", "tie", "loss")}
        return shares | {
            "pairs": len(usable),
            "changed with the order": sum(first == second != TIE for first, second in usable),
            "refused": answers.count(REFUSED),
            "malformed": answers.count(MALFORMED),
        }


def word_of(reply: Any) -> str:
    """The answer that a reply of the endpoint gives."""
    try:
        message = reply.choices[0].message
    except (AttributeError, IndexError, TypeError):
        return MALFORMED
    if getattr(message, "refusal", None):
        return REFUSED
    matched = ANSWER.match(message.content or "")
    return (matched[1] or matched[2]).lower() if matched else MALFORMED


def with_interval(outcomes: np.ndarray) -> list[float]:
    """The mean and its bootstrap interval."""
    if not len(outcomes):
        return [0.0, 0.0, 1.0]
    return [float(outcomes.mean()), *bootstrap_interval(outcomes)]


def conversation(prompt: Any) -> str:
    """A prompt as text, each turn under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
