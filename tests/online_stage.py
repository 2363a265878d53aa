"""An online stage in small: the policy generates groups, a reward scores them, several steps train on each rollout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import doc
from prx_post.data.config import DataConfig
from prx_post.data.plan import stream
from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup
from prx_post.engine.run import Run
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.flow import interpolate, sample_timesteps, velocity_target
from prx_post.model.codec import to_images
from prx_post.model.config import ModelConfig
from prx_post.model.denoiser import predict_velocity
from prx_post.model.sampler import Sampler
from prx_post.model.text import pad_embeddings
from prx_post.rewards import load
from prx_post.stages import registry
from prx_post.stages.base import Encoded
from prx_post.stages.captioned import CaptionedStage

PROMPTS = ["472", "81"]


@dataclass
class OnlineConfig(MonitorConfig):
    group_size: int = doc("Images of a prompt in a rollout.", 4, above=0)
    steps_per_rollout: int = doc("Optimizer steps that train on a rollout.", 3, above=0)
    fails_at: int = doc("Rollout in which `fault` happens; -1: none.", -1)
    fault: str = doc("`reward` raises, or the policy's images are `nan`.", "reward")


class OnlineObjective(Objective):
    """advantage · squared velocity error."""

    def __init__(self, policy: Any, learning_rate: float) -> None:
        super().__init__()
        self.policy, self.learning_rate = policy, learning_rate

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.learning_rate)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        velocity = predict_velocity(self.policy, interpolate(x0, noise, t), t, batch["embeds"], batch["mask"])
        error = (velocity.float() - velocity_target(x0, noise)).square().flatten(1).mean(1)
        return (batch["advantages"] * error).mean(), {"error": error.detach().mean()}


class Rollouts:
    """Groups by prompt, whole on every rank; a rank generates its share of the batches and trains its share of rows."""

    online = True

    def __init__(self, run: Run, config: OnlineConfig, sampler: Sampler, data: Encoded) -> None:
        self.run, self.config, self.sampler, self.data = run, config, sampler, data
        self.reward = load("jpeg_compressibility")
        self.iteration, self.rows = -1, dict[str, Tensor]()
        self.jobs = [(g, prompt) for g in range(len(PROMPTS)) for prompt in [PROMPTS[g]] * config.group_size]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        ranks, count = self.run.ranks, len(self.jobs)
        block = slice(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)
        return {"iteration": self.iteration}, {name: value[block] for name, value in self.rows.items()}

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.iteration, self.rows = info["iteration"], tensors

    def batches(self, step: int) -> Iterator[Batch]:
        config, ranks = self.config, self.run.ranks
        iteration = step // config.steps_per_rollout
        if iteration != self.iteration:
            self.rows, self.iteration = self._roll_out(iteration), iteration
        generator = torch.Generator().manual_seed(stream(config.seed, 1, step))
        order = torch.randperm(len(self.jobs), generator=generator)[: self.run.global_batch_size].tolist()
        size = config.per_device_train_batch_size
        for start in range(ranks.rank * size, len(order), ranks.world * size):
            yield self._batch(order[start : start + size], step)

    def _batch(self, rows: list[int], step: int) -> Batch:
        seeds = [stream(self.config.seed, 2, step, row) for row in rows]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        embeds, mask = pad_embeddings([self.data.embed(self.jobs[row][1]) for row in rows])
        latents = self.rows["latents"][rows]
        return {
            **{"latents": latents, "advantages": self.rows["advantages"][rows], "embeds": embeds, "mask": mask},
            "t": torch.cat([sample_timesteps(1, generator=g) for g in generators]),
            "noise": torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]),
            **{"seeds": seeds, "rows": rows, "metrics": {"reward": self.rows["rewards"].mean()}},
        }

    def _roll_out(self, iteration: int) -> dict[str, Tensor]:
        ranks, config, policy = self.run.ranks, self.config, self.sampler.transformer
        size = config.group_size
        groups = ranks.share(range(len(PROMPTS)))

        def work() -> dict[int, tuple[Tensor, Tensor]]:
            policy.eval()
            made = {g: self._group(iteration, g, size) for g in groups}
            policy.train()
            return made

        groups_made = {g: part for found in ranks.together(work) for g, part in found.items()}
        latents = torch.cat([groups_made[g][0] for g in sorted(groups_made)])
        rewards = torch.cat([groups_made[g][1] for g in sorted(groups_made)])
        by_group = rewards.view(len(PROMPTS), size)
        advantages = ((by_group - by_group.mean(1, keepdim=True)) / (by_group.std() + 1e-4)).flatten()
        if ranks.is_main:
            with (self.run.output_dir / "rollouts.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": iteration, "rewards": rewards.tolist()}) + "\n")
        return {"latents": latents, "rewards": rewards, "advantages": advantages}

    def _group(self, iteration: int, g: int, size: int) -> tuple[Tensor, Tensor]:
        fails = iteration == self.config.fails_at and g == len(PROMPTS) - 1
        if fails and self.config.fault == "reward":
            raise PrxPostError("the reward has failed in the middle")
        embeddings = [self.data.embed(PROMPTS[g])] * size
        seeds = [stream(self.config.seed, 3, iteration, g, k) for k in range(size)]
        latents = self.sampler.latents(embeddings, self.data.embed(""), seeds)
        latents = latents * torch.nan if fails else latents
        if not torch.isfinite(latents).all():
            raise PrxPostError(f"the policy's latents of {PROMPTS[g]!r} are not finite in rollout {iteration}")
        return latents, self.reward(to_images(self.data.decode(latents)), [PROMPTS[g]] * size)


class Online(CaptionedStage):
    name, configs = "online", (ModelConfig, DataConfig, OnlineConfig)

    def shown_prompts(self) -> list[str]:
        return [*super().shown_prompts(), *PROMPTS]

    def objective(self, run: Run, data: Encoded) -> OnlineObjective:
        return OnlineObjective(self.policy(run), self.config.learning_rate)

    def source(self, run: Run, data: Encoded, objective: Objective) -> Rollouts:
        return Rollouts(run, self.config, self.sampler(objective.policy, run), data)


def register() -> None:
    registry.REGISTRY["online"] = registry.Entry("an online stage", lambda: Online.configs, lambda: Online)
