"""Level 3: writes and checks the vectors of rows and token ids.

What is expected is written out by hand.
"""

import pytest

from tests.conformance.vectors import case, vector_file


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def split(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def value(name, flags, comment, inputs, *answer):
    return case(name, flags, comment, {}, inputs, split(*answer))


def refused(name, flags, comment, inputs):
    return case(name, flags, comment, {}, inputs, result="reject")


SKY, BLUE = [user("What colour is the sky?")], [user("And at night?")]
OPEN = [*SKY, bot("Blue."), *BLUE]
SYSTEM = [{"role": "system", "content": "Be brief."}]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: The sky?\n\nAssistant:"

EXPLICIT = [
    value(
        "text",
        "character-split",
        "three texts; the shared beginning of the responses is not the prompt's",
        split("The colour of the sky", " is blue", " is blue."),
        "The colour of the sky",
        " is blue",
        " is blue.",
    ),
    value(
        "turns",
        "character-split",
        "a prompt of turns, replies of one turn",
        split(OPEN, [bot("Black.")], [bot("Blue, still.")]),
        OPEN,
        "Black.",
        "Blue, still.",
    ),
    value(
        "prefix",
        "character-split",
        "one response begins with all of the other",
        split(SKY, [bot("Blue")], [bot("Blue, mostly")]),
        SKY,
        "Blue",
        "Blue, mostly",
    ),
    value(
        "white-space",
        "white-space",
        "white space belongs to where it stands",
        split("Q: why?\n", " because\n", "\nwhy not"),
        "Q: why?\n",
        " because\n",
        "\nwhy not",
    ),
    refused("no-rejected", "missing-field", "no rejected response", {"prompt": "a", "chosen": "b"}),
    refused("no-chosen", "missing-field", "no chosen response", {"prompt": "a", "rejected": "b"}),
    refused("no-prompt", "missing-field", "no prompt", {"chosen": "a", "rejected": "b"}),
    refused(
        "two-turns",
        "last-turn",
        "a reply of two turns",
        split(SKY, [bot("Blue."), *BLUE], [bot("Red.")]),
    ),
    refused(
        "user-reply",
        "last-turn",
        "the reply is the user's",
        split(SKY, [user("Blue")], [user("Red")]),
    ),
]

CONVERSATIONS = [
    value(
        "one-turn",
        "character-split",
        "the conversations share their first letters too",
        {"chosen": [*SKY, bot("The sky is blue.")], "rejected": [*SKY, bot("The sky is")]},
        SKY,
        "The sky is blue.",
        "The sky is",
    ),
    value(
        "several-turns",
        "character-split last-turn",
        "all but the last turn is the prompt",
        {"chosen": [*OPEN, bot("Black.")], "rejected": [*OPEN, bot("Blue.")]},
        OPEN,
        "Black.",
        "Blue.",
    ),
    value(
        "system",
        "last-turn",
        "a system turn is part of the prompt",
        {"chosen": [*SYSTEM, *SKY, bot("Blue.")], "rejected": [*SYSTEM, *SKY, bot("It depends.")]},
        [*SYSTEM, *SKY],
        "Blue.",
        "It depends.",
    ),
    value(
        "with-prompt",
        "character-split",
        "UltraFeedback: a prompt of text beside whole conversations",
        {
            "prompt": SKY[0]["content"],
            "chosen": [*SKY, bot("Blue.")],
            "rejected": [*SKY, bot("Bluish.")],
        },
        SKY,
        "Blue.",
        "Bluish.",
    ),
    value(
        "same-start-turns",
        "character-split",
        "an earlier reply equals the start of the last ones",
        {
            "chosen": [*SKY, bot("Blue."), *BLUE, bot("Blue. No: black.")],
            "rejected": [*SKY, bot("Blue."), *BLUE, bot("Blue.")],
        },
        OPEN,
        "Blue. No: black.",
        "Blue.",
    ),
    refused(
        "other-context",
        "last-turn",
        "the conversations differ before the last turn",
        {
            "chosen": [*SKY, bot("Blue."), *BLUE, bot("Black.")],
            "rejected": [*SKY, bot("Red."), *BLUE, bot("Black")],
        },
    ),
    refused(
        "other-prompt",
        "last-turn",
        "the conversations do not begin with the prompt",
        {"prompt": "Why?", "chosen": [*SKY, bot("Blue.")], "rejected": [*SKY, bot("Bluish.")]},
    ),
    refused(
        "no-rejected", "missing-field", "no rejected conversation", {"chosen": [*SKY, bot("Blue.")]}
    ),
    refused(
        "user-last",
        "last-turn",
        "the last turn is the user's",
        {"chosen": OPEN, "rejected": OPEN[:-1] + SKY},
    ),
]

TEXT = [
    value(
        "one-turn",
        "character-split white-space",
        "the mark itself ends the prompt",
        {
            "chosen": "\n\nHuman: Sky?\n\nAssistant: It is blue.",
            "rejected": "\n\nHuman: Sky?\n\nAssistant: It is",
        },
        "\n\nHuman: Sky?\n\nAssistant:",
        " It is blue.",
        " It is",
    ),
    value(
        "several-turns",
        "character-split last-turn",
        "only the last mark cuts",
        {"chosen": HH + " Blue.", "rejected": HH + " Blue"},
        HH,
        " Blue.",
        " Blue",
    ),
    value(
        "mark-in-a-line",
        "character-split",
        "'Assistant:' inside a line is no mark",
        {"chosen": HH + " Ask the Assistant: me.", "rejected": HH + " Ask the Assistant: him."},
        HH,
        " Ask the Assistant: me.",
        " Ask the Assistant: him.",
    ),
    refused(
        "user-last",
        "last-turn",
        "the text ends with a human turn",
        {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c\n\nHuman: b"},
    ),
    refused(
        "no-human",
        "missing-field",
        "no human turn",
        {"chosen": "The sky?\n\nAssistant: blue", "rejected": "The sky?\n\nAssistant: red"},
    ),
    refused(
        "no-marks",
        "missing-field",
        "there is no prompt to be found",
        {"chosen": "blue", "rejected": "red"},
    ),
    refused(
        "other-context",
        "last-turn",
        "the conversations differ before the last turn",
        {"chosen": HH + " a", "rejected": HH.replace("sky", "sea") + " b"},
    ),
]


def ids(
    name,
    flags,
    comment,
    kept,
    chosen=((5, 6), True),
    rejected=((5,), True),
    prompt=(7, 8, 9),
    limit=4,
    pad=0,
):
    (c, c_complete), (r, r_complete) = chosen, rejected
    inputs = {
        "prompt_ids": list(prompt),
        "chosen_ids": list(c),
        "rejected_ids": list(r),
        "chosen_complete": c_complete,
        "rejected_complete": r_complete,
    }
    wanted = {
        "prompt_ids": list(kept),
        "chosen_ids": [*c, *[1] * c_complete],
        "rejected_ids": [*r, *[1] * r_complete],
    }
    return case(
        name,
        flags,
        comment,
        {"eos_id": 1, "pad_id": pad, "max_prompt_length": limit},
        inputs,
        wanted,
    )


def token_cases(long, over):
    return [
        ids(
            "eos",
            "eos-lost eos-doubled",
            "both responses end with the end-of-sequence token",
            (7, 8, 9),
        ),
        ids(
            "truncated",
            "eos-on-truncated eos-lost",
            "the rejected response was cut: it does not end",
            (7, 8, 9),
            rejected=((5, 6, 7), False),
        ),
        ids(
            "chosen-truncated",
            "eos-on-truncated eos-lost",
            "the chosen response was cut: it does not end, and the rejected one does",
            (7, 8, 9),
            chosen=((5, 6, 7), False),
        ),
        ids(
            "pad-is-eos",
            "pad-is-eos eos-lost",
            "padding has the id of end-of-sequence",
            (7, 8, 9),
            pad=1,
        ),
        ids(
            "exact-fit",
            "truncation-side",
            "a prompt as long as allowed",
            (6, 7, 8, 9),
            prompt=(6, 7, 8, 9),
        ),
        ids(
            "long-prompt", "truncation-side", "two tokens too many", long, prompt=(4, 5, 6, 7, 8, 9)
        ),
        ids("limit-one", "truncation-side", "room for one token of the prompt", over, limit=1),
        ids(
            "empty-response",
            "eos-lost eos-doubled",
            "to say nothing is to end at once",
            (7, 8, 9),
            rejected=((), True),
        ),
    ]


EXACT = {dtype: {"values": (0.0, 0.0)} for dtype in ("float64", "float32", "bfloat16")}


def file(dialect, equation, cases):
    return vector_file(
        "data", dialect, equation, "shared formats of the field", cases, EXACT, "json"
    )


FILES = {
    "explicit": (
        "prompt, chosen and rejected stand in the row; a reply is text or one assistant turn",
        EXPLICIT,
    ),
    "conversations": (
        "the prompt is all turns before the last; the last turns are the responses",
        CONVERSATIONS,
    ),
    "hh-text": ("the prompt ends with the last '\\n\\nAssistant:'; the rest is the response", TEXT),
    "tokens-keep-end": (
        "prompt[-max_prompt_length:]; response + [eos_id] where complete",
        token_cases((6, 7, 8, 9), (9,)),
    ),
    "tokens-keep-start": (
        "prompt[:max_prompt_length]; response + [eos_id] where complete",
        token_cases((4, 5, 6, 7), (7,)),
    ),
}


@pytest.mark.parametrize("dialect", FILES)
def test_vectors(dialect, check_vectors):
    check_vectors(file(dialect, *FILES[dialect]))
