"""Settings of `prx-post sft`."""

from dataclasses import dataclass

from prx_post.base.settings import doc, require
from prx_post.data.config import DataConfig, TimestepConfig
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.model.config import ModelConfig


@dataclass
class SFTConfig(TimestepConfig, MonitorConfig):
    """Flow-matching settings, on top of the training loop's. Defaults are PRX's pretraining distribution."""

    caption_dropout: float = doc(
        "Fraction of samples trained on the encoded empty prompt, for guidance.", 0.1, between=(0, 1)
    )
    timestep_uniform_fraction: float = doc("Fraction of samples whose t is uniform instead.", 0.1, between=(0, 1))
    loss_weighting: str = doc("`none`, or `min_snr` (Hang et al. 2023).", "none", one_of=("none", "min_snr"))
    min_snr_gamma: float = doc("Cap of the signal-to-noise weight for `min_snr`.", 5.0, above=0)
    contrastive_weight: float = doc(
        "Weight of contrastive flow matching's negative term; 0.05 in its paper, 0: off.", 0.0, at_least=0
    )
    immiscible: bool = doc("Assign each micro-batch's noises to its samples by least distance.", False)
    eval_rows: int = doc(
        "Rows held out of training for `validation_loss`, at fixed noise, every eval_steps; 0: none.",
        0,
        at_least=0,
        resume="fixed",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.contrastive_weight == 0 or self.per_device_train_batch_size > 1,
            "per_device_train_batch_size",
            self.per_device_train_batch_size,
            "2 or more",
            "contrastive_weight compares a sample with another of its batch",
            "Raise it, or set contrastive_weight to 0",
        )
        reason, action = "the loss of held-out rows is an evaluation", "Set eval_steps, or eval_rows: 0"
        ok = bool(self.eval_steps) or not self.eval_rows
        require(ok, "eval_steps", self.eval_steps, "above 0 with eval_rows", reason, action)

    def known_metrics(self, specs: list) -> list[str]:
        return [*super().known_metrics(specs), *(["validation_loss"] if self.eval_rows else [])]


CONFIGS = (ModelConfig, DataConfig, SFTConfig)
