"""The findings about other libraries, each with its smallest case, worked out by hand.

    python -m benchmarks.peers.findings MODULE

prints the answers of the installed library as JSON, for `benchmarks.conformance`.
"""

import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.inputs import POLICY, REFERENCE, Values

LN3 = math.log(3)
KINDS = {
    "defect": "the code does not do what its documentation or its name says",
    "no effect": "a setting is accepted and not used",
    "edge case": "not a number, or not the right one, where ordinary use seldom comes",
    "convention": "a choice that others make otherwise",
}


class Finding(NamedTuple):
    """One finding about one library.

    Attributes:
        adapter: The adapter of the library.
        title: One sentence.
        kind: A key of KINDS.
        documentation: What the documentation says.
        code: What the code does, and where.
        by_hand: The arithmetic of the smallest case.
        ask_library: Asks the installed library about this case.
        answer: The answer of the library when the finding was written.
    """

    adapter: str
    title: str
    kind: str
    documentation: str
    code: str
    by_hand: str
    ask_library: Callable[[], Any]
    answer: Any


def pair(chosen: float, rejected: float, **more: list[int]) -> Values:
    """Log-probabilities of one pair under a policy, and -20 of both under the reference."""
    logps = (-20 + chosen, -20 + rejected, -20.0, -20.0)
    columns = {name: [logp] for name, logp in zip(POLICY + REFERENCE, logps, strict=True)}
    return {name: np.array(values) for name, values in (columns | more).items()}


def loss(answer: Values) -> float:
    return round(float(answer["loss"]), 4)


def trl_smoothing() -> float:
    from benchmarks.peers.trl import smoothed

    return loss(
        smoothed.evaluate(
            "dpo", "conservative", {"beta": 1.0, "label_smoothing": 0.25}, pair(LN3, 0.0)
        )
    )


def trl_empty_prompt() -> float:
    import torch

    from benchmarks.peers.torch_common import rows_of
    from benchmarks.peers.trl import preference_of_rows

    rows = rows_of(pair(2.0, 0.0))
    no_prompt = rows._replace(completion_mask=torch.ones_like(rows.completion_mask))
    return loss(preference_of_rows("ipo", {"beta": 1.0}, no_prompt))


def trl_implicit_prompt() -> Values:
    from trl import maybe_extract_prompt

    row: Any = {"chosen": "Sky? Blue.", "rejected": "Sky? Black."}
    return maybe_extract_prompt(row)


def liger_smoothing() -> list[float]:
    from benchmarks.peers.liger import dpo

    params = {"beta": 1.0, "label_smoothing": 0.25}
    return [loss(dpo(loss_type, params, pair(LN3, 0.0))) for loss_type in ("sigmoid", "robust")]


def nothing_to_score(adapter: Any) -> list[float]:
    """The mean over no tokens: two rows, the second without a response."""
    masks = np.array([[0, 1], [0, 0]])
    inputs = {
        "logits": np.zeros((2, 2, 2)),
        "input_ids": np.zeros((2, 2), int),
        "completion_mask": masks,
    }
    answer = adapter.evaluate(
        "logps", "mean", {}, inputs | {"attention_mask": np.ones((2, 2), int)}
    )
    return [round(float(value), 4) for value in answer["logps"]]


def liger_mean() -> list[float]:
    from benchmarks.peers.liger import adapter

    return nothing_to_score(adapter)


def openrlhf_mean() -> list[float]:
    from benchmarks.peers.openrlhf import adapter

    return nothing_to_score(adapter)


def banned_token(adapter: Any) -> float:
    """A prompt of two tokens and a response of one, under probabilities 0, 1/2 and 1/2."""
    logits = np.tile([-np.inf, 0.0, 0.0], (1, 3, 1))
    inputs = {
        "logits": logits,
        "input_ids": np.array([[1, 2, 1]]),
        "completion_mask": np.array([[0, 0, 1]]),
    }
    return float(adapter.evaluate("logps", "sum", {}, inputs)["logps"][0])


def banned_prompt(adapter: Any) -> float:
    """A prompt whose second token has probability 0, and a response of one token of 1/2.

    The row stands twice, as a chosen and a rejected response.
    """
    logits = np.array([[0.0, 0.0, -np.inf], [-np.inf, 0.0, 0.0], [0.0, 0.0, 0.0]])
    row = {"input_ids": [1, 2, 1], "completion_mask": [0, 0, 1], "attention_mask": [1, 1, 1]}
    inputs = {name: np.array([values] * 2) for name, values in row.items()}
    answer = adapter.evaluate("logps", "sum", {}, inputs | {"logits": np.array([logits] * 2)})
    return float(np.asarray(answer["logps"])[0])


def tunix_banned_prompt() -> float:
    from benchmarks.peers.tunix import adapter

    return banned_prompt(adapter)


def openrlhf_banned_prompt() -> float:
    from benchmarks.peers.openrlhf import adapter

    return banned_prompt(adapter)


def torchtune_banned() -> float:
    from benchmarks.peers.torchtune import adapter

    return banned_token(adapter)


def repeated(adapter: Any) -> float:
    """h = ln 3 of one chosen response, beside two rejected ones: beta 1."""
    inputs = {name: np.repeat(values, 2) for name, values in pair(LN3, 0.0).items()}
    return loss(
        adapter.evaluate("dpo", "plain", {"beta": 1.0}, inputs | {POLICY[0]: inputs[POLICY[0]][:1]})
    )


def torchtune_repeated() -> float:
    from benchmarks.peers.torchtune import adapter

    return repeated(adapter)


def openrlhf_repeated() -> float:
    from benchmarks.peers.openrlhf import adapter

    return repeated(adapter)


def llamafactory_banned() -> float:
    from benchmarks.peers.llamafactory import adapter

    return banned_token(adapter)


def llamafactory_pref_loss() -> list[float]:
    from benchmarks.peers.llamafactory import preference

    inputs = pair(2.0, -1.0, chosen_lengths=[20], rejected_lengths=[10])
    return [loss(preference(name, {"beta": 0.1}, inputs)) for name in ("sigmoid", "hinge", "ipo")]


def openrlhf_margin() -> float:
    from benchmarks.peers.openrlhf import logexp

    scores = {
        "score_chosen": np.array([1.0]),
        "score_rejected": np.array([0.0]),
        "margins": np.array([1.0]),
    }
    return loss(logexp.evaluate("reward", "margin", {}, scores))


def openrlhf_overflow() -> float:
    from benchmarks.peers.openrlhf import logexp

    scores = {"score_chosen": np.array([0.0]), "score_rejected": np.array([89.0])}
    return loss(logexp.evaluate("reward", "bradley-terry", {}, scores))


def letters(**special: str) -> Any:
    """A Hugging Face tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [" ", *special.values(), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    named = {f"{name}_token": word for name, word in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def tunix_rows() -> list[str]:
    """What the masks leave of a prompt "ab" and a response "cd</s>".

    The tokenizer has no padding token.
    """
    from tunix.generate.tokenizer_adapter import TokenizerAdapter
    from tunix.sft.dpo.dpo_trainer import process_dpo_record

    from benchmarks.peers.tunix import masked_ids

    tokenizer = letters(bos="<s>", eos="</s>")
    record = {"prompts": "ab", "chosen_responses": "cd</s>", "rejected_responses": "c</s>"}
    example = process_dpo_record(record, TokenizerAdapter(tokenizer), 4, 6)
    ids = [masked_ids(example, name).tolist() for name in ("prompt", "chosen")]
    return [" ".join(tokenizer.convert_ids_to_tokens(part)) for part in ids]


def tunix_long_prompt() -> list[int]:
    from benchmarks.peers.tunix import adapter

    params = {"max_prompt_length": 2, "eos_id": 1, "pad_id": 0}
    ids = {"prompt_ids": [7, 8, 9], "chosen_ids": [5], "rejected_ids": [6]}
    inputs = ids | {"chosen_complete": False, "rejected_complete": False}
    return adapter.evaluate("data", "tokens-keep-start", params, inputs)["prompt_ids"].tolist()


def openrlhf_rows() -> list[str]:
    """Prompt "ab ", responses "cd" and "cdefgh", at most seven tokens."""
    import_module("benchmarks.peers.openrlhf")  # the modules that stand in
    from datasets import Dataset
    from openrlhf.datasets.reward_dataset import RewardDataset

    tokenizer = letters(pad="<pad>", eos="</s>")
    keys = SimpleNamespace(
        prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=False
    )
    rows = Dataset.from_list([{"prompt": "ab ", "chosen": "cd\n", "rejected": "cdefgh"}])
    strategy = SimpleNamespace(args=SimpleNamespace(data=keys))
    example = RewardDataset(rows, tokenizer, 7, strategy, is_dpo=True, num_processors=None)[0]
    ids = [example[i][0].tolist() for i in (0, 2)]
    return ["|".join(tokenizer.convert_ids_to_tokens(part)) for part in ids]


def sequence(adapter: Any, tokens: int) -> float:
    """A prompt of one token, then tokens of probability 1/2, 1/4, 1/8, ..., and their mean."""
    odds = [np.log([0.5 - p / 2, p, 0.5 - p / 2]) for p in 0.5 ** np.arange(1, tokens + 2)]
    ids, mask = np.ones((1, tokens + 1), int), np.array([[0] + [1] * tokens])
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": ids}
    answer = adapter.evaluate("logps", "mean", {}, inputs | {"logits": np.array([odds])})
    return round(float(np.asarray(answer["logps"])[0]), 4)


def x_transformers_mask() -> float:
    from benchmarks.peers.x_transformers import adapter

    return sequence(adapter, 2)


def x_transformers_mean() -> float:
    from benchmarks.peers.x_transformers import adapter

    inputs = pair(2.0, -1.0, chosen_lengths=[4], rejected_lengths=[4])
    return loss(adapter.evaluate("dpo", "plain", {"beta": 1.0}, inputs))


def self_rewarding_shift() -> float:
    from benchmarks.peers.self_rewarding import adapter

    return sequence(adapter, 1)


def torchrl_tokens() -> float:
    import torch

    from benchmarks.peers.torchrl import PADDING, GPT2RewardModel, batch

    rewards = ([[1.0, 3.0]], [[0.0, 0.0]])
    rows = [batch(i, torch.tensor(values)) for i, values in enumerate(rewards)]
    return round(GPT2RewardModel._compute_reward_loss(*rows, PADDING).item(), 4)


def torchrl_lengths() -> float:
    from benchmarks.peers.torchrl import adapter

    scores = {"score_chosen": np.array([1.0]), "score_rejected": np.array([0.0, 5.0])}
    return loss(adapter.evaluate("reward", "bradley-terry", {}, scores))


def mlx_accuracy() -> float:
    from benchmarks.peers.mlx_lm_lora import adapter

    both = [pair(3.0, 0.0), pair(-1.0, 0.0)]
    inputs = {name: np.concatenate([one[name] for one in both]) for name in POLICY + REFERENCE}
    answer = adapter.evaluate("dpo", "plain", {"beta": 1.0}, inputs)
    return answer["metrics"]["rewards/accuracies"]


def mlx_penalty() -> float:
    from benchmarks.peers.mlx_lm_lora import preference

    return loss(preference("dpop", {"beta": 0.1}, pair(-1.0, 0.0)))


def mlx_banned_prompt() -> float:
    from benchmarks.peers.mlx_lm_lora import adapter

    return banned_prompt(adapter)


def ms_swift_repeated() -> float:
    from benchmarks.peers.ms_swift import adapter

    return repeated(adapter)


SMOOTHED = """h = ln 3 and beta 1, so that sigmoid(beta h) = 3/4; e = 1/4.
plain: ln(4/3) = .2877. cDPO: .75 x .2877 + .25 x ln 4 = .2158 + .3466 = .5623."""

MEAN_OF_NOTHING = """Two rows, two tokens, all logits 0.
One scored token has ln(1/2) = -.6931, the mean of one.
The other row has no scored token: 0/0. The kit's convention is 0, and no gradient."""

BANNED = """One response token of probability 1/2: ln(1/2) = -.6931. Token 0 has probability 0.
A prompt's label is replaced by token 0, whose log-probability is -inf, and masked by a factor:
-inf x 0 = NaN."""

BANNED_PROMPT = """One response token of probability 1/2: ln(1/2) = -.6931.
A prompt's token has probability 0. Its log-probability, -inf, is masked by a factor:
-inf x 0 = NaN."""

REPEATED = """One chosen response (its log-ratio ln 3, beta 1) and two rejected ones (0).
h = ln 3 twice.
The mean of ln(4/3) and ln(4/3) is .2877."""

FINDINGS = (
    Finding(
        adapter="trl:smoothed",
        title="`label_smoothing` has no effect on `loss_type` `sigmoid`",
        kind="no effect",
        documentation=(
            "`DPOConfig` gives `label_smoothing` to Robust DPO and EXO and is silent about "
            "`sigmoid`."
        ),
        code=(
            "`DPOTrainer._compute_loss` reads it for `robust`, `exo_pair` and `aot*` alone; "
            "`__init__` accepts it with `sigmoid` without a warning. TRL 0.24.0 computed cDPO "
            "there (the LLaMA-Factory rows, which run on it, pass)."
        ),
        by_hand=SMOOTHED,
        ask_library=trl_smoothing,
        answer=0.2877,
    ),
    Finding(
        adapter="trl:adapter",
        title="`ipo` divides by one token too many where the prompt is empty",
        kind="edge case",
        documentation="A comment says: normalised by the number of completion tokens.",
        code=(
            "`_compute_loss` divides by the sum of `completion_mask`, not of "
            "`shift_completion_mask`, over which the log-probabilities are summed. They differ "
            "where slot 0 is the response's: an empty prompt, or `truncation_mode` `keep_end` and "
            "a response that fills the row."
        ),
        by_hand="""Rows of two tokens, both the response's; one is predicted.
Its log-ratio: chosen 2, rejected 0; beta 1.
Over the one: (2 - 1/2)^2 = 2.25. Over two: (1 - 1/2)^2 = .25.""",
        ask_library=trl_empty_prompt,
        answer=0.25,
    ),
    Finding(
        adapter="trl:adapter",
        title="Without a `prompt`, texts are cut at their first difference",
        kind="convention",
        documentation=(
            "`extract_prompt`: the longest common beginning is the prompt; an explicit prompt is "
            "recommended."
        ),
        code=(
            "`extract_prompt` compares turns of conversations, which `data/conversations` asks "
            "for, and characters of texts. Roles and what stands before the last turn are not "
            "checked: six cases that ask for an error."
        ),
        by_hand=""""Sky? Blue." and "Sky? Black." share the 7 characters "Sky? Bl".""",
        ask_library=trl_implicit_prompt,
        answer={"prompt": "Sky? Bl", "chosen": "ue.", "rejected": "ack."},
    ),
    Finding(
        adapter="liger:adapter",
        title="No `loss_type` computes cDPO",
        kind="defect",
        documentation=(
            "`LigerFusedLinearDPOLoss` lists `label_smoothing` as that of `robust`, `exo_pair` "
            "and cDPO; a comment in the code calls `robust` cDPO."
        ),
        code=(
            "`preference_loss_fn`: `sigmoid` does not read it (plain DPO), `robust` is the "
            "unbiased loss of Chowdhury et al., which is another function. Which of the two was "
            "meant does not matter."
        ),
        by_hand=SMOOTHED
        + "\nrobust: (.75 x .2877 - .25 x 1.3863) / (1 - .5) = -.1308 / .5 = -.2616.",
        ask_library=liger_smoothing,
        answer=[0.2877, -0.2616],
    ),
    Finding(
        adapter="liger:adapter",
        title="The average log-probability of no tokens is NaN",
        kind="edge case",
        documentation="`average_log_prob`: the average over tokens that are not masked.",
        code=(
            "`chunk_forward` divides by the number of tokens. One row whose response was "
            "truncated away makes the batch's loss NaN. The default of the DPO loss is the sum, "
            "which is 0 there."
        ),
        by_hand=MEAN_OF_NOTHING,
        ask_library=liger_mean,
        answer=[-0.6931, math.nan],
    ),
    Finding(
        adapter="torchtune:adapter",
        title="A vocabulary that bans token 0 makes every log-probability NaN",
        kind="edge case",
        documentation="`get_batch_log_probs`: tokens of `label_pad_token_id` are ignored.",
        code="`get_batch_log_probs` gives them label 0 and multiplies by the mask.",
        by_hand=BANNED,
        ask_library=torchtune_banned,
        answer=math.nan,
    ),
    Finding(
        adapter="torchtune:adapter",
        title="One log-probability beside several is repeated",
        kind="convention",
        documentation="Each is one value a pair; shapes are not said to be checked.",
        code=(
            "`DPOLoss.forward` subtracts tensors, and PyTorch repeats one of a single value. The "
            "kit asks for an error."
        ),
        by_hand=REPEATED,
        ask_library=torchtune_repeated,
        answer=0.2877,
    ),
    Finding(
        adapter="openrlhf:logexp",
        title="`LogExpLoss` does not read its margin",
        kind="no effect",
        documentation=(
            "`LogExpLoss` takes `margin`, as `PairWiseLoss` does; `train_rm` has "
            "`--model.margin_loss_enable` and `--model.loss_type` beside each other."
        ),
        code=(
            "`LogExpLoss.forward` does not use `margin`; `RewardModelTrainer` passes it. "
            "`PairWiseLoss` passes all cases."
        ),
        by_hand="""Scores 1 and 0, margin 1: -ln sigmoid(1 - 0 - 1) = ln 2 = .6931.
Without it: ln(1 + 1/e) = .3133.""",
        ask_library=openrlhf_margin,
        answer=0.3133,
    ),
    Finding(
        adapter="openrlhf:logexp",
        title="`LogExpLoss` overflows",
        kind="edge case",
        documentation="nothing about it.",
        code=(
            "`LogExpLoss.forward`: log(1 + exp(x)) in float32, without the usual softplus. "
            "`PairWiseLoss` is stable."
        ),
        by_hand="""Scores 0 and 89: ln(1 + e^89) = 89.
e^89 = 4.5e38 is above float32's largest number, 3.4e38.""",
        ask_library=openrlhf_overflow,
        answer=math.inf,
    ),
    Finding(
        adapter="openrlhf:adapter",
        title="The average log-probability of no tokens is NaN",
        kind="edge case",
        documentation=(
            "`DPOTrainer._get_batch_logps`: averages over the tokens that are not masked."
        ),
        code=(
            "It divides by their number. Its own `RewardDataset` leaves every response at least "
            "its end, and the average is that of the NLL term alone."
        ),
        by_hand=MEAN_OF_NOTHING,
        ask_library=openrlhf_mean,
        answer=[-0.6931, math.nan],
    ),
    Finding(
        adapter="openrlhf:adapter",
        title="A prompt's token of probability 0 makes the response's log-probability NaN",
        kind="edge case",
        documentation="`DPOTrainer._get_batch_logps`: prompts are masked.",
        code=(
            "It multiplies by the mask. A model with banned tokens gives the prompt, which it did "
            "not write, probability 0."
        ),
        by_hand=BANNED_PROMPT,
        ask_library=openrlhf_banned_prompt,
        answer=math.nan,
    ),
    Finding(
        adapter="openrlhf:adapter",
        title="One log-probability beside several is repeated",
        kind="convention",
        documentation="Each is one value a pair; shapes are not said to be checked.",
        code=(
            "`DPOLoss.forward` subtracts tensors, and PyTorch repeats one of a single value. The "
            "kit asks for an error."
        ),
        by_hand=REPEATED,
        ask_library=openrlhf_repeated,
        answer=0.2877,
    ),
    Finding(
        adapter="openrlhf:adapter",
        title="A space before the end of a response, and an end of a response that was cut",
        kind="convention",
        documentation="A comment: so that the end-of-sequence token is not truncated.",
        code=(
            "`RewardDataset.__getitem__` strips newlines, appends a space and the end-of-sequence "
            "text, truncates, and writes the end-of-sequence token over the last one. A tokenizer "
            "that keeps the space trains on it."
        ),
        by_hand="""Prompt "ab ", single characters, at most 7 tokens.
"cd\\n": a b _ c d and the end: 6; with a space 7.
"cdefgh": a b _ c d e f g h is cut behind f, and f becomes the end:
7 tokens, a response that does not end there.""",
        ask_library=openrlhf_rows,
        answer=["a|b| |c|d| |</s>", "a|b| |c|d|e|</s>"],
    ),
    Finding(
        adapter="tunix:adapter",
        title="The end of a response is masked where padding has its id",
        kind="defect",
        documentation=(
            "`TrainingInput.chosen_mask` is the response's mask; `TokenizerAdapter.pad_id` makes "
            "the end-of-sequence token the padding of Hugging Face tokenizers that have none, as "
            "Llama 3's."
        ),
        code=(
            "`_generate_ids_and_masks`: the mask is what differs from `pad_id`. So the end of a "
            "response is never trained. Nor is one added: the text has to have it."
        ),
        by_hand="""Response "cd</s>", at most 6 tokens, padding </s>: <s> c d </s> </s> </s>.
What differs from </s>: <s> c d.
Due: c d </s>.""",
        ask_library=tunix_rows,
        answer=["<s> a b", "<s> c d"],
    ),
    Finding(
        adapter="tunix:adapter",
        title="A prompt's token of probability 0 makes the response's log-probability NaN",
        kind="edge case",
        documentation="`compute_logps`: the log-probabilities of completions.",
        code=(
            "It multiplies by the completion's mask. `dpo_loss_fn` keeps the completion's logits "
            "alone, so that there it is padding that must not have probability 0."
        ),
        by_hand=BANNED_PROMPT,
        ask_library=tunix_banned_prompt,
        answer=math.nan,
    ),
    Finding(
        adapter="tunix:adapter",
        title="Responses begin with the beginning-of-sequence token",
        kind="convention",
        documentation=(
            "`process_dpo_record` tokenizes each text; the library's own test expects the token "
            "there."
        ),
        code=(
            "`_tokenize` puts `bos_id`, where it is not 0, before every text, and responses are "
            "texts. Its log-probability is the same in both responses, so h does not change by "
            "it; but a model that goes on from a prompt never reads it there. Other libraries "
            "begin a sequence once."
        ),
        by_hand="""Prompt "ab", response "cd": the model reads <s> a b <s> c d.
Elsewhere it reads <s> a b c d.""",
        ask_library=tunix_rows,
        answer=["<s> a b", "<s> c d"],
    ),
    Finding(
        adapter="tunix:adapter",
        title="A prompt that is too long loses its end",
        kind="convention",
        documentation="`process_dpo_record`: what is longer than the limit is truncated.",
        code=(
            "`_generate_ids_and_masks` keeps the beginning (`data/tokens-keep-start`, which it "
            "passes); what is lost stands next to the response."
        ),
        by_hand="Prompt 7 8 9, at most 2 tokens: the first two.",
        ask_library=tunix_long_prompt,
        answer=[7, 8],
    ),
    Finding(
        adapter="llamafactory:adapter",
        title="`pref_loss` `hinge` and `ipo` give the sigmoid loss",
        kind="defect",
        documentation="`pref_loss`: the type of DPO loss to use.",
        code=(
            "`CustomDPOTrainer.compute_preference_loss` calls TRL's `dpo_loss` without its "
            "argument `loss_type`, whose default is `sigmoid` in TRL 0.20 to 0.24 (before, it "
            "read the trainer's attribute). 0.24 is the newest TRL that it allows. With `ipo` "
            "log-probabilities are averaged first: the sigmoid loss of averages."
        ),
        by_hand="""Log-ratios +2 over 20 tokens and -1 over 10; beta .1.
h = 3, and .1 + .1 = .2 of averages.
sigmoid: ln(1 + e^-.3) = .5544. hinge: 1 - .3 = .7.
ipo: (.2 - 5)^2 = 23.04; the sigmoid loss of averages is ln(1 + e^-.02) = .6832.""",
        ask_library=llamafactory_pref_loss,
        answer=[0.5544, 0.5544, 0.6832],
    ),
    Finding(
        adapter="llamafactory:adapter",
        title="A vocabulary that bans token 0 makes every log-probability NaN",
        kind="edge case",
        documentation=(
            "`get_batch_logps`: the sum of log-probabilities of the labels, without those masked."
        ),
        code="`get_batch_logps` gives masked tokens label 0 and multiplies by the mask.",
        by_hand=BANNED,
        ask_library=llamafactory_banned,
        answer=math.nan,
    ),
    Finding(
        adapter="ms_swift:adapter",
        title="One log-probability beside several is repeated",
        kind="convention",
        documentation="Each is one value a pair; shapes are not said to be checked.",
        code=(
            "`DPOTrainer.dpo_loss` subtracts tensors, and PyTorch repeats one of a single value. "
            "The kit asks for an error."
        ),
        by_hand=REPEATED,
        ask_library=ms_swift_repeated,
        answer=0.2877,
    ),
    Finding(
        adapter="mlx_lm_lora:adapter",
        title="The accuracy is that of the batch's mean rewards",
        kind="defect",
        documentation="The metric is called `accuracies`, and is averaged.",
        code=(
            "`dpo_loss` averages the rewards of chosen and of rejected first, and compares the two "
            "numbers: a batch is right or wrong as a whole."
        ),
        by_hand="""Two pairs, h = 3 and h = -1; beta 1. One of two is right: 1/2.
Mean rewards: chosen (3 - 1)/2 = 1, rejected 0. 1 > 0: 1.""",
        ask_library=mlx_accuracy,
        answer=1.0,
    ),
    Finding(
        adapter="mlx_lm_lora:adapter",
        title="The penalty of `dpop` stands outside the sigmoid",
        kind="defect",
        documentation="`loss_type` `dpop`, `delta` 50: DPO-positive (Pal et al., 2024).",
        code=(
            "`dpo_loss`: -(log sigmoid(beta h) - delta penalty). The paper has "
            "-log sigmoid(beta (h - lambda penalty)): there the penalty is weighed by beta, and "
            "its slope is at most that of the sigmoid."
        ),
        by_hand="""The chosen log-ratio is -1, the rejected 0; beta .1, delta 50: penalty 1.
The paper: ln(1 + e^(.1 x 51)) = 5.1061.
Outside: ln(1 + e^.1) + 50 = 50.7444.""",
        ask_library=mlx_penalty,
        answer=50.7444,
    ),
    Finding(
        adapter="mlx_lm_lora:adapter",
        title="A prompt's token of probability 0 makes the response's log-probability NaN",
        kind="edge case",
        documentation="nothing about it.",
        code="`get_token_scores` multiplies by the mask.",
        by_hand=BANNED_PROMPT,
        ask_library=mlx_banned_prompt,
        answer=math.nan,
    ),
    Finding(
        adapter="x_transformers:adapter",
        title="The mask is not shifted with the labels",
        kind="defect",
        documentation="`DPO.forward` takes `prompt_mask` of the sequences.",
        code=(
            "`masked_mean` cuts a mask that is one longer than the log-probabilities at its end; "
            "these are of the tokens from the second on. So the first token of a response is not "
            "scored, and the token behind its last one is."
        ),
        by_hand="""A prompt of one token, then tokens of probability 1/2 and 1/4, and the row ends.
Due: (ln(1/2) + ln(1/4))/2 = -1.0397.
Masks prompt, response, response without the last: the second label alone, ln(1/4) = -1.3863.""",
        ask_library=x_transformers_mask,
        answer=-1.3863,
    ),
    Finding(
        adapter="x_transformers:adapter",
        title="DPO of log-probabilities that are averaged over tokens",
        kind="convention",
        documentation="`DPO.forward` follows Appendix B of the DPO paper, which is of sequences.",
        code=(
            "`masked_mean` where others add. The same beta is weaker by the length of the "
            "responses. `self-rewarding-lm-pytorch` does the same."
        ),
        by_hand="""Log-ratios +2 and -1, each over 4 tokens; beta 1.
Added: h = 3, ln(1 + e^-3) = .0486.
Three of four tokens are scored, each 1/2 and -1/4: means 1/2 and -1/4.
h = 3/4: ln(1 + e^-.75) = .3869.""",
        ask_library=x_transformers_mean,
        answer=0.3869,
    ),
    Finding(
        adapter="self_rewarding:adapter",
        title="Labels are not shifted against logits",
        kind="defect",
        documentation="`DPO.forward` follows Appendix B of the DPO paper.",
        code=(
            "`log_prob_from_model_and_seq` reads the log-probability of each token from the logits "
            "at its own position, which predict the next one. The library's own SFT shifts."
        ),
        by_hand="""A prompt of one token; a response of one, of probability 1/2 behind the prompt.
Due: ln(1/2) = -.6931. Behind itself its probability is 1/4: ln(1/4) = -1.3863.""",
        ask_library=self_rewarding_shift,
        answer=-1.3863,
    ),
    Finding(
        adapter="torchrl:adapter",
        title="The loss is averaged over the tokens from where the responses differ",
        kind="convention",
        documentation="`compute_reward_loss` compares two batches, one chosen, one rejected.",
        code=(
            "`_compute_reward_loss` compares the rewards at every position from the first token "
            "that differs to the end of the longer response, not at the last token alone. "
            "Responses of one token pass all cases."
        ),
        by_hand="""Responses of two tokens; rewards 1 and 3 against 0 and 0.
The last token: ln(1 + e^-3) = .0486. Both: (.3133 + .0486)/2 = .1809.""",
        ask_library=torchrl_tokens,
        answer=0.1809,
    ),
    Finding(
        adapter="torchrl:adapter",
        title="Rejected responses without a chosen one are left out",
        kind="convention",
        documentation="nothing about it.",
        code="`_compute_reward_loss` goes over the chosen batch. The kit asks for an error.",
        by_hand="""One chosen response (1), two rejected ones (0 and 5): 1 - 0 = 1.
ln(1 + 1/e) = .3133.""",
        ask_library=torchrl_lengths,
        answer=0.3133,
    ),
)


def findings_of(module: str) -> list[Finding]:
    """The findings of a module of adapters."""
    return [finding for finding in FINDINGS if finding.adapter.partition(":")[0] == module]


if __name__ == "__main__":
    findings = findings_of(sys.argv[1])
    print(json.dumps({finding.title: finding.ask_library() for finding in findings}))
