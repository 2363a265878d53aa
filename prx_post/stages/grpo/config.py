"""The settings of `prx-post grpo`, and what of them contradicts what. Imports nothing heavy."""

import math
from dataclasses import dataclass

from prx_post.base.settings import require, require_one_of
from prx_post.data.config import PromptConfig, TimestepConfig
from prx_post.evaluation.monitor_config import WINS, MonitorConfig
from prx_post.model.config import ModelConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.registry import RewardSpec, parse_specs
from prx_post.stages.grpo.settings import (
    NOISE_LEVELS,
    ODE,
    WINDOW_SIZES,
    GuardConfig,
    MethodConfig,
    RewardConfig,
    RolloutConfig,
)


@dataclass
class GRPOConfig(TimestepConfig, RolloutConfig, RewardConfig, MethodConfig, GuardConfig, MonitorConfig):
    """Online alignment, on top of the training loop's settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rewards()
        self._check_method()
        self._check_window()
        self._check_guard()
        reason, action = "the forward process has no steps to train", "Leave it out, or choose another method"
        if self.shift_terminal is not None:
            ok, rule = 0 < self.shift_terminal < 1, "between 0 and 1"
            require(ok, "shift_terminal", self.shift_terminal, rule, "it is a noise level", "Set it to 0.3")
        ok = (self.rollout_height is None) == (self.rollout_width is None)
        reason, action = f"rollout_width is {self.rollout_width!r}", "Set both, or neither"
        require(ok, "rollout_height", self.rollout_height, "set together with rollout_width", reason, action)
        self._check_groups()

    @property
    def sampler_name(self) -> str:
        return self.rollout_sampler or ("cps" if self.is_policy_gradient else ODE)

    @property
    def sampler_noise(self) -> float:
        """0 where the sampler has none to set."""
        usual = NOISE_LEVELS.get(self.sampler_name) or 0.0
        return usual if self.noise_level is None else self.noise_level

    @property
    def rollout_steps(self) -> int:
        return self.rollout_num_inference_steps or self.num_inference_steps

    @property
    def trained_steps(self) -> int:
        """Of a trajectory, in one pass."""
        size = self.window_size or WINDOW_SIZES[self.window]
        return self.rollout_steps - 1 if size is None else size

    @property
    def rows_per_image(self) -> int:
        """How often the policy is asked about an image in one pass over a rollout."""
        return self.trained_steps if self.is_policy_gradient else self.noises_per_image

    @property
    def images_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps."""
        return self.steps_per_generation * self.num_iterations

    def settle(self, world_size: int) -> None:
        """Accumulate as many micro-batches as an optimizer step has. Raises ConfigError if that is no number."""
        groups, size = self.prompts_per_rollout // self.steps_per_generation, self.per_device_train_batch_size
        reason = f"each of {world_size} process(es) trains whole groups in each of {self.steps_per_generation} steps"
        rule = f"a multiple of {self.steps_per_generation * world_size}"
        ok = self.prompts_per_rollout % (self.steps_per_generation * world_size) == 0
        action = f"Set it to {math.ceil(groups / world_size) * world_size * self.steps_per_generation}"
        require(ok, "prompts_per_rollout", self.prompts_per_rollout, rule, reason, action)
        images = groups // world_size * self.num_generations
        reason = f"a process trains {images} images in an optimizer step"
        require(images % size == 0, "per_device_train_batch_size", size, f"a divisor of {images}", reason, "Change it")
        if self.method == "dgpo":
            whole, reason = self.num_generations, "dgpo compares the images of a group"
            rule = f"a multiple of num_generations, {whole}"
            require(size % whole == 0, "per_device_train_batch_size", size, rule, reason, f"Set it to {whole}")
        derived = images // size * self.rows_per_image
        given, reason = self.gradient_accumulation_steps, "it follows from prompts_per_rollout"
        require(
            given in (1, derived), "gradient_accumulation_steps", given, f"left out, or {derived}", reason, "Remove it"
        )
        self.gradient_accumulation_steps = derived

    def check_zero(self, stage: int, offload: bool) -> None:
        """Nothing is refused here; see `check_together`."""

    def _check_method(self) -> None:
        is_forward, name = not self.is_policy_gradient, self.method
        reason, action = f"method is {name!r}, which does not use it", "Leave it out"
        only_for_steps = {"normalise_ratio": False, "max_divergence": None, "window": "all", "window_size": None}
        only_for_images = {"noises_per_image": 1, "old_policy_decay": None}
        own: dict[str, tuple[str, object]] = {
            "nft": ("nft_beta", 1.0),
            "dgpo": ("dgpo_beta", 100.0),
            "awm": ("awm_power", None),
        }
        unused: dict[str, object] = {**(only_for_steps if is_forward else only_for_images)}
        unused |= {field: default for method, (field, default) in own.items() if method != name}
        for field, default in unused.items():
            value = getattr(self, field)
            require(value == default, field, value, f"{default!r}", reason, action)
        if self.epsilon is None:
            reason, action = f"method is {name!r}, which diverges without a clip", "Set it to 1e-3"
            require(name == "dgpo", "epsilon", None, "a number", reason, action)
            reason = "epsilon is null, so that there is no lagged policy"
            require(self.old_policy_decay is None, "old_policy_decay", self.old_policy_decay, "null", reason, "Set one")
        reason, action = "policy gradients need random steps", "Choose sde, cps, dance or renoise"
        ok = is_forward or self.sampler_name != ODE
        require(ok, "rollout_sampler", self.rollout_sampler, "one whose steps are random", reason, action)
        if self.noise_level is not None:
            reason, action = f"rollout_sampler is {self.sampler_name!r}", "Leave it out"
            ok = NOISE_LEVELS.get(self.sampler_name) is not None
            require(ok, "noise_level", self.noise_level, "null", reason, action)
        if self.sampler_name == "cps" and self.noise_level is not None:
            reason, action = "at 1 nothing of the old noise is kept", "Choose renoise for that"
            require(self.noise_level < 1, "noise_level", self.noise_level, "below 1 for cps", reason, action)
        if self.awm_power is not None:
            ok, rule, reason = 0 < self.awm_power < 1, "between 0 and 1", "it flattens large errors"
            require(ok, "awm_power", self.awm_power, rule, reason, "Set it to 0.25")
        ok, reason = not (self.normalise_ratio and self.max_divergence), "each is a trust region of its own"
        require(ok, "max_divergence", self.max_divergence, "null with normalise_ratio", reason, "Set one of them")
        ok, reason = self.needs_reference or self.ref_guidance_scale is None, "beta is 0 and there is no reference"
        require(ok, "ref_guidance_scale", self.ref_guidance_scale, "null", reason, "Set beta, or leave it out")
        is_synced, reason = self.sync_ref_model, "beta is 0 and there is no reference to sync"
        ok = not is_synced or self.beta > 0 or name == "dgpo"
        require(ok, "sync_ref_model", is_synced, "false", reason, "Set beta, or leave it out")
        pairwise, reason = self.pairwise_reward is not None, f"method is {name!r}"
        ok = name == "pref_grpo" or not pairwise
        require(ok, "pairwise_reward", self.pairwise_reward, "null", reason, "Set method: pref_grpo, or reward_funcs")
        ok, reason = name == "pref_grpo" or bool(self.reward_funcs), "images are rewarded by something"
        require(ok, "reward_funcs", self.reward_funcs, "one reward or more", reason, "Name a reward, such as hpsv2")

    def _check_window(self) -> None:
        steps, random = self.rollout_steps, self.rollout_steps - 1
        name = "num_inference_steps" if self.rollout_num_inference_steps is None else "rollout_num_inference_steps"
        if not self.is_policy_gradient:
            return
        reason, action = "the last step is not random, and one before it must be", "Raise it"
        require(steps > 1, name, steps, "2 or more", reason, action)
        if self.window == "all":
            reason = "window is 'all'"
            ok = self.window_size is None
            require(ok, "window_size", self.window_size, "null", reason, "Choose fast, mix or subset, or leave it out")
            return
        reason = f"of {steps} rollout steps the last is not random"
        rule, action = f"at most {random}", f"Lower it, or raise {name}"
        require(self.trained_steps <= random, "window_size", self.trained_steps, rule, reason, action)

    def _check_groups(self) -> None:
        """What can be known without the number of processes."""
        reason = "each of a rollout's optimizer steps trains as many whole groups"
        rule, action = f"a multiple of steps_per_generation, {self.steps_per_generation}", "Change one of them"
        ok = self.prompts_per_rollout % self.steps_per_generation == 0
        require(ok, "prompts_per_rollout", self.prompts_per_rollout, rule, reason, action)

    def _check_guard(self) -> None:
        if self.guard != "regularize":
            reason, action = f"guard is {self.guard!r}", "Leave it out, or set guard: regularize"
            for field, default in (("guard_rewards", []), ("guard_encoder", None), ("guard_max_divergence", None)):
                require(getattr(self, field) == default, field, getattr(self, field), "left out", reason, action)
        if self.guard == "off":
            return
        reason = "the guard compares held-out images with the rewards"
        action = "Set it, with eval_prompts_file and eval_rewards, or set guard: off"
        require(self.eval_steps > 0, "eval_steps", self.eval_steps, "above 0", reason, action)
        metric, specs = self.metric_for_best_model, parse_specs(self.eval_rewards)
        require_one_of("metric_for_best_model", str(metric), self.known_metrics(specs))
        optimised = {RewardSpec.parse(text).target for text in self.optimised}
        held_out = {spec.label: spec.target for spec in specs}.get(str(metric).removesuffix(WINS))
        reason, action = "the guard needs a judgement that is not optimised", "Name another, or set guard: off"
        ok = held_out not in optimised
        require(ok, "metric_for_best_model", metric, "none of the rewards that are optimised", reason, action)
        if self.guard == "regularize":
            reason, action = "suspicious is what others rank lower", "Name one or two light rewards"
            require(bool(self.guard_rewards), "guard_rewards", self.guard_rewards, "set", reason, action)
            parse_specs(self.guard_rewards)

    @property
    def optimised(self) -> list[str]:
        """Every pointwise reward that the policy is trained to raise."""
        return [*self.reward_funcs, *([self.pairwise_reward] if self.pairwise_reward else [])]

    @property
    def proxy_weights(self) -> dict[str, float]:
        """Of the optimised rewards, by the labels that they have in evaluations."""
        pairwise = {RewardSpec.parse(self.pairwise_reward).label: self.pairwise_weight} if self.pairwise_reward else {}
        return {**self.weights, **pairwise}

    @property
    def evaluated_rewards(self) -> list[str]:
        """With the guard what is optimised is evaluated too, on the same images as what is not."""
        if self.guard == "off":
            return self.eval_rewards
        known = {spec.label for spec in parse_specs(self.eval_rewards)}
        return [*self.eval_rewards, *(text for text in self.optimised if RewardSpec.parse(text).label not in known)]

    @property
    def reference_guidance(self) -> float:
        own = self.rollout_guidance_scale if self.is_policy_gradient else 1.0
        return own if self.ref_guidance_scale is None else self.ref_guidance_scale

    @property
    def has_null_prompts(self) -> bool:
        """Whether the empty prompt is needed beside each prompt."""
        policy = self.rollout_guidance_scale if self.is_policy_gradient else 1.0
        return policy > 1 or (self.needs_reference and self.reference_guidance > 1)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.method == "dgpo" or self.guard == "regularize"


def check_together(model: ModelConfig, judge: VisionJudgeConfig, config: GRPOConfig) -> None:
    """Raise ConfigError for settings of several groups that contradict each other."""
    reason = "rollout and update must be of one policy, whose first ratio is 1"
    require(not (model.use_peft and model.lora_dropout), "lora_dropout", model.lora_dropout, "0", reason, "Set it")
    is_judged = config.method == "pref_grpo" and config.pairwise_reward is None
    if is_judged:
        reason, action = "pref_grpo compares images", "Set it and judge_model, or pairwise_reward"
        require(judge.judge_url is not None, "judge_url", judge.judge_url, "set", reason, action)
    else:
        reason, action = "no judge is asked", "Remove it, or set method: pref_grpo without pairwise_reward"
        require(judge.judge_url is None, "judge_url", judge.judge_url, "left out", reason, action)


CONFIGS = (ModelConfig, PromptConfig, VisionJudgeConfig, GRPOConfig)
