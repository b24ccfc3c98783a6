"""The hyperparameters that the search selected, and section 6.1's own sizes and grids."""

from functools import cache
from pathlib import Path
from typing import Any

from minipref.methods import METHODS
from scale.data.dataset import Limits
from scale.files import read_csv
from scale.model.config import ModelConfig
from scale.train.loop import TrainingConfig

LEARNING_RATE = 1e-3  # of a method that was not searched

SEARCHED_FILE = Path(__file__).parent / "searched.csv"  # written by `python -m benchmarks.search`


@cache
def searched_table() -> dict[str, dict[float, tuple[float, float]]]:
    """method -> rho -> (beta, learning rate)."""
    table: dict[str, dict[float, tuple[float, float]]] = {}
    for row in read_csv(SEARCHED_FILE):
        values = float(row["beta"]), float(row["learning_rate"])
        table.setdefault(row["method"], {})[float(row["rho"])] = values
    return table


def searched(method: str, rho: float) -> tuple[float, float]:
    """The (beta, learning rate) that the search selected at the nearest rho.

    Args:
        method: A row of `METHODS`. One that was not searched has its own beta.
        rho: Length bias.

    Returns:
        beta and the learning rate.
    """
    table = searched_table()
    if method not in table:
        return METHODS[method].beta, LEARNING_RATE
    by_rho = table[method]
    return by_rho[min(by_rho, key=lambda other: abs(other - rho))]


# section 6.1's candidates for beta, and for IPO's tau
GRID = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
GRIDS = {"ipo": (0.01, 0.1, 1.0, 3.0, 5.0, 10.0, 25.0)}

REWARD = TrainingConfig(3_000, 64, 4e-6, 0, 1.0)

# preset -> the options of `Paper` that differ from its defaults
OPTIONS: dict[str, dict[str, Any]] = {
    "miniature": {},
    # section 6.1, which leaves open PaLM-2-XS's shape and its fine-tuning: they are our choice
    "paper": {
        "preset": "paper",
        "out": Path("runs/paper-scale"),
        "rhos": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        "learning_rates": (1e-6,),
        "most_kl": None,
        "prompts": None,
        "pairs": 30_000,
        "model": ModelConfig(
            vocab_size=32_768, num_layers=24, d_model=1024, num_heads=8, head_dim=128, d_ff=4096
        ),
        "limits": Limits(512, 128),
        "sft": TrainingConfig(5_000, 64, 1e-4, 500),
        "oracle": REWARD,
        "reward": REWARD,
        "align": TrainingConfig(10_000, 16, 1e-6, 0, 1.0),
    },
}
