"""The range of each number that an option takes."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from scale.errors import InputError

SMALLEST, LARGEST = map(float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

AT_LEAST_ONE = """
    steps batch_size num_reward_models reward_models n seeds samples size pages pairs prompts rows
    every accumulation prompt response num_layers num_heads num_kv_heads head_dim d_model d_ff
    vocab_size max_seq_len data tensor tokens slices mesh batch
"""
AT_LEAST_ZERO = """
    warmup snapshots gamma gammas temperature most_kl z_loss fsdp processes process workers norm_eps
    rank
"""
ABOVE_ZERO = "learning_rate learning_rates beta betas rope_base scale"
WITHIN_ZERO_AND_ONE = "end_lr_ratio rho rhos length_biases validation test"

BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(AT_LEAST_ONE.split(), (1.0, LARGEST)),
    **dict.fromkeys(AT_LEAST_ZERO.split(), (0.0, LARGEST)),
    **dict.fromkeys(ABOVE_ZERO.split(), (SMALLEST, LARGEST)),
    **dict.fromkeys(WITHIN_ZERO_AND_ONE.split(), (0.0, 1.0)),
    "epochs": (SMALLEST, 1e4),
    **dict.fromkeys(("seed", "shape_seeds"), (0.0, 2.0**32 - 1)),  # JAX drops further bits
}
"""Bounds by option name; options not listed may be any finite number."""


def require_bounds(options: Any) -> None:
    """Refuse options with a number out of its bounds.

    Raises:
        InputError: It names the first such option.
    """
    for fault in out_of_bounds(options):
        raise InputError(fault)


def out_of_bounds(options: Any, prefix: str = "--") -> Iterator[str]:
    """One sentence for each number of the options that is out of its bounds."""
    for field in fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from out_of_bounds(value, f"{name}.")
        low, high = BOUNDS.get(field.name, (-LARGEST, LARGEST))
        for number in flatten(value):
            if isinstance(number, int | float) and not low <= number <= high:
                yield f"{name}: must be {bounds_text(low, high)}, not {number:.10g}"


def flatten(value: Any) -> list[Any]:
    if not isinstance(value, tuple):
        return [value]
    return [leaf for item in value for leaf in flatten(item)]


def bounds_text(low: float, high: float) -> str:
    if low in (SMALLEST, -LARGEST):
        most = f" and at most {high:g}" * (high != LARGEST)
        return "above 0" + most if low == SMALLEST else "finite"
    return f"at least {low:g}" if high == LARGEST else f"within {low:g} and {high:.10g}"
