"""What was found of the other libraries, each in its smallest case, which can be worked out by hand.

    python -m benchmarks.peers.findings MODULE

prints the library's own answers as JSON, for `benchmarks.conformance`.
"""

import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.given import POLICY, REFERENCE, Values

LN3 = math.log(3)
KINDS = {
    "defect": "the code does not do what its documentation or its name says",
    "no effect": "a setting is accepted and not used",
    "edge case": "not a number, or not the right one, where ordinary use seldom comes",
    "convention": "a choice that others make otherwise",
}


class Finding(NamedTuple):
    """kind: one of KINDS. says: what the documentation says. does: what the code does, and where.

    by_hand: the arithmetic. found: the library's answer, as it was when the finding was written.
    """

    adapter: str
    title: str
    kind: str
    says: str
    does: str
    by_hand: str
    probe: Callable[[], Any]
    found: Any


def pair(chosen: float, rejected: float, **more: list[int]) -> Values:
    """Log-probabilities of one pair under a policy, and -20 of both under the reference."""
    values = dict(zip(POLICY + REFERENCE, (-20 + chosen, -20 + rejected, -20.0, -20.0), strict=True))
    return {name: np.array([value]) for name, value in values.items()} | {k: np.array(v) for k, v in more.items()}


def loss(answer: Values) -> float:
    return round(float(answer["loss"]), 4)


def trl_smoothing() -> float:
    from benchmarks.peers.trl import smoothed

    return loss(smoothed.evaluate("dpo", "conservative", {"beta": 1.0, "label_smoothing": 0.25}, pair(LN3, 0.0)))


def trl_empty_prompt() -> float:
    import torch

    from benchmarks.peers.torch_common import rows_of
    from benchmarks.peers.trl import of_rows

    rows = rows_of(pair(2.0, 0.0))
    return loss(of_rows("ipo", {"beta": 1.0}, rows._replace(completion_mask=torch.ones_like(rows.completion_mask))))


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
    inputs = {"logits": np.zeros((2, 2, 2)), "input_ids": np.zeros((2, 2), int), "completion_mask": masks}
    answer = adapter.evaluate("logps", "mean", {}, inputs | {"attention_mask": np.ones((2, 2), int)})
    return [round(float(value), 4) for value in answer["logps"]]


def liger_mean() -> list[float]:
    from benchmarks.peers.liger import adapter

    return nothing_to_score(adapter)


def openrlhf_mean() -> list[float]:
    from benchmarks.peers.openrlhf import adapter

    return nothing_to_score(adapter)


def banned_token(adapter: Any) -> float:
    """A prompt of two tokens and a response of one; token 0 has probability 0, tokens 1 and 2 have 1/2 each."""
    logits = np.tile([-np.inf, 0.0, 0.0], (1, 3, 1))
    inputs = {"logits": logits, "input_ids": np.array([[1, 2, 1]]), "completion_mask": np.array([[0, 0, 1]])}
    return float(adapter.evaluate("logps", "sum", {}, inputs)["logps"][0])


def torchtune_banned() -> float:
    from benchmarks.peers.torchtune import adapter

    return banned_token(adapter)


def repeated(adapter: Any) -> float:
    """h = ln 3 of one chosen response, beside two rejected ones: beta 1."""
    inputs = {name: np.repeat(values, 2) for name, values in pair(LN3, 0.0).items()}
    return loss(adapter.evaluate("dpo", "plain", {"beta": 1.0}, inputs | {POLICY[0]: inputs[POLICY[0]][:1]}))


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

    scores = {"score_chosen": np.array([1.0]), "score_rejected": np.array([0.0]), "margins": np.array([1.0])}
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
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": word for name, word in special.items()})


def tunix_rows() -> list[str]:
    """What of a prompt "ab" and a response "cd</s>" the masks leave, of a tokenizer that has no padding token."""
    from tunix.generate.tokenizer_adapter import TokenizerAdapter
    from tunix.sft.dpo.dpo_trainer import process_dpo_record

    from benchmarks.peers.tunix import kept

    tokenizer = letters(bos="<s>", eos="</s>")
    record = {"prompts": "ab", "chosen_responses": "cd</s>", "rejected_responses": "c</s>"}
    made = process_dpo_record(record, TokenizerAdapter(tokenizer), 4, 6)
    return [" ".join(tokenizer.convert_ids_to_tokens(kept(made, name).tolist())) for name in ("prompt", "chosen")]


def tunix_long_prompt() -> list[int]:
    from benchmarks.peers.tunix import adapter

    params = {"max_prompt_length": 2, "eos_id": 1, "pad_id": 0}
    ids = {"prompt_ids": [7, 8, 9], "chosen_ids": [5], "rejected_ids": [6]}
    inputs = ids | {"chosen_complete": False, "rejected_complete": False}
    return adapter.evaluate("data", "tokens-keep-start", params, inputs)["prompt_ids"].tolist()


def openrlhf_rows() -> list[str]:
    """Prompt "ab ", responses "cd" and "cdefgh", at most seven tokens."""
    import_module("benchmarks.peers.openrlhf")  # its stand-ins
    from datasets import Dataset
    from openrlhf.datasets.reward_dataset import RewardDataset

    tokenizer = letters(pad="<pad>", eos="</s>")
    keys = SimpleNamespace(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=False)
    rows = Dataset.from_list([{"prompt": "ab ", "chosen": "cd\n", "rejected": "cdefgh"}])
    strategy = SimpleNamespace(args=SimpleNamespace(data=keys))
    made = RewardDataset(rows, tokenizer, 7, strategy, is_dpo=True, num_processors=None)[0]
    return ["|".join(tokenizer.convert_ids_to_tokens(made[i][0].tolist())) for i in (0, 2)]


SMOOTHED = """h = ln 3 and beta 1, so that sigmoid(beta h) = 3/4; e = 1/4.
plain: ln(4/3) = .2877. cDPO: .75 x .2877 + .25 x ln 4 = .2158 + .3466 = .5623."""

MEAN_OF_NOTHING = """Two rows, two tokens, all logits 0: one scored token has ln(1/2) = -.6931, the mean of one.
The other row has no scored token: 0/0. The kit's convention is 0, and no gradient."""

BANNED = """One response token of probability 1/2: ln(1/2) = -.6931. Token 0 has probability 0.
A prompt's label is replaced by token 0, whose log-probability is -inf, and masked by a factor: -inf x 0 = NaN."""

REPEATED = """One chosen response (its log-ratio ln 3, beta 1) and two rejected ones (0): h = ln 3 twice.
The mean of ln(4/3) and ln(4/3) is .2877."""

FINDINGS = (
    Finding(
        "trl:smoothed", "`label_smoothing` has no effect on `loss_type` `sigmoid`", "no effect",
        "`DPOConfig` gives `label_smoothing` to Robust DPO and EXO and is silent about `sigmoid`.",
        "`DPOTrainer._compute_loss` reads it for `robust`, `exo_pair` and `aot*` alone; `__init__` accepts it with "
        "`sigmoid` without a warning. TRL 0.24.0 computed cDPO there (the LLaMA-Factory rows, which run on it, pass).",
        SMOOTHED, trl_smoothing, 0.2877,
    ),
    Finding(
        "trl:adapter", "`ipo` divides by one token too many where the prompt is empty", "edge case",
        "A comment says: normalised by the number of completion tokens.",
        "`_compute_loss` divides by the sum of `completion_mask`, not of `shift_completion_mask`, over which the "
        "log-probabilities are summed. They differ where slot 0 is the response's: an empty prompt, or "
        "`truncation_mode` `keep_end` and a response that fills the row.",
        """Rows of two tokens, both the response's; one is predicted. Its log-ratio: chosen 2, rejected 0; beta 1.
Over the one: (2 - 1/2)^2 = 2.25. Over two: (1 - 1/2)^2 = .25.""", trl_empty_prompt, 0.25,
    ),
    Finding(
        "trl:adapter", "Without a `prompt`, texts are cut at their first difference", "convention",
        "`extract_prompt`: the longest common beginning is the prompt; an explicit prompt is recommended.",
        "`extract_prompt` compares turns of conversations, which `data/conversations` asks for, and characters of "
        "texts. Roles and what stands before the last turn are not checked: six cases that ask for an error.",
        """"Sky? Blue." and "Sky? Black." share the 7 characters "Sky? Bl".""", trl_implicit_prompt,
        {"prompt": "Sky? Bl", "chosen": "ue.", "rejected": "ack."},
    ),
    Finding(
        "liger:adapter", "No `loss_type` computes cDPO", "defect",
        "`LigerFusedLinearDPOLoss` lists `label_smoothing` as that of `robust`, `exo_pair` and cDPO; a comment in the "
        "code calls `robust` cDPO.",
        "`preference_loss_fn`: `sigmoid` does not read it (plain DPO), `robust` is the unbiased loss of Chowdhury et "
        "al., which is another function. Which of the two was meant does not matter.",
        SMOOTHED + "\nrobust: (.75 x .2877 - .25 x 1.3863) / (1 - .5) = -.1308 / .5 = -.2616.",
        liger_smoothing, [0.2877, -0.2616],
    ),
    Finding(
        "liger:adapter", "The average log-probability of no tokens is NaN", "edge case",
        "`average_log_prob`: the average over tokens that are not masked.",
        "`chunk_forward` divides by the number of tokens. One row whose response was truncated away makes the batch's "
        "loss NaN. The default of the DPO loss is the sum, which is 0 there.",
        MEAN_OF_NOTHING, liger_mean, [-0.6931, math.nan],
    ),
    Finding(
        "torchtune:adapter", "A vocabulary that bans token 0 makes every log-probability NaN", "edge case",
        "`get_batch_log_probs`: tokens of `label_pad_token_id` are ignored.",
        "`get_batch_log_probs` gives them label 0 and multiplies by the mask.",
        BANNED, torchtune_banned, math.nan,
    ),
    Finding(
        "torchtune:adapter", "One log-probability beside several is repeated", "convention",
        "Each is one value a pair; shapes are not said to be checked.",
        "`DPOLoss.forward` subtracts tensors, and PyTorch repeats one of a single value. The kit asks for an error.",
        REPEATED, torchtune_repeated, 0.2877,
    ),
    Finding(
        "openrlhf:logexp", "`LogExpLoss` does not read its margin", "no effect",
        "`LogExpLoss` takes `margin`, as `PairWiseLoss` does; `train_rm` has `--model.margin_loss_enable` and "
        "`--model.loss_type` beside each other.",
        "`LogExpLoss.forward` does not use `margin`; `RewardModelTrainer` passes it. `PairWiseLoss` passes all cases.",
        """Scores 1 and 0, margin 1: -ln sigmoid(1 - 0 - 1) = ln 2 = .6931. Without it: ln(1 + 1/e) = .3133.""",
        openrlhf_margin, 0.3133,
    ),
    Finding(
        "openrlhf:logexp", "`LogExpLoss` overflows", "edge case",
        "nothing about it.",
        "`LogExpLoss.forward`: log(1 + exp(x)) in float32, without the usual softplus. `PairWiseLoss` is stable.",
        "Scores 0 and 89: ln(1 + e^89) = 89. e^89 = 4.5e38 is above float32's largest number, 3.4e38.",
        openrlhf_overflow, math.inf,
    ),
    Finding(
        "openrlhf:adapter", "The average log-probability of no tokens is NaN", "edge case",
        "`DPOTrainer._get_batch_logps`: averages over the tokens that are not masked.",
        "It divides by their number. Its own `RewardDataset` leaves every response at least its end, and the average "
        "is that of the NLL term alone.",
        MEAN_OF_NOTHING, openrlhf_mean, [-0.6931, math.nan],
    ),
    Finding(
        "openrlhf:adapter", "One log-probability beside several is repeated", "convention",
        "Each is one value a pair; shapes are not said to be checked.",
        "`DPOLoss.forward` subtracts tensors, and PyTorch repeats one of a single value. The kit asks for an error.",
        REPEATED, openrlhf_repeated, 0.2877,
    ),
    Finding(
        "openrlhf:adapter", "A space before the end of a response, and an end of a response that was cut", "convention",
        "A comment: so that the end-of-sequence token is not truncated.",
        "`RewardDataset.__getitem__` strips newlines, appends a space and the end-of-sequence text, truncates, and "
        "writes the end-of-sequence token over the last one. A tokenizer that keeps the space trains on it.",
        """Prompt "ab ", single characters, at most 7 tokens. "cd\\n": a b _ c d and the end: 6; with a space 7.
"cdefgh": a b _ c d e f g h is cut behind f, and f becomes the end: 7 tokens, a response that does not end there.""",
        openrlhf_rows, ["a|b| |c|d| |</s>", "a|b| |c|d|e|</s>"],
    ),
    Finding(
        "tunix:adapter", "The end of a response is masked where padding has its id", "defect",
        "`TrainingInput.chosen_mask` is the response's mask; `TokenizerAdapter.pad_id` makes the end-of-sequence token "
        "the padding of Hugging Face tokenizers that have none, as Llama 3's.",
        "`_generate_ids_and_masks`: the mask is what differs from `pad_id`. So the end of a response is never "
        "trained. Nor is one added: the text has to have it.",
        """Response "cd</s>", at most 6 tokens, padding </s>: <s> c d </s> </s> </s>. What differs from </s>: <s> c d.
Due: c d </s>.""", tunix_rows, ["<s> a b", "<s> c d"],
    ),
    Finding(
        "tunix:adapter", "Responses begin with the beginning-of-sequence token", "convention",
        "`process_dpo_record` tokenizes each text; the library's own test expects the token there.",
        "`_tokenize` puts `bos_id`, where it is not 0, before every text, and responses are texts. Its log-probability "
        "is the same in both responses, so h does not change by it; but a model that goes on from a prompt never reads "
        "it there. Other libraries begin a sequence once.",
        """Prompt "ab", response "cd": the model reads <s> a b <s> c d; elsewhere <s> a b c d.""",
        tunix_rows, ["<s> a b", "<s> c d"],
    ),
    Finding(
        "tunix:adapter", "A prompt that is too long loses its end", "convention",
        "`process_dpo_record`: what is longer than the limit is truncated.",
        "`_generate_ids_and_masks` keeps the beginning (`data/tokens-keep-start`, which it passes); what is lost "
        "stands next to the response.",
        "Prompt 7 8 9, at most 2 tokens: the first two.", tunix_long_prompt, [7, 8],
    ),
    Finding(
        "llamafactory:adapter", "`pref_loss` `hinge` and `ipo` give the sigmoid loss", "defect",
        "`pref_loss`: the type of DPO loss to use.",
        "`CustomDPOTrainer.compute_preference_loss` calls TRL's `dpo_loss` without its argument `loss_type`, whose "
        "default is `sigmoid` in TRL 0.20 to 0.24 (before, it read the trainer's attribute). 0.24 is the newest TRL "
        "that it allows. With `ipo` log-probabilities are averaged first: the sigmoid loss of averages.",
        """Log-ratios +2 over 20 tokens and -1 over 10: h = 3, of averages .1 + .1 = .2; beta .1.
sigmoid: ln(1 + e^-.3) = .5544. hinge: 1 - .3 = .7. ipo: (.2 - 5)^2 = 23.04; ln(1 + e^-.02) = .6832.""",
        llamafactory_pref_loss, [0.5544, 0.5544, 0.6832],
    ),
    Finding(
        "llamafactory:adapter", "A vocabulary that bans token 0 makes every log-probability NaN", "edge case",
        "`get_batch_logps`: the sum of log-probabilities of the labels, without those masked.",
        "`get_batch_logps` gives masked tokens label 0 and multiplies by the mask.",
        BANNED, llamafactory_banned, math.nan,
    ),
)


def of(module: str) -> list[Finding]:
    return [finding for finding in FINDINGS if finding.adapter.partition(":")[0] == module]


if __name__ == "__main__":
    print(json.dumps({finding.title: finding.probe() for finding in of(sys.argv[1])}))
