"""Kinds of bugs, each with how to mend it: the README has a line for each.

A flag says what a case is aimed at, or what a named mistake is. It is no verdict about an
implementation that fails the case; `diagnosis.py` has that.
"""

from typing import NamedTuple


class Flag(NamedTuple):
    """One kind of bug.

    Attributes:
        severity: "error"; "note", a convention, which fails no run; or "note if accepted", a note
            where an input is accepted that should be refused, and an error where a value is wrong.
        meaning: what is wrong.
        remedy: how to mend it.
    """

    severity: str
    meaning: str
    remedy: str


def is_note(names: tuple[str, ...], accepted: bool) -> bool:
    """Whether flags are those of conventions alone.

    Args:
        names: the flags of a case, or of what is wrong.
        accepted: an input was accepted that should be refused.

    Returns:
        False where there are none.
    """
    severities = {FLAGS[name].severity for name in names}
    return bool(severities) and severities <= {"note", "note if accepted" if accepted else "note"}


# fmt: off
AIMED_AT = {
    "accumulation-scale": Flag(
        "error", "micro-batches are added without dividing by their number",
        "divide each micro-batch's loss by their number, once"),
    "accuracy-of-means": Flag(
        "error", "the accuracy is that of the batch's mean margin",
        "compare the rewards of each pair, then average"),
    "accuracy-tie": Flag(
        "note", "a margin of exactly 0 is counted as accurate",
        "count a margin that is above 0, and no other"),
    "batch-sum": Flag(
        "error", "the pairs are added where they should be averaged",
        "reduce over the pairs with a mean, in the loss, its gradients and the metrics"),
    "beta-changed": Flag(
        "error", "beta stands in another power, or times a constant",
        "multiply the whole margin, policy and reference, by beta once; IPO divides by it"),
    "beta-dropped": Flag(
        "error", "beta is not used, or not everywhere it stands",
        "multiply the margin by beta before the loss; autodiff then has it in the slope too"),
    "broadcast": Flag(
        "note if accepted", "arrays of different lengths are accepted",
        "compare the shapes before they are subtracted, if callers may be wrong"),
    "character-split": Flag(
        "error", "the shared prefix is cut between characters, not between turns",
        "ask for an explicit prompt, or compare whole turns"),
    "eos-doubled": Flag(
        "error", "a second end-of-sequence token is added",
        "add the end-of-sequence token once, at the end of a complete response, and nowhere else"),
    "eos-lost": Flag(
        "error",
        "a complete response does not end with the end-of-sequence token, or it is not scored",
        "append the end-of-sequence token to complete responses, and score it"),
    "eos-on-truncated": Flag(
        "error", "a truncated response is taught to end",
        "end a response where its own flag says that it is complete, and not what was cut"),
    "example-min": Flag(
        "error", "the ensemble's minimum is on the wrong side of the batch mean",
        "average over the pairs for each model, then take the minimum (or the reverse)"),
    "first-rejected-token": Flag(
        "error", "the first rejected token is predicted by the chosen response's last slot",
        "predict the first token of EACH response by the prompt's last position"),
    "gamma-dropped": Flag(
        "error", "the KL's weight is not used",
        "multiply the KL, and nothing else, by gamma, in the loss and so in its slope"),
    "gradient-lost": Flag(
        "error", "a response's gradient does not flow",
        "detach the reference alone"),
    "half-precision-sums": Flag(
        "error", "sequence log-probabilities are rounded to, or added in, half precision",
        "keep log-probabilities in float32: log-softmax, its sums, and what is stored of them"),
    "hull-at-a-corner": Flag(
        "error", "the simplex weights stay at a corner, or leave the simplex",
        "minimise over mixtures: non-negative weights whose sum is 1"),
    "kl-reversed": Flag(
        "error", "KL(pi || pi_ref) in place of KL(pi_ref || pi)",
        "take the expectation over the reference, by its samples or its probabilities"),
    "kl-sign": Flag(
        "error", "the KL is subtracted, or its estimate has the wrong sign",
        "add gamma mean [log pi_ref(y) - log pi(y)]; one sample's estimate may be negative"),
    "label-smoothing-ignored": Flag(
        "error", "label smoothing is accepted and not used",
        "use it, or refuse it: a setting without effect misleads"),
    "label-smoothing-misused": Flag(
        "error",
        "label smoothing is on the wrong side, inside the logarithm, or weighs in another way",
        "compare the weights of -log sigmoid(beta h) and -log sigmoid(-beta h): 1 - e and e;"
        " of robust 1 - e and -e, both over 1 - 2e"),
    "last-turn": Flag(
        "note if accepted",
        "another turn than the assistant's last is taken for the response, or other contexts are"
        " accepted",
        "keep all turns before the last, the system's too; check that they are equal in both, and"
        " that the last is the assistant's"),
    "margin-dropped": Flag(
        "error", "the pair's own margin is not used, or has the wrong sign",
        "subtract the margin from the difference of the scores"),
    "mask-dropped": Flag(
        "error", "prompt or padding positions are scored, or counted",
        "multiply by the mask of response tokens, shifted as the labels are"),
    "mean-of-means": Flag(
        "error", "a token mean is taken over each micro-batch or row first",
        "divide by the number of tokens of the whole step"),
    "min-mean": Flag(
        "error", "a mean (or maximum) over the ensemble in place of the minimum, or the reverse",
        "reduce the models' losses, not their rewards, over the axes in the equation's order"),
    "missing-field": Flag(
        "error", "a row without a field that it needs is accepted",
        "name the row and the field in an error"),
    "nan-all-masked": Flag(
        "error", "a row without any scored token gives NaN",
        "divide by max(number of tokens, 1)"),
    "optimizer": Flag(
        "error", "the steps are not those of plain gradient descent",
        "put plain SGD in the optimizer's place for this test: gradients"
        " zeroed before each step, no clipping, no decay, no momentum, no schedule"),
    "order": Flag(
        "error", "values of several pairs are mixed, as those of the pair after",
        "follow one pair through the batch: sorting, shuffling, means, and shapes [B, 1] and [B]"),
    "overflow": Flag(
        "error", "a large margin or logit overflows in the loss or its gradient",
        "use log-sigmoid, softplus or logsumexp of the library, not exp and log"),
    "pad-is-eos": Flag(
        "error", "padding is recognised by its token id, which is that of end-of-sequence",
        "mask by position or length, never by the token's id"),
    "per-example": Flag(
        "error", "values of single pairs are wrong where their mean is right",
        "return the losses before the mean, in the batch's order"),
    "reference-gradient": Flag(
        "error", "gradients flow into the reference",
        "compute the reference without gradients, or detach it"),
    "reference-moves": Flag(
        "error", "the reference is the current policy, or is updated",
        "keep a frozen copy, or store its log-probabilities before training"),
    "reward-sign": Flag(
        "error", "the rewards of chosen and rejected are swapped",
        "subtract the rejected response's reward from the chosen one's"),
    "scale": Flag(
        "error", "the whole loss is multiplied by a constant",
        "compare the constant factor with the equation; it acts as a learning rate"),
    "shift": Flag(
        "error", "labels are not shifted against logits, or by two",
        "drop the last logit and the first label"),
    "sign": Flag(
        "error", "the margin has the wrong sign",
        "chosen less rejected, policy less reference"),
    "squared": Flag(
        "error", "an absolute value, or a half, in place of the square",
        "square the difference; an extra 1/2 halves the learning rate"),
    "sum-mean": Flag(
        "error", "token log-probabilities are averaged where they should be added, or the reverse",
        "add or average token log-probabilities as the equation says, each response's by its own"
        " number of tokens"),
    "swapped-reference": Flag(
        "error", "the reference's chosen and rejected log-probabilities are swapped, or left out",
        "subtract from each response its own reference log-probability; look at the arguments'"
        " order, too"),
    "target": Flag(
        "error", "IPO's target is another one: 1/beta, 1/(2 beta), beta",
        "look at which of 1/beta, 1/(2 beta) and tau the library means by beta"),
    "truncation-side": Flag(
        "error", "the wrong end of an over-long prompt is kept, or too little of it",
        "keep the end of a prompt that is too long (or say that it is the beginning)"),
    "unshifted-denominator": Flag(
        "error", "the normaliser is of another position than the label's logit",
        "take log-softmax over the whole vocabulary, before the shift"),
    "white-space": Flag(
        "error", "white space at the edges of a text is removed or added",
        "leave texts as they are; the tokenizer sees every space"),
    "zero-probability": Flag(
        "error", "outcomes of probability 0 give NaN",
        "select with where, never by multiplying -inf by 0"),
}
OF_MISTAKES = {
    "accumulation-lost": Flag(
        "error", "the gradients of some micro-batches are lost",
        "add the gradients of all micro-batches of a step, and update once"),
    "accuracy": Flag(
        "error", "the accuracy compares other numbers than the implicit rewards",
        "compare beta [log pi - log pi_ref] of chosen and rejected, pair by pair"),
    "clipped": Flag(
        "error", "a quantity or the loss is clipped, which ends its gradient there",
        "leave out the clamp: log-sigmoid needs none, and an estimate of the KL may be negative"),
    "divisor": Flag(
        "error", "the mean is over another number than that of the response's tokens",
        "divide by the number of tokens that the mask marks, but by no less than 1"),
    "integers": Flag(
        "error", "rewards are held as integers",
        "make a tensor of floats of the rewards, whatever the ids beside them are"),
    "kl-other": Flag(
        "error", "another divergence, or another estimate of it, stands for the KL",
        "over samples of the reference, average log pi_ref(y) - log pi(y); over all outcomes, add"
        " pi_ref(y) times it"),
    "layout": Flag(
        "error", "the columns of one concatenated batch are split in another order",
        "split a concatenated batch in the order in which it was built: halves, or alternating"),
    "link": Flag(
        "error", "the loss is another function of the margin, or of the log-probabilities",
        "compare with the equation, from the inside to the outside: brackets, logarithms, signs"),
    "metrics": Flag(
        "error", "the loss is right, and what is reported beside it is another quantity",
        "report beta [log pi - log pi_ref], or r_w - r_l, which nothing may change in place"),
    "normalised": Flag(
        "error", "rewards or margins are shifted or scaled by statistics of their batch",
        "leave out the whitening: the equation has each pair's own numbers"),
    "offset": Flag(
        "error", "something is added to the margin, the loss or a probability",
        "leave out what the equation does not have, as an epsilon or a second loss"),
    "overwritten": Flag(
        "error", "one of two gradients at the same position is lost",
        "add up the gradients of repeated positions, as np.add.at and index_add do"),
    "response-cut": Flag(
        "error", "a response is cut at the limit of the prompt",
        "cut the prompt alone at max_prompt_length"),
    "slope": Flag(
        "error", "the loss is right, and its derivative is that of another function",
        "compare the derivative with differences of the loss; that of -log sigmoid(x) is"
        " -sigmoid(-x)"),
    "temperature": Flag(
        "error", "logits are multiplied, or divided, by a constant",
        "score with the logits as they are: a temperature belongs to sampling"),
    "token-not-scored": Flag(
        "error", "a response's first or last tokens are not scored",
        "score every token of the response, the first by the prompt's last position"),
}
"""Flags of mistakes that no case is aimed at."""
# fmt: on
FLAGS = AIMED_AT | OF_MISTAKES
"""All flags."""
