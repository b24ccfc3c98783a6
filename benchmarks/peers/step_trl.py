"""`python -m benchmarks.peers.step_trl FOLDER`: DPO steps of TRL's `DPOTrainer`, in its own training loop.

As fast as it goes: reference log-probs are columns (`precompute_ref_log_probs`), batches are padded to their longest
row, no gradient checkpointing. By default it meets the vocabulary in chunks, with PyTorch's fused AdamW and attention.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.peers.work import BETA, BETAS, CLIP, LEARNING_RATE, Turns, Work, load

CUDA = torch.cuda.is_available()


class AsGiven(DPOTrainer):
    """Takes rows of token ids, with their reference log-probs, as they are, and keeps the losses."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        self.losses: list[torch.Tensor] = []
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        self.losses.append(super().training_step(*args, **options))
        return self.losses[-1]


class Passes(TrainerCallback):
    """Ends the loop's time at the end of a pass, until the next is asked for."""

    def __init__(self, turns: Turns, trainer: AsGiven, steps: int):
        self.turns, self.trainer, self.steps = turns, trainer, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.turns.asked()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            if CUDA:
                torch.cuda.synchronize()
            self.turns.done(self.trainer.losses, torch.cuda.max_memory_allocated())
            self.trainer.losses.clear()
            control.should_training_stop = not self.turns.asked()


def config(folder: Path, work: Work) -> DPOConfig:
    return DPOConfig(
        str(folder / "trl"), per_device_train_batch_size=work.batch, beta=BETA, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=1e-8, weight_decay=0.0,
        max_grad_norm=CLIP, num_train_epochs=1e6, max_length=None, precompute_ref_log_probs=True,
        gradient_checkpointing=False, bf16=work.dtype == "bfloat16", use_cpu=not CUDA,
        use_liger_kernel=CUDA and find_spec("liger_kernel") is not None, train_sampling_strategy="sequential",
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )


def dataset(work: Work) -> Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = {name: [piece.tolist() for piece in pieces] for name, pieces in zip(names, work.pieces, strict=True)}
    ref = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), work.ref_logps.T.tolist(), strict=True))
    return Dataset.from_dict(ids | ref)


def main(folder: Path) -> None:
    turns, work = Turns(torch.cuda.get_device_name() if CUDA else "cpu"), load(folder)
    trainer = AsGiven(str(folder / "model"), args=config(folder, work), train_dataset=dataset(work))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Passes(turns, trainer, work.steps))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
