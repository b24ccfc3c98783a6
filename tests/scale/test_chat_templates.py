"""The formats of conversations that people have, token by token as `transformers` writes them."""

import json
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from scale.data.chat_tokenizer import ChatTokenizer, chat_tokenizer
from scale.errors import InputError

TEXTS = ["the cat sat on the mat and the bat sat on the cat", "yes no", "user assistant"] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<start>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_ASK
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": SYSTEM_FIRST
    + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{{ (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role }}"
    "{{ '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "mistral": "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "qwen, thinking": "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + CHATML_ASK,
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}" + ALTERNATE + "{% for m in messages %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}",
    "marked generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
    + CHATML_ASK,
    "tools": "{% if tools is not none %}{{ 'TOOLS: ' + tools | tojson }}{% endif %}" + CHATML,
    "system first": "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}"
    "{% endif %}" + CHATML,
    "no generation prompt": "{% for m in messages %}" + CHATML_TURN + "{% endfor %}",
}  # fmt: skip
NO_SYSTEM = ("mistral", "gemma")


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


TURNS = [
    [user("the cat")],
    [user("  the cat\n\nsat "), says("on the mat"), user("and the bat?")],
    [{"role": "system", "content": "Be kind."}, user("the cat")],
]
RESPONSES = ["yes it sat", "Größe 🙂", "two\n\nlines", "a", " yes", "\nno\n"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=[*SPECIAL, *HEADERS]),
    )
    return tokenizer


def sentence_piece(metaspace: bool) -> Tokenizer:
    """A text begins with a space that nobody wrote, by the normaliser or by the pre-tokenizer."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    special = [*SPECIAL, *HEADERS]
    known = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, BpeTrainer(vocab_size=420, special_tokens=known))
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


KINDS = {
    "bytes": byte_level,
    "normaliser": lambda: sentence_piece(False),
    "metaspace": lambda: sentence_piece(True),
}


@cache
def peer(kind: str, template: str | None, **names: str) -> PreTrainedTokenizerFast:
    named = NAMES | names | ({"chat_template": template} if template else {})
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **named)


def made(kind: str, template: str | None, **names: str) -> ChatTokenizer:
    return chat_tokenizer(peer(kind, template, **names), "folder")


def words(tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.special.id_to_token(i) for i in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_responses_are_those_of_transformers(kind, name):
    """A response is what follows the prompt in the whole conversation, up to the token that ends
    the turn: templates write more after it, such as a line's end."""
    theirs, ours = peer(kind, TEMPLATES[name]), made(kind, TEMPLATES[name])
    for turns in TURNS:
        has_system = turns[0]["role"] == "system"
        if name in (NO_SYSTEM if has_system else ["system first"]):
            with pytest.raises(InputError, match="folder: the chat template refuses"):
                ours.prompt_ids(turns)
            continue
        prompt = ours.prompt_ids(turns)
        if name != "no generation prompt":
            assert prompt == theirs.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
        for response in RESPONSES:
            whole = theirs.apply_chat_template([*turns, says(response)], return_dict=False)
            last = len(whole) - whole[::-1].index(ours.end)
            assert words(ours, prompt + ours.response_ids(response)) == words(ours, whole[:last])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_many_conversations_at_once_have_the_tokens_of_each(kind, name):
    """What all of them begin with is encoded once."""
    theirs, ours = peer(kind, TEMPLATES[name]), made(kind, TEMPLATES[name])
    system = {"role": "system", "content": "Be kind."}
    opening = [system] if name == "system first" else []
    prompts = [[*opening, user(text)] for text in ("the cat", "the bat", "the", "\ncat ")]
    if name != "no generation prompt":
        assert ours.prompts_ids(prompts) == [
            theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            for turns in prompts
        ]
    assert ours.responses_ids(RESPONSES, [True] * len(RESPONSES)) == [
        ours.response_ids(response) for response in RESPONSES
    ]


@pytest.mark.parametrize(
    ("property_", "before"), [("lstrip", "a <mask>"), ("single_word", "a <mask>a<mask> ")]
)
def test_a_special_token_that_looks_to_its_left_belongs_to_what_is_before(property_, before):
    """Such as a mask, which takes the spaces before it, or a name that must stand alone."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<mask>", **{property_: True})])
    template = before + "{% for m in messages %}{{ m.content }}{% endfor %}" + CHATML_ASK
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **NAMES)
    turns = [[user("the cat")], [user("the bat")]]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert chat_tokenizer(theirs, "folder").prompts_ids(turns) == expected


def test_no_space_that_nobody_wrote():
    zephyr = TEMPLATES["zephyr"]
    for kind in ("normaliser", "metaspace"):
        ours = made(kind, zephyr)
        assert words(ours, ours.response_ids("yes it"))[:1] == ["yes"]
        plain = made(kind, None)
        assert words(plain, plain.response_ids("yes it"))[:1] == ["yes"]
        theirs = peer(kind, None)("yes it", add_special_tokens=False).input_ids
        assert plain.prompt_ids("yes it") == theirs and words(plain, theirs)[0].startswith("▁")


def test_a_template_without_generation_prompt_has_its_header_in_the_prompt():
    ours = made("bytes", TEMPLATES["no generation prompt"])
    assert ours.prompt_ids("the cat") == made("bytes", CHATML).prompt_ids("the cat")
    assert ours.response_ids("yes") == made("bytes", CHATML).response_ids("yes")
    assert ours.generation_prompt == made("bytes", CHATML).generation_prompt


def test_a_response_ends_as_its_template_ends_it_whatever_the_eos_token_is():
    ours = made("bytes", CHATML)
    assert words(ours, ours.response_ids("yes")) == ["yes", "<|im_end|>"]
    assert words(ours, [ours.eos, *ours.stops]) == ["</s>", "</s>", "<|im_end|>"]
    generation = {"eos_token_id": [7, 2], "bos_token_id": 1}
    more = chat_tokenizer(peer("bytes", CHATML), "folder", generation)
    assert words(ours, more.stops) == ["</s>", "<|im_end|>", "<end>"]
    assert chat_tokenizer(peer("bytes", None), "", {"eos_token_id": 7}).stops == (2, 7)


def test_templates_of_which_none_is_the_default():
    theirs = peer("bytes", None)
    named = PreTrainedTokenizerFast(
        tokenizer_object=theirs.backend_tokenizer, **NAMES, chat_template={"chat": CHATML}
    )
    with pytest.raises(InputError, match=r"folder: .*template.*\['chat'\]"):
        chat_tokenizer(named, "folder").prompt_ids("the cat")


def test_a_prompt_of_text_has_no_end():
    tokenizer = byte_level()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    ours = chat_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES), "folder")
    assert words(ours, ours.prompt_ids("the cat")) == ["<s>", "the", "Ġcat"]


def test_a_template_that_looks_for_a_special_token_in_a_turn():
    template = CHATML.replace("m.content", "m.content.split('<end>')[-1]")
    turns = [user("the cat"), says("mat<end>sat"), user("on")]
    plain = [user("the cat"), says("sat"), user("on")]
    ours = made("bytes", template)
    assert ours.prompt_ids(turns) == made("bytes", CHATML).prompt_ids(plain)


def test_whatever_a_template_raises_is_an_error_of_one_line():
    with pytest.raises(InputError, match="refuses the conversation: division by zero"):
        made("bytes", "{{ 1 / 0 }}").prompt_ids("the cat")


def test_the_conversation_that_is_refused_is_named():
    ours = made("bytes", TEMPLATES["gemma"])
    with pytest.raises(InputError, match="turns must alternate") as error:
        ours.prompts_ids([[user("a")], [user("a"), user("b")], [user("c")]])
    assert error.value.index == 1
