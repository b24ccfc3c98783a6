"""`python -m benchmarks.peers.step_tunix FOLDER`: DPO steps of Tunix's `DPOTrainer`, in its own training loop.

As fast as it goes: no rematerialisation, and each batch padded to the next multiples of `GRAIN` of its longest prompt
and its longest response, whose compilations are not timed.
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

GRAIN = 32
Given = tuple[TrainingInput, np.ndarray]


class Stored(DPOTrainer):
    """Given reference log-probs, which Tunix's loss takes and its trainer would compute at every step, with a reference
    model; and keeps the losses."""

    losses: list[jax.Array]

    def _prepare_inputs(self, given: Given) -> TrainExample:
        tokens, ref = given
        return super()._prepare_inputs(tokens).replace(ref_chosen_logps=ref[:, 0], ref_rejected_logps=ref[:, 1])

    def _buffer_metrics(self, buffer: Any, loss: Any, *args: Any, **options: Any) -> Any:
        self.losses.append(loss)
        return super()._buffer_metrics(buffer, loss, *args, **options)


def model(folder: Path) -> nnx.Module:
    ours = open_weights(folder).config
    config = ModelConfig(ours.num_layers, ours.vocab_size, ours.d_model, ours.d_ff, ours.num_heads, ours.head_dim, ours.num_kv_heads,
                         int(ours.rope_base), ours.norm_eps, weight_tying=ours.tie_embeddings)
    return create_model_from_safe_tensors(str(folder), config)


def batches(work: Work) -> list[Given]:
    batch = work.batch
    return [(padded([pieces[i : i + batch] for pieces in work.pieces]), work.ref_logps[i : i + batch])
            for i in range(0, len(work.ends), batch)]


def padded(pieces: list[list[np.ndarray]]) -> TrainingInput:
    prompts, *responses = pieces
    longest = max(len(piece) for side in responses for piece in side)
    arrays = [array for side in responses for array in filled(side, longest, left=False)]
    return TrainingInput(*filled(prompts, max(map(len, prompts)), left=True), *arrays)


def filled(pieces: list[np.ndarray], longest: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, padded on one side."""
    ids = np.zeros((len(pieces), round_up(longest, GRAIN)), np.int32)
    mask = np.zeros_like(ids)
    for i, piece in enumerate(pieces):
        at = slice(-len(piece), None) if left else slice(len(piece))
        ids[i, at], mask[i, at] = piece, 1
    return ids, mask


def main(folder: Path) -> None:
    turns, work = Turns(jax.devices()[0].device_kind), load(folder)
    adam = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE, *BETAS))
    trainer = Stored(model(folder / "model"), None, adam, DPOTrainingConfig(eval_every_n_steps=1, beta=BETA))
    trainer.is_managed_externally = True  # its loop can be entered again
    rows = batches(work)
    while turns.asked():
        trainer.losses = []
        trainer.train(rows)
        jax.block_until_ready(nnx.state(trainer.optimizer))
        stats = jax.devices()[0].memory_stats() or {}
        turns.done(trainer.losses, stats.get("peak_bytes_in_use", 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
