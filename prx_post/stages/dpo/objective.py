"""Preferences from denoising errors: the preferred is to be denoised better than by the reference, the rest worse."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Prompts
from prx_post.flow import interpolate, velocity_target
from prx_post.model.denoiser import PromptedVelocity, predict_velocity
from prx_post.objectives.dpo import diffusion_dpo_loss, diffusion_kto_loss
from prx_post.stages.trajectories import Transition


def image_errors(velocity: PromptedVelocity, x0: Tensor, noise: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
    """Mean squared errors of the velocity, [B] fp32."""
    x0 = x0.float()
    predicted = velocity(interpolate(x0, noise, t), t, prompts)
    return (predicted.float() - velocity_target(x0, noise)).square().flatten(1).mean(1)


def pair_errors(velocity: PromptedVelocity, batch: Batch) -> Tensor:
    """Of the chosen and of the rejected images, [B, 2], computed in one pass of 2B.

    `batch`: latents (of the chosen images), rejected, noise [B, C, H, W], t [B], prompts; `rejected_noise`, if it is
    another.
    """
    errors = image_errors(
        velocity,
        torch.cat([batch["latents"], batch["rejected"]]),
        torch.cat([batch["noise"], batch["rejected_noise"] if "rejected_noise" in batch else batch["noise"]]),
        torch.cat([batch["t"]] * 2),
        (torch.cat([batch["prompt_embeds"]] * 2), torch.cat([batch["prompt_mask"]] * 2)),
    )
    return torch.stack(errors.chunk(2), dim=1)


class ComparedWithReference(Objective):
    """A policy, and the reference that its errors are compared with.

    Args:
        reference: a `Reference`; None: its errors count as 0, or are in the batches.
        sync_steps: after every so many optimizer steps the policy becomes the reference; 0: never.
        loss: settings of the loss.
    """

    def __init__(self, policy: Any, learning_rate: float, reference: Any, sync_steps: int = 0, **loss: Any) -> None:
        super().__init__()
        self.policy, self.learning_rate, self.loss = policy, learning_rate, loss
        self.reference, self.sync_steps = reference, sync_steps

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.learning_rate)]

    def kept(self) -> dict[str, Tensor]:
        return self.reference.kept("reference") if self.sync_steps else {}

    def after_step(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        if self.sync_steps and (step + 1) % self.sync_steps == 0:
            self.reference.follow(weights(), 0.0)

    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        return predict_velocity(self.policy, x_t, t, *prompts)


class PairObjective(ComparedWithReference):
    """Wallace et al. 2023, eq. 14, in the flow's variables. `loss`: settings of `diffusion_dpo_loss`."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: as for `errors`; `ref_errors` [B, 2] if they were computed before; `beta_scale` [B]."""
        if "ref_errors" in batch:
            ref = batch["ref_errors"]
        elif self.reference is None:
            ref = batch["t"].new_zeros(len(batch["t"]), 2)
        else:  # first, for it may be the policy's own network with other weights
            ref = self.errors(self.reference.velocity, batch)
        errors = self.errors(self.velocity, batch)
        loss = self.loss
        if "beta_scale" in batch:
            loss = {**loss, "beta": loss["beta"] * batch["beta_scale"]}
        return diffusion_dpo_loss(errors[:, 0], errors[:, 1], ref[:, 0], ref[:, 1], **loss)

    def errors(self, velocity: PromptedVelocity, batch: Batch) -> Tensor:
        """Of the chosen and of the rejected images, [B, 2]."""
        return pair_errors(velocity, batch)


class StepPairObjective(PairObjective):
    """The same loss on the steps of the sampler that made the images: D3PO (Yang et al. 2024), PSO (Miao et al. 2024).

    In the place of a noised image's error stands -2 ln p of a step's end given its beginning, exact for a sampler whose
    steps are random. So nothing is assumed of the policy at noised images, which a student of few steps does not know.
    Differs from PSO, eq. 9: one step of each trajectory a time, at random, not the sum of all.

    Args:
        transition: the random step.
        sigmas: the grid, [N + 1].
    """

    def __init__(self, *given: Any, transition: Transition, sigmas: Tensor, **loss: Any) -> None:
        super().__init__(*given, **loss)
        self.transition: Any = transition
        self.sigmas = sigmas

    def errors(self, velocity: PromptedVelocity, batch: Batch) -> Tensor:
        """`batch`: as of `StepPairSource`."""
        x_t = torch.cat([batch["latents"], batch["rejected"]])
        x_next = torch.cat([batch["x_next"], batch["rejected_x_next"]])
        index, sigmas = torch.cat([batch["step_index"]] * 2), self.sigmas.to(x_t.device)
        prompts = (torch.cat([batch["prompt_embeds"]] * 2), torch.cat([batch["prompt_mask"]] * 2))
        predicted = velocity(x_t, sigmas[index], prompts)
        step = self.transition(x_t, predicted, sigmas[index], sigmas[index + 1], x_next=x_next)
        return torch.stack((-2 * step.log_prob).chunk(2), dim=1)


class LabelObjective(ComparedWithReference):
    """KTO: images that are labelled one by one. `loss`: settings of `diffusion_kto_loss`."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latents, noise [B, C, H, W], t [B], prompts, `desirable` [B] bool."""
        prompts = (batch["prompt_embeds"], batch["prompt_mask"])
        of_images = (batch["latents"], batch["noise"], batch["t"], prompts)
        if self.reference is None:
            ref_error = torch.zeros_like(batch["t"])
        else:
            ref_error = image_errors(self.reference.velocity, *of_images)
        return diffusion_kto_loss(image_errors(self.velocity, *of_images), ref_error, batch["desirable"], **self.loss)
