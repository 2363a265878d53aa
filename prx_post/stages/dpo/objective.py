"""Diffusion-DPO: of two images of a prompt, at one timestep and noise, the preferred one shall be denoised better than
by the reference, the other worse.
"""

from typing import Any

import torch
from torch import Tensor

from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Reference
from prx_post.flow import interpolate, velocity_target
from prx_post.model.denoiser import predict_velocity
from prx_post.objectives.dpo import diffusion_dpo_loss


class PreferenceObjective(Objective):
    """Wallace et al. 2023, eq. 14, in the flow's variables.

    Args:
        reference: the policy as it was; None: its errors count as 0.
        loss: settings of `diffusion_dpo_loss`.
    """

    def __init__(self, policy: Any, learning_rate: float, reference: Reference | None, **loss: Any) -> None:
        super().__init__()
        self.policy, self.learning_rate, self.loss = policy, learning_rate, loss
        self.reference = reference

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.learning_rate)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latents (of the chosen images), rejected, noise [B, C, H, W], t [B], and prompts."""
        x0 = torch.cat([batch["latents"], batch["rejected"]]).float()
        noise, t = torch.cat([batch["noise"]] * 2), torch.cat([batch["t"]] * 2)
        prompts = (torch.cat([batch["prompt_embeds"]] * 2), torch.cat([batch["prompt_mask"]] * 2))
        target, x_t = velocity_target(x0, noise), interpolate(x0, noise, t)
        win, lose = _errors(predict_velocity(self.policy, x_t, t, *prompts), target)
        if self.reference is None:
            ref_win = ref_lose = torch.zeros_like(win)
        else:
            ref_win, ref_lose = _errors(self.reference.velocity(x_t, t, prompts), target)
        return diffusion_dpo_loss(win, lose, ref_win, ref_lose, **self.loss)


def _errors(velocity: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the first and of the second half, [B] each."""
    first, second = (velocity.float() - target).square().flatten(1).mean(1).chunk(2)
    return first, second
