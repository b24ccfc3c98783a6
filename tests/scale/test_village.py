"""The village: what its pages say, and the true reward of a summary."""

import random

import pytest

from scale.data.village import (
    FACTS,
    PADDING,
    Diary,
    assess,
    read_page,
    village,
    write_page,
    write_summary,
)

PAGE = (
    "It rained all day. Nora lost a key in Oslo. Dan broke Pia's lamp. She took the bus to Lima. "
    "She slept well. In Paris she met Tom."
)
FIRST = {
    "prompt": "The sky was grey. Milo broke Sara's chair. Milo bought a green saw from Gus. "
    "In Paris he met Finn.",
    "completion": "Milo broke a chair, bought a saw and met Finn.",
}
DIARY = Diary("Nora", ("lost a key", "went to Lima", "met Tom"))


def test_a_page_by_hand():
    """Dan's deed is no fact of Nora's page, sleep is no event, and `she` is Nora."""
    assert read_page(PAGE) == DIARY


@pytest.mark.parametrize(
    ("summary", "reward"),
    [
        ("Nora lost a key, went to Lima and met Tom.", 3),
        ("Nora went to Lima and lost a key.", 2),
        ("  Nora met Tom. ", 1),
        ("Nora broke a lamp.", -1),  # Dan did
        ("Nora lost a ring and met Tom.", 0),
        ("Nora lost a key and lost a key on a quiet day.", 1 - 0.5 - 0.5),
        ("Nora lost a ring, lost a ring and lost a ring.", -1 - 0.5 - 0.5),
        ("Nora met Tom after lunch.", 0.5),
        ("Dan met Tom.", 1 - 1),
        ("Nora met Tom", 1 - 1),  # no full stop
        ("Nora met Tom and.", -1),  # no statement can be read
       
        ("Nora met Tom and lost a key and went to Lima.", 3 - 1),  # no villager writes so
        ("Nora met Tom, lost a key.", 2 - 1),
        ("met Tom.", -1 - 1),  # the name is missing, and so `Tom` alone is no statement
        ("Nora slept well.", -1),
        ("", -1 - 1),
        ("Nora.", -1),
    ],
)
def test_the_true_reward_by_hand(summary, reward):
    assert assess(DIARY, summary).reward == reward


def test_what_an_assessment_says():
    found = assess(DIARY, "Nora met Tom, broke a lamp and met Tom as usual.")
    assert (found.true, found.false, found.repeated) == (("met Tom",), ("broke a lamp",), 1)
    assert found.padded and found.grammatical and found.right_name


def test_every_page_and_every_human_summary_is_read_as_it_was_written():
    """The facts of a summary are found here by looking for them, one by one."""
    rng = random.Random(1)
    for _ in range(3000):
        page, diary = write_page(rng)
        assert read_page(page) == diary
        summary = write_summary(rng, diary)
        named = sum(fact in summary for fact in diary.facts)
        padded = any(words in summary for words in PADDING)
        assert named and not any(f in summary for f in FACTS - {*diary.facts})
        found = assess(diary, summary)
        assert found.grammatical and found.reward == named - 0.5 * padded


def test_a_false_statement_in_place_of_a_fact_costs_two():
    rng = random.Random(2)
    for _ in range(500):
        _, diary = write_page(rng)
        fact, other = rng.choice(diary.facts), rng.choice(sorted(FACTS - {*diary.facts}))
        summary = write_summary(rng, diary)
        after = assess(diary, summary.replace(fact, other)).reward
        assert after == assess(diary, summary).reward - 2 * (fact in summary)


def test_the_rows_are_a_function_of_their_number_and_the_seed():
    rows = village(2000, 3)
    assert rows == village(2000, 3) and rows[:500] == village(500, 3)
    assert len({row["prompt"] for row in rows}) == 2000
    others = {row["prompt"] for row in village(2000, 4)}
    assert sum(row["prompt"] in others for row in rows) < 40
    assert village(1, 0) == [FIRST]


def test_who_writes_how():
    """A quarter of the summaries names one event of several, about one in seven is padded."""
    rows = village(4000, 0)
    diaries = [read_page(row["prompt"]) for row in rows]
    found = [assess(d, row["completion"]) for d, row in zip(diaries, rows, strict=True)]
    lazy = sum(len(a.true) == 1 for a in found) / 4000
    assert lazy == pytest.approx(0.25, abs=0.02)
    assert sum(a.padded for a in found) / 4000 == pytest.approx(0.15, abs=0.02)
    assert {len(d.facts) for d in diaries} == {2, 3, 4}


@pytest.mark.parametrize(
    "text", ["", "The cat sat.", "It was cold.", "Nora lost a cow in Oslo.", "Nora slept"]
)
def test_a_text_that_is_no_page_is_refused(text):
    with pytest.raises(ValueError, match=r"not a sentence of a diary|no person"):
        read_page(text)
