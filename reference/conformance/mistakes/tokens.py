"""Mistakes between logits and the log-probabilities of responses."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, Values, on_case, then
from reference.conformance.mistakes.precision import LARGEST_EXPONENT, half

NAMES = ("logps", "chosen_logps", "rejected_logps")
EOS = 1
"""The vectors' end-of-sequence token."""


def masked(mask_of: Callable[[Values, Values, np.ndarray], np.ndarray]):
    """Another mask [B, T], `mask_of(params, inputs, mask)`; where there are two, each of them."""

    def change(function: Callable) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            def of_labels(labels: np.ndarray) -> np.ndarray:
                mask = np.pad(labels.astype(int), ((0, 0), (1, 0)))
                return mask_of(params, inputs, mask)[:, 1:]

            if "segments" in inputs:
                return function(params, inputs, mask_of=of_labels)
            other = {"completion_mask": mask_of(params, inputs, inputs["completion_mask"])}
            return function(params, inputs | other)

        return mistaken

    return change


def from_first(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(mask, axis=1)


def to_last(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def all_but_last(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    return mask * np.pad(mask[:, 1:], ((0, 0), (0, 1)))


def all_but_first(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    scored = np.pad(mask[:, 1:], ((0, 0), (1, 0)))
    return scored * np.pad(scored[:, :-1], ((0, 0), (1, 0)))


def one_before(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask, np.pad(mask[:, 1:], ((0, 0), (0, 1))))


def one_after(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask, np.pad(mask[:, :-1], ((0, 0), (1, 0))))


def moved(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    """The mask of the label after."""
    return np.pad(mask[:, 1:], ((0, 0), (0, 1)))


def rolled(by: int, params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    """The mask of labels is rolled, from one end of the row to the other."""
    return np.concatenate([mask[:, :1], np.roll(mask[:, 1:], by, axis=1)], axis=1)


def unshifted(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    """The mask of a position where that of its label is due."""
    return np.pad(mask[:, :-1], ((0, 0), (1, 0)))


def before_padding(params: Values, inputs: Values, mask: np.ndarray) -> np.ndarray:
    """The positions before the first token with padding's id; none of a row without one."""
    ends = np.argmax(inputs["input_ids"][:, 1:] == pad_id(params), axis=1, keepdims=True)
    return mask * (np.arange(mask.shape[1]) <= ends)


def pad_id(params: Values) -> int:
    return params.get("pad_id", 0)


def padded(params: Values, inputs: Values) -> Values:
    """A mask that is too short ends with zeros."""
    missing = inputs["input_ids"].shape[1] - inputs["completion_mask"].shape[1]
    return {"completion_mask": np.pad(inputs["completion_mask"], ((0, 0), (0, missing)))}


def as_token_0(params: Values, inputs: Values) -> Values:
    """Labels are masked with 0 before the mask is made of them: all are scored."""
    mask = inputs["completion_mask"]
    return {"input_ids": inputs["input_ids"] * mask, "completion_mask": np.ones_like(mask)}


def where(rows_of: Callable, value: float) -> Callable[[Function], Function]:
    """Log-probabilities of some rows are `value`; NaN is that of their gradients too.

    `rows_of(inputs, scored)` [B] says which, from the scored tokens [B, T - 1].
    """

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        changed: Values = {}
        for name in (name for name in NAMES if name in made):
            rows = rows_of(inputs, scored(inputs, name))
            changed[name] = np.where(rows, value, made[name])
            if np.any(rows) and np.isnan(value):
                grads = np.array(made["grads"]["logits"])
                grads[rows, :-1] = np.nan
                changed["grads"] = {"logits": grads}
        return changed

    return then(outputs)


def scored(inputs: Values, name: str) -> np.ndarray:
    """The tokens [B, T - 1] of this response."""
    if name == "logps":
        return inputs["completion_mask"][:, 1:] == 1
    return inputs["segments"][:, 1:] == (1 if name == "chosen_logps" else 2)


def none(inputs: Values, mask: np.ndarray) -> np.ndarray:
    return ~np.any(mask, axis=1)


def banned(inputs: Values, mask: np.ndarray) -> np.ndarray:
    """A scored position has a token of probability 0."""
    impossible = np.any(np.isneginf(inputs["logits"][:, :-1]), axis=2)
    return np.asarray(np.any(impossible & mask, axis=1))


def masked_by_factor(inputs: Values, mask: np.ndarray) -> np.ndarray:
    """Token 0 has probability 0 at a position that is not scored."""
    return np.any(np.isneginf(inputs["logits"][:, :-1, 0]) & ~mask, axis=1)


def masked_label(inputs: Values, mask: np.ndarray) -> np.ndarray:
    """A token that is not scored has probability 0."""
    labels = inputs["input_ids"][:, 1:, None]
    logits = np.take_along_axis(inputs["logits"][:, :-1], labels, axis=2)[..., 0]
    return np.any(np.isneginf(logits) & ~mask, axis=1)


def large(inputs: Values, mask: np.ndarray) -> np.ndarray:
    return np.any((inputs["logits"][:, :-1].max(axis=2) > LARGEST_EXPONENT) & mask, axis=1)


def in_half(kind: str, made: Values, params: Values, inputs: Values) -> Values:
    return {name: half(made[name], kind) for name in NAMES if name in made}


def running(kind: str, weights: np.ndarray, logps: np.ndarray) -> float:
    """The sum of tokens that are added one by one in half precision; a mean divides it after."""
    share, sum_so_far = np.max(weights, initial=0.0), np.zeros(())
    for term in half(np.where(weights > 0, logps, 0.0), kind):
        sum_so_far = half(sum_so_far + term, kind)
    return float(share * sum_so_far)


def at_once(kind: str, weights: np.ndarray, logps: np.ndarray) -> float:
    """Tokens in half precision, whose exact sum is rounded, and after a division again."""
    share, tokens_of = np.max(weights, initial=0.0), np.where(weights > 0, logps, 0.0)
    return float(half(share * half(np.sum(half(tokens_of, kind)), kind), kind))


def without_shift(function: Function) -> Function:
    """Every label, that of slot 0 too, is read from the logits at its own position."""

    def mistaken(params: Values, inputs: Values) -> Values:
        names = ("input_ids", "completion_mask")
        later = {name: np.pad(inputs[name], ((0, 0), (1, 0))) for name in names}
        logits = np.pad(inputs["logits"], ((0, 0), (0, 1), (0, 0)))
        made = function(params, inputs | later | {"logits": logits})
        return made | {"grads": {"logits": made["grads"]["logits"][:, :-1]}}

    return mistaken


def in_a_circle(function: Function) -> Function:
    """The last position predicts the first token, which is scored where the mask has it."""

    def mistaken(params: Values, inputs: Values) -> Values:
        names = ("input_ids", "completion_mask", "logits")
        longer = {n: np.concatenate([inputs[n][:, -1:], inputs[n]], axis=1) for n in names}
        made = function(params, inputs | longer)
        grads = made["grads"]["logits"][:, 1:].copy()
        grads[:, -1] += made["grads"]["logits"][:, 0]
        return made | {"grads": {"logits": grads}}

    return mistaken


def infinite(made: Values, params: Values, inputs: Values) -> Values:
    """exp overflows in the normaliser: a log-probability of -inf, and no probability left."""
    rows = large(inputs, scored(inputs, "logps"))
    return {"logps": np.where(rows, -np.inf, made["logps"])}


def temperature(function: Function, constant: float) -> Function:
    def mistaken(params: Values, inputs: Values) -> Values:
        made = function(params, inputs | {"logits": inputs["logits"] / constant})
        return made | {"grads": {"logits": made["grads"]["logits"] / constant}}

    return mistaken


def negated(made: Values, params: Values, inputs: Values) -> Values:
    values = {name: -made[name] for name in NAMES if name in made}
    return values | {"grads": {"logits": -made["grads"]["logits"]}}


def probabilities(made: Values, params: Values, inputs: Values) -> Values:
    values = {name: np.exp(made[name]) for name in NAMES if name in made}
    if "logps" not in made:
        return values
    return values | {"grads": {"logits": made["grads"]["logits"] * values["logps"][:, None, None]}}


# fmt: off
MASKS = (
    ("with the first token not scored", "token-not-scored", all_but_first),
    ("with the prompt's last token scored", "mask-dropped", one_before),
    ("with the mask not shifted", "mask-dropped", unshifted),
    ("with the mask shifted twice", "mask-dropped", moved),
    ("with the log-probabilities of tokens rolled by one", "shift", partial(rolled, -1)),
    ("with the log-probabilities of tokens rolled back by one", "shift", partial(rolled, 1)),
    ("with the two first tokens not scored", "token-not-scored",
        lambda p, x, m: all_but_first(p, x, all_but_first(p, x, m))),
    ("with the first token alone scored", "token-not-scored",
        lambda p, x, m: m - all_but_first(p, x, m)),
    ("with the last token alone scored", "token-not-scored",
        lambda p, x, m: m - all_but_last(p, x, m)),
    ("with one position of padding scored", "mask-dropped", one_after),
    ("with the mask inverted", "mask-dropped", lambda p, x, m: 1 - m),
    ("with the mask ignored", "mask-dropped", lambda p, x, m: np.ones_like(m)),
    ("with the prompt scored", "mask-dropped", to_last),
    ("with the attention mask in place of the completion mask", "mask-dropped",
        lambda p, x, m: x["attention_mask"]),
    ("with all tokens but padding's id scored", "mask-dropped",
        lambda p, x, m: x["input_ids"] != pad_id(p)),
    ("with the padding scored", "mask-dropped", from_first),
    ("with the end-of-sequence token not scored", "eos-lost",
        lambda p, x, m: m * (x["input_ids"] != EOS)),
    ("with the last token not scored", "eos-lost", all_but_last),
    ("with padding known by its id", "pad-is-eos",
        lambda p, x, m: m * (x["input_ids"] != pad_id(p))),
    ("with a response that ends before the first padding id", "pad-is-eos", before_padding),
)
"""Other masks, `mask_of(params, inputs, mask)`."""
TOKENS = (
    *(Mistake(name, flag, masked(mask_of)) for name, flag, mask_of in MASKS),
    Mistake("with labels not shifted", "shift", lambda f: partial(f, ahead=1)),
    Mistake("with labels not shifted, the first too", "shift", without_shift),
    Mistake("with labels rolled, so that the last position predicts the first token", "shift",
        in_a_circle),
    Mistake("with labels shifted by two", "shift", lambda f: partial(f, ahead=-1)),
    Mistake("with logits divided by {c}, a temperature", "temperature", temperature),
    Mistake("negated", "sign", then(negated)),
    Mistake("with probabilities, not their logarithms", "overflow", then(probabilities)),
    Mistake("with masked tokens scored as token 0", "mask-dropped", on_case(as_token_0)),
    Mistake("with a short mask padded", "broadcast", on_case(padded)),
    Mistake("with NaN where no token is scored", "nan-all-masked", where(none, np.nan)),
    Mistake("with NaN where a token of probability 0 could be scored", "zero-probability",
        where(banned, np.nan)),
    Mistake("with NaN where a masked token has probability 0", "zero-probability",
        where(masked_label, np.nan)),
    Mistake("with NaN where a masked token 0 has probability 0", "zero-probability",
        where(masked_by_factor, np.nan)),
    Mistake("with exp of large logits overflowing", "overflow", then(infinite)),
    *(Mistake(f"with token log-probabilities, sums and means in {kind}", "half-precision-sums",
        lambda f, kind=kind: partial(f, add=partial(at_once, kind)))
        for kind in ("bfloat16", "float16")),
    *(Mistake(f"with tokens, over their number, added in {kind}", "half-precision-sums",
        lambda f, kind=kind: partial(f, add=lambda w, t: running(kind, np.sign(w), w * t)))
        for kind in ("bfloat16", "float16")),
    Mistake("with tokens added in bfloat16", "half-precision-sums",
        lambda f: partial(f, add=partial(running, "bfloat16"))),
    Mistake("with tokens added in float16", "half-precision-sums",
        lambda f: partial(f, add=partial(running, "float16"))),
    Mistake("with sums rounded to bfloat16", "half-precision-sums",
        then(partial(in_half, "bfloat16"))),
    Mistake("with sums rounded to float16", "half-precision-sums",
        then(partial(in_half, "float16"))),
)
# fmt: on
