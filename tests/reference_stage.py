"""A stage that asks its references what they would say, and how far they are from what they must agree with."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prx_post.base.settings import doc
from prx_post.data.config import DataConfig
from prx_post.data.source import timestep_and_noise
from prx_post.engine.partition import local_part
from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.flow import interpolate
from prx_post.model.config import ModelConfig
from prx_post.model.denoiser import predict_velocity
from prx_post.model.frozen import AdapterOff, FrozenCopy, SlowAverage
from prx_post.stages import registry
from prx_post.stages.captioned import CaptionedStage


@dataclass
class ReferenceConfig(MonitorConfig):
    decay: float = doc("Of the slow average; 0: it is the policy.", 0.0, between=(0, 1))


class ReferenceObjective(Objective):
    """Flow matching. Metrics: the greatest differences of velocities, and the size of one."""

    def __init__(self, policy: Any, start: Any, config: ReferenceConfig, is_adapter: bool) -> None:
        super().__init__()
        self.policy, self.config = policy, config
        self.copy = FrozenCopy(start)
        self.held = float(sum(local_part(p).numel() for p in start.parameters()))
        self.slow = SlowAverage(copy.deepcopy(policy))
        self.off = AdapterOff(policy) if is_adapter else None

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.config.learning_rate)]

    def kept(self) -> dict[str, Tensor]:
        return self.slow.kept("slow")

    def after_step(self, step, weights) -> None:
        self.slow.follow(weights(), self.config.decay)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        x_t, prompts = interpolate(x0, noise, t), (batch["prompt_embeds"], batch["prompt_mask"])
        velocity = predict_velocity(self.policy, x_t, t, *prompts)
        of_copy, of_slow = (reference.velocity(x_t, t, prompts) for reference in (self.copy, self.slow))
        metrics = {
            "policy_less_copy": (velocity.detach() - of_copy).abs().max(),
            "policy_less_slow": (velocity.detach() - of_slow).abs().max(),
            "held_of_copy": x0.new_tensor(self.held),
        }
        if self.off is not None:
            metrics["off_less_copy"] = (self.off.velocity(x_t, t, prompts) - of_copy).abs().max()
        return (velocity - (noise - x0)).square().mean(), metrics


class References(CaptionedStage):
    name, configs = "references", (ModelConfig, DataConfig, ReferenceConfig)

    def objective(self, run, data):
        policy, start = self.policy(run), run.frozen(run.transformer(self.pipeline))
        return ReferenceObjective(policy, start, self.config, self.model.use_peft)

    def source(self, run, data, objective):
        return self.latent_source(run, data, randomness=timestep_and_noise)


def register() -> None:
    entry = registry.Entry("asks its references", lambda: References.configs, lambda: References)
    registry.REGISTRY["references"] = entry
