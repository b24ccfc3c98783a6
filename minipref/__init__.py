"""Robust preference optimization through reward model distillation, in JAX.

See `minipref/README.md` for the library on one page.
"""

from minipref.batch import Batch, Inputs, Targets, attention_mask
from minipref.logps import response_logps, response_rewards, token_logps
from minipref.losses import preference_loss, reward_loss, sft_loss, z_loss
from minipref.methods import METHODS, Method, method_loss
from minipref.objectives import (
    bradley_terry,
    distillation,
    dpo,
    ensemble_distillation,
    forward_kl,
    hull_distillation,
    ipo,
    log_ratio_margin,
    mean_distillation,
    pessimistic,
    pessimistic_rlhf,
    rlhf,
    sampled_forward_kl,
    sequence_logp,
)
from minipref.reward_models import RewardModel, ensemble_rewards, stack
from minipref.training import Hyperparameters, TrainState, init_state, progress, train_step

__all__ = [
    "METHODS",
    "Batch",
    "Hyperparameters",
    "Inputs",
    "Method",
    "RewardModel",
    "Targets",
    "TrainState",
    "attention_mask",
    "bradley_terry",
    "distillation",
    "dpo",
    "ensemble_distillation",
    "ensemble_rewards",
    "forward_kl",
    "hull_distillation",
    "init_state",
    "ipo",
    "log_ratio_margin",
    "mean_distillation",
    "method_loss",
    "pessimistic",
    "pessimistic_rlhf",
    "preference_loss",
    "progress",
    "response_logps",
    "response_rewards",
    "reward_loss",
    "rlhf",
    "sampled_forward_kl",
    "sequence_logp",
    "sft_loss",
    "stack",
    "token_logps",
    "train_step",
    "z_loss",
]
