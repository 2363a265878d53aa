"""The reward's gradient, through the reward's network, the decoder and the sampler's last steps, to the policy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prx_post.data.plan import stream
from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Reference
from prx_post.model.denoiser import PromptedVelocity, predict_velocity, with_guidance
from prx_post.objectives.draft import drift
from prx_post.stages.draft.config import DraftConfig
from prx_post.stages.reward_gradient import LatentReward

Metrics = dict[str, Tensor]
STOPS = 8
"""Number of the stream that says where ReFL's sampler stops."""


class RewardGradient(Objective):
    """Samples images and climbs their rewards.

    Args:
        sigmas: [N + 1], noise levels of the emitted scheduler.
        reward: of clean latents, as a loss.
        renoises: whether the sampler does.
        reference: what `beta` holds the policy to; None: nothing.
    """

    def __init__(
        self,
        policy: Any,
        config: DraftConfig,
        sigmas: Tensor,
        reward: LatentReward,
        *,
        renoises: bool = False,
        reference: Reference | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.config, self.sigmas, self.renoises = policy, config, sigmas, renoises
        self.reward, self.reference = reward, reference

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.config.learning_rate)]

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch`: `noise`, prompts as embeddings and as `prompts`; `fresh` for a sampler that re-noises."""
        x0, distance = self.sample(batch)
        loss, metrics = self.reward(x0, batch["prompts"])
        if distance is not None:
            loss, metrics["drift"] = loss + self.config.beta * distance.mean(), distance.detach().mean()
        return loss, metrics

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Clean samples [B, C, H, W] with a graph through the last steps, and the drift [B] there if it is held."""
        config, x_t = self.config, batch["noise"]
        sigmas = self.sigmas.to(x_t.device)
        last = self.last_step(batch["step"])
        velocity_of = self._guided(lambda x, t, p: predict_velocity(self.policy, x, t, *p), batch)
        distance: Tensor | None = None
        for i in range(last + 1):
            learns = i > last - config.gradient_steps
            t = sigmas[i].expand(len(x_t))
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                velocity = velocity_of(x_t, t).float()
                if learns and self.reference is not None:
                    asked = self._guided(self.reference.velocity, batch)(x_t.detach(), t)
                    distance = drift(velocity, asked) + (0.0 if distance is None else distance)
                if i == last:
                    x_t = x_t - sigmas[i] * velocity
                elif self.renoises:  # to x0 and back up; written out, for a drawn state would have no gradient
                    x_t = (1 - sigmas[i + 1]) * (x_t - sigmas[i] * velocity) + sigmas[i + 1] * batch["fresh"][:, i]
                else:
                    x_t = x_t + (sigmas[i + 1] - sigmas[i]) * velocity
        return x_t, None if distance is None else distance / config.gradient_steps

    def last_step(self, step: int) -> int:
        """The sampler's step, counted from 0, that goes to data in optimizer step `step`; alike on all ranks."""
        steps, stops = self.config.num_inference_steps, self.config.refl_steps
        return steps - 1 - (0 if stops is None else stream(self.config.seed, STOPS, step) % stops)

    def _guided(self, velocity: PromptedVelocity, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        guidance = self.config.guidance_scale
        prompts = (batch["prompt_embeds"], batch["prompt_mask"])
        null = (batch["null_embeds"], batch["null_mask"]) if guidance > 1 else None
        return with_guidance(velocity, prompts, null, guidance)
