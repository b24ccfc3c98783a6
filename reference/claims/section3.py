"""Claims of section 3: Eq. 1-6. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import objectives, tabular
from reference.claims.evidence import at_most, identity, worst
from reference.objectives import dpo, forward_kl, log_ratio_margin, rlhf
from reference.tabular import implicit_rewards, optimal_policy


def closed_form_is_optimal(ref_logps, rewards, beta, rivals):
    """The policy of Eq. 3 maximises Eq. 1, with value beta log Z.

    Proof: Eq. 1 is beta log Z - beta KL(pi || Eq. 3).
    Source: Eq. 1, 3.
    """
    best = optimal_policy(ref_logps, rewards[0], beta)
    most = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    values = rlhf(rivals, ref_logps, rewards[0], beta)
    gaps = most - beta * forward_kl(rivals, best)
    return worst(
        identity(rlhf(best, ref_logps, rewards[0], beta), most),
        at_most(values, most),
        identity(values, gaps),
    )


def rewards_and_policies_invert(policy_logps, ref_logps, rewards, beta):
    """Eq. 3 and Eq. 4 are inverses of each other.

    Proof: Eq. 4 is the logarithm of Eq. 3.
    Source: Eq. 3, 4.
    """
    implied = implicit_rewards(optimal_policy(ref_logps, rewards[0], beta), ref_logps, beta)
    constants = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    recovered = optimal_policy(ref_logps, implicit_rewards(policy_logps, ref_logps, beta), beta)
    return worst(
        identity(implied + constants[:, None], rewards[0]),
        identity(recovered, policy_logps),
    )


def dpo_is_bradley_terry(policy_logps, ref_logps, beta):
    """Eq. 5 and DPO, Eq. 6, are Bradley-Terry, Eq. 2, with the implicit rewards.

    Proof: log Z cancels in the log-odds.
    Source: Eq. 2, 5, 6.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    gap = rewards[:, 0] - rewards[:, 1]
    policy_pair, ref_pair = policy_logps[:, :2].T, ref_logps[:, :2].T
    loss = dpo(log_ratio_margin(*policy_pair, *ref_pair), beta)
    reversed_loss = objectives.bradley_terry(-gap)
    wins = tabular.preference_probability(policy_logps, ref_logps, beta)[:, 0, 1]
    return worst(
        identity(reversed_loss - loss, gap),
        identity(np.exp(-reversed_loss) + np.exp(-loss), 1.0),
        identity(wins, np.exp(-loss)),
    )
