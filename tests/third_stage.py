"""A third stage as somebody else would write it: the network learns to undo a little noise, in one step to x0."""

from dataclasses import dataclass

import torch

from prx_post.base.settings import doc
from prx_post.data.config import DataConfig
from prx_post.engine.protocols import POLICY, Objective, ParamGroup
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.flow import interpolate, x0_from_velocity
from prx_post.model.config import ModelConfig
from prx_post.model.denoiser import predict_velocity
from prx_post.stages import registry
from prx_post.stages.captioned import CaptionedStage


@dataclass
class DenoiseConfig(MonitorConfig):
    noise_level: float = doc("Noise level that every latent is brought to.", 0.3, between=(0, 1), resume="fixed")


class DenoiseObjective(Objective):
    def __init__(self, policy, learning_rate, noise_level):
        super().__init__()
        self.policy, self.learning_rate, self.noise_level = policy, learning_rate, noise_level

    def groups(self):
        return [ParamGroup(POLICY, self.policy, self.learning_rate)]

    def forward(self, batch):
        x0, t = batch["latents"].float(), torch.full_like(batch["latents"][:, 0, 0, 0], self.noise_level)
        x_t = interpolate(x0, batch["noise"], t)
        velocity = predict_velocity(self.policy, x_t, t, batch["prompt_embeds"], batch["prompt_mask"])
        loss = (x0_from_velocity(x_t, velocity.float(), t) - x0).square().mean()
        return loss, {"x0_mse": loss.detach()}


def noise(draw, shape, step):
    return {"noise": torch.randn(*shape, generator=torch.Generator().manual_seed(draw.seed))}


class Denoise(CaptionedStage):
    name, configs = "denoise", (ModelConfig, DataConfig, DenoiseConfig)

    def objective(self, run, data):
        return DenoiseObjective(self.policy(run), self.config.learning_rate, self.config.noise_level)

    def source(self, run, data, objective):
        return self.latent_source(run, data, randomness=noise)

    def example(self, run):
        batch = self.example_batch(run)
        return None, {**batch, "noise": torch.empty_like(batch["latents"])}


def register():
    registry.REGISTRY["denoise"] = registry.Entry("undo a little noise", lambda: Denoise.configs, lambda: Denoise)
