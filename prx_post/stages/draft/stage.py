"""Direct reward gradients for a PRX transformer, for all weights or a LoRA adapter."""

import json
from typing import Any

import torch

from prx_post.base.errors import PrxPostError
from prx_post.data.cache import content_key
from prx_post.data.config import PromptConfig
from prx_post.data.plan import DrawPlan
from prx_post.engine.protocols import Batch, Objective
from prx_post.engine.run import Run
from prx_post.model.codec import LatentCodec
from prx_post.model.config import ModelConfig
from prx_post.rewards.registry import parse_specs
from prx_post.rewards.reward import DifferentiableReward, check_rows
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.draft.config import CONFIGS, DraftConfig
from prx_post.stages.draft.objective import RewardGradient
from prx_post.stages.draft.source import PromptSource
from prx_post.stages.prompted import encode_prompt_set, read_prompts
from prx_post.stages.references import earlier_policy
from prx_post.stages.reward_gradient import LatentReward, brightness, differentiable


class Draft(PipelineStage):
    name, configs = "draft", CONFIGS

    def __init__(self, model: ModelConfig, data: PromptConfig, config: DraftConfig, *, planned: bool = False) -> None:
        super().__init__(model, config, data, data.fixed_size, planned)
        self.prompts_file = str(data.prompts_file)
        self.sigmas = self.grid(config.num_inference_steps)
        self.rows = [] if planned else read_prompts(self.prompts_file, self.cleaner)
        self.rewards = {} if planned else open_rewards(config, self.rows)

    def data(self, run: Run) -> Encoded:
        prompts, rewards = [row["prompt"] for row in self.rows], ", ".join(self.config.reward_funcs)
        return encode_prompt_set(self, run, prompts, self.prompts_file, f"which climbed {rewards}")

    def identity(self, run: Run, data: Encoded) -> dict[str, str]:
        """Raises PrxPostError if a run is resumed with other rewards."""
        digest = content_key(json.dumps({name: reward.identity for name, reward in self.rewards.items()}))
        if run.saved is not None and run.saved.info["rewards"] != digest:
            raise PrxPostError(
                f"reward_funcs is {self.config.reward_funcs}, but {run.saved.folder} was trained with others, or with "
                f"other weights of theirs. Set them back, or start a new run from the emitted pipeline."
            )
        return {**super().identity(run, data), "rewards": digest}

    def objective(self, run: Run, data: Any) -> RewardGradient:
        config, policy = self.config, self.policy(run)
        reference = None
        if config.beta > 0:
            is_adapter, dtype = self.model.use_peft, self.text_dtype()
            reference = earlier_policy(run, self.pipeline, policy, is_adapter=is_adapter, follows=False, dtype=dtype)
        scores = {name: reward.of_pixels for name, reward in self.rewards.items()}
        reward = LatentReward(
            LatentCodec(run.vae(self.pipeline)).decode_with_gradient,
            dict.fromkeys(config.weights, brightness) if run.is_planned else scores,
            config.weights,
            margin=config.reward_margin,
            recomputes=config.gradient_checkpointing,
        )
        return RewardGradient(policy, config, self.sigmas, reward, renoises=self.renoises, reference=reference)

    @property
    def renoises(self) -> bool:
        return bool(self.scheduler.config.stochastic_sampling)

    def source(self, run: Run, data: Encoded, objective: Objective) -> PromptSource:
        config = self.config
        plan = DrawPlan(["all"] * len(data.samples), run.global_batch_size, config.seed, config.max_steps)
        return PromptSource(
            data=data,
            plan=plan,
            latent_shape=self.pipeline.latent_shape(*self.largest_size),
            micro_batch_size=config.per_device_train_batch_size,
            rank=run.ranks.rank,
            world_size=run.ranks.world,
            pad_length=self.pipeline.max_prompt_tokens,
            num_fresh=config.num_inference_steps - 1 if self.renoises else 0,
            has_null=config.guidance_scale > 1,
        )

    def example(self, run: Run) -> tuple[Any, Batch]:
        batch, config = self.example_batch(run), self.config
        noise = torch.empty_like(batch["latents"])
        fresh = torch.stack([noise] * (config.num_inference_steps - 1), 1) if self.renoises else noise[:, :0]
        null = {"null_embeds": batch["prompt_embeds"], "null_mask": batch["prompt_mask"]}
        return None, {**batch, **null, "noise": noise, "fresh": fresh, "prompts": [""] * len(noise)}

    def cache_size(self) -> str:
        return "of images nothing is cached: the policy makes them"


def open_rewards(config: DraftConfig, rows: list[dict[str, Any]]) -> dict[str, DifferentiableReward]:
    """By label. Raises PrxPostError for one that has no gradient, or cannot score a prompt."""
    opened: dict[str, DifferentiableReward] = {}
    for spec in parse_specs(config.reward_funcs):
        opened[spec.label] = differentiable(spec, "reward_funcs", "optimise it with prx-post grpo")
        check_rows(opened[spec.label], spec.label, rows, "prompts_file")
    return opened


STAGE = Draft
