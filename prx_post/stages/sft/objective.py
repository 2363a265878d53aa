"""Flow matching: x_t = (1 - t) x0 + t noise; the transformer's output is regressed onto noise - x0."""

from typing import Any

from torch import Tensor

from prx_post.data.immiscible import immiscible_order
from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup
from prx_post.flow import interpolate, velocity_target
from prx_post.model.denoiser import predict_velocity
from prx_post.objectives.flow_matching import contrastive_term, flow_matching_loss, min_snr_weight


class FlowMatchingObjective(Objective):
    """Lipman et al. 2022, eq. 9, with two optional variations.

    Args:
        min_snr_gamma: cap of the signal-to-noise weight; None: every t counts the same.
        contrastive_weight: of contrastive flow matching's negative term; 0: off.
    """

    def __init__(
        self,
        policy: Any,
        learning_rate: float,
        *,
        min_snr_gamma: float | None = None,
        contrastive_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.learning_rate, self.min_snr_gamma = learning_rate, min_snr_gamma
        self.contrastive_weight = contrastive_weight

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.learning_rate)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latents, noise [B, C, H, W], t [B], and prompts."""
        x0, noise, t = batch["latents"].float(), batch["noise"], batch["t"]
        target = velocity_target(x0, noise)
        x_t = interpolate(x0, noise, t)
        velocity = predict_velocity(self.policy, x_t, t, batch["prompt_embeds"], batch["prompt_mask"])
        weight = None if self.min_snr_gamma is None else min_snr_weight(t, self.min_snr_gamma)
        loss, metrics = flow_matching_loss(velocity, target, weight)
        if self.contrastive_weight:
            loss = loss - self.contrastive_weight * contrastive_term(velocity, target)
        return loss, metrics


def immiscible(batch: Batch) -> Batch:
    """The batch with its noises assigned to its latents by least distance (Li et al. 2024)."""
    return {**batch, "noise": batch["noise"][immiscible_order(batch["latents"], batch["noise"])]}
