"""The libraries that are tested: what each claims of the kit, where, and its known failures."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TRL024 = Path(sys.prefix, "trl024")
"""The folder of the TRL that LLaMA-Factory needs; the other libraries do not see it."""
TRL029 = Path(sys.prefix, "trl029")
"""That of ms-swift."""
OWN_TRL = {"llamafactory": ("0.24.0", TRL024), "ms-swift": ("0.29.1", TRL029)}


class Peer(NamedTuple):
    """One adapter of one library.

    Attributes:
        library: The name in tables.
        package: The name of the package.
        adapter: Its module in `benchmarks.peers`, and its name there.
        claims: objective/dialect -> where the library claims it: its documentation, or a name in
            its code.
        follows: A dialect that the library claims and does not do -> the dialects that it follows.
    """

    library: str
    package: str
    adapter: str
    claims: dict[str, str]
    follows: dict[str, list[str]]

    @property
    def name(self) -> str:
        return self.adapter.removesuffix(":adapter").replace(":", "-")

    @property
    def module(self) -> str:
        return self.adapter.partition(":")[0]

    @property
    def xfail(self) -> Path:
        """The list of the cases that it is known to fail."""
        return HERE / "xfail" / f"{self.name}.txt"

    @property
    def command(self) -> list[str]:
        """The kit on this adapter."""
        kit = [sys.executable, "-m", "reference.conformance", "--json"]
        return [*kit, "--adapter", f"benchmarks.peers.{self.adapter}", "--xfail", str(self.xfail)]

    def missing(self) -> str:
        """What has to be installed before the adapter can run, or an empty text."""
        try:
            self.version()
        except PackageNotFoundError:
            return self.package
        version, folder = OWN_TRL.get(self.package, ("", HERE))
        return "" if folder.is_dir() else f"trl {version} in {folder.name}"

    def version(self) -> str:
        return version(self.package)


PEERS = (
    Peer(
        library="TRL",
        package="trl",
        adapter="trl:adapter",
        claims={
            "dpo/plain": "`DPOTrainer`, `loss_type` `sigmoid`",
            "dpo/robust": (
                "`loss_type` `robust`; `label_smoothing` is the probability of a flipped label"
            ),
            "ipo/token-mean": "comment at `loss_type` `ipo`: normalised by the number of tokens",
            "reward/bradley-terry": "`RewardTrainer`",
            "reward/margin": "`RewardTrainer`, column `margin`",
            "logps/sum": "`DPOTrainer`, by `add_fused_lm_head`",
            "data/explicit": "`maybe_extract_prompt`",
            "data/conversations": "`maybe_extract_prompt`",
        },
        follows={},
    ),
    Peer(
        library="TRL, `sigmoid` with `label_smoothing`",
        package="trl",
        adapter="trl:smoothed",
        claims={
            "dpo/conservative": (
                "not claimed: the documentation gives `label_smoothing` to `robust` and `exo_pair`"
            ),
        },
        follows={"dpo/conservative": ["dpo/plain"]},
    ),
    Peer(
        library="Tunix",
        package="google-tunix",
        adapter="tunix:adapter",
        claims={
            "dpo/plain": "`dpo_loss_fn`",
            "dpo/conservative": "`dpo_loss_fn`: `label_smoothing`",
            "logps/sum": "`compute_logps`",
            "data/tokens-keep-start": "`process_dpo_record`: what is too long is truncated",
        },
        follows={},
    ),
    Peer(
        library="Liger Kernel",
        package="liger-kernel",
        adapter="liger:adapter",
        claims={
            "dpo/plain": "`LigerFusedLinearDPOLoss`, `loss_type` `sigmoid`",
            "dpo/conservative": "`label_smoothing`, said to be for `robust`, `exo_pair` and cDPO",
            "dpo/robust": "`loss_type` `robust`",
            "logps/sum": "`average_log_prob` false",
            "logps/mean": "`average_log_prob` true",
        },
        follows={"dpo/conservative": ["dpo/plain"]},
    ),
    Peer(
        library="torchtune",
        package="torchtune",
        adapter="torchtune:adapter",
        claims={
            "dpo/plain": "`DPOLoss`",
            "dpo/conservative": "`DPOLoss`: comment at `label_smoothing`",
            "logps/sum": "`get_batch_log_probs`",
            "logps/mean": "`get_batch_log_probs`, `return_average_logprobs`",
        },
        follows={},
    ),
    Peer(
        library="OpenRLHF",
        package="openrlhf",
        adapter="openrlhf:adapter",
        claims={
            "dpo/plain": "`DPOLoss`",
            "dpo/conservative": "`DPOLoss`: comment at `label_smoothing`",
            "ipo/sum": "`DPOLoss`, `ipo`",
            "reward/bradley-terry": "`PairWiseLoss`",
            "reward/margin": "`PairWiseLoss`, `margin`",
            "logps/sum": "`DPOTrainer._get_batch_logps`",
            "logps/mean": "`DPOTrainer._get_batch_logps`",
        },
        follows={},
    ),
    Peer(
        library="OpenRLHF, `LogExpLoss`",
        package="openrlhf",
        adapter="openrlhf:logexp",
        claims={
            "reward/bradley-terry": "`LogExpLoss`",
            "reward/margin": "`LogExpLoss`, `margin`",
        },
        follows={},
    ),
    Peer(
        library="LLaMA-Factory (TRL 0.24.0)",
        package="llamafactory",
        adapter="llamafactory:adapter",
        claims={
            "dpo/plain": "`pref_loss` `sigmoid`",
            "dpo/conservative": "`dpo_label_smoothing`, said to be that of cDPO",
            "ipo/token-mean": (
                "`pref_loss` `ipo`; `concatenated_forward`: average log-probabilities"
            ),
            "reward/bradley-terry": "`PairwiseTrainer`",
            "logps/sum": "`get_batch_logps`",
        },
        follows={"ipo/token-mean": ["dpo/length-normalised"]},
    ),
    Peer(
        library="ms-swift (TRL 0.29.1)",
        package="ms-swift",
        adapter="ms_swift:adapter",
        claims={
            "dpo/plain": "`DPOTrainer`, `loss_type` `sigmoid`",
            "dpo/conservative": "`dpo_loss`: `label_smoothing` with `sigmoid`",
            "dpo/robust": "`loss_type` `robust`",
            "ipo/token-mean": "`_get_ipo_sequence_logps`",
        },
        follows={},
    ),
    Peer(
        library="mlx-lm-lora",
        package="mlx-lm-lora",
        adapter="mlx_lm_lora:adapter",
        claims={
            "dpo/plain": "`dpo_loss`, `loss_type` `sigmoid`",
            "ipo/token-mean": "`compute_score`: averaged where `loss_type` is `ipo`",
            "logps/sum": "`get_token_scores`, `compute_score`",
        },
        follows={},
    ),
    Peer(
        library="x-transformers",
        package="x-transformers",
        adapter="x_transformers:adapter",
        claims={
            "dpo/plain": "`DPO.forward`: follows Appendix B of the DPO paper",
            "logps/mean": "`log_prob_from_model_and_seq`, `masked_mean`",
        },
        follows={},
    ),
    Peer(
        library="self-rewarding-lm-pytorch",
        package="self-rewarding-lm-pytorch",
        adapter="self_rewarding:adapter",
        claims={
            "dpo/plain": "`DPO.forward`: follows Appendix B of the DPO paper",
            "logps/mean": "`log_prob_from_model_and_seq`, `masked_mean`",
        },
        follows={},
    ),
    Peer(
        library="TorchRL",
        package="torchrl",
        adapter="torchrl:adapter",
        claims={"reward/bradley-terry": "`GPT2RewardModel.compute_reward_loss`"},
        follows={},
    ),
)
