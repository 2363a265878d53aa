"""The settings of `prx-post grpo`, and what of them contradicts what. Imports nothing heavy."""

import math
from dataclasses import dataclass

from prx_post.base.settings import require, require_one_of
from prx_post.data.config import PromptConfig, TimestepConfig
from prx_post.evaluation.monitor_config import WINS, MonitorConfig
from prx_post.model.config import ModelConfig, SchedulerConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.registry import RewardSpec, parse_specs
from prx_post.stages.anchor.config import AnchorConfig
from prx_post.stages.grpo.settings import (
    NOISE_LEVELS,
    ODE,
    WINDOW_SIZES,
    GuardConfig,
    MethodConfig,
    RewardConfig,
    RolloutConfig,
)

FOR_STEPS: dict[str, object] = {
    **{"normalise_ratio": False, "max_divergence": None, "window": "all", "window_size": None},
    **{"last_step_reward_weight": 0.0, "last_step_reward_margin": None},
}
"""What policy gradients alone use, and what it is if it is not set; then the forward methods, a method, the guard's."""
FOR_IMAGES: dict[str, object] = {
    **{"noises_per_image": 1, "old_policy_decay": None, "timestep_mean": 0.0, "timestep_std": 1.0},
    **{"timestep_shift": 1.0, "timestep_uniform_fraction": 0.0},
}
FOR_METHOD: tuple[tuple[str, str, object], ...] = (
    ("nft", "nft_beta", 1.0),
    ("dgpo", "dgpo_beta", 100.0),
    ("awm", "awm_power", None),
)
GARDO: dict[str, object] = {
    **{"guard_rewards": [], "guard_encoder": None, "guard_max_divergence": None, "guard_beta": 0.1},
    **{"guard_fraction": 0.1, "guard_sync_rollouts": 15},
}


@dataclass
class GRPOConfig(
    TimestepConfig,
    RolloutConfig,
    SchedulerConfig,
    RewardConfig,
    MethodConfig,
    GuardConfig,
    AnchorConfig,
    MonitorConfig,
):
    """Online alignment, on top of the training loop's settings."""

    is_adapter = False  # no setting: what ModelConfig says, for check_zero

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rewards()
        self._check_unused()
        self._check_method()
        self._check_sampler()
        self._check_window()
        self._check_guard()
        self.check_scheduler()
        self.check_anchor()
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
        if not self.is_policy_gradient:
            return self.noises_per_image
        return self.trained_steps + self.climbs_last_step

    @property
    def climbs_last_step(self) -> bool:
        """Whether the rewards' own gradient is taken through the last step."""
        return self.last_step_reward_weight > 0

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

    @property
    def smallest_batch(self) -> int:
        return self.num_generations if self.method == "dgpo" else 1

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError for an adapter that is exchanged for an earlier one while its weights are split."""
        super().check_zero(stage, offload)
        follows = self.has_old_policy or self.sync_ref_model or self.guard == "regularize"
        reason = "an adapter that is held as it was earlier needs whole weights"
        ok = stage < 3 or not (self.is_adapter and follows)
        require(ok, "deepspeed", f"zero{stage}", "zero1 or zero2 with use_peft here", reason, "Set it")

    def _check_unused(self) -> None:
        """Raise ConfigError for what is set but plays no part."""
        steps, name = self.is_policy_gradient, self.method
        clips = not (name == "nft" or self.max_divergence is not None)
        wins = name == "pref_grpo"
        for is_used, field, default, why in (
            *((steps, field, default, f"method is {name!r}") for field, default in FOR_STEPS.items()),
            *((not steps, field, default, f"method is {name!r}") for field, default in FOR_IMAGES.items()),
            *((name == method, field, default, f"method is {name!r}") for method, field, default in FOR_METHOD),
            (clips, "epsilon", 1e-3, f"method is {name!r} and max_divergence {self.max_divergence}"),
            (wins, "pairwise_reward", None, f"method is {name!r}"),
            (wins, "pairwise_weight", 1.0, f"method is {name!r}"),
            (self.pairwise_reward is not None, "pairwise_temperature", 1.0, "pairwise_reward is null"),
            (self.climbs_last_step, "last_step_reward_margin", None, "last_step_reward_weight is 0"),
            (self.window == "mix", "window_rollouts", 25, f"window is {self.window!r}"),
            (self.sync_ref_model, "ref_model_sync_steps", 512, "sync_ref_model is false"),
            (self.guard != "off", "guard_patience", 2, "guard is 'off'"),
            (self.guard != "off", "guard_tolerance", 0.1, "guard is 'off'"),
            (self.guard == "lower_lr", "guard_lr_factor", 0.3, f"guard is {self.guard!r}"),
            *(
                (self.guard == "regularize", field, default, f"guard is {self.guard!r}")
                for field, default in GARDO.items()
            ),
        ):
            value, reason = getattr(self, field), f"{why}, which does not use it"
            ok = is_used or value == default
            require(ok, field, value, f"{default!r}", reason, "Leave it out, or change the other")

    def _check_method(self) -> None:
        name, reason = self.method, "the policy diverges without a clip"
        ok = self.epsilon is not None or name == "dgpo"
        require(ok, "epsilon", None, f"a number for {name}", reason, "Set it to 1e-3")
        reason = "epsilon is null, so that there is no lagged policy"
        ok = self.epsilon is not None or self.old_policy_decay is None
        require(ok, "old_policy_decay", self.old_policy_decay, "null", reason, "Set one of them")
        if self.awm_power is not None:
            ok, rule, reason = 0 < self.awm_power < 1, "between 0 and 1", "it flattens large errors"
            require(ok, "awm_power", self.awm_power, rule, reason, "Set it to 0.25")
        ok, reason = not (self.normalise_ratio and self.max_divergence), "each is a trust region of its own"
        require(ok, "max_divergence", self.max_divergence, "null with normalise_ratio", reason, "Set one of them")
        holds = self.beta > 0 or self.guard == "regularize"
        ok, reason = holds or self.ref_guidance_scale is None, "beta is 0, so that nothing is held to the reference"
        require(ok, "ref_guidance_scale", self.ref_guidance_scale, "null", reason, "Set beta, or leave it out")
        is_synced, reason = self.sync_ref_model, "beta is 0 and there is no reference to sync"
        ok = not is_synced or self.beta > 0 or name == "dgpo"
        require(ok, "sync_ref_model", is_synced, "false", reason, "Set beta, or leave it out")
        ok, reason = name == "pref_grpo" or bool(self.reward_funcs), "images are rewarded by something"
        require(ok, "reward_funcs", self.reward_funcs, "one reward or more", reason, "Name a reward, such as hpsv2")

    def _check_sampler(self) -> None:
        reason, action = "policy gradients need random steps", "Choose sde, cps, dance or renoise"
        ok = not self.is_policy_gradient or self.sampler_name != ODE
        require(ok, "rollout_sampler", self.rollout_sampler, "one whose steps are random", reason, action)
        if self.noise_level is None:
            return
        reason, action = f"rollout_sampler is {self.sampler_name!r}", "Leave it out"
        ok = NOISE_LEVELS.get(self.sampler_name) is not None
        require(ok, "noise_level", self.noise_level, "null", reason, action)
        reason, action = "at 1 nothing of the old noise is kept", "Choose renoise for that"
        ok = self.sampler_name != "cps" or self.noise_level < 1
        require(ok, "noise_level", self.noise_level, "below 1 for cps", reason, action)

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
            ranks = parse_specs(self.guard_rewards)
            ok = bool(ranks) and not optimised & {spec.target for spec in ranks}
            require(ok, "guard_rewards", self.guard_rewards, "set to what is not optimised", reason, action)
            parse_specs([*self.reward_funcs, *self.guard_rewards])  # whose labels must differ

    @property
    def optimised(self) -> list[str]:
        """Every pointwise reward that the policy is trained to raise."""
        return [*self.reward_funcs, *([self.pairwise_reward] if self.pairwise_reward else [])]

    @property
    def proxy_weights(self) -> dict[str, float]:
        """Of the optimised rewards, by the labels that they have in evaluations."""
        if self.method == "pref_grpo" and self.pairwise_reward is None:
            return {}  # what the judge prefers has no score, and the rest alone would hide that it is being hacked
        weights = dict(self.weights)
        if self.pairwise_reward is not None:
            label = RewardSpec.parse(self.pairwise_reward).label
            weights[label] = weights.get(label, 0.0) + self.pairwise_weight
        return weights

    @property
    def evaluated_rewards(self) -> list[str]:
        """With the guard what is optimised is evaluated too, on the same images as what is not."""
        if self.guard == "off":
            return self.eval_rewards
        return list({RewardSpec.parse(text).label: text for text in [*self.optimised, *self.eval_rewards]}.values())

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
    config.is_adapter = model.use_peft
    is_judged = config.method == "pref_grpo" and config.pairwise_reward is None
    if is_judged:
        reason, action = "pref_grpo compares images", "Set it and judge_model, or pairwise_reward"
        require(judge.judge_url is not None, "judge_url", judge.judge_url, "set", reason, action)
    else:
        reason, action = "no judge is asked", "Remove it, or set method: pref_grpo without pairwise_reward"
        require(judge.judge_url is None, "judge_url", judge.judge_url, "left out", reason, action)


CONFIGS = (ModelConfig, PromptConfig, VisionJudgeConfig, GRPOConfig)
