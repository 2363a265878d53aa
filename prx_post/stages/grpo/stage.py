"""Online alignment of a PRX transformer, of all weights or a LoRA adapter."""

import json
from functools import partial
from typing import Any

import torch

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import require
from prx_post.data.buckets import Size
from prx_post.data.cache import content_key
from prx_post.data.config import PromptConfig
from prx_post.data.encoding import EncodedCache
from prx_post.engine.protocols import Batch, Monitor, Objective
from prx_post.engine.run import Run
from prx_post.model.codec import LatentCodec
from prx_post.model.config import ModelConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.reward import has_gradient
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.grpo.config import CONFIGS, GRPOConfig, check_together
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.monitor import GuardedMonitor
from prx_post.stages.grpo.objective import ForwardProcess, OnlineObjective, PolicyGradient
from prx_post.stages.grpo.rollout import Rollouts
from prx_post.stages.grpo.scoring import Scorer
from prx_post.stages.grpo.windows import window_of
from prx_post.stages.prompted import encode_prompt_set, read_prompts
from prx_post.stages.references import earlier_policy
from prx_post.stages.registry import RolloutWork
from prx_post.stages.reward_gradient import LatentReward, brightness
from prx_post.stages.trajectories import transition_of

LENGTHS_READ = 5000
"""More prompts than these are padded to the tokenizer's maximum, as their lengths would take long to read."""


class GRPO(PipelineStage):
    name, configs = "grpo", CONFIGS

    def __init__(
        self,
        model: ModelConfig,
        data: PromptConfig,
        judge: VisionJudgeConfig,
        config: GRPOConfig,
        *,
        planned: bool = False,
    ) -> None:
        check_together(model, judge, config)
        super().__init__(model, config, data, data.fixed_size, planned)
        self.prompts_file, self.guard = str(data.prompts_file), Guard()
        self.rollout_size = self._rollout_size()
        self.sigmas = self.grid(config.rollout_steps)
        self.rows = [] if planned else read_prompts(self.prompts_file, self.cleaner)
        self.scorer = None if planned else Scorer.open(config, judge, self.rows, self.guard)
        self.climbable = self._climbable_weights() if config.climbs_last_step else {}

    def _climbable_weights(self) -> dict[str, float]:
        """Raises ConfigError if none of the rewards has a gradient."""
        weights, rewards = self.config.weights, {} if self.scorer is None else self.scorer.rewards
        found = {name: weight for name, weight in weights.items() if not rewards or has_gradient(rewards[name])}
        value, names = self.config.last_step_reward_weight, ", ".join(weights)
        reason, action = f"none of {names} (reward_funcs) has a gradient", "Leave it out, or add a reward that has one"
        require(bool(found), "last_step_reward_weight", value, "0", reason, action)
        return found

    def _rollout_size(self) -> Size:
        config = self.config
        if config.rollout_height is None:
            return self.pipeline.resolve_size(*(self.size or (None, None)))
        return self.pipeline.resolve_size(config.rollout_height, config.rollout_width)

    @property
    def largest_size(self) -> Size:
        return self.rollout_size

    def data(self, run: Run) -> Encoded:
        config = self.config
        emitted = self.scheduler.config.stochastic_sampling
        if emitted != (config.sampler_name == "renoise") and run.ranks.is_main:
            here, there = ("does", "does not") if emitted else ("does not", "does")
            print(
                f"warning: the emitted sampler {here} re-noise, and that of rollouts {there}: what is trained is not "
                f"what will be generated. Set sampler or rollout_sampler."
            )
        rewards = ", ".join([*config.reward_funcs, *(["a judge"] if config.method == "pref_grpo" else [])])
        prompts = [row["prompt"] for row in self.rows]
        return encode_prompt_set(self, run, prompts, self.prompts_file, f"rewarded by {rewards}")

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        config = self.config
        return len(data.samples) / config.prompts_per_rollout * config.steps_per_rollout

    def identity(self, run: Run, data: Encoded) -> dict[str, str]:
        """Raises PrxPostError if a run is resumed with other rewards."""
        assert self.scorer is not None
        digest = content_key(json.dumps(self.scorer.identity))
        if run.saved is not None and run.saved.info["rewards"] != digest:
            raise PrxPostError(
                f"the rewards are {', '.join(self.scorer.identity)}, but {run.saved.folder} was trained with others, "
                f"or "
                f"with other weights of theirs. Set them back, or start a new run from the emitted pipeline."
            )
        return {**super().identity(run, data), "rewards": digest}

    def objective(self, run: Run, data: Any) -> OnlineObjective:
        config, policy = self.config, self.policy(run)
        hold = partial(earlier_policy, run, self.pipeline, policy, is_adapter=self.model.use_peft)
        follows = config.sync_ref_model or config.guard == "regularize"
        reference = hold(follows=follows, dtype=self.text_dtype()) if config.needs_reference else None
        # in the policy's own precision, so that their first difference is nothing
        old = hold(follows=True, dtype=torch.float32) if config.has_old_policy else None
        kind = PolicyGradient if config.is_policy_gradient else ForwardProcess
        average = None if run.is_planned else partial(run.accelerator.reduce, reduction="mean")
        return kind(
            policy,
            config,
            self.guard,
            transition=transition_of(config.sampler_name, config.sampler_noise, self.sigmas),
            reference=reference,
            old=old,
            average=average,
            reward=self._climbed(run) if config.climbs_last_step else None,
        )

    def _climbed(self, run: Run) -> LatentReward:
        """Those of the rewards that have a gradient."""
        config, weights = self.config, self.climbable
        rewards: dict[str, Any] = {} if self.scorer is None else self.scorer.rewards
        scores = {name: rewards[name].of_pixels if rewards else brightness for name in weights}
        return LatentReward(
            LatentCodec(run.vae(self.pipeline)).decode_with_gradient,
            scores,
            weights,
            margin=config.last_step_reward_margin,
            recomputes=config.gradient_checkpointing,
        )

    def source(self, run: Run, data: Encoded, objective: Any) -> Rollouts:
        assert self.scorer is not None
        assert data.cache is not None
        return Rollouts(
            run=run,
            config=self.config,
            rows=self.rows,
            data=data,
            policy=objective.policy,
            velocity=objective.rollout_velocity,
            latent_shape=self.pipeline.latent_shape(*self.rollout_size),
            sigmas=self.sigmas,
            transition=objective.transition,
            scorer=self.scorer,
            guard=self.guard,
            pad_length=self._pad_length(data.cache, data),
        )

    def _pad_length(self, cache: EncodedCache, data: Encoded) -> int:
        """One for all batches: attention over another number of tokens has other last bits."""
        if self.config.torch_compile or len(data.samples) > LENGTHS_READ:
            return self.pipeline.max_prompt_tokens
        return max(len(data.embed("")), *(len(cache.embeddings[sample.prompt_key]) for sample in data.samples))

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        sampler, watched = self.sampler(objective.policy, run), self.watched(data)
        proxies = self.config.proxy_weights
        return GuardedMonitor(run, self.config, sampler, data, **watched, guard=self.guard, proxies=proxies)

    def example(self, run: Run) -> tuple[Any, Batch]:
        batch, config = self.example_batch(run), self.config
        count, like = len(batch["latents"]), batch["latents"]
        of_images = {name: torch.empty(count, device=run.device) for name in ("advantages", "weight")}
        if config.has_null_prompts:
            of_images |= {"null_embeds": batch["prompt_embeds"], "null_mask": batch["prompt_mask"]}
        if not config.is_policy_gradient:
            return None, {**batch, **of_images, "noise": like, "t": torch.empty(count, device=run.device)}
        if config.climbs_last_step:  # the dearest
            return None, {
                **batch,
                "x_last": like,
                "sigma": torch.empty(count, device=run.device),
                "prompts": [""] * count,
            }
        levels = {name: torch.empty(count, device=run.device) for name in ("sigma", "sigma_next", "log_prob")}
        states = {name: torch.empty_like(like) for name in ("x_t", "x_next", "mean")}
        return None, {**batch, **of_images, **levels, **states}

    def rollout_work(self) -> RolloutWork:
        config = self.config
        images, size = config.images_per_rollout, config.num_generations
        guided = 2 if config.rollout_guidance_scale > 1 else 1
        window = window_of(config, 0)
        alone = config.rollout_steps - (window.branch or 0)
        generated = guided * (images * alone + config.prompts_per_rollout * (window.branch or 0))
        rows = images * config.rows_per_image * config.num_iterations
        asked = 2 if config.reference_guidance > 1 else 1
        held = asked * (config.beta > 0 or config.method == "dgpo") + config.has_old_policy
        of_guidance = guided if config.is_policy_gradient else 1
        described = f"{config.prompts_per_rollout} prompts x {size}, {config.rollout_steps} steps"
        return RolloutWork(images, config.steps_per_rollout, described, generated, of_guidance * rows, held * rows)

    def cache_size(self) -> str:
        return "of images nothing is cached: the policy makes them"


STAGE = GRPO
