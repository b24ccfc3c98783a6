"""TODO scale.stages.bounds."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from scale.errors import InputError

LEAST, MOST = map(float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


COUNTS = ("steps", "batch", "num_reward_models", "n", "seeds", "samples", "size", "pairs", "prompt", "response", "num_layers",
          "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "data", "tensor", "tokens", "slices")


BOUNDS: dict[str, tuple[float, float]] = {  # by name, of each number of an option
    **dict.fromkeys(COUNTS, (1.0, MOST)),
    **dict.fromkeys(("seed", "shape_seeds", "warmup", "snapshots", "gamma", "gammas"), (0.0, MOST)),
    **dict.fromkeys(("temperature", "most_kl", "z_loss", "fsdp", "processes", "process", "workers"), (0.0, MOST)),
    "mesh": (1.0, MOST),
    **dict.fromkeys(("learning_rate", "learning_rates", "beta", "betas", "tau", "taus"), (LEAST, MOST)),
    **dict.fromkeys(("end_lr_ratio", "rho", "rhos", "length_biases", "validation", "test"), (0.0, 1.0)),
}


def require_bounds(options: Any) -> None:
    """Errors: InputError for the first number of the options that is out of its bounds."""
    for fault in out_of_bounds(options):
        raise InputError(fault)


def out_of_bounds(options: Any, prefix: str = "--") -> Iterator[str]:
    """What is wrong with the numbers of a stage's options."""
    for field in fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from out_of_bounds(value, f"{name}.")
        low, high = BOUNDS.get(field.name, (-MOST, MOST))
        numbers = [v for v in flat(value) if isinstance(v, int | float)]
        yield from (f"{name}: must be {bounds_text(low, high)}, not {v:g}" for v in numbers if not low <= v <= high)


def flat(value: Any) -> list[Any]:
    return [v for each in value for v in flat(each)] if isinstance(value, tuple) else [value]


def bounds_text(low: float, high: float) -> str:
    if low in (LEAST, -MOST):
        return "above 0" if low == LEAST else "finite"
    return f"at least {low:g}" if high == MOST else f"within {low:g} and {high:g}"
