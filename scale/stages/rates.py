"""Learning rates of a pretrained model by its size.

Sources, with Adam and one to three epochs of some 60,000 pairs: section 6.1 (1e-6; its reward
models 4e-6; batches of 16 and 64), DPO's authors (5e-7 at 2.8 billion parameters, batches of 64;
arXiv 2305.18290, appendix B), TRL's `DPOConfig` (1e-6), Zephyr 7B (5e-7) and SmolLM2 (1e-6 from 135
million to 1.7 billion, batches of 128) in the alignment handbook. Below half a billion parameters
ours is five times SmolLM2's: batches and files are smaller here. A reward model learns a new head,
so it has four times the rate, as in section 6.1. Adapters have ten times the rate of full training:
the handbook's Zephyr 7B (5e-6 with QLoRA), and "LoRA without regret" (Thinking Machines, 2025).
beta is `minipref.methods`': 0.1, as in TRL and with DPO's authors.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """Peak learning rates."""

    policy: float
    reward: float


BY_SIZE = {5e8: Rates(5e-6, 2e-5), 3e9: Rates(1e-6, 4e-6), float("inf"): Rates(5e-7, 2e-6)}
"""Parameters, at most -> rates."""


ADAPTERS = 10  # times the rate of full training


def rates_for(parameters: int, adapters: bool) -> Rates:
    """The rates of the smallest class that holds the model, or those of adapters of it."""
    rates = next(rates for limit, rates in BY_SIZE.items() if parameters <= limit)
    return Rates(*(rate * ADAPTERS for rate in rates)) if adapters else rates
