import gzip
import json
import math
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data import rows as rows_module
from scale.data.rows import column_types, provenance, read, require, split, write
from scale.errors import InputError

HH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "hh_helpful_dev.jsonl"
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
SFT = ("prompt", "completion")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(tmp_path: Path, *rows) -> Path:
    """A file of rows; bytes and strings are lines as they are."""
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return path


def fault(path: Path, need=("prompt", "chosen", "rejected")) -> str:
    """The message of the error, less the file's folder."""
    with pytest.raises(InputError) as caught:
        read(path, need)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.replace(str(path), path.name)


CHAT = [user("q"), says("a"), user("r")]
SYSTEM = {"role": "system", "content": "s"}
FORMATS = {
    "strings": (PAIR, "p"),
    "prompt turns, replies as text": ({**PAIR, "prompt": CHAT}, CHAT),
    "all lists": ({"prompt": CHAT, "chosen": [says("good")], "rejected": [says("bad")]}, CHAT),
    "text prompt, reply lists": (
        {"prompt": "p", "chosen": [says("good")], "rejected": [says("bad")]},
        "p",
    ),
    "prompt turns and conversations": (
        {"prompt": CHAT, "chosen": [*CHAT, says("good")], "rejected": [*CHAT, says("bad")]},
        CHAT,
    ),
    "UltraFeedback": (
        {"prompt": "p", "chosen": [user("p"), says("good")], "rejected": [user("p"), says("bad")]},
        [user("p")],
    ),
    "UltraFeedback with a system turn": (
        {
            "prompt": "p",
            "chosen": [SYSTEM, user("p"), says("good")],
            "rejected": [SYSTEM, user("p"), says("bad")],
        },
        [SYSTEM, user("p")],
    ),
    "conversations": ({"chosen": [*CHAT, says("good")], "rejected": [*CHAT, says("bad")]}, CHAT),
    "HH": (
        {"chosen": "\n\nHuman: q\n\nAssistant:good", "rejected": "\n\nHuman: q\n\nAssistant:bad"},
        "\n\nHuman: q\n\nAssistant:",
    ),
    "summaries": (
        {"info": {"post": "p"}, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1},
        "p",
    ),
    "summaries with title and subreddit": (
        {
            "info": {"id": "t3", "post": "p", "title": "t", "subreddit": "s", "site": None},
            "summaries": [{"text": "good", "policy": "ref"}, {"text": "bad", "policy": "sup"}],
            "choice": 0,
            "extra": {"confidence": 3},
        },
        "r/s\n\nt\n\np",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_prompt_chosen_rejected(tmp_path, name):
    raw, prompt = FORMATS[name]
    wanted = {"prompt": prompt, "chosen": "good", "rejected": "bad"}
    assert read(jsonl(tmp_path, raw, raw)) == [wanted] * 2
    pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [wanted]
    assert read(tmp_path / "rows.parquet", SFT) == [wanted | {"completion": "good"}]
    assert read(tmp_path / "rows.parquet", ("prompt",)) == [wanted]


@pytest.mark.parametrize("completion", ["c", [says("c")]])
def test_completions(tmp_path, completion):
    assert read(jsonl(tmp_path, {"prompt": "p", "completion": completion}), SFT) == [
        {"prompt": "p", "completion": "c"}
    ]


def test_prompts_alone(tmp_path):
    assert read(jsonl(tmp_path, {"prompt": CHAT}), ("prompt",)) == [{"prompt": CHAT}]


def test_json_suffix_blank_end_and_carriage_returns(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes((json.dumps(PAIR) + "\r\n" + json.dumps(PAIR) + "\r\n\n  \n").encode())
    assert read(path) == [PAIR, PAIR]


def test_a_byte_order_mark_and_gzip(tmp_path):
    line = (json.dumps(PAIR) + "\n").encode()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(line * 2))
    assert read(tmp_path / "bom.jsonl") == [PAIR]
    assert read(tmp_path / "rows.jsonl.gz") == [PAIR] * 2
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(line)[:-9])
    for name in ("cut.jsonl.gz", "text.jsonl.gz"):
        (tmp_path / "text.jsonl.gz").write_bytes(line)
        with pytest.raises(InputError, match=f"{name}: cannot read the file"):
            read(tmp_path / name)


def test_a_rejected_response_may_say_nothing(tmp_path):
    for text in ("", " "):
        assert read(jsonl(tmp_path, PAIR | {"rejected": text})) == [PAIR | {"rejected": text}]


def test_sharegpt_preferences_of_llama_factory(tmp_path):
    raw = {
        "conversations": [
            {"from": "human", "value": "the cat"},
            {"from": "gpt", "value": "sat"},
            {"from": "human", "value": "on?"},
        ],
        "chosen": {"from": "gpt", "value": "the mat"},
        "rejected": {"from": "gpt", "value": "no"},
        "system": "Be kind.",
    }
    system = {"role": "system", "content": "Be kind."}
    prompt = [system, user("the cat"), says("sat"), user("on?")]
    expected = {"prompt": prompt, "chosen": "the mat", "rejected": "no"}
    assert read(jsonl(tmp_path, raw)) == [expected]
    table = pa.Table.from_pylist([raw])
    large = [
        f.with_type(pa.large_string()) if f.type == pa.string() else f for f in table.schema
    ]
    pq.write_table(table.cast(pa.schema(large)), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [expected]


def test_a_content_in_parts_is_one_text(tmp_path):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    raw = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert read(jsonl(tmp_path, raw))[0]["prompt"] == [user("the cat")]


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "chosen": "c"}')
    with pytest.raises(InputError, match=r"rows\.jsonl:1: field 'chosen': is there twice"):
        read(tmp_path / "rows.jsonl")
    columns = [pa.array(["a"])] * 4
    table = pa.Table.from_arrays(columns, ["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: field 'chosen': is there twice"):
        read(tmp_path / "rows.parquet")


def test_a_system_column_opens_the_conversation(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    for prompt in ("the cat", [user("the cat")]):
        raw = PAIR | {"prompt": prompt, "system": "Be kind."}
        [row] = read(jsonl(tmp_path, raw))
        assert row == PAIR | {"prompt": [system, user("the cat")]}


def test_a_response_is_never_split_inside_its_turn(tmp_path):
    head = "\n\nHuman: What is blue?\n\nAssistant: Much.\n\nHuman: Such as?\n\nAssistant:"
    [row] = read(
        jsonl(tmp_path, {"chosen": head + " The sky is", "rejected": head + " The sky is blue."})
    )
    assert row == {"prompt": head, "chosen": " The sky is", "rejected": " The sky is blue."}
    turns = [user("What is blue?")]
    raw = {"chosen": [*turns, says("The sky is")], "rejected": [*turns, says("The sky is blue.")]}
    assert read(jsonl(tmp_path, raw)) == [
        {"prompt": turns, "chosen": "The sky is", "rejected": "The sky is blue."}
    ]


def test_columns_are_kept(tmp_path):
    columns = {
        "score_chosen": [1.0, -2.5],
        "score_rejected": [0.5, 0.0],
        "ref_chosen_logps": -3.5,
        "ref_rejected_logps": 0.0,
        "ref_sample": "",
        "ref_sample_complete": False,
        "ref_sample_logps": -1.0,
        "source": "web",
        "id": 7,
        "weight": 0.5,
        "flag": True,
        "samples": ["a", ""],
        "complete": [True, False],
    }
    raw = PAIR | columns | {"messages": [user("dropped")], "meta": {"dropped": 1}, "nothing": None}
    [row] = read(jsonl(tmp_path, raw))
    assert row == PAIR | columns
    write(tmp_path / "rows.parquet", [row], {})
    assert read(tmp_path / "rows.parquet") == [row]


@pytest.mark.skipif(not HH.exists(), reason=f"no {HH}")
def test_real_preferences(tmp_path):
    rows = read(HH)
    assert len(rows) == 1153
    whole = [{f: row["prompt"] + row[f] for f in ("chosen", "rejected")} for row in rows]
    assert read(jsonl(tmp_path, *whole)) == rows
    parts = split(rows, {"train": 0.8, "test": 0.2}, seed=0)
    assert abs(len(parts["test"]) / 1153 - 0.2) < 0.04


HH_ROW = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
ROW_FAULTS = {
    "malformed": ('{"prompt": ', "malformed JSON: "),
    "blank line": ("", "malformed JSON: "),
    "deep": ("[" * 100_000, "malformed JSON: "),
    "array": ("[1]", "not a JSON object but a list"),
    "text": ('"x"', "not a JSON object but text"),
    "UTF-8": (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 13"),
    "surrogate": (PAIR | {"chosen": "\ud800"}, "field 'chosen': invalid Unicode"),
    "surrogate elsewhere": (PAIR | {"id": "\ud800"}, "field 'id': invalid Unicode"),
    "surrogate in a name": (PAIR | {"\ud800": 1}, r"field '\ud800': invalid Unicode"),
    "no chosen": (
        {"prompt": "p", "rejected": "b"},
        "field 'chosen': missing; the row has prompt, rejected",
    ),
    "no rejected": ({"prompt": "p", "chosen": "b"}, "field 'rejected': missing"),
    "null": (PAIR | {"rejected": None}, "field 'rejected': missing"),
    "nothing": ({}, "field 'prompt': missing; the row has nothing"),
    "number": (
        PAIR | {"chosen": 3},
        "field 'chosen': must be text or a list of turns, not a number",
    ),
    "boolean": (
        PAIR | {"prompt": True},
        "field 'prompt': must be text or a list of turns, not a bool",
    ),
    "object": (
        PAIR | {"prompt": {}},
        "field 'prompt': must be text or a list of turns, not an object",
    ),
    "empty chosen": (PAIR | {"chosen": ""}, "field 'chosen': empty"),
    "blank chosen": (PAIR | {"chosen": " \n"}, "field 'chosen': empty"),
    "sharegpt and prompt": (
        PAIR | {"conversations": [{"from": "human", "value": "a"}]},
        "field 'conversations': the row has a 'prompt' too",
    ),
    "image part": (
        PAIR | {"prompt": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
        "field 'prompt[0].content[0]': must be a part of type 'text'",
    ),
    "blank system": (PAIR | {"system": " "}, "field 'system': empty"),
    "two systems": (
        PAIR | {"system": "a", "prompt": [{"role": "system", "content": "b"}, user("c")]},
        "field 'system': the conversation has a system turn of its own",
    ),
    "system and HH text": (
        PAIR | {"system": "a", "prompt": "\n\nHuman: b\n\nAssistant:"},
        "field 'system': beside Anthropic HH text; give the prompt as turns",
    ),
    "sharegpt without a name": (
        {"conversations": [{"from": ["human"], "value": "x"}], "chosen": "a", "rejected": "b"},
        "field 'prompt[0].from': must be text, not a list",
    ),
    "tools": (PAIR | {"tools": ["t"]}, "field 'tools': a prompt with tools is not supported"),
    "blank prompt": (PAIR | {"prompt": "\t "}, "field 'prompt': empty"),
    "no turns": (PAIR | {"prompt": []}, "field 'prompt': must end with a user turn"),
    "blank turn": (PAIR | {"prompt": [user(" ")]}, "field 'prompt': empty"),
    "identical": (PAIR | {"rejected": "good"}, "field 'rejected': identical to 'chosen'"),
    "no role": (
        PAIR | {"prompt": [{"content": "x"}]},
        "field 'prompt[0]': a turn's keys are role and content, not content",
    ),
    "other key": (
        PAIR | {"prompt": [user("x") | {"name": "y"}]},
        "field 'prompt[0]': a turn's keys are role and content, not role, content, name",
    ),
    "role": (
        PAIR | {"prompt": [user("x"), {"role": "human", "content": "x"}]},
        "field 'prompt[1]': role must be one of system, user, assistant, not 'human'",
    ),
    "content": (
        PAIR | {"prompt": [{"role": "user", "content": 3}]},
        "field 'prompt[0].content': must be text, not a number",
    ),
    "turn": (PAIR | {"prompt": ["x"]}, "field 'prompt[0]': must be an object"),
    "user last": (
        PAIR | {"chosen": [user("x")]},
        "field 'chosen': must end with an assistant turn",
    ),
    "other opening": (
        {"prompt": "p", "chosen": [user("P"), says("a")], "rejected": [user("P"), says("b")]},
        "field 'chosen': the conversation does not begin with the prompt",
    ),
    "other turns": (
        {"prompt": CHAT, "chosen": [user("P"), says("a")], "rejected": [user("P"), says("b")]},
        "field 'chosen': the conversation does not begin with the prompt",
    ),
    "reply alone": (
        {"chosen": [says("a")], "rejected": [says("b")]},
        "field 'prompt': missing, and 'chosen' is a reply alone",
    ),
    "lists differ": (
        {"chosen": [user("p"), says("a")], "rejected": [user("P"), says("b")]},
        "field 'rejected': the conversations differ before the last turn",
    ),
    "texts differ": (
        HH_ROW | {"rejected": "\n\nHuman: Q\n\nAssistant: b"},
        "field 'rejected': the conversations differ before the last turn",
    ),
    "turns differ in number": (
        HH_ROW | {"rejected": HH_ROW["chosen"] + "\n\nHuman: r\n\nAssistant: b"},
        "field 'rejected': the conversations differ before the last turn",
    ),
    "human last": (
        HH_ROW | {"chosen": HH_ROW["chosen"] + "\n\nHuman: r"},
        "field 'chosen': the conversation does not end with an assistant turn",
    ),
    "no markers": (
        {"chosen": "The sky is", "rejected": "The sky is blue."},
        "field 'prompt': missing, and 'chosen' has no '\\n\\nHuman:' and",
    ),
    "no human": (
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        "field 'prompt': missing, and 'chosen' has no",
    ),
    "NaN": (
        PAIR | {"score_chosen": math.nan, "score_rejected": 1},
        "field 'score_chosen': must be finite, not nan",
    ),
    "infinity": (
        PAIR | {"score_chosen": 0, "score_rejected": -math.inf},
        "field 'score_rejected': must be finite, not -inf",
    ),
    "huge": (
        PAIR | {"score_chosen": 10**400, "score_rejected": 1},
        "field 'score_chosen': must be fin",
    ),
    "infinite in float32": (
        PAIR | {"ref_chosen_logps": -3.5e38},
        "field 'ref_chosen_logps': too large for float32: -3.5e+38",
    ),
    "NaN of several": (
        PAIR | {"score_chosen": [0, 1, math.nan], "score_rejected": [1, 2, 3]},
        "field 'score_chosen[2]': must be finite, not nan",
    ),
    "text score": (
        PAIR | {"score_chosen": "1", "score_rejected": 1},
        "field 'score_chosen': must be a number, not text",
    ),
    "boolean score": (
        PAIR | {"score_chosen": True, "score_rejected": 1},
        "field 'score_chosen': must be a number, not a boolean",
    ),
    "no scores": (
        PAIR | {"score_chosen": [], "score_rejected": []},
        "field 'score_chosen': an empty list of scores",
    ),
    "one score": (
        PAIR | {"score_chosen": 1},
        "field 'score_rejected': no score, but 'score_chosen' has a number",
    ),
    "two and three": (
        PAIR | {"score_chosen": [1, 2], "score_rejected": [1, 2, 3]},
        "field 'score_rejected': a list of 3, but 'score_chosen' has a list of 2",
    ),
    "positive log-probability": (
        PAIR | {"ref_chosen_logps": 0.1},
        "field 'ref_chosen_logps': a log-probability must be at most 0",
    ),
    "infinite log-probability": (
        PAIR | {"ref_rejected_logps": -math.inf},
        "field 'ref_rejected_logps': must be finite, not -inf",
    ),
    "sample's log-probability": (
        PAIR | {"ref_sample_logps": "x"},
        "field 'ref_sample_logps': must be a number, not text",
    ),
    "sample": (PAIR | {"ref_sample": 1}, "field 'ref_sample': must be text, not a number"),
    "sample's end": (
        PAIR | {"ref_sample_complete": 1},
        "field 'ref_sample_complete': must be true or false, not a number",
    ),
    "end of a response": (
        PAIR | {"chosen_complete": "yes"},
        "field 'chosen_complete': must be true or false, not text",
    ),
    "no post": ({"info": {}, "summaries": [], "choice": 0}, "field 'info.post': missing"),
    "blank post": (
        {"info": {"post": " "}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        "field 'info.post': empty",
    ),
    "three summaries": (
        {"info": {"post": "p"}, "summaries": [{"text": "a"}] * 3, "choice": 0},
        "field 'summaries': must be a list of two",
    ),
    "summary": (
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": " "}], "choice": 0},
        "field 'summaries[1].text': empty",
    ),
    "no choice": (
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}]},
        "field 'choice': missing",
    ),
    "choice": (
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2},
        "field 'choice': must be 0 or 1, not 2",
    ),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, name):
    row, message = ROW_FAULTS[name]
    assert fault(jsonl(tmp_path, PAIR, row, PAIR)).startswith(f"rows.jsonl:2: {message}")


def test_a_rejected_reply_that_says_nothing_is_a_reply(tmp_path):
    assert read(jsonl(tmp_path, PAIR | {"rejected": " "})) == [PAIR | {"rejected": " "}]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            PAIR,
            FORMATS["all lists"][0],
            "prompt (turns), chosen (reply), rejected (reply), "
            "but {} has prompt (text), chosen (text), rejected (text)",
        ),
        (
            PAIR,
            HH_ROW,
            "chosen (text), rejected (text), "
            "but {} has prompt (text), chosen (text), rejected (text)",
        ),
        (
            HH_ROW,
            FORMATS["conversations"][0],
            "chosen (conversation), rejected (conversation), "
            "but {} has chosen (text), rejected (text)",
        ),
        (
            PAIR,
            FORMATS["summaries"][0],
            "a summarize-from-feedback comparison, "
            "but {} has prompt (text), chosen (text), rejected (text)",
        ),
    ],
)
def test_mixed_formats(tmp_path, first, second, message):
    path = jsonl(tmp_path, first, first, second)
    assert fault(path) == f"rows.jsonl:3: mixed formats: {message.format('rows.jsonl:1')}"


@pytest.mark.parametrize(
    ("other", "what"), [({}, "no score"), ({"score_chosen": 1, "score_rejected": 2}, "a number")]
)
def test_every_row_has_as_many_scores(tmp_path, other, what):
    scored = PAIR | {"score_chosen": [1, 2], "score_rejected": [3, 4]}
    assert fault(jsonl(tmp_path, scored, PAIR | other)) == (
        f"rows.jsonl:2: field 'score_chosen': {what}, but rows.jsonl:1 has a list of 2"
    )


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_an_empty_file(tmp_path, content):
    assert fault(jsonl(tmp_path, content)) == "rows.jsonl: the file has no rows"
    write(tmp_path / "rows.parquet", [], {})
    assert fault(tmp_path / "rows.parquet") == "rows.parquet: the file has no rows"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_missing_file(tmp_path, name):
    assert fault(tmp_path / name) == f"{name}: cannot read the file: No such file or directory"


def test_an_unknown_suffix(tmp_path):
    assert fault(tmp_path / "rows.csv") == (
        "rows.csv: suffix '.csv'; accepted are .jsonl, .json (lines), these with .gz, and .parquet"
    )


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    assert fault(tmp_path / "rows.parquet").startswith("rows.parquet: malformed Parquet: ")


def test_invalid_utf8_in_a_parquet_file(tmp_path):
    text = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "rows.parquet")
    assert fault(tmp_path / "rows.parquet").startswith("rows.parquet: invalid UTF-8: ")


def test_a_parquet_row_is_named_by_its_number(tmp_path):
    pq.write_table(pa.Table.from_pylist([PAIR, PAIR | {"chosen": None}]), tmp_path / "rows.parquet")
    assert fault(tmp_path / "rows.parquet") == (
        "rows.parquet: row 2: field 'chosen': missing; the row has prompt, rejected"
    )


@pytest.mark.parametrize(
    ("row", "field"),
    [({"prompt": "p"}, "completion"), ({"completion": "c"}, "prompt"), ({"id": 1}, "prompt")],
)
def test_missing_fields_of_completions(tmp_path, row, field):
    assert fault(jsonl(tmp_path, row), SFT).startswith(f"rows.jsonl:1: field '{field}': missing")


@pytest.mark.parametrize(
    "column",
    [{"ref_sample": "s"}, {"ref_sample_logps": -1.0}, {"ref_chosen_logps": -1.0}],
)
def test_columns_of_pi_ref_are_in_all_rows_or_in_none(tmp_path, column):
    [name] = column
    path = jsonl(tmp_path, PAIR | column, PAIR)
    assert fault(path) == f"rows.jsonl:2: field '{name}': no value, but rows.jsonl:1 has a value"
    path = jsonl(tmp_path, PAIR, PAIR | column)
    assert fault(path) == f"rows.jsonl:2: field '{name}': a value, but rows.jsonl:1 has no value"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
turns = st.lists(st.builds(dict, role=st.sampled_from(["user", "assistant"]), content=texts)).map(
    lambda before: [*before, user("last")]
)


@st.composite
def tables(draw):
    """Rows of one format, with some of the computed columns."""
    k = draw(st.integers(0, 3))
    score = st.lists(finite, min_size=k, max_size=k) if k else finite
    columns = {
        "score": {"score_chosen": score, "score_rejected": score},
        "ref": {"ref_chosen_logps": st.floats(-1e9, 0), "ref_rejected_logps": st.floats(-1e9, 0)},
        "sample": {
            "ref_sample": st.text(st.characters(exclude_categories=["Cs"])),
            "ref_sample_complete": st.booleans(),
            "ref_sample_logps": st.floats(-1e9, 0),
        },
    }
    kept = [columns[name] for name in draw(st.sets(st.sampled_from(sorted(columns))))]
    extra = {
        "id": st.integers(-(2**63), 2**63 - 1),
        "note": st.text(st.characters(exclude_categories=["Cs"])),
    }
    fields = {"prompt": draw(st.sampled_from([texts, turns])), "chosen": texts, "rejected": texts}
    for group in kept:
        fields |= group
    rows = st.fixed_dictionaries(fields, optional=extra).filter(
        lambda row: row["chosen"] != row["rejected"]
    )
    return draw(st.lists(rows, min_size=1, max_size=5))


@settings(deadline=None, max_examples=60)
@given(tables())
def test_written_rows_are_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("round")
    write(folder / "rows.parquet", rows, {"model": "m"})
    assert read(folder / "rows.parquet") == rows
    path = jsonl(folder, *rows)
    assert read(path) == rows


def test_equal_rows_give_equal_bytes(tmp_path):
    write(tmp_path / "a.parquet", [PAIR, PAIR | {"id": 1}], {"model": "m", "data": "d"})
    reordered = [dict(reversed(row.items())) for row in (PAIR, PAIR | {"id": 1})]
    write(tmp_path / "b.parquet", reordered, {"data": "d", "model": "m"})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


EXTRAS = [{"n": 1}, {}, {"n": 2.5, "words": ["a"]}, {"words": []}, {"flag": True}]


def test_rows_that_come_one_after_another_are_written_some_at_a_time(tmp_path, monkeypatch):
    """A column may be whole numbers, or missing, in the rows that are written first."""
    monkeypatch.setattr(rows_module, "GROUP", 2)
    rows = [PAIR | extra for extra in EXTRAS]
    types = column_types(tmp_path / "rows", rows)
    assert types.names == ["chosen", "flag", "n", "prompt", "rejected", "words"]
    assert types.types[1:3] == [pa.bool_(), pa.float64()]
    path = tmp_path / "some.parquet"
    assert write(path, iter(rows), {}, types) == 5
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [row.get("n") for row in read(path)] == [1.0, None, 2.5, None, None]
    assert [row.get("words") for row in read(path)] == [None, None, ["a"], [], None]
    with pytest.raises(InputError, match=r"rows: no Parquet type .* Field n has"):
        column_types(tmp_path / "rows", [*rows, PAIR | {"n": "three"}])


def test_a_column_without_a_type_is_named_and_the_old_file_stays(tmp_path):
    write(tmp_path / "a.parquet", [PAIR], {})
    with pytest.raises(
        InputError, match=r"a\.parquet: field 'id': no Parquet type holds all its values"
    ):
        write(tmp_path / "a.parquet", [PAIR | {"id": 1}, PAIR | {"id": "x"}], {})
    assert read(tmp_path / "a.parquet") == [PAIR]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.parquet"]


def test_provenance(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [PAIR], {"model": "m", "tokenizer": "t"})
    assert provenance(path) == {"model": "m", "tokenizer": "t"}
    assert provenance(jsonl(tmp_path, PAIR)) == {}
    require(path, {"model": "m", "tokenizer": "t", "data": "d"})
    require(jsonl(tmp_path, PAIR), {"model": "m"})
    with pytest.raises(
        InputError,
        match=re.escape(f"{path}: columns were computed with tokenizer t; this run has u"),
    ):
        require(path, {"model": "m", "tokenizer": "u"})
    both = r"with model m; this run has n; columns .* with tokenizer t; this run has u"
    with pytest.raises(InputError, match=both):
        require(path, {"model": "n", "tokenizer": "u"})


def test_provenance_of_other_programs_files(tmp_path):
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "a.parquet")
    assert provenance(tmp_path / "a.parquet") == {}


SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def numbered(n: int) -> list[dict]:
    return [PAIR | {"prompt": f"Prompt {i}", "id": i} for i in range(n)]


def test_a_split_keeps_every_row_once_and_its_shares():
    parts = split(numbered(4000), SHARES, seed=0)
    assert sorted(row["id"] for part in parts.values() for row in part) == list(range(4000))
    assert all(abs(len(parts[name]) / 4000 - share) < 0.03 for name, share in SHARES.items())


def test_a_split_does_not_depend_on_order_or_on_other_rows_but_on_the_seed():
    def members(rows: list[dict], seed: int) -> dict[str, set[int]]:
        return {
            name: {row["id"] for row in part} for name, part in split(rows, SHARES, seed).items()
        }

    whole = members(numbered(200), 0)
    assert members(numbered(200)[::-1], 0) == whole
    assert all(part <= whole[name] for name, part in members(numbered(100), 0).items())
    assert members(numbered(200), 1) != whole


@given(st.text(), st.integers(0, 9))
def test_the_same_prompt_is_never_in_two_parts(prompt, seed):
    spaced = " " + prompt.replace(" ", " \n") + "\t"
    rows = [
        {"prompt": prompt},
        {"prompt": spaced},
        {"prompt": [user(prompt)]},
        {"prompt": [user(spaced)]},
    ]
    parts = split(rows, {"a": 0.5, "b": 0.5}, seed)
    for same in (rows[:2], rows[2:]):
        assert sum(any(row in part for row in same) for part in parts.values()) == 1


def test_a_split_ignores_case():
    rows = [{"prompt": f"prompt number {i}"} for i in range(50)]
    upper = [{"prompt": row["prompt"].upper()} for row in rows]
    parts, uppers = (split(some, {"a": 0.5, "b": 0.5}, 0) for some in (rows, upper))
    assert {name: len(part) for name, part in parts.items()} == {
        name: len(part) for name, part in uppers.items()
    }
    assert [row["prompt"].upper() for row in parts["a"]] == [row["prompt"] for row in uppers["a"]]


def test_a_share_may_be_zero():
    parts = split(numbered(50), {"none": 0.0, "all": 1.0, "neither": 0.0}, 0)
    assert [len(part) for part in parts.values()] == [0, 50, 0]


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {}])
def test_shares_must_sum_to_one(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        split(numbered(1), shares, 0)


# ---- several files, bad rows


def test_a_pattern_means_its_files_in_order(tmp_path):
    """Shards of two formats; a row's place names its own file and line."""
    write(tmp_path / "b-2.parquet", [PAIR | {"prompt": "third"}], {"x": "1", "y": "2"})
    (tmp_path / "b-1.jsonl").write_text(
        "\n".join(json.dumps(PAIR | {"prompt": name}) for name in ("first", "second"))
    )
    (tmp_path / "other.jsonl").write_text("not read")
    rows = read(tmp_path / "b-*")
    assert [row["prompt"] for row in rows] == ["first", "second", "third"]
    (tmp_path / "b-1.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": "p"}))
    with pytest.raises(InputError, match=r"b-1.jsonl:2: field 'chosen'"):
        read(tmp_path / "b-*")
    with pytest.raises(InputError, match="c-"):
        read(tmp_path / "c-*.parquet")


def test_the_provenance_of_several_files_is_what_they_share(tmp_path):
    write(tmp_path / "1.parquet", [PAIR], {"model": "a", "limits": "b"})
    write(tmp_path / "2.parquet", [PAIR], {"model": "a", "limits": "c"})
    assert provenance(tmp_path / "*.parquet") == {"model": "a"}
    with pytest.raises(InputError, match=r"2.parquet: columns were computed with limits c"):
        require(tmp_path / "*.parquet", {"limits": "b"})


@pytest.mark.parametrize("metadata", [b"pandas", b"[1]", b'{"a": 1}', b"\xff"])
def test_the_provenance_of_another_program_is_none(tmp_path, metadata):
    table = pa.table({name: [value] for name, value in PAIR.items()})
    pq.write_table(table.replace_schema_metadata({"provenance": metadata}), tmp_path / "x.parquet")
    assert provenance(tmp_path / "x.parquet") == {}
    assert read(tmp_path / "x.parquet") == [PAIR]


def test_refused_rows_are_listed_and_left_out(tmp_path):
    turns = {"prompt": [user("p")], "chosen": "a", "rejected": "b"}
    lines = [PAIR, "{", {"prompt": "p"}, turns, b'"\xff"', PAIR | {"chosen": " "}, PAIR]
    path, refused = jsonl(tmp_path, *lines), []
    assert read(path, refused=refused) == [PAIR, PAIR]
    places = [message.split(": ")[0].split(":")[-1] for message in refused]
    assert places == ["2", "3", "4", "5", "6"]
    assert "mixed formats" in refused[2] and "invalid UTF-8" in refused[3]


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    path = jsonl(tmp_path, {"prompt": "p"}, "{")
    with pytest.raises(InputError, match=r"no row can be used; .*rows.jsonl:1: field 'chosen'"):
        read(path, refused=[])
