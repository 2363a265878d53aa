"""Settings of `prx-post dpo`."""

from dataclasses import dataclass

from prx_post.base.settings import doc, require
from prx_post.data.config import PairConfig
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.model.config import ModelConfig


@dataclass
class DPOConfig(MonitorConfig):
    """Preference optimisation, on top of the training loop's settings. Names are TRL's wherever one exists."""

    beta: float = doc(
        "How dearly leaving the reference is paid, per mean squared velocity error: 100 moves far, 2000 hardly.",
        500.0,
        above=0,
    )
    loss_type: str = doc(
        "`sigmoid` (DPO), `hinge` (SLiC), or `ipo`, whose margin is bounded.",
        "sigmoid",
        one_of=("sigmoid", "hinge", "ipo"),
    )
    label_smoothing: float = doc(
        "Probability that a label is wrong (conservative DPO), for `sigmoid`; 0: none is.", 0.0, at_least=0, below=0.5
    )
    lose_weight: float = doc(
        "Weight of the rejected image's change of error; below 1, less is gained by spoiling it.", 1.0, between=(0, 1)
    )
    sft_weight: float = doc("Weight of the chosen image's own flow-matching error; 0: none.", 0.0, at_least=0)
    reference_free: bool = doc("Compare with errors of 0, not a reference's; needs no second network.", False)
    timestep_mean: float = doc("Mean of the normal variable whose sigmoid is t.", 0.0)
    timestep_std: float = doc("Standard deviation of that variable.", 1.0, above=0)
    timestep_shift: float = doc("t -> shift·t / (1 + (shift - 1)·t); above 1 favours noise.", 1.0, above=0)
    timestep_uniform_fraction: float = doc("Fraction of pairs whose t is uniform instead.", 0.0, between=(0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = not self.label_smoothing or self.loss_type == "sigmoid"
        reason, action = f"loss_type is {self.loss_type!r}, which has no labels", "Set it to 0, or loss_type: sigmoid"
        require(ok, "label_smoothing", self.label_smoothing, "0", reason, action)


CONFIGS = (ModelConfig, PairConfig, DPOConfig)
