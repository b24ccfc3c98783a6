"""Mistakes in rows `[prompt | chosen | rejected]`, whose responses share the prompt's positions."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance import tokens
from reference.conformance.mistakes.mistake import Function, Mistake, Values, on, then


def as_plain_sequence(params: Values, inputs: Values) -> Values:
    """Every token is predicted by the position before it, the first rejected one too."""
    chosen, rejected = (summed_over(inputs, segment) for segment in (1, 2))
    grads = chosen["grads"]["logits"] + rejected["grads"]["logits"]
    names = {"chosen_logps": chosen["logps"], "rejected_logps": rejected["logps"]}
    return names | {"grads": {"logits": grads}}


def also(name: str, segment: int) -> Callable[[Function], Function]:
    """The log-probabilities of another segment are added to those of a response."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        more = summed_over(inputs, segment)
        grads = made["grads"]["logits"] + more["grads"]["logits"]
        return {name: made[name] + more["logps"], "grads": {"logits": grads}}

    return then(outputs)


def padding_as_rejected(function: Function) -> Function:
    """Padding is scored as rejected; its first token is predicted by the prompt's last position."""

    def mistaken(params: Values, inputs: Values) -> Values:
        segments = inputs["segments"]
        others = np.where(segments == 2, 1, segments)
        padding = np.where(segments == -1, 2, others)
        made, without, more = (
            function(params, inputs | {"segments": s}) for s in (segments, others, padding)
        )
        logits = [answer["grads"]["logits"] for answer in (made, more, without)]
        rejected = made["rejected_logps"] + more["rejected_logps"]
        grads = {"logits": logits[0] + logits[1] - logits[2]}
        return made | {"rejected_logps": rejected, "grads": grads}

    return mistaken


def overwritten(segment: int, function: Function) -> Function:
    """At the prompt's last position, which both responses share, there is the gradient of one."""

    def mistaken(params: Values, inputs: Values) -> Values:
        segments, other = inputs["segments"], 3 - segment
        alone = inputs | {"segments": np.where(segments == other, -1, segments)}
        made, one = function(params, inputs), function(params, alone)
        rows = np.flatnonzero(np.any(segments == segment, axis=1))
        last = np.sum(segments[rows] == 0, axis=1) - 1
        grads = made["grads"]["logits"].copy()
        grads[rows, last] = one["grads"]["logits"][rows, last]
        return made | {"grads": {"logits": grads}}

    return mistaken


def one_longer(inputs: Values) -> Values:
    """The first token of padding after the rejected response belongs to it."""
    segments = inputs["segments"]
    after = np.pad(segments[:, :-1], ((0, 0), (1, 0))) == 2
    return {"segments": np.where((segments == -1) & after, 2, segments)}


def summed_over(inputs: Values, segment: int) -> Values:
    mask = inputs["segments"] == segment
    return tokens.summed({}, inputs | {"completion_mask": mask.astype(int)})


# fmt: off
SEGMENTS = (
    Mistake("with the prompt scored as chosen", "mask-dropped", also("chosen_logps", 0)),
    Mistake("with the padding scored as rejected", "mask-dropped", padding_as_rejected),
    Mistake("with the padding scored as rejected, each token by the slot before it",
        "mask-dropped", also("rejected_logps", -1)),
    Mistake("with one token of padding scored as rejected", "mask-dropped", on(one_longer)),
    Mistake("with the first row's length of the prompt for all rows", "order",
        lambda f: partial(f, last_of=lambda last: 0 * last + last[0])),
    Mistake("with the longest prompt's length for all rows", "order",
        lambda f: partial(f, last_of=lambda last: 0 * last + last.max())),
    Mistake("with a response's first token, too, predicted by the one before it in the row",
        "first-rejected-token",
        lambda f: as_plain_sequence),
    *(Mistake(f"with the {side} response's gradient alone at the prompt's last position",
        "overwritten", partial(overwritten, segment))
        for side, segment in (("chosen", 1), ("rejected", 2))),
)
# fmt: on
