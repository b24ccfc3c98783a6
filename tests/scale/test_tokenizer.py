from hypothesis import example, given, settings
from hypothesis import strategies as st

from scale.tokenizer import EOS, PAD, ROLES, SPECIAL, load_codec, train_codec

TEXTS = ["the cat sat on the mat", "the bat and the cat", "Größe: ∑ 你好 🙂", "def f(x):\n    return x\n"] * 5
VOCAB = 300
CODEC = train_codec(TEXTS, VOCAB)
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def test_special_tokens_have_their_places():
    assert [CODEC.tokenizer.token_to_id(name) for name in SPECIAL] == [0, 1, 2, 3, 4]
    assert (PAD, EOS, ROLES) == (0, 1, {"system": 2, "user": 3, "assistant": 4})


@settings(deadline=None)
@given(ANY_TEXT)
@example("  two  spaces ")
@example("\r\n\t\x00")
@example("e\u0301 \ufeff \u200d")
@example("the cat<|eos|>")
def test_round_trip(text):
    assert CODEC.decode(CODEC.text_ids(text)) == text
    assert CODEC.decode(CODEC.response_ids(text)) == text


@settings(deadline=None)
@given(ANY_TEXT, st.sampled_from(SPECIAL), ANY_TEXT)
def test_special_tokens_in_a_users_text_are_text(before, special, after):
    ids = CODEC.text_ids(before + special + after)
    assert min(ids) >= len(SPECIAL)
    assert CODEC.decode(ids) == before + special + after


def test_learned_words_are_fewer_tokens_than_bytes():
    assert len(CODEC.text_ids("the cat")) < len("the cat") and CODEC.vocab == VOCAB


def test_a_string_prompt_ends_with_the_assistants_token():
    assert CODEC.prompt_ids("the cat") == [*CODEC.text_ids("the cat"), 4]


def test_a_conversation_is_its_turns_each_opened_by_its_role():
    turns = [
        {"role": "system", "content": "mat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on"},
    ]
    t = CODEC.text_ids
    assert CODEC.prompt_ids(turns) == [2, *t("mat"), 3, *t("the cat"), 4, *t("sat"), 3, *t("on"), 4]


def test_a_response_ends_with_eos_unless_it_was_cut_short():
    ids = CODEC.text_ids("sat")
    assert CODEC.response_ids("sat") == [*ids, 1] == CODEC.response_ids("sat", True)
    assert CODEC.response_ids("sat", False) == ids
    assert CODEC.response_ids("") == [1] and CODEC.response_ids("", False) == []


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_codec(TEXTS, VOCAB).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@given(ANY_TEXT)
@settings(deadline=None, max_examples=30)
def test_a_loaded_codec_is_the_saved_one(text):
    assert LOADED.text_ids(text + "<|user|>") == CODEC.text_ids(text + "<|user|>")
    assert LOADED.vocab == CODEC.vocab


def loaded():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        CODEC.save(Path(folder) / "tokenizer.json")
        return load_codec(Path(folder) / "tokenizer.json")


LOADED = loaded()


def test_the_vocabulary_is_at_most_what_was_asked_for_or_an_error():
    """A token at or above the model's `vocab` would be looked up past the end of its embedding, without a word."""
    try:
        codec = train_codec(TEXTS, 200)  # less than 5 special tokens and 256 bytes
    except ValueError:
        return
    assert codec.vocab <= 200
