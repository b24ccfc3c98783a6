"""`python -m benchmarks.peers.step_trl FOLDER`: the DPO steps of TRL's `DPOTrainer` and its loop.

The configuration is TRL's fastest. Reference log-probabilities are columns
(`precompute_ref_log_probs`), batches are padded to their longest row, and there is no gradient
checkpointing. By default TRL computes logits in chunks, with the fused AdamW and attention of
PyTorch.
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


class PreparedRowsTrainer(DPOTrainer):
    """TRL's trainer on rows that have token ids and reference log-probabilities already.

    It keeps the losses.
    """

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        self.losses: list[torch.Tensor] = []
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        self.losses.append(super().training_step(*args, **options))
        return self.losses[-1]


class Passes(TrainerCallback):
    """Stops the clock at the end of a pass, and waits for the next turn."""

    def __init__(self, turns: Turns, trainer: PreparedRowsTrainer, steps: int):
        self.turns, self.trainer, self.steps = turns, trainer, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.turns.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            if CUDA:
                torch.cuda.synchronize()
            self.turns.report(self.trainer.losses, torch.cuda.max_memory_allocated())
            self.trainer.losses.clear()
            control.should_training_stop = not self.turns.wait()


def config(folder: Path, work: Work) -> DPOConfig:
    """TRL's options."""
    return DPOConfig(
        str(folder / "trl"),
        per_device_train_batch_size=work.batch,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        num_train_epochs=1e6,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=work.dtype == "bfloat16",
        use_cpu=not CUDA,
        use_liger_kernel=CUDA and find_spec("liger_kernel") is not None,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def dataset(work: Work) -> Dataset:
    """The rows in TRL's columns."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {
        name: [ids.tolist() for ids in parts] for name, parts in zip(names, work.parts, strict=True)
    }
    chosen, rejected = work.ref_logps.T.tolist()
    ref_logps = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return Dataset.from_dict(columns | ref_logps)


def main(folder: Path) -> None:
    """Take turns until there are no more."""
    turns, work = Turns(torch.cuda.get_device_name() if CUDA else "cpu"), load(folder)
    trainer = PreparedRowsTrainer(
        str(folder / "model"), args=config(folder, work), train_dataset=dataset(work)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Passes(turns, trainer, work.steps))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
