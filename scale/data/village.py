"""A small world: diaries of villagers, their summaries, and the true reward of a summary.

A prompt is a page of a diary: one person's events, somebody else's, and sentences in which nothing
happens. Its summary (TL;DR) names the person and the events. All text comes from a few templates,
so that a model of 0.1 million parameters learns to write it without a mistake in its grammar, and
so that what a summary says can be compared with what the page says:

    It rained all day. Nora lost a key in Oslo. Dan broke Pia's lamp. She took the bus to Lima.

    Nora lost a key and went to Lima.               1 + 1 = 2
    Nora broke a lamp.                              -1, because Dan did
    Nora lost a key and lost a key on a quiet day.  1 - 0.5 - 0.5 = 0

The rows are a function of their number and the seed. Nothing is downloaded.
"""

import random
import re
from functools import lru_cache
from typing import NamedTuple

NUM_ROWS = 9000

WOMEN = ("Ann", "Cara", "Eva", "Hana", "Jill", "Lena", "Nora", "Pia", "Sara", "Uma")
MEN = ("Ben", "Dan", "Finn", "Gus", "Ivan", "Karl", "Milo", "Otto", "Ravi", "Tom")
PEOPLE = (*WOMEN, *MEN)
PRONOUNS = ("She", "He", "she", "he")
SLOTS: dict[str, tuple[str, ...]] = {
    "person": PEOPLE,
    "place": ("Oslo", "Lima", "Cairo", "Paris", "Delhi", "Perth", "Kyoto", "Turin"),
    "trinket": ("key", "ring", "map", "hat", "watch", "scarf"),
    "treasure": ("coin", "shell", "stone", "feather", "letter", "bone"),
    "animal": ("cow", "goat", "horse", "pig", "duck", "sheep"),
    "tool": ("saw", "rope", "spade", "brush", "hammer", "net"),
    "furniture": ("lamp", "chair", "clock", "cup", "table", "mirror"),
    "look": ("red", "blue", "green", "small"),
    "vehicle": ("bus", "train", "boat"),
    "meal": ("soup", "bread", "rice", "fish"),
    "sleep": ("late", "well", "badly"),
}

# what a diary says of an event, and what a summary says of it: the fact
EVENTS = (
    ("{who} lost a {trinket} in {place}", "lost a {trinket}"),
    ("{who} found a {look} {treasure}", "found a {treasure}"),
    ("{who} sold a {animal} to {person}", "sold a {animal}"),
    ("{who} bought a {look} {tool} from {person}", "bought a {tool}"),
    ("{who} broke {person}'s {furniture}", "broke a {furniture}"),
    ("In {place} {who} met {person}", "met {person}"),
    ("{who} took the {vehicle} to {place}", "went to {place}"),
)
ROUTINE = (("{who} ate {meal} for lunch", ""), ("{who} slept {sleep}", ""))  # no events: no facts
WEATHER = (
    *("It was cold", "The sky was grey", "It rained all day", "The sun was out"),
    *("There was a strong wind", "It was a quiet day"),
)
PADDING = (" on a quiet day", " after lunch", " as usual")

FACT, FALSE, REPEATED, PADDED, UNGRAMMATICAL, WRONG_NAME = 1.0, -1.0, -0.5, -0.5, -1.0, -1.0


class Diary(NamedTuple):
    """What a page says: its person, and the facts of that person in order."""

    person: str
    facts: tuple[str, ...]


class Assessment(NamedTuple):
    """What a summary says, and its true reward.

    Attributes:
        true: The facts of the page's person that it states, each once.
        false: Other statements, in the form of facts: of somebody else, or of nobody.
        repeated: How many statements it makes again.
        padded: Whether it ends with words that say nothing.
        grammatical: Whether it is one sentence of the form that people write.
        right_name: Whether it begins with the page's person.
    """

    true: tuple[str, ...]
    false: tuple[str, ...]
    repeated: int
    padded: bool
    grammatical: bool
    right_name: bool

    @property
    def reward(self) -> float:
        """+1 for a fact, -1 for a false statement, -0.5 for a repeated one and for padding, -1 for
        a text that is no summary, -1 for a wrong name."""
        return (
            FACT * len(self.true)
            + FALSE * len(self.false)
            + REPEATED * self.repeated
            + PADDED * self.padded
            + UNGRAMMATICAL * (not self.grammatical)
            + WRONG_NAME * (not self.right_name)
        )


def village(num_rows: int = NUM_ROWS, seed: int = 0) -> list[dict[str, str]]:
    """Rows `{prompt, completion}` with different prompts.

    A completion is what a villager wrote: no false statement and no repetition, but a quarter of
    them name only one event, and some end with padding.

    Args:
        num_rows: How many.
        seed: The same seed gives the same rows.

    Returns:
        The rows.
    """
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        prompt, diary = write_page(rng)
        rows.setdefault(prompt, write_summary(rng, diary))
    return [{"prompt": prompt, "completion": summary} for prompt, summary in rows.items()]


def write_page(rng: random.Random) -> tuple[str, Diary]:
    """A page: 2 to 4 events of one person, perhaps one of somebody else, and what is no event.

    The first sentence about anybody is the person's, with the name. Somebody else is of the other
    sex, so that a later pronoun always means the person.
    """
    women_first = rng.random() < 0.5
    person, other = map(rng.choice, (WOMEN, MEN) if women_first else (MEN, WOMEN))
    pronoun = "She" if women_first else "He"
    num_events = rng.choice((2, 2, 3, 3, 4))
    first, *events = (fill(rng, event, person) for event in rng.sample(EVENTS, num_events))
    sentences = [(*event, rng.choice((person, pronoun))) for event in events]
    if rng.random() < 0.3:
        sentences.append((*fill(rng, rng.choice(ROUTINE), person), pronoun))
    if rng.random() < 0.3:
        sentences.append((*fill(rng, (rng.choice(EVENTS)[0], ""), other), other))
    rng.shuffle(sentences)
    sentences.insert(0, (*first, person))
    texts = [with_subject(text, subject) for text, _, subject in sentences]
    texts.insert(rng.randint(0, len(texts)), rng.choice(WEATHER))
    return ". ".join(texts) + ".", Diary(person, tuple(fact for _, fact, _ in sentences if fact))


def fill(rng: random.Random, templates: tuple[str, str], who: str) -> tuple[str, str]:
    """A sentence, whose subject is left open, and its fact."""
    words = {slot: rng.choice(options) for slot, options in SLOTS.items()}
    words["person"] = rng.choice([name for name in PEOPLE if name != who])
    sentence, fact = (template.format(who="{who}", **words) for template in templates)
    return sentence, fact


def with_subject(sentence: str, subject: str) -> str:
    if not sentence.startswith("{who}") and subject not in PEOPLE:
        subject = subject.lower()
    return sentence.format(who=subject)


def write_summary(rng: random.Random, diary: Diary) -> str:
    """What a villager writes: a quarter names one event, a fifth two at most, others all."""
    lazy = rng.random()
    facts = list(diary.facts)
    if lazy < 0.25:
        facts = [rng.choice(facts)]
    elif lazy < 0.45:
        facts = facts[:2]
    padding = rng.choice(PADDING) if rng.random() < 0.15 else ""
    return f"{diary.person} {listed(facts)}{padding}."


def listed(facts: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(facts[:-1]), facts[-1]] if len(facts) > 1 else facts)


GROUPS = {
    name: f"(?P<{name}>{'|'.join(options)})"
    for name, options in (SLOTS | {"who": (*PEOPLE, *PRONOUNS)}).items()
}
SENTENCES = [(re.compile(text.format(**GROUPS)), fact) for text, fact in (*EVENTS, *ROUTINE)]
FACTS = {
    fact.format(**{slot: word})
    for _, fact in EVENTS
    for slot, words in SLOTS.items()
    for word in words
    if f"{{{slot}}}" in fact
}


@lru_cache(maxsize=2**14)
def read_page(prompt: str) -> Diary:
    """The person and the facts of a page, from its text.

    Raises:
        ValueError: The text is not a page of a diary.
    """
    person, facts = "", []
    for text in prompt.removesuffix(".").split(". "):
        match, fact = next(((m, f) for p, f in SENTENCES if (m := p.fullmatch(text))), (None, ""))
        if not match and text not in WEATHER:
            raise ValueError(f"not a sentence of a diary: {text!r}")
        if match:
            person = person or match["who"]
        if match and fact and match["who"] in (person, *PRONOUNS):
            facts.append(fact.format(**match.groupdict()))
    if not person:
        raise ValueError(f"no person in {prompt!r}")
    return Diary(person, tuple(facts))


def assess(diary: Diary, summary: str) -> Assessment:
    """What is true and what is false in a summary of a page."""
    text = summary.strip()
    body = text.removesuffix(".")
    padding = next((words for words in PADDING if body.endswith(words)), "")
    name, _, said = body.removesuffix(padding).partition(" ")
    statements = said.replace(" and ", ", ").split(", ")
    facts = [statement for statement in statements if statement in FACTS]
    stated = dict.fromkeys(facts)
    return Assessment(
        true=tuple(fact for fact in stated if fact in diary.facts),
        false=tuple(fact for fact in stated if fact not in diary.facts),
        repeated=len(facts) - len(stated),
        padded=bool(padding),
        grammatical=text.endswith(".") and statements == facts and said == listed(facts),
        right_name=name == diary.person,
    )
