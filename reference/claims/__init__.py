"""What the paper claims: one function for each claim, which measures it on one instance.

A claim returns `Evidence(measured, bound, margin)` and holds where margin >= 0. Its docstring has
the statement in words, the idea of the proof and the place in the paper. Statements that are false
as printed, and their corrections, are in `reference.errata`.

Args of every claim, by name:
    policy_logps, ref_logps: log pi and log pi_ref [X, Y] of Y responses to X prompts, normalised,
        in nats.
    rivals: log-probabilities [M, X, Y] of M other policies, in nats.
    rewards: r [K, X, Y] of K reward models, in nats.
    margin: h of one pair, a scalar in nats.
    margins, reward_margins: h [B] and rho [K, B] of B pairs, in nats.
    theta: logits [V] of a bag of words' reference.
    chosen, rejected: token ids [n] of y_w and y_l.
    arms: the number of arms of a bandit.
    beta: the weight of the KL in Eq. 1, above 0.
    gamma: the weight of the forward KL in Eq. 11 and Eq. 13, above 0.
    alpha: the weight of the loss in Eq. 10 over its KL's, above 1.
    tau: the inverse of IPO's target margin, per nat, above 0.
"""

from reference.claims.evidence import Evidence, at_most, identity, worst
from reference.claims.section3 import (
    closed_form_is_optimal,
    dpo_is_bradley_terry,
    rewards_and_policies_invert,
)
from reference.claims.section4 import (
    bag_descent,
    bag_log_probability,
    corollary_1,
    proposition_1,
    proposition_2,
    proposition_3,
)
from reference.claims.section5_distillation import (
    distillation_is_symmetric,
    ipo_is_distillation,
    theorem_1,
    uniform_distillation,
)
from reference.claims.section5_ensembles import (
    equation_11,
    equation_14,
    minibatch_minima,
    minimum_over_models,
    proposition_4,
    proposition_4_is_pessimistic,
    sampled_kl_is_unbiased,
)
from reference.claims.section5_pessimism import (
    hull_is_exact,
    hull_policy_is_stationary,
    maximin_values,
    one_reward_model_is_rlhf,
    pessimism_never_loses,
    theorem_2,
    weak_duality,
)
from reference.claims.section6 import gradients_are_slopes
from reference.claims.section7 import (
    dpo_on_a_chain,
    ipo_and_pessimistic_dpo_agree,
    pessimistic_dpo_on_arms,
    proposition_5,
    proposition_6,
    proposition_7,
)

__all__ = [
    "Evidence",
    "at_most",
    "bag_descent",
    "bag_log_probability",
    "closed_form_is_optimal",
    "corollary_1",
    "distillation_is_symmetric",
    "dpo_is_bradley_terry",
    "dpo_on_a_chain",
    "equation_11",
    "equation_14",
    "gradients_are_slopes",
    "hull_is_exact",
    "hull_policy_is_stationary",
    "identity",
    "ipo_and_pessimistic_dpo_agree",
    "ipo_is_distillation",
    "maximin_values",
    "minibatch_minima",
    "minimum_over_models",
    "one_reward_model_is_rlhf",
    "pessimism_never_loses",
    "pessimistic_dpo_on_arms",
    "proposition_1",
    "proposition_2",
    "proposition_3",
    "proposition_4",
    "proposition_4_is_pessimistic",
    "proposition_5",
    "proposition_6",
    "proposition_7",
    "rewards_and_policies_invert",
    "sampled_kl_is_unbiased",
    "theorem_1",
    "theorem_2",
    "uniform_distillation",
    "weak_duality",
    "worst",
]
