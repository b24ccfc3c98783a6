"""`python -m benchmarks.peers.step_tunix FOLDER`: the DPO steps of Tunix and its loop.

The configuration is Tunix's fastest. There is no rematerialisation. A batch is padded to the next
multiples of `SIZE_STEP` of its longest prompt and its longest response; compilations are not timed.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainExample, TrainingInput

from benchmarks.peers.work import BETA, BETAS, CLIP, LEARNING_RATE, Turns, Work, load
from scale.data.layout import round_up
from scale.io.huggingface import open_weights

SIZE_STEP = 32
Example = tuple[TrainingInput, np.ndarray]
"""The tokens of a batch, and their reference log-probabilities [B, 2]."""


class StoredReferenceTrainer(DPOTrainer):
    """Tunix's trainer with stored reference log-probabilities.

    Tunix's loss takes them. Its trainer would compute them at every step, with a reference model.
    The class also keeps the losses.
    """

    losses: list[jax.Array]

    def _prepare_inputs(self, example: Example) -> TrainExample:
        tokens, ref = example
        prepared = super()._prepare_inputs(tokens)
        return prepared.replace(ref_chosen_logps=ref[:, 0], ref_rejected_logps=ref[:, 1])

    def _buffer_metrics(self, buffer: Any, loss: Any, *args: Any, **options: Any) -> Any:
        self.losses.append(loss)
        return super()._buffer_metrics(buffer, loss, *args, **options)


def load_model(folder: Path) -> nnx.Module:
    """Tunix's Llama with the weights of a Hugging Face folder."""
    ours = open_weights(folder).config
    config = ModelConfig(
        ours.num_layers,
        ours.vocab_size,
        ours.d_model,
        ours.d_ff,
        ours.num_heads,
        ours.head_dim,
        ours.num_kv_heads,
        int(ours.rope_base),
        ours.norm_eps,
        weight_tying=ours.tie_embeddings,
    )
    return create_model_from_safe_tensors(str(folder), config)


def make_batches(work: Work) -> list[Example]:
    """The batches of a pass."""
    slices = [slice(i, i + work.batch) for i in range(0, len(work.ends), work.batch)]
    return [(pad_batch([part[s] for part in work.parts]), work.ref_logps[s]) for s in slices]


def pad_batch(parts: list[list[np.ndarray]]) -> TrainingInput:
    """Prompts padded on the left, and responses on the right."""
    prompts, *responses = parts
    longest = max(len(ids) for side in responses for ids in side)
    arrays = [array for side in responses for array in pad(side, longest, left=False)]
    return TrainingInput(*pad(prompts, max(map(len, prompts)), left=True), *arrays)


def pad(rows: list[np.ndarray], longest: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, padded on one side."""
    ids = np.zeros((len(rows), round_up(longest, SIZE_STEP)), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(-len(row), None) if left else slice(len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def main(folder: Path) -> None:
    """Take turns until there are no more."""
    turns, work = Turns(jax.devices()[0].device_kind), load(folder)
    adam = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE, *BETAS))
    config = DPOTrainingConfig(eval_every_n_steps=1, beta=BETA)
    trainer = StoredReferenceTrainer(load_model(folder / "model"), None, adam, config)
    trainer.is_managed_externally = True  # its loop can be entered again
    batches = make_batches(work)
    while turns.wait():
        trainer.losses = []
        trainer.train(batches)
        jax.block_until_ready(nnx.state(trainer.optimizer))
        stats = jax.devices()[0].memory_stats() or {}
        turns.report(trainer.losses, stats.get("peak_bytes_in_use", 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
