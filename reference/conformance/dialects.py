"""The table of objectives and dialects, and this NumPy implementation of them all as an adapter."""

from collections.abc import Callable
from functools import partial
from typing import Any

from reference.conformance import data, pairs, tokens, training
from reference.weights import ensemble_weights, hull_weights, mean_weights

Values = dict[str, Any]

E_DPO = partial(pairs.distil_ensemble, ensemble_weights)

# fmt: off
DIALECTS: dict[tuple[str, str], Callable[[Values, Values], Values]] = {
    ("dpo", "plain"):                pairs.plain_dpo,
    ("dpo", "conservative"):         pairs.conservative_dpo,
    ("dpo", "robust"):               pairs.robust_dpo,
    ("ipo", "paper"):                partial(pairs.summed_ipo, 1.0),
    ("ipo", "sum"):                  partial(pairs.summed_ipo, 0.5),
    ("ipo", "token-mean"):           partial(pairs.per_token, partial(pairs.summed_ipo, 0.5)),
    ("distillation", "d-dpo"):       pairs.distil,
    ("distillation", "rebel"):       partial(pairs.over_beta_squared, pairs.distil),
    ("distillation", "rpo-sq"):      pairs.rpo_sq,
    ("ensemble", "batch-min"):       E_DPO,
    ("ensemble", "example-min"):     pairs.nearest_per_pair,
    ("ensemble", "hull"):            partial(pairs.distil_ensemble, hull_weights),
    ("ensemble", "mean"):            partial(pairs.distil_ensemble, mean_weights),
    ("pessimistic", "sampled-kl"):   partial(pairs.sampled_kl, pairs.plain_dpo),
    ("pessimistic", "exact-kl"):     partial(pairs.exact_kl, pairs.plain_dpo),
    ("reward", "bradley-terry"):     pairs.reward,
    ("reward", "margin"):            pairs.reward_beyond,
    ("logps", "sum"):                tokens.summed,
    ("logps", "mean"):               tokens.averaged,
    ("logps", "shared-prefix"):      tokens.shared_prefix,
    ("data", "explicit"):            data.explicit,
    ("data", "conversations"):       data.conversations,
    ("data", "hh-text"):             data.hh_text,
    ("data", "tokens-keep-end"):     partial(data.tokens, True),
    ("data", "tokens-keep-start"):   partial(data.tokens, False),
    ("training", "dpo"):             partial(training.train, pairs.plain_dpo),
    ("training", "d-dpo"):           partial(training.train, pairs.distil),
    ("training", "e-dpo"):           partial(training.train, E_DPO),
    ("training", "sft"):             training.train_sft,
}
# fmt: on


class Reference:
    """The layer `reference/` as an adapter: what others are compared with passes its own cases."""

    dtype = "float64"

    def supports(self, objective: str, dialect: str) -> bool:
        """Whether `DIALECTS` has it: all that the vectors ask for."""
        return (objective, dialect) in DIALECTS

    def evaluate(self, objective: str, dialect: str, params: Values, inputs: Values) -> Values:
        """The outputs of a case, in float64."""
        return DIALECTS[objective, dialect](params, inputs)


adapter = Reference()
