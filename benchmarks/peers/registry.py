"""Which libraries are tested: what of the kit each of them claims, and where; and what is known of them."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TRL024 = Path(sys.prefix, "trl024")
"""Where LLaMA-Factory finds the TRL that it needs, hidden from the other libraries."""


class Peer(NamedTuple):
    """One adapter.

    claims:  objective/dialect -> where the library says so: its documentation, else a name in its code.
    follows: what is claimed and not done -> the dialects that it follows in fact.
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
        return HERE / "xfail" / f"{self.name}.txt"

    @property
    def command(self) -> list[str]:
        kit = [sys.executable, "-m", "reference.conformance", "--json"]
        return [*kit, "--adapter", f"benchmarks.peers.{self.adapter}", "--xfail", str(self.xfail)]

    def missing(self) -> str:
        """What has to be installed before it can run; nothing where it can."""
        try:
            self.version()
        except PackageNotFoundError:
            return self.package
        return "trl 0.24.0 in trl024" if self.package == "llamafactory" and not TRL024.is_dir() else ""

    def version(self) -> str:
        return version(self.package)


PEERS = (
    Peer("TRL", "trl", "trl:adapter", {
        "dpo/plain": "`DPOTrainer`, `loss_type` `sigmoid`",
        "dpo/robust": "`loss_type` `robust`; `label_smoothing` is the probability of a flipped label",
        "ipo/token-mean": "comment at `loss_type` `ipo`: normalised by the number of tokens",
        "reward/bradley-terry": "`RewardTrainer`",
        "reward/margin": "`RewardTrainer`, column `margin`",
        "logps/sum": "`DPOTrainer`, by `add_fused_lm_head`",
        "data/explicit": "`maybe_extract_prompt`",
        "data/conversations": "`maybe_extract_prompt`",
    }, {}),
    Peer("TRL, `sigmoid` with `label_smoothing`", "trl", "trl:smoothed", {
        "dpo/conservative": "not claimed: the documentation gives `label_smoothing` to `robust` and `exo_pair`",
    }, {"dpo/conservative": ["dpo/plain"]}),
    Peer("Tunix", "google-tunix", "tunix:adapter", {
        "dpo/plain": "`dpo_loss_fn`",
        "dpo/conservative": "`dpo_loss_fn`: `label_smoothing`",
        "logps/sum": "`compute_logps`",
        "data/tokens-keep-start": "`process_dpo_record`: what is too long is truncated",
    }, {}),
    Peer("Liger Kernel", "liger-kernel", "liger:adapter", {
        "dpo/plain": "`LigerFusedLinearDPOLoss`, `loss_type` `sigmoid`",
        "dpo/conservative": "`label_smoothing`, said to be for `robust`, `exo_pair` and cDPO",
        "dpo/robust": "`loss_type` `robust`",
        "logps/sum": "`average_log_prob` false",
        "logps/mean": "`average_log_prob` true",
    }, {"dpo/conservative": ["dpo/plain"]}),
    Peer("torchtune", "torchtune", "torchtune:adapter", {
        "dpo/plain": "`DPOLoss`",
        "dpo/conservative": "`DPOLoss`: comment at `label_smoothing`",
        "logps/sum": "`get_batch_log_probs`",
        "logps/mean": "`get_batch_log_probs`, `return_average_logprobs`",
    }, {}),
    Peer("OpenRLHF", "openrlhf", "openrlhf:adapter", {
        "dpo/plain": "`DPOLoss`",
        "dpo/conservative": "`DPOLoss`: comment at `label_smoothing`",
        "ipo/sum": "`DPOLoss`, `ipo`",
        "reward/bradley-terry": "`PairWiseLoss`",
        "reward/margin": "`PairWiseLoss`, `margin`",
        "logps/sum": "`DPOTrainer._get_batch_logps`",
        "logps/mean": "`DPOTrainer._get_batch_logps`",
    }, {}),
    Peer("OpenRLHF, `LogExpLoss`", "openrlhf", "openrlhf:logexp", {
        "reward/bradley-terry": "`LogExpLoss`",
        "reward/margin": "`LogExpLoss`, `margin`",
    }, {}),
    Peer("LLaMA-Factory (TRL 0.24.0)", "llamafactory", "llamafactory:adapter", {
        "dpo/plain": "`pref_loss` `sigmoid`",
        "dpo/conservative": "`dpo_label_smoothing`, said to be that of cDPO",
        "ipo/token-mean": "`pref_loss` `ipo`; `concatenated_forward`: average log-probabilities",
        "reward/bradley-terry": "`PairwiseTrainer`",
        "logps/sum": "`get_batch_logps`",
    }, {}),
)
